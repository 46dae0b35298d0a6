"""Connections as uvicorn serves them here: HTTP/1.1 alone, and one that sends no request is closed after some seconds.

uvicorn bounds how long a connection may be idle after an answer, but neither before its first request nor in the midst
of a request's headers; so a thousand silent clients would shut out all others. What `limits` bounds is the rest.
"""

import asyncio
from typing import Any, cast

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from logitstore.service import limits


class Connection(H11Protocol):
    """One connection; requests find it in their scope."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request."""
        super().connection_made(transport)
        self._answer: Any = self.app
        self.app = cast(Any, self._answered)
        self._answering = 0
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._timer.cancel()
        super().connection_lost(exc)

    async def _answered(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._timer.cancel()
        self._answering += 1
        scope[limits.TRANSPORT] = self.transport
        try:
            await self._answer(scope, receive, send)
        finally:
            self._answering -= 1
            if not self._answering and not self.transport.is_closing():
                self._wait()

    def _wait(self) -> None:
        self._timer = self.loop.call_later(limits.SILENT_S, self.transport.abort)


UVICORN: dict[str, Any] = {
    "http": Connection,
    "ws": "none",
    "lifespan": "off",
    "log_level": "critical",  # `limits` tells of faults, in a line and without what was asked
    "access_log": False,
    "server_header": False,
    "proxy_headers": False,
}
"""What the service asks of uvicorn, wherever it listens."""
