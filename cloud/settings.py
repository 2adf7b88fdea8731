"""The service's settings, from the command line or else from ISTHMUS_CLOUD_<NAME> in the environment."""

import dataclasses
import ipaddress
import json
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from isthmus.cloud.elastic.serve.settings import ElasticSettings, NumberTypeChoice


class CloudSettings(BaseSettings):
    """All settings, validated on creation: unsafe settings raise pydantic.ValidationError, so no server gets them.

    >>> CloudSettings(release=Path("release"), state=Path("state")).listen
    '127.0.0.1:0'
    >>> CloudSettings(release=Path("release"), state=Path("state"), listen="0.0.0.0:50051")
    Traceback (most recent call last):
        ...
    pydantic_core._pydantic_core.ValidationError: ...
    """

    model_config = SettingsConfigDict(env_prefix="ISTHMUS_CLOUD_", frozen=True, extra="forbid")

    release: Path | None = None
    """Folder made by ``isthmus distill``. Without one the server serves no devices and needs ``elastic_model``."""
    state: Path
    """Folder for the signing key, the embedded database, students and unfinished jobs."""
    listen: str = "127.0.0.1:0"
    """HOST:PORT; port 0 chooses a free port."""
    database: SecretStr | None = None
    """SQLAlchemy URL. Default: an SQLite file in ``state``. Secret, because it may hold a password."""
    artefacts: str | None = None
    """fsspec URL for students' files. Default: a folder in ``state``."""
    enrolment_key_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    port_file: Path | None = None
    metrics_port: int | None = Field(default=None, ge=0, le=65_535)
    """Port on loopback for Prometheus metrics. Default: no metrics."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    workers: int = Field(default=1, ge=0, le=1)
    """0: answer devices, but run no personalisations."""
    worker_threads: int | None = Field(default=None, ge=1)
    """Compute threads of the worker. Default: chosen by the learning library."""
    max_devices: int = Field(default=10_000, ge=1)
    max_queued_jobs: int = Field(default=100, ge=1)
    max_calls: int = Field(default=1_000, ge=1)
    """Calls in progress over all devices. Calls count once their caller is known."""
    max_connections: int = Field(default=4_096, ge=1)
    """Open connections, of known and unknown callers. The limit of open files is raised to fit."""
    max_calls_per_device: int = Field(default=16, ge=1)
    cached_heads: int = Field(default=64, ge=1)
    """Number of students whose heads are kept in memory."""
    keep_students: int = Field(default=3, ge=1)
    """Number of students kept per device, newest first."""
    awaiting_timeout_s: float = Field(default=7 * 24 * 3600.0, gt=0)
    """How long a job waits for its device's next prototypes before it fails."""
    watch_interval_s: float = Field(default=0.2, gt=0)

    elastic_model: str | None = None
    """Elastic serving: a safetensors file with timm's weights of a ViT, or a timm model name. None: off."""
    elastic_pixels: str | None = None
    """Mean and deviation with which the model reads pictures, by name. For a timm model name they are known."""
    elastic_profile: Path | None = None
    """Profile written by ``isthmus elastic profile``. Default: a file in ``state``."""
    elastic_measure: bool = False
    """Measure this machine at the start and save the result as the profile."""
    elastic_policy: str = ElasticSettings.policy
    elastic_device: str = "cpu"
    elastic_threads: int = Field(default=1, ge=1)
    elastic_number_type: NumberTypeChoice = "auto"
    """auto: the profile's number type. When the machine is measured: the fastest type with the same answers."""
    elastic_compiler: str | None = None
    elastic_memory_bytes: int | None = Field(default=None, ge=1)
    """Memory limit of a batch. A batch that is predicted to need more is split."""
    elastic_max_waiting: int = Field(default=1_024, ge=1)
    """Number of images that may wait for a batch. Further images are refused."""
    elastic_warm: Path | None = None
    """Folder of warmed models (``isthmus elastic warmup``). Each batch of their task runs on the best for its gamma."""
    elastic_warm_bytes: int | None = Field(default=None, ge=1)
    """Memory for warmed models; the least recently used is dropped first. Default: room for all."""
    elastic_key_file: Path | None = None
    """File with the key that clients of elastic serving must send. Default: everyone is served."""

    @model_validator(mode="after")
    def _safe(self) -> Self:
        if self.release is None and self.elastic_model is None:
            raise ValueError("nothing to serve: give --release, --elastic-model or both")
        host, port = split_listen(self.listen)
        if not 0 <= port <= 65_535:
            raise ValueError(f"listen: no such port: {port}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("TLS needs both --tls-cert and --tls-key")
        if not is_loopback(host):
            missing = [
                option
                for option, given in (
                    ("--tls-cert and --tls-key", self.tls_cert is not None),
                    ("--enrolment-key-file", self.enrolment_key_file or self.release is None),
                    ("--elastic-key-file", self.elastic_key_file or self.elastic_model is None),
                )
                if not given
            ]
            if missing:
                raise ValueError(
                    f"{host} can be reached from other machines, so the server also needs {' and '.join(missing)}. "
                    "Give these, or listen on 127.0.0.1."
                )
        return self

    @property
    def elastic(self) -> ElasticSettings | None:
        """The settings of elastic serving; None if no model is named."""
        if self.elastic_model is None:
            return None
        return ElasticSettings(
            model=self.elastic_model,
            state=self.state,
            **{name: getattr(self, f"elastic_{name}") for name in _ELASTIC},
        )

    @property
    def database_url(self) -> str:
        if self.database is not None:
            return self.database.get_secret_value()
        return f"sqlite:///{self.state.absolute() / 'isthmus.db'}"

    @property
    def artefacts_url(self) -> str:
        return self.artefacts if self.artefacts is not None else str(self.state.absolute() / "artefacts")

    @property
    def work_dir(self) -> Path:
        return self.state / "work"

    @property
    def signing_key_path(self) -> Path:
        return self.state / "signing_key"

    def to_json(self) -> str:
        """Return all settings, secrets included. For the pipe to the worker, never for a log."""
        values = self.model_dump(mode="json", exclude={"database"})
        if self.database is not None:
            values["database"] = self.database.get_secret_value()
        return json.dumps(values)

    def enrolment_key(self) -> str | None:
        """Read the enrolment key. Raises ValueError if the file is empty, OSError if it cannot be read."""
        return _key(self.enrolment_key_file)

    def elastic_key(self) -> str | None:
        """Read the key of elastic serving. Raises ValueError if the file is empty, OSError if it cannot be read."""
        return _key(self.elastic_key_file)


_ELASTIC = [field.name for field in dataclasses.fields(ElasticSettings) if field.name not in ("model", "state")]


def _key(file: Path | None) -> str | None:
    if file is None:
        return None
    key = file.read_text().strip()
    if not key:
        raise ValueError(f"{file} holds no key")
    return key


def split_listen(listen: str) -> tuple[str, int]:
    """Split "[::1]:50051" into ("::1", 50051). Raises ValueError."""
    host, colon, port = listen.rpartition(":")
    if not colon or not host or not port.isdecimal():
        raise ValueError(f"listen: {listen!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
