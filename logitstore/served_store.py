"""A store behind a service, as a run reads it: what was fetched is on this machine, what is missing may be taught.

Asked in this order: what the service's teacher answered before, the shards that were fetched, those that the service
has, its teacher. A service that does not answer costs one bounded wait; from then on what lies here is all there is,
until it is tried again some minutes later. Where only its teacher gives nothing, only that is left alone. What is
damaged here is fetched again.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from logitstore.codec import Codes
from logitstore.contract import Store, Writer
from logitstore.errors import (
    CorruptStoreError,
    ServiceError,
    ServiceLostError,
    StoreError,
    StoreNotFoundError,
    StoreWriteError,
)
from logitstore.http_client import PATIENCE_S as IMPATIENCE_S
from logitstore.http_client import SILENT_S, TOKEN, RefusedError
from logitstore.http_files import HttpFiles
from logitstore.manifest import Manifest
from logitstore.mirror import Mirror
from logitstore.overlay import STORE, TAUGHT, folder_of, remove_left, used
from logitstore.recipe import DocumentRecord
from logitstore.sealed import GROUP
from logitstore.service_client import ServiceClient
from logitstore.stack import Stack
from logitstore.store import create_store, open_store
from logitstore.targets import SparseTargets
from logitstore.vocabulary import Vocabulary
from logitstore.wire import Kind
from logitstore.zarr_store import ZarrStore

PATIENCE_S = 120.0
AWAY_S, PROBED_S = 300.0, 5.0
"""A service that did not answer is left alone for so long, and then tried for so long."""

TEACHING = {413, 422, 429, 503, 507}
"""What a service answers that has the store, and no answer of its teacher."""

T = TypeVar("T")


def open_served(
    url: str, overlay: Path, most_bytes: int, say: Callable[[str], object] = lambda _: None
) -> "ServedStore":
    """Open a store behind http(s)://, or what was fetched of it while it does not answer.

    Args:
        overlay: the folder in which what is fetched is kept.
        most_bytes: so much of it, of all URLs together.
        say: takes a line of text for the user.

    Raises:
        ServiceError: it refuses; or it does not answer, and nothing was fetched.
        StoreError: what is served is no store, or another one than before.
        StoreWriteError: the overlay cannot be written.
    """
    client = ServiceClient(url, say=say)
    client.silent_s = min(client.silent_s, IMPATIENCE_S)
    try:
        folder = folder_of(overlay, client.url)
        remove_left(overlay)
        remote = HttpFiles(client, lists=True)
        try:
            facts = client.facts()
            remote = HttpFiles(client, lists=facts is not None)
            mirror = Mirror(remote, folder, most_bytes)
        except ServiceLostError as error:
            if not (folder / STORE / GROUP).exists():
                raise
            say(f"{error}; going on with what was fetched into {folder}")
            facts, mirror = None, Mirror(None, folder, most_bytes)
        client.patience_s, client.silent_s = PATIENCE_S, SILENT_S
        if facts and facts.get("teaches") is True and facts.get("may_teach") is False:
            say(f"{client.url} is taught, and the token in {TOKEN} does not allow that; ask for one with --scope teach")
        return ServedStore(client, remote, mirror, teaches=_teaches(facts), say=say)
    except BaseException:
        client.close()
        raise


class ServedStore:
    """See `contract.Store`. Open it with `open_served`."""

    def __init__(
        self,
        client: ServiceClient,
        remote: HttpFiles,
        mirror: Mirror,
        *,
        teaches: bool,
        say: Callable[[str], object],
    ) -> None:
        self.path = client.url
        self.teaches = teaches
        """Whether its teacher is asked for what is missing."""
        self.mirror = mirror
        self._client, self._remote, self._say = client, remote, say
        self._away_until = 0.0 if mirror.remote is not None else time.monotonic() + AWAY_S
        self._teaches_from = 0.0
        self._said: set[str] = set()
        self._fetched = self._reading(lambda: ZarrStore(mirror, client.url))
        self._path = mirror.folder / TAUGHT
        self._taught: Store | None = None
        with suppress(StoreNotFoundError):
            self._taught = open_store(self._path)

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    @property
    def manifest(self) -> Manifest:
        """See `contract.Store`."""
        return self._fetched.manifest

    @property
    def vocabulary(self) -> Vocabulary:
        """See `contract.Store`."""
        return self._fetched.vocabulary

    @property
    def fidelity(self) -> dict[str, Any] | None:
        """See `contract.Store`."""
        return self._reading(lambda: self._fetched.fidelity)

    def __len__(self) -> int:
        """How many documents the service's store holds, as far as is known."""
        return len(self._fetched)

    def __contains__(self, key: object) -> bool:
        """See `contract.Store`."""
        return (self._taught is not None and key in self._taught) or self._reading(lambda: key in self._fetched)

    @property
    def positions(self) -> int:
        """How many positions the service's store holds, as far as is known."""
        return self._fetched.positions

    @property
    def disk_bytes(self) -> int:
        """Bytes of what was fetched."""
        return self._fetched.disk_bytes

    @property
    def shard_count(self) -> int:
        """How many shards the service's store has, as far as is known."""
        return self._fetched.shard_count

    def plane_bytes(self) -> dict[str, int]:
        """The bytes of what was fetched, apart for each kind of content."""
        return self._fetched.plane_bytes()

    def save_fidelity(self, fidelity: dict[str, Any]) -> None:
        """See `contract.Store`; the service's to say, so this raises StoreWriteError."""
        del fidelity
        raise self._only_read()

    def writer(self, name: str) -> Writer:
        """See `contract.Store`; the service writes by itself, so this raises StoreWriteError."""
        del name
        raise self._only_read()

    def digest(self) -> str:
        """The store's fingerprint: what it holds grows while it teaches."""
        return self.manifest.fingerprint

    def get(self, token_ids: npt.ArrayLike, temperature: float | None = None, replica: int = 0) -> SparseTargets | None:
        """See `contract.Store`. What the service has damaged, its teacher is asked to compute again."""
        ids = np.asarray(token_ids)
        try:
            return self._reading(lambda: self._stack.get(ids, temperature, replica))
        except CorruptStoreError as error:
            (record,) = self.taught([ids.astype(np.int32)])
            if record is None:
                raise
            self._say_once(f"{str(error).partition(';')[0]}; the service has computed it again")
            return self.manifest.recipe.read(record.records, temperature, replica)

    def answered(self, token_ids: npt.NDArray[np.integer]) -> int:
        """See `contract.Store`."""
        return self._reading(lambda: self._stack.answered(token_ids))

    def codes(
        self, documents: Sequence[npt.NDArray[np.integer]], temperature: float | None = None, replica: int = 0
    ) -> list[Codes | None]:
        """See `contract.Store`."""
        found = self._reading(lambda: self._fetched.codes(documents, temperature, replica))
        if self._taught is not None:
            for i, (codes, document) in enumerate(zip(found, documents, strict=True)):
                if (0 if codes is None else len(codes.tail)) < self._taught.answered(document):
                    found[i] = self._taught.codes([document], temperature, replica)[0]
        return found

    def document(
        self, number: int, temperature: float | None = None, replica: int = 0
    ) -> tuple[npt.NDArray[np.int32], SparseTargets]:
        """See `contract.Store`."""
        return self._reading(lambda: self._fetched.document(number, temperature, replica))

    def token_ids(self, number: int) -> npt.NDArray[np.int32]:
        """See `contract.Store`."""
        return self._reading(lambda: self._fetched.token_ids(number))

    def record(self, number: int) -> DocumentRecord:
        """See `contract.Store`."""
        return self._reading(lambda: self._fetched.record(number))

    def refresh(self) -> None:
        """See `contract.Store`."""
        self._reading(self._fetched.refresh)

    def taught(self, documents: Sequence[npt.NDArray[np.int32]]) -> list[DocumentRecord | None]:
        """Ask the service, whose teacher computes what its store lacks; what it answers is kept here.

        Returns:
            For each document what is said of it, or of its first tokens; None where nothing is.

        Raises:
            StoreWriteError: the overlay cannot be written.
        """
        found: list[DocumentRecord | None] = [None] * len(documents)
        if not (self._is_there() and self.teaches and time.monotonic() >= self._teaches_from):
            return found
        refused = set()
        try:
            for answer in self._client.ask(documents, self.manifest.recipe, self.manifest.fingerprint):
                found[answer.document] = answer.record
                if answer.kind in (Kind.FAILED, Kind.MISSING):
                    refused.add(answer.reason)
        except ServiceError as error:
            if _is_about_teaching(error):
                self._teaches_from = time.monotonic() + AWAY_S
                self._say(f"{error}; its teacher is asked again in {_minutes(AWAY_S)}")
            else:
                self._leave(error)
        for reason in sorted(refused):
            self._say_once(f"{self.path} does not answer a document: {reason}")
        self._keep([record for record in found if record is not None])
        return found

    def _only_read(self) -> StoreWriteError:
        return StoreWriteError(f"{self.path} can only be read; type a path of your own")

    @property
    def _stack(self) -> Stack:
        if self._taught is None:
            return Stack([self._fetched])
        used(self._path)
        return Stack([self._taught, self._fetched])

    def _keep(self, records: Sequence[DocumentRecord]) -> None:
        if not records:
            return
        for last in (False, True):
            # each time: another process may have trimmed it, and a third have begun it again
            self._taught = create_store(self._path, self.manifest, self.vocabulary)
            try:
                with self._taught.writer(f"run-{uuid4().hex}") as writer:
                    writer.append([record for record in records if record.key not in writer])
                return
            except StoreWriteError:
                if last or self._path.exists():
                    raise

    def _reading(self, read: Callable[[], T]) -> T:
        """Read; where the service is needed for that and does not answer, or something is damaged here, once more."""
        self._is_there()
        trimmed = self.mirror.trimmed
        try:
            return read()
        except ServiceError as error:
            self._leave(error)
            return read()
        except CorruptStoreError as error:
            if self.mirror.remote is not None:
                try:
                    self.mirror.attach(self._remote)  # raises where it has become another store
                except ServiceError as lost:
                    self._leave(lost)
            self._mend(error)
            self._open()
            return read()
        finally:
            if self.mirror.trimmed > trimmed:
                self._say_once(
                    f"{self.mirror.folder} is over its budget, so what this run has fetched is removed and fetched "
                    "again; type --overlay-gb with more"
                )

    def _open(self) -> None:
        try:
            self._fetched = ZarrStore(self.mirror, self.path)
        except CorruptStoreError as error:
            self._mend(error)
            self._fetched = ZarrStore(self.mirror, self.path)

    def _mend(self, error: CorruptStoreError) -> None:
        gone = self.mirror.mend()
        if gone:
            fault = str(error).partition(";")[0]
            self._say(f"{fault}; removed from {self.mirror.folder}, to be fetched again: {', '.join(gone)}")

    def _is_there(self) -> bool:
        """Whether the service is asked; one that was away is tried again after some time."""
        if self.mirror.remote is None and time.monotonic() > self._away_until:
            self._client.patience_s = self._client.silent_s = PROBED_S
            try:
                facts = self._client.facts()
                self.mirror.attach(self._remote)
                self.teaches = _teaches(facts)
                self._open()
                self._say(f"{self.path} answers again")
            except (ServiceError, StoreError) as error:
                if isinstance(error, StoreError):
                    self._say_once(str(error))
                self._away()
            self._client.patience_s, self._client.silent_s = PATIENCE_S, SILENT_S
        return self.mirror.remote is not None

    def _leave(self, error: ServiceError) -> None:
        if self.mirror.remote is not None:
            self._say(f"{error}; going on with what was fetched, and asking again in {_minutes(AWAY_S)}")
            self._away()

    def _away(self) -> None:
        self.mirror.remote = None
        self._away_until = time.monotonic() + AWAY_S
        self._open()

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(line)


def _teaches(facts: dict[str, Any] | None) -> bool:
    """Whether a service's teacher may be asked; one that does not say who may lets everybody."""
    return facts is not None and facts.get("teaches") is True and facts.get("may_teach") is not False


def _is_about_teaching(error: ServiceError) -> bool:
    """Whether the service answers, and only its teacher does not."""
    cause = error if isinstance(error, RefusedError) else error.__cause__
    if isinstance(cause, RefusedError):
        return cause.by_service and cause.status in TEACHING
    return isinstance(cause, ServiceError)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes"
