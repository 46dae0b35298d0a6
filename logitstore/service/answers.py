"""POST /v1/stores/NAME/targets: documents' token ids in, what the teacher says of them out.

What the store has is answered at once; what it lacks is computed at the desk, kept, and sent as it becomes known, with
a sign of life in between. A shard that turns out to be damaged is put aside, and its documents are misses like others.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

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
from logitstore.recipe import DocumentRecord
from logitstore.repair import put_shard_aside
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


@dataclass(frozen=True, eq=False)
class Asked:
    """A request's documents."""

    documents: list[npt.NDArray[np.int32]]
    keys: list[bytes]
    teach: bool


def routes(shelf: Shelf, desk: Desk | None, access: Access, meters: Meters) -> list[Route]:
    """The one route."""
    room = asyncio.Semaphore(MOST_AT_ONCE)

    async def post(request: Request) -> Response:
        name = request.path_params["name"]
        grant = access.require(request, "read", name)
        if room.locked():
            raise HTTPException(429, "too many ask at once; ask again later", {"Retry-After": "1"})
        await room.acquire()
        try:
            served = await run_in_threadpool(shelf.get, name)
            asked = await run_in_threadpool(read_request, await request.body(), served)
            teaches = asked.teach and desk is not None and not access.read_only
            found = await run_in_threadpool(_look_up, served, desk, asked, mends=not access.read_only)
            missing = [i for i, record in enumerate(found) if not _is_whole(record, asked.documents[i])]
            meters.asked(name, len(found) - len(missing), len(missing))
            refusal = "the store lacks it, and nobody teaches here"
            waited: dict[int, Future[DocumentRecord]] = {}
            if missing and teaches and desk is not None:
                if not grant.allows("teach", name):
                    refusal = "the store lacks it, and this token does not allow to teach"
                elif not desk.teaches(served):
                    refusal = desk.refusal(served)
                else:
                    answers = await run_in_threadpool(
                        desk.ask, served, [(asked.keys[i], asked.documents[i]) for i in missing]
                    )
                    waited = dict(zip(missing, answers, strict=True))
        except BaseException:
            room.release()
            raise
        return _Held(room, _frames(served, found, missing, waited, refusal))

    return [Route("/v1/stores/{name}/targets", post, methods=["POST"])]


class _Held(StreamingResponse):
    """An answer that holds one of the places in `room` until it is sent, or its client has gone."""

    def __init__(self, room: asyncio.Semaphore, frames: AsyncIterator[bytes]) -> None:
        super().__init__(frames, media_type=MEDIA_TYPE)
        self._room = room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._room.release()


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
    with served.reading(fresh=fresh) as store:
        try:
            return store.answer(token_ids)
        except CorruptStoreError:
            place = store.catalog.locate(token_ids) if mends and served.writable else None
            if place is None:
                raise
            put_shard_aside(served.path, place[0].name)
            served.reopen()
            return served.store.answer(token_ids)


def _is_whole(record: DocumentRecord | None, token_ids: npt.NDArray[np.int32]) -> bool:
    return record is not None and len(record.token_ids) == len(token_ids)


async def _frames(
    served: Served,
    found: list[DocumentRecord | None],
    missing: list[int],
    waited: "dict[int, Future[DocumentRecord]]",
    refusal: str,
) -> AsyncIterator[bytes]:
    """Answers as bytes: first what is known, then the others as they come."""
    recipe = served.store.manifest.recipe
    for i, record in enumerate(found):
        if record is not None and i not in waited:
            found[i] = None  # as soon as it is sent
            yield await run_in_threadpool(Answer(i, Kind.HIT, record).to_bytes, recipe)
    for i in missing:
        if i not in waited:
            yield Answer(i, Kind.MISSING, reason=refusal).to_bytes(recipe)
    left: dict[asyncio.Future[DocumentRecord], int] = {
        asyncio.wrap_future(_shared(answer)): i for i, answer in waited.items()
    }
    while left:
        done, _ = await asyncio.wait(left, timeout=SIGN_OF_LIFE_S, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            yield Answer(0, Kind.WAIT).to_bytes(recipe)
        for future in done:
            answer = _outcome(left.pop(future), future)
            yield await run_in_threadpool(answer.to_bytes, recipe)
    yield Answer(0, Kind.END).to_bytes(recipe)


def _outcome(document: int, answer: "asyncio.Future[DocumentRecord]") -> Answer:
    try:
        return Answer(document, Kind.TAUGHT, answer.result())
    except CannotTeachError as error:
        return Answer(document, Kind.FAILED, reason=str(error))
    except CannotKeepError as error:
        return Answer(document, Kind.FULL, reason=str(error))


def _shared(answer: "Future[DocumentRecord]") -> "Future[DocumentRecord]":
    """A future of one's own for an answer that others wait for too: whoever goes away cancels only this one."""
    own: Future[DocumentRecord] = Future()

    def tell(done: "Future[DocumentRecord]") -> None:
        if not own.set_running_or_notify_cancel():
            return
        error = done.exception()
        if error is None:
            own.set_result(done.result())
        else:
            own.set_exception(error)

    answer.add_done_callback(tell)
    return own
