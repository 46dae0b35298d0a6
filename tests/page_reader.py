"""A reader of stores written from FORMAT.md alone, with zarr and NumPy: it shares no code with the package.

Where the two differ, the page is wrong.
"""

import math
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import zarr

Ints = npt.NDArray[np.int64]
NO_HIDDEN = np.empty((0, 0), np.float32)


class Streams:
    """Takes streams off the front of a chunk's row."""

    def __init__(self, row: npt.NDArray[np.uint8]) -> None:
        self.row, self.at = row, 0

    def take(self, n: int, width: int = 1) -> Ints:
        """Integers of so many bytes, byte plane after byte plane."""
        planes = self.row[self.at : self.at + n * width].astype(np.int64).reshape(width, n)
        self.at += n * width
        return sum((plane << 8 * i for i, plane in enumerate(planes)), np.zeros(n, np.int64))

    def varints(self, n: int) -> Ints:
        values = first = self.take(n)
        two, three, five = first >= 128, first >= 248, first == 255
        values = np.where(two, 128 + 256 * (first - 128), values)
        values = np.where(three, 30_848 + 65_536 * (first - 248), values)
        values = np.where(five, 489_600, values)
        values[two] += self.take(int(two.sum()))
        values[three] += self.take(int(three.sum())) << 8
        values[five] += self.take(2 * int(five.sum())).reshape(-1, 2) @ [1 << 16, 1 << 24]
        return values


class Entries(NamedTuple):
    """One set of a position, in numbers."""

    ids: Ints
    """The head by rising id, then the tail by rising id."""
    codes: Ints
    weights: npt.NDArray[np.float64]
    log_probs: npt.NDArray[np.float64]
    head: int
    tail: float


class Position(NamedTuple):
    sets: list[Entries]
    label: int
    label_log_prob: float
    entropy: float
    log_z: list[float]
    hidden: npt.NDArray[np.float32]
    """[layers, D]"""


class PageReader:
    """A shard of a store."""

    def __init__(self, root: zarr.Group, name: str) -> None:
        recipe = root.attrs["logitstore"]["recipe"]
        self.group = root["shards"][name]
        self.kind, *numbers = recipe["selection"].split(":")
        self.k = int(numbers[1] if self.kind == "top-p" else numbers[0])
        self.counts = self.kind == "random" and len(numbers) == 1
        self.vocab, self.log_z = recipe["vocab_size"], len(recipe["log_z"])
        self.own = recipe["tail_log_probs"]
        self.sets = len(recipe["temperatures"]) * recipe["replicas"]
        self.h = 1 if self.k < 1 << 8 else 2 if self.k < 1 << 16 else 4
        self.b = next(b for b, most in ((1, 128), (2, 30_848), (3, 489_600), (5, 1 << 31)) if self.vocab <= most)
        self.total = self.group.attrs["positions"]
        r = self.k * (1 + self.b) + 2 * self.h + 2
        self.n = max(1, min(2_048, self.total, (4 << 20) // r))
        assert self.group["entries-0"].shape == (-(-self.total // self.n), self.n * r)
        assert self.group["positions"].shape[1] == self.n * (2 + 2 * self.log_z + self.h + self.b)
        self.layers, self.d = len(recipe.get("hidden_layers", [])), recipe.get("hidden_size", 0)
        common = Streams(self.group["ranks"][:].reshape(-1)).take(self.group["ranks"].shape[1], 4)
        self.id_of = np.concatenate([common, np.setdiff1d(np.arange(self.vocab), common)])

    def documents(self) -> list[tuple[bytes, list[int], list[Position]]]:
        """Key, tokens and positions of each document."""
        rows = self.group["documents"][:]
        heads = rows[:, 16:].copy().view("<u4")
        hidden = self.hidden()
        positions = [p for chunk in range(-(-self.total // self.n)) for p in self.chunk(chunk)]
        positions = [p._replace(hidden=hidden[t]) for t, p in enumerate(positions)]
        ends = np.cumsum(heads[:, 0].astype(int) - 1)
        assert ends[-1] == self.total == len(positions)
        parts = [positions[start:end] for start, end in pairwise([0, *ends])]
        return [
            (row[:16].tobytes(), [int(head[1]), *(p.label for p in part)], part)
            for row, head, part in zip(rows, heads, parts, strict=True)
        ]

    def hidden(self) -> npt.NDArray[np.float32]:
        d, g = self.d, -(-self.d // 16)
        found = np.zeros((self.total, self.layers, d), np.float32)
        for layer in range(self.layers):
            rows = self.group[f"hidden-{layer}"]
            n = max(1, min(2_048, self.total, (1 << 18) // (d + 2 * g)))
            assert rows.shape == (-(-self.total // n), n * (d + 2 * g))
            for chunk in range(rows.shape[0]):
                streams, m = Streams(rows[chunk]), min(n, self.total - chunk * n)
                scales = (streams.take(m * g, 2) << 16).astype(np.uint32).view(np.float32).reshape(m, g)
                values = (streams.take(m * d) + 128) % 256 - 128
                found[chunk * n : chunk * n + m, layer] = values.reshape(m, d) * np.repeat(scales, 16, axis=1)[:, :d]
                assert not streams.row[streams.at :].any()
        return found

    def chunk(self, number: int) -> list[Position]:
        n = min(self.n, self.total - number * self.n)
        sets = [self.entries(Streams(self.group[f"entries-{i}"][number]), n) for i in range(self.sets)]
        streams = Streams(self.group["positions"][number])
        entropy = streams.take(n) / 16
        log_z = streams.take(self.log_z * n, 2).reshape(self.log_z, n).T / 4096
        place = streams.take(n, self.h)
        found = [self.by_weight(e)[p - 1] if p else None for e, p in zip(sets[0], place, strict=True)]
        near = [self.kind != "random" and f is not None and f < e.head and e.codes[f] != 0
                for e, f in zip(sets[0], found, strict=True)]  # fmt: skip
        near_codes, label_codes = iter(streams.take(sum(near))), iter(streams.take(n - sum(near)))
        others = iter(self.id_of[streams.varints(int((place == 0).sum()))])
        assert not streams.row[streams.at :].any()
        positions = []
        for t, (first, f) in enumerate(zip(sets[0], found, strict=True)):
            code = (first.codes[f] + next(near_codes)) % 256 if near[t] else next(label_codes)
            label = int(next(others) if f is None else first.ids[f])
            positions.append(
                Position([e[t] for e in sets], label, code / -16, entropy[t], log_z[t].tolist(), NO_HIDDEN)
            )
        return positions

    def by_weight(self, e: Entries) -> list[Any]:
        sign = -1 if self.counts else 1
        return [*np.lexsort((e.ids[: e.head], sign * e.codes[: e.head])), *range(e.head, len(e.ids))]

    def entries(self, streams: Streams, n: int) -> list[Entries]:
        random, threshold, k = self.kind == "random", self.kind == "threshold", self.k
        heads = streams.take(n, self.h)
        assert heads.max() <= k
        largest, tail = np.zeros(n, np.int64), np.full(n, 255)
        if not random:
            largest = streams.take(n, self.h)
            tail = np.where(largest == 0, 0, 0)
            tail[largest > 0] = streams.take(int((largest > 0).sum()))
        if threshold:
            anchor = tail + np.array([round(16 * math.log(max(k - head, 1))) for head in heads])
        else:
            anchor = streams.take(n)
        coded = [np.arange(1, head + 1) != i for head, i in zip(heads, largest, strict=True)]
        values = self.split(streams.take(sum(map(sum, coded))), [int(c.sum()) for c in coded])
        head_steps = self.split(streams.varints(int(heads.sum())), heads)
        tails = k - heads if threshold else np.zeros(n, np.int64)
        own = self.split(streams.take(int(tails.sum())), tails) if self.own else n * [np.empty(0, np.int64)]
        tail_steps = self.split(streams.varints(int(tails.sum())), tails) if threshold else n * [np.empty(0, np.int64)]
        assert not streams.row[streams.at :].any()
        entries = []
        for t in range(n):
            codes = np.zeros(heads[t], np.int64)
            codes[coded[t]] = (anchor[t] - values[t]) % 256
            head_ids, codes = self.by_id(np.cumsum(head_steps[t]), codes)
            own_codes = (own[t] + anchor[t]) % 256 if self.own else np.zeros(tails[t], np.int64)
            tail_ids, own_codes = self.by_id(np.cumsum(tail_steps[t]), own_codes)
            weights, mass = self.weigh(codes, int(tail[t]), int(tails[t]))
            with np.errstate(divide="ignore"):
                log_probs = np.log([*weights[: heads[t]], *self.probability(own_codes)])
            all_ids, all_codes = np.concatenate([head_ids, tail_ids]), np.concatenate([codes, own_codes])
            entries.append(Entries(all_ids, all_codes, weights, log_probs, int(heads[t]), mass))
        return entries

    def by_id(self, ranks: Ints, codes: Ints) -> tuple[Ints, Ints]:
        ids = self.id_of[ranks]
        order = np.argsort(ids, kind="stable")
        return ids[order], codes[order]

    def weigh(self, codes: Ints, tail: int, tails: int) -> tuple[npt.NDArray[np.float64], float]:
        if self.kind == "random":
            return (codes / self.k if self.counts else math.e**4 * self.probability(codes)), 0.0
        cells = self.probability(np.array([tail, *codes]))
        (largest,) = np.flatnonzero(np.array([tail, *codes]) == 0)
        others = np.delete(cells, largest)
        cells[largest] = 1 - others.sum()
        if cells[largest] < others.max(initial=0) / 2:
            cells[largest] = others.max()
            cells /= cells.sum()
        return np.concatenate([cells[1:], np.full(tails, cells[0] / max(tails, 1))]), float(cells[0])

    @staticmethod
    def probability(codes: Ints) -> npt.NDArray[np.float64]:
        return np.where(codes == 255, 0, np.exp(-codes / 16))

    @staticmethod
    def split(values: Ints, sizes: Any) -> list[Ints]:
        return np.split(values, np.cumsum(sizes)[:-1])


def read_page(path: Path) -> dict[bytes, tuple[list[int], list[Position]]]:
    """All documents of a store by key; of two that are equal the one in the first shard."""
    root = zarr.open_group(path, mode="r")
    found: dict[bytes, tuple[list[int], list[Position]]] = {}
    for name, shard in sorted(root["shards"].groups()):
        documents = PageReader(root, name).documents()
        assert blake2b(b"".join(key for key, _, _ in documents), digest_size=8).hexdigest() == name
        hashes = []
        for key, tokens, positions in documents:
            assert blake2b(np.array(tokens, "<u4").tobytes(), digest_size=16).digest() == key
            ends = [e for e in (32, 128, *range(256, len(tokens) + 1, 256)) if e <= len(tokens)]
            hashes += [blake2b(np.array(tokens[:e], "<u4").tobytes(), digest_size=16).digest()[:8] for e in ends]
            found.setdefault(key, (tokens, positions))
        assert shard["blocks"][:].astype("<u8").tobytes() == b"".join(hashes)
    return found
