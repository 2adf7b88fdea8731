"""What Prometheus may read, in a registry of the server's own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """Each server has its own registry, so that two in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.calls = Counter(
            "isthmus_calls", "Calls that ended, by method and status.", ["method", "status"], registry=self.registry
        )
        self.seconds = Histogram("isthmus_call_seconds", "Duration of calls.", ["method"], registry=self.registry)
        self.in_progress = Gauge("isthmus_calls_in_progress", "Calls under way.", ["method"], registry=self.registry)
        self.frames = Counter(
            "isthmus_frames", "Feature frames answered or refused.", ["outcome"], registry=self.registry
        )
        self.frame_seconds = Histogram(
            "isthmus_frame_seconds",
            "Time to answer a feature frame.",
            registry=self.registry,
            buckets=(1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 0.1),
        )
        self.bytes_sent = Counter("isthmus_student_bytes", "Bytes of students sent.", registry=self.registry)
        self.worker_restarts = Counter("isthmus_worker_restarts", "Workers that died.", registry=self.registry)
