"""The HTTP contract as an OpenAPI document, and a page to read it; what it says is tested against the service."""

import html
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from logitstore import __version__
from logitstore.measures import NAMES
from logitstore.service.answers import MOST_DOCUMENT_TOKENS, MOST_DOCUMENTS, MOST_TOKENS
from logitstore.service.browse import MOST_LISTED
from logitstore.service.document_json import MOST_POSITIONS
from logitstore.service.page_files import MEDIA_TYPES
from logitstore.service.shelf import NAME
from logitstore.wire import MEDIA_TYPE

ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}


def routes() -> list[Route]:
    """GET /openapi.json and /docs. They hold nothing of any store, and need no token."""

    async def document(_: Request) -> Response:
        return JSONResponse(openapi())

    async def page(_: Request) -> Response:
        return HTMLResponse(to_html(openapi()))

    return [Route("/openapi.json", document), Route("/docs", page)]


def openapi() -> dict[str, Any]:
    """The document, OpenAPI 3.1."""
    store = _parameter("name", "path", TEXT | {"pattern": f"^{NAME.pattern}$"}, "A store's name.")
    part = _parameter("part", "path", TEXT, "root, fidelity, map-F, or a shard's name; for POST also index.")
    some_json = _json({"type": "object"})
    targets = {
        "type": "object",
        "required": ["documents"],
        "additionalProperties": False,
        "properties": {
            "documents": {
                "type": "array",
                "maxItems": MOST_DOCUMENTS,
                "description": f"At most {MOST_TOKENS:,} tokens in all.",
                "items": {
                    "type": "array",
                    "minItems": 2,
                    "maxItems": MOST_DOCUMENT_TOKENS,
                    "items": COUNT,
                },
            },
            "fingerprint": TEXT | {"description": "Of the store that is meant; another is refused with 409."},
            "teach": {"type": "boolean", "default": True, "description": "Whether the teacher is asked on a miss."},
        },
    }
    records = {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}
    paths: dict[str, Any] = {
        "/health": {"get": _operation("Whether the service runs.", some_json, open_to_all=True)},
        "/ready": {"get": _operation("Whether all stores and the teacher answer.", some_json, 503, open_to_all=True)},
        "/metrics": {"get": _operation("Counts, for Prometheus.", {"text/plain": {"schema": TEXT}})},
        "/openapi.json": {"get": _operation("This document.", some_json, open_to_all=True)},
        "/": {"get": _operation("The web page.", {"text/html": {"schema": TEXT}}, open_to_all=True)},
        "/page/{file}": {
            "parameters": [_parameter("file", "path", TEXT, "What the web page consists of.")],
            "get": _operation("A file of it.", {kind: {} for kind in MEDIA_TYPES.values()}, 404, open_to_all=True),
        },
        "/docs": {"get": _operation("The same as a page.", {"text/html": {"schema": TEXT}}, open_to_all=True)},
        "/v1/stores": {"get": _operation("The stores.", some_json)},
        "/v1/stores/{name}": {"parameters": [store], "get": _operation("One store.", some_json, 404)},
        "/v1/stores/{name}/shards": {
            "parameters": [store],
            "get": _operation("The names of its shards.", some_json, 404),
        },
        "/v1/stores/{name}/stats": {
            "parameters": [store],
            "get": _operation("Histograms over the documents that were read so far.", some_json, 400, 404),
        },
        "/v1/stores/{name}/documents": {
            "parameters": [
                store,
                _parameter("sort", "query", {"enum": list(NAMES)}, "The measure to sort by; else the store's order."),
                _parameter("descending", "query", {"type": "boolean"}, "The largest first."),
                _parameter("where", "query", {"type": "array", "items": TEXT}, "Conditions, as nll>3; all must hold."),
                _parameter("text", "query", TEXT, "What a document's text has in it, whatever its case."),
                _parameter("offset", "query", COUNT, "How many to pass over."),
                _parameter("limit", "query", COUNT | {"minimum": 1, "maximum": MOST_LISTED}, "How many to list."),
            ],
            "get": _operation("Documents by what the teacher made of them.", some_json, 400, 404),
        },
        "/v1/stores/{name}/documents/{ref}": {
            "parameters": [
                store,
                _parameter("ref", "path", TEXT, "A number from 0, or a key of 32 hex digits."),
                _parameter("temperature", "query", {"type": "number"}, "One that the store serves; else its first."),
                _parameter("start", "query", COUNT, "The first position that is wanted."),
                _parameter(
                    "positions", "query", COUNT | {"minimum": 1, "maximum": MOST_POSITIONS}, "How many are wanted."
                ),
            ],
            "get": _operation("One document: its tokens and what is kept of them.", some_json, 400, 404),
        },
        "/v1/stores/{name}/targets": {
            "parameters": [store],
            "post": _operation(
                "What the teacher says of documents. What the store lacks is computed, kept, and sent as it becomes "
                "known. The answer is frames, laid out in logitstore/wire.py; one without END was cut.",
                records,
                *(400, 404, 408, 409, 413, 415, 422, 429, 507),
                body=targets,
            ),
        },
        "/v1/stores/{name}/parts": {
            "parameters": [store],
            "get": _operation("Its parts, each with the digest of its zarr.json.", some_json, 404),
        },
        "/v1/stores/{name}/uploads/{part}": {
            "parameters": [store, part],
            "get": _operation("What has arrived of a part.", some_json, 400, 404),
            "post": _operation(
                "Check a part and show it; 422 names files to be sent again, 503 says that it is being checked.",
                some_json,
                *(400, 404, 409, 422, 507),
            ),
        },
        "/v1/stores/{name}/uploads/{part}/{file}": {
            "parameters": [
                store,
                part,
                _parameter("file", "path", TEXT, "zarr.json first, then the files that it names."),
                _parameter("offset", "query", COUNT, "How much of the file has arrived; 409 says where that is."),
            ],
            "put": _operation("Bytes of a file, from an offset on.", some_json, 400, 404, 408, 409, 413, 422, 507)
            | {"requestBody": {"required": True, "content": {"application/octet-stream": {}}}},
        },
        "/{name}": {
            "parameters": [store],
            "get": {
                "summary": "The store on the web page, for a browser.",
                "responses": {
                    "303": {"description": "There it is."},
                    "404": {"description": "Accept does not ask for HTML.", "content": _json(ERROR)},
                },
            },
        },
        "/{name}/{path}": {
            "parameters": [store, _parameter("path", "path", TEXT, "A file of the store, as FORMAT.md has it.")],
            "get": _file("A file, or with Range a part of it. The ETag is its digest."),
            "head": _file("Its size and digest."),
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "logitstore",
            "version": __version__,
            "description": "Stores of a teacher's next-token distributions, and the teacher where they have no answer.",
        },
        "paths": paths,
        "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


def _parameter(name: str, where: str, schema: dict[str, Any], description: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "in": where, "required": where == "path", "schema": schema, "description": description} | more


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _operation(
    summary: str,
    answers: dict[str, Any],
    *errors: int,
    body: dict[str, Any] | None = None,
    open_to_all: bool = False,
) -> dict[str, Any]:
    codes = errors if open_to_all else sorted({401, 403, 503, *errors})
    found: dict[str, Any] = {
        "summary": summary,
        "responses": {"200": {"description": "Done.", "content": answers}}
        | {str(code): {"description": "One line that says why.", "content": _json(ERROR)} for code in codes},
    }
    if not open_to_all:
        found["security"] = [{"token": []}, {}]
    if body is not None:
        found["requestBody"] = {"required": True, "content": _json(body)}
    return found


def _file(summary: str) -> dict[str, Any]:
    content: dict[str, Any] = {"application/octet-stream": {}, "application/json": {}}
    found = _operation(summary, content, 404, 416)
    found["responses"] |= {"206": {"description": "A part.", "content": content}, "304": {"description": "Unchanged."}}
    return found


def to_html(document: dict[str, Any]) -> str:
    """The document for people, without a script."""
    parts = [f"<h1>{html.escape(document['info']['title'])} {document['info']['version']}</h1>"]
    parts.append(f"<p>{html.escape(document['info']['description'])} <a href='openapi.json'>openapi.json</a></p>")
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if method == "parameters":
                continue
            codes = ", ".join(operation["responses"])
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(operation['summary'])} <small>{codes}</small></p>")
    body = "\n".join(parts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>logitstore: the HTTP contract</title>'
        f'<link rel="stylesheet" href="page/page.css"></head><body><main>{body}</main></body></html>'
    )
