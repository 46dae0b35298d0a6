"""The pages of an LMDB file, read without LMDB: whether its C code, which trusts them, may be let near them.

`check` walks both B+trees of a snapshot, level by level, and holds every header, offset, size, page number and key
against what LMDB itself writes; a file that has passed is one in which no search leaves a page or the file, goes round
in a circle, or takes a wrong turn. What the entries say is for the caller, who is given them in order. Records are long
and lie in pages of their own, which are not touched: the cost is that of the tree.

    page   u64 number, u16 pad, u16 flags, u16 lower, u16 upper; u16 offset of each node; ...; nodes
    node   u16 low, u16 high, u16 flags, u16 key bytes; key; data
    meta   page header; u32 magic, u32 version, u64 address, u64 map bytes; 2 trees (free pages, entries);
           u64 last page, u64 transaction
    tree   u32 pad (page bytes), u16 flags, u16 depth, u64 branch pages, leaf pages, overflow pages, entries, root

In a branch low, high and flags are a child's number, in a leaf low and high the bytes of data; flag 1 says that the
data lie in overflow pages, and here only the number of the first. Little-endian. Reference: LMDB 0.9, mdb.c (Chu).
"""

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

MAGIC = struct.pack("<I", 0xBEEFC0DE)
KEY_WIDTH = 24
"""Bytes of an entry that the walk looks at: no key of ours is longer, and the data of the short ones follow it."""

_META = struct.Struct("<Q2HI IIQQ IHHQQQQQ IHHQQQQQ QQ")
_HEADER = 16
_NODE = 8
_BRANCH, _LEAF, _META_PAGE = 1, 2, 8
_BIG = 1
_FREE_FLAGS, _MAIN_FLAGS = 0x4008, 0  # integer keys, and "the path is a file"
_NO_PAGE = (1 << 64) - 1
_DEEPEST = 32
_SLACK_PAGES = 1024
_PAGES_AT_ONCE = 1024

Bytes = npt.NDArray[np.uint8]
Longs = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Tree:
    """A B+tree as a meta page names it."""

    depth: int
    entries: int
    root: int


@dataclass(frozen=True)
class Meta:
    """A meta page: the state after one transaction."""

    page_bytes: int
    free: Tree
    main: Tree
    last_page: int
    transaction: int


class PageError(ValueError):
    """A page that LMDB has not written."""


@dataclass(frozen=True, eq=False)
class Nodes:
    """The nodes of some pages of a level, in the tree's order; of leaves these are entries."""

    counts: Longs
    """[pages]; nodes of each page."""
    rows: Bytes
    """[n, 24]; key and, behind it, data that lie in the page; cut off or filled up with zeros."""
    key_bytes: Longs
    """[n]"""
    data_bytes: Longs
    """[n]; of a leaf."""
    is_big: npt.NDArray[np.bool_]
    """[n]; whether the data lie in overflow pages."""
    pages: npt.NDArray[np.uint64]
    """[n]; the child of a branch's node; the first page of big data."""
    _bytes: Bytes
    _data_at: Longs

    @classmethod
    def of(cls, pages: Bytes, numbers: Longs, kind: int) -> "Nodes":
        """Take pages [m, page bytes] apart.

        Raises:
            PageError: they are not pages of this kind as LMDB writes them.
        """
        size, half = pages.shape[1], pages.view("<u2")
        lower, upper = (half[:, column].astype(np.int64) for column in (6, 7))
        good = (pages[:, :8].copy().view("<u8")[:, 0] == numbers.astype(np.uint64)) & (half[:, 5] == kind)
        good &= (lower > _HEADER) & (lower % 2 == 0) & (lower <= upper) & (upper <= size)
        if not good.all():
            raise PageError(f"page {numbers[~good][0]} is not one of its tree")
        counts = (lower - _HEADER) // 2
        page = np.repeat(np.arange(len(pages)), counts)
        slot = np.arange(len(page)) - np.repeat(np.cumsum(counts) - counts, counts)
        at = half[page, _HEADER // 2 + slot].astype(np.int64)
        if ((at < upper[page]) | (at > size - _NODE) | (at % 2 != 0)).any():
            raise PageError("an entry lies outside of its page")
        low, high, flags, key_bytes = (half[page, at // 2 + word].astype(np.int64) for word in range(4))
        inside, is_big = key_bytes, np.zeros(len(at), bool)
        if kind == _LEAF:
            is_big = flags == _BIG
            inside = key_bytes + np.where(is_big, 8, low | high << 16)
        taken = np.bincount(page, weights=_NODE + inside + inside % 2, minlength=len(pages))
        if (taken != size - upper).any() or (at + _NODE + inside > size).any() or (key_bytes > KEY_WIDTH).any():
            raise PageError("an entry has a size that it cannot have")
        if kind == _LEAF and ((flags != 0) & ~is_big).any():
            raise PageError("an entry is of a kind that is not written")
        flat, key_at = pages.reshape(-1), page * size + at + _NODE
        beyond = np.arange(KEY_WIDTH) >= np.where(is_big, key_bytes, inside)[:, None]
        rows = flat[np.minimum(key_at[:, None] + np.arange(KEY_WIDTH), len(flat) - 1)]
        rows[beyond] = 0
        data_at = key_at + key_bytes
        named = (low | high << 16 | flags << 32).astype(np.uint64)
        if kind == _LEAF:
            named = np.zeros(len(at), np.uint64)
            named[is_big] = flat[data_at[is_big][:, None] + np.arange(8)].view("<u8")[:, 0]
        return cls(counts, rows, key_bytes, low | high << 16, is_big, named, flat, data_at)

    def data(self, row: int) -> bytes:
        """The data of an entry that lie in its page."""
        start = int(self._data_at[row])
        return self._bytes[start : start + int(self.data_bytes[row])].tobytes()

    def keys(self, *, integers: bool) -> Keys:
        """[n, 3]; the keys as numbers that are ordered as they are."""
        keys = np.where(np.arange(KEY_WIDTH) < self.key_bytes[:, None], self.rows, np.uint8(0))
        if integers:
            keys[:, :8] = keys[:, 7::-1]
        return keys.view(">u8").astype(np.uint64)


def is_lmdb(path: Path) -> bool:
    """Whether a file begins as LMDB's do."""
    try:
        with path.open("rb") as file:
            return file.read(_HEADER + len(MAGIC))[_HEADER:] == MAGIC
    except OSError:
        return False


def read_metas(handle: int) -> tuple[Meta, Meta]:
    """Both meta pages of a file.

    Raises:
        PageError: they are not those of a file of ours, or not of two transactions in succession.
    """
    first = _read_meta(handle, 0, 0)
    second = _read_meta(handle, 1, first.page_bytes)
    if second.page_bytes != first.page_bytes or abs(first.transaction - second.transaction) != 1:
        raise PageError("its two meta pages do not fit each other")
    return first, second


def _read_meta(handle: int, number: int, page_bytes: int) -> Meta:
    data = os.pread(handle, _META.size, number * page_bytes)
    if len(data) < _META.size:
        raise PageError("it ends within its meta pages")
    page, _, flags, _, magic, version, address, _, *rest = _META.unpack(data)
    size, free_flags, free_depth, *_, free_entries, free_root = rest[:8]
    _, main_flags, main_depth, *_, main_entries, main_root = rest[8:16]
    last_page, transaction = rest[16:]
    ours = (page, flags, magic, version, address) == (number, _META_PAGE, *struct.unpack("<I", MAGIC), 1, 0)
    ours &= (free_flags, main_flags) == (_FREE_FLAGS, _MAIN_FLAGS) and size in (1 << n for n in range(9, 17))
    # A transaction may free what it took at the file's end and never write it: then the file is a little shorter.
    most = os.fstat(handle).st_size // max(size, 1) + _SLACK_PAGES
    if not (ours and transaction % 2 == number and 1 <= last_page <= most):
        raise PageError(f"meta page {number} is not one that was written")
    free, main = Tree(free_depth, free_entries, free_root), Tree(main_depth, main_entries, main_root)
    return Meta(size, free, main, last_page, transaction)


class Snapshot:
    """The pages of one state of a file; a reader's slot in LMDB's lock file must keep them from being used again."""

    def __init__(self, handle: int, meta: Meta) -> None:
        self.meta = meta
        self._handle = handle
        self._pages = min(os.fstat(handle).st_size // meta.page_bytes, meta.last_page + 1)
        self._used = np.zeros(self._pages, bool)
        self._used[:2] = True

    def check(self, entries: Callable[[Nodes], None]) -> None:
        """Walk the tree of entries, giving them to `entries` in order, then that of free pages.

        Raises:
            PageError: something is not as LMDB writes it; also where `entries` raises it.
        """
        self._walk(self.meta.main, entries, integers=False)
        freed = [np.empty(0, np.int64)]
        self._walk(self.meta.free, lambda nodes: freed.extend(self._free_pages(nodes)), integers=True)
        pages = np.concatenate(freed)
        self.used_pages, self.free_pages = int(self._used.sum()), len(pages)
        if self._used[pages[pages < self._pages]].any() or len(np.unique(pages)) < len(pages):
            raise PageError("a page is free that is in use")

    def first_data(self) -> bytes:
        """The data of the first entry, found without a walk: for a state that no reader's slot keeps.

        Raises:
            PageError: there is no way to it.
        """
        number, depth = self.meta.main.root, self.meta.main.depth
        for level in range(1, min(depth, _DEEPEST) + 1):
            if number >= self._pages:
                break
            at = np.array([number])
            nodes = Nodes.of(self._read(at), at, _LEAF if level == depth else _BRANCH)
            if level == depth and not nodes.is_big[0]:
                return nodes.data(0)
            number = int(nodes.pages[0])
        raise PageError("the way to its first entry is broken")

    def _walk(self, tree: Tree, entries: Callable[[Nodes], None], *, integers: bool) -> None:
        if (tree.root, tree.depth, tree.entries) == (_NO_PAGE, 0, 0):
            return
        if not 1 <= tree.depth <= _DEEPEST:
            raise PageError(f"a tree is {tree.depth} pages deep")
        level, branches = np.array([tree.root], np.uint64), []
        for _ in range(tree.depth - 1):
            found = list(self._nodes(level, _BRANCH))
            keys = np.concatenate([nodes.keys(integers=integers) for nodes in found])
            branches.append((keys, np.concatenate([nodes.counts for nodes in found])))
            level = np.concatenate([nodes.pages for nodes in found])
        firsts, lasts, count = list[Keys](), list[Keys](), 0
        for nodes in self._nodes(level, _LEAF):
            keys = nodes.keys(integers=integers)
            if not _less(keys[:-1], keys[1:]).all() or (lasts and not _less(lasts[-1][-1:], keys[:1]).all()):
                raise PageError("keys are out of order")
            ends = np.cumsum(nodes.counts)
            firsts.append(keys[ends - nodes.counts])
            lasts.append(keys[ends - 1])
            count += len(keys)
            self._take_data(nodes)
            entries(nodes)
        if count != tree.entries:
            raise PageError(f"a tree has {count:,} entries, its meta page says {tree.entries:,}")
        first, last = np.concatenate(firsts), np.concatenate(lasts)
        for keys, counts in reversed(branches):  # a branch's key parts what it leads to from the neighbour before
            starts = np.cumsum(counts) - counts
            inner = np.setdiff1d(np.arange(len(keys)), starts)
            if not _less(last[inner - 1], keys[inner]).all() or _less(first[inner], keys[inner]).any():
                raise PageError("a branch leads to the wrong keys")
            first, last = first[starts], last[starts + counts - 1]

    def _nodes(self, numbers: npt.NDArray[np.uint64], kind: int) -> Iterator[Nodes]:
        """The nodes of a level, some pages at a time."""
        if (numbers < 2).any() or (numbers >= self._pages).any() or len(np.unique(numbers)) < len(numbers):
            raise PageError("a tree names pages that it cannot have")
        at = numbers.astype(np.int64)
        if self._used[at].any():
            raise PageError("a page is in use twice")
        self._used[at] = True
        for start in range(0, len(at), _PAGES_AT_ONCE):
            part = at[start : start + _PAGES_AT_ONCE]
            yield Nodes.of(self._read(part), part, kind)

    def _read(self, numbers: Longs) -> Bytes:
        size = self.meta.page_bytes
        data = b"".join(os.pread(self._handle, size, size * number) for number in numbers.tolist())
        if len(data) < size * len(numbers):
            raise PageError("it ends before its last page")
        return np.frombuffer(data, np.uint8).reshape(-1, size)

    def _take_data(self, nodes: Nodes) -> None:
        """Take note of the pages in which big data lie."""
        first, size = nodes.pages[nodes.is_big], nodes.data_bytes[nodes.is_big]
        counts = (_HEADER + size - 1) // self.meta.page_bytes + 1
        if (first < 2).any() or (first >= self._pages).any() or (first.astype(np.int64) + counts > self._pages).any():
            raise PageError("data lie beyond its end")
        for start, count in zip(first.tolist(), counts.tolist(), strict=True):
            if self._used[start : start + count].any():
                raise PageError("data lie in pages that are in use")
            self._used[start : start + count] = True

    def _free_pages(self, nodes: Nodes) -> Iterator[Longs]:
        """The pages that lists of free pages name: how many, then each, the last one first."""
        for row, (size, page) in enumerate(zip(nodes.data_bytes.tolist(), nodes.pages.tolist(), strict=True)):
            big = nodes.is_big[row]
            data = os.pread(self._handle, size, page * self.meta.page_bytes + _HEADER) if big else nodes.data(row)
            listed = np.frombuffer(data[: len(data) // 8 * 8], "<u8")
            count = int(listed[0]) if len(listed) else -1
            pages = listed[1 : count + 1].astype(np.int64)
            whole = nodes.key_bytes[row] == 8 and 0 <= count < len(listed)
            if not whole or (np.diff(pages) >= 0).any() or ((pages < 2) | (pages > self.meta.last_page)).any():
                raise PageError("a list of free pages is not one that was written")
            yield pages


def _less(a: Keys, b: Keys) -> npt.NDArray[np.bool_]:
    """Which keys [n, 3] come before which."""
    less: npt.NDArray[np.bool_] = a[:, 2] < b[:, 2]
    for column in (1, 0):
        less = (a[:, column] < b[:, column]) | ((a[:, column] == b[:, column]) & less)
    return less
