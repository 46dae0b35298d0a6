"""What a request may cost, and how its outcome is told: bytes of its body, seconds of silence, one line in the log.

Stands around the whole application. The log has method, path, status, time and the token's id: never a query string,
a body or a secret.
"""

import asyncio
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BODY_BYTES = 2 << 20
"""As many tokens as may be asked for at once take half of it; the worst of this size unfolds to 50 MB."""
SILENT_S = 60.0
"""So long a client may send or take nothing."""
TRANSPORT = "logitstore.transport"
"""Where a scope has its connection, for an answer that cannot be ended as it was begun."""
SHOWN = 200
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
}


class StalledError(Exception):
    """A client that takes nothing of its answer."""


class Limits:
    """Bounds around an ASGI application.

    Args:
        is_upload: whether a path takes a file, whose size its own route bounds.
        log: takes a line of text for each request.
        count: is told method, status and seconds of each.
    """

    def __init__(
        self,
        app: ASGIApp,
        is_upload: Callable[[str], bool],
        log: Callable[[str], object],
        count: Callable[[str, int, float], object],
    ) -> None:
        self.app, self._is_upload, self._log, self._count = app, is_upload, log, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, taken, sent, whole = time.monotonic(), 0, 0, 0, False
        most = None if self._is_upload(scope["path"]) else MOST_BODY_BYTES
        state = scope.setdefault("state", {})

        async def bounded_receive() -> Message:
            nonlocal taken, whole
            if whole:
                return await receive()  # which says that the client has gone, however late
            try:
                message = await asyncio.wait_for(receive(), SILENT_S)
            except TimeoutError:
                raise HTTPException(408, f"nothing came for {SILENT_S:.0f} s; send the request again") from None
            whole = not message.get("more_body", False)
            taken += len(message.get("body", b""))
            if most is not None and taken > most:
                raise HTTPException(
                    413, f"a body is at most {MOST_BODY_BYTES:,} bytes; ask for fewer documents at once"
                )
            return message

        async def bounded_send(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            sent += len(message.get("body", b""))
            try:
                await asyncio.wait_for(send(message), SILENT_S)
            except TimeoutError:
                raise StalledError from None

        fault = ""
        try:
            await self.app(scope, bounded_receive, bounded_send)
        except StalledError:
            fault = " stalled"
            if TRANSPORT in scope:
                scope[TRANSPORT].abort()  # closing waits until the client has taken what was written
                await asyncio.sleep(0)
        except ClientDisconnect:
            fault = " gone"
        except asyncio.CancelledError:
            fault = " stopped"
            raise
        except Exception as error:  # its text may quote a document, so the log has its type alone
            fault = f" {_named(error)}"
            if not status:
                with suppress(StalledError):
                    told = {"error": f"the service failed: {type(error).__name__}; its log says more"}
                    await JSONResponse(told, 503)(scope, receive, bounded_send)
            elif TRANSPORT in scope:
                scope[TRANSPORT].close()  # so that the client sees that it was cut
        finally:
            elapsed_s = time.monotonic() - started
            self._count(scope["method"], status, elapsed_s)
            path = "".join(c if c.isprintable() else "?" for c in scope["path"])[:SHOWN]
            token = state.get("token", "-")
            self._log(f"{scope['method']} {path} {status} {1e3 * elapsed_s:.0f} ms {taken}+{sent} bytes {token}{fault}")


def _named(error: BaseException) -> str:
    """An error's type, and where it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    at = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{at}"
