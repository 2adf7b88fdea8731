"""Reads ``config.json`` of a Llama-shaped model directory, and refuses by name what the forward does not compute.

Llama-shaped: pre-norm blocks with RMSNorm, rotary embeddings, grouped-query attention and a SiLU-gated MLP. Llama,
SmolLM2, Mistral and Qwen2 are.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from isthmus.data.files import read_text
from isthmus.proto.errors import InvalidInput

CONFIG: Final = "config.json"
GENERATION_CONFIG: Final = "generation_config.json"
MAX_CONFIG_BYTES: Final = 4 << 20
ARCHITECTURES: Final = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
"""Model types that are served, and their class in config.json."""
_MOST: Final = {
    "vocab_size": 1 << 20,
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 18,
    "num_hidden_layers": 1_024,
    "num_attention_heads": 1_024,
    "max_position_embeddings": 1 << 24,
}
"""Bounds that are checked before anything is allocated."""


class ModelDirectoryError(InvalidInput):
    """A model directory that cannot be served. The message names the file and the way out."""


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base ``theta``; ``kind`` is default, linear or llama3, with that kind's settings."""

    theta: float
    kind: str = "default"
    settings: Mapping[str, float] = field(default_factory=dict)

    def scaled(self, frequencies: Sequence[float]) -> list[float]:
        """Returns the angle per position of each pair of dimensions, from those without scaling.

        ``linear`` divides all of them by ``factor``. ``llama3`` divides the long wavelengths by ``factor``, keeps the
        short ones and blends between, as Llama 3.1 was trained.
        """
        if self.kind == "linear":
            return [each / self.settings["factor"] for each in frequencies]
        if self.kind == "llama3":
            return [self._blended(each) for each in frequencies]
        return list(frequencies)

    def _blended(self, frequency: float) -> float:
        low, high = self.settings["low_freq_factor"], self.settings["high_freq_factor"]
        turns = self.settings["original_max_position_embeddings"] * frequency / (2 * math.pi)
        keep = min(1.0, max(0.0, (turns - low) / (high - low)))
        return frequency * (keep + (1 - keep) / self.settings["factor"])


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model. ``context`` is the largest number of tokens of a prompt and its answer together."""

    kind: str
    vocabulary: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    norm_epsilon: float
    rope: Rope
    tied: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    end_ids: tuple[int, ...] = ()
    """Tokens that end an answer."""

    @property
    def kv_values_per_token(self) -> int:
        """The number of values that one token keeps in the KV cache, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @staticmethod
    def read(folder: Path) -> "LlamaConfig":
        """Reads config.json and, if there is one, generation_config.json.

        Raises ModelDirectoryError for a missing file, an architecture that is not served, or impossible sizes.
        """
        raw = read_json(folder, CONFIG)
        further = read_json(folder, GENERATION_CONFIG) if (folder / GENERATION_CONFIG).is_file() else {}
        try:
            return _config(raw, further)
        except ModelDirectoryError:
            raise
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise ModelDirectoryError(f"{CONFIG}: {error!r} is missing or has a wrong value") from error


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Returns the object in a JSON file of the model directory. Raises ModelDirectoryError."""
    path = folder / name
    if not path.is_file():
        raise ModelDirectoryError(
            f"{folder.name} has no {name}; give a model directory as Hugging Face publishes them, or make one of a "
            "GGUF file with 'isthmus generate convert'"
        )
    try:
        found = json.loads(read_text(path, limit_bytes=MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise ModelDirectoryError(f"{name} is not readable as JSON") from error
    if not isinstance(found, dict):
        raise ModelDirectoryError(f"{name} holds no object")
    return found


def _config(raw: Mapping[str, Any], further: Mapping[str, Any]) -> LlamaConfig:
    kind = str(raw.get("model_type"))
    if kind not in ARCHITECTURES:
        raise ModelDirectoryError(
            f"{CONFIG}: the model type {kind[:64]!r} is not served; served are {', '.join(ARCHITECTURES)}"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelDirectoryError(f"{CONFIG}: hidden_act {str(raw['hidden_act'])[:32]!r} is not served, only 'silu'")
    if raw.get("use_sliding_window"):
        raise ModelDirectoryError(f"{CONFIG}: use_sliding_window is not served")
    for name, most in _MOST.items():
        if not 1 <= int(raw[name]) <= most:
            raise ModelDirectoryError(f"{CONFIG}: {name} must be from 1 to {most}, not {raw[name]}")
    heads = int(raw["num_attention_heads"])
    kv_heads = int(raw.get("num_key_value_heads") or heads)
    head_dim = int(raw.get("head_dim") or int(raw["hidden_size"]) // heads)
    if kv_heads < 1 or heads % kv_heads or not 2 <= head_dim <= 1_024 or head_dim % 2:
        raise ModelDirectoryError(f"{CONFIG}: {heads} heads, {kv_heads} key-value heads of {head_dim} do not fit")
    context = int(raw["max_position_embeddings"])
    window = raw.get("sliding_window") if kind == "mistral" else None
    ends = further.get("eos_token_id", raw.get("eos_token_id"))
    bias = bool(raw.get("attention_bias", False))
    return LlamaConfig(
        kind=kind,
        vocabulary=int(raw["vocab_size"]),
        width=int(raw["hidden_size"]),
        mlp_width=int(raw["intermediate_size"]),
        layers=int(raw["num_hidden_layers"]),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        # Within its window a sliding-window model attends to everything, as this forward does.
        context=context if window is None else min(context, int(window)),
        norm_epsilon=float(raw.get("rms_norm_eps", 1e-6)),
        rope=_rope(raw),
        tied=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=bias or kind == "qwen2",
        output_bias=bias and kind != "qwen2",
        mlp_bias=bool(raw.get("mlp_bias", False)),
        end_ids=() if ends is None else tuple(map(int, ends if isinstance(ends, list) else [ends])),
    )


def _rope(raw: Mapping[str, Any]) -> Rope:
    """Reads both spellings: ``rope_theta`` beside ``rope_scaling``, and ``rope_parameters`` with everything."""
    settings: Mapping[str, Any] = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = str(settings.get("rope_type", settings.get("type", "default")))
    theta = float(settings.get("rope_theta") or raw.get("rope_theta") or 10_000.0)
    if not 1 < theta < 1e12:
        raise ModelDirectoryError(f"{CONFIG}: rope_theta must be from 1 to 1e12, not {theta:g}")
    needed = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if kind not in needed:
        raise ModelDirectoryError(
            f"{CONFIG}: the rope type {kind[:32]!r} is not served; served are {', '.join(needed)}"
        )
    values = {name: float(settings[name]) for name in needed[kind]}
    if any(not 0 < value < 1e9 for value in values.values()):
        raise ModelDirectoryError(f"{CONFIG}: the settings of the rope type {kind!r} must be positive")
    return Rope(theta, kind, values)
