"""DistillKit's codec of today: a position's log-probs as exact head, fitted curve and quantised residuals.

A position of `k` entries, sorted by falling log-prob, is two rows of bytes. `compressed_logprobs` holds, one after the
other and each part in whole bytes: the first `exact_k` values; one coefficient per term of the curve through the rest;
per residual bin a scale and its elements. `bytepacked_indices` holds the ids, ceil(log2 d) bits each, highest first.
Nothing in the bytes says which settings wrote them. DistillKit (Arcee), distillkit/compression, 2026-03.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from logitstore.errors import DatasetError
from logitstore.foreign.numbers import FLOAT_BYTES, floats, rounded, unpack_bytes

MAX_ENTRIES = 1 << 16
MAX_VOCAB = 1 << 31
_MAX_POWER, _MAX_ELEMENT_BITS = 64, 32
T = TypeVar("T")
_CURVES = {"sqrt": np.sqrt, "exp": np.exp}


@dataclass(frozen=True)
class ResidualBin:
    """`num_elements` residuals of `element_bits` bits that share a scale."""

    scale_dtype: str
    element_bits: int
    num_elements: int


@dataclass(frozen=True)
class CurveCodec:
    """The settings of ``compression_config.yaml`` that matter for reading, under their own names."""

    d: int
    k: int
    exact_k: int
    exact_dtype: str = "float32"
    polynomial_terms: tuple[int | str, ...] = ()
    term_dtype: str = "float32"
    residual_bins: tuple[ResidualBin, ...] = ()
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @classmethod
    def parse(cls, settings: Mapping[str, Any], where: str) -> Self:
        """Check the settings that a file gives.

        Raises:
            DatasetError: a setting is missing, unknown or out of range.
        """
        known = dict(settings)
        known["polynomial_terms"] = tuple(_list(known.get("polynomial_terms"), "polynomial_terms", where))
        bins = _list(known.get("residual_bins"), "residual_bins", where)
        known["residual_bins"] = tuple(make(ResidualBin, entry, where) for entry in bins)
        codec = make(cls, known, where)
        require(2 <= codec.d <= MAX_VOCAB, f"d is {codec.d}", "2 to 2^31", where)
        require(1 <= codec.k <= MAX_ENTRIES, f"k is {codec.k}", f"1 to {MAX_ENTRIES}", where)
        require(0 <= codec.exact_k <= codec.k, f"exact_k is {codec.exact_k}", f"0 to {codec.k}", where)
        for name in (codec.exact_dtype, codec.term_dtype, *(entry.scale_dtype for entry in codec.residual_bins)):
            require(name in FLOAT_BYTES, f"a dtype is {name!r}", ", ".join(FLOAT_BYTES), where)
        for term in codec.polynomial_terms:
            power = isinstance(term, int) and not isinstance(term, bool) and 0 <= term <= _MAX_POWER
            require(power or term in _CURVES, f"a term is {term!r}", f"0 to {_MAX_POWER}, 'sqrt' or 'exp'", where)
        for entry in codec.residual_bins:
            bits, count = entry.element_bits, entry.num_elements
            require(1 <= bits <= _MAX_ELEMENT_BITS, f"element_bits is {bits}", f"1 to {_MAX_ELEMENT_BITS}", where)
            require(count >= 1, f"num_elements is {count}", "1 or more", where)
        curve, covered = codec.k - codec.exact_k, sum(entry.num_elements for entry in codec.residual_bins)
        require(covered <= curve, f"residual_bins hold {covered} elements", f"at most {curve}", where)
        return codec

    @property
    def id_bits(self) -> int:
        """Bits of one id: ceil(log2 d), with the logarithm in float32 as DistillKit takes it."""
        return int(np.ceil(np.log2(np.float32(self.d))))

    @property
    def id_bytes(self) -> int:
        """Bytes of one position's ids."""
        return -(-self.k * self.id_bits // 8)

    @property
    def value_bytes(self) -> int:
        """Bytes of one position's log-probs."""
        bins = sum(FLOAT_BYTES[b.scale_dtype] + -(-b.element_bits * b.num_elements // 8) for b in self.residual_bins)
        terms = len(self.polynomial_terms) * FLOAT_BYTES[self.term_dtype]
        return self.exact_k * FLOAT_BYTES[self.exact_dtype] + terms + bins

    def decode_ids(self, data: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Ids [P, k] from `bytepacked_indices`, uint8 [P, id_bytes]."""
        return unpack_bytes(data, self.id_bits, self.k).astype(np.int64)

    def decode_log_probs(self, data: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """Log-probs float64 [P, k] from `compressed_logprobs`, uint8 [P, value_bytes]; -inf from the first -inf on."""
        parts = _Parts(data)
        exact = floats(parts.take(self.exact_k * FLOAT_BYTES[self.exact_dtype]), self.exact_dtype)
        curve = np.zeros((len(data), self.k - self.exact_k))
        with np.errstate(invalid="ignore", over="ignore"):
            if self.polynomial_terms:
                size = len(self.polynomial_terms) * FLOAT_BYTES[self.term_dtype]
                curve += self._fit(floats(parts.take(size), self.term_dtype))
            start = 0
            for entry in self.residual_bins:
                curve[:, start : start + entry.num_elements] += _residuals(parts, entry)
                start += entry.num_elements
            values = np.concatenate([exact, curve], axis=1)
            if self.delta_encoding:
                values = np.cumsum(values, axis=1)
            elif self.exact_k:
                # sorted before it was fitted: what a curve says above the last exact value is the fit's error
                values[:, self.exact_k :] = np.minimum(curve, exact[:, -1:])
        return np.where(np.logical_or.accumulate(np.isneginf(values), axis=1), -np.inf, values)

    def _fit(self, coefficients: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The curve [P, k - exact_k], rounded where DistillKit rounds: residuals are relative to that."""
        count = self.k - self.exact_k
        t = np.linspace(0, 1, count) if self.normalize_t else np.arange(count, dtype=np.float64)
        fit = np.zeros((len(coefficients), count))
        for i, term in enumerate(self.polynomial_terms):
            basis = _CURVES[term](t) if isinstance(term, str) else t**term
            fit += rounded(rounded(basis, self.term_dtype) * coefficients[:, i : i + 1], self.term_dtype)
        return rounded(fit, self.term_dtype)


class _Parts:
    """Cuts the columns of a byte matrix off one after the other."""

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        self.rest = data

    def take(self, size: int) -> npt.NDArray[np.uint8]:
        part, self.rest = self.rest[:, :size], self.rest[:, size:]
        return part


def _residuals(parts: _Parts, entry: ResidualBin) -> npt.NDArray[np.float64]:
    """[P, num_elements]; one bit means -scale or +scale, more bits a signed multiple of the scale."""
    scale = floats(parts.take(FLOAT_BYTES[entry.scale_dtype]), entry.scale_dtype)
    data = parts.take(-(-entry.element_bits * entry.num_elements // 8))
    codes = unpack_bytes(data, entry.element_bits, entry.num_elements).astype(np.float64)
    return scale * (2 * codes - 1 if entry.element_bits == 1 else codes - 2 ** (entry.element_bits - 1))


def make(cls: type[T], settings: Any, where: str) -> T:
    """A frozen dataclass of plain settings from a mapping of them.

    Raises:
        DatasetError: a name is missing or unknown, or a value of the wrong type.
    """
    if not isinstance(settings, Mapping):
        raise DatasetError(f"{where}: found {settings!r:.60}, expected the settings of {cls.__name__} as a mapping")
    names = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    for name, value in settings.items():
        require(name in names, f"the setting {name!r:.60}", ", ".join(names), where)
        kind = names[name].type
        right = type(value) is kind or kind not in (int, str, bool)
        require(right, f"{name} is {value!r:.60}", f"of type {getattr(kind, '__name__', kind)}", where)
    try:
        return cls(**settings)
    except TypeError as error:
        raise DatasetError(f"{where}: {str(error).partition('() ')[2]}; add it to the file") from error


def require(holds: bool, found: str, expected: str, where: str) -> None:
    """Raise a DatasetError that says so where a setting does not hold."""
    if not holds:
        raise DatasetError(f"{where}: {found}, expected {expected}; use the file that the capture wrote")


def _list(value: Any, name: str, where: str) -> list[Any]:
    require(value is None or isinstance(value, list), f"{name} is {value!r:.60}", "a list", where)
    return value or []
