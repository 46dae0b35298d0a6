"""Stores as someone makes them who wants to do harm: small ones, with one file edited and every checksum right again.

A program of bytes says what is edited (`edited`), so that a fuzzer can look for harm (`tools/fuzz_store.py`) and what
it once found can be tried again (`test_fuzz_corpus`). `read_all` then does what every reader does; only errors of ours
may come out of it.
"""

import json
import struct
import tempfile
from collections.abc import Callable, Iterator, Set
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock
from zipfile import ZipFile

import lmdb
import numpy as np
import numpy.typing as npt

from logitstore import info, stats, stats_report, verify
from logitstore.chunks import CRC, checked, pack, sharded, unpack
from logitstore.contract import Store
from logitstore.errors import LogitstoreError
from logitstore.files import ZipFiles
from logitstore.lmdb_file import LOCK_SUFFIX
from logitstore.lmdb_records import BLOCK, BUNDLE, COUNTS, FIDELITY, KEY, PLACE, RANKS, ROOT, VOCABULARY, Counts, Place
from logitstore.lmdb_store import LmdbStore
from logitstore.sealed import GROUP, file_digest, seal_group
from logitstore.zarr_store import ZarrStore
from tests import stores
from tests.stores import contents, manifest, records

LENGTHS = ([3, 2, 40], [300, 3])
RECIPES: dict[str, dict[str, Any]] = {
    "threshold:4": {},
    "threshold:5": {"temperatures": (1.0, 2.0), "replicas": 2, "tail_log_probs": True, "log_z": (1.0, 2.0)},
    "top-k:3": {"log_z": (1.0, 2.0)},
    "random:5": {},
}
PLACES = ("folder", "folder without an index", "zip", "lmdb")
MOST_READ = 20
RECORD_HEAD = 28
"""Bytes of a record's head before the sizes of its frames."""
MOST_EDITS = 8
NASTY: tuple[Any, ...] = (
    *(None, True, 0, 1, -1, 255, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 40, 1 << 63, 1 << 64, 10**300),
    *(0.5, 1.0, -0.0, 1e300, float("inf"), float("nan"), "", "x", "../../x", "/etc/x", "a\nb", "a\0b", "\ud800", "1"),
    *("threshold:4", "threshold:300", "threshold:999999999", "top-k:1", "top-p:0.5:9", "random:255", "random:9:0.8"),
    *([], [0], [1, 2], [[]], [1.0] * 500, {}, {"x": 1}, {"bytes": 1, "digest": ""}, [1.0, 1e-300], ["a"], "e" * 32),
)


@dataclass
class MemoryFiles:
    """`files.Files` in a dictionary."""

    files: dict[str, bytes] = field(default_factory=dict)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        return self._file(name)[start:stop]

    def size(self, name: str) -> int:
        return len(self._file(name))

    def mapped(self, name: str) -> npt.NDArray[np.uint8]:
        return np.frombuffer(self._file(name), np.uint8)

    def names(self, folder: str = "") -> list[str]:
        prefix = f"{folder}/" if folder else ""
        return sorted(name.removeprefix(prefix) for name in self.files if name.startswith(prefix))

    def folders(self, folder: str, known: Set[str] = frozenset()) -> set[str]:
        del known
        return {name.split("/")[0] for name in self.names(folder) if "/" in name}

    def _file(self, name: str) -> bytes:
        if name not in self.files:
            raise FileNotFoundError(2, "no such file", name)
        return self.files[name]


class Program:
    """The bytes that say what is done; zeros where they end."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def __bool__(self) -> bool:
        return self.at < len(self.data)

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1] if self.at <= len(self.data) else 0

    def word(self) -> int:
        return self.byte() | self.byte() << 8

    def rest(self) -> bytes:
        rest, self.at = self.data[self.at :], len(self.data)
        return rest


@cache
def golden(select: str) -> dict[str, bytes]:
    """The files of a small store in a folder, with index and fidelity."""
    made = manifest(select, **RECIPES[select])
    with tempfile.TemporaryDirectory() as folder:
        store = ZarrStore.create(Path(folder) / "s", made, stores.VOCABULARY)
        for seed, lengths in enumerate(LENGTHS):
            store.write_documents(records(lengths, seed, made.recipe))
        store.save_index()
        store.save_fidelity({"positions": 5, "kl": 0.25, "angles": [[1, 45.0], [4, 20.0]]})
        return contents(store.folder)


@cache
def golden_lmdb(select: str) -> bytes:
    """The same in LMDB's file."""
    made = manifest(select, **RECIPES[select])
    with tempfile.TemporaryDirectory() as folder:
        store = LmdbStore.create(Path(folder) / "s.lmdb", made, stores.VOCABULARY)
        with store.writer("build") as writer:
            for seed, lengths in enumerate(LENGTHS):
                writer.append(records(lengths, seed, made.recipe))
        store.save_fidelity({"positions": 5})
        store.file.close()
        return store.path.read_bytes()


def try_to_harm(data: bytes, scratch: Path) -> None:
    """One run: edit a store as `data` says, and read all of it. `scratch` is for what must lie in a file."""
    program = Program(data)
    select, place = list(RECIPES)[program.byte() % len(RECIPES)], PLACES[program.byte() % len(PLACES)]
    if place == "lmdb":
        path = scratch / "s.lmdb"
        try:
            path.write_bytes(golden_lmdb(select))
            edit_lmdb(path, program)
            read_all(lambda: LmdbStore(path), lambda: verify.verify(path, quiet=True))
        finally:
            for left in (path, Path(f"{path}{LOCK_SUFFIX}")):
                left.unlink(missing_ok=True)
    elif place == "zip":
        path = scratch / "s.zip"
        with ZipFile(path, "w") as archive:
            for name, content in golden(select).items():
                archive.writestr(name, content)
        path.write_bytes(edited_bytes(path.read_bytes(), program, from_end=True))
        with suppress(OSError):  # `store.files_at` makes one line of it
            files = ZipFiles(path)
            read_all(lambda: ZarrStore(files, path), lambda: verify.verify(path, quiet=True))
    else:
        held = dict(golden(select))
        if place != "folder":
            held = {name: content for name, content in held.items() if not name.startswith("index/")}
        memory = MemoryFiles(edited(held, program))

        def check() -> verify.VerifyReport:
            with mock.patch.object(verify, "files_at", return_value=memory):
                return verify.verify(Path("store"), quiet=True)

        read_all(lambda: ZarrStore(memory, "store"), check)


def read_all(opened: Callable[[], Store], check: Callable[[], verify.VerifyReport]) -> None:
    """What every reader does, one thing after another, whatever becomes of those before."""
    report = ours(check)
    assert report is None or all("\n" not in f"{problem.file}{problem.fault}" for problem in report.problems)
    store = ours(opened)
    if store is None:
        return
    for what in ("vocabulary", "fidelity", "positions", "disk_bytes", "shard_count"):
        ours(lambda what=what: getattr(store, what, None))
    ours(store.plane_bytes)
    ours(getattr(store, "digest", lambda: ""))
    known = [
        document.token_ids for seed, lengths in enumerate(LENGTHS) for document in records_of(seed, tuple(lengths))
    ]
    count = min(ours(lambda: len(store)) or 0, MOST_READ)
    found = [ids for n in range(count) if (ids := ours(lambda n=n: store.token_ids(n))) is not None]
    for number in range(count):
        ours(lambda number=number: store.record(number))
    for token_ids in [*known, *found[:4]]:
        for asked in (token_ids, token_ids[: max(2, len(token_ids) // 2)], np.concatenate([token_ids, token_ids])):
            ours(lambda asked=asked: (store.get(asked), store.answered(asked)))
    ours(lambda: store.codes([*known, known[-1][:50]]))
    for temperature in (None, 2.0):
        ours(lambda temperature=temperature: store.codes(known, temperature, replica=1))
        ours(lambda temperature=temperature: store.document(0, temperature, 1) if count else None)
    ours(lambda: look(store, count))
    ours(lambda: info.to_text(info.info(store), "s"))
    ours(store.refresh)


@cache
def records_of(seed: int, lengths: tuple[int, ...]) -> list[Any]:
    return records(list(lengths), seed)


def look(store: Store, count: int) -> None:
    """What `stats` does."""
    found = stats.collect(map(store.document, range(count)), store.plane_bytes(), store.fidelity, name="s")
    json.dumps(stats_report.to_json(found), allow_nan=False)
    stats_report.to_text(found)
    stats_report.to_html(found)


def ours(action: Callable[[], Any]) -> Any:
    """Do something in which only an error of ours may happen, of one line."""
    try:
        return action()
    except LogitstoreError as error:
        assert "\n" not in str(error), "an error of several lines"
        return None


def edited(files: dict[str, bytes], program: Program) -> dict[str, bytes]:
    """Edit one file of a store, then mend every digest over it."""
    names = sorted(files)
    name = names[program.byte() % len(names)]
    if name.endswith(GROUP) and name.count("/") != 1 + name.startswith("shards/") + name.startswith("x"):
        files[name] = edited_json(files[name], program)
    else:
        files[name] = edited_file(files[name], program, is_sharded=name.endswith("c/0/0") and is_rows(name))
    folder = group_of(name)
    group = f"{folder}/{GROUP}" if folder else GROUP
    if group != name:
        inner = name.removeprefix(f"{folder}/")
        attributes = json.loads(files[group])["attributes"]
        attributes["files"] = attributes["files"] | {
            inner: {"bytes": len(files[name]), "digest": file_digest(files[name])}
        }
        files[group] = sealed(attributes)
    return files


def is_rows(name: str) -> bool:
    return "/entries-" in name or "/positions/" in name or "/hidden-" in name


def group_of(name: str) -> str:
    """The folder whose sealed `zarr.json` answers for a file."""
    parts = name.split("/")
    if parts[0] == "shards" and len(parts) > 2:
        return "/".join(parts[:2])
    return parts[0] if parts[0] in ("index", "fidelity") else ""


def sealed(attributes: dict[str, Any]) -> bytes:
    return seal_group({name: value for name, value in attributes.items() if name != "digest"})


def edited_json(data: bytes, program: Program) -> bytes:
    """Edit a `zarr.json`: its text, or values in it; sealed again where it is still JSON."""
    if program.byte() % 4 == 0:
        data = edited_bytes(data, program)
        try:
            attributes = json.loads(data)["attributes"]
            return sealed(attributes) if program.byte() % 4 else data
        except (ValueError, KeyError, TypeError, AttributeError):
            return data
    whole: dict[str, Any] = json.loads(data)
    attributes = whole["attributes"] if isinstance(whole.get("attributes"), dict) and whole["attributes"] else whole
    for _ in range(MOST_EDITS):
        places = list(places_in(attributes))
        if not program or not places:
            break
        inside, key = places[program.word() % len(places)]
        value = program.byte()
        if value == 255:
            inside.pop(key)
        elif value >= 200 and isinstance(inside, dict):
            inside[f"x{value}"] = deepcopy(NASTY[program.byte() % len(NASTY)])
        elif value >= 150:
            inside[key] = value - 150 << program.byte() % 40
        else:
            inside[key] = deepcopy(NASTY[value % len(NASTY)])
    return json.dumps(whole).encode() if attributes is whole else sealed(attributes)


def places_in(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places_in(value[key])


def edited_file(data: bytes, program: Program, *, is_sharded: bool) -> bytes:
    """Edit an array's file: as it is, under its checksum, or under its compression."""
    layer = program.byte() % 4
    if layer == 0:
        return edited_bytes(data, program)
    if not is_sharded:
        return edited_packed(data, program, layer)
    chunks = struct.unpack("<Q", data[-CRC.size - 8 : -CRC.size])[0] and (len(data) - CRC.size) // 16
    if layer == 1:
        return data[: -16 - CRC.size] + checked(edited_bytes(data[-16 - CRC.size : -CRC.size], program))
    return sharded([edited_packed(data[: -16 - CRC.size], program, layer)]) if chunks else data


def edited_packed(data: bytes, program: Program, layer: int = 2) -> bytes:
    """Edit a packed chunk: its frame, or what is in it."""
    if layer == 1:
        return checked(edited_bytes(data[: -CRC.size], program))
    try:
        raw = unpack(data, 1 << 20, at_most=True).tobytes()
    except ValueError:  # a column, which is not compressed
        return checked(edited_bytes(data[: -CRC.size], program))
    return pack([np.frombuffer(edited_bytes(raw, program), np.uint8)])


def edited_bytes(data: bytes, program: Program, *, from_end: bool = False) -> bytes:
    """Set, flip, insert, delete, copy, cut."""
    result = bytearray(data)
    for _ in range(MOST_EDITS):
        if not program:
            break
        kind, at, value = program.byte() % 8, program.word() % (len(result) + 1), program.byte()
        if from_end:
            at = len(result) - at
        match kind:
            case 0:
                result[at : at + 1] = bytes([value])
            case 1:
                result[at : at + 1] = bytes(b ^ 1 << value % 8 for b in result[at : at + 1])
            case 2:
                result[at:at] = bytes([value]) * (1 + program.byte())
            case 3:
                del result[at : at + 1 + value]
            case 4:
                source = program.word() % (len(result) + 1)
                result[at : at + value] = result[source : source + value]
            case 5:
                number = (1 << value % 65) - value // 128
                result[at : at + 4] = (number & 0xFFFFFFFF).to_bytes(4, "little")
            case 6:
                number = (1 << value % 65) - value // 128
                result[at : at + 8] = (number & (1 << 64) - 1).to_bytes(8, "little")
            case 7:
                del result[at if value % 2 else at + value :]
    return bytes(result)


def edit_lmdb(path: Path, program: Program) -> None:
    """Edit pages of an LMDB file, or one of its entries, its checksums mended."""
    if program.byte() % 4 == 0:
        data = bytearray(path.read_bytes())
        for _ in range(MOST_EDITS):  # the tree's pages have up to 4 kB, most of it at their beginning and end
            if program:
                page, at, value = program.byte() * 4096 % len(data), program.word() % 4096, program.byte()
                data[page + at] = value
        path.write_bytes(data)
        return
    env = lmdb.open(str(path), subdir=False, lock=False, map_size=1 << 20)
    try:
        with env.begin(write=True) as txn:
            keys = [bytes(key) for key in txn.cursor().iternext(values=False)]
            key = keys[program.byte() % len(keys)]
            data = edited_entry(key, bytes(txn.get(key)), program)
            if data is None:
                txn.delete(key)
            else:
                grown = len(data) - len(txn.get(key))
                txn.put(key, data)
                if key[:1] == BUNDLE:
                    move_places(txn, key, grown)
            mend_counts(txn, key)
    finally:
        env.close()


def mend_counts(txn: Any, edited: bytes) -> None:
    """Make the counts those of the entries, but where they were what was edited."""
    data = txn.get(COUNTS)
    counts = Counts(txn.id())
    with suppress(ValueError):
        counts = replace(Counts.from_bytes(data or b""), transaction=txn.id())
    if edited != COUNTS:
        entries = {bytes(key): bytes(value) for key, value in txn.cursor() if key[:1] in (KEY, BLOCK, PLACE)}
        fits = {key: value for key, value in entries.items() if len(key + value) <= 24}
        counts = replace(Counts(0).plus(fits), **{n: getattr(counts, n) for n in vars(counts) if n != "checksum"})
    with suppress(struct.error):
        txn.put(COUNTS, counts.to_bytes())


def edited_entry(key: bytes, data: bytes, program: Program) -> bytes | None:
    layer = program.byte() % 5
    if layer == 4:
        return None
    kind = key[:1]
    if layer == 0 or kind in (KEY, BLOCK, PLACE):
        return edited_bytes(data, program)
    if kind in (ROOT, FIDELITY):
        return edited_json(data, program)
    if kind == COUNTS:
        return checked(edited_bytes(data[: -CRC.size], program))
    if kind == VOCABULARY:
        return edited_packed(data, program, layer)
    if kind == RANKS and layer == 1:
        return checked(edited_bytes(data[:4], program)) + data[8:]
    if kind == RANKS:
        return data[:8] + edited_packed(data[8:], program, layer)
    return edited_record(data, program, layer)


def edited_record(data: bytes, program: Program, layer: int) -> bytes:
    """Edit the first record of a bundle: its head, or one of its frames."""
    for sets in (1, 2, 4, 3):  # 3: one set, and the hidden states of two layers
        at = RECORD_HEAD + 4 * (sets + 1) + CRC.size
        if checked(data[: at - CRC.size]) == data[:at]:
            break
    if layer == 1:
        return checked(edited_bytes(data[: at - CRC.size], program)) + data[at:]
    sizes = list(struct.unpack_from(f"<{sets + 1}I", data, RECORD_HEAD))
    which = program.byte() % len(sizes)
    begin = at + sum(sizes[:which])
    end = begin + sizes[which]
    frame = edited_packed(data[begin:end], program, layer)
    sizes[which] = len(frame)
    return checked(data[:RECORD_HEAD] + struct.pack(f"<{sets + 1}I", *sizes)) + data[at:begin] + frame + data[end:]


def move_places(txn: Any, key: bytes, grown: int) -> None:
    """Mend the places of a bundle whose first record has become longer or shorter, and their checksums."""
    bundle, number = bytes(txn.get(key)), int.from_bytes(key[1:], "big")
    places = {bytes(k): Place.from_bytes(bytes(v)) for k, v in txn.cursor() if k[:1] == PLACE and len(v) == 16}
    for name, place in places.items():
        start, stop = place.start + grown if place.start else 0, place.stop + grown
        if place.bundle == number and 0 <= start <= stop:
            txn.put(name, Place.of(bundle[start:stop], number, start).to_bytes())
