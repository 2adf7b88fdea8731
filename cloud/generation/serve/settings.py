"""What generation is started with. Free of torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from isthmus.cloud.generation.policies.by_name import DEFAULT_POLICY


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of generation. Raises ValueError for a policy that only serves comparisons."""

    model: Path
    """Model directory: config.json, safetensors, tokenizer.json."""
    name: str | None = None
    """Name of the model for clients. None: the directory's."""
    profile: Path | None = None
    """The file that ``isthmus generate profile`` wrote. None: the machine is measured briefly at the start."""
    policy: str = DEFAULT_POLICY
    layout: Literal["slots", "paged", "padded"] = "slots"
    number_type: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    threads: int = 1
    rows: int = 32
    """Requests that may have tokens in the KV cache."""
    kv_tokens: int = 16_384
    """Tokens that the KV cache holds, over all requests."""
    swap_tokens: int = 0
    """Tokens of preempted requests that are kept beside the KV cache. 0: they are computed again."""
    swap_folder: Path | None = None
    """Where they are kept, as files that are mapped into memory. None: in memory."""
    max_tokens: int = 1_024
    """Longest answer that a client may ask for."""
    max_waiting: int = 256
    """Requests that may be under way. Further ones are refused."""

    def __post_init__(self) -> None:
        if self.policy in ("static", "magnus"):
            raise ValueError(f"the policy '{self.policy}' computes rows that nobody needs; it is for simulations alone")
        if self.swap_tokens and self.layout != "slots":
            raise ValueError("only the layout 'slots' can be swapped; leave the swap pool out, or give that layout")
        if self.swap_folder is not None and not self.swap_tokens:
            raise ValueError("a folder for the swap pool needs the pool's number of tokens, too")
