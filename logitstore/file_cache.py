"""Files that were fetched from far away, in memory while there is room: those that were used longest ago go first."""

import threading
from collections import OrderedDict

MOST_BYTES = 512 << 20


class FileCache:
    """Bytes by name. Safe for several threads, of which two that miss at once both fetch."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self.size_bytes = 0

    def get(self, name: str) -> bytes | None:
        """What is kept of a name."""
        with self._lock:
            data = self._kept.get(name)
            if data is not None:
                self._kept.move_to_end(name)
            return data

    def put(self, name: str, data: bytes) -> None:
        """Keep a file, and let others go for it; it alone may take more than there is room for."""
        with self._lock:
            self._drop(name)
            self._kept[name] = data
            self.size_bytes += len(data)
            while self.size_bytes > MOST_BYTES and len(self._kept) > 1:
                self._drop(next(iter(self._kept)))

    def drop(self, name: str) -> None:
        """Forget a file."""
        with self._lock:
            self._drop(name)

    def drop_below(self, folder: str) -> None:
        """Forget all below a folder."""
        with self._lock:
            for name in [name for name in self._kept if name.startswith(f"{folder}/")]:
                self._drop(name)

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def _drop(self, name: str) -> None:
        self.size_bytes -= len(self._kept.pop(name, b""))
