"""Reads the ``config.json`` that timm and the hub keep beside a checkpoint. It says what the weights cannot.

    {"architecture": "vit_small_patch16_224", "model_args": {"num_heads": 12}, "global_pool": "token",
     "num_classes": 10, "label_names": ["airplane", ...],
     "pretrained_cfg": {"mean": [...], "std": [...], "interpolation": "bicubic", "crop_pct": 0.9}}

Every part may be missing. What is there and cannot be served is refused by its name; nothing is skipped silently.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from isthmus.data.files import read_text
from isthmus.data.images import Triple

FILE: Final = "config.json"
MAX_BYTES: Final = 8 << 20
MAX_OPTION: Final = 1 << 20
"""No number among a model's options is larger."""
OPTIONS: Final = frozenset(
    {
        *("img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth", "num_heads"),
        *("mlp_ratio", "qkv_bias", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "proj_bias", "init_values"),
        *("class_token", "pos_embed", "no_embed_class", "reg_tokens", "pre_norm", "final_norm", "fc_norm"),
        *("pool_include_prefix", "norm_layer", "act_layer", "embed_norm_layer", "attn_layer"),
    }
)
"""Options of timm's VisionTransformer that change what it computes and can be written in JSON."""
WITHOUT_EFFECT: Final = frozenset(
    {
        *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
        *("weight_init", "fix_init", "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "pretrained_strict"),
        *("scriptable", "exportable"),
    }
)
"""Options that have no effect on a trained model in evaluation at the size of its position embedding."""


class BadConfiguration(ValueError):
    """A configuration that cannot be read, or asks for something that is not supported. The message names it."""


@dataclass(frozen=True)
class Configuration:
    """What ``config.json`` says. ``path`` is the file; None: there is none, and all else is empty.

    ``options`` are arguments of timm's VisionTransformer. ``crop_share`` is the share of the picture's shorter side
    that the model sees, ``interpolation`` how pictures are resized to it.
    """

    path: Path | None = None
    architecture: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    classes: int | None = None
    labels: tuple[str, ...] = ()
    mean: Triple | None = None
    deviation: Triple | None = None
    crop_share: float | None = None
    interpolation: str | None = None


def beside(weights: Path) -> Configuration:
    """Reads the configuration beside a file of weights. Raises BadConfiguration."""
    path = weights.parent / FILE
    if not path.is_file():
        return Configuration()
    try:
        raw = json.loads(read_text(path, limit_bytes=MAX_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise BadConfiguration(f"{path} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise BadConfiguration(f"{path} is not a JSON object")
    try:
        return of_json(raw, path)
    except BadConfiguration as error:
        raise BadConfiguration(f"{path}: {error}") from error


def of_json(raw: Mapping[str, Any], path: Path | None = None) -> Configuration:
    """Checks the parts of a configuration. Raises BadConfiguration for a part that is wrong or not supported."""
    pictures = raw.get("pretrained_cfg", raw)
    if not isinstance(pictures, Mapping):
        raise BadConfiguration("pretrained_cfg is not an object")
    architecture = raw.get("architecture", pictures.get("architecture"))
    if architecture is not None and not (isinstance(architecture, str) and 0 < len(architecture) <= 200):
        raise BadConfiguration("architecture must be one of timm's names")
    options = _options(raw.get("model_args") or {})
    if "global_pool" not in options and raw.get("global_pool") is not None:
        options["global_pool"] = str(raw["global_pool"])
    mean, deviation = (
        None if pictures.get(name) is None else _triple(name, pictures[name]) for name in ("mean", "std")
    )
    mode = pictures.get("crop_mode", "center")
    if mode != "center":
        raise BadConfiguration(f"crop_mode {mode!r} is not supported, only 'center'")
    return Configuration(
        path,
        architecture,
        options,
        _whole("num_classes", raw.get("num_classes")),
        _labels({**pictures, **raw}),
        mean,
        deviation,
        _crop(pictures.get("crop_pct")),
        _interpolation(pictures.get("interpolation")),
    )


def _options(raw: Any) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise BadConfiguration("model_args is not an object")
    found: dict[str, Any] = {}
    for name, value in raw.items():
        if name in WITHOUT_EFFECT or value is None:
            continue
        if name not in OPTIONS:
            raise BadConfiguration(f"model_args: {str(name)[:100]!r} is not supported")
        if name in ("img_size", "patch_size") and isinstance(value, list | tuple):
            if len(set(map(str, value))) != 1:
                raise BadConfiguration(f"model_args: {name} {value} is not square, which is not supported")
            value = value[0]
        if not isinstance(value, bool | int | float | str) or (not isinstance(value, str) and abs(value) > MAX_OPTION):
            raise BadConfiguration(f"model_args: {name} {str(value)[:100]!r} is not supported")
        found[name] = value
    return found


def _triple(name: str, raw: Any) -> Triple:
    try:
        red, green, blue = (float(value) for value in raw)
    except (TypeError, ValueError) as error:
        raise BadConfiguration(
            f"{name} must be three numbers, for red, green and blue, not {str(raw)[:100]}"
        ) from error
    return red, green, blue


def _whole(name: str, raw: Any) -> int | None:
    if raw is None:
        return None
    if not isinstance(raw, int) or not 0 <= raw <= MAX_OPTION:
        raise BadConfiguration(f"{name} must be a whole number, not {str(raw)[:100]!r}")
    return raw


def _labels(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of the classes: their descriptions if there are any, made distinct by the names beside them."""
    names, descriptions = raw.get("label_names") or (), raw.get("label_descriptions") or {}
    names = list(names.values()) if isinstance(names, Mapping) else names
    if not isinstance(names, list | tuple) or len(names) > MAX_OPTION or not isinstance(descriptions, Mapping):
        raise BadConfiguration("label_names must be a list of names, and label_descriptions an object")
    said = [str(descriptions.get(name, name)) for name in names]
    counts = Counter(said)
    return tuple(
        text if counts[text] == 1 or text == str(name) else f"{text} ({name})"
        for text, name in zip(said, names, strict=True)
    )


def _crop(raw: Any) -> float | None:
    if raw is None:
        return None
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not 0 < raw <= 1:
        raise BadConfiguration(f"crop_pct {raw!r} is not supported, only a share above 0 and up to 1")
    return float(raw)


def _interpolation(raw: Any) -> str | None:
    if raw is None:
        return None
    if raw not in ("bicubic", "bilinear", "lanczos", "nearest"):
        raise BadConfiguration(f"interpolation {raw!r} is not supported, only bicubic, bilinear, lanczos and nearest")
    return str(raw)
