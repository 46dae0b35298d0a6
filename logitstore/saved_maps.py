"""Vocabulary maps that a store keeps, each under the fingerprint of the student's tokenizer: computed once for a team.

A map is derived from the store's vocabulary and a student's. It is no part of what the store says: its digest does not
cover it, opening does not look at it. Read, it is held against its seal and against both fingerprints; `verify` names a
damaged one, `repair` removes it. Only a Zarr store keeps maps, and only a folder takes new ones.
"""

import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstore.chunks import unpack
from logitstore.contract import Store
from logitstore.durable import alone_in, replace_folder
from logitstore.errors import CorruptStoreError, IncompatibleStoreError, StoreError, StoreWriteError
from logitstore.files import CannotList, Files, require_damage
from logitstore.manifest import TokenizerIdentity
from logitstore.sealed import (
    DAMAGED,
    GROUP,
    FileEntries,
    Problem,
    are_file_entries,
    file_entries,
    file_problems,
    read_group,
    seal_group,
    unseal_group,
)
from logitstore.stored_vocabulary import LEVEL
from logitstore.streams import integers
from logitstore.vocabulary import Vocabulary
from logitstore.vocabulary_map import NONE, VocabularyMap, map_vocabularies
from logitstore.zarr_store import MAP_PREFIX, ZarrStore

FILE = "c/0/0"
MOST_TOKENS, MOST_LINKS = 1 << 24, 1 << 26
_NAME = re.compile(MAP_PREFIX + "[0-9a-f]{32}")
_NO_TOKEN = 0xFFFFFFFF


@dataclass(frozen=True)
class KeptMap:
    """A map, and what became of it."""

    vocabulary_map: VocabularyMap
    computed: bool
    """Whether it was computed now; else it was read from the store."""
    not_kept: str
    """Why the store does not keep it; "" where it does."""


def vocabulary_map_of(store: Store, student: Vocabulary) -> KeptMap:
    """The map to a student's vocabulary: the store's, or one computed now, and kept there if it can be written.

    Raises:
        CorruptStoreError, IncompatibleStoreError: as `saved_vocabulary_map`.
    """
    found = saved_vocabulary_map(store, student.fingerprint())
    if found is not None:
        return KeptMap(found, computed=False, not_kept="")
    made = map_vocabularies(store.vocabulary, student)
    try:
        save_vocabulary_map(store, made)
    except StoreWriteError as error:
        return KeptMap(made, computed=True, not_kept=str(error).partition(";")[0])
    return KeptMap(made, computed=True, not_kept="")


def saved_vocabulary_map(store: Store, student_fingerprint: str) -> VocabularyMap | None:
    """The map that a store keeps for a student's tokenizer; None where it has none.

    Raises:
        CorruptStoreError: its bytes are not those that were written.
        IncompatibleStoreError: it is the map of other tokenizers than the store's and this one.
    """
    if not isinstance(store, ZarrStore):
        return None
    entry = _Entry.read(store.files, MAP_PREFIX + student_fingerprint, store.path)
    if entry is None:
        return None
    entry.require_of(store.manifest.tokenizer)
    return entry.map(store.manifest.tokenizer.size)


def save_vocabulary_map(store: Store, vocabulary_map: VocabularyMap) -> None:
    """Keep a map; one that is there and good stays, one that is not is replaced.

    Raises:
        IncompatibleStoreError: it is the map of another teacher's tokenizer.
        StoreWriteError: full disk, no permission, or a store that takes none: a zip file, LMDB's, behind a URL.
    """
    expected, found = store.manifest.tokenizer.fingerprint, vocabulary_map.teacher_fingerprint
    if found != expected:
        raise IncompatibleStoreError(
            f"the map is one of tokenizer {found}, {store.path} has {expected}; map the store's own vocabulary"
        )
    if not isinstance(store, ZarrStore):
        raise StoreWriteError(f"{store.path} has no place for a vocabulary map; type a folder, as in store.zarr")
    student = vocabulary_map.student_fingerprint
    replace_folder(
        store.folder / (MAP_PREFIX + student),
        lambda: _is_good(store, student),
        lambda folder: _write(folder, vocabulary_map),
    )


def carry_maps(stores: Iterable[Store], out: Store) -> None:
    """Keep the maps of stores of the same tokenizer in one that was made of them, where it takes any.

    Raises:
        CorruptStoreError, IncompatibleStoreError, StoreWriteError: as for a single one.
    """
    if not isinstance(out, ZarrStore):
        return
    for store in stores:
        if isinstance(store, ZarrStore):
            for name in map_folders(store.files):
                found = saved_vocabulary_map(store, name.removeprefix(MAP_PREFIX))
                if found is not None:
                    save_vocabulary_map(out, found)


def map_folders(files: Files) -> list[str]:
    """The folders of a store that hold maps, as far as they can be listed."""
    try:
        return sorted(filter(is_map_folder, files.folders("")))
    except CannotList:
        return []


def is_map_folder(name: str) -> bool:
    """Whether a folder of a store has the name of a map's."""
    return _NAME.fullmatch(name) is not None


def map_problems(files: Files, folder: str, tokenizer: TokenizerIdentity) -> tuple[set[str], list[Problem]]:
    """The files of a map by their paths in the store, and what is wrong with them, for `verify`."""
    group = f"{folder}/{GROUP}"
    try:
        entry = _Entry.read(files, folder, "")
        if entry is None:
            raise CorruptStoreError(f"{group} is gone")
    except CorruptStoreError:
        return {f"{folder}/{name}" for name in files.names(folder)}, [Problem(group, DAMAGED)]
    problems = [Problem(f"{folder}/{p.file}", p.fault) for p in file_problems(files, folder, entry.files)]
    if not problems:
        try:
            entry.require_of(tokenizer)
            entry.map(tokenizer.size)
            problems += entry.array_problems(tokenizer.size)
        except StoreError as error:
            problems.append(Problem(group, str(error)))
    return {f"{folder}/{name}" for name in (*entry.files, GROUP)}, problems


def remove_map(store: Path, folder: str) -> None:
    """Take a map out of a store's folder.

    Raises:
        OSError: no permission.
    """
    old = store / ".partial-removed-map"
    with alone_in(store):
        shutil.rmtree(old, ignore_errors=True)
        if (store / folder).exists():
            (store / folder).rename(old)
        shutil.rmtree(old, ignore_errors=True)


def _is_good(store: ZarrStore, student_fingerprint: str) -> bool:
    try:
        return saved_vocabulary_map(store, student_fingerprint) is not None
    except StoreError:
        return False


def _write(folder: Path, made: VocabularyMap) -> None:
    from logitstore.zarr_arrays import write_planes

    arrays = {"ids": made.student_ids, "link-lengths": made.link_lengths, "link-ids": made.link_ids}
    for name, values in arrays.items():
        write_planes(folder, name, values.view(np.uint32), level=LEVEL)
    entry = {
        "teacher": made.teacher_fingerprint,
        "student": made.student_fingerprint,
        "student_size": made.student_size,
        "links": len(made.link_ids),
        "files": file_entries(folder),
    }
    (folder / GROUP).write_bytes(seal_group(entry))


@dataclass(frozen=True)
class _Entry:
    """What a map's `zarr.json` says; nothing else of it has been read."""

    at: Files
    folder: str
    where: str
    teacher: str
    student: str
    student_size: int
    links: int
    files: FileEntries

    @classmethod
    def read(cls, files: Files, folder: str, path: Path | str) -> "_Entry | None":
        """None where there is none."""
        where = f"{path}/{folder}" if path else folder
        try:
            said = unseal_group(read_group(files, folder), f"{where}/{GROUP}")
            entry = cls(files, folder, where, **said)
        except FileNotFoundError:
            return None
        except (OSError, TypeError, CorruptStoreError) as error:
            require_damage(error, where)
            raise _damaged(where, GROUP) from error
        counts = ((entry.student_size, MOST_TOKENS), (entry.links, MOST_LINKS))
        texts = isinstance(entry.teacher, str) and isinstance(entry.student, str)
        sizes = all(type(n) is int and 0 <= n <= most for n, most in counts)
        if not (texts and sizes and are_file_entries(entry.files)):
            raise _damaged(where, GROUP)
        return entry

    def require_of(self, tokenizer: TokenizerIdentity) -> None:
        """Check that it maps the store's tokenizer to the one that its name says."""
        expected = tokenizer.fingerprint, self.folder.removeprefix(MAP_PREFIX)
        if (self.teacher, self.student) != expected:
            raise IncompatibleStoreError(
                f"{self.where} maps tokenizer {self.teacher} to {self.student}, expected {expected[0]} to "
                f"{expected[1]}; delete that folder, and type `logitstore vocab-map` again"
            )

    def map(self, teacher_size: int) -> VocabularyMap:
        """The map, every byte of it checked."""
        for problem in file_problems(self.at, self.folder, self.files):
            raise _damaged(self.where, problem.file)
        try:
            ids, lengths, links = (self._array(*named) for named in self._sizes(teacher_size).items())
        except (OSError, ValueError) as error:
            require_damage(error, self.where)
            raise _damaged(self.where, str(error)) from error
        known = (ids < self.student_size) | (ids == _NO_TOKEN)
        whole = int(lengths.sum(dtype=np.uint64)) == self.links and bool((links < self.student_size).all())
        if not (whole and known.all()):
            raise _damaged(self.where, "ids of no token")
        return VocabularyMap(
            student_ids=np.where(ids == _NO_TOKEN, NONE, ids.astype(np.int64)).astype(np.int32),
            student_size=self.student_size,
            teacher_fingerprint=self.teacher,
            student_fingerprint=self.student,
            link_lengths=lengths.astype(np.int32),
            link_ids=links.astype(np.int32),
        )

    def array_problems(self, teacher_size: int) -> Iterator[Problem]:
        """Arrays of which Zarr would read something else than we do."""
        from logitstore.zarr_arrays import problem_of

        for name, size in self._sizes(teacher_size).items():
            array = f"{self.folder}/{name}"
            fault = problem_of(read_group(self.at, array), (4, size), "uint8")
            if fault:
                yield Problem(f"{array}/{GROUP}", fault)

    def _sizes(self, teacher_size: int) -> dict[str, int]:
        """How many numbers each array has."""
        return {"ids": teacher_size, "link-lengths": teacher_size, "link-ids": self.links}

    def _array(self, name: str, size: int) -> npt.NDArray[Any]:
        data = unpack(self.at.read(f"{self.folder}/{name}/{FILE}"), 4 * size) if size else np.empty(0, np.uint8)
        return integers(data, 4)


def _damaged(where: str, what: str) -> CorruptStoreError:
    return CorruptStoreError(f"{where} is damaged ({what}); delete that folder, and type `logitstore vocab-map` again")
