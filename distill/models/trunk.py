"""ResNet trunks for sound and picture: (B, in_channels, H, W) -> (B, width) after global average pooling."""

import logging
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from isthmus.data.files import not_the_file
from isthmus.distill.models import pretrained
from isthmus.distill.models.pretrained import PretrainedTrunk
from isthmus.distill.torchvision_import import ResNet, resnet

log = logging.getLogger(__name__)

NARROW: Final = "resnet18-quarter"
WIDTHS: Final = {NARROW: 128, "resnet18": 512, "resnet34": 512, "resnet50": 2048, "resnet101": 2048}


class QuarterResNet18(ResNet):  # type: ignore[misc]
    """ResNet18 with a quarter of the channels in every block: 0.7 million weights in place of 11.2 million.

    It learns and exports in a tenth of the time. No ImageNet weights fit it.
    """

    def __init__(self, **options: Any):
        super().__init__(resnet.BasicBlock, [2, 2, 2, 2], **options)

    def _make_layer(self, block: Any, planes: int, *more: Any, **options: Any) -> nn.Module:
        layer: nn.Module = super()._make_layer(block, planes // 4, *more, **options)
        return layer


def _untrained(name: str, *, zero_init_residual: bool) -> ResNet:
    if name == NARROW:
        return QuarterResNet18(zero_init_residual=zero_init_residual)
    return getattr(resnet, name)(weights=None, zero_init_residual=zero_init_residual)


def resnet_trunk(name: str, in_channels: int, weights: Path | None = None) -> nn.Module:
    """Return a torchvision ResNet, or a narrower one, without its classifier.

    ``weights`` is a file of ImageNet weights in torchvision's names: safetensors, or torchvision's own .pth. If
    ``in_channels`` is 1, ``conv1`` is averaged over RGB. Without a file the trunk starts from random weights, and the
    log says so. The last batch normalisation of every block is then at zero, which a deep trunk needs to learn from
    little data, except in the narrow trunk: that one would stay at chance for many epochs (docs/log.md).

    Raises ValueError for an unknown name, or for weights that do not fit.
    """
    if name not in WIDTHS:
        raise ValueError(f"unknown trunk {name!r}; known: {', '.join(WIDTHS)}")
    trunk = _untrained(name, zero_init_residual=weights is None and name != NARROW)
    trunk.fc = nn.Identity()
    if in_channels != 3:
        trunk.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
    if weights is None:
        log.info("%s with %d input channel(s): random weights (no ImageNet file given)", name, in_channels)
        return laid_out(trunk)
    reason = not_the_file(weights)
    if reason is not None:
        raise ValueError(f"{weights.name} {reason}")
    state = {key: value for key, value in _read(weights).items() if not key.startswith("fc.")}
    if in_channels != 3:
        state["conv1.weight"] = state["conv1.weight"].mean(dim=1, keepdim=True).repeat(1, in_channels, 1, 1)
    try:
        trunk.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{weights.name} does not hold torchvision's {name} weights: {error}") from error
    log.info("%s with %d input channel(s): ImageNet weights from %s", name, in_channels, weights.name)
    return laid_out(trunk)


def weights_file(given: Path | None, trunk: str) -> Path | None:
    """Return the file of a trunk's ImageNet weights: ``given``, or if that is a folder, the trunk's file in it.

    In a folder the file is resnet18.safetensors, or resnet18-f37072fd.pth as torchvision names its download. Returns
    None if nothing is given. Raises ValueError if the folder lacks the file.
    """
    if given is None or not given.is_dir():
        return given
    found = [given / f"{trunk}.safetensors", *sorted(given.glob(f"{trunk}-*.pth"))]
    files = [path for path in found if path.is_file()]
    if not files:
        raise ValueError(f"{given} lacks {trunk}.safetensors: --weights takes one file per trunk, or torchvision's own")
    return files[0]


def _read(path: Path) -> dict[str, Tensor]:
    """Read tensors by name, without running code that the file contains. Raises ValueError for a damaged file."""
    if path.suffix != ".pth":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path.name} is not a safetensors file, or is damaged: {error}") from error
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises several untyped errors on a damaged file
        raise ValueError(f"{path.name} is not a file of weights, or is damaged: {error}") from error


def laid_out(trunk: nn.Module) -> nn.Module:
    """Set the faster memory layout for convolutions and return the trunk: channels last, except the last stage on a
    processor.

    That stage has most of the weights and the fewest pixels. oneDNN returns weight gradients in contiguous layout, and
    converting them takes longer than the convolution itself: a fifth of a training step on 48-pixel pictures.
    """
    last_stage = trunk.get_submodule("layer4")
    trunk.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    last_stage.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    last_stage.register_forward_pre_hook(_contiguous_on_cpu)
    return trunk


def _contiguous_on_cpu(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    (x_BCHW,) = inputs
    return (x_BCHW.contiguous() if x_BCHW.device.type == "cpu" else x_BCHW,)


class Encoder(nn.Module):
    """One modality: trunk, and for the teacher a neck to the shared width D.

    The neck ends in a ReLU. The student's feature is a mean of ReLUs and never negative: a purely linear neck would put
    half of what the student must match (Eq. 5.4) out of its reach. See decision 0004. A student of a teacher on
    pretrained trunks, whose features have both signs, has a ``linear_neck`` instead.

    ``forward``: (B, in_channels, H, W) -> features_BD.
    """

    def __init__(
        self,
        trunk_name: str,
        in_channels: int,
        feature_width: int,
        *,
        neck: bool,
        linear_neck: bool = False,
        weights: Path | None = None,
    ):
        super().__init__()
        self.trunk = resnet_trunk(trunk_name, in_channels, weights)
        width = WIDTHS[trunk_name]
        self.neck: nn.Module
        if linear_neck:
            self.neck = nn.Linear(width, feature_width)
        elif neck:
            self.neck = nn.Sequential(nn.Linear(width, feature_width), nn.ReLU())
        elif width == feature_width:
            self.neck = nn.Identity()
        else:
            raise ValueError(f"{trunk_name} is {width} wide, not {feature_width}: it needs a neck")

    def forward(self, x_BCHW: Tensor) -> Tensor:
        features: Tensor = self.neck(self.trunk(x_BCHW.contiguous(memory_format=torch.channels_last)))
        return features


class PretrainedEncoder(nn.Module):
    """One modality with a trunk that was trained elsewhere: the trunk stays as it is, the neck is linear.

    ``forward`` as of ``Encoder``.
    """

    def __init__(self, trunk: PretrainedTrunk, feature_width: int):
        super().__init__()
        self.trunk = pretrained.build(trunk)
        self.neck = nn.Linear(self.trunk.width, feature_width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        features: Tensor = self.neck(self.trunk(x_BCHW))
        return features


class EncoderPair(nn.Module):
    """Both modalities' encoders: a teacher's or a student's. ``pretrained_trunks`` (sound, picture) take the place of
    ``trunk_name``.

    ``audio``: spectrogram_BFT -> features_BD. ``visual``: frames_BKCHW -> per-frame features_BKD; a clip's visual
    feature is their mean over K.
    """

    def __init__(
        self,
        trunk_name: str,
        feature_width: int,
        *,
        neck: bool,
        linear_neck: bool = False,
        weights: Path | None = None,
        pretrained_trunks: tuple[PretrainedTrunk, PretrainedTrunk] | None = None,
    ):
        super().__init__()
        self.audio_encoder: Encoder | PretrainedEncoder
        self.visual_encoder: Encoder | PretrainedEncoder
        if pretrained_trunks is not None:
            sound, picture = pretrained_trunks
            self.audio_encoder = PretrainedEncoder(sound, feature_width)
            self.visual_encoder = PretrainedEncoder(picture, feature_width)
            return
        self.audio_encoder, self.visual_encoder = (
            Encoder(trunk_name, channels, feature_width, neck=neck, linear_neck=linear_neck, weights=weights)
            for channels in (1, 3)
        )

    def audio(self, spectrogram_BFT: Tensor) -> Tensor:
        features: Tensor = self.audio_encoder(spectrogram_BFT.unsqueeze(1))
        return features

    def visual(self, frames_BKCHW: Tensor) -> Tensor:
        batch, frames = frames_BKCHW.shape[:2]
        features: Tensor = self.visual_encoder(frames_BKCHW.flatten(0, 1))
        per_frame_BKD: Tensor = features.unflatten(0, (batch, frames))
        return per_frame_BKD
