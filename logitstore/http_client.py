"""HTTP as we speak it, and the only file that does, with `httpx2`: attempts, patience, and bounded answers.

Asks again where that may help: a connection that fails or is cut, 429 and 5xx with the wait that the server names, each
wait twice as long as the one before and never the same for two clients. What brings nothing new within `patience_s` is
`ServiceLostError`; what is refused is told as the server tells it. Everything that a server may send is bounded.
"""

import ipaddress
import json
import os
import random
import time
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import proxy_bypass

import httpx2

from logitstore.errors import ConfigError, ServiceError, ServiceLostError, WireError, first_line

TOKEN = "LOGITSTORE_TOKEN"
"""The environment variable that holds a client's token."""
CONNECT_S, SILENT_S = 10.0, 60.0
PATIENCE_S = 10.0
"""Of a command that somebody waits for; a training run has more."""
FIRST_WAIT_S, LAST_WAIT_S = 0.25, 15.0
AGAIN = {408, 425, 429, 500, 502, 503, 504, 507}
CUT = (httpx2.TransportError, httpx2.DecodingError)
"""What is raised where no answer comes, or one that breaks off."""
MOST_JSON_BYTES, MOST_ERROR_BYTES = 8 << 20, 1 << 16
MOST_REASON = 500
TOLD_AFTER_S = 5.0
"""When the user is told that somebody is waited for."""

T = TypeVar("T")


class HttpClient:
    """Connections to the server of a store. Safe for several threads.

    Args:
        url: http(s)://HOST[:PORT]/[PATH/]NAME.
        token: by default that of the environment.
        patience_s: so long is asked again before a server counts as lost; by default PATIENCE_S.
        say: takes a line of text for the user.

    Raises:
        ConfigError: no such URL, or the token or the certificates are none.
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
        if not _is_of_a_store(self.url):
            raise ConfigError(f"{url} is not the URL of a store; type one such as https://HOST:8470/NAME")
        token = os.environ.get(TOKEN, "") if token is None else token
        if not token.isascii() or not token.isprintable():
            raise ConfigError(f"{TOKEN} is no token: `logitstore token new` prints one")
        self.patience_s = PATIENCE_S if patience_s is None else patience_s
        self.silent_s = SILENT_S
        """So long an answer may stop for."""
        self._sleep, self._say = sleep, say
        self._told_until = 0.0
        host = urlsplit(self.url).hostname or ""
        # httpx takes the proxies of macOS's settings, but not the list there of hosts that go without.
        direct = is_loopback(host) or proxy_bypass(host)
        try:
            self._client = httpx2.Client(
                headers={"Authorization": f"Bearer {token}"} if token else {},
                limits=httpx2.Limits(max_connections=16),
                mounts=dict.fromkeys(("http://", "https://"), None) if direct else None,
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

    @contextmanager
    def answer(
        self,
        method: str,
        url: str,
        content: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        besides: Container[int] = (),
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
            except CUT as error:
                waits(error)

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


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _is_of_a_store(url: str) -> bool:
    try:
        parts = urlsplit(url)
        whole = parts.port is None or parts.port > 0
        httpx2.URL(url)
    except (ValueError, httpx2.InvalidURL):
        return False
    named = not url.rpartition("/")[0].endswith(":/") and not (parts.query or parts.fragment)
    return named and whole and parts.scheme in ("http", "https") and bool(parts.hostname)
