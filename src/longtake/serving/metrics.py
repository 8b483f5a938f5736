"""What /metrics tells: speed as `generation.timing` defines it, labelled by model and never by prompt or session."""

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from longtake.serving.worker import Worker

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)


class Metrics:
    """One server's numbers."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self._ttfc = self._histogram("ttfc", "From session.start to the first chunk on its way.")
        self._interval = self._histogram("chunk_interval", "Between two chunks on their way to a viewer.")
        self._prompt = self._histogram("prompt_latency", "From new words to the first chunk that shows them.")
        self._stage = Histogram(
            "longtake_chunk_seconds",
            "Work on one chunk; cache is the commit, which writes to memory.",
            ["model", "stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._factor = self._gauge("realtime_factor", "Times real time that the device makes, of late.", [])
        self._sessions = self._gauge("sessions", "Open sessions.", ["state"])
        self._bytes = self._gauge("gpu_bytes", "Memory of the GPU.", ["kind"])
        self._misses = self._counter("deadline_misses", "Chunks for which a viewer had to wait.")
        self._underrun = self._counter("underrun_seconds", "How long viewers waited.")

    def first_chunk(self, seconds: float) -> None:
        self._ttfc.labels(self._model).observe(seconds)

    def interval(self, seconds: float) -> None:
        self._interval.labels(self._model).observe(seconds)

    def prompt_shown(self, seconds: float) -> None:
        self._prompt.labels(self._model).observe(seconds)

    def chunk(self, *, denoise: float, cache: float, decode: float, encode: float) -> None:
        for stage, seconds in (("denoise", denoise), ("cache", cache), ("decode", decode), ("encode", encode)):
            self._stage.labels(self._model, stage).observe(seconds)

    def waited(self, misses: int, seconds: float) -> None:
        self._misses.labels(self._model).inc(misses)
        self._underrun.labels(self._model).inc(seconds)

    def text(self, worker: Worker) -> bytes:
        """All of it, as Prometheus reads it."""
        if worker.device_share:
            self._factor.labels(self._model).set(1 / worker.device_share)
        states = [session.state for session in worker.sessions()]
        for state in ("opening", "live", "paused"):
            self._sessions.labels(self._model, state).set(states.count(state))
        if torch.cuda.is_available():
            self._bytes.labels(self._model, "allocated").set(torch.cuda.memory_allocated())
            self._bytes.labels(self._model, "reserved").set(torch.cuda.memory_reserved())
        return generate_latest(self.registry)

    def _histogram(self, name: str, about: str) -> Histogram:
        return Histogram(f"longtake_{name}_seconds", about, ["model"], buckets=_SECONDS, registry=self.registry)

    def _gauge(self, name: str, about: str, labels: list[str]) -> Gauge:
        return Gauge(f"longtake_{name}", about, ["model", *labels], registry=self.registry)

    def _counter(self, name: str, about: str) -> Counter:
        return Counter(f"longtake_{name}", about, ["model"], registry=self.registry)
