"""`logitstore serve` as a process of its own, which is ended by its id; for the tools that load, kill and fuzz it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import httpx2

READY_S = 120.0


class Service:
    """A service on loopback; it can be killed and started again at the same port."""

    def __init__(self, arguments: Sequence[object], log: Path) -> None:
        """Take what is typed after `logitstore serve`, and where its output goes."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-c", "from distill_cli.logitstore import main; main()", "serve"]
        self._command += [*map(str, arguments), "--port", str(self.port)]
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Service":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        assert self._process is not None, "it has been started"
        return self._process.pid

    def start(self, ready: str = "ready") -> None:
        """Start it, and wait until it is ready, or healthy."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        until = time.monotonic() + READY_S
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise SystemExit(f"the service has ended; {self._log} says why")
            try:
                if httpx2.get(f"{self.url}/{ready}", timeout=5).status_code == 200:
                    return
            except httpx2.TransportError:
                pass
            time.sleep(0.05)
        raise SystemExit(f"the service is not ready after {READY_S:.0f} s; {self._log} says more")

    def kill(self) -> None:
        """End it at once."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """End it as a user does; its exit code."""
        if self._process is None:
            return 0
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        return self._process.returncode

    def memory_bytes(self) -> int:
        """What it holds of the machine's memory."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def connections(self) -> int:
        """Sockets that it holds open."""
        found = 0
        for handle in Path(f"/proc/{self.pid}/fd").iterdir():
            with suppress(OSError):  # closed since it was listed
                found += str(handle.readlink()).startswith("socket:")
        return found
