"""A proxy on loopback between a client and a service, which breaks what it is told to break, and counts."""

import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

PIECE = 1 << 16
HEAD_END = b"\r\n\r\n"


@dataclass(frozen=True)
class Fault:
    """What becomes of one answer.

    close: nothing is answered. stall: neither, and the connection stays open. answer: these bytes instead of the
    service's. cut: so many bytes of its body, and then the end. flip: that byte of its body is another.
    """

    kind: str
    number: int = 0
    answer: bytes = b""


def status(code: int, retry_after: str = "0", body: str = '{"error": "not now"}') -> Fault:
    """An answer of a service that says no."""
    head = f"HTTP/1.1 {code} X\r\nContent-Length: {len(body)}\r\nRetry-After: {retry_after}\r\n\r\n"
    return Fault("answer", answer=(head + body).encode())


class Proxy:
    """Its state, which a test changes as it likes."""

    def __init__(self, upstream: str) -> None:
        self.upstream: str | None = upstream
        """None: connections are refused, as by a service that is down."""
        self.fault: Callable[[str], Fault | None] = lambda _: None
        """Told `GET /path`, it says what becomes of the answer."""
        self.most_s = float("inf")
        """Every connection is cut after so long."""
        self.slow_s = 0.0
        """Each answer comes so much later."""
        self.asked: list[str] = []
        self.sent_bytes = 0
        """To the client."""
        self.stopping = False

    def of(self, part: str) -> list[str]:
        """What was asked that has this in it."""
        return [line for line in self.asked if part in line]

    def carry(self, client: socket.socket) -> None:
        """One connection."""
        if self.upstream is None:
            return
        parts = urlsplit(self.upstream)
        begun, fault, body = time.monotonic(), None, -1
        with suppress(OSError), socket.create_connection((parts.hostname or "", parts.port or 80)) as service:
            while not self.stopping and time.monotonic() - begun < self.most_s and self.upstream is not None:
                for ready in select.select([client, service], [], [], 0.02)[0]:
                    data = ready.recv(PIECE)
                    if not data:
                        return
                    if ready is client:
                        method, _, rest = data.partition(b" ")
                        if method in (b"GET", b"HEAD", b"POST", b"PUT"):
                            line = f"{method.decode()} {rest.split(b' ')[0].decode()}"
                            self.asked.append(line)
                            fault, body = self.fault(line), -1
                            time.sleep(self.slow_s)
                        if fault is not None and fault.kind == "close":
                            return
                        if fault is not None and fault.kind == "answer" and not data.startswith(b"{"):
                            client.sendall(fault.answer)
                        elif fault is None or fault.kind not in ("stall", "answer"):
                            service.sendall(data)
                        continue
                    if fault is not None:
                        if body < 0 and HEAD_END in data:
                            body = -data.index(HEAD_END) - len(HEAD_END)
                        at = fault.number - body
                        body += len(data)
                        if 0 <= at < len(data):
                            if fault.kind == "cut":
                                client.sendall(data[:at])
                                return
                            data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
                    client.sendall(data)
                    self.sent_bytes += len(data)


@contextmanager
def proxied(upstream: str) -> Iterator[tuple[Proxy, str]]:
    """The proxy, and its URL."""
    proxy, threads = Proxy(upstream), list[threading.Thread]()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.05)

    def carry(client: socket.socket) -> None:
        with client:
            proxy.carry(client)

    def accept() -> None:
        while not proxy.stopping:
            with suppress(TimeoutError):
                client = listener.accept()[0]
                client.settimeout(20)
                threads.append(threading.Thread(target=carry, args=(client,), daemon=True))
                threads[-1].start()

    threads.append(threading.Thread(target=accept, daemon=True))
    threads[0].start()
    try:
        yield proxy, f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        proxy.stopping = True
        for thread in threads:
            thread.join(20)
        listener.close()


def first(count: int, fault: Fault, part: str = "") -> Callable[[str], Fault | None]:
    """A fault of the first answers that have to do with a part of the path."""
    left = [count]

    def choose(line: str) -> Fault | None:
        if part not in line or not left[0]:
            return None
        left[0] -= 1
        return fault

    return choose
