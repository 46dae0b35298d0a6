"""Speaks HTTP to a service, or to a plain web server: the only file that does, with `httpx2`.

Asks again where that may help: a connection that fails or is cut, 429 and 5xx with the wait that the server names, each
wait twice as long as the one before and never the same for two clients. A file that was cut goes on where it was. What
brings nothing new within `patience_s` is `ServiceLostError`; what is refused is told as the server tells it. Everything
that a server may send is bounded.
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

from logitstore.entries import SHARD_NAME
from logitstore.errors import ConfigError, ServiceError, ServiceLostError, WireError, first_line
from logitstore.recipe import Recipe
from logitstore.wire import Answer, Kind, read_answers

TOKEN = "LOGITSTORE_TOKEN"
"""The environment variable that holds a client's token."""
CONNECT_S, SILENT_S = 10.0, 60.0
PATIENCE_S = 10.0
"""Of a command that somebody waits for; a training run has more."""
FIRST_WAIT_S, LAST_WAIT_S = 0.25, 15.0
BUSY_S = 1800.0
"""A service that says 429 is there, and has much to do: so long it is asked again for answers of its teacher."""
AGAIN = {408, 425, 429, 500, 502, 503, 504, 507}
MOST_JSON_BYTES, MOST_ERROR_BYTES = 8 << 20, 1 << 16
MOST_DOCUMENTS, MOST_TOKENS = 64, 1 << 15
"""Documents and their tokens that are asked for in one request; a longer document is not asked for."""
MOST_REASON = 500
TOLD_AFTER_S = 5.0
"""When the user is told that somebody is waited for."""
MOST_NAMED = 20
"""Stores that are listed where one was not found."""
IDENTITY = {"Accept-Encoding": "identity"}
"""Of files: what was cut can only go on where the bytes that are sent are the file's own."""

T = TypeVar("T")


class ServiceClient:
    """A store's URL, and what may be asked there. Safe for several threads.

    Args:
        url: http(s)://HOST[:PORT]/[PATH/]NAME.
        token: by default that of the environment.
        patience_s: so long is asked again before a service counts as lost; by default PATIENCE_S.
        say: takes a line of text for the user.

    Raises:
        ConfigError: no such URL.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        patience_s: float | None = None,
        sleep: Callable[[float], object] = time.sleep,
        say: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.url = url.rstrip("/")
        base, _, self.name = self.url.rpartition("/")
        if not _is_url(self.url) or base.endswith(":/"):
            raise ConfigError(f"{url} is not the URL of a store; type one such as https://HOST:8470/NAME")
        self.api = f"{base}/v1/stores/{quote(self.name, safe='%')}"
        token = os.environ.get(TOKEN, "") if token is None else token
        if not token.isascii() or not token.isprintable():
            raise ConfigError(f"{TOKEN} is no token: `logitstore token new` prints one")
        self.patience_s = PATIENCE_S if patience_s is None else patience_s
        self.silent_s = SILENT_S
        """So long an answer may stop for."""
        self._sleep, self._say = sleep, say
        self._told_until = 0.0
        try:
            self._client = httpx2.Client(
                headers={"Authorization": f"Bearer {token}"} if token else {},
                limits=httpx2.Limits(max_connections=16),
            )
        except OSError as error:  # an SSLError is one
            raise ConfigError(
                f"the certificates of SSL_CERT_FILE or SSL_CERT_DIR cannot be read ({error.strerror or error}); type "
                "SSL_CERT_FILE=cert.pem with the path of a PEM file"
            ) from error

    def close(self) -> None:
        """Close its connections."""
        client = getattr(self, "_client", None)
        if client is not None:
            client.close()

    def __del__(self) -> None:
        self.close()

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

    def _unknown(self, error: "RefusedError") -> "RefusedError":
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
            except (httpx2.TransportError, httpx2.DecodingError) as error:
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
            except (httpx2.TransportError, httpx2.DecodingError, WireError, RefusedError) as error:
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
        timeout = httpx2.Timeout(self.silent_s, connect=min(CONNECT_S, self.silent_s))
        sent = dict(headers or {})
        with self._client.stream(method, url, content=content, headers=sent, timeout=timeout) as response:
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

    def _waits(self, what: str, patience_s: float | None = None) -> Callable[[Exception], None]:
        """A function that waits before the next attempt, or raises ServiceLostError when patience has ended."""
        started, attempt = time.monotonic(), 0
        patience_s = self.patience_s if patience_s is None else patience_s

        def wait(error: Exception) -> None:
            nonlocal attempt
            if (advice := _tls_advice(error)) is not None:
                raise ServiceLostError(f"{self.url}: {first_line(error)}; {advice}") from error
            wait_s = min(FIRST_WAIT_S * 2**attempt, LAST_WAIT_S) * (0.5 + random.random())
            if isinstance(error, RefusedError):
                wait_s = max(wait_s, error.wait_s)
            why = str(error) if isinstance(error, ServiceError) else f"{type(error).__name__}: {first_line(error)}"
            waited_s = time.monotonic() + wait_s - started
            if waited_s > TOLD_AFTER_S:
                self._tell(f"waiting for {self.url} ({why})", patience_s)
            if waited_s > patience_s:
                raise ServiceLostError(
                    f"{what} of {self.url} does not answer, asked {attempt + 1} times ({why}); is the service up, "
                    "and is this its address?"
                ) from error
            attempt += 1
            self._sleep(wait_s)

        return wait

    def _tell(self, line: str, once_in_s: float) -> None:
        """Tell the user, once where many threads wait."""
        now = time.monotonic()
        if now >= self._told_until:
            self._told_until = now + once_in_s
            self._say(line)


class RefusedError(ServiceError):
    """A status that is none of success."""

    def __init__(self, message: str, status: int, wait_s: float = 0, *, by_service: bool = False) -> None:
        super().__init__(message)
        self.status, self.wait_s, self.by_service = status, wait_s, by_service


class NotThereError(RefusedError):
    """404."""


def bounded(response: httpx2.Response, most: int) -> Iterator[bytes]:
    """The pieces of a body of at most so many bytes.

    Raises:
        WireError: it is longer.
    """
    taken = 0
    for piece in response.iter_bytes():
        taken += len(piece)
        if taken > most:
            raise WireError(f"an answer of more than {most:,} bytes")
        yield piece


def _refusal(url: str, response: httpx2.Response) -> RefusedError:
    by_service, why = False, response.reason_phrase or "no reason given"
    with suppress(ValueError, KeyError, TypeError, RecursionError, WireError, httpx2.TransportError):
        body = b"".join(bounded(response, MOST_ERROR_BYTES))
        by_service, why = True, one_line(json.loads(body)["error"])
    kind = NotThereError if response.status_code == 404 else RefusedError
    asked = response.headers.get("retry-after", "")
    wait_s = min(float(asked), LAST_WAIT_S) if asked.isdecimal() else 0.0
    status = response.status_code
    if status == 401 and TOKEN not in why:
        made = (
            "" if "ask whoever" in why else "a token, which whoever runs the service makes with `logitstore token new`"
        )
        why = f"{why}; set {TOKEN} to {made or 'that'}"
    return kind(f"{url} answers {status}: {why}", status, wait_s, by_service=by_service)


def _tls_advice(error: Exception) -> str | None:
    """What to type about a fault that no waiting mends; None of another."""
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "type SSL_CERT_FILE=cert.pem with its certificate, or that of who signed it, before the command"
    if "WRONG_VERSION_NUMBER" in str(error):
        return "it does not speak TLS; type http:// in the place of https://"
    return None


def one_line(text: object) -> str:
    """What a server says, as a line that moves no cursor."""
    return "".join(c for c in " ".join(str(text).split()) if c.isprintable())[:MOST_REASON]


def _is_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        whole = parts.port is None or parts.port > 0
        httpx2.URL(url)
    except (ValueError, httpx2.InvalidURL):
        return False
    return whole and parts.scheme in ("http", "https") and bool(parts.hostname) and not (parts.query or parts.fragment)


def _as_many_as_may(left: Mapping[int, npt.NDArray[np.integer]]) -> dict[int, npt.NDArray[np.integer]]:
    """The first documents, as many as one request may ask for."""
    some: dict[int, npt.NDArray[np.integer]] = {}
    for number, document in left.items():
        if some and (len(some) == MOST_DOCUMENTS or sum(map(len, some.values())) + len(document) > MOST_TOKENS):
            break
        some[number] = document
    return some
