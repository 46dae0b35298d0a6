"""Move a store: the parts that the destination lacks, by digest, several files at once, each going on where it stopped.

One loop for every pair of places. A `Source` gives bytes, a `Destination` takes them and shows a part when it has all
of it; neither is believed. What arrives is what the source's sealed `zarr.json` files say, or an error.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b

from tqdm import tqdm

from logitstore.entries import read_root
from logitstore.errors import (
    CorruptStoreError,
    IncompatibleStoreError,
    ServiceLostError,
    StoreFormatError,
    StoreLostError,
)
from logitstore.files import CannotList
from logitstore.manifest import Manifest
from logitstore.moved import Destination, Source
from logitstore.parts import ROOT, Part, part_names, parts_of, root_part
from logitstore.sealed import DAMAGED, file_problems, read_group

JOBS = 4
SHOWN_S = 0.2
LOST = (StoreLostError, ServiceLostError)


@dataclass
class MoveReport:
    """What was moved."""

    parts: int = 0
    """Parts that were not there before."""
    there: int = 0
    """Parts that were there."""
    sent_bytes: int = 0
    others: int = 0
    """Parts that were there with other bytes, and stay."""
    note: str = ""

    def to_text(self, where: str) -> str:
        """A line for people."""
        text = f"{where}: {self.parts:,} parts moved, {self.sent_bytes:,} bytes sent; {self.there:,} were there"
        if self.others:
            text += f", {self.others:,} of them with other bytes, which stay"
        return f"{text}; {self.note}" if self.note else text


class _Stopped(Exception):
    """Another thread has failed."""


def move(source: Source, destination: Destination, jobs: int = JOBS, *, quiet: bool = False) -> MoveReport:
    """Bring to the destination what it lacks of the source.

    A part is there when its `zarr.json` has the same bytes. Of a store in a folder or a zip file, everything that is to
    be sent is held against its digests before the first byte is sent; of one behind a URL, each file before its last.

    Raises:
        CorruptStoreError: bytes of the source differ from those that were written.
        IncompatibleStoreError: the destination holds another store.
        StoreLostError: the source answers no more.
        StoreWriteError: the destination cannot be written.
        StoreError: no store at the source.
    """
    report = MoveReport()
    with _reading(source):
        read_root(source.files, source.where)
        root, manifest = root_part(read_group(source.files), source.where)
        _require_same(source, manifest, destination)
        names = sorted(source.digests.keys() - {ROOT}) or part_names(source.files, source.where)
        with ThreadPoolExecutor(jobs) as pool:
            wanted = _wanted(source, destination, root, manifest, names, pool, report)
        if source.local:
            _require_sound(source, wanted, quiet=quiet)
    received = {part.name: destination.received(part) for part in wanted}
    total = sum(part.total_bytes for part in wanted)
    arrived = sum(sum(sizes.values()) for sizes in received.values())
    destination.require_room(total - arrived)
    with tqdm(total=total, initial=arrived, unit="B", unit_scale=True, desc="move", delay=1, disable=quiet) as bar:
        moving = _Moving(source, destination, received, bar.update)
        for some in ([part for part in wanted if part.name == ROOT], [p for p in wanted if p.name != ROOT]):
            moving.run(some, jobs)
    report.parts, report.sent_bytes = len(wanted), moving.sent_bytes
    report.note = destination.finish(source)
    return report


@contextmanager
def _reading(source: Source) -> Iterator[None]:
    """Turn what a place answers that cannot be read into the tree's errors."""
    try:
        yield
    except CannotList as error:
        raise StoreFormatError(
            f"{source.where} has no index, without which a plain web server does not tell what is there; type its "
            "`logitstore build` command again where it was built, and copy what that adds"
        ) from error
    except OSError as error:
        raise _lost(source, error.strerror or error) from error


def _lost(source: Source, why: object) -> StoreLostError:
    return StoreLostError(
        f"{source.where} answers no more ({why}); what has arrived is kept, type the same command again"
    )


def _require_same(source: Source, manifest: Manifest, destination: Destination) -> None:
    """Check that the destination holds nothing yet, or the same store."""
    there = destination.root()
    if there is None:
        return
    found = root_part(there, destination.where)[1]
    difference = found.first_difference(manifest)
    if difference is not None:
        what, here, expected = difference
        raise IncompatibleStoreError(
            f"{destination.where} holds another store: its {what} is {here}, that of {source.where} is {expected}; "
            "name another place"
        )


def _wanted(
    source: Source,
    destination: Destination,
    root: Part,
    manifest: Manifest,
    names: list[str],
    pool: ThreadPoolExecutor,
    report: MoveReport,
) -> list[Part]:
    """The parts that the destination lacks."""
    there = destination.digests([ROOT, *names])
    known = [name for name in names if name in there and there[name] == source.digests.get(name)]
    unknown = [name for name in names if name not in set(known)]
    report.there = len(known) + (ROOT in there)
    wanted = [] if ROOT in there else [root]
    for part in pool.map(lambda name: next(parts_of(source.files, [name], manifest, source.where), None), unknown):
        if part is None:
            continue
        if part.name in there:
            report.there += 1
            report.others += there[part.name] != part.digest
        else:
            wanted.append(part)
    return wanted


def _require_sound(source: Source, parts: list[Part], *, quiet: bool) -> None:
    """Hold every file that is to be sent against its digest."""
    for part in tqdm(parts, desc="check", unit="part", delay=1, disable=quiet):
        for problem in file_problems(source.files, part.folder, part.files):
            raise _damaged(source, part.path(problem.file), problem.fault)


def _damaged(source: Source, name: str, fault: str) -> CorruptStoreError:
    mend = (
        "type `logitstore verify --repair` on it" if source.local else "type `logitstore verify --repair` where it is"
    )
    return CorruptStoreError(f"{source.where}/{name}: {fault}; {mend}, then this command again")


class _Moving:
    """Parts on their way."""

    def __init__(
        self,
        source: Source,
        destination: Destination,
        received: dict[str, dict[str, int]],
        update: Callable[[int], object],
    ) -> None:
        self._source, self._destination, self._received, self._update = source, destination, received, update
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._left: Counter[str] = Counter()
        self.sent_bytes = self._shown = 0

    def run(self, parts: list[Part], jobs: int) -> None:
        """Move them all, or raise the first error."""
        self._left.update({part.name: max(1, len(part.files)) for part in parts})
        pool = ThreadPoolExecutor(jobs)
        futures: list[Future[None]] = []
        failed = threading.Event()
        left = threading.Semaphore(0)

        def ended(future: Future[None]) -> None:
            if future.cancelled() or future.exception() is not None:
                failed.set()
            left.release()

        try:
            for part in parts:
                for file in part.files or {"": {}}:
                    futures.append(pool.submit(self._file, part, file))
                    futures[-1].add_done_callback(ended)
            waiting = len(futures)
            while waiting and not failed.is_set():
                waiting -= left.acquire(timeout=SHOWN_S)
                self._show()
        except BaseException:
            self._stop.set()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            errors = [future.exception() for future in futures if future.done() and not future.cancelled()]
            if not all(error is None or isinstance(error, LOST) for error in errors):
                self._stop.set()  # where the source is lost, what is on its way is still taken
            pool.shutdown(wait=True)
        errors = [future.exception() for future in futures if not future.cancelled()]
        for error in sorted(filter(None, errors), key=lambda error: isinstance(error, _Stopped)):
            raise error

    def _file(self, part: Part, file: str) -> None:
        """Send one file; who sends a part's last shows it."""
        if file:
            self._send(part, file, self._received[part.name].get(file, 0))
        with self._lock:
            self._left[part.name] -= 1
            if self._left[part.name]:
                return
        again = self._destination.publish(part)
        for name in again:  # what a power loss, or another's upload, has left there
            self._send(part, name, 0)
        if again and (bad := self._destination.publish(part)):
            raise _damaged(self._source, part.path(bad[0]), DAMAGED)
        self._count(len(part.group))

    def _send(self, part: Part, file: str, offset: int) -> None:
        """Send what is missing of a file; where the source breaks off, from there on as long as anything comes."""
        path = self._source.path(part.path(file))
        while offset < part.files[file]["bytes"] or not part.files[file]["bytes"]:
            try:
                self._destination.receive(part, file, offset, partial(self._pieces, part, file), path)
                return
            except StoreLostError:
                before, offset = offset, self._destination.received(part).get(file, 0)
                if offset <= before or self._stop.is_set():
                    raise

    def _pieces(self, part: Part, file: str, offset: int) -> Iterator[bytes]:
        """A file's bytes from an offset on, exactly as many as there must be; the last when the digest is right."""
        name, size = part.path(file), part.files[file]["bytes"]
        digest, at, last = blake2b(digest_size=16), offset, b""
        stream = self._source.stream(name, offset, size)
        while at < size:
            if self._stop.is_set():
                raise _Stopped
            try:
                last = next(stream, b"")
            except OSError as error:
                raise _lost(self._source, error.strerror or error) from error
            except ServiceLostError as error:
                raise _lost(self._source, error) from error
            if not last:
                raise _lost(self._source, f"{name} ends after {at:,} of {size:,} bytes")
            at += len(last)
            digest.update(last)
            if at < size:
                self._count(len(last))
                yield last
        if not offset and digest.hexdigest() != part.files[file]["digest"]:
            raise _damaged(self._source, name, DAMAGED)
        self._count(len(last))
        yield last

    def _count(self, size: int) -> None:
        with self._lock:
            self.sent_bytes += size

    def _show(self) -> None:
        """Move the bar on: in the thread that made it, for tqdm's locks do not outlive a Ctrl-C in another."""
        new = self.sent_bytes - self._shown
        self._shown += new
        self._update(new)
