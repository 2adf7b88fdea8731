"""What elastic serving is started with, and the names that a caller may choose among. Free of torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from isthmus.cloud.elastic.policies.by_name import DEFAULT_POLICY

NumberTypeChoice = Literal["auto", "float32", "bfloat16", "int8"]
"""``auto``: the profile's number type. When the machine is measured: the fastest one that keeps the answers."""

PROFILE_FILE: Final = "elastic_profile.json"
"""Name of the profile in the state folder, if no profile is named."""


@dataclass(frozen=True)
class ElasticSettings:
    """Settings of elastic serving. ``isthmus.cloud.settings`` reads them from the command line and the environment."""

    model: str
    """A safetensors file with timm's weights of a ViT, or the name of a timm model. "": there are ``variants``."""
    state: Path
    """Folder in which a measured profile is kept if ``profile`` is None."""
    pixels: str | None = None
    """Mean and deviation with which the model reads pictures, by name. Known for the name of a timm model."""
    profile: Path | None = None
    """The file that ``isthmus elastic profile`` wrote. None: ``PROFILE_FILE`` in ``state``."""
    measure: bool = False
    """Measure this machine at start-up and keep the result as the profile."""
    policy: str = DEFAULT_POLICY
    device: str = "auto"
    """"cpu", "cuda", or "auto": where the profile was measured, or a GPU if the machine is measured and has one."""
    threads: int = 1
    number_type: NumberTypeChoice = "auto"
    compiler: str | None = None
    memory_bytes: int | None = None
    """A batch that is predicted to need more memory than this is split."""
    max_waiting: int = 1_024
    """Images that may wait for a batch. Further images are refused."""
    executors: int = 1
    """Batches that run at once, each on a copy of the model with ``threads``."""
    most_executors: int | None = None
    """If the load asks for more executors than ``executors``, up to this many are started. None: never."""
    executor: str = "thread"
    """Where they run: "thread" of the server, "process" of their own, "ray", or "ray://HOST:PORT" (``cluster.py``)."""
    warm: Path | None = None
    """Folder of warmed models (``isthmus elastic warmup``): each batch of their task runs on the best for its gamma."""
    warm_bytes: int | None = None
    """Memory for warmed models; the model unused for longest is dropped first. None: room for all."""
    variants: Path | None = None
    """Folder of models of several sizes per task (``isthmus elastic variants``), in the place of ``model``."""
    expert_bytes: int | None = None
    """Memory for the experts of each executor; the expert unused for longest is dropped first. None: room for all that
    registered tasks may use."""

    @property
    def profile_path(self) -> Path:
        return self.profile or self.state / PROFILE_FILE
