"""Ask a service for what no client asks: requests generated from its own OpenAPI page, and others written by hand.

    python -m tools.fuzz_service OUT --requests 100000

Schemathesis generates; the others go over bare sockets: traversal, links, ranges, lying lengths, deep JSON, scopes,
revoked tokens, compression that is none, ids beyond the vocabulary; and these again with bytes of them changed at
random, most of all. What must hold: no status of 500, nothing read from
outside the stores, no file of a store changed, no memory or connection kept, no secret and no text of a request in the
log. Exit code 1 where it does not. Needs `pip install schemathesis`.
"""

import argparse
import json
import random
import re
import select
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import distill_kernels  # noqa: F401  loads the BLAS before MLX

import httpx2

from logitstore.service.tokens import new_token, revoke_token
from logitstore.verify import verify
from tests.runs import make_world
from tools.service_process import Service

CANARY = "canary-that-lies-outside-of-every-store"
SECRET_TEXT = "words-of-a-document-that-no-log-may-hold"
MORE_MEMORY_BYTES = 512 << 20
AT_ONCE = 16
SETTLED_S = 90.0
STATUS = re.compile(r"^\S+ (?:GET|HEAD|POST|PUT|DELETE|PATCH|OPTIONS|TRACE|\S+) .* (\d+) \d+ ms ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--requests", type=int, default=100_000, help="in all")
    parser.add_argument("--generated", type=int, default=10_000, help="of them, by schemathesis")
    parser.add_argument("--seed", type=int, default=0)
    config = parser.parse_args()
    out: Path = config.out
    shutil.rmtree(out, ignore_errors=True)
    world = make_world(out / "world")
    stores = out / "stores"
    stores.mkdir()
    shutil.copytree(world.store, stores / "texts.zarr")
    (out / "canary").write_text(CANARY)
    (stores / "texts.zarr" / "link").symlink_to(out / "canary")
    (stores / "texts.zarr" / "vocabulary" / "linked").symlink_to(out)
    tokens = out / "tokens.json"
    full = new_token(tokens, "everything", ["read", "write", "teach"])
    readers = new_token(tokens, "reader", ["read"], ["other"])
    revoked = new_token(tokens, "revoked", ["read", "write", "teach"])
    revoke_token(tokens, revoked.split("_")[1])
    before = digests(stores / "texts.zarr")
    log = out / "log"
    bad: list[str] = []
    service = Service([stores, "--teacher", world.teacher, "--tokens", tokens], log)
    with service:
        by_hand(service, full, readers, revoked, bad, random.Random(config.seed))
        memory, handles = service.memory_bytes(), service.connections()
        generated(service, full, out, config.generated, config.seed, log, bad)
        done = sum(1 for _ in log.open("rb"))
        mutated(service, full, readers, revoked, config.requests - done, random.Random(config.seed), bad)
        by_hand(service, full, readers, revoked, bad, random.Random(config.seed + 1))
        until = time.monotonic() + SETTLED_S
        while service.connections() > handles and time.monotonic() < until:
            time.sleep(1)
        grown, left = service.memory_bytes() - memory, service.connections() - handles
    lines = log.read_text(errors="replace").splitlines()
    counts = Counter(match.group(1) for match in map(STATUS.match, lines) if match)
    if grown > MORE_MEMORY_BYTES:
        bad.append(f"the service's memory has grown by {grown / 1e6:.0f} MB")
    if left > 5:
        bad.append(f"{left} connections more are open than before")
    bad += [
        f"the log says: {line}"
        for line in lines
        if re.search(r" 5\d\d \d+ ms | 0 \d+ ms .*Error", line) and " 503 " not in line
    ]
    text = log.read_text(errors="replace")
    for secret in (full, readers, revoked, full.split("_")[2], SECRET_TEXT, CANARY):
        if secret in text:
            bad.append(f"the log holds a secret, {secret[:6]}...")
    for path in ("link", "vocabulary/linked"):
        (stores / "texts.zarr" / path).unlink()
    changed = {name for name, _ in before - digests(stores / "texts.zarr") if not name.startswith("index/")}
    bad += [f"{name} of the store has changed" for name in sorted(changed)]  # what was taught lies beside it
    report = verify(stores / "texts.zarr", quiet=True)
    bad += [f"{problem.file}: {problem.fault}" for problem in report.problems]
    print("\n".join(bad))
    print(f"{sum(counts.values()):,} requests: " + ", ".join(f"{n:,} of {code}" for code, n in sorted(counts.items())))
    print(f"memory {grown / 1e6:+.1f} MB, connections {left:+d}, log {len(lines):,} lines")
    print(f"{len(bad)} faults")
    raise SystemExit(bool(bad))


def digests(store: Path) -> set[tuple[str, bytes]]:
    return {(str(f.relative_to(store)), f.read_bytes()) for f in store.rglob("*") if f.is_file() and not f.is_symlink()}


def generated(service: Service, token: str, out: Path, count: int, seed: int, log: Path, bad: list[str]) -> None:
    """Have schemathesis generate requests until there were so many, from the page with the names that are there."""
    document = httpx2.get(f"{service.url}/openapi.json").json()
    names_there(document, ["texts", "nobody"])
    schema = out / "openapi.json"
    schema.write_text(json.dumps(document))
    command = [str(Path(sys.executable).with_name("st")), "run", str(schema), "--url", service.url, "--checks"]
    command += ["not_a_server_error", "--continue-on-failure", "--workers", "2", "--suppress-health-check", "all"]
    command += ["--phases", "coverage,fuzzing", "--header", f"Authorization: Bearer {token}", "--max-examples", "300"]
    while (done := sum(1 for _ in log.open("rb"))) < count:
        seed += 1
        print(f"{done:,} requests", flush=True)
        run = subprocess.run([*command, "--seed", str(seed)], capture_output=True, text=True, check=False, cwd=out)
        if run.returncode:
            bad.append(f"schemathesis: {run.stdout[-3000:]}")
            return


def names_there(node: Any, names: list[str]) -> None:
    """Let the parameter `name` be one of these, so that requests come further than to a 404."""
    if isinstance(node, dict):
        if node.get("name") == "name" and node.get("in") == "path":
            node["schema"] = {"type": "string", "enum": names}
        if node.get("name") == "path" and node.get("in") == "path":
            node["schema"] = {
                "anyOf": [{"type": "string", "enum": ["zarr.json", "vocabulary/bytes/c/0"]}, {"type": "string"}]
            }
        for child in node.values():
            names_there(child, names)
    elif isinstance(node, list):
        for child in node:
            names_there(child, names)


def by_hand(service: Service, full: str, other: str, revoked: str, bad: list[str], rng: random.Random) -> None:
    """Requests that no library would send, each with the statuses that may answer it."""
    for name, request, allowed in requests(full, other, revoked, rng):
        status, body = answer(service.port, request, patience_s=5)
        if status not in allowed:
            bad.append(f"{name}: answered {status}, expected one of {sorted(allowed)}")
        if CANARY.encode() in body:
            bad.append(f"{name}: a file outside of the store was read")


def requests(full: str, other: str, revoked: str, rng: random.Random) -> Iterator[tuple[str, bytes, set[int]]]:
    """What it is, its bytes, and the statuses that may answer it; 0 is a closed connection."""

    def plain(method: str, path: str, body: bytes = b"", token: str | None = full, **headers: str) -> bytes:
        lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close"]
        lines += [f"{key.replace('_', '-')}: {value}" for key, value in headers.items()]
        lines += [f"Authorization: Bearer {token}"] * (token is not None)
        if "Content_Length" not in headers and "Transfer_Encoding" not in headers:
            lines.append(f"Content-Length: {len(body)}")
        return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + body

    def post(body: Any, **headers: str) -> bytes:
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        return plain("POST", "/v1/stores/texts/targets", text, **headers)

    for path in (
        "/texts/../canary", "/texts/../../canary", "/texts/%2e%2e/canary", "/texts/..%2f..%2fcanary", "/texts/link",
        "/texts/vocabulary/linked/canary", "/texts//etc/passwd", "/texts/%2fetc%2fpasswd", "/texts/..\\canary",
        "/texts/%00", "/texts/shards", "/texts/shards/", "/texts/.journal-service-0", "/texts/%ff%fe",
        "/texts/shards/.partial-x/zarr.json", "/../tokens.json", "/texts/zarr.json/", "/texts/zarr.json%0a",
        "/texts/" + "a/" * 3000, "/nobody/zarr.json",
    ):  # fmt: skip
        yield f"GET {path[:60]}", plain("GET", path), {400, 404}
    for asked in ("bytes=99999999999999-", "bytes=-0", f"bytes={10**17}-{10**17 + 5}"):
        yield f"Range {asked}", plain("GET", "/texts/zarr.json", Range=asked), {416}
    for asked in (
        "bytes=--5",
        "bytes=5-2",
        "bytes=0-1,3-4",
        "bytes=a-b",
        f"bytes={'9' * 4000}-",
        "items=0-1",
        "bytes=-",
    ):
        yield f"Range {asked[:30]}", plain("GET", "/texts/zarr.json", Range=asked), {200}
    for token, status in ((None, 401), ("", 401), ("x" * 5000, 401), (revoked, 401), (other, 403), (full[:-1], 401)):
        for path in ("/v1/stores/texts", "/texts/zarr.json", "/v1/stores/texts/shards"):
            yield f"token {str(token)[:8]} {path}", plain("GET", path, token=token), {status}
    yield "another store's token asks", post({"documents": [[1, 2]]}, token=other), {403}
    yield "a reader of another store lists nothing", plain("GET", "/v1/stores", token=other), {200}
    yield "deep JSON", post(b"[" * 200_000), {400}
    yield "deep objects", post(b'{"documents":' * 50_000), {400}
    for document in ([], [1], [1, 10**9], [1, -1], [1, 1.5], [1, True], [1, None], ["1", 2], [10**400, 1], 5, "ab", {}):
        yield f"document {str(document)[:20]}", post({"documents": [document]}), {422}
    for body in (
        b"",
        b"null",
        b"5",
        b'{"documents":null}',
        b"\xff\xfe",
        b"NaN",
        b'{"documents":[[1,2]],"x":1}',
        b"{" * 9,
    ):
        yield f"body {body[:20]!r}", post(body), {400, 422}
    yield "NaN", post(b'{"documents":[[1,NaN]]}'), {400, 422}
    yield "a text in place of a fingerprint", post({"documents": [[1, 2]], "fingerprint": SECRET_TEXT}), {409}
    yield "too many documents", post({"documents": [[1, 2]] * 5000}), {413}
    yield "too many tokens", post({"documents": [[1] * 30_000] * 6}), {413}
    yield "a body of 20 MB", post(b"[" + b"1," * 10_000_000), {413, 0}
    yield "compression that is none", post(b"\x1f\x8b\x08not", Content_Encoding="gzip"), {400, 415}
    yield "compression that is unknown", post({"documents": [[1, 2]]}, Content_Encoding="zstd"), {200, 400, 415}
    yield "less than it says", post(b'{"documents":', Content_Length="9"), {400, 422}
    yield "a length below zero", post(b"{}", Content_Length="-5"), {400}
    yield "a length that is none", post(b"{}", Content_Length="ten"), {400}
    yield "two lengths", post(b"{}", Content_Length="2\r\nContent-Length: 3"), {400}
    yield "chunks that are none", post(b"zz\r\n", Transfer_Encoding="chunked"), {400}
    yield "a secret in the query", plain("GET", f"/v1/stores?search={SECRET_TEXT}"), {200}
    yield "no HTTP", bytes(rng.randrange(256) for _ in range(4000)) + b"\r\n\r\n", {400, 0}
    yield "headers of 1 MB", plain("GET", "/health", X="y" * (1 << 20)), {400, 431, 0}
    for method in ("PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "FOO"):
        yield f"{method} a file", plain(method, "/texts/zarr.json"), {400, 404, 405}


NASTY = [
    b"\0",
    b"\r\n",
    b"\xff\xfe",
    b"%00",
    b"%2e%2e/",
    b"../",
    b"-1",
    b"9" * 30,
    b"[" * 99,
    b'"',
    b"e999",
    b"NaN",
    b"{}",
]


def mutated(
    service: Service, full: str, other: str, revoked: str, count: int, rng: random.Random, bad: list[str]
) -> None:
    """Send the hand-written requests, and good ones, with some of their bytes changed."""
    written = (request for _, request, _ in requests(full, other, revoked, rng) if len(request) < 20_000)
    seeds = [request for request in written if SECRET_TEXT.encode() not in request.partition(b"\r\n")[0]]  # nor a path
    seeds += [request for request in good(full) for _ in range(5)]
    begun = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        while begun < count:
            some = [_mutate(rng.choice(seeds), rng) for _ in range(min(2_000, count - begun))]
            for request, (status, body) in zip(some, pool.map(partial(answer, service.port), some), strict=True):
                if status >= 500 and status not in (501, 503, 505, 507):
                    bad.append(f"answered {status}: {request[:300]!r}")
                if CANARY.encode() in body:
                    bad.append(f"a file outside of the store was read: {request[:300]!r}")
            begun += len(some)
            print(f"{begun:,} changed requests", flush=True)


def good(token: str) -> Iterator[bytes]:
    """Requests that are answered."""
    for path in (
        "/v1/stores",
        "/v1/stores/texts",
        "/v1/stores/texts/shards",
        "/texts/zarr.json",
        "/metrics",
        "/ready",
        "/",
    ):
        head = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
        yield f"{head}Range: bytes=0-9\r\nConnection: close\r\n\r\n".encode()
    for path in ("stats", "documents?sort=nll&where=nll>1&search=the&limit=5", "documents/0", "uploads/root", "parts"):
        yield f"GET /v1/stores/texts/{path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
    for method, path, body in (
        ("POST", "targets", '{"documents": [[5, 6, 7], [8, 9, 10, 11]], "teach": true}'),
        ("POST", "uploads/root", ""),
        ("PUT", "uploads/fidelity/zarr.json?offset=0", '{"zarr_format": 3}'),
        ("PUT", "uploads/0123456789abcdef/documents/c/0/0?offset=0", "abc"),
    ):
        head = f"{method} /v1/stores/texts/{path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
        yield f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


def _mutate(request: bytes, rng: random.Random) -> bytes:
    changed = bytearray(request)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(5):
            case 0:
                changed[at:at] = rng.choice(NASTY)
            case 1:
                del changed[at : at + rng.randrange(1, 20)]
            case 2 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 3:
                changed[at:at] = changed[at : at + rng.randrange(1, 200)] * rng.randrange(1, 4)
            case _:
                changed[at : at + 1] = bytes([rng.randrange(256)])
    return bytes(changed)


def answer(port: int, request: bytes, patience_s: float = 0.05) -> tuple[int, bytes]:
    """Status and body of a raw request; 0 where the connection was closed without one.

    Args:
        patience_s: a server that says nothing for so long may wait for more bytes, and is told that none will come.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=90) as connection:
        received = b""
        try:
            connection.sendall(request)
            if not select.select([connection], [], [], patience_s)[0]:
                connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(1 << 16):
                received += piece
                if not select.select([connection], [], [], patience_s)[0]:
                    break  # all that it says; the connection may stay open for the next request
        except (ConnectionResetError, BrokenPipeError):
            pass
    head = received.split(b" ", 2)
    return (int(head[1]) if head[0].startswith(b"HTTP/") else 0), received


if __name__ == "__main__":
    main()
