"""Uploads over HTTP: a client sends a part of a store file by file, and asks for it to be checked and shown.

The routes of `upload`: a body goes to disk as it comes, and what is refused is told in one line.
"""

from contextlib import ExitStack
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from logitstore.durable import cannot_write, write_whole
from logitstore.errors import ConfigError
from logitstore.files import LocalFiles
from logitstore.incoming import Incoming, WrongOffsetError
from logitstore.parts import Part, is_part_name
from logitstore.sealed import GROUP, MOST_JSON_BYTES
from logitstore.service.access import Access
from logitstore.service.shelf import Shelf, UnknownStoreError, require_name
from logitstore.service.upload import RejectedError, Upload, parts_there
from logitstore.stored_index import FOLDER as INDEX
from logitstore.zarr_store import ZarrStore

PIECE = 1 << 20


def routes(shelf: Shelf, access: Access) -> list[Route]:
    """GET /v1/stores/NAME/parts; GET, PUT and POST below /v1/stores/NAME/uploads/PART."""
    checking: set[Upload] = set()

    async def parts(request: Request) -> Response:
        name = request.path_params["name"]
        access.require(request, "read", name)

        def there() -> dict[str, str]:
            served = shelf.get(name)
            return parts_there(served.files, served.path)

        return JSONResponse({"parts": await run_in_threadpool(there)})

    async def state(request: Request) -> Response:
        upload = await _upload(request)
        return JSONResponse(await run_in_threadpool(upload.state))

    async def put(request: Request) -> Response:
        upload, file = await _upload(request), request.path_params["file"]
        offset = request.query_params.get("offset", "0")
        if not (offset.isascii() and offset.isdigit() and len(offset) < 16):
            raise HTTPException(400, f"offset is {offset!r:.40}, expected a number of bytes; send ?offset=0")
        try:
            if file == GROUP:
                await run_in_threadpool(upload.begin, await _whole(request))
                return JSONResponse({"received": int(request.state.taken)})
            part = await run_in_threadpool(upload.begun)
            if file not in part.files:
                raise HTTPException(404, f"{upload.name} has no file {file!r:.100}; its {GROUP} names them")
            return JSONResponse({"received": await _append(request, upload, part, file, int(offset))})
        except RejectedError as error:
            return _rejected(error)
        except WrongOffsetError as error:
            told = {
                "error": f"{error.received:,} bytes of {file} are here; send it from there",
                "received": error.received,
            }
            return JSONResponse(told, 409)
        except BlockingIOError:
            error_text = f"somebody else is sending {file}; ask again what has arrived"
            return JSONResponse({"error": error_text}, 409, {"Retry-After": "1"})

    async def finish(request: Request) -> Response:
        name = request.path_params["name"]
        if request.path_params["part"] == INDEX:
            access.require(request, "write", name)

            def index() -> None:
                served = shelf.get(name)
                if served.writable:
                    ZarrStore(LocalFiles(served.path), served.path).save_index()  # while others read the store
                    Incoming(served.path).tidy()

            await run_in_threadpool(index)
            return JSONResponse({"complete": True})
        upload = await _upload(request)
        if upload in checking:  # else each who asks again would hold a thread for as long as that takes
            raise HTTPException(503, f"{upload.name} is being checked; ask again", {"Retry-After": "1"})
        checking.add(upload)
        try:
            await run_in_threadpool(upload.finish)
        except RejectedError as error:
            return _rejected(error)
        finally:
            checking.remove(upload)
        return JSONResponse({"complete": True})

    async def _upload(request: Request) -> Upload:
        name, part = request.path_params["name"], request.path_params["part"]
        access.require(request, "write", name)
        if not is_part_name(part):
            raise HTTPException(404, f"there is no part {part!r:.60}; it is root, fidelity, map-F or a shard's name")
        return Upload(await run_in_threadpool(_folder, shelf, name), part)

    return [
        Route("/v1/stores/{name}/parts", parts),
        Route("/v1/stores/{name}/uploads/{part}", state, methods=["GET"]),
        Route("/v1/stores/{name}/uploads/{part}", finish, methods=["POST"]),
        Route("/v1/stores/{name}/uploads/{part}/{file:path}", put, methods=["PUT"]),
    ]


def _folder(shelf: Shelf, name: str) -> Path:
    """The folder of a store that takes uploads, or in which one of that name begins."""
    try:
        served = shelf.get(name)
    except UnknownStoreError:
        if shelf.begins_stores is None:
            raise
        require_name(name, name)
        plain = name.removesuffix(".zarr").removesuffix(".zip")
        if plain != name:
            raise ConfigError(f"stores are served without .zarr and .zip; type the URL with /{plain}") from None
        place = shelf.begins_stores / f"{name}.zarr"
        other = shelf.name_at(place)
        if other not in (None, name):  # who may write to this one may not to that
            raise ConfigError(
                f"{place.name} is the store that is served as /{other}; type its URL, or another"
            ) from None
        return place
    if not served.writable:
        raise HTTPException(403, f"{name} is a zip file, which takes nothing; serve a folder")
    return served.path


def _rejected(error: RejectedError) -> Response:
    return JSONResponse({"error": " ".join(str(error).split()), "files": error.files}, 422)


async def _whole(request: Request) -> bytes:
    """A body as long as a `zarr.json` may be."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_JSON_BYTES:
            raise HTTPException(413, f"a {GROUP} has at most {MOST_JSON_BYTES:,} bytes")
    request.state.taken = len(body)
    return bytes(body)


async def _append(request: Request, upload: Upload, part: Part, file: str, offset: int) -> int:
    """Write a body to a file that is arriving, piece by piece; how many bytes of the file are there then."""
    size = part.files[file]["bytes"]
    too_long = HTTPException(413, f"{file} has {size:,} bytes, and no more")
    announced = request.headers.get("content-length", "0")
    if not announced.isdigit() or offset + int(announced) > size:
        raise too_long
    at = offset
    with ExitStack() as stack:
        try:
            appending = upload.incoming.appending(part, file, offset)
            handle = await run_in_threadpool(stack.enter_context, appending)
            held = bytearray()
            try:
                async for chunk in request.stream():
                    held += chunk
                    if at + len(held) > size:
                        del held[size - at :]
                        raise too_long
                    if len(held) >= PIECE:
                        await run_in_threadpool(write_whole, handle, bytes(held))
                        at += len(held)
                        held.clear()
            finally:  # of a client that is gone, too: it goes on behind this
                await run_in_threadpool(write_whole, handle, bytes(held))
                at += len(held)
        except ClientDisconnect:
            raise HTTPException(400, "the client is gone") from None
        except BlockingIOError:
            raise
        except OSError as error:
            raise cannot_write(upload.store, error) from error
    return at
