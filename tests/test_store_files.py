"""A store's files over HTTP, as RFC 9110 says and as readers not of ours read them; nothing outside is reached."""

import asyncio
import os
import shutil
import socket
from hashlib import blake2b
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import numpy as np
import pytest
import zarr
from obstore.store import HTTPStore
from zarr.storage import ObjectStore

from logitstore.service import store_files
from logitstore.service.tokens import new_token
from logitstore.store import open_store
from logitstore.zip_store import write_zip
from tests.guessing import at_once, handles, until
from tests.served import serving
from tests.stores import contents, shard_folder, small_store
from tests.stubs import make


@pytest.fixture
def path(tmp_path: Path) -> Path:
    small_store(tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


def raw(url: str, target: str, method: str = "GET") -> tuple[int, bytes]:
    """Status and body of a request whose target nobody normalises on the way."""
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), 10) as connection:
        connection.sendall(f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode("latin-1"))
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    return int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("zipped", [False, True])
def test_every_file_is_there_byte_for_byte_and_what_is_being_written_is_not(path: Path, *, zipped: bool) -> None:
    (path / ".journal-x").write_bytes(b"1")
    (path / "shards" / ".partial-x").mkdir()
    (path / "shards" / ".partial-x" / "zarr.json").write_bytes(b"{}")
    if zipped:
        write_zip(path, path.with_name("z.zip"))
        shutil.rmtree(path)
        path = path.with_name("z.zip")
    with serving(path) as url:
        name = path.name.partition(".")[0]
        files = {} if zipped else contents(path)
        for file in open_store(path).files.names():  # type: ignore[attr-defined]
            answer = httpx2.get(f"{url}/{name}/{file}")
            assert answer.content == open_store(path).files.read(file)  # type: ignore[attr-defined]
            assert int(httpx2.head(f"{url}/{name}/{file}").headers["content-length"]) == len(answer.content)
        for file in (f for f in files if "/." in f"/{f}"):
            assert httpx2.get(f"{url}/{name}/{file}").status_code == 404


def test_zarr_reads_a_served_store_with_no_code_of_ours(tmp_path: Path) -> None:
    store = make(tmp_path / "s.zarr")
    name = sorted(store.shard_names)[0]
    with serving(tmp_path) as url:
        group = zarr.open_group(
            ObjectStore(HTTPStore(f"{url}/s", client_options={"allow_http": True}), read_only=True), mode="r"
        )
        assert group.attrs["logitstore"]["teacher"]["name"] == "tiny"
        rows = np.asarray(group[f"shards/{name}/documents"][:])  # type: ignore[index]
        blocks = np.asarray(group[f"shards/{name}/entries-0"][:])  # type: ignore[index]
    assert rows[:, :16].tobytes() == store.shard(name).keys.tobytes()
    assert np.array_equal(blocks, zarr.open_group(tmp_path / "s.zarr", mode="r")[f"shards/{name}/entries-0"][:])  # type: ignore[index]


def test_obstore_reads_whole_files_and_ranges(path: Path) -> None:
    async def read(url: str) -> tuple[bytes, bytes, int]:
        store = HTTPStore(f"{url}/s", client_options={"allow_http": True})
        whole = bytes(await (await store.get_async("vocabulary/bytes/c/0")).bytes_async())
        part = bytes(await store.get_range_async("vocabulary/bytes/c/0", start=3, end=20))
        return whole, part, (await store.head_async("vocabulary/bytes/c/0"))["size"]

    with serving(path) as url:
        whole, part, size = asyncio.run(read(url))
    data = (path / "vocabulary/bytes/c/0").read_bytes()
    assert (whole, part, size) == (data, data[3:20], len(data))


RANGES = {
    "bytes=0-9": (206, slice(0, 10)),
    "bytes=5-": (206, slice(5, None)),
    "bytes=-7": (206, slice(-7, None)),
    "bytes=0-99999999": (206, slice(0, None)),
    "bytes=-99999999": (206, slice(0, None)),
    "bytes=0-0": (206, slice(0, 1)),
    "Bytes=0-0": (206, slice(0, 1)),
    "bytes=99999999-": (416, None),
    "bytes=-0": (416, None),
    "bytes=9-3": (200, slice(None)),
    "bytes=-": (200, slice(None)),
    "bytes=0-1,4-5": (200, slice(None)),
    "bytes=a-b": (200, slice(None)),
    "bytes=--5": (200, slice(None)),
    "bytes=-5-": (200, slice(None)),
    "bytes=1-" + "9" * 500: (200, slice(None)),
    "bytes=" + "9" * 500 + "-": (200, slice(None)),
    "items=0-9": (200, slice(None)),
}


@pytest.mark.parametrize("asked", RANGES)
def test_a_range_is_answered_as_rfc_9110_section_14_says(path: Path, asked: str) -> None:
    data = (path / "zarr.json").read_bytes()
    with serving(path) as url:
        answer = httpx2.get(f"{url}/s/zarr.json", headers={"Range": asked})
    status, part = RANGES[asked]
    assert answer.status_code == status
    if part is None:
        assert answer.headers["content-range"] == f"bytes */{len(data)}"
        return
    assert answer.content == data[part]
    start, stop, _ = part.indices(len(data))
    assert answer.headers.get("content-range") == (f"bytes {start}-{stop - 1}/{len(data)}" if status == 206 else None)
    assert answer.headers["content-length"] == str(len(answer.content))


def test_head_takes_no_range_and_says_what_get_would(path: Path) -> None:
    with serving(path) as url:
        head = httpx2.head(f"{url}/s/zarr.json", headers={"Range": "bytes=0-4"})
        get = httpx2.get(f"{url}/s/zarr.json")
    assert (head.status_code, head.content) == (200, b"")
    assert {k: v for k, v in head.headers.items() if k != "date"} == {
        k: v for k, v in get.headers.items() if k != "date"
    }


def test_an_etag_is_the_digest_that_the_store_gives_and_spares_what_is_known(path: Path) -> None:
    shard = shard_folder(open_store(path)) / "entries-0/c/0/0"  # type: ignore[arg-type]
    file = shard.relative_to(path).as_posix()
    digest = blake2b(shard.read_bytes(), digest_size=16).hexdigest()
    with serving(path) as url:
        first = httpx2.get(f"{url}/s/{file}")
        assert first.headers["etag"] == f'"{digest}"' and "immutable" in first.headers["cache-control"]
        for known in (f'"{digest}"', f'W/"{digest}"', f'"x", W/"{digest}"', "*"):
            again = httpx2.get(f"{url}/s/{file}", headers={"If-None-Match": known})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", f'"{digest}"')
        for other in ('"x"', digest, '""', ""):
            assert httpx2.get(f"{url}/s/{file}", headers={"If-None-Match": other}).status_code == 200


def test_a_file_of_a_zip_file_in_the_place_of_another_is_sent_anew(tmp_path: Path) -> None:
    for shards in (1, 2):
        small_store(tmp_path / f"{shards}", shards).save_index()
        write_zip(tmp_path / f"{shards}", tmp_path / f"{shards}.zip")
    with serving(tmp_path / "1.zip") as url:
        first = httpx2.get(f"{url}/1/index/counts/c/0/0")
        (tmp_path / "2.zip").replace(tmp_path / "1.zip")
        again = httpx2.get(f"{url}/1/index/counts/c/0/0", headers={"If-None-Match": first.headers["ETag"]})
    assert again.status_code == 200 and again.content != first.content


def test_if_range_sends_the_whole_of_what_has_changed(path: Path) -> None:
    with serving(path) as url:
        etag = httpx2.head(f"{url}/s/zarr.json").headers["etag"]
        for validator, status in (
            (etag, 206),
            ('"x"', 200),
            (f"W/{etag}", 200),
            ("Wed, 21 Oct 2015 07:28:00 GMT", 200),
        ):
            answer = httpx2.get(f"{url}/s/zarr.json", headers={"Range": "bytes=0-4", "If-Range": validator})
            assert answer.status_code == status


def test_what_is_replaced_has_another_etag_and_is_asked_for_again(path: Path) -> None:
    store = open_store(path)
    with serving(path) as url:
        seen = set()
        for number in range(3):
            store.save_fidelity({"documents": number})
            answer = httpx2.get(f"{url}/s/fidelity/zarr.json")
            seen.add(answer.headers["etag"])
            assert answer.headers["cache-control"] == "public, no-cache"
            assert answer.content == (path / "fidelity/zarr.json").read_bytes()
    assert len(seen) == 3


OUTSIDE = (
    "/s/../secret",
    "/s/%2e%2e/secret",
    "/s/%2E%2E%2fsecret",
    "/s/..%2fsecret",
    "/s/..%5csecret",
    "/s/..\\secret",
    "/s/shards/../../secret",
    "/s//etc/passwd",
    "/s/%2fetc%2fpasswd",
    "//etc/passwd",
    "/../secret",
    "/%2e%2e/secret",
    "/s/secret%00.json",
    "/s/zarr.json%00",
    "/s/zarr.json/",
    "/s/./zarr.json",
    "/s/%2e/zarr.json",
    "/s/.journal-x",
    "/s/%2ejournal-x",
    "/s/shards/%2e",
    "/s/shards",
    "/s/",
    "/s/link",
    "/s/folder/secret",
    "/s/fifo",
    "/s/zarr.json%0a",
    "/s/%ff%fe",
    "/s/%ed%a0%80",
    "/s/" + "a" * 300,
    "/s/" + "a/" * 3000,
    "/s.zarr/zarr.json",
    "/secret",
)


@pytest.mark.parametrize("target", OUTSIDE)
def test_nothing_outside_the_store_is_reached(path: Path, target: str) -> None:
    (path.parent / "secret").write_bytes(b"secret")
    (path / ".journal-x").write_bytes(b"secret")
    (path / "link").symlink_to(path.parent / "secret")
    (path / "folder").symlink_to(path.parent)
    os.mkfifo(path / "fifo")
    with serving(path.parent) as url:
        status, body = raw(url, target)
    assert status == 404 and b"secret" not in body and b"root:" not in body


def test_a_file_that_is_cut_while_it_is_sent_is_a_cut_answer(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_files, "PIECE", 1000)
    file = path / "index-of-nothing"
    file.write_bytes(bytes(5_000_000))
    with serving(path) as url, httpx2.stream("GET", f"{url}/s/index-of-nothing") as answer:
        os.truncate(file, 10)
        with pytest.raises(httpx2.RemoteProtocolError):
            for _ in answer.iter_raw(1000):
                pass


def test_2000_requests_and_those_that_were_broken_off_leave_no_file_open(path: Path) -> None:
    (path / "large").write_bytes(bytes(3_000_000))
    os.mkfifo(path / "fifo")
    file = shard_folder(open_store(path)).relative_to(path).as_posix() + "/entries-0/c/0/0"  # type: ignore[arg-type]
    with serving(path) as url:
        where = (urlsplit(url).hostname, urlsplit(url).port)

        def some(number: int) -> None:
            with httpx2.Client() as client:
                for _ in range(100):
                    assert client.get(f"{url}/s/{file}").status_code == 200
                    assert client.get(f"{url}/s/zarr.json", headers={"If-None-Match": "*"}).status_code == 304
                    assert client.head(f"{url}/s/{number}").status_code == 404
                    assert client.get(f"{url}/s/fifo").status_code == 404
                    assert client.get(f"{url}/s/zarr.json", headers={"Range": "bytes=-0"}).status_code == 416
            for _ in range(25):
                with socket.create_connection(where) as gone:
                    gone.sendall(b"GET /s/large HTTP/1.1\r\nHost: x\r\n\r\n")
                    gone.recv(10)

        httpx2.get(f"{url}/s/{file}")
        before = handles()
        at_once(5, some)
        until(lambda: handles() <= before + 2)


def test_whoever_may_not_read_a_store_gets_none_of_its_files(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    token = new_token(file, "x", ["read"], ["other"])
    said = set()
    with serving(path, tokens=file) as url:
        assert httpx2.get(f"{url}/s/zarr.json").status_code == 401
        for name in ("s", "no-such-store"):
            answer = httpx2.get(f"{url}/{name}/zarr.json", headers={"Authorization": f"Bearer {token}"})
            said.add((answer.status_code, answer.json()["error"].replace(f"read {name};", "")))
    assert len(said) == 1 and said.pop()[0] == 403
