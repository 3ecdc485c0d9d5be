"""Metrics of the server for Prometheus: GET /metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from model.inference.engine import Engine


class Metrics:
    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        shared = dict(namespace="minimind", registry=self.registry)
        self.requests = Counter("requests", "Requests by outcome", ["outcome"], **shared)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts", **shared)
        self.generated_tokens = Counter("generated_tokens", "Tokens of replies", **shared)
        self.first_token_seconds = Histogram(
            "first_token_seconds",
            "Time to the first token of a reply",
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
            **shared,
        )
        self.request_seconds = Histogram("request_seconds", "Time to the end of a reply", **shared)
        running = Gauge("running", "Requests being decoded", **shared)
        running.set_function(lambda: len(engine.running))
        waiting = Gauge("waiting", "Requests in the queue", **shared)
        waiting.set_function(lambda: len(engine.waiting))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
