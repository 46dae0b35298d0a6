"""The web page: a few files of the package, sent as they are.

They hold no data; what they show they ask of the other routes. The policy lets a browser load nothing but these files
and run no script but theirs, so that no text of a document, teacher or tokenizer can become one.
"""

from hashlib import blake2b
from pathlib import Path
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

FOLDER = Path(__file__).with_name("page")
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def routes() -> list[Route]:
    """The page at /, what it is made of below /page/, and a store's address, which a browser takes to its view."""
    files = {path.name: path.read_bytes() for path in sorted(FOLDER.iterdir()) if path.suffix in MEDIA_TYPES}

    def answer(request: Request, name: str) -> Response:
        if name not in files:
            return JSONResponse({"error": f"{name[:40]!r} is no file of the page; open /"}, 404)
        tag = f'"{blake2b(files[name], digest_size=8).hexdigest()}"'
        headers = HEADERS | {"ETag": tag}
        if request.headers.get("If-None-Match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(files[name], media_type=MEDIA_TYPES[Path(name).suffix], headers=headers)

    async def index(request: Request) -> Response:
        return answer(request, "index.html")

    async def file(request: Request) -> Response:
        return answer(request, request.path_params["file"])

    async def store(request: Request) -> Response:
        if "text/html" in request.headers.get("Accept", ""):
            # relative, for who serves it below a path of another server
            return RedirectResponse(f"./#/{quote(request.path_params['name'], safe='')}", 303)
        line = (
            "a store's files lie below its name, as in /NAME/zarr.json; a browser shows it here, /v1/stores lists all"
        )
        return JSONResponse({"error": line}, 404)

    return [Route("/", index), Route("/page/{file}", file), Route("/{name}", store)]
