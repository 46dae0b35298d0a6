"""Small integers as bytes that compress well: a first byte that says nearly all, and further bytes for larger ones.

    first byte a   stands for                       further bytes
    0 .. 127       a                                0
    128 .. 247     128 + 256 (a - 128)              + 1 byte
    248 .. 254     30,848 + 65,536 (a - 248)        + 2 bytes, the lower first
    255            489,600                          + 4 bytes

All first bytes lie together, then all second ones, and so on: within a plane, zstd's entropy coder finds one
distribution. Made for the gaps between ranks, whose probability falls smoothly; there it comes within 0.1 bit of an
ideal coder.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

MIDDLE, HIGH, ESCAPE = 128, 248, 255
"""First byte from which on there are 1, 2 and 4 further bytes."""
MIDDLE_FROM, HIGH_FROM, ESCAPE_FROM = 128, 30_848, 489_600
_FIRST = np.arange(256, dtype=np.uint32)
_BASE = np.where(_FIRST < MIDDLE, _FIRST, MIDDLE_FROM + (_FIRST - MIDDLE) * np.uint32(256)).astype(np.uint32)
_BASE[HIGH:ESCAPE] = HIGH_FROM + (_FIRST[HIGH:ESCAPE] - HIGH) * np.uint32(65_536)
_BASE[ESCAPE] = ESCAPE_FROM


def most_bytes(limit: int) -> int:
    """Bytes that an integer below `limit` takes at most."""
    return 1 if limit <= MIDDLE_FROM else 2 if limit <= HIGH_FROM else 3 if limit <= ESCAPE_FROM else 5


@dataclass(frozen=True, eq=False)
class Varints:
    """Integers in planes: the first bytes [n], and of those that have them the second, the third, the last two."""

    first: Bytes
    second: Bytes
    third: Bytes
    upper: Bytes
    """[2 for each escape]; fourth and fifth byte of one after another."""

    @classmethod
    def of(cls, values: npt.NDArray[np.uint32]) -> "Varints":
        """Encode integers [n]."""
        first = np.where(values < MIDDLE_FROM, values, MIDDLE + ((values - MIDDLE_FROM) >> 8))
        first = np.where(values < HIGH_FROM, first, HIGH + ((values - HIGH_FROM) >> 16))
        first = np.where(values < ESCAPE_FROM, first, ESCAPE).astype(np.uint8)
        rest = values - _BASE[first]
        upper = (rest[first == ESCAPE] >> 16).astype("<u2").view(np.uint8)
        low = (rest & 0xFF).astype(np.uint8)
        return cls(first, low[first >= MIDDLE], (rest >> 8 & 0xFF).astype(np.uint8)[first >= HIGH], upper)

    @property
    def planes(self) -> tuple[Bytes, Bytes, Bytes, Bytes]:
        """The bytes, in their order on disk."""
        return self.first, self.second, self.third, self.upper

    def slice(self, rows: slice) -> "Varints":
        """Some of the integers."""
        first = self.first[rows]
        return Varints(
            first,
            self._further(self.second, MIDDLE, first, rows.start),
            self._further(self.third, HIGH, first, rows.start),
            self._further(self.upper, ESCAPE, first, rows.start, 2),
        )

    def _further(self, plane: Bytes, least: int, first: Bytes, start: int, width: int = 1) -> Bytes:
        """Of a plane, the bytes that belong to these first bytes from `least` on, which begin at `start`."""
        if not len(plane):
            return plane
        at = np.count_nonzero(self.first[:start] >= least)
        return plane[width * at : width * (at + np.count_nonzero(first >= least))]

    def values(self) -> npt.NDArray[np.uint32]:
        """Decode: uint32 [n]."""
        values = _BASE.take(self.first)
        values[np.flatnonzero(self.first >= MIDDLE)] += self.second
        if len(self.third):
            values[np.flatnonzero(self.first >= HIGH)] += self.third.astype(np.uint32) << np.uint32(8)
        if len(self.upper):
            values[np.flatnonzero(self.first == ESCAPE)] += self.upper.view("<u2").astype(np.uint32) << np.uint32(16)
        return values


def concatenate(parts: list[Varints]) -> Varints:
    """One after another."""
    if len(parts) == 1:
        return parts[0]
    return Varints(*(np.concatenate(planes) for planes in zip(*(part.planes for part in parts), strict=True)))
