"""What another process needs to open the same model. It is plain data with a JSON form."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from isthmus.cloud.elastic.model.attention import Mixing
from isthmus.cloud.elastic.model.runner import ElasticRunner, NumberType
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.model.weights import load_vit, pixel_spec
from isthmus.cloud.elastic.scheduling.merge_order import DEFAULT_ORDER, MergeOrder
from isthmus.cloud.elastic.tasks.router import TaskRouter
from isthmus.cloud.elastic.tasks.task import TaskWeights
from isthmus.distill.training.checkpoint import state_hash


class OtherModel(ValueError):
    """The file holds another model than the one that was opened first."""


@dataclass(frozen=True)
class Opening:
    """How a model is opened.

    ``model_hash``: the hash of the model that was opened first; "" accepts any. ``mixing``: the way of attention that
    was measured then, so that all executors answer alike; None: each measures it itself.
    """

    source: str
    pixels: str | None = None
    device: str = "cpu"
    number_type: NumberType = "float32"
    compiler: str | None = None
    packed: bool = False
    threads: int = 1
    schedules: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    merge_order: MergeOrder = DEFAULT_ORDER
    model_hash: str = ""
    expert_bytes: int | None = None
    mixing: Mixing | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Opening":
        raw = json.loads(text)
        schedules = {int(gamma): tuple(changes) for gamma, changes in raw.pop("schedules").items()}
        return Opening(schedules=schedules, **raw)


def opened(opening: Opening) -> ElasticRunner:
    """Opens the model.

    Raises ModelError, ValueError or RuntimeError if that is not possible here, and OtherModel if ``model_hash`` is of
    another model.
    """
    vit = load_vit(opening.source, on_shelf=True, expert_bytes=opening.expert_bytes)
    model = ElasticViT(vit, opening.schedules, merge_order=opening.merge_order)
    runner = ElasticRunner(
        model,
        pixel_spec(vit, opening.source, opening.pixels),
        device=opening.device,
        number_type=opening.number_type,
        compiler=opening.compiler,
        packed=opening.packed,
        mixing=opening.mixing,
    )
    if opening.model_hash and (model.identity or state_hash([runner.model])) != opening.model_hash:
        raise OtherModel(f"{opening.source} holds another model than when the server started: restart the server")
    return runner


def check(runner: ElasticRunner) -> None:
    """Runs one image. Raises RuntimeError if the model does not answer with finite numbers."""
    side, width, shape = runner.model.image_px, runner.model.width, runner.model.experts
    routing = None
    if runner.model.expert_layers:
        head_CD, bias_C = np.zeros((2, width), np.float32), np.zeros(2, np.float32)
        blank = TaskWeights(head_CD, bias_C, {}, TaskRouter.blank(shape, width))
        routing = runner.routing([runner.prepare(blank)], shape.k)
    features_BD = runner.features(runner.images(np.zeros((1, side, side, 3), np.uint8)), 0, routing=routing)
    if features_BD.shape != (1, runner.model.width) or not bool(torch.isfinite(features_BD).all()):
        raise RuntimeError("the model does not answer with finite numbers")
