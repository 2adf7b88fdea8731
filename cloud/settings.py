"""The service's settings: from the command line, else from ISTHMUS_CLOUD_<NAME> in the environment."""

import dataclasses
import ipaddress
import json
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from isthmus.cloud.elastic.serve.settings import ElasticSettings, NumberTypeChoice


class CloudSettings(BaseSettings):
    """Checked when made: a server that would be unsafe to start never gets its settings (pydantic.ValidationError)."""

    model_config = SettingsConfigDict(env_prefix="ISTHMUS_CLOUD_", frozen=True, extra="forbid")

    release: Path | None = None
    """Folder made by ``isthmus distill``; without one the server has no devices, and needs ``elastic_model``."""
    state: Path
    """Folder for the signing key, the embedded database, students and unfinished jobs."""
    listen: str = "127.0.0.1:0"
    """HOST:PORT; port 0 takes a free one."""
    database: SecretStr | None = None
    """SQLAlchemy URL; default: an SQLite file in ``state``. Secret, since it may hold a password."""
    artefacts: str | None = None
    """fsspec URL for students' files; default: a folder in ``state``."""
    enrolment_key_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    port_file: Path | None = None
    metrics_port: int | None = Field(default=None, ge=0, le=65_535)
    """Prometheus metrics on this port of loopback; none by default."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    workers: int = Field(default=1, ge=0, le=1)
    """0: answer devices, but let personalisations wait."""
    worker_threads: int | None = Field(default=None, ge=1)
    """Threads of the worker's arithmetic; the learning library's choice by default."""
    max_devices: int = Field(default=10_000, ge=1)
    max_queued_jobs: int = Field(default=100, ge=1)
    max_calls: int = Field(default=1_000, ge=1)
    """Calls in progress over all devices."""
    max_calls_per_device: int = Field(default=16, ge=1)
    cached_heads: int = Field(default=64, ge=1)
    """Students whose heads are kept in memory."""
    keep_students: int = Field(default=3, ge=1)
    """Newest students kept for each device."""
    awaiting_timeout_s: float = Field(default=7 * 24 * 3600.0, gt=0)
    """How long a job waits for its device's next prototypes before it is given up."""
    watch_interval_s: float = Field(default=0.2, gt=0)

    elastic_model: str | None = None
    """Elastic serving: a safetensors file with timm's weights of a ViT, or a name that timm knows. None: none."""
    elastic_pixels: str | None = None
    """Mean and deviation with which the model reads pictures, by name; for a name of timm's they are known."""
    elastic_profile: Path | None = None
    """What ``isthmus elastic profile`` wrote; default: a file in ``state``."""
    elastic_measure: bool = False
    """Measure this machine at the start, and keep that as the profile."""
    elastic_policy: str = ElasticSettings.policy
    elastic_device: str = "cpu"
    elastic_threads: int = Field(default=1, ge=1)
    elastic_number_type: NumberTypeChoice = "auto"
    """auto: the profile's; where the machine is measured, the quicker one that answers alike."""
    elastic_compiler: str | None = None
    elastic_memory_bytes: int | None = Field(default=None, ge=1)
    """A batch that is predicted to need more is split."""
    elastic_max_waiting: int = Field(default=1_024, ge=1)
    """Images that may wait for a batch; further ones are refused."""
    elastic_warm: Path | None = None
    """Folder of warmed models (``isthmus elastic warmup``): each batch of their task runs on the best for its gamma."""
    elastic_warm_bytes: int | None = Field(default=None, ge=1)
    """Memory for warmed models; the one used longest ago makes room. Default: room for all."""
    elastic_key_file: Path | None = None
    """File with the key that clients of elastic serving show; without one, whoever reaches the server is served."""

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
        """Everything, secrets included: for the pipe to the worker, never for a log."""
        values = self.model_dump(mode="json", exclude={"database"})
        if self.database is not None:
            values["database"] = self.database.get_secret_value()
        return json.dumps(values)

    def enrolment_key(self) -> str | None:
        """Raises ValueError for an empty file, OSError for one that cannot be read."""
        return _key(self.enrolment_key_file)

    def elastic_key(self) -> str | None:
        """Raises ValueError for an empty file, OSError for one that cannot be read."""
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
    """("::1", 50051) of "[::1]:50051". Raises ValueError."""
    host, colon, port = listen.rpartition(":")
    if not colon or not host or not port.isdecimal():
        raise ValueError(f"listen: {listen!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
