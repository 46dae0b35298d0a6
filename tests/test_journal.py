"""What was appended is there after any end of the process, whole, or not at all."""

import subprocess
import sys
from io import FileIO
from pathlib import Path

import numpy as np
import pytest

from logitstore.durable import sync
from logitstore.errors import StoreWriteError
from logitstore.journal import FRAME, ShardWriter, commit_leftovers, journals, payloads
from logitstore.recipe import DocumentRecord
from logitstore.store import open_store
from logitstore.zarr_store import ZarrStore
from tests.stores import VOCABULARY, contents, manifest, records

BATCHES = [records([4, 3], seed=1), records([6], seed=2), records([2, 2, 5], seed=3)]
KEYS = [[document.key for document in batch] for batch in BATCHES]


def flat(keys: list[list[bytes]]) -> list[bytes]:
    return [key for batch in keys for key in batch]


@pytest.fixture
def store(tmp_path: Path) -> ZarrStore:
    return ZarrStore.create(tmp_path / "s", manifest(), VOCABULARY)


def journal_of(store: ZarrStore) -> tuple[Path, list[int]]:
    """A journal of three batches as a killed writer leaves it, and where each ends."""
    ends = []
    with pytest.raises(RuntimeError), ShardWriter(store, "build") as writer:
        for batch in BATCHES:
            writer.append(batch)
            ends.append(writer.path.stat().st_size)
        raise RuntimeError
    return writer.path, ends


def recovered(store: ZarrStore) -> list[DocumentRecord]:
    with ShardWriter(store, "build") as writer:
        return list(writer.pending.values())


def test_what_was_pending_is_taken_over_as_it_was(store: ZarrStore) -> None:
    journal_of(store)
    found = recovered(store)
    expected = [document for batch in BATCHES for document in batch]
    assert len(found) == len(expected) == 6
    for a, b in zip(found, expected, strict=True):
        assert (a.token_ids == b.token_ids).all() and a.records.tobytes() == b.records.tobytes()


def test_a_frame_cut_at_any_byte_is_dropped_whole_and_those_before_it_stay(store: ZarrStore) -> None:
    path, ends = journal_of(store)
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        whole = sum(end <= size for end in ends)
        assert [d.key for d in recovered(store)] == flat(KEYS[:whole]), size
        assert not path.exists() if whole == 0 else path.stat().st_size == ends[whole - 1]


def test_a_frame_larger_than_the_system_reads_at_a_time_is_read_whole(store: ZarrStore) -> None:
    class Short(FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(size or 0, 100))

    path, ends = journal_of(store)
    with Short(path) as file:
        assert [FRAME.size + len(payload) for payload in payloads(file)] == np.diff([0, *ends]).tolist()


def test_a_flipped_byte_drops_its_frame_and_what_follows(store: ZarrStore) -> None:
    path, ends = journal_of(store)
    data = path.read_bytes()
    for at in range(0, len(data), 3):
        flipped = bytearray(data)
        flipped[at] ^= 0x10
        path.write_bytes(flipped)
        assert [d.key for d in recovered(store)] == flat(KEYS[: sum(end <= at for end in ends)]), at


def test_appending_goes_on_behind_the_last_whole_frame(store: ZarrStore) -> None:
    path, ends = journal_of(store)
    path.write_bytes(path.read_bytes()[: ends[1] + 5])
    with pytest.raises(RuntimeError), ShardWriter(store, "build") as writer:
        writer.append(BATCHES[2])
        raise RuntimeError
    assert [d.key for d in recovered(store)] == flat(KEYS)


def test_a_commit_moves_what_was_pending_into_a_shard_and_ends_the_journal(store: ZarrStore) -> None:
    journal_of(store)
    with ShardWriter(store, "build") as writer:
        assert KEYS[0][0] in writer and KEYS[0][0] not in store
        writer.commit(list(writer.pending))
        assert writer.path.stat().st_size == 0 and KEYS[0][0] in store
    assert journals(store.path) == [] and len(open_store(store.path)) == 6


def test_what_a_commit_left_pending_stays_in_the_journal(store: ZarrStore) -> None:
    journal_of(store)
    with ShardWriter(store, "build") as writer:
        writer.commit(KEYS[1])
    assert [d.key for d in recovered(store)] == KEYS[0] + KEYS[2]


def test_a_document_that_came_again_while_its_shard_was_written_is_stored_once(store: ZarrStore) -> None:
    with ShardWriter(store, "build") as writer:
        writer.append(BATCHES[0])
        writer.commit(KEYS[0])
        writer.append(BATCHES[1])
        writer.commit(KEYS[0] + KEYS[1])  # a build reads the next documents meanwhile, and finds these still pending
    assert (store.shard_count, len(store), store.positions) == (2, 3, 10)


def test_a_kill_between_the_shard_and_the_end_of_the_journal_loses_and_repeats_nothing(store: ZarrStore) -> None:
    path, _ = journal_of(store)
    left = path.read_bytes()
    with ShardWriter(store, "build") as writer:
        writer.commit(flat(KEYS))
    path.write_bytes(left)
    assert recovered(store) == [] and len(open_store(store.path)) == 6 and not path.exists()


def test_ctrl_c_keeps_what_was_appended(store: ZarrStore) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(store, "build") as writer:
        writer.append(BATCHES[0])
        raise KeyboardInterrupt
    assert [d.key for d in recovered(store)] == KEYS[0]


def test_ctrl_c_in_the_middle_of_an_append_drops_that_batch_alone(
    store: ZarrStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ShardWriter(store, "build") as writer:
        writer.append(BATCHES[0])
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("os.fsync", lambda _handle: (_ for _ in ()).throw(KeyboardInterrupt))
            writer.append(BATCHES[1])
        writer.append(BATCHES[2])
    assert [d.key for d in recovered(store)] == KEYS[0] + KEYS[2]


HOLD = """
import sys
from pathlib import Path
from logitstore.journal import ShardWriter
from logitstore.store import open_store
with ShardWriter(open_store(Path(sys.argv[1])), "build"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_second_writer_of_a_name_is_refused_while_the_first_lives(store: ZarrStore) -> None:
    journal_of(store)
    command = [sys.executable, "-c", HOLD, str(store.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with pytest.raises(StoreWriteError, match=r"another process is writing build into .*; wait for it, or end it"):
            ShardWriter(store, "build")
        with ShardWriter(store, "another"):
            pass
        first.kill()
    assert len(recovered(store)) == 6


FULL = """
import json, resource, signal, sys
from pathlib import Path
from logitstore.errors import StoreWriteError
from logitstore.journal import ShardWriter
from logitstore.store import open_store
from tests.stores import records

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with ShardWriter(open_store(Path(sys.argv[1])), "build") as writer:
    writer.append(records([4, 3], seed=1))
    size = writer.path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, resource.RLIM_INFINITY))
    try:
        writer.append(records([6], seed=2))
    except StoreWriteError as error:
        print(error)
    assert writer.path.stat().st_size == size
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    writer.append(records([2, 2, 5], seed=3))
"""


def test_a_full_disk_drops_that_batch_and_what_is_appended_later_is_kept(store: ZarrStore) -> None:
    command = [sys.executable, "-c", FULL, str(store.path)]
    root = Path(__file__).parent.parent
    message = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert "cannot be written: File too large; nothing that was finished is lost" in message
    assert [d.key for d in recovered(store)] == KEYS[0] + KEYS[2]


def test_a_writer_that_had_nothing_to_do_leaves_the_store_as_it_was(store: ZarrStore) -> None:
    before = contents(store.path)
    with ShardWriter(store, "build"):
        pass
    assert contents(store.path) == before


def test_a_store_that_cannot_be_written_is_one_line(store: ZarrStore) -> None:
    (store.path / ".journal-build").mkdir()
    with pytest.raises(StoreWriteError, match=r"\.journal-build cannot be written"):
        ShardWriter(store, "build")


def test_a_flush_reaches_the_medium_where_fsync_alone_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def call(_handle: int, command: int) -> None:
        asked.append(command)
        raise OSError(45, "Operation not supported")  # some file systems: fsync is then what there is

    monkeypatch.setattr("fcntl.F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr("fcntl.fcntl", call)
    sync(tmp_path)
    assert asked == [51]


def test_what_an_interrupted_writer_left_is_committed_and_one_that_runs_is_left_alone(store: ZarrStore) -> None:
    path, _ = journal_of(store)
    with ShardWriter(store, "build") as writer:
        commit_leftovers(store, "build")
        assert path.exists() and len(store) == 0 and len(writer.pending) == 6
        raised = writer.pending.copy()
        writer.pending.clear()  # leave as if nothing had been found, without a commit
    journal_of(store)
    commit_leftovers(store, "build")
    assert len(store) == len(raised) == 6 and not journals(store.path)


def test_two_writers_of_the_same_documents_store_them_once(store: ZarrStore) -> None:
    with ShardWriter(store, "build") as one, ShardWriter(open_store(store.path), "write-back") as other:
        for writer in (one, other):
            writer.append(BATCHES[0])
        other.append(BATCHES[1])
        one.commit(KEYS[0])
        other.commit(KEYS[0] + KEYS[1])
    found = open_store(store.path)
    assert len(found) == 3 and sum(len(found.shard(name).keys) for name in found.shard_names) == 3
