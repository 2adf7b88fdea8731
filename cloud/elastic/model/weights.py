"""timm's vision transformers by file or by name, and what is known of how they read pictures."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from isthmus.cloud.elastic.model.timm_import import VisionTransformer, VisionTransformerDistilled, create_model
from isthmus.data.files import not_the_file, read_text
from isthmus.data.images import STATISTICS, PixelSpec

Shapes = Mapping[str, tuple[int, ...]]


class ModelError(ValueError):
    """A model that cannot be had, and why."""


def load_vit(source: str | Path, *, heads: int | None = None, random: bool = False) -> VisionTransformer:
    """A ViT in evaluation mode, from a safetensors file with timm's names of weights, or by a name that timm knows.

    A file says all of the architecture but the number of heads, which is width / 64 unless given. ``random`` takes a
    name's architecture without its weights: for measurements of speed, nothing is fetched.
    Raises ModelError for a file that is missing, damaged or of another architecture, and for a name that timm does not
    know or cannot fetch.

    >>> vit = load_vit("vit_tiny_patch16_224", random=True)  # or the path of a safetensors file
    >>> vit.embed_dim, len(vit.blocks)
    (192, 12)
    """
    path = Path(source)
    if path.suffix == ".safetensors" or path.is_file():
        return _from_file(path, heads)
    try:
        vit = create_model(str(source), pretrained=not random)
    except Exception as error:  # timm and the hub raise many kinds; all mean that the model cannot be had
        raise ModelError(f"timm has no model {str(source)!r}, or its weights cannot be fetched: {error}") from error
    if not isinstance(vit, VisionTransformer):
        raise ModelError(f"{source} is a {type(vit).__name__}, no vision transformer")
    return vit.eval()


def pixel_spec(vit: VisionTransformer, source: str | Path, statistics: str | None = None) -> PixelSpec:
    """How the model reads pictures. ``statistics`` names the mean and deviation (see data.images.STATISTICS); without,
    they are timm's for a name, and for a file those of a ``config.json`` beside it, as the hub keeps them.

    Raises ModelError where nothing tells them.
    """
    size_px = int(vit.patch_embed.img_size[0])
    if statistics is not None:
        if statistics not in STATISTICS:
            raise ModelError(f"pixel statistics {statistics!r}; known are {', '.join(STATISTICS)}")
        return PixelSpec(size_px, *STATISTICS[statistics])
    path = Path(source)
    config: Any = vit.pretrained_cfg
    if path.suffix == ".safetensors" or path.is_file():
        config = _config_beside(path)
    try:
        red, green, blue = (float(value) for value in config["mean"])
        red_dev, green_dev, blue_dev = (float(value) for value in config["std"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"nothing says how {path.name} reads pictures: name its mean and deviation ({', '.join(STATISTICS)})"
        ) from error
    return PixelSpec(size_px, (red, green, blue), (red_dev, green_dev, blue_dev))


def _config_beside(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(read_text(path.parent / "config.json"))
    except (OSError, ValueError):
        return {}
    config = found.get("pretrained_cfg", found) if isinstance(found, dict) else {}
    return config if isinstance(config, dict) else {}


def _from_file(path: Path, heads: int | None) -> VisionTransformer:
    try:
        reason = not_the_file(path)
        if reason is not None:
            raise ModelError(f"{path.name} {reason}")
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            vit = vit_of_shapes({name: tuple(file.get_slice(name).get_shape()) for name in names}, heads)
            vit.load_state_dict({name: file.get_tensor(name) for name in names})
    except FileNotFoundError as error:
        raise ModelError(f"there is no file {path}") from error
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path.name} is no safetensors file, or damaged: {error}") from error
    except (KeyError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        raise ModelError(f"{path.name} does not hold the weights of one of timm's plain ViTs: {error}") from error
    return vit.eval()


def vit_of_shapes(shapes: Shapes, heads: int | None) -> VisionTransformer:
    """The model that weights of these names and shapes belong to, without the weights.

    Raises KeyError, RuntimeError, AssertionError or ZeroDivisionError for shapes of no such model.
    """
    kind = VisionTransformerDistilled if "dist_token" in shapes else VisionTransformer
    return kind(**_architecture(shapes, heads))


def _architecture(shapes: Shapes, heads: int | None) -> dict[str, Any]:
    """The options of timm's VisionTransformer that these weights belong to. Raises KeyError where one is missing."""
    width, channels, patch_px, _ = shapes["patch_embed.proj.weight"]
    blocks = {int(found[1]) for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name))}
    depth = len(blocks)
    if blocks != set(range(depth)):  # else a name alone could ask for any number of them
        raise KeyError("blocks are missing")
    prefix = sum(shapes[name][-2] for name in ("cls_token", "dist_token", "reg_token") if name in shapes)
    positions = shapes["pos_embed"][-2]
    covers_prefix = math.isqrt(positions - prefix) ** 2 == positions - prefix
    side = math.isqrt(positions - prefix if covers_prefix else positions)
    first = "blocks.0."
    return {
        "img_size": side * patch_px,
        "patch_size": patch_px,
        "in_chans": channels,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads or max(1, width // 64),
        "mlp_ratio": shapes[first + "mlp.fc1.weight"][0] / width,
        "qkv_bias": first + "attn.qkv.bias" in shapes,
        "qk_norm": first + "attn.q_norm.weight" in shapes,
        "init_values": 1.0 if first + "ls1.gamma" in shapes else None,
        "class_token": "cls_token" in shapes,
        "no_embed_class": not covers_prefix,
        "reg_tokens": shapes["reg_token"][-2] if "reg_token" in shapes else 0,
        "pre_norm": "norm_pre.weight" in shapes,
        "fc_norm": "fc_norm.weight" in shapes,
        "num_classes": shapes["head.weight"][0] if "head.weight" in shapes else 0,
        "weight_init": "skip",
    }
