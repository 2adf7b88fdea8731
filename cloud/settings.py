"""The service's settings: the options of ``isthmus cloud serve``, each also read from ISTHMUS_CLOUD_<NAME>.

Free of the libraries that serve, so that help is fast.
"""

import dataclasses
import ipaddress
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option

from isthmus.cloud.cluster import connection as cluster
from isthmus.cloud.generation.serve.settings import GenerationSettings
from isthmus.command_line import check_fields, from_plain, key_in, to_plain

if TYPE_CHECKING:
    from isthmus.cloud.elastic.serve.settings import ElasticSettings

ENVIRONMENT = "ISTHMUS_CLOUD_"
"""Prefix of the environment variables. An empty variable counts as unset."""


@dataclass(frozen=True)
class CloudSettings:
    """All settings, checked on creation: unsafe settings raise ValueError, so no server gets them.

    Only the command line reads the environment. Settings made in Python are what they are given.

    >>> CloudSettings(release=Path("release"), state=Path("state")).listen
    '127.0.0.1:0'
    >>> CloudSettings(release=Path("release"), state=Path("state"), listen="0.0.0.0:50051")
    Traceback (most recent call last):
        ...
    ValueError: 0.0.0.0 can be reached from other machines, so the server also needs --tls-cert and --tls-key ...
    """

    state: Annotated[
        Path, Option(help="Folder for the signing key, the embedded database, the students and unfinished jobs.")
    ]
    release: Annotated[
        Path | None,
        Option(
            help="Folder made by 'isthmus distill'. Without it no devices are served: give --elastic-model or "
            "--generate-model."
        ),
    ] = None
    accept_release: Annotated[
        bool,
        Option(
            "--accept-release",
            help="Offer --release to every device, though it was changed or is another one than before. Default: "
            "refuse it. See 'isthmus cloud release' for a change in steps.",
        ),
    ] = False
    listen: Annotated[
        str, Option(help="HOST:PORT to listen on. Port 0 chooses a free port. Beyond loopback TLS is required.")
    ] = "127.0.0.1:0"
    database: Annotated[
        str | None,
        Option(
            help="SQLAlchemy URL, such as postgresql://HOST/NAME. Use the environment variable if it holds a password. "
            "Default: an SQLite file in --state."
        ),
    ] = dataclasses.field(default=None, repr=False)
    artefacts: Annotated[
        str | None,
        Option(
            help="fsspec URL for students' files, such as s3://BUCKET/PREFIX. Servers of one database need the same. "
            "Default: a folder in --state."
        ),
    ] = None
    enrolment_key_file: Annotated[Path | None, Option(help="File with the key that a device must send to enrol.")] = (
        None
    )
    signing_key_file: Annotated[
        Path | None,
        Option(
            help="File with the key that signs students. Servers of one database need the same. Default: a file in "
            "--state, made at the first start."
        ),
    ] = None
    tls_cert: Annotated[Path | None, Option(help="PEM file with the certificate chain. Needs --tls-key.")] = None
    tls_key: Annotated[Path | None, Option(help="PEM file with the private key. Needs --tls-cert.")] = None
    tls_client_ca: Annotated[
        Path | None,
        Option(
            help="PEM file with the authority of clients' certificates. Every client must then show one, and a device "
            "is bound to that with which it enrolled. Needs --tls-cert."
        ),
    ] = None
    port_file: Annotated[Path | None, Option(help="File to write HOST:PORT to once the server is ready.")] = None
    metrics_port: Annotated[
        int | None,
        Option(min=0, max=65_535, help="Port on loopback for Prometheus metrics; 0 chooses one. Default: no metrics."),
    ] = None
    metrics_listen: Annotated[
        str | None,
        Option(
            help="HOST:PORT for Prometheus metrics that other machines may reach. Beyond loopback it needs --tls-cert "
            "and --tls-client-ca, and Prometheus a certificate of that authority."
        ),
    ] = None
    health_listen: Annotated[
        str | None,
        Option(
            help="HOST:PORT that answers health checks (gRPC, without TLS) and nothing else, for probes that know no "
            "TLS. Default: only --listen answers them."
        ),
    ] = None
    traces: Annotated[
        str | None,
        Option(
            help="URL of an OpenTelemetry collector (OTLP over gRPC), such as http://127.0.0.1:4317. Needs the "
            "extra 'otel'. Default: no traces."
        ),
    ] = None
    traces_share: Annotated[float, Option(min=0.0, max=1.0, help="Share of the traces that is recorded.")] = 1.0
    log_format: Annotated[
        Literal["json", "text"], Option(help="Form of log lines: a JSON object each, or text for a person.")
    ] = "json"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Option(help="Least severe messages that are logged.")
    ] = "info"

    workers: Annotated[
        int,
        Option(
            min=0,
            help="Number of personalisations that run at once. 0: answer devices only. More than 1 needs --database "
            "postgresql://...",
        ),
    ] = 1
    worker_threads: Annotated[
        int | None, Option(min=1, help="CPU threads of the worker that personalises. Default: chosen by torch.")
    ] = None
    selection_shard_samples: Annotated[
        int,
        Option(
            min=1,
            help="On Ray, the public samples of a release are searched in shards of this size, on as many machines as "
            "there are. Its picks do not depend on it. Without Ray, one process searches them at once.",
        ),
    ] = 1_000_000
    max_devices: Annotated[int, Option(min=1, help="Largest number of enrolled devices.")] = 10_000
    max_enrolments_per_hour: Annotated[
        int, Option(min=1, help="Largest number of devices that may enrol within an hour.")
    ] = 2_000
    max_queued_jobs: Annotated[int, Option(min=1, help="Largest number of personalisations that wait.")] = 100
    max_calls: Annotated[
        int, Option(min=1, help="Largest number of calls in progress, over all devices. Only known callers count.")
    ] = 1_000
    max_connections: Annotated[
        int,
        Option(
            min=1,
            help="Largest number of open connections, of known and unknown callers. The system's limit of open files "
            "is raised to fit.",
        ),
    ] = 4_096
    max_calls_per_device: Annotated[int, Option(min=1, help="Largest number of calls in progress per device.")] = 16
    cached_heads: Annotated[int, Option(min=1, help="Number of students whose heads are kept in memory.")] = 64
    keep_students: Annotated[int, Option(min=1, help="Number of students kept per device, newest first.")] = 3
    release_copies_bytes: Annotated[
        int,
        Option(
            min=1,
            help="Bytes that a worker keeps of published releases in --state. The least recently used go first.",
        ),
    ] = 32_000_000_000
    awaiting_timeout_s: Annotated[
        float,
        Option(min=0.001, help="Seconds for which a job waits for its device's next prototypes before it fails."),
    ] = 7 * 24 * 3600.0
    watch_interval_s: Annotated[
        float, Option(min=0.001, help="Seconds between two looks at a job that a device watches.")
    ] = 0.2

    elastic_model: Annotated[
        str | None,
        Option(
            help="Serve image tasks on this vision transformer: a safetensors file with timm's weight names, or a timm "
            "model name."
        ),
    ] = None
    elastic_variants: Annotated[
        Path | None,
        Option(
            help="Serve image tasks on models of several sizes, as INFaaS does: a folder that 'isthmus elastic "
            "variants' made. Takes the place of --elastic-model, and needs --elastic-policy infaas:GB."
        ),
    ] = None
    elastic_pixels: Annotated[
        str | None,
        Option(
            help="Mean and deviation with which the model reads pictures: cifar10, imagenet or half. Default: the "
            "model's."
        ),
    ] = None
    elastic_profile: Annotated[
        Path | None, Option(help="Profile that 'isthmus elastic profile' wrote. Default: a file in --state.")
    ] = None
    elastic_measure: Annotated[
        bool,
        Option("--elastic-measure", help="Measure this machine at the start, and save the result as the profile."),
    ] = False
    elastic_policy: Annotated[
        str,
        Option(
            help="Scheduling policy: priced, exact, otas, pets, clipper, throughput, fixed:G for gamma G always, or "
            "dynamic:SIZES:MS for Triton's dynamic batcher (dynamic:16+32:5: preferred sizes, largest delay in ms). "
            "infaas:GB with --elastic-variants: each executor keeps models of GB gigabytes in memory."
        ),
    ] = "priced"
    elastic_device: Annotated[
        str,
        Option(
            help="Where the model runs: cpu, cuda or auto. 'auto' is where the profile was measured; if the machine is "
            "measured, it is a GPU if there is one."
        ),
    ] = "auto"
    elastic_threads: Annotated[int, Option(min=1, help="CPU threads of the model.")] = 1
    elastic_executors: Annotated[
        int,
        Option(
            min=1,
            max=64,
            help="Number of batches that run at once, each on a copy of the model with --elastic-threads. Executors "
            "and threads together should not exceed the machine's cores.",
        ),
    ] = 1
    elastic_most_executors: Annotated[
        int | None,
        Option(
            min=1,
            max=64,
            help="Start more executors while the load needs them, up to this number, and end them ten minutes after it "
            "no longer does. --elastic-executors is then the least. Needs --executor process or ray.",
        ),
    ] = None
    executor: Annotated[
        str,
        Option(
            help="Where batches of images run: 'thread' in the server's process, 'process' in processes of their own, "
            "'ray' on a Ray cluster that the server starts on this machine, 'ray://HOST:PORT' on one that runs. An "
            "executor that dies is started again, and its batch runs on another one if there is time."
        ),
    ] = "thread"
    elastic_number_type: Annotated[
        Literal["auto", "float32", "bfloat16", "int8"],
        Option(
            help="Number type of the model. 'auto' takes the profile's; with --elastic-measure, the fastest type with "
            "the same answers."
        ),
    ] = "auto"
    elastic_compiler: Annotated[str | None, Option(help="A backend of torch.compile, such as inductor.")] = None
    elastic_memory_bytes: Annotated[
        int | None,
        Option(min=1, help="Bytes that a batch may need. A batch that is predicted to need more is split."),
    ] = None
    elastic_max_waiting: Annotated[
        int, Option(min=1, help="Number of images that may wait for a batch. Further images are refused.")
    ] = 1_024
    elastic_warm: Annotated[
        Path | None,
        Option(
            help="Folder of warmed models, OUT/models of 'isthmus elastic warmup run'. Each batch of their task runs "
            "on the best model for its gamma."
        ),
    ] = None
    elastic_warm_bytes: Annotated[
        int | None,
        Option(min=1, help="Bytes for warmed models. The least recently used is dropped first. Default: all fit."),
    ] = None
    elastic_expert_bytes: Annotated[
        int | None,
        Option(
            min=1,
            help="Bytes for the experts of a model with experts, per executor. The least recently used is dropped "
            "first, and read again when it is needed. Default: all that registered tasks may use.",
        ),
    ] = None
    elastic_key_file: Annotated[
        Path | None,
        Option(help="File with the key that clients of elastic serving must send. Default: everyone is served."),
    ] = None

    generate: GenerationSettings = dataclasses.field(default_factory=GenerationSettings)
    http: Annotated[
        str | None,
        Option(
            help="HOST:PORT for HTTP: OpenAI's interface to the language model, and the Open Inference Protocol for "
            "image tasks. Default: gRPC only."
        ),
    ] = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.elastic_model is not None and self.elastic_variants is not None:
            raise ValueError("give --elastic-model or --elastic-variants, not both")
        if self.release is None and not self.serves_images and not self.generate.served:
            raise ValueError(
                "nothing to serve: give --release, --elastic-model, --elastic-variants, --generate-model or several"
            )
        if self.http is not None and not self.generate.served and not self.serves_images:
            raise ValueError("--http is for models: give --elastic-model, --elastic-variants or --generate-model too")
        both = self.serves_images and self.generate.served
        if both and (self.elastic_key_file is None) != (self.generate.key_file is None):
            raise ValueError("gRPC reaches both models: give --elastic-key-file and --generate-key-file, or neither")
        if self.workers > 1 and self.database_url.startswith("sqlite"):
            raise ValueError("several workers need --database postgresql://...; on SQLite there is one")
        cluster.check_name(self.executor)
        clusters = {name for name in (self.executor, self.generate.executor) if cluster.is_ray(name)}
        both = cluster.is_ray(self.executor) and cluster.is_ray(self.generate.executor)
        if both and self.elastic_model is not None and (len(clusters) > 1 or cluster.LOCAL in clusters):
            raise ValueError(
                "a server is on one Ray cluster: start one with 'ray start --head', and give its ray://HOST:PORT to "
                "--executor and --generate-executor"
            )
        host, port = split_listen(self.listen)
        http_host, http_port = split_listen(self.http) if self.http is not None else (host, port)
        metrics_host, metrics_port = split_listen(self.metrics_listen or "127.0.0.1:0")
        _, health_port = split_listen(self.health_listen or "127.0.0.1:0")
        if self.metrics_listen is not None and self.metrics_port is not None:
            raise ValueError("give --metrics-port (loopback) or --metrics-listen, not both")
        if not is_loopback(metrics_host) and (self.tls_cert is None or self.tls_client_ca is None):
            raise ValueError("metrics beyond loopback need --tls-cert, --tls-key and --tls-client-ca")
        ports = (("listen", port), ("http", http_port), ("metrics", metrics_port), ("health", health_port))
        for name, each in ports:
            if not 0 <= each <= 65_535:
                raise ValueError(f"{name}: no such port: {each}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("TLS needs both --tls-cert and --tls-key")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls-client-ca needs --tls-cert and --tls-key")
        host = next((each for each in (host, http_host) if not is_loopback(each)), host)
        if not is_loopback(host):
            missing = [
                option
                for option, given in (
                    ("--tls-cert and --tls-key", self.tls_cert is not None),
                    ("--enrolment-key-file", self.enrolment_key_file or self.release is None),
                    ("--elastic-key-file", self.elastic_key_file or not self.serves_images),
                    ("--generate-key-file", self.generate.key_file or not self.generate.served),
                )
                if not given
            ]
            if missing:
                raise ValueError(
                    f"{host} can be reached from other machines, so the server also needs {' and '.join(missing)}. "
                    "Give these, or listen on 127.0.0.1."
                )

    @property
    def serves_images(self) -> bool:
        """Whether a model, or a folder of variants, for image tasks is named."""
        return self.elastic_model is not None or self.elastic_variants is not None

    @property
    def elastic(self) -> "ElasticSettings | None":
        """The settings of elastic serving; None if no model is named."""
        from isthmus.cloud.elastic.serve.settings import ElasticSettings

        if not self.serves_images:
            return None
        own = ("model", "state", "executor")
        names = [field.name for field in dataclasses.fields(ElasticSettings) if field.name not in own]
        of_elastic = {name: getattr(self, f"elastic_{name}") for name in names}
        return ElasticSettings(model=self.elastic_model or "", state=self.state, executor=self.executor, **of_elastic)

    @property
    def database_url(self) -> str:
        if self.database is not None:
            return self.database
        return f"sqlite:///{self.state.absolute() / 'isthmus.db'}"

    @property
    def artefacts_url(self) -> str:
        return self.artefacts if self.artefacts is not None else str(self.state.absolute() / "artefacts")

    @property
    def work_dir(self) -> Path:
        return self.state / "work"

    @property
    def signing_key_path(self) -> Path:
        return self.signing_key_file or self.state / "signing_key"

    def to_json(self) -> str:
        """Return everything, secrets included: for the pipe to the worker, never for a log."""
        return json.dumps(to_plain(self))

    @staticmethod
    def from_json(text: str) -> "CloudSettings":
        """Return the settings of which ``to_json`` made the text."""
        return from_plain(CloudSettings, json.loads(text))

    def enrolment_key(self) -> str | None:
        """Return the key that devices must send; None if they need none.

        Raises ValueError for a file without a key, OSError for a file that cannot be read.
        """
        return key_in(self.enrolment_key_file)

    def elastic_key(self) -> str | None:
        """Return the key that clients of elastic serving must send; None if they need none.

        Raises ValueError for a file without a key, OSError for a file that cannot be read.
        """
        return key_in(self.elastic_key_file)

    def generate_key(self) -> str | None:
        """Return the key that clients of the language model must send; None if they need none.

        Raises ValueError for a file without a key, OSError for a file that cannot be read.
        """
        return key_in(self.generate.key_file)


def split_listen(listen: str) -> tuple[str, int]:
    """Split "[::1]:50051" into ("::1", 50051). Raises ValueError."""
    host, colon, port = listen.rpartition(":")
    if not colon or not host or not port.isdecimal():
        raise ValueError(f"listen: {listen!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def joined(host: str, port: int) -> str:
    """Return "[::1]:50051" for an IPv6 address and "127.0.0.1:50051" for any other host: the way clients take it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
