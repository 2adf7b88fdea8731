"""Makes a model with experts of a dense one ("upcycling"), and writes it as a folder.

In every second block, from the second on, the MLP becomes experts (M3ViT). They begin as slices of the MLP, see
experts/convert.py.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from isthmus.cloud.elastic.experts import files
from isthmus.cloud.elastic.experts.convert import EXPERTS, USED, check, converted
from isthmus.cloud.elastic.model.configuration import BadConfiguration, beside
from isthmus.cloud.elastic.model.timm_import import VisionTransformer
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.model.weights import ModelError, located
from isthmus.cloud.elastic.tasks.router import ExpertsShape
from isthmus.data.files import read_text
from isthmus.data.images import PixelSpec

RATIO: Final = 1.0
"""Hidden units of an expert, as a multiple of the width. With 4 experts per token, a token costs as much as with a
usual MLP of ratio 4."""


def usual_blocks(vit: Any) -> tuple[int, ...]:
    """Returns the positions of the blocks that get experts: every second one, from the second on."""
    return tuple(range(1, len(vit.blocks), 2))


def with_experts(
    model: ElasticViT,
    *,
    experts: int = EXPERTS,
    k: int = USED,
    ratio: float = RATIO,
    blocks: Sequence[int] | None = None,
) -> ElasticViT:
    """Returns a copy of a dense model, without its head, whose MLPs at ``blocks`` (None: the usual ones) are experts.

    Raises ValueError for impossible numbers, for blocks that are not there, for MLPs that are not plain, and for a
    model that has experts already or prunes.
    """
    if model.expert_layers:
        raise ValueError("this model has experts already")
    places = usual_blocks(model.vit) if blocks is None else tuple(sorted(set(blocks)))
    if not places or not 0 <= places[0] <= places[-1] < model.depth:
        raise ValueError(f"blocks {list(places)}: this model has blocks 0 to {model.depth - 1}")
    hidden, shape = round(ratio * model.width), ExpertsShape(len(places), experts, k)
    for block in places:
        check(model.blocks[block].mlp, shape, hidden)
    vit: VisionTransformer = copy.deepcopy(model.vit)
    vit.reset_classifier(0, model.vit.global_pool)
    made: list[Any] = list(vit.blocks)
    for layer, block in enumerate(places):
        made[block].mlp = converted(made[block].mlp, layer, shape, hidden)
    return ElasticViT(vit, model.schedules, merge_order=model.merge_order).eval().requires_grad_(False)


def save(model: ElasticViT, folder: Path, *, source: str | Path, pixels: PixelSpec, units: int) -> files.ExpertFiles:
    """Writes a model with experts, which ``load_vit(folder)`` reads. ``units`` is the width of its dense MLPs.

    ``source`` is the dense model, whose configuration is kept. Raises ValueError if the model has no experts,
    ModelError if that configuration cannot be read, and DiskFull.
    """
    if not model.expert_layers:
        raise ValueError("this model has no experts")
    blocks = [place for place, block in enumerate(model.blocks) if block.mlp in model.expert_layers]
    backbone = {name: tensor for name, tensor in model.vit.state_dict().items() if ".mlp.experts." not in name}
    return files.write(
        folder,
        blocks,
        [list(mlp.experts) for mlp in model.expert_layers],
        backbone,
        units=units,
        k=model.experts.k,
        config=_configuration(model, source, pixels),
    )


def _configuration(model: ElasticViT, source: str | Path, pixels: PixelSpec) -> str:
    """Returns the text of config.json: that beside ``source``, or what a file without one was taken for."""
    architecture, path = located(source)
    raw: dict[str, Any] = {}
    if path is not None:
        try:
            found = beside(path)
            raw = {} if found.path is None else json.loads(read_text(found.path))
        except (BadConfiguration, OSError, ValueError) as error:
            raise ModelError(f"the configuration beside {path.name} cannot be read: {error}") from error
    else:
        architecture = str(source)
    options = {"num_heads": model.heads, "global_pool": model.vit.global_pool, **(raw.get("model_args") or {})}
    options.pop("num_classes", None)
    pictures = {**(raw.get("pretrained_cfg") or {}), "mean": pixels.mean, "std": pixels.deviation}
    pictures |= {"crop_pct": pixels.crop.share, "interpolation": pixels.crop.interpolation}
    named = raw.get("architecture") or (None if architecture is None else architecture.partition(".")[0])
    kept = {
        name: value for name, value in raw.items() if name not in ("num_classes", "label_names", "label_descriptions")
    }
    made = {**kept, "model_args": options, "pretrained_cfg": pictures, "num_classes": 0}
    if named is not None:
        made["architecture"] = named
    return json.dumps(made, indent=1)
