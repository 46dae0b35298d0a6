"""What a service, or a plain web server, is asked about one store; `http_client` says how.

A file that was cut goes on where it was, and so do the answers to documents: each comes once.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from logitstore.entries import SHARD_NAME
from logitstore.errors import ServiceError, ServiceLostError, WireError
from logitstore.http_client import (
    AGAIN,
    CUT,
    MOST_ERROR_BYTES,
    HttpClient,
    NotThereError,
    RefusedError,
    bounded,
    one_line,
)
from logitstore.recipe import Recipe
from logitstore.wire import Answer, Kind, read_answers

BUSY_S = 1800.0
"""A service that says 429 is there, and has much to do: so long it is asked again for answers of its teacher."""
MOST_DOCUMENTS, MOST_TOKENS = 64, 1 << 15
"""Documents and their tokens that are asked for in one request; a longer document is not asked for."""
MOST_NAMED = 20
"""Stores that are listed where one was not found."""
IDENTITY = {"Accept-Encoding": "identity"}
"""Of files: what was cut can only go on where the bytes that are sent are the file's own."""


class ServiceClient(HttpClient):
    """A store's URL, and what may be asked there; see `HttpClient`."""

    @property
    def name(self) -> str:
        """The store's."""
        return self.url.rpartition("/")[2]

    @cached_property
    def api(self) -> str:
        """Below what the service says of the store."""
        return f"{self.url.rpartition('/')[0]}/v1/stores/{quote(self.name, safe='%')}"

    def facts(self) -> dict[str, Any] | None:
        """What the service says of the store; None where this is a plain web server.

        Raises:
            ServiceLostError, ServiceError: as their names say.
        """
        try:
            found = self.json("GET", self.api)
        except RefusedError as error:
            if error.by_service and error.status != 404:
                raise
            if error.by_service and not self._has_root():
                raise self._unknown(error) from error
            return None
        except WireError:
            return None  # a web server that answers everything with a page
        return found if isinstance(found, dict) and "teacher_state" in found else None

    def _unknown(self, error: RefusedError) -> RefusedError:
        """A service's 404, with the names of the stores that it has."""
        base = self.api.rpartition("/")[0]
        with suppress(ServiceError, TypeError, KeyError):
            names = [one_line(store["name"]) for store in self.json("GET", base)["stores"][:MOST_NAMED]]
            has = f"it has {', '.join(names)}" if names else "it has no store yet that you may read"
            why = f"{self.api} answers {error.status}: there is no store {self.name!r} here; {has}"
            return NotThereError(why, error.status, by_service=True)
        return error

    def _has_root(self) -> bool:
        with suppress(FileNotFoundError, WireError):
            return self.size("zarr.json") > 0
        return False

    def shards(self) -> list[str]:
        """The names of the store's shards.

        Raises:
            ServiceLostError, ServiceError: as their names say.
        """
        found = self.json("GET", f"{self.api}/shards")
        names = found.get("shards") if isinstance(found, dict) else None
        if not isinstance(names, list) or not all(
            isinstance(name, str) and SHARD_NAME.fullmatch(name) for name in names
        ):
            raise WireError(f"{self.api}/shards says what no service says")
        return names

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes start .. stop - 1 of a file of the store, as `files.Files.read`.

        Raises:
            FileNotFoundError: there is none.
            ServiceLostError, ServiceError: as their names say.
        """
        return b"".join(self.stream(name, start, stop))

    def stream(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The same a piece after the other, each once, however often the connection is cut.

        Raises:
            FileNotFoundError: there is none.
            ServiceLostError, ServiceError: as their names say.
        """
        at, waits = start, self._waits(name)
        while stop is None or at < stop:
            before = at
            asked = {"Range": f"bytes={at}-{'' if stop is None else stop - 1}"} if at or stop is not None else {}
            try:
                with self.answer("GET", self.file_url(name), headers=IDENTITY | asked, besides={416}) as response:
                    if response.status_code == 416:
                        return
                    known = at if response.status_code == 200 else 0  # a server that knows no ranges sends all of it
                    if not known and at and not response.headers.get("content-range", "").startswith(f"bytes {at}-"):
                        raise WireError(f"{name} of {self.url} is sent from another byte on than was asked for")
                    for piece in response.iter_bytes():
                        fresh = piece[known : None if stop is None else known + stop - at]
                        known = max(known - len(piece), 0)
                        at += len(fresh)
                        if fresh:
                            yield fresh
                        if stop is not None and at >= stop:
                            return
                    return
            except NotThereError:
                raise FileNotFoundError(2, "no such file", f"{self.url}/{name}") from None
            except RefusedError as error:
                if error.status not in AGAIN:
                    raise
                fault: Exception = error
            except CUT as error:
                fault = error
            if at > before:
                waits = self._waits(name)  # it goes on: patience begins anew
            waits(fault)

    def put(self, url: str, pieces: Iterator[bytes]) -> None:
        """Send a body, once. What the pieces raise goes through.

        Raises:
            ServiceLostError: no answer; the service may have taken a part of it.
            RefusedError, ServiceError: as their names say.
        """
        try:
            with self.answer("PUT", url, pieces) as response:
                for _ in bounded(response, MOST_ERROR_BYTES):
                    pass
        except CUT as error:
            raise ServiceLostError(
                f"{self.url} has broken off ({type(error).__name__}); what has arrived is kept, type the same command "
                "again"
            ) from error

    def size(self, name: str) -> int:
        """Bytes of a file of the store.

        Raises:
            FileNotFoundError, ServiceLostError, ServiceError: as for `read`.
        """

        def once() -> int:
            with self.answer("HEAD", self.file_url(name), headers=IDENTITY) as response:
                length = response.headers.get("content-length", "")
                if not length.isdecimal():
                    raise WireError(f"{name} has no length")
                return int(length)

        try:
            return self.again(once, name)
        except NotThereError:
            raise FileNotFoundError(2, "no such file", f"{self.url}/{name}") from None

    def file_url(self, name: str) -> str:
        """Where a file of the store is."""
        return f"{self.url}/{quote(name)}"

    def ask(
        self, documents: Sequence[npt.NDArray[np.integer]], recipe: Recipe, fingerprint: str, *, teach: bool = True
    ) -> Iterator[Answer]:
        """What the service says of each document, as it becomes known; asked again of those that were cut off.

        Raises:
            ServiceLostError, ServiceError: as their names say; what came before holds.
        """
        left = {}
        for number, document in enumerate(documents):
            if len(document) <= MOST_TOKENS:
                left[number] = document
            else:
                reason = f"a document of {len(document):,} tokens, and at most {MOST_TOKENS:,} are answered"
                yield Answer(number, Kind.FAILED, reason=reason)
        waits = self._waits(f"{self.api}/targets")
        busy = self._waits(f"{self.api}/targets", max(BUSY_S, self.patience_s))
        while left:
            some = _as_many_as_may(left)
            before = len(left)
            try:
                for answer in self._ask_once(some, recipe, fingerprint, teach=teach):
                    if answer.kind != Kind.FULL and left.pop(answer.document, None) is not None:
                        yield answer
                fault: Exception = ServiceLostError("the service cannot keep its answers")
            except (*CUT, WireError, RefusedError) as error:
                if isinstance(error, RefusedError) and error.status not in AGAIN:
                    raise
                fault = error
            if len(left) < before:  # it goes on: patience begins anew
                waits = self._waits(f"{self.api}/targets")
                busy = self._waits(f"{self.api}/targets", max(BUSY_S, self.patience_s))
            if any(number in left for number in some):
                (busy if isinstance(fault, RefusedError) and fault.status == 429 else waits)(fault)

    def _ask_once(
        self, documents: Mapping[int, npt.NDArray[np.integer]], recipe: Recipe, fingerprint: str, *, teach: bool
    ) -> Iterator[Answer]:
        numbers = list(documents)
        rows = [documents[number].tolist() for number in numbers]
        body = json.dumps({"documents": rows, "fingerprint": fingerprint, "teach": teach}).encode()
        with self.answer("POST", f"{self.api}/targets", body) as response:
            for answer in read_answers(response.iter_bytes(), list(documents.values()), recipe):
                yield Answer(numbers[answer.document], answer.kind, answer.record, answer.reason)


def _as_many_as_may(left: Mapping[int, npt.NDArray[np.integer]]) -> dict[int, npt.NDArray[np.integer]]:
    """The first documents, as many as one request may ask for."""
    some: dict[int, npt.NDArray[np.integer]] = {}
    for number, document in left.items():
        if some and (len(some) == MOST_DOCUMENTS or sum(map(len, some.values())) + len(document) > MOST_TOKENS):
            break
        some[number] = document
    return some
