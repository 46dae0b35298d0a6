"""Parts that a folder is receiving: by `logitstore pull`, and by the service's uploads.

They lie below `STORE/.incoming`, under the names that they will have in the store, and grow from the front; so a file's
size says what of it has arrived, and after a kill the next command goes on there. When every file has its digest, one
rename shows the part to readers. A name that begins with a dot is no part of a store, so none of them sees it before.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from logitstore.durable import alone_in, publish, sync
from logitstore.files import LocalFiles
from logitstore.journal import open_locked
from logitstore.parts import FIDELITY, ROOT, Part, folder_of
from logitstore.sealed import GROUP, MOST_JSON_BYTES, Problem, file_problems

FOLDER = ".incoming"
LOCK = ".lock"
SPARE_BYTES = 16 << 20
"""That a disk must have beside what is to come: for the index, and names."""


class WrongOffsetError(Exception):
    """Bytes that do not begin where what was received ends; `received` says where that is."""

    def __init__(self, received: int) -> None:
        super().__init__(f"{received:,} bytes were received")
        self.received = received


class Incoming:
    """What one store's folder is receiving. The folder is begun when the first byte arrives. Safe for several threads
    and processes: one at a time appends to a file."""

    def __init__(self, store: Path) -> None:
        self.store, self.folder = store, store / FOLDER

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only `pull` into the folder.

        Raises:
            BlockingIOError: another process is.
            OSError: the place cannot be written.
        """
        fresh = not self.store.exists()
        lock = self.folder / LOCK
        with self._locked(lock):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
                self.tidy()
                if fresh:
                    with suppress(OSError):
                        self.store.rmdir()  # nothing has come

    def _locked(self, lock: Path) -> FileIO:
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # another has ended between the two, and removed the folder
                return open_locked(lock)

    def group(self, name: str) -> bytes | None:
        """The `zarr.json` of a part that has been begun."""
        with suppress(FileNotFoundError), (self._place(name) / GROUP).open("rb") as file:
            return file.read(MOST_JSON_BYTES + 1)
        return None

    def begin(self, part: Part) -> None:
        """Be ready for a part's files. What has arrived of another part of the same name is removed.

        Raises:
            OSError: full disk or no permission.
        """
        while True:
            try:
                self._begin(part)
                return
            except FileNotFoundError:  # the folder was empty for a moment, and somebody has removed it
                if not self.store.exists():
                    raise

    def _begin(self, part: Part) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with alone_in(self.folder):
            if self.group(part.name) == part.group:
                return
            self.remove(part.name)
            place = self._place(part.name)
            place.mkdir(parents=True, exist_ok=True)
            begun = place / f".{GROUP}"
            begun.write_bytes(part.group)
            begun.rename(place / GROUP)

    def received(self, part: Part) -> dict[str, int]:
        """How many bytes of each file have arrived."""
        sizes = {}
        for file, entry in part.files.items():
            with suppress(FileNotFoundError):
                sizes[file] = min((self.folder / part.path(file)).stat().st_size, entry["bytes"])
        return sizes

    @contextmanager
    def appending(self, part: Part, file: str, offset: int) -> Iterator[FileIO]:
        """A file of a part that was begun, open where the next byte belongs.

        Raises:
            WrongOffsetError: that is elsewhere.
            BlockingIOError: somebody else appends to it.
            OSError: full disk or no permission.
        """
        path = self.folder / part.path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_locked(path) as handle:
            size = handle.seek(0, os.SEEK_END)
            if size > part.files[file]["bytes"]:
                size = handle.truncate(0)
                handle.seek(0)
            if size != offset:
                raise WrongOffsetError(size)
            yield handle

    @contextmanager
    def finishing(self, part: Part) -> Iterator[None]:
        """Be the only one who checks and shows a part.

        Raises:
            FileNotFoundError: it was not begun, or somebody has shown it meanwhile.
        """
        path = self._place(part.name) / GROUP
        with path.open("rb") as group:
            fcntl.flock(group, fcntl.LOCK_EX)
            if not os.fstat(group.fileno()).st_nlink or self.group(part.name) != part.group:
                raise FileNotFoundError(2, "is gone", str(path))
            yield

    def problems(self, part: Part) -> list[Problem]:
        """Files that have not arrived, or not as they should. Those that are as long as they should be are removed."""
        found = list(file_problems(LocalFiles(self.folder), part.folder, part.files))
        sizes = self.received(part)
        for problem in found:
            if sizes.get(problem.file) == part.files[problem.file]["bytes"]:
                self.drop(part, problem.file)
        return found

    def drop(self, part: Part, file: str) -> None:
        """Forget what has arrived of a file."""
        (self.folder / part.path(file)).unlink(missing_ok=True)

    def publish(self, part: Part) -> None:
        """Show a part of which every file has arrived to readers; one that is there by now stays.

        Raises:
            OSError: full disk or no permission.
        """
        place, final = self._place(part.name), self.store / part.folder
        if part.name == ROOT:
            self._publish_root(part)
            return
        if part.name == FIDELITY:
            final.mkdir(exist_ok=True)
            if not (final / GROUP).exists():
                sync(place / GROUP)
                (place / GROUP).rename(final / GROUP)
                sync(final)
                sync(self.store)
        else:
            publish(place, final)
        self.remove(part.name)

    def _publish_root(self, part: Part) -> None:
        """Its `zarr.json` last: what has none is no store."""
        with alone_in(self.store):
            if not (self.store / GROUP).exists():
                for file in (*part.files, GROUP):
                    arrived, final = self.folder / part.path(file), self.store / part.path(file)
                    final.parent.mkdir(parents=True, exist_ok=True)
                    sync(arrived)
                    if file == GROUP:
                        for folder in {(self.store / part.path(other)).parent for other in part.files}:
                            sync(folder)
                    arrived.rename(final)
                sync(self.store)
                sync(self.store.parent)
        self.remove(ROOT)

    def remove(self, name: str) -> None:
        """Forget what has arrived of a part."""
        place = self._place(name)
        if name != ROOT:
            shutil.rmtree(place, ignore_errors=True)
            return
        (place / GROUP).unlink(missing_ok=True)
        (place / "shards" / GROUP).unlink(missing_ok=True)
        shutil.rmtree(place / "vocabulary", ignore_errors=True)

    def remove_older(self, than_s: float) -> None:
        """Forget parts of which nothing has arrived for so long."""
        for place in self._places():
            if age_s(place) > than_s:
                shutil.rmtree(place, ignore_errors=True)
        self.tidy()

    def tidy(self) -> None:
        """Remove what has arrived of parts that are there by now, and folders of which nothing is left."""
        if (self.store / GROUP).exists():
            self.remove(ROOT)
        for place in self._places():
            if (self.store / place.relative_to(self.folder) / GROUP).exists():
                shutil.rmtree(place, ignore_errors=True)
        for folder in (self.folder / "shards", self.folder):
            with suppress(OSError):
                folder.rmdir()

    def age_s(self, name: str) -> float:
        """Seconds since something of a part has arrived."""
        return age_s(self._place(name))

    def _places(self) -> list[Path]:
        shards = self.folder / "shards"
        folders = [*self.folder.glob("*"), *shards.glob("*")]
        return [path for path in folders if path.is_dir() and path != shards]

    def _place(self, name: str) -> Path:
        return self.folder / folder_of(name)


def age_s(folder: Path) -> float:
    """Seconds since a file below a folder was written, or the folder if it has none; 0 of one that is gone by now."""
    times = []
    files = [Path(parent) / name for parent, _, names in os.walk(folder) for name in names if name != LOCK]
    for path in files or [folder]:
        with suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return time.time() - max(times) if times else 0.0
