"""The service as an ASGI application: which route answers what, and how errors are told.

shelf (stores) ── store_files   their files, as they are
               ├─ answers       targets by token ids ── desk (the teacher, one computation for all)
               ├─ uploads       parts of stores, shown when they are whole
               ├─ facts         what there is, and how it is doing
               ├─ browse        documents by their measures, and what is in them ── scan, document_json
               └─ meters, openapi, page_files
"""

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute

from logitstore.errors import (
    ConfigError,
    IncompatibleStoreError,
    LogitstoreError,
    StoreError,
    StoreNotFoundError,
    StoreWriteError,
)
from logitstore.service import answers, browse, facts, meters, openapi, page_files, store_files, uploads
from logitstore.service.access import Access
from logitstore.service.desk import CannotTeachError, Desk, QueueFullError
from logitstore.service.limits import Limits
from logitstore.service.shelf import Shelf

STATUS: dict[type[LogitstoreError], int] = {
    StoreNotFoundError: 404,
    ConfigError: 400,
    IncompatibleStoreError: 409,
    QueueFullError: 429,
    CannotTeachError: 503,
    StoreWriteError: 507,
    StoreError: 503,
}
"""The first that an error is one of."""


def create_app(
    shelf: Shelf, desk: Desk | None, access: Access, log: Callable[[str], object] = lambda _: None
) -> Starlette:
    """The application.

    Args:
        desk: None where nobody teaches.
        log: takes a line of text for each request.
    """
    counted = meters.Meters(desk)
    every: list[BaseRoute] = [
        *openapi.routes(),
        *meters.routes(counted, access),
        *facts.routes(shelf, desk, access, counted),
        *answers.routes(shelf, desk, access, counted),
        *uploads.routes(shelf, access),
        *browse.routes(shelf, access),
        *page_files.routes(),
        *store_files.routes(shelf, access),  # last: it takes every path
    ]
    app = Starlette(
        routes=every,
        middleware=[Middleware(Limits, is_upload=is_upload, log=log, count=counted.request)],
        exception_handlers={HTTPException: _told, LogitstoreError: _told},
    )
    app.router.redirect_slashes = False  # a file's name is what it is
    return app


def is_upload(path: str) -> bool:
    """Whether a path takes a file."""
    return path.startswith("/v1/stores/") and "/uploads/" in path


def _told(_: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), 400)
    headers = {"Retry-After": str(error.wait_s)} if isinstance(error, QueueFullError) else None
    return JSONResponse({"error": " ".join(str(error).split())}, status, headers)
