"""A teacher of a service that guesses, tells what it was asked for, and fails or waits as it is told; and who asks."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import numpy.typing as npt

from logitstore.key import document_key
from logitstore.recipe import DocumentRecord, Recipe
from logitstore.service.desk import Desk
from logitstore.service.shelf import Served
from logitstore.wire import Answer, read_answers
from tests.stores import manifest
from tests.stubs import Stub, answer

RECIPE = manifest().recipe
TokenIds = npt.NDArray[np.int32]


class Guessing(Stub):
    """See `desk.Answering`."""

    def __init__(self, weights_digest: str = "a" * 32) -> None:
        super().__init__(weights_digest)
        self.computed: list[bytes] = []
        """Keys, in the order in which they were computed."""
        self.faults: dict[bytes, BaseException] = {}
        self.begun = threading.Event()
        self.goes_on = threading.Event()
        """Cleared: it begins, and waits before it answers."""
        self.goes_on.set()

    def __call__(self) -> "Guessing":
        """Load it."""
        return self

    def records(self, documents: Sequence[TokenIds], recipe: Recipe) -> list[DocumentRecord]:
        self.begun.set()
        assert self.goes_on.wait(20)
        for document in documents:
            if document_key(document) in self.faults:
                raise self.faults[document_key(document)]
        self.computed += [document_key(document) for document in documents]
        return [answer(document, recipe) for document in documents]


def ask(url: str, documents: Sequence[TokenIds], *, store: str = "s", token: str = "", **more: Any) -> list[Answer]:
    """What a service answers, in its order; of a status that is no success, httpx2.HTTPStatusError."""
    body = {"documents": [document.tolist() for document in documents]} | more
    response = post(url, json.dumps(body).encode(), store=store, token=token)
    response.raise_for_status()
    return list(read_answers([response.content], documents, RECIPE))


def post(url: str, body: bytes, *, store: str = "s", token: str = "", **headers: str) -> httpx2.Response:
    """The answer to any body."""
    auth = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx2.post(f"{url}/v1/stores/{store}/targets", content=body, headers=auth | headers, timeout=30)


def bytes_of(record: DocumentRecord | None) -> bytes:
    assert record is not None
    return record.token_ids.tobytes() + record.records.tobytes()


def at_once(count: int, action: Callable[[int], Any]) -> list[Any]:
    """What each of so many threads gives that begin together; what one raises is raised."""
    found: list[Any] = [None] * count
    faults: list[BaseException] = []
    gate = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            gate.wait(20)
            found[number] = action(number)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if faults:
        raise faults[0]
    return found


def until(true: Callable[[], object], seconds: float = 10) -> None:
    """Wait for something to become so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not become so"
        time.sleep(0.01)


def handles() -> int:
    """How many files and sockets this process has open."""
    return len(list(Path("/dev/fd").iterdir()))


def asked(desk: Desk, served: Served, documents: Sequence[TokenIds]) -> Any:
    """The answers of a desk, to come."""
    return desk.ask(served, [(document_key(document), document) for document in documents])
