"""Prometheus metrics: read from the parts' own counters when asked, so that no hot path pays for them.

Layer: words.
"""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

Reading = tuple[str, str, str, float]
"""(`counter` or `gauge`, name without the prefix, help, value)."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics(Collector):
    """All metrics of one bridge.

    Args:
        read: gives the values of this moment.
    """

    def __init__(self, read: Callable[[], Iterable[Reading]]) -> None:
        self._read = read
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """One family a reading."""
        for kind, name, text, value in self._read():
            family = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
            yield family(f"realtime_bridge_{name}", text, value=value)

    def page(self) -> bytes:
        """The answer to `GET /metrics`."""
        return generate_latest(self._registry)
