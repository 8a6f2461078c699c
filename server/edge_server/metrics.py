"""What Prometheus reads of a server: counters of requests and updates, and where the run stands. No sockets, no clock."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from edge_sdk.cohort import Masked
from edge_server.coordinator import Accepted, Answered, Dropped, Event, State

FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60, 600)  # seconds: a slow line may take ten minutes
LONG = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14400)  # seconds: an LLM may learn beside a version
VERSIONS = (0, 1, 2, 3, 5, 8, 13, 21)


class Metrics:
    """The numbers of one application, in a registry of its own.

    Args:
        state: where the run stands now.
        leases: how many devices train now.
    """

    def __init__(self, state: Callable[[], State], leases: Callable[[], int]) -> None:
        self._state = state
        self._registry = own = CollectorRegistry()
        self._requests = Counter("edge_requests", "Requests that were answered.", ("route", "status"), registry=own)
        self._received = Counter(
            "edge_received_bytes", "Bytes of bodies, decompressed, that came before the answer.", ("route",), registry=own
        )
        self._seconds = Histogram("edge_request_seconds", "Until an answer begins.", ("route",), registry=own, buckets=FAST)
        self._accepted = Counter("edge_updates_accepted", "Updates on disk, each once; masked ones too.", registry=own)
        self._refused = Counter("edge_updates_refused", "Updates that were not taken, by problem code.", ("code",), registry=own)
        self._dropped = Counter(
            "edge_updates_dropped", "Accepted updates that will not count, by problem code.", ("code",), registry=own
        )
        self._staleness = Histogram(
            "edge_update_staleness", "Versions that an accepted update was behind.", registry=own, buckets=VERSIONS
        )
        self._made = Histogram("edge_version_seconds", "To make a version of updates.", registry=own, buckets=LONG)
        self._commits = Histogram("edge_commit_seconds", "For an event to be on disk.", registry=own, buckets=FAST)
        self._gauge("edge_version", "The newest version.", lambda now: now.version)
        self._gauge("edge_buffered_updates", "Updates that wait for the next version.", lambda now: len(now.buffer))
        self._gauge("edge_devices", "Devices that have enrolled.", lambda now: len(now.devices))
        self._gauge("edge_leases", "Devices that were told to train, and may yet answer.", lambda _: leases())

    def answered(self, route: str, status: int, received: int, seconds: float) -> None:
        """A request to a route that exists, or to "none"."""
        self._requests.labels(route, str(status)).inc()
        self._received.labels(route).inc(received)
        self._seconds.labels(route).observe(seconds)

    def refused(self, code: str) -> None:
        """An update was."""
        self._refused.labels(code).inc()

    def committed(self, event: Event, seconds: float) -> None:
        self._commits.observe(seconds)
        match event:
            case Accepted(version=version):
                self._accepted.inc()
                self._staleness.observe(self._state().version - version)
            case Answered(Masked()):
                self._accepted.inc()
            case Dropped(blobs, code):
                self._dropped.labels(code).inc(len(blobs))

    def made(self, seconds: float) -> None:
        """A version was, of updates."""
        self._made.observe(seconds)

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def _gauge(self, name: str, said: str, of: Callable[[State], int]) -> None:
        """A number that is looked up when it is asked for."""
        Gauge(name, said, registry=self._registry).set_function(lambda: of(self._state()))
