"""Metrics for Prometheus: what the engine counted, and how requests over HTTP went."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from s3dit.serve.stats import Stats

# Upper bounds in seconds: of the embedded model a picture takes a fraction of a second, of a large one minutes.
SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
# Ways in which a request may end, as `Stats` counts them.
ENDS = ("done", "failed", "cancelled", "timed_out", "handed_back", "refused")


class EngineCollector(Collector):
    """Turns the engine's Stats into metrics, each time they are asked for."""

    def __init__(self, stats: Callable[[], Stats], alive: Callable[[], bool]) -> None:
        self.stats, self.alive = stats, alive

    def collect(self) -> Iterator[Metric]:
        """The metrics of now."""
        stats = self.stats()
        for name, text, value in (
            ("alive", "1 while requests are drawn", int(self.alive())),
            ("queued", "requests that wait", stats.queued),
            ("running", "requests that are drawn", stats.running),
            ("memory_bytes", "memory of the device, on a CPU of the process", stats.memory),
        ):
            yield GaugeMetricFamily(f"s3dit_{name}", text, value=value)
        for name, text, count in (
            ("passes", "model calls", stats.passes),
            ("tokens", "tokens of all model calls", stats.tokens),
            ("pixels", "pixels of the pictures that are done", stats.pixels),
            ("steps", "steps of all requests", stats.steps),
        ):
            yield CounterMetricFamily(f"s3dit_{name}", text, value=count)
        requests = CounterMetricFamily("s3dit_requests", "requests by how they ended", labels=["ended"])
        for end in ENDS:
            requests.add_metric([end], getattr(stats, end))
        yield requests
        seconds = CounterMetricFamily("s3dit_stage_seconds", "seconds by stage, of what is done", labels=["stage"])
        for stage, spent in stats.seconds.items():
            seconds.add_metric([stage.replace(" ", "_")], spent)
        yield seconds
        yield _batches(stats)


def _batches(stats: Stats) -> Metric:
    """How many requests shared a pass, as a histogram."""
    seen, buckets = 0, []
    for size in sorted(stats.batch_sizes):
        seen += stats.batch_sizes[size]
        buckets.append((str(float(size)), float(seen)))
    buckets.append(("+Inf", float(seen)))
    total = sum(size * count for size, count in stats.batch_sizes.items())
    return HistogramMetricFamily("s3dit_batch_size", "requests in a pass", buckets=buckets, sum_value=total)


class Metrics:
    """The metrics of a server."""

    def __init__(self, stats: Callable[[], Stats], alive: Callable[[], bool]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(stats, alive))
        self._answers = Counter(
            "s3dit_http_requests", "answers over HTTP", ["method", "path", "status"], registry=self.registry
        )
        self._latency = Histogram(
            "s3dit_http_seconds", "from a request to the end of its answer", ["path"], buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self._first = Histogram(
            "s3dit_first_partial_seconds", "from a request to its first partial picture", buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip

    def answered(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count an answer; path: of a route, or "other", so that names that are tried do not pile up."""
        self._answers.labels(method, path, status).inc()
        self._latency.labels(path).observe(seconds)

    def first_partial(self, seconds: float) -> None:
        """Count the first partial picture of a request."""
        self._first.observe(seconds)

    def families(self) -> list[Metric]:
        """All of them, as they are now."""
        return list(self.registry.collect())

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)
