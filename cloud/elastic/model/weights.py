"""timm's vision transformers by file or by name, and what is known of how they read pictures.

A file of weights says most of an architecture by names and shapes. It does not say how many heads attention has, which
form of GELU the MLP uses, or how tokens are pooled. The ``config.json`` beside the file says it (configuration.py), or
the name of timm's architecture before it: ``vit_small_patch16_224=model.safetensors``. Only for the plain architecture
of Dosovitskiy et al. (2021) and DeiT, in widths that all of them give the same heads, is the file alone enough.
"""

import copy
import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from isthmus.cloud.elastic.experts import files
from isthmus.cloud.elastic.experts.layer import Experts, ExpertsMlp, InMemory
from isthmus.cloud.elastic.experts.shelf import Shelf
from isthmus.cloud.elastic.model.configuration import BadConfiguration, Configuration, beside, of_json
from isthmus.cloud.elastic.model.timm_import import (
    PatchEmbed,
    VisionTransformer,
    VisionTransformerDistilled,
    create_model,
    is_model,
)
from isthmus.data.files import not_the_file
from isthmus.data.images import STATISTICS, Crop, PixelSpec

log = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]

PREFIXES: Final = ("model.", "module.", "_orig_mod.")
"""What training wrappers put before every name of a weight."""
HEADS_OF_WIDTH: Final = {192: 3, 768: 12, 1024: 16}
"""Heads by width, for widths in which every published plain ViT has the same number. Width 384, for one, has not: DeiT
has 6 heads there, and MoCo v3 has 12."""


class ModelError(ValueError):
    """A model that is not available, cannot be read or is not supported. The message says why."""


def load_vit(
    source: str | Path, *, random: bool = False, on_shelf: bool = False, expert_bytes: int | None = None
) -> VisionTransformer:
    """Returns a ViT in evaluation mode.

    ``source`` is a safetensors file with timm's names of weights, ``ARCHITECTURE=FILE`` with timm's name of the
    architecture, a name that timm knows, or the folder of a model with experts (experts/files.py). With ``on_shelf``
    its experts are read when they are needed, and take at most ``expert_bytes``; else all are read now. With
    ``random``, a name's architecture gets random weights and nothing is fetched: this is for measurements of speed.
    Raises ModelError for a file that is missing, damaged, of another architecture or does not say enough, and for a
    name that timm does not know or cannot fetch.

    >>> vit = load_vit("vit_tiny_patch16_224", random=True)  # or the path of a safetensors file
    >>> vit.embed_dim, len(vit.blocks)
    (192, 12)
    """
    architecture, path = located(source)
    if path is not None:
        return _from_file(architecture, path, on_shelf, expert_bytes)
    try:
        vit = create_model(str(source), pretrained=not random)
    except Exception as error:  # timm and the hub raise many types; each means that the model is not available
        raise ModelError(f"timm has no model {str(source)!r}, or its weights cannot be fetched: {error}") from error
    if not isinstance(vit, VisionTransformer):
        raise ModelError(f"{source} is a {type(vit).__name__}, not a vision transformer of timm's plain kind")
    return vit.eval()


def located(source: str | Path) -> tuple[str | None, Path | None]:
    """Returns (timm's name of the architecture, the file of weights) of a source; both None for a name alone."""
    path = Path(source)
    if path.is_file():
        return None, path
    if path.is_dir():
        return None, path / files.BACKBONE
    name, sign, file = str(source).partition("=")
    if sign and re.fullmatch(r"[\w.]+", name):
        return name, Path(file)
    return None, path if path.suffix == ".safetensors" or os.sep in str(source) else None


def configuration_of(source: str | Path, vit: VisionTransformer) -> Configuration:
    """Returns the configuration beside a file, or timm's own for a name. Raises ModelError if it is not supported."""
    _, path = located(source)
    try:
        return of_json(cast(dict[str, Any], vit.pretrained_cfg)) if path is None else beside(path)
    except BadConfiguration as error:
        raise ModelError(str(error)) from error


def pixel_spec(vit: VisionTransformer, source: str | Path, statistics: str | None = None) -> PixelSpec:
    """Returns how the model reads pictures.

    ``statistics`` names the mean and deviation (see data.images.STATISTICS). Without it they are those of the
    configuration. Crop and interpolation are always those of the configuration, if there is one. Raises ModelError if
    nothing says the mean and deviation.
    """
    size_px = int(vit.patch_embed.img_size[0])
    if statistics is not None and statistics not in STATISTICS:
        raise ModelError(f"pixel statistics {statistics!r}; known are {', '.join(STATISTICS)}")
    found = configuration_of(source, vit)
    mean, deviation = STATISTICS[statistics] if statistics is not None else (found.mean, found.deviation)
    if mean is None or deviation is None:
        raise ModelError(
            f"nothing says how {Path(source).name} reads pictures: name its mean and deviation "
            f"({', '.join(STATISTICS)}), or put its config.json beside it"
        )
    return PixelSpec(size_px, mean, deviation, Crop(found.crop_share or 1.0, found.interpolation))


def class_names(vit: VisionTransformer, source: str | Path) -> tuple[str, ...]:
    """Returns the names of the classes of the model's own head, from its configuration; none if it does not say them.

    For ImageNet-1k models that timm names, they are timm's own. Raises ModelError.
    """
    labels = configuration_of(source, vit).labels
    if not labels and located(source)[1] is None:
        from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

        subset = infer_imagenet_subset(vit)
        if subset is not None:
            info = ImageNetInfo(subset)
            names = info.label_names()  # type: ignore[no-untyped-call]
            labels = of_json({"label_names": names, "label_descriptions": info.label_descriptions(as_dict=True)}).labels
    return labels if len(labels) == int(vit.num_classes) else ()


def like(vit: VisionTransformer, shapes: Shapes) -> VisionTransformer:
    """Returns a copy of a model without weights ("meta" tensors), with a head for the classes that ``shapes`` has.

    Raises KeyError or RuntimeError if ``shapes`` are not those of its weights.
    """
    made = _without_weights(vit)
    classes = shapes["head.weight"][0]
    if classes != made.num_classes:
        with torch.device("meta"):
            made.reset_classifier(classes)
    differences = _differences(made, shapes)
    if differences:
        raise RuntimeError("; ".join(differences))
    return made


def _without_weights(vit: VisionTransformer) -> VisionTransformer:
    empty: dict[int, Any] = {
        id(one): torch.nn.Parameter(torch.empty_like(one, device="meta"), requires_grad=one.requires_grad)
        for one in vit.parameters()
    }
    made: VisionTransformer = copy.deepcopy(vit, empty)
    return made


def _from_file(architecture: str | None, path: Path, on_shelf: bool, expert_bytes: int | None) -> VisionTransformer:
    try:
        experts = files.beside(path)
    except files.ExpertsError as error:
        raise ModelError(str(error)) from error
    try:
        reason = not_the_file(path)
        if reason is not None:
            raise ModelError(f"{path.name} {reason}")
        with safe_open(path, framework="pt") as file:
            names = _plain_names(path, list(file.keys()))
            shapes = {plain: tuple(file.get_slice(name).get_shape()) for plain, name in names.items()}
            if experts is not None:
                shapes |= _dense_shapes(experts)
            vit = _described(architecture, beside(path), shapes, path.name)
            tensors: dict[str, Tensor] = {plain: file.get_tensor(name) for plain, name in names.items()}
        if experts is not None:
            _take_out(vit, experts)
        vit.to_empty(device="cpu").load_state_dict(tensors)
        if experts is not None:
            _put_in(vit, experts, on_shelf, expert_bytes)
    except FileNotFoundError as error:
        raise ModelError(f"there is no file {path}") from error
    except (BadConfiguration, files.ExpertsError) as error:
        raise ModelError(str(error)) from error
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path.name} is not a safetensors file or is damaged: {error}") from error
    except (KeyError, RuntimeError, AssertionError, ZeroDivisionError, TypeError) as error:
        raise ModelError(f"{path.name} does not hold the weights of one of timm's plain ViTs: {error}") from error
    return vit.eval()


def _dense_shapes(experts: files.ExpertFiles) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the MLPs in whose place the experts are: with them, shapes describe the dense model."""
    made: dict[str, tuple[int, ...]] = {}
    for block in experts.blocks:
        first = f"blocks.{block}.mlp."
        made |= {f"{first}fc1.weight": (experts.units, experts.width), f"{first}fc1.bias": (experts.units,)}
        made |= {f"{first}fc2.weight": (experts.width, experts.units), f"{first}fc2.bias": (experts.width,)}
    return made


def _take_out(vit: VisionTransformer, experts: files.ExpertFiles) -> None:
    """Removes the dense MLPs of blocks with experts. Raises ModelError if there are not so many blocks."""
    blocks: list[Any] = list(vit.blocks)
    if experts.blocks[-1] >= len(blocks) or experts.width != vit.embed_dim:
        raise ModelError(
            f"{files.MANIFEST} is of another model: it names block {experts.blocks[-1]} of width {experts.width}"
        )
    for block in experts.blocks:
        blocks[block].mlp = torch.nn.Identity()


def _put_in(vit: Any, experts: files.ExpertFiles, on_shelf: bool, expert_bytes: int | None) -> None:
    """Gives blocks their experts. Raises ExpertsError if files are missing or damaged."""
    missing = experts.missing()
    if missing:
        more = f", and {len(missing) - 1} more files are not as they should be" if len(missing) > 1 else ""
        raise files.ExpertsError(f"{missing[0]}{more}; copy the model's folder again")
    shelf = Shelf(experts, limit_bytes=expert_bytes) if on_shelf else None
    for layer, block in enumerate(experts.blocks):
        source: Experts | None = shelf
        if shelf is None:
            source = InMemory(experts.load(layer, expert) for expert in range(experts.shape.experts))
        vit.blocks[block].mlp = ExpertsMlp(layer, experts.width, experts.hidden, experts.shape, source)
    vit.identity = experts.identity


def _plain_names(path: Path, names: list[str]) -> dict[str, str]:
    """Returns the names in the file by their names without the prefixes that all of them share."""
    taken = ""
    while names:
        prefix = next((one for one in PREFIXES if all(name.startswith(taken + one) for name in names)), None)
        if prefix is None:
            break
        taken += prefix
    if taken:
        log.warning("%s: the prefix %r of all names of weights was taken off", path.name, taken)
    return {name.removeprefix(taken): name for name in names}


def _described(architecture: str | None, found: Configuration, shapes: Shapes, name: str) -> VisionTransformer:
    """Returns the model, without weights, that a configuration or an architecture's name and the shapes describe.

    Raises ModelError, or KeyError, RuntimeError, AssertionError, ZeroDivisionError or TypeError for wrong shapes.
    """
    known = architecture or found.architecture
    if architecture is not None and found.architecture not in (None, architecture):
        raise ModelError(f"{name}: its config.json says {found.architecture!r}, not {architecture!r}")
    options = dict(found.options)
    if known is None:
        vit = _from_shapes(found, options, shapes, name)
    else:
        vit = _from_architecture(known.partition(".")[0], options, shapes, name)
    differences = _differences(vit, shapes)
    if differences:
        raise RuntimeError("; ".join(differences))
    if found.classes is not None and found.classes != vit.num_classes:
        raise ModelError(f"{name} has a head of {vit.num_classes} classes; its config.json says {found.classes}")
    for option in ("num_classes", "depth", "embed_dim"):
        if options.get(option, getattr(vit, option, None)) != getattr(vit, option, options.get(option)):
            raise ModelError(f"{name}: {option} is {getattr(vit, option)}; its config.json says {options[option]}")
    return vit


def _from_architecture(known: str, options: dict[str, Any], shapes: Shapes, name: str) -> VisionTransformer:
    if not re.fullmatch(r"\w+", known) or not is_model(known):
        raise ModelError(f"{name}: timm has no architecture {known[:100]!r}")
    with torch.device("meta"):
        try:
            base: Any = create_model(known, pretrained=False, depth=1)  # all blocks are alike
        except TypeError:  # an architecture without this option
            base = create_model(known, pretrained=False)
    if type(base) not in (VisionTransformer, VisionTransformerDistilled):
        raise ModelError(f"{name}: {known} is a {type(base).__name__}, not a vision transformer of timm's plain kind")
    if type(base.patch_embed) is not PatchEmbed:
        raise ModelError(f"{name}: {known} embeds patches by {type(base.patch_embed).__name__}, not by PatchEmbed")
    made = {**_sizes(shapes, bool(options.get("no_embed_class", base.no_embed_class))), **options}
    if "num_heads" not in options and shapes["patch_embed.proj.weight"][0] != base.embed_dim:
        raise ModelError(
            f"{name} has width {shapes['patch_embed.proj.weight'][0]}, {known} has {base.embed_dim}: put its number of "
            'heads in config.json, as "model_args": {"num_heads": ...}'
        )
    mlp: Any = getattr(base.blocks[0], "mlp", None)
    hidden = shapes.get("blocks.0.mlp.fc1.weight")
    if hidden is not None and hasattr(mlp, "fc1") and "mlp_ratio" not in options:
        rows = int(mlp.fc1.weight.shape[0])
        if hidden[0] * base.embed_dim != rows * hidden[1]:
            made["mlp_ratio"] = hidden[0] / hidden[1]
    with torch.device("meta"):
        vit: Any = create_model(known, pretrained=False, dynamic_img_size=False, **made)
    if type(vit) not in (VisionTransformer, VisionTransformerDistilled):
        raise ModelError(f"{name}: {known} is a {type(vit).__name__}, not a vision transformer of timm's plain kind")
    return cast(VisionTransformer, vit)


def _from_shapes(found: Configuration, options: dict[str, Any], shapes: Shapes, name: str) -> VisionTransformer:
    """Returns the plain ViT of these shapes. Raises ModelError, with the way out, if they do not say enough."""
    first = "blocks.0."
    width, _, _ = _embedding(shapes)
    unknown = []
    if "num_heads" not in options:
        normed = shapes.get(first + "attn.q_norm.weight")
        heads = width // normed[0] if normed is not None else HEADS_OF_WIDTH.get(width)
        if heads is None:
            unknown.append("how many heads attention has")
        else:
            options["num_heads"] = heads
    if "act_layer" not in options and ("norm_pre.weight" in shapes or any("attn_pool" in one for one in shapes)):
        unknown.append("which form of GELU it uses")
    if "global_pool" not in options:
        plain = "cls_token" in shapes and "fc_norm.weight" not in shapes and "attn_pool.latent" not in shapes
        if plain:
            options["global_pool"] = "token"
        else:
            unknown.append("how it pools tokens")
    if unknown:
        raise ModelError(
            f"{name} does not say {' or '.join(unknown)}: put its config.json beside it, or name timm's architecture "
            f"before the file, as in vit_small_patch16_224={name}"
        )
    if found.path is None:
        log.warning(
            "%s: no config.json is beside it, so it is taken for a plain ViT of %d heads with exact GELU; if that is "
            "wrong, name timm's architecture before the file, as in vit_small_patch16_224=%s",
            *(name, options["num_heads"], name),
        )
    # With as many patches as a square and the protected tokens, the class token has a place of its own.
    prefix = sum(shapes[one][-2] for one in ("cls_token", "dist_token", "reg_token") if one in shapes)
    apart = math.isqrt(shapes["pos_embed"][-2] - prefix) ** 2 != shapes["pos_embed"][-2] - prefix
    made = {
        **_sizes(shapes, bool(options.get("no_embed_class", apart))),
        "mlp_ratio": shapes[first + "mlp.fc1.weight"][0] / width,
        "qkv_bias": first + "attn.qkv.bias" in shapes,
        "qk_norm": first + "attn.q_norm.weight" in shapes,
        "init_values": 1.0 if first + "ls1.gamma" in shapes else None,
        "class_token": "cls_token" in shapes,
        "no_embed_class": apart,
        "reg_tokens": shapes["reg_token"][-2] if "reg_token" in shapes else 0,
        "pre_norm": "norm_pre.weight" in shapes,
        "fc_norm": "fc_norm.weight" in shapes,
        **options,
    }
    kind = VisionTransformerDistilled if "dist_token" in shapes else VisionTransformer
    with torch.device("meta"):
        return kind(**made)


def _sizes(shapes: Shapes, apart: bool) -> dict[str, Any]:
    """Returns the options that shapes determine whatever the architecture. Raises KeyError if weights are missing.

    ``apart``: the protected tokens have no place in the position embedding.
    """
    width, channels, patch_px = _embedding(shapes)
    blocks = {int(found[1]) for one in shapes if (found := re.match(r"blocks\.(\d+)\.", one))}
    if blocks != set(range(len(blocks))):  # otherwise a name alone could ask for any number of blocks
        raise KeyError("blocks are missing")
    made: dict[str, Any] = {
        "patch_size": patch_px,
        "in_chans": channels,
        "embed_dim": width,
        "depth": len(blocks),
        "num_classes": shapes["head.weight"][0] if "head.weight" in shapes else 0,
    }
    if "pos_embed" in shapes:
        prefix = sum(shapes[one][-2] for one in ("cls_token", "dist_token", "reg_token") if one in shapes)
        patches = shapes["pos_embed"][-2] - (0 if apart else prefix)
        side = math.isqrt(max(0, patches))
        if side * side != patches:
            raise ModelError(f"a position embedding for {patches} patches, which are not a square, is not supported")
        made["img_size"] = side * patch_px
    return made


def _embedding(shapes: Shapes) -> tuple[int, int, int]:
    """Returns width, channels and side of a patch. Raises ModelError for embeddings that are not supported."""
    width, channels, patch_px, patch_width_px = shapes["patch_embed.proj.weight"]
    if patch_px != patch_width_px:
        raise ModelError(f"patches of {patch_px} x {patch_width_px} pixels are not supported, only square ones")
    if channels != 3:
        raise ModelError(
            f"token adaptation needs timm's plain ViT for RGB pictures; this is one for pictures of {channels} "
            f"channel{'s' if channels != 1 else ''}"
        )
    return width, channels, patch_px


def _differences(vit: VisionTransformer, shapes: Shapes) -> list[str]:
    """Returns up to three differences between a model's tensors and ``shapes``, as text."""
    wanted = {name: tuple(tensor.shape) for name, tensor in vit.state_dict().items()}
    found = []
    for name in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(name) != shapes.get(name):
            here, there = shapes.get(name), wanted.get(name)
            found.append(f"{name} is {here if here else 'missing'}, and {there if there else 'not known'} is needed")
    return found[:3]
