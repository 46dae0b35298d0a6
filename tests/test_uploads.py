"""An upload counts when every byte and document was checked, appears whole, and goes on where it was cut."""

import fcntl
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from logitstore.errors import LogitstoreError
from logitstore.files import LocalFiles
from logitstore.http_client import RefusedError
from logitstore.incoming import FOLDER as INCOMING
from logitstore.incoming import Incoming
from logitstore.parts import Part, part_of
from logitstore.places import push
from logitstore.sealed import GROUP, file_digest, seal_group, unseal_group
from logitstore.service.tokens import new_token
from logitstore.service.upload import RejectedError, Upload
from logitstore.service_client import ServiceClient
from logitstore.verify import verify
from logitstore.zarr_store import ZarrStore
from tests.guessing import until
from tests.served import serving
from tests.stores import VOCABULARY, contents, manifest, records, small_store
from tests.test_files import served
from tests.test_parts import whole
from tests.test_push_pull import ROOT, Slow, wait_for

KILLS = int(os.environ.get("LOGITSTORE_KILLS", "3"))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitstore.places.PATIENCE_S", 0.5)


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    (tmp_path / "shelf").mkdir()
    return tmp_path / "shelf"


@pytest.fixture
def store(tmp_path: Path) -> ZarrStore:
    return small_store(tmp_path / "s")


def first_part(store: ZarrStore) -> Part:
    name = store.shard_names[0]
    return part_of(name, (store.folder / "shards" / name / GROUP).read_bytes(), store.manifest, "s")


def begun(store: ZarrStore, folder: Path) -> ZarrStore:
    """The same store in another folder, without its shards."""
    shutil.copytree(store.folder, folder)
    for shard in (folder / "shards").glob("[0-9a-f]*"):
        shutil.rmtree(shard)
    return ZarrStore(LocalFiles(folder), folder)


def upload(
    store: ZarrStore, part: Part, folder: Path, change: Callable[[str, bytes], bytes] = lambda _, d: d
) -> Upload:
    """All of a part's files, as they are or changed; not checked yet."""
    found = Upload(folder, part.name)
    found.begin(part.group)
    for file in part.files:
        data = change(file, store.files.read(part.path(file)))
        with Incoming(folder).appending(part, file, 0) as handle:
            handle.write(data)
    return found


# ---- from a folder to a service, and back ----------------------------------------------------------------------------


def test_a_store_goes_to_a_service_and_back(shelf: Path, tmp_path: Path) -> None:
    store = whole(tmp_path / "s")
    with serving(shelf) as url:
        report = push(str(store.folder), f"{url}/new", quiet=True)
        assert report.parts == 5 and contents(shelf / "new.zarr") == contents(store.folder)
        assert push(str(store.folder), f"{url}/new", quiet=True).to_text("u").startswith("u: 0 parts moved, 0 bytes")
        push(f"{url}/new", str(tmp_path / "t"), quiet=True)
        assert contents(tmp_path / "t") == contents(store.folder)
        push(f"{url}/new", f"{url}/copy", quiet=True)  # from service to service
    assert verify(shelf / "copy.zarr", quiet=True).problems == []


def test_several_members_add_to_one_store(shelf: Path, store: ZarrStore, tmp_path: Path) -> None:
    other = ZarrStore.create(tmp_path / "o", store.manifest, VOCABULARY)
    for seed in range(5, 9):
        other.write_documents(records([9, 4], seed))
    with serving(shelf) as url:
        threads = [
            threading.Thread(target=push, args=(str(place.folder), f"{url}/team"), kwargs={"quiet": True})
            for place in (store, other, store)  # the third sends what the first sends
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        push(str(store.folder), f"{url}/team", quiet=True)
        push(str(other.folder), f"{url}/team", quiet=True)
    report = verify(shelf / "team.zarr", quiet=True)
    assert report.problems == [] and report.documents == 14 and not (shelf / "team.zarr" / INCOMING).exists()


def test_tokens_decide_who_uploads(
    shelf: Path, store: ZarrStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tokens"
    reads, writes = new_token(file, "r", ["read"], []), new_token(file, "w", ["read", "write"], ["mine"])
    with serving(shelf, tokens=file) as url:
        for token, place, status in (
            ("", "mine", 401),
            (reads, "mine", 403),
            (writes, "other", 403),
            (writes, "mine", 0),
        ):
            monkeypatch.setenv("LOGITSTORE_TOKEN", token)
            if status:
                with pytest.raises(RefusedError, match=f"answers {status}: ") as caught:
                    push(str(store.folder), f"{url}/{place}", quiet=True)
                assert "\n" not in str(caught.value) and not list(shelf.iterdir())
            else:
                push(str(store.folder), f"{url}/{place}", quiet=True)
    assert verify(shelf / "mine.zarr", quiet=True).problems == []
    with (
        serving(shelf, read_only=True) as url,
        pytest.raises(RefusedError, match="answers 403: this service only reads"),
    ):
        push(str(store.folder), f"{url}/again", quiet=True)


def test_another_store_and_a_single_served_one_are_refused(shelf: Path, store: ZarrStore, tmp_path: Path) -> None:
    other = ZarrStore.create(tmp_path / "o", manifest(seed=3), VOCABULARY)
    with serving(other.folder) as url:
        with pytest.raises(LogitstoreError, match=r"holds another store: its seed is 3, that of .* is 0"):
            push(str(store.folder), f"{url}/o", quiet=True)
        with pytest.raises(LogitstoreError, match="there is no store 'new' here"):
            push(str(store.folder), f"{url}/new", quiet=True)
    with serving(shelf) as url, pytest.raises(LogitstoreError, match=r"answers 400: .*would be served as"):
        push(str(store.folder), f"{url}/metrics", quiet=True)
    with served(Slow) as url, pytest.raises(LogitstoreError):
        push(str(store.folder), url, quiet=True)
    assert list(shelf.iterdir()) == []


def test_a_store_takes_nothing_under_another_name(shelf: Path, store: ZarrStore) -> None:
    (shelf / "other.zarr").symlink_to(store.folder)  # as S.zarr is s.zarr where letters may be of either case
    with (
        serving(shelf) as url,
        pytest.raises(LogitstoreError, match=r"other\.zarr is the store that is served as /s; "),
    ):
        push(str(store.folder), f"{url}/other", quiet=True)


def test_a_client_of_another_format_is_refused_by_name(shelf: Path, store: ZarrStore) -> None:
    said = unseal_group((store.folder / GROUP).read_bytes(), "s")
    for version in (0, 2):
        said["logitstore"]["format_version"] = version
        with serving(shelf) as url:
            client = ServiceClient(f"{url}/new")
            with pytest.raises(RefusedError, match=rf"answers 422: zarr.json is refused: .*format {version}"):
                client.put(f"{client.api}/uploads/root/zarr.json?offset=0", iter([seal_group(said)]))
            client.close()
    assert list(shelf.iterdir()) == []


# ---- cut, killed, full -----------------------------------------------------------------------------------------------


def serve_process(shelf: Path, port: int) -> "subprocess.Popen[str]":
    code = f"from distill_cli.logitstore import main; main(['serve', {str(shelf)!r}, '--port', '{port}', '--quiet'])"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "listening" not in (line := process.stdout.readline()):
        assert line, "the service has ended"
    return process


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_service_that_is_killed_at_any_moment_shows_whole_parts_only(shelf: Path, tmp_path: Path) -> None:
    made = manifest(hidden_layers=(0, 1), hidden_size=2048)
    store = ZarrStore.create(tmp_path / "s", made, VOCABULARY)
    for seed in range(3):
        store.write_documents(records([200, 100], seed, made.recipe))
    store.save_index()
    port, random_, failed = free_port(), random.Random(3), []
    for _ in range(KILLS):
        process = serve_process(shelf, port)
        try:
            pushing = threading.Thread(target=refused, args=(store, f"http://127.0.0.1:{port}/s", failed))
            pushing.start()
            time.sleep(random_.random() * 0.3)
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        pushing.join(60)
        path = shelf / "s.zarr"
        assert not (path / GROUP).exists() or verify(path, quiet=True).problems == []
    process = serve_process(shelf, port)
    try:
        push(str(store.folder), f"http://127.0.0.1:{port}/s", quiet=True)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert contents(shelf / "s.zarr") == contents(store.folder) and any(failed)


def refused(store: ZarrStore, url: str, failed: list[str]) -> None:
    try:
        push(str(store.folder), url, quiet=True)
        failed.append("")
    except LogitstoreError as error:
        failed.append(str(error))


def test_a_client_that_is_gone_goes_on_where_it_was_cut(
    shelf: Path, store: ZarrStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitstore.service.uploads.PIECE", 100)
    part = first_part(store)
    file = max(part.files, key=lambda name: part.files[name]["bytes"])
    data = store.files.read(part.path(file))
    begun(store, shelf / "s")
    with serving(shelf) as url:
        client = ServiceClient(f"{url}/s")
        at = f"{client.api}/uploads/{part.name}"
        client.put(f"{at}/{GROUP}?offset=0", iter([part.group]))
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            path = f"/v1/stores/s/uploads/{part.name}/{file}?offset=0"
            head = f"PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
            connection.sendall(head.encode() + data[:300])
            wait_for(lambda: client.json("GET", at)["received"].get(file) == 300)

        def refused() -> str:
            with pytest.raises(RefusedError, match="answers 409: ") as caught:
                client.put(f"{at}/{file}?offset=200", iter([data[200:]]))
            return str(caught.value)

        wait_for(lambda: re.search("300 bytes of .* are here; send it from there", refused()))  # when it has noticed
        with pytest.raises(RefusedError, match=f"answers 413: .* has {len(data):,} bytes, and no more"):
            client.put(f"{at}/{file}?offset=300", iter([data]))
        report = push(str(store.folder), f"{url}/s", quiet=True)
        client.close()
    assert report.parts == 2 and verify(shelf / "s", quiet=True).problems == []


def test_a_full_disk_is_507_and_nothing_half_is_visible(
    shelf: Path, store: ZarrStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, part = begun(store, shelf / "s"), first_part(store)
    before = contents(there.folder)
    with serving(shelf) as url:
        client = ServiceClient(f"{url}/s", patience_s=0.1)
        at = f"{client.api}/uploads/{part.name}"
        with monkeypatch.context() as patch:
            patch.setattr("logitstore.service.upload.SPARE_BYTES", 1 << 62)
            with pytest.raises(RefusedError, match=r"answers 507: the disk has .* bytes free"):
                client.put(f"{at}/{GROUP}?offset=0", iter([part.group]))
        client.put(f"{at}/{GROUP}?offset=0", iter([part.group]))
        file = max(part.files, key=lambda name: part.files[name]["bytes"])
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        before_signal = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
            with pytest.raises(RefusedError, match=r"answers 507: .* cannot be written: File too large"):
                client.put(f"{at}/{file}?offset=0", iter([store.files.read(part.path(file))]))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before_signal)
        client.close()
        assert {name: data for name, data in contents(there.folder).items() if INCOMING not in name} == before
        push(str(store.folder), f"{url}/s", quiet=True)
    assert verify(there.folder, quiet=True).problems == []


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_wrong_byte_names_the_file_and_is_sent_again(shelf: Path, store: ZarrStore) -> None:
    there, part = begun(store, shelf / "s"), first_part(store)
    bad = "positions/c/0/0"
    sent = upload(store, part, there.folder, lambda file, data: data[:-1] + b"x" if file == bad else data)
    with pytest.raises(RejectedError, match=f"{bad} its bytes are not those") as caught:
        sent.finish()
    assert caught.value.files == [bad] and sent.state()["received"].keys() == {GROUP, *part.files} - {bad}
    with serving(shelf) as url:
        push(str(store.folder), f"{url}/s", quiet=True)
    assert verify(there.folder, quiet=True).problems == []


def test_a_shard_whose_bytes_are_right_and_whose_content_is_not_is_refused(shelf: Path, store: ZarrStore) -> None:
    there, part = begun(store, shelf / "s"), first_part(store)
    other = store.shard_names[1]
    stolen = part_of(other, (store.folder / "shards" / other / GROUP).read_bytes(), store.manifest, "s")
    lie = Upload(there.folder, part.name)  # another shard under this one's name
    lie.begin(stolen.group)
    renamed = Part(part.name, stolen.group, stolen.files)
    for file in stolen.files:
        with Incoming(there.folder).appending(renamed, file, 0) as handle:
            handle.write(store.files.read(stolen.path(file)))
    with pytest.raises(RejectedError, match="the shard's name is not the hash of its keys") as caught:
        lie.finish()
    assert caught.value.files == [] and not lie.state()["received"]
    assert os.listdir(there.folder / "shards") == [GROUP]  # noqa: PTH208


def test_a_file_that_is_short_is_not_published(shelf: Path, store: ZarrStore) -> None:
    there, part = begun(store, shelf / "s"), first_part(store)
    sent = upload(store, part, there.folder, lambda file, data: data[:-1] if file == "blocks/zarr.json" else data)
    with pytest.raises(RejectedError, match=r"blocks/zarr.json holds .* bytes instead of"):
        sent.finish()
    assert sent.published() is None and not (there.folder / "shards" / part.name).exists()


@pytest.mark.parametrize(
    ("part", "file", "status"),
    [
        ("root", "../../x", 404),
        ("root", "vocabulary/bytes/c/0", 404),  # before its zarr.json
        ("index", "zarr.json", 404),
        ("..", "zarr.json", 404),
        ("0123456789abcde", "zarr.json", 404),
        ("fidelity", "x", 404),
    ],
)
def test_a_name_that_is_none_is_refused(shelf: Path, store: ZarrStore, part: str, file: str, status: int) -> None:
    begun(store, shelf / "s")
    before = contents(shelf)
    with serving(shelf) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = f"PUT /v1/stores/s/uploads/{part}/{file}?offset=0 HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx"
            connection.sendall(head.encode())
            answer = connection.recv(4096).decode()
    assert answer.startswith((f"HTTP/1.1 {status}", "HTTP/1.1 405")), answer
    assert contents(shelf) == before


def test_hostile_groups_are_refused(shelf: Path, store: ZarrStore) -> None:
    there, part = begun(store, shelf / "s"), first_part(store)
    said = unseal_group(part.group, "s")
    for change, message in (
        ({"files": {"../../x": {"bytes": 1, "digest": "0"}}}, "says what no logitstore writes"),
        ({"files": {"x": {"bytes": 1 << 40, "digest": "0"}}}, "are the most that there can be"),
        ({"documents": 1 << 40}, "says what no logitstore writes"),
    ):
        with pytest.raises(RejectedError, match=message):
            Upload(there.folder, part.name).begin(seal_group(said | change))
    with pytest.raises(RejectedError, match="its digest does not match"):
        Upload(there.folder, part.name).begin(part.group[:-2] + b"x\n")
    with pytest.raises(LogitstoreError, match="belongs to"):
        Upload(there.folder, part.name).begin(seal_group(said | {"fingerprint": "0" * 32}))
    with pytest.raises(LogitstoreError, match="begins with the part root"):
        Upload(shelf / "none", part.name).begin(part.group)
    assert not (there.folder / INCOMING).exists() and not (shelf / "none").exists()


def test_an_upload_is_done_once_and_twice_is_no_harm(shelf: Path, store: ZarrStore) -> None:
    there, part = begun(store, shelf / "s"), first_part(store)
    sent = upload(store, part, there.folder)
    threads = [threading.Thread(target=sent.finish) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sent.finish()
    assert sent.state() == {"complete": True, "digest": part.digest, "received": {}}
    sent.begin(part.group)
    assert not (there.folder / INCOMING).exists() and verify(there.folder, quiet=True).problems == []


def test_asking_again_for_a_part_that_is_being_checked_keeps_nobody_from_the_service(
    shelf: Path, store: ZarrStore
) -> None:
    part = first_part(store)
    upload(store, part, begun(store, shelf / "s").folder)
    codes: list[int] = []
    with (shelf / "s" / INCOMING / part.path()).open("rb") as group, serving(shelf) as url:
        fcntl.flock(group, fcntl.LOCK_EX)  # as another process that checks it
        check = lambda: codes.append(httpx2.post(f"{url}/v1/stores/s/uploads/{part.name}", timeout=20).status_code)  # noqa: E731
        threads = [threading.Thread(target=check) for _ in range(45)]  # more than there are threads to answer
        for thread in threads:
            thread.start()
        until(lambda: len(codes) == 44)
        assert httpx2.get(f"{url}/v1/stores", timeout=20).status_code == 200
        fcntl.flock(group, fcntl.LOCK_UN)
        for thread in threads:
            thread.join()
    assert sorted(codes) == [200, *[503] * 44]


def test_an_index_that_is_being_written_keeps_nobody_from_reading(
    shelf: Path, store: ZarrStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(store.folder, shelf / "s")
    begins, goes_on, save = threading.Event(), threading.Event(), ZarrStore.save_index

    def slow(self: ZarrStore) -> None:
        begins.set()
        assert goes_on.wait(20)
        save(self)

    monkeypatch.setattr(ZarrStore, "save_index", slow)
    with serving(shelf) as url:
        thread = threading.Thread(target=httpx2.post, args=(f"{url}/v1/stores/s/uploads/index",))
        thread.start()
        assert begins.wait(20)
        try:
            assert httpx2.get(f"{url}/v1/stores/s/shards", timeout=5).status_code == 200
        finally:
            goes_on.set()
            thread.join()
    assert (shelf / "s" / "index" / GROUP).exists()


def test_a_part_that_is_shown_while_old_ones_are_looked_for_disturbs_nobody(tmp_path: Path) -> None:
    class Raced(Incoming):
        def _places(self) -> list[Path]:
            return [self.folder / "gone"]

    Raced(tmp_path / "s").remove_older(5)
    assert Incoming(tmp_path / "s").age_s("0" * 16) == 0


def test_what_nobody_went_on_with_for_a_day_is_removed(shelf: Path, store: ZarrStore) -> None:
    there, part = begun(store, shelf / "s"), first_part(store)
    old = upload(store, part, there.folder)
    name = store.shard_names[1]
    group = (store.folder / "shards" / name / GROUP).read_bytes()
    Upload(there.folder, name).begin(group)
    assert old.state()["received"]
    for path in (there.folder / INCOMING / "shards" / part.name).rglob("*"):
        os.utime(path, (time.time() - 25 * 3600,) * 2)
    Upload(there.folder, name).begin(group)
    assert not old.state()["received"] and Upload(there.folder, name).state()["received"] == {GROUP: len(group)}


def test_fidelity_and_maps_are_checked_too(shelf: Path, tmp_path: Path) -> None:
    store = whole(tmp_path / "s")
    there = begun(store, shelf / "s")
    shutil.rmtree(there.folder / "fidelity")
    bad = Upload(there.folder, "fidelity")
    bad.begin(seal_group({"documents": 6}))
    with pytest.raises(RejectedError, match="says what no logitstore writes"):
        bad.finish()
    assert not (there.folder / "fidelity").exists()
    name = f"map-{VOCABULARY.fingerprint()}"
    shutil.rmtree(there.folder / f"vocabulary-{name}")
    part = part_of(name, (store.folder / f"vocabulary-{name}" / GROUP).read_bytes(), store.manifest, "s")
    said: dict[str, Any] = unseal_group(part.group, "s") | {"student_size": 5}
    lie = part_of(name, seal_group(said), store.manifest, "s")
    with pytest.raises(RejectedError, match="ids of no token"):
        upload(store, lie, there.folder).finish()
    upload(store, part, there.folder).finish()
    assert {p.fault for p in verify(there.folder, quiet=True).problems} == {"is gone; the index knows it"}


# ---- other tools -----------------------------------------------------------------------------------------------------


def test_plain_zarr_reads_a_served_store(shelf: Path, store: ZarrStore) -> None:
    import zarr
    from obstore.store import HTTPStore
    from zarr.storage import ObjectStore

    begun(store, shelf / "s")
    with serving(shelf) as url:
        push(str(store.folder), f"{url}/s", quiet=True)
        http = HTTPStore.from_url(f"{url}/s", client_options={"allow_http": True})
        group = zarr.open_group(ObjectStore(http, read_only=True), mode="r")
        for name in store.shard_names:
            assert np.array_equal(group[f"shards/{name}/documents"][:], store.shard(name).documents)
            assert group[f"shards/{name}/positions"][:].any()


def test_plain_obstore_reads_a_served_store(shelf: Path, store: ZarrStore) -> None:
    import obstore
    from obstore.store import HTTPStore

    begun(store, shelf / "s")
    with serving(shelf) as url:
        http = HTTPStore.from_url(f"{url}/s", client_options={"allow_http": True})
        for name, entry in store.root.files.items():
            assert file_digest(bytes(obstore.get(http, name).bytes())) == entry["digest"]
            assert bytes(obstore.get_range(http, name, start=1, end=5)) == store.files.read(name, 1, 5)
            assert obstore.head(http, name)["size"] == entry["bytes"]
