"""A real service on loopback, in a thread of the test's own process."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from logitstore.service.access import Access
from logitstore.service.app import create_app
from logitstore.service.connections import UVICORN
from logitstore.service.desk import Answering, Desk
from logitstore.service.shelf import Shelf
from logitstore.service.tokens import TokenFile


@contextmanager
def serving(
    *places: Path,
    teacher: Callable[[], Answering] | None = None,
    tokens: Path | None = None,
    read_only: bool = False,
    queue_tokens: int = 1 << 18,
    log: Callable[[str], object] = lambda _: None,
    desks: list[Desk] | None = None,
) -> Iterator[str]:
    """Its URL.

    Args:
        desks: takes its desk.
    """
    desk = None if teacher is None else Desk(teacher, queue_tokens, log)
    if desks is not None and desk is not None:
        desks.append(desk)
    access = Access(None if tokens is None else TokenFile(tokens), read_only=read_only)
    app = create_app(Shelf(places), desk, access, log)
    with running(app) as url:
        if desk is not None:
            desk.start()
        try:
            yield url
        finally:
            if desk is not None:
                desk.stop()


@contextmanager
def running(app: object) -> Iterator[str]:
    """Any ASGI application on a port of its own."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, timeout_graceful_shutdown=2, **UVICORN)  # type: ignore[arg-type]
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
