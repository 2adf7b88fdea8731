"""Imports torchvision even if its compiled extension cannot load, for example beside a CPU build of torch.

``import torchvision`` registers fake kernels for two operators of its extension, and fails if the extension did not
load. Declaring the two schemas first makes the import pass. Calling those operators still fails, and nothing here calls
them. If the extension loads, this module does nothing.
"""

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library: torch.library.Library | None = None


def _extension_loads() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # the import itself then reports that torchvision is missing
    for extension in sorted(Path(spec.origin).parent.glob("_C*.so")):
        try:
            torch.ops.load_library(str(extension))
        except OSError:
            return False
        return True
    return False


if not hasattr(torch.ops.torchvision, "nms") and not _extension_loads():
    _library = torch.library.Library("torchvision", "DEF")
    for _name, _schema in _SCHEMAS.items():
        _library.define(_name + _schema)

from torchvision.models import ResNet, resnet  # noqa: E402

__all__ = ["ResNet", "resnet"]
