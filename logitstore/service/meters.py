"""What a service counts: for Prometheus, and the last hour minute by minute for its page."""

import threading
import time
from collections import OrderedDict, defaultdict

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from logitstore.service.access import Access
from logitstore.service.desk import Desk

MINUTES = 60
METHODS = {"GET", "HEAD", "POST", "PUT"}


class Meters:
    """Counts. Safe for several threads."""

    def __init__(self, desk: Desk | None) -> None:
        self.registry = CollectorRegistry()
        self._asked = Counter(
            "logitstore_documents_total",
            "Documents that were asked for by their tokens.",
            ("store", "outcome"),
            registry=self.registry,
        )
        self._requests = Histogram(
            "logitstore_request_seconds", "Time of requests.", ("method", "status"), registry=self.registry
        )
        self._lock = threading.Lock()
        self._totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        self._minutes: dict[str, OrderedDict[int, list[int]]] = defaultdict(OrderedDict)
        if desk is not None:
            for name, what, read in (
                ("logitstore_queue_documents", "Documents that wait for the teacher.", lambda: desk.waiting[0]),
                ("logitstore_queue_tokens", "Tokens that wait for the teacher.", lambda: desk.waiting[1]),
                ("logitstore_taught_documents", "Documents that the teacher has computed.", lambda: desk.taught),
                ("logitstore_failed_documents", "Documents that the teacher failed on.", lambda: desk.failed),
            ):
                Gauge(name, what, registry=self.registry).set_function(read)

    def asked(self, store: str, hits: int, misses: int) -> None:
        """Count documents that were asked for."""
        self._asked.labels(store, "hit").inc(hits)
        self._asked.labels(store, "miss").inc(misses)
        minute = int(time.time() // 60) * 60
        with self._lock:
            for counts in (self._totals[store], self._minutes[store].setdefault(minute, [0, 0])):
                counts[0] += hits
                counts[1] += misses
            while len(self._minutes[store]) > MINUTES:
                self._minutes[store].popitem(last=False)

    def request(self, method: str, status: int, elapsed_s: float) -> None:
        """Count a request."""
        self._requests.labels(method if method in METHODS else "other", str(status)).observe(elapsed_s)

    def of(self, store: str) -> tuple[int, int, list[tuple[int, int, int]]]:
        """Hits, misses, and the same of each of the last minutes in which anything was asked for, by its start."""
        with self._lock:
            hits, misses = self._totals.get(store, [0, 0])
            minutes, first = self._minutes.get(store, OrderedDict()), time.time() - 60 * MINUTES
            return hits, misses, [(minute, of[0], of[1]) for minute, of in minutes.items() if minute > first]


def routes(meters: Meters, access: Access) -> list[Route]:
    """GET /metrics."""

    async def get(request: Request) -> Response:
        if access.require(request, "read").stores:
            raise HTTPException(403, "this token is for some stores, and the counts tell of all; ask for another")
        return Response(await run_in_threadpool(generate_latest, meters.registry), media_type=CONTENT_TYPE_LATEST)

    return [Route("/metrics", get)]
