"""Speaks HTTP to a service, or to a plain web server: the only file that does, with `httpx2`.

Asks again where that may help: a connection that fails or is cut, 429 and 5xx with the wait that the server names, each
wait twice as long as the one before and never the same for two clients. What does not answer within `patience_s` in
all is `ServiceLostError`; what is refused is told as the server tells it.
"""

import json
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import httpx2
import numpy as np
import numpy.typing as npt

from logitstore.errors import ConfigError, ServiceError, ServiceLostError, WireError, first_line
from logitstore.recipe import Recipe
from logitstore.wire import Answer, Kind, read_answers

TOKEN = "LOGITSTORE_TOKEN"
"""The environment variable that holds a client's token."""
CONNECT_S, SILENT_S = 10.0, 60.0
PATIENCE_S = 10.0
"""Of a command that somebody waits for; a training run has more."""
FIRST_WAIT_S, LAST_WAIT_S = 0.25, 15.0
AGAIN = {408, 425, 429, 500, 502, 503, 504, 507}
MOST_JSON_BYTES, MOST_ERROR_BYTES = 64 << 20, 1 << 16
MOST_DOCUMENTS, MOST_TOKENS = 64, 1 << 15
"""Documents and their tokens that are asked for in one request."""
PIECE = 1 << 16

T = TypeVar("T")


class ServiceClient:
    """A store's URL, and what may be asked there. Safe for several threads.

    Args:
        url: http(s)://HOST[:PORT]/[PATH/]NAME.
        token: by default that of the environment.
        patience_s: so long is asked again before a service counts as lost; by default PATIENCE_S.

    Raises:
        ConfigError: no such URL.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        patience_s: float | None = None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.url = url.rstrip("/")
        base, _, self.name = self.url.rpartition("/")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or base.endswith(":/") or parts.query:
            raise ConfigError(f"{url} is not the URL of a store; type one such as https://HOST:8470/NAME")
        self.api = f"{base}/v1/stores/{quote(self.name)}"
        token = os.environ.get(TOKEN, "") if token is None else token
        if not token.isascii() or not token.isprintable():
            raise ConfigError(f"{TOKEN} is no token: `logitstore token new` prints one")
        self.patience_s = PATIENCE_S if patience_s is None else patience_s
        self._sleep = sleep
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx2.Timeout(SILENT_S, connect=CONNECT_S),
            limits=httpx2.Limits(max_connections=16),
        )

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

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
            return None
        except WireError:
            return None  # a web server that answers everything with a page
        return found if isinstance(found, dict) and "teacher_state" in found else None

    def shards(self) -> list[str]:
        """The names of the store's shards.

        Raises:
            ServiceLostError, ServiceError: as their names say.
        """
        found = self.json("GET", f"{self.api}/shards")
        names = found.get("shards") if isinstance(found, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) and name.isalnum() for name in names):
            raise WireError(f"{self.api}/shards says what no service says")
        return names

    def json(self, method: str, url: str, content: bytes | None = None) -> Any:
        """A JSON answer.

        Raises:
            NotThereError: 404.
            ServiceLostError, ServiceError, WireError: as their names say.
        """

        def once() -> Any:
            with self.answer(method, url, content) as response:
                body = b"".join(bounded(response, MOST_JSON_BYTES))
            try:
                return json.loads(body)
            except (ValueError, RecursionError):
                raise WireError(f"{url} answers what is no JSON") from None

        return self.again(once, url)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes start .. stop - 1 of a file of the store, as `files.Files.read`.

        Raises:
            FileNotFoundError: there is none.
            ServiceLostError, ServiceError: as their names say.
        """
        ranged = start > 0 or stop is not None
        headers = {"Range": f"bytes={start}-{'' if stop is None else max(stop - 1, start)}"} if ranged else {}

        def once() -> bytes:
            with self.answer("GET", self.file_url(name), headers=headers, besides={416}) as response:
                if response.status_code == 416:
                    return b""
                whole = response.status_code == 200
                most = None if stop is None else stop if whole else stop - start
                data = b"".join(_first(bounded(response), most))
                return data[start:stop] if ranged and whole else data

        try:
            return self.again(once, name)
        except NotThereError:
            raise FileNotFoundError(2, "no such file", f"{self.url}/{name}") from None

    def stream(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """The bytes start .. stop - 1 of a file of the store in pieces, as they come; fewer where it ends before.

        What is cut is asked for again from there on.

        Raises:
            FileNotFoundError: there is none.
            ServiceLostError, ServiceError: as for `read`.
        """
        waits, at = self._waits(name), start
        while True:
            before = at
            try:
                headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={at}-"} if at else {})
                with self.answer("GET", self.file_url(name), headers=headers) as response:
                    begin = at if response.status_code == 206 else 0
                    if begin and not response.headers.get("content-range", "").startswith(f"bytes {at}-"):
                        raise WireError(f"{name} is sent from another byte on than was asked for")
                    for piece in response.iter_bytes():
                        wanted = piece[max(at - begin, 0) : max(stop - begin, 0)]
                        begin += len(piece)
                        at += len(wanted)
                        yield wanted
                        if at >= stop:
                            return
                    return
            except NotThereError:
                raise FileNotFoundError(2, "no such file", f"{self.url}/{name}") from None
            except (httpx2.TransportError, httpx2.DecodingError, RefusedError) as error:
                if isinstance(error, RefusedError) and error.status not in AGAIN:
                    raise
                if at > before:
                    waits = self._waits(name)  # it goes on: patience begins anew
                waits(error)

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
        except (httpx2.TransportError, httpx2.DecodingError) as error:
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
            with self.answer("HEAD", self.file_url(name)) as response:
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
        left = dict(enumerate(documents))
        waits = self._waits(f"{self.api}/targets")
        while left:
            some = _as_many_as_may(left)
            before = len(left)
            try:
                for answer in self._ask_once(some, recipe, fingerprint, teach=teach):
                    if answer.kind != Kind.FULL and left.pop(answer.document, None) is not None:
                        yield answer
                fault: Exception = ServiceLostError("the service cannot keep its answers")
            except (httpx2.TransportError, WireError, RefusedError) as error:
                if isinstance(error, RefusedError) and error.status not in AGAIN:
                    raise
                fault = error
            if len(left) < before:
                waits = self._waits(f"{self.api}/targets")  # it goes on: patience begins anew
            if any(number in left for number in some):
                waits(fault)

    def _ask_once(
        self, documents: Mapping[int, npt.NDArray[np.integer]], recipe: Recipe, fingerprint: str, *, teach: bool
    ) -> Iterator[Answer]:
        numbers = list(documents)
        rows = [documents[number].tolist() for number in numbers]
        body = json.dumps({"documents": rows, "fingerprint": fingerprint, "teach": teach}).encode()
        with self.answer("POST", f"{self.api}/targets", body) as response:
            for answer in read_answers(response.iter_bytes(PIECE), list(documents.values()), recipe):
                yield Answer(numbers[answer.document], answer.kind, answer.record, answer.reason)

    @contextmanager
    def answer(
        self,
        method: str,
        url: str,
        content: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        besides: "set[int] | frozenset[int]" = frozenset(),
    ) -> Iterator[httpx2.Response]:
        """One attempt: an answer whose body is read in the block.

        Args:
            besides: statuses that are not refusals.

        Raises:
            NotThereError, RefusedError: 404; another status that is none of success.
            httpx2.TransportError: no answer, or one that was cut.
        """
        with self._client.stream(method, url, content=content, headers=dict(headers or {})) as response:
            if not response.is_success and response.status_code not in besides:
                raise _refusal(url, response)
            yield response

    def again(self, attempt: Callable[[], T], what: str) -> T:
        """Try until it goes well, patience ends, or it is refused for good.

        Raises:
            ServiceLostError, ServiceError: as their names say.
        """
        waits = self._waits(what)
        while True:
            try:
                return attempt()
            except RefusedError as error:
                if error.status not in AGAIN:
                    raise
                waits(error)
            except (httpx2.TransportError, httpx2.DecodingError) as error:
                waits(error)

    def _waits(self, what: str) -> Callable[[Exception], None]:
        """A function that waits before the next attempt, or raises ServiceLostError when patience has ended."""
        started, attempt = time.monotonic(), 0

        def wait(error: Exception) -> None:
            nonlocal attempt
            wait_s = min(FIRST_WAIT_S * 2**attempt, LAST_WAIT_S) * (0.5 + random.random())
            if isinstance(error, RefusedError):
                wait_s = max(wait_s, error.wait_s)
            if time.monotonic() + wait_s - started > self.patience_s:
                why = str(error) if isinstance(error, ServiceError) else f"{type(error).__name__}: {first_line(error)}"
                raise ServiceLostError(
                    f"{what} of {self.url} does not answer, asked {attempt + 1} times ({why}); is the service up?"
                ) from error
            attempt += 1
            self._sleep(wait_s)

        return wait


class RefusedError(ServiceError):
    """A status that is none of success."""

    def __init__(self, message: str, status: int, wait_s: float = 0, *, by_service: bool = False) -> None:
        super().__init__(message)
        self.status, self.wait_s, self.by_service = status, wait_s, by_service


class NotThereError(RefusedError):
    """404."""


def bounded(response: httpx2.Response, most: int | None = None) -> Iterator[bytes]:
    """The pieces of a body, held against the length that it said, or against `most` bytes.

    Raises:
        WireError: it is longer.
    """
    taken = 0
    for piece in response.iter_bytes(PIECE):
        taken += len(piece)
        if most is not None and taken > most:
            raise WireError(f"an answer of more than {most:,} bytes")
        yield piece


def _first(pieces: Iterator[bytes], most: int | None) -> Iterator[bytes]:
    """Pieces of so many bytes, or some more; what follows is not read."""
    taken = 0
    for piece in pieces:
        yield piece
        taken += len(piece)
        if most is not None and taken >= most:
            return


def _refusal(url: str, response: httpx2.Response) -> RefusedError:
    by_service, why = False, response.reason_phrase or "no reason given"
    with suppress(ValueError, KeyError, TypeError, RecursionError, WireError, httpx2.TransportError):
        body = b"".join(bounded(response, MOST_ERROR_BYTES))
        by_service, why = True, " ".join(str(json.loads(body)["error"]).split())[:500]
    kind = NotThereError if response.status_code == 404 else RefusedError
    asked = response.headers.get("retry-after", "")
    wait_s = min(float(asked), LAST_WAIT_S) if asked.isdecimal() else 0.0
    status = response.status_code
    return kind(f"{url} answers {status}: {why}", status, wait_s, by_service=by_service)


def _as_many_as_may(left: Mapping[int, npt.NDArray[np.integer]]) -> dict[int, npt.NDArray[np.integer]]:
    """The first documents, as many as one request may ask for."""
    some: dict[int, npt.NDArray[np.integer]] = {}
    for number, document in left.items():
        if some and (len(some) == MOST_DOCUMENTS or sum(map(len, some.values())) + len(document) > MOST_TOKENS):
            break
        some[number] = document
    return some
