"""Files of pretrained trunks with random weights, in the layouts in which the real ones are published."""

from pathlib import Path
from typing import Any

import torch

from isthmus.distill.models import pretrained
from isthmus.distill.models.pretrained import PretrainedTrunk


def random_trunks(folder: Path) -> tuple[tuple[PretrainedTrunk, PretrainedTrunk], tuple[Path, Path]]:
    """Write a speech and a picture trunk, and return what the recipe says of them, and the files."""
    torch.manual_seed(0)
    speech, pictures = pretrained.SpeechLstm(), pretrained.EfficientNetStart()
    state: dict[str, Any] = {}
    for layer, lstm in enumerate((speech.first, speech.second)):
        for name, value in lstm.state_dict().items():
            state[f"lstm.{name[:-1]}{layer}"] = value
    theirs: dict[str, Any] = {}
    for name, value in pictures.state_dict().items():
        theirs[_published(name)] = value
    files = (folder / "pretrained.pt", folder / "efficientnet.pth")
    torch.save({"model_state": state}, files[0])
    torch.save(theirs, files[1])
    sound, _ = pretrained.find(str(files[0]), pretrained.SOUND)
    picture, _ = pretrained.find(str(files[1]), pretrained.PICTURE)
    return (sound, picture), files


def _published(name: str) -> str:
    """Return the published name of one of our weights: blocks.1.expand.0.weight is _blocks.1._expand_conv.weight."""
    parts = name.split(".")
    layer, part = parts[-2:]
    if parts[0] == "stem":
        return f"_conv_stem.{part}" if layer == "0" else f"_bn0.{part}"
    block, stage = parts[1], parts[2]
    convolution, norm = {
        "expand": ("_expand_conv", "_bn0"),
        "depthwise": ("_depthwise_conv", "_bn1"),
        "project": ("_project_conv", "_bn2"),
    }[stage]
    return f"_blocks.{block}.{convolution if layer == '0' else norm}.{part}"
