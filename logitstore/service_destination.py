"""A store behind a service that a store is moved to: the uploads of `service/uploads.py`, from the client's side.

The service holds every byte and document against what it should be before readers see a part; nothing here is needed
for that. A file goes on where the service says that it has stopped.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from logitstore.errors import CorruptStoreError, ServiceLostError, StoreWriteError, WireError
from logitstore.http_client import RefusedError
from logitstore.http_files import HttpFiles
from logitstore.moved import Pieces, Source
from logitstore.parts import ROOT, Part, is_part_name
from logitstore.sealed import GROUP, read_group
from logitstore.service_client import ServiceClient
from logitstore.stored_index import FOLDER as INDEX

T = TypeVar("T")

BUSY_S, MOST_BUSY = 1.0, 60
"""Between two looks at a file that somebody else is sending, and how often with nothing new."""
MOVED_ON = {404, 408, 409, 429, 500, 502, 503, 504}
"""The file stopped elsewhere, somebody else is sending it or has just finished the part, or the service is busy."""
CHECKED = 30
"""So often a service that answers is asked again whether it has checked a large part by now."""


class ServiceDestination:
    """See `moved.Destination`. What the service refuses is told as it tells it."""

    def __init__(self, client: ServiceClient, sleep: Callable[[float], object] = time.sleep) -> None:
        self._client, self._sleep = client, sleep
        self._begun: set[str] = set()

    @property
    def where(self) -> str:
        """See `moved.Destination`."""
        return self._client.url

    def root(self) -> bytes | None:
        """See `moved.Destination`.

        Raises:
            StoreWriteError: a web server that is no service.
        """
        try:
            there = self._state(ROOT)["complete"]
        except (RefusedError, WireError) as error:
            if isinstance(error, RefusedError) and error.by_service:
                raise
            raise StoreWriteError(
                f"{self.where} is a plain web server, which takes no files; type the URL of a service, or s3://..."
            ) from error
        return read_group(HttpFiles(self._client, lists=True)) if there else None

    def digests(self, names: list[str]) -> dict[str, str]:
        """See `moved.Destination`: all at once."""
        there = service_parts(self._client) if self._state(ROOT)["complete"] else {}
        return {name: there[name] for name in names if name in there}

    def require_room(self, size_bytes: int) -> None:
        """See `moved.Destination`: the service looks when a part begins."""

    def received(self, part: Part) -> dict[str, int]:
        """See `moved.Destination`."""
        state = self._state(part.name)
        if state["complete"]:
            return {file: entry["bytes"] for file, entry in part.files.items()}
        if state["digest"] != part.digest:
            return {}
        sizes = state["received"]
        return {f: min(sizes[f], entry["bytes"]) for f, entry in part.files.items() if f in sizes}

    def receive(self, part: Part, file: str, offset: int, pieces: Pieces, path: Path | None) -> None:
        """See `moved.Destination`."""
        del path
        size, idle = part.files[file]["bytes"], 0
        while True:
            try:
                self._begin(part)
                self._client.put(f"{self._url(part.name)}/{quote(file)}?offset={offset}", pieces(offset))
                return
            except (RefusedError, ServiceLostError) as error:
                if isinstance(error, RefusedError) and error.status not in MOVED_ON:
                    raise
                self._begun.discard(part.name)
                before, offset = offset, self.received(part).get(file, 0)
                if offset == size:
                    return
                idle = idle + 1 if offset == before else 0
                if idle == MOST_BUSY:
                    raise
                if idle:
                    self._sleep(BUSY_S)

    def publish(self, part: Part) -> list[str]:
        """See `moved.Destination`."""
        try:
            self._begin(part)
            self._patiently(lambda: self._client.json("POST", self._url(part.name)))
        except RefusedError as error:
            if error.status != 422:
                raise
            sizes = self.received(part)
            missing = [file for file, entry in part.files.items() if sizes.get(file, 0) < entry["bytes"]]
            if not missing or len(missing) == len(part.files):
                raise CorruptStoreError(str(error)) from error
            return missing
        return []

    def finish(self, source: Source) -> str:
        """See `moved.Destination`: the service writes its index."""
        del source
        self._patiently(lambda: self._client.json("POST", self._url(INDEX)))
        return ""

    def _begin(self, part: Part) -> None:
        if part.name in self._begun:
            return
        state = self._state(part.name)
        if not state["complete"] and state["digest"] != part.digest:
            self._client.again(
                lambda: self._client.put(f"{self._url(part.name)}/{GROUP}?offset=0", iter([part.group])), part.name
            )
        self._begun.add(part.name)

    def _patiently(self, ask: Callable[[], T]) -> T:
        """Ask again while the service answers other questions: it may be at work on this one."""
        for _ in range(CHECKED):
            try:
                return ask()
            except ServiceLostError:
                self._state(ROOT)
        return ask()

    def _state(self, name: str) -> dict[str, Any]:
        found = self._client.json("GET", self._url(name))
        match found:
            case {"complete": bool(), "digest": str() | None, "received": dict(sizes)}:
                if all(type(size) is int and size >= 0 for size in sizes.values()):
                    return dict(found)
        raise WireError(f"{self._url(name)} says what no service says")

    def _url(self, name: str) -> str:
        return f"{self._client.api}/uploads/{name}"


def service_parts(client: ServiceClient) -> dict[str, str]:
    """The parts of a store behind a service, each with the digest of its `zarr.json`.

    Raises:
        ServiceLostError, ServiceError: as their names say.
    """
    found = client.json("GET", f"{client.api}/parts")
    match found:
        case {"parts": dict(parts)}:
            if all(is_part_name(name) and isinstance(digest, str) for name, digest in parts.items()):
                return dict(parts)
    raise WireError(f"{client.api}/parts says what no service says")
