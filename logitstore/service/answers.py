"""POST /v1/stores/NAME/targets: documents' token ids in, what the teacher says of them out.

What the store has is answered at once; what it lacks is computed at the desk, kept, and sent as it becomes known, with
a sign of life in between. A shard that turns out to be damaged is put aside, and its documents are misses like others.
"""

import asyncio
import json
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from logitstore.errors import CorruptStoreError
from logitstore.key import document_key
from logitstore.quarantine import put_shards_aside
from logitstore.recipe import DocumentRecord
from logitstore.service.access import Access
from logitstore.service.desk import CannotKeepError, CannotTeachError, Desk
from logitstore.service.meters import Meters
from logitstore.service.shelf import Served, Shelf
from logitstore.wire import MEDIA_TYPE, Answer, Kind

MOST_DOCUMENTS = 256
MOST_TOKENS = 1 << 17
"""In one request."""
MOST_DOCUMENT_TOKENS = 1 << 15
SIGN_OF_LIFE_S = 10.0
MOST_AT_ONCE = 64
"""Requests whose answers are held in memory."""
FIELDS = {"documents", "fingerprint", "teach"}
_ToCome = WeakKeyDictionary[Future[DocumentRecord], asyncio.Future[DocumentRecord]]


@dataclass(frozen=True, eq=False)
class Asked:
    """A request's documents."""

    documents: list[npt.NDArray[np.int32]]
    keys: list[bytes]
    teach: bool


def routes(shelf: Shelf, desk: Desk | None, access: Access, meters: Meters) -> list[Route]:
    """The one route."""
    room = asyncio.Semaphore(MOST_AT_ONCE)
    to_come: _ToCome = WeakKeyDictionary()

    async def post(request: Request) -> Response:
        name = request.path_params["name"]
        grant = access.require(request, "read", name)
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise HTTPException(415, "the body is encoded; send JSON as it is")
        body = await request.body()  # of a slow client, who takes nobody's place meanwhile
        if room.locked():
            raise HTTPException(429, "too many ask at once; ask again later", {"Retry-After": "1"})
        await room.acquire()
        place = _Place(room)
        try:
            served = await run_in_threadpool(shelf.get, name)
            asked = await run_in_threadpool(read_request, body, served)
            refusal = _refusal(served, desk, asked, may=not access.read_only and grant.allows("teach", name))
            mends = not refusal and desk is not None and desk.state == "ready"  # whose store it is, is known then
            found = await run_in_threadpool(_look_up, served, desk, asked, mends=mends)
            missing = [i for i, record in enumerate(found) if not _is_whole(record, asked.documents[i])]
            meters.asked(name, len(found) - len(missing), len(missing))
            waited: dict[asyncio.Future[DocumentRecord], list[int]] = {}
            if missing and desk is not None and not refusal:
                documents = [(asked.keys[i], asked.documents[i]) for i in missing]
                for i, answer in zip(missing, await run_in_threadpool(desk.ask, served, documents), strict=True):
                    waited.setdefault(_once(answer, to_come), []).append(i)
        except BaseException:
            place.free()
            raise
        return _Held(place, _frames(served, found, missing, waited, refusal, place))

    return [Route("/v1/stores/{name}/targets", post, methods=["POST"])]


class _Place:
    """One of the places for answers in memory, given back once."""

    def __init__(self, room: asyncio.Semaphore) -> None:
        self._room: asyncio.Semaphore | None = room

    def free(self) -> None:
        """Give it back."""
        room, self._room = self._room, None
        if room is not None:
            room.release()


class _Held(StreamingResponse):
    """An answer that holds its place until what is known is sent, or its client has gone."""

    def __init__(self, place: _Place, frames: AsyncGenerator[bytes, None]) -> None:
        super().__init__(frames, media_type=MEDIA_TYPE)
        self._place, self._frames = place, frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._place.free()
            await self._frames.aclose()  # else what it holds stays until the next collection


def read_request(body: bytes, served: Served) -> Asked:
    """What a request asks for.

    Raises:
        HTTPException: 400, it is no JSON; 409, of another store; 413, too much at once; 422, no such documents.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(400, 'the body is no JSON; send {"documents": [[1, 2, 3]], "fingerprint": "..."}') from None
    if not (isinstance(asked, dict) and asked.keys() <= FIELDS and isinstance(asked.get("documents"), list)):
        raise HTTPException(
            422, f"the body has not the fields {', '.join(sorted(FIELDS))}, of which documents is needed"
        )
    teach, fingerprint, documents = asked.get("teach", True), asked.get("fingerprint"), asked["documents"]
    if not isinstance(teach, bool):
        raise HTTPException(422, "teach is not true or false")
    manifest = served.store.manifest
    if fingerprint is not None and fingerprint != manifest.fingerprint:
        raise HTTPException(
            409, f"{served.name} has fingerprint {manifest.fingerprint}, another was asked for; open the store again"
        )
    if len(documents) > MOST_DOCUMENTS or sum(map(_length, documents)) > MOST_TOKENS:
        raise HTTPException(413, f"at most {MOST_DOCUMENTS} documents of {MOST_TOKENS:,} tokens at once; ask for fewer")
    found = [_token_ids(document, manifest.recipe.vocab_size, i) for i, document in enumerate(documents)]
    return Asked(found, [document_key(token_ids) for token_ids in found], teach)


def _length(document: Any) -> int:
    return len(document) if isinstance(document, list) else 0


def _token_ids(document: Any, vocab_size: int, number: int) -> npt.NDArray[np.int32]:
    if not (isinstance(document, list) and 2 <= len(document) <= MOST_DOCUMENT_TOKENS):
        raise HTTPException(422, f"document {number} is no list of 2 to {MOST_DOCUMENT_TOKENS:,} token ids")
    if not all(type(i) is int and 0 <= i < vocab_size for i in document):
        raise HTTPException(422, f"document {number} holds what is no token id from 0 to {vocab_size - 1:,}")
    return np.array(document, np.int32)


def _refusal(served: Served, desk: Desk | None, asked: Asked, *, may: bool) -> str:
    """Why what is missing is not asked of the teacher; nothing where it is."""
    if desk is None or not asked.teach:
        return "the store lacks it, and nobody teaches here" if desk is None else "the store lacks it"
    if not may:
        return "the store lacks it, and this token does not allow to teach; ask for one with --scope teach"
    return "" if desk.teaches(served) else desk.refusal(served)


def _look_up(served: Served, desk: Desk | None, asked: Asked, *, mends: bool) -> list[DocumentRecord | None]:
    """What is known of each document without the teacher."""
    found = [desk.kept(served, key) if desk is not None else None for key in asked.keys]
    left = [i for i, record in enumerate(found) if record is None]
    for fresh in (False, True):  # what was finished a moment ago is looked for only where something is missing
        for i in left:
            found[i] = _record(served, asked.documents[i], fresh=fresh and i == left[0], mends=mends)
        left = [i for i in left if not _is_whole(found[i], asked.documents[i])]
        if not left:
            break
    return found


def _record(served: Served, token_ids: npt.NDArray[np.int32], *, fresh: bool, mends: bool) -> DocumentRecord | None:
    def read() -> DocumentRecord | None:
        with served.reading(fresh=fresh) as store:
            return store.answer(token_ids)

    with served.lock:
        try:
            return read()
        except CorruptStoreError:
            if not mends:
                raise
        try:  # what was open is perhaps not what is there by now
            served.reopen()
            return read()
        except CorruptStoreError:
            put_shards_aside(served.path, token_ids)
            served.reopen()
            return read()


def _is_whole(record: DocumentRecord | None, token_ids: npt.NDArray[np.int32]) -> bool:
    return record is not None and len(record.token_ids) == len(token_ids)


async def _frames(
    served: Served,
    found: list[DocumentRecord | None],
    missing: list[int],
    waited: "dict[asyncio.Future[DocumentRecord], list[int]]",
    refusal: str,
    place: _Place,
) -> AsyncGenerator[bytes, None]:
    """Answers as bytes: first what is known, then the others as they come."""
    recipe = served.store.manifest.recipe
    asked = {i for documents in waited.values() for i in documents}
    for i, record in enumerate(found):
        found[i] = None
        if record is not None and i not in asked:
            yield await run_in_threadpool(Answer(i, Kind.HIT, record).to_bytes, recipe)
    for i in missing:
        if i not in asked:
            yield Answer(i, Kind.MISSING, reason=refusal).to_bytes(recipe)
    place.free()
    while waited:
        done, _ = await asyncio.wait(waited, timeout=SIGN_OF_LIFE_S, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            yield Answer(0, Kind.WAIT).to_bytes(recipe)
        for future in done:
            for i in waited.pop(future):
                yield await run_in_threadpool(_outcome(i, future).to_bytes, recipe)
    yield Answer(0, Kind.END).to_bytes(recipe)


def _outcome(document: int, answer: "asyncio.Future[DocumentRecord]") -> Answer:
    try:
        return Answer(document, Kind.TAUGHT, answer.result())
    except CannotTeachError as error:
        return Answer(document, Kind.FAILED, reason=str(error))
    except CannotKeepError as error:
        return Answer(document, Kind.FULL, reason=str(error))


def _once(answer: "Future[DocumentRecord]", to_come: "_ToCome") -> "asyncio.Future[DocumentRecord]":
    """An answer of the desk for the event loop: the same for all who wait, of whom nobody leaves anything behind."""
    found = to_come.get(answer)
    if found is None:
        found = to_come[answer] = asyncio.wrap_future(answer)
        found.add_done_callback(lambda done: done.cancelled() or done.exception())  # though nobody waits any more
    return found
