"""`logitstore serve`: stores, and perhaps their teacher, behind HTTP until it is stopped."""

import re
import resource
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import strftime

import uvicorn

from logitstore.errors import ConfigError, StoreError
from logitstore.files import LocalFiles
from logitstore.http_client import is_loopback
from logitstore.journal import commit_leftovers
from logitstore.service.access import Access
from logitstore.service.app import create_app
from logitstore.service.connections import UVICORN
from logitstore.service.desk import Answering, Desk
from logitstore.service.keeping import WRITERS
from logitstore.service.shelf import Served, Shelf
from logitstore.service.tokens import TokenFile
from logitstore.zarr_store import ZarrStore

MOST_CONNECTIONS = 1000
MOST_FILES = 8192
STOPPED_S = 10
"""So long, when it is stopped, for requests that are being answered."""
KEEP_ALIVE_S = 30
EVERYWHERE = ("0.0.0.0", "::", "")
"""Hosts that stand for every address of a machine."""


@dataclass(frozen=True)
class ServeConfig:
    """What `logitstore serve` takes."""

    places: tuple[Path, ...]
    """Stores, and folders of stores."""
    teacher: str | None = None
    adapter_path: str | None = None
    host: str = "127.0.0.1"
    port: int = 8470
    tokens: Path | None = None
    """A file that `logitstore token new` writes. None: who reaches the port may do everything."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    read_only: bool = False
    insecure: bool = False
    """Listen to more than this machine without tokens."""
    queue_tokens: int = 1 << 18
    """So many tokens may wait for the teacher; beyond that, requests are answered 429."""
    quiet: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything.

        Raises:
            ConfigError: naming the flag.
        """
        if not self.places:
            raise ConfigError("there is nothing to serve; type `logitstore serve STORE`, or a folder of stores")
        if not is_loopback(self.host) and self.tokens is None and not self.insecure:
            raise ConfigError(
                f"host {self.host} is reached from other machines, and without --tokens anybody there may read, upload "
                "and ask the teacher; type --tokens FILE (`logitstore token new` writes one), or --insecure"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("a certificate needs its key; type both --tls-cert and --tls-key")
        for path in (self.tls_cert, self.tls_key):
            if path is not None and not path.is_file():
                raise ConfigError(f"there is no file {path}; type --tls-cert and --tls-key with PEM files")
        if self.read_only and self.teacher is not None:
            raise ConfigError("--read-only writes nothing, and a teacher's answers are kept; leave one of the two out")
        if self.adapter_path is not None and self.teacher is None:
            raise ConfigError("--adapter-path is the teacher's; type --teacher T with it")
        if self.queue_tokens < 1:
            raise ConfigError(f"queue-tokens is {self.queue_tokens}, expected at least 1; type --queue-tokens 262144")


def require_model(source: str, adapter_path: str | None) -> None:
    """Check what the paths of a teacher say before it is loaded, which another thread does later.

    Raises:
        ConfigError: nothing is there, and it is no hub id either.
    """
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and not source.endswith(".gguf")
    if not (hub_id or Path(source).expanduser().exists()):
        raise ConfigError(f"there is nothing at {source}; type --teacher with a model folder, a .gguf file or a hub id")
    if adapter_path is not None and not Path(adapter_path).expanduser().is_dir():
        raise ConfigError(f"there is no folder {adapter_path}; type --adapter-path with that of a LoRA adapter")


def serve(config: ServeConfig, say: Callable[[str], object], log: Callable[[str], object]) -> None:
    """Serve until Ctrl-C or SIGTERM; what was taught is in the stores then.

    Args:
        say: takes a line of text for whoever started it.
        log: takes a line for each request.

    Raises:
        ConfigError: stores that cannot be served, a port that is taken.
        StoreError: a store that cannot be opened.
    """
    access = Access(None if config.tokens is None else TokenFile(config.tokens), read_only=config.read_only)
    shelf = Shelf(config.places)
    if not config.read_only:
        take_over(shelf)

    def stamped(tell: Callable[[str], object]) -> Callable[[str], object]:
        return lambda line: tell(f"{strftime('%Y-%m-%dT%H:%M:%S%z')} {line}")

    desk = None
    if config.teacher is not None:
        require_model(config.teacher, config.adapter_path)
        load = _loader(config.teacher, config.adapter_path)
        desk = Desk(load, config.queue_tokens, stamped(say), lambda: readable(shelf))
    try:
        server = uvicorn.Server(
            uvicorn.Config(
                create_app(shelf, desk, access, stamped(log)),
                host=config.host,
                port=config.port,
                ssl_certfile=config.tls_cert,
                ssl_keyfile=config.tls_key,
                limit_concurrency=MOST_CONNECTIONS,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=STOPPED_S,
                **UVICORN,
            )
        )
        server.config.load()
    except OSError as error:  # an SSLError is one
        raise ConfigError(
            f"{config.tls_cert} and {config.tls_key} cannot be used ({error.strerror or error}); type --tls-cert and "
            "--tls-key with a certificate and its key, PEM"
        ) from error
    try:
        sockets = [_bind(config)]
    except OSError as error:
        raise ConfigError(
            f"{config.host}:{config.port} cannot be listened to ({error.strerror}); type another --port, or --host"
        ) from error
    allow_files()
    scheme = "http" if config.tls_cert is None else "https"
    port = sockets[0].getsockname()[1]
    place = f"{scheme}://{reached_at(config.host)}:{port}"
    for name in shelf.names():
        try:
            say(f"{shelf.get(name).path} is {place}/{name}")
        except StoreError as error:
            say(f"{name} is not served: {error}")
    if not shelf.names():
        where = shelf.begins_stores
        say(f"no stores in {where} yet; build into it, or `logitstore push STORE {place}/NAME`")
    if config.tls_cert is None and config.tokens is not None and not is_loopback(config.host):
        say("tokens travel in clear without --tls-cert and --tls-key, or a proxy in front that has them")
    if desk is not None:
        say(f"loading teacher {config.teacher}")
        desk.start()
    say(f"listening on {place}; Ctrl-C stops it")
    try:
        with suppress(KeyboardInterrupt):  # which uvicorn raises again when it has stopped
            server.run(sockets)
    finally:
        if desk is not None:
            desk.stop()


def reached_at(host: str) -> str:
    """What stands for a host in a URL: this machine's name for all of its addresses, brackets around IPv6."""
    if host in EVERYWHERE:
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def allow_files() -> None:
    """Take as many open files as the system gives: each connection is one, and shells give 256 or 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(MOST_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # a system that gives fewer than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def take_over(shelf: Shelf) -> None:
    """Show readers what a service that was killed had kept."""
    for served in readable(shelf):
        with suppress(StoreError):
            store = ZarrStore(LocalFiles(served.path), served.path)
            for number in range(WRITERS if served.writable else 0):
                commit_leftovers(store, f"service-{number}")


def readable(shelf: Shelf) -> list[Served]:
    """The stores that can be opened; a damaged one is told when it is asked for."""
    found = []
    for name in shelf.names():
        with suppress(StoreError):
            found.append(shelf.get(name))
    return found


def _loader(source: str, adapter_path: str | None) -> Callable[[], Answering]:
    def load() -> Answering:
        from logitstore.teacher import Teacher

        return Teacher(source, adapter_path, quiet=True)

    return load


def _bind(config: ServeConfig) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address, family=family, backlog=1024)
