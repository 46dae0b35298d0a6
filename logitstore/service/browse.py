"""Looking at stores over HTTP: a store's histograms, its documents by their measures, and one document.

    GET /v1/stores/NAME/stats                   what `logitstore stats --json` says, of the documents read so far
    GET /v1/stores/NAME/documents               ?sort=nll&descending=true&where=nll>3&text=...&offset=0&limit=50
    GET /v1/stores/NAME/documents/REF           ?temperature=2&start=0&positions=4096; REF a number from 0, or a key

`scan` says what "scanned" of "of" documents means. Stores are read on threads, never on the event loop, and under their
locks a document at a time.
"""

import difflib
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict
from threading import Lock
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from logitstore.condition import Condition
from logitstore.errors import ConfigError
from logitstore.key import document_key
from logitstore.measures import require_known, require_name, unknown
from logitstore.query import found
from logitstore.service.access import Access
from logitstore.service.document_json import MOST_POSITIONS, document_json
from logitstore.service.scan import Scan
from logitstore.service.shelf import Served, Shelf
from logitstore.stats_report import to_json

MOST_SCANS = 8
"""Stores of which measures and texts are kept, the last used ones."""
MOST_LISTED = 200
"""Documents of one answer."""
MOST_ASKED = 1000
"""Characters of a text to search for, and of all conditions together."""


def routes(shelf: Shelf, access: Access) -> list[Route]:
    """What is answered here, of the stores of a shelf."""
    scans: OrderedDict[str, Scan] = OrderedDict()
    using = Lock()

    def scan_of(served: Served) -> Scan:
        with using:
            scan = scans.pop(served.name, None)
            if scan is None or scan.served is not served:  # deleted, and another put in its place
                scan = Scan(served)
            scans[served.name] = scan
            while len(scans) > MOST_SCANS:
                scans.popitem(last=False)
            return scan

    def stats(served: Served, request: Request) -> dict[str, Any]:
        _require_names(request.query_params, ())
        scan = scan_of(served)
        progress = scan.read_on()
        return to_json(scan.stats()) | asdict(progress)

    def documents(served: Served, request: Request) -> dict[str, Any]:
        return _documents(served, scan_of(served), request.query_params)

    def document(served: Served, request: Request) -> dict[str, Any]:
        return _document(served, request.path_params["ref"], request.query_params)

    def answering(answer: Callable[[Served, Request], dict[str, Any]]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            name = request.path_params["name"]
            access.require(request, "read", name)
            return await run_in_threadpool(lambda: JSONResponse(answer(shelf.get(name), request)))

        return endpoint

    return [
        Route("/v1/stores/{name}/stats", answering(stats)),
        Route("/v1/stores/{name}/documents", answering(documents)),
        Route("/v1/stores/{name}/documents/{ref}", answering(document)),
    ]


def _documents(served: Served, scan: Scan, params: QueryParams) -> dict[str, Any]:
    """A list of documents.

    Raises:
        ConfigError: a parameter that is none, or out of range.
        CorruptStoreError: the bytes are not those that were written.
    """
    _require_names(params, ("sort", "descending", "where", "text", "offset", "limit"))
    sort, text, where = params.get("sort") or None, params.get("text", ""), params.getlist("where")
    if len(text) > MOST_ASKED or sum(map(len, where)) > MOST_ASKED:
        raise ConfigError(f"text or where has more than {MOST_ASKED:,} characters; ask for less")
    conditions = [Condition.parse(one, "where") for one in where]
    if sort is not None:
        require_name(sort, f"sort={sort}")
    descending = _flag(params, "descending")
    offset, limit = _whole(params, "offset", 0, 0), _whole(params, "limit", 50, 1, MOST_LISTED)
    with served.reading() as store:
        manifest, documents = store.manifest, len(store)
    require_known(manifest, [c.name for c in conditions] + ([sort] if sort else []), served.name)
    searched = None
    if sort or conditions or text:
        progress = scan.read_on()
        rows = scan.rows(conditions, text, sort, descending)
        matching, numbers = len(rows.numbers), rows.numbers[offset : offset + limit].tolist()
        searched = rows.searched if text else None
    else:  # every document is known by its number
        progress, matching = scan.progress(), documents
        order = range(documents - 1, -1, -1) if descending else range(documents)
        numbers = list(order[offset : offset + limit])
    listed = []
    for number in numbers:
        with served.reading() as store:
            listed.append(found(store, number).to_json())
    return {
        "documents": listed,
        "offset": offset,
        "matching": matching,
        "searched": searched,
        "unknown": unknown(manifest),
        **asdict(progress),
    }


def _document(served: Served, ref: str, params: QueryParams) -> dict[str, Any]:
    """One document.

    Raises:
        HTTPException: 404, the store does not hold it.
        ConfigError: a parameter that is none, or a temperature that the store does not serve.
        CorruptStoreError: the bytes are not those that were written.
    """
    _require_names(params, ("temperature", "start", "positions"))
    temperature = _number(params, "temperature")
    count = _whole(params, "positions", MOST_POSITIONS, 1, MOST_POSITIONS)
    with served.reading() as store:
        documents, manifest, vocabulary = len(store), store.manifest, store.vocabulary
        if re.fullmatch(r"[0-9a-f]{32}", ref):
            number = store.number_of(bytes.fromhex(ref))
        else:
            number = int(ref) if re.fullmatch(r"[0-9]{1,15}", ref) else None
        if number is None or number >= documents:
            raise HTTPException(
                404,
                f"document {ref[:40]!r} is not in {served.name}, which holds {documents:,}; "
                "give its key of 32 hex digits, or its number from 0",
            )
        token_ids, targets = store.document(number, temperature)
    start = _whole(params, "start", 0, 0, len(targets) - 1)
    recipe = manifest.recipe
    return {
        "store": served.name,
        "document": number,
        "documents": documents,
        "key": document_key(token_ids).hex(),
        "selection": str(recipe.selection),
        "temperature": recipe.temperatures[0] if temperature is None else temperature,
        "temperatures": list(recipe.temperatures),
        **document_json(token_ids, targets, vocabulary, manifest, start, count),
    }


def _require_names(params: Mapping[str, str], known: tuple[str, ...]) -> None:
    for name in params:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, cutoff=0)
            raise ConfigError(f"{name[:40]!r} is no parameter here" + (f"; did you mean {near[0]}?" if near else ""))


def _flag(params: Mapping[str, str], name: str) -> bool:
    value = params.get(name, "false")
    if value not in ("true", "false"):
        raise ConfigError(f"{name} is {value[:40]!r}, expected true or false")
    return value == "true"


def _whole(params: Mapping[str, str], name: str, default: int, least: int, most: int = 10**12) -> int:
    text = params.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,13}", text) or not least <= int(text) <= most:
        raise ConfigError(f"{name} is {text[:40]!r}, expected a whole number from {least} to {most:,}")
    return int(text)


def _number(params: Mapping[str, str], name: str) -> float | None:
    text = params.get(name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{name} is {text[:40]!r}, expected a number")
    return value
