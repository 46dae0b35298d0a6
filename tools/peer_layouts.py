"""What other projects keep of a teacher, re-created from their documented layouts: logits in, bytes out, targets back.

`bench_store` holds them beside a store of ours; nothing else imports them. Every layout has three functions: `encode`
(logits -> payload), `decode` (payload -> the targets that the project trains on) and `stored_probs` (payload -> the
estimate of p itself, before any renormalisation; its distance from softmax(logits) is the layout's error). No layout
compresses, so `payload.nbytes` is the payload's size in a container that costs nothing. Where a layout is documented
only in part, the choice here is the one that favours the project, and its docstring says so. Written for speed: no
loop over positions when reading, and when writing only the lookups of RS-KD's draws. Measure on one core with
OPENBLAS_NUM_THREADS=1: where cores are shared, a second BLAS thread slowed DistillKit's small product up to 40 times.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Bytes: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]
Ids: TypeAlias = npt.NDArray[np.uint32]

ROWS_AT_ONCE = 16  # of V = 151,936 floats: 10 MB; larger blocks leave the cache
SINGULAR_CUTOFF = 1e-5  # absolute, as DistillKit's; a relative cut-off of 1e-5 would drop 4 of its 6 terms
COUNT_BITS = 7  # of an RS-KD entry; the id has the rest


@dataclass(frozen=True, eq=False)
class Payload:
    """The bytes of N positions, and what a file's header would say of them."""

    data: Bytes
    """[nbytes]"""
    positions: int
    """N"""
    vocab_size: int
    """V"""

    @property
    def nbytes(self) -> int:
        """Bytes of all N positions."""
        return self.data.nbytes

    def planes(self, *row_bytes: int) -> Iterator[Bytes]:
        """Cut the bytes into one array [N, row_bytes] after another."""
        start = 0
        for width in row_bytes:
            end = start + width * self.positions
            yield self.data[start:end].reshape(self.positions, width)
            start = end


class Layout(Protocol):
    """What `bench_store` asks of a peer."""

    def encode(self, logits: Floats, rng: np.random.Generator, /) -> Payload:
        """Keep float32 [N, V] logits. Only RS-KD draws from `rng`.

        Raises:
            ValueError: fewer logits than entries to keep, or a logit that is kept is not finite.
        """

    def decode(self, payload: Payload) -> tuple[Ids, Floats]:
        """Token ids [N, k] and the probabilities trained on [N, k]; what pads a shorter row is id 0 with weight 0."""

    def stored_probs(self, payload: Payload) -> tuple[Ids, Floats]:
        """The ids of `decode` and the estimates of p that the bytes hold [N, k], not renormalised."""


@dataclass(frozen=True)
class TopK:
    """The k largest of each position: ids u32 [N, k], then log-probs bf16 [N, k]; 6 k bytes per position.

    The largest come first. `decode` gives exp(log-prob) as it is: the sum is the mass kept, below 1.
    """

    k: int

    def encode(self, logits: Floats, _rng: np.random.Generator, /) -> Payload:
        ids, log_probs = _top_log_probs(logits, self.k, largest_first=True)
        return _payload(logits, ids.astype("<u4"), to_bf16(log_probs))

    def decode(self, payload: Payload) -> tuple[Ids, Floats]:
        return self.stored_probs(payload)

    def stored_probs(self, payload: Payload) -> tuple[Ids, Floats]:
        ids, log_probs = payload.planes(4 * self.k, 2 * self.k)
        values = from_bf16(log_probs)
        return ids.view("<u4"), np.exp(values, out=values)


@dataclass(frozen=True)
class Dwq:
    """Targets of mlx-lm's DWQ: ids u32 [N, 1024], then values bf16 [N, 1024], unordered; 6,144 bytes per position.

    mlx-lm keeps raw logits in the model's dtype. Here the values are log-probs: the same numbers up to a constant that
    the softmax drops, and finer in bf16 where it matters (a logit of 20 is rounded by up to 0.06, a log-prob near 0 by
    nothing), so this favours mlx-lm; so does `stored_probs`, exp(log-prob), which its files cannot give for want of the
    log-sum-exp. `decode` is the softmax over the 1024 kept, at temperature 1 as for every layout here (mlx-lm: 2).
    """

    k: int = 1024

    def encode(self, logits: Floats, _rng: np.random.Generator, /) -> Payload:
        ids, log_probs = _top_log_probs(logits, self.k, largest_first=False)
        return _payload(logits, ids.astype("<u4"), to_bf16(log_probs))

    def decode(self, payload: Payload) -> tuple[Ids, Floats]:
        return _renormalised(*self.stored_probs(payload))

    def stored_probs(self, payload: Payload) -> tuple[Ids, Floats]:
        return TopK(self.k).stored_probs(payload)


@dataclass(frozen=True)
class DistillKit:
    """DistillKit's `logprob_compressor` without residual bins or delta coding, as both configurations of its README.

    Two planes, columns of its Parquet files: ids packed MSB-first at ceil(log2 V) bits [N, ceil(k bits / 8)], then
    log-probs [N, 2 exact_k + 4 len(terms)]. Log-probs fall along a row; the first exact_k are bf16, the others are
    sum_j c_j b_j(t) with t = 0, 1, ... k - exact_k - 1 (its `normalize_t` is false unless set) and float32 c. The b_j
    stand in the order of `terms`, the configuration's own: t^i for a number i, else sqrt(t) or exp(t). c is the least
    squares fit by pseudo-inverse, singular values of at most 1e-5 dropped. `decode` divides by the sum of the k kept
    (`missing_probability_handling: zero`).

    Open, and chosen in its favour: the fit is in float64 (in float32 it came out the same). Nothing bounds a fitted
    log-prob, here as there: one can come out above 0. On 1,536 positions of SmolLM2-135M the fitted log-probs were off
    by 0.033 nats on average, 1.1 at most (recommended), and by 0.116 and 4.1 (budget).
    """

    k: int
    exact_k: int
    terms: tuple[int | Literal["sqrt", "exp"], ...]

    def encode(self, logits: Floats, _rng: np.random.Generator, /) -> Payload:
        ids, log_probs = _top_log_probs(logits, self.k, largest_first=True)
        exact, rest = np.split(log_probs, [self.exact_k], axis=1)
        left, singular, right = np.linalg.svd(self._basis(), full_matrices=False)
        kept = singular > SINGULAR_CUTOFF
        inverse = (left[:, kept] / singular[kept]) @ right[kept]  # transposed, for log-probs that are rows
        coefficients = (rest @ inverse).astype("<f4")
        head = np.concatenate([to_bf16(exact).view(np.uint8), coefficients.view(np.uint8)], axis=1)
        return _payload(logits, pack_bits(ids, id_bits(logits.shape[1])), head)

    def decode(self, payload: Payload) -> tuple[Ids, Floats]:
        return _renormalised(*self.stored_probs(payload))

    def stored_probs(self, payload: Payload) -> tuple[Ids, Floats]:
        bits = id_bits(payload.vocab_size)
        packed, head = payload.planes(-(-self.k * bits // 8), 2 * self.exact_k + 4 * len(self.terms))
        exact, coefficients = np.split(head, [2 * self.exact_k], axis=1)
        values = np.empty((payload.positions, self.k), np.float32)
        values[:, : self.exact_k] = from_bf16(np.ascontiguousarray(exact))
        basis = self._basis().T.astype(np.float32)
        np.matmul(np.ascontiguousarray(coefficients).view("<f4"), basis, out=values[:, self.exact_k :])
        return unpack_bits(packed, self.k, bits), np.exp(values, out=values)

    def _basis(self) -> npt.NDArray[np.float64]:
        """float64 [k - exact_k, terms]"""
        t = np.arange(self.k - self.exact_k, dtype=np.float64)
        special = {"sqrt": np.sqrt, "exp": np.exp}
        return np.stack([t**i if isinstance(i, int) else special[i](t) for i in self.terms], axis=1)


@dataclass(frozen=True)
class RsKd:
    """Random sampling KD: `draws` ids drawn from p with replacement, of which each stands once with its count.

    An entry is (id << 7 | count) in 3 little-endian bytes: 17 bits of id, 7 of count. A vocabulary above 131,072 does
    not fit; there an entry is 4 bytes, 25 and 7 bits. Rows are ragged and their lengths cost nothing, since the counts
    of a row sum to `draws`: which favours RS-KD, whose paper does not say how rows are found. `decode` gives
    count / draws, which sums to 1 and whose mean is p.

    Reference: Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", 2025.
    """

    draws: int = 50

    def __post_init__(self) -> None:
        if not 0 < self.draws < 1 << COUNT_BITS:
            raise ValueError(f"{self.draws} draws: a count of {COUNT_BITS} bits takes 1 to {(1 << COUNT_BITS) - 1}")

    def encode(self, logits: Floats, rng: np.random.Generator, /) -> Payload:
        n, vocab_size = logits.shape
        points = np.sort(rng.random((n, self.draws)), axis=1)
        drawn = np.empty((n, self.draws), np.int64)
        for rows in _row_blocks(n):
            mass = np.cumsum(_exp_above_peak(logits[rows])[0], axis=1, dtype=np.float64)
            for below, u, ids in zip(mass, points[rows], drawn[rows], strict=True):
                ids[:] = np.searchsorted(below, u * below[-1], side="right")
        np.minimum(drawn, vocab_size - 1, out=drawn)  # u * mass can round up to the whole mass
        first = np.flatnonzero(np.diff(drawn, axis=1, prepend=-1))
        counts = np.diff(first, append=drawn.size)
        entries = (drawn.ravel()[first] << COUNT_BITS | counts).astype("<u4")
        return _payload(logits, entries.view(np.uint8).reshape(-1, 4)[:, : self.entry_bytes(vocab_size)])

    def decode(self, payload: Payload) -> tuple[Ids, Floats]:
        width = self.entry_bytes(payload.vocab_size)
        entries = np.ndarray(payload.nbytes // width, "<u4", _with_a_spare_word(payload.data), strides=(width,))
        entries = entries & ((1 << 8 * width) - 1)
        counts = entries & ((1 << COUNT_BITS) - 1)
        whole_rows = np.arange(1, payload.positions + 1) * self.draws
        lengths = np.diff(np.searchsorted(np.cumsum(counts, dtype=np.int64), whole_rows) + 1, prepend=0)
        filled = np.arange(lengths.max(initial=0)) < lengths[:, None]
        padded = np.zeros(filled.shape, np.uint32)
        padded[filled] = entries
        weights = (padded & ((1 << COUNT_BITS) - 1)).astype(np.float32)
        weights /= self.draws
        padded >>= np.uint32(COUNT_BITS)
        return padded, weights

    def stored_probs(self, payload: Payload) -> tuple[Ids, Floats]:
        return self.decode(payload)

    @staticmethod
    def entry_bytes(vocab_size: int) -> int:
        """3 up to V = 131,072, above it 4."""
        return 3 if vocab_size <= 1 << (24 - COUNT_BITS) else 4


PEERS: tuple[tuple[str, Layout], ...] = (
    ("RS-KD, 50 draws", RsKd()),
    ("top-16, bf16", TopK(16)),
    ("DistillKit budget", DistillKit(k=50, exact_k=1, terms=(0, 1, "sqrt"))),
    ("top-50, bf16", TopK(50)),
    ("DistillKit recommended", DistillKit(k=128, exact_k=16, terms=(0, 1, 2, 3, 4, "sqrt"))),
    ("mlx-lm DWQ", Dwq()),
)
"""By rising bytes per position at V = 49,152."""


def id_bits(vocab_size: int) -> int:
    """ceil(log2 V): 16 for V = 49,152, 18 for V = 151,936."""
    return max(1, (vocab_size - 1).bit_length())


def pack_bits(ids: Ids, bits: int) -> Bytes:
    """Pack [N, k] numbers MSB-first at `bits` each into uint8 [N, ceil(k bits / 8)]; the last byte ends in zeros."""
    each = np.unpackbits(ids.astype(">u4").view(np.uint8).reshape(*ids.shape, 4), axis=2)
    return np.packbits(each[:, :, 32 - bits :].reshape(len(ids), -1), axis=1)


def unpack_bits(packed: Bytes, k: int, bits: int) -> Ids:
    """The inverse of `pack_bits`, for up to 25 bits: uint32 [N, k].

    The id after every lcm(bits, 8) bits starts at the same bit of a byte again, so each such phase (4 of them at 18
    bits) is one strided read of big-endian 32-bit words, one shift and one mask.
    """
    if bits > 25:
        raise ValueError(f"{bits} bits from any bit of a byte on do not fit a 32-bit word; at most 25")
    phases = 8 // math.gcd(bits, 8)
    n, row_bytes = packed.shape
    buffer = _with_a_spare_word(packed)
    ids = np.empty((n, k), np.uint32)
    for phase in range(min(phases, k)):
        byte, bit = divmod(phase * bits, 8)
        shape = n, len(range(phase, k, phases))
        words = np.ndarray(shape, ">u4", buffer, offset=byte, strides=(row_bytes, phases * bits // 8)).astype(np.uint32)
        words >>= np.uint32(32 - bits - bit)
        words &= np.uint32((1 << bits) - 1)
        ids[:, phase::phases] = words
    return ids


def to_bf16(values: Floats) -> npt.NDArray[np.uint16]:
    """The upper half of each finite float32, to nearest, ties to even."""
    word = values.view(np.uint32)
    return ((word + 0x7FFF + (word >> 16 & 1)) >> 16).astype("<u2")


def from_bf16(stored: Bytes) -> Floats:
    """float32 [N, k] of uint8 [N, 2 k]."""
    return (stored.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _with_a_spare_word(data: Bytes) -> Bytes:
    """The bytes in one row with four more behind them, for words that begin in the last byte."""
    buffer = np.zeros(data.size + 4, np.uint8)
    buffer[: data.size] = data.reshape(-1)
    return buffer


def _payload(logits: Floats, *planes: npt.NDArray[np.generic]) -> Payload:
    """One plane after another, each as its bytes."""
    data = [np.ascontiguousarray(plane).reshape(-1).view(np.uint8) for plane in planes]
    return Payload(data[0] if len(data) == 1 else np.concatenate(data), *logits.shape)


def _renormalised(ids: Ids, probs: Floats) -> tuple[Ids, Floats]:
    """The same ids with probabilities that sum to 1 in each row; `probs` is overwritten."""
    probs /= np.einsum("nk->n", probs)[:, None]  # 3 times as fast as probs.sum(axis=1) on rows of 128
    return ids, probs


def _row_blocks(n: int) -> Iterator[slice]:
    return (slice(start, start + ROWS_AT_ONCE) for start in range(0, n, ROWS_AT_ONCE))


def _exp_above_peak(logits: Floats) -> tuple[Floats, Floats]:
    """exp(z - max z) of each row [N, V], and max z [N, 1].

    Raises:
        ValueError: NaN or +inf among the logits, or a row with no finite one.
    """
    peak = logits.max(axis=1, keepdims=True)
    if not np.isfinite(peak).all():
        raise ValueError("a row of logits holds NaN or +inf, or nothing finite; no distribution can be kept of it")
    above = logits - peak
    return np.exp(above, out=above), peak


def _top_log_probs(logits: Floats, k: int, *, largest_first: bool) -> tuple[Ids, Floats]:
    """Ids and log-probs [N, k] of the k largest logits of each row, in any order unless `largest_first`."""
    n, vocab_size = logits.shape
    if k > vocab_size:
        raise ValueError(f"{k} entries are to be kept, but the vocabulary has {vocab_size}")
    ids = np.empty((n, k), np.uint32)
    log_probs = np.empty((n, k), np.float32)
    for rows in _row_blocks(n):
        mass, peak = _exp_above_peak(logits[rows])
        top = np.argpartition(logits[rows], vocab_size - k, axis=1)[:, vocab_size - k :]
        values = np.take_along_axis(logits[rows], top, axis=1)
        if largest_first:
            order = np.argsort(-values, axis=1, kind="stable")
            top, values = np.take_along_axis(top, order, axis=1), np.take_along_axis(values, order, axis=1)
        ids[rows] = top
        log_probs[rows] = values - peak - np.log(mass.sum(axis=1, keepdims=True))
    if not np.isfinite(log_probs).all():
        raise ValueError(f"a row of logits has fewer than {k} finite ones")
    return ids, log_probs
