"""Counters of the service in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily

from rome.rollout.service.scheduler import Part, Scheduler


class ServiceMetrics:
    """What `/metrics` shows. Registers with no global registry."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._registry = CollectorRegistry()
        self._scheduler = scheduler
        named = {"registry": self._registry, "namespace": "rome"}
        self._requests = Counter("requests", "Requests by endpoint and HTTP status", ["endpoint", "status"], **named)
        self._seconds = Histogram(
            "request_seconds", "From arrival to the answer (to its first event, if streamed)", ["endpoint"], **named
        )
        self._tokens = Counter("delivered_tokens", "Tokens given to clients", **named)
        gauges = {
            "queue_length": ("Sequences that wait for a slot", lambda: scheduler.waiting),
            "running": ("Sequences in a slot", lambda: scheduler.running),
            "slots": ("Slots", lambda: scheduler.engine.config.slots),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, **named).set_function(value)
        self._registry.register(self)

    def collect(self):
        """Called by the registry: what the scheduler and the engine count themselves."""
        engine, jobs = self._scheduler.engine.stats, self._scheduler.stats
        tokens = CounterMetricFamily("rome_engine_tokens", "Tokens of the engine", labels=["kind"])
        for kind in ("prefilled", "reused", "decoded"):
            tokens.add_metric([kind], getattr(engine, f"{kind}_tokens"))
        yield tokens
        ended = CounterMetricFamily("rome_sequences", "Sequences by how they ended", labels=["end"])
        for end in ("finished", "cancelled", "expired", "rejected", "failed"):
            ended.add_metric([end], getattr(jobs, end))
        yield ended

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def count(self, part: Part) -> None:
        self._tokens.inc(len(part.burst.tokens))

    def text(self) -> bytes:
        return generate_latest(self._registry)
