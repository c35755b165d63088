"""Prometheus metrics of the service. No label holds a prompt, a URL or a client."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_PREFIX = "knn_diffusion"
_LATENCIES_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Metrics in a registry of their own, so that several services can live in one process. Thread-safe."""

    def __init__(self) -> None:
        """Create all metrics without values."""
        own = {"namespace": _PREFIX, "registry": CollectorRegistry(auto_describe=True)}
        self.registry: CollectorRegistry = own["registry"]  # type: ignore[assignment]
        self.requests = _counter(own, "requests", "Answered HTTP requests.", "route", "status")
        self.request_seconds = _histogram(own, "request_duration_seconds", "Time to answer a request.", "route")
        self.queue_depth = _gauge(own, "queue_depth", "Waiting requests.", "lane")
        self.in_flight = _gauge(own, "in_flight", "Running requests.", "lane")
        self.queue_wait = _histogram(own, "queue_wait_seconds", "Time of a request in the queue.", "lane")
        self.batch_size = _histogram(own, "batch_size", "Requests of a batch.", "kind", buckets=_SIZES)
        self.batch_seconds = _histogram(own, "batch_duration_seconds", "Time of a batch.", "kind")
        self.rejected = _counter(own, "rejected", "Rejected requests.", "reason")
        self.swaps = _counter(own, "swap", "Swaps of a database or of the model.", "kind", "outcome")
        self.swap_seconds = _histogram(own, "swap_duration_seconds", "Time to open a version.", "kind")
        self.last_swap = _gauge(own, "last_swap_timestamp_seconds", "Time of the last swap.", "kind")
        self.serving = _gauge(own, "serving_info", "Served versions; always 1.", "model", "database", "rows")

    def expose(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def set_serving(self, versions: list[tuple[str, str, int]]) -> None:
        """Replace the served versions: model, database and rows."""
        self.serving.clear()
        for model, database, rows in versions:
            self.serving.labels(model=model, database=database, rows=str(rows)).set(1)


def _counter(own: dict[str, object], name: str, text: str, *labels: str) -> Counter:
    return Counter(name, text, labels, **own)  # type: ignore[arg-type]


def _gauge(own: dict[str, object], name: str, text: str, *labels: str) -> Gauge:
    return Gauge(name, text, labels, **own)  # type: ignore[arg-type]


def _histogram(
    own: dict[str, object], name: str, text: str, *labels: str, buckets: tuple[float, ...] = _LATENCIES_S
) -> Histogram:
    return Histogram(name, text, labels, buckets=buckets, **own)  # type: ignore[arg-type]
