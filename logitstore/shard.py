"""One shard as it is read: documents that were finished together, written once. FORMAT.md says what lies where.

Reading takes a part of a file and holds it against a checksum; the first look into a shard holds all of its files
against their digests.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from logitstore import hidden_states, position_streams, streams
from logitstore.chunks import ShardedFile, unpack
from logitstore.codec import Codes, to_record
from logitstore.entries import damaged, read_entry, unreadable
from logitstore.files import CannotList, Files
from logitstore.index import block_counts
from logitstore.key import KEY_BYTES
from logitstore.position_streams import PositionChunk
from logitstore.recipe import DocumentRecord, Recipe
from logitstore.sealed import GROUP, Problem, file_problems, read_group
from logitstore.streams import Chunk, Ranks, chunk_positions

T = TypeVar("T")
Positions = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]

DOCUMENT_BYTES = KEY_BYTES + 8
"""Of a row of `documents`: its key, its number of tokens (u32) and its first token (u32)."""


class Shard:
    """A finished shard. Its entry is read at once, all else when it is asked for. Safe for several threads."""

    def __init__(self, files: Files, name: str, recipe: Recipe, *, checked: bool = False) -> None:
        """Read the shard's entry.

        Args:
            checked: all of its files have been held against their digests before.

        Raises:
            CorruptStoreError: the entry is missing or damaged.
        """
        self.name = name
        self.where = f"shards/{name}"
        self.entry = read_entry(files, self.where)
        self._files, self._recipe = files, recipe
        self._n = chunk_positions(self.entry.positions, recipe.form)
        self._sharded: dict[str, ShardedFile] = {}
        self._last: dict[int, tuple[tuple[int, Chunk], ...]] = {}
        """Of each set of entries the chunks that were read last, with their numbers: two, as some documents lie in."""
        self._last_positions: tuple[int, PositionChunk] | None = None
        self._last_whole: tuple[int, npt.NDArray[np.uint8], npt.NDArray[np.int32]] | None = None
        self._read_to = 0
        """The row that comes next for who reads in order."""
        self.checked = checked

    @cached_property
    def documents(self) -> npt.NDArray[np.uint8]:
        """[D, 24]; key, length and first token of each document."""
        size = self.entry.documents * DOCUMENT_BYTES

        def read() -> npt.NDArray[np.uint8]:
            if self.entry.documents > self._files.size(f"{self.where}/documents/c/0/0"):
                raise ValueError("fewer bytes than documents")  # keys are hashes, which do not compress
            return self._unpacked("documents/c/0/0", size, exact=True).reshape(-1, DOCUMENT_BYTES)

        return self._decoding("documents", read)

    @property
    def keys(self) -> npt.NDArray[np.uint8]:
        """[D, 16]"""
        return self.documents[:, :KEY_BYTES]

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[D]; tokens of each document.

        Raises:
            CorruptStoreError: they are not those of the positions.
        """
        lengths = self._words(KEY_BYTES)
        if (lengths < 2).any() or lengths.sum() - len(lengths) != self.entry.positions:
            raise damaged(f"{self.where}/documents", "the documents' lengths are not those of the positions")
        if (self._words(KEY_BYTES + 4) >= 1 << 31).any():
            raise damaged(f"{self.where}/documents", "a first token is beyond any vocabulary")
        return lengths

    @cached_property
    def _ends(self) -> npt.NDArray[np.int64]:
        return np.cumsum(self.lengths - 1)

    @cached_property
    def blocks(self) -> npt.NDArray[np.uint64]:
        """[M]; hashes of the documents' beginnings, document after document."""
        size = 8 * int(block_counts(self.lengths).sum())
        return self._decoding("blocks", lambda: self._unpacked("blocks/c/0", size, np.uint64, exact=True))

    @cached_property
    def ranks(self) -> Ranks:
        """What the ranks in `entries-N` and `positions` stand for."""
        most = 4 * min(streams.RANKED, self._recipe.vocab_size)
        return self._decoding(
            "ranks", lambda: Ranks(streams.integers(self._unpacked("ranks/c/0/0", most), 4), self._recipe.vocab_size)
        )

    def array_problems(self) -> list[Problem]:
        """Arrays of which Zarr would read something else than we do."""
        from logitstore.zarr_arrays import problem_of

        form, n = self._recipe.form, self._n
        chunks = -(-self.entry.positions // n)
        beside = position_streams.most_chunk_bytes(n, form, len(self._recipe.log_z))
        expected: dict[str, tuple[tuple[int, ...], str]] = {
            "documents": ((self.entry.documents, DOCUMENT_BYTES), "uint8"),
            "blocks": ((len(self.blocks),), "uint64"),
            "ranks": ((4, len(self.ranks.common)), "uint8"),
            "positions": ((chunks, beside), "uint8"),
        }
        for number in range(self._recipe.sets):
            expected[f"entries-{number}"] = ((chunks, streams.most_chunk_bytes(n, form)), "uint8")
        for number in range(len(self._recipe.hidden_layers)):
            m = self._hidden_n
            width = m * hidden_states.layer_width(self._recipe.hidden_size)
            expected[f"hidden-{number}"] = ((-(-self.entry.positions // m), width), "uint8")
        found = {
            name: problem_of(read_group(self._files, f"{self.where}/{name}"), *expected[name]) for name in expected
        }
        return [Problem(f"{self.where}/{name}/{GROUP}", fault) for name, fault in found.items() if fault]

    def span(self, document: int) -> tuple[int, int]:
        """The rows of a document among the shard's positions."""
        end = int(self._ends[document])
        return end - int(self.lengths[document]) + 1, end

    def codes(self, number: int, spans: Sequence[tuple[int, int]]) -> Codes:
        """Entries of set `number` at some spans of rows, one after another.

        Raises:
            CorruptStoreError: the bytes are not those that were written.
        """
        parts, ranks = self.parts(number, spans)
        return self._decoding(f"entries-{number}", lambda: streams.from_parts(parts, self._recipe.form, ranks))

    def parts(self, number: int, spans: Sequence[tuple[int, int]]) -> tuple[list[streams.Part], Ranks]:
        """The same before it is decoded, which documents of several shards are together.

        Raises:
            CorruptStoreError: the bytes are not those that were written.
        """
        return self._decoding(f"entries-{number}", lambda: self._parts(number, spans)), self.ranks

    def positions(self, start: int, stop: int, codes: Codes | None = None) -> Positions:
        """What is kept beside the entries at rows start .. stop - 1 [n, position width], and the tokens that followed
        [n].

        Args:
            codes: the first set of entries of these rows, if they are known.

        Raises:
            CorruptStoreError: the bytes are not those that were written.
        """
        in_order, self._read_to = start == self._read_to, stop
        if in_order:
            return self._decoding("positions", lambda: self._joined(start, stop, self._whole_positions))
        known = self.codes(0, [(start, stop)]) if codes is None else codes

        def some(chunk: int, rows: slice) -> Positions:
            first = chunk * self._n + rows.start - start
            part = known.rows(slice(first, first + rows.stop - rows.start))
            return self._position_chunk(chunk).part(rows.start, part, self.ranks)

        return self._decoding("positions", lambda: self._joined(start, stop, some))

    def hidden(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """The hidden states of rows start .. stop - 1, encoded [n, hidden_width].

        Raises:
            CorruptStoreError: the bytes are not those that were written.
        """
        layers = range(len(self._recipe.hidden_layers))
        parts = [self._decoding(f"hidden-{n}", partial(self._hidden, n, start, stop)) for n in layers]
        return np.concatenate(parts, axis=1) if parts else np.empty((stop - start, 0), np.uint8)

    def document(self, number: int) -> DocumentRecord:
        """A document's tokens and records.

        Raises:
            CorruptStoreError: the bytes are not those that were written.
        """
        start, stop = self.span(number)
        sets = [self.codes(i, [(start, stop)]) for i in range(self._recipe.sets)]
        position, labels = self.positions(start, stop, sets[0])
        entries = [to_record(codes, self._recipe.form) for codes in sets]
        records = np.concatenate([*entries, position, self.hidden(start, stop)], axis=1)
        return DocumentRecord(self._with_first(number, labels), records)

    def token_ids(self, number: int) -> npt.NDArray[np.int32]:
        """A document's tokens."""
        return self._with_first(number, self.positions(*self.span(number))[1])

    def _with_first(self, number: int, labels: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        return np.concatenate([self._words(KEY_BYTES + 4)[number : number + 1].astype(np.int32), labels])

    def _words(self, column: int) -> npt.NDArray[np.int64]:
        return np.ascontiguousarray(self.documents[:, column : column + 4]).view("<u4")[:, 0].astype(np.int64)

    def _parts(self, number: int, spans: Sequence[tuple[int, int]]) -> list[streams.Part]:
        return [
            self._chunk(number, chunk).part(rows.start, rows.stop)
            for start, stop in spans
            for chunk, rows in self._pieces(start, stop)
        ]

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, slice]]:
        """The rows start .. stop - 1 by chunk: its number, and rows of it."""
        while start < stop:
            chunk, first = divmod(start, self._n)
            count = min(stop - start, self._n - first)
            yield chunk, slice(first, first + count)
            start += count

    def _chunk(self, number: int, chunk: int) -> Chunk:
        kept = self._last.get(number, ())
        for at, found in kept:
            if at == chunk:
                return found
        form, n = self._recipe.form, self._n
        raw = self._sharded_file(f"entries-{number}", streams.most_chunk_bytes(n, form)).chunk(chunk)
        found = Chunk(raw, min(n, self.entry.positions - chunk * n), form)
        self._last[number] = (chunk, found), *kept[:1]
        return found

    def _joined(self, start: int, stop: int, read: Callable[[int, slice], Positions]) -> Positions:
        pieces = [read(chunk, rows) for chunk, rows in self._pieces(start, stop)]
        position, labels = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
        return position, labels

    def _whole_positions(self, chunk: int, rows: slice) -> Positions:
        """For who reads in order: all of a chunk is decoded at once, in little more time than a short document."""
        last = self._last_whole
        if last is None or last[0] != chunk:
            first = chunk * self._n
            codes = self.codes(0, [(first, min(first + self._n, self.entry.positions))])
            last = self._last_whole = chunk, *self._position_chunk(chunk).part(0, codes, self.ranks)
        return last[1][rows], last[2][rows]

    def _position_chunk(self, chunk: int) -> PositionChunk:
        last = self._last_positions
        if last is None or last[0] != chunk:
            form, log_z, entries = self._recipe.form, len(self._recipe.log_z), self._chunk(0, chunk)
            size = position_streams.most_chunk_bytes(self._n, form, log_z)
            raw = self._sharded_file("positions", size).chunk(chunk)
            last = chunk, PositionChunk(raw, entries.head_count, entries.largest_in_head, form, log_z)
            self._last_positions = last
        return last[1]

    def _hidden(self, number: int, start: int, stop: int) -> npt.NDArray[np.uint8]:
        m = self._hidden_n
        chunks = range(start // m, (stop - 1) // m + 1)
        rows = [self._hidden_chunk(number, chunk) for chunk in chunks]
        return np.concatenate(rows)[start - chunks[0] * m : stop - chunks[0] * m]

    def _hidden_chunk(self, number: int, chunk: int) -> npt.NDArray[np.uint8]:
        m, size = self._hidden_n, self._recipe.hidden_size
        file = self._sharded_file(f"hidden-{number}", m * hidden_states.layer_width(size), m)
        return hidden_states.from_streams(file.chunk(chunk), min(m, self.entry.positions - chunk * m), size)

    @property
    def _hidden_n(self) -> int:
        return hidden_states.chunk_positions(self.entry.positions, self._recipe.hidden_size)

    def _sharded_file(self, name: str, chunk_bytes: int, chunk_positions: int | None = None) -> ShardedFile:
        if name not in self._sharded:
            chunks = -(-self.entry.positions // (chunk_positions or self._n))
            self._sharded[name] = ShardedFile(self._files, f"{self.where}/{name}/c/0/0", chunks, chunk_bytes)
        return self._sharded[name]

    def _unpacked(
        self, file: str, size: int, dtype: npt.DTypeLike = np.uint8, *, exact: bool = False
    ) -> npt.NDArray[Any]:
        if exact and not size:
            return np.empty(0, dtype)  # an array of nothing has no file
        raw = unpack(self._files.read(f"{self.where}/{file}"), size, at_most=not exact)
        return raw.view(np.dtype(dtype).newbyteorder("<")).astype(dtype, copy=False)

    def _decoding(self, name: str, read: Callable[[], T]) -> T:
        """Read something of an array: what is wrong with it is told as damage of that array."""
        try:
            self._check("documents/" if name in ("documents", "blocks") else "")
            return read()
        except (ValueError, OSError) as error:
            raise unreadable(f"{self.where}/{name}", error) from error

    def _check(self, folder: str) -> None:
        """Hold files against their digests: those of the documents, or, once, all of the shard."""
        if self.checked:
            return
        entries = {name: entry for name, entry in self.entry.files.items() if name.startswith(folder)}
        for problem in file_problems(self._files, self.where, entries):
            raise damaged(f"{self.where}/{problem.file}", problem.fault)
        with suppress(CannotList):  # then a file that nobody names does no harm
            # of what is named all was there a moment ago; what was removed since is missed, or fetched again, when read
            if not folder and set(self._files.names(self.where)) - {GROUP, *entries}:
                raise ValueError("its files are not those that the shard's entry names")
        self.checked = not folder
