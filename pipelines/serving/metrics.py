"""What the service measures, in Prometheus' terms."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pipelines.outcome import Ok, RowOutcome, kind_of

_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600)


class Metrics:
    """One dispatcher's counters, from its start on."""

    def __init__(self) -> None:
        # A registry of its own: Ray's measurements of the same process are Ray's to publish.
        to = CollectorRegistry()
        self.registry = to
        self.outcomes = Counter("echovideo_outcomes", "Jobs that ended, by outcome.", ["outcome"], registry=to)
        self.refusals = Counter("echovideo_refusals", "Requests refused at the door, by code.", ["code"], registry=to)
        self.redone = Counter("echovideo_redone", "Jobs put back because their renderer was lost.", registry=to)
        self.queued = Gauge("echovideo_queued", "Jobs that wait.", registry=to)
        self.in_progress = Gauge("echovideo_in_progress", "Jobs that a renderer has.", registry=to)
        self.steps_per_second = Gauge("echovideo_steps_per_second", "Steps a second of the last render.", registry=to)
        self.memory = Gauge("echovideo_memory_bytes", "Peak memory of the last renderer.", ["kind"], registry=to)
        self.wait = Histogram(
            "echovideo_queue_wait_seconds", "From acceptance to a renderer.", buckets=_SECONDS, registry=to
        )
        self.stages = Histogram(
            "echovideo_stage_seconds", "Time by part of the work.", ["stage"], buckets=_SECONDS, registry=to
        )

    def ended(self, outcome: RowOutcome, num_steps: int, memory: dict[str, float]) -> None:
        """Count a job that ended."""
        self.outcomes.labels(kind_of(outcome)).inc()
        for kind, num_bytes in memory.items():
            self.memory.labels(kind).set(num_bytes)
        if isinstance(outcome, Ok):
            for stage, seconds in outcome.timings.items():
                self.stages.labels(stage).observe(seconds)
            if denoise := outcome.timings.get("denoise"):
                self.steps_per_second.set(num_steps * len(outcome.seeds_tried) / denoise)

    def text(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self.registry)
