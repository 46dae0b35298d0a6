"""What a service has, and how it is doing: health, readiness, the stores, one store."""

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from logitstore import __version__
from logitstore.errors import StoreError
from logitstore.service.access import Access
from logitstore.service.desk import Desk
from logitstore.service.meters import Meters
from logitstore.service.shelf import Shelf
from logitstore.service.tokens import Grant


def routes(shelf: Shelf, desk: Desk | None, access: Access, meters: Meters) -> list[Route]:
    """GET /health, /ready, /v1/stores, /v1/stores/NAME and /v1/stores/NAME/shards."""

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(_: Request) -> Response:
        faults = await run_in_threadpool(faults_of, shelf, desk)
        return JSONResponse({"ready": not faults, "faults": faults}, 503 if faults else 200)

    async def stores(request: Request) -> Response:
        grant = access.require(request, "read")
        names = [name for name in await run_in_threadpool(shelf.names) if grant.allows("read", name)]

        def every() -> list[dict[str, Any]]:
            return [store_facts(name, grant, shelf, desk, access, meters) for name in names]

        return JSONResponse({"stores": await run_in_threadpool(every), "version": __version__})

    async def store(request: Request) -> Response:
        name = request.path_params["name"]
        grant = access.require(request, "read", name)

        def one() -> dict[str, Any]:
            shelf.get(name)  # raises where there is none
            return store_facts(name, grant, shelf, desk, access, meters)

        return JSONResponse(await run_in_threadpool(one))

    async def shards(request: Request) -> Response:
        name = request.path_params["name"]
        access.require(request, "read", name)

        def names() -> list[str]:
            with shelf.get(name).reading(fresh=True) as store:
                return store.shard_names

        return JSONResponse({"shards": await run_in_threadpool(names)})

    return [
        Route("/health", health),
        Route("/ready", ready),
        Route("/v1/stores", stores),
        Route("/v1/stores/{name}", store),
        Route("/v1/stores/{name}/shards", shards),
    ]


def faults_of(shelf: Shelf, desk: Desk | None) -> list[str]:
    """Why the service is not ready to answer all that it is for."""
    faults = [f"the teacher is {desk.state}"] if desk is not None and desk.state != "ready" else []
    try:
        for name in shelf.names():
            with shelf.get(name).reading():
                pass
    except StoreError as error:
        faults.append(f"{type(error).__name__}: a store cannot be read")
    return faults


def store_facts(
    name: str, grant: Grant, shelf: Shelf, desk: Desk | None, access: Access, meters: Meters
) -> dict[str, Any]:
    """What a store holds and what made it, who teaches it and whether this token may ask for that, how it was asked; of
    a damaged one, its error."""
    hits, misses, history = meters.of(name)
    asked = {"name": name, "hits": hits, "misses": misses, "history": history}
    try:
        served = shelf.get(name)
        found = served.facts()
    except StoreError as error:
        return asked | {"error": " ".join(str(error).split())}
    teaches = desk is not None and not access.read_only and desk.teaches(served)
    documents, tokens = desk.waiting if desk is not None else (0, 0)
    recipe = found["recipe"]
    return asked | {
        **{key: found[key] for key in ("documents", "positions", "disk_bytes", "bytes_per_token", "teacher")},
        **{key: found[key] for key in ("tokenizer", "digest", "fingerprint", "fidelity")},
        "selection": recipe["selection"],
        "temperatures": recipe["temperatures"],
        "info": found,
        "teaches": teaches,
        "may_teach": grant.allows("teach", name),
        "writable": served.writable and not access.read_only,
        "teacher_state": "none" if desk is None else desk.state,
        "queue": {"documents": documents, "tokens": tokens, "most_tokens": desk.most_tokens if desk else 0},
    }
