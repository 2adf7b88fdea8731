"""Classifier heads over a pair of features: the teacher's fusion head, and per ratio a compressor with its head."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from isthmus.proto.messages import Captured, compressed_width, ratio_name

Float32s = npt.NDArray[np.float32]
Fusion = Literal["concat", "sum", "film", "gated"]


class FusionHead(nn.Module):
    """Fuses audio_BD and visual_BD into logits_BC: concat (default), sum, FiLM or gated, named as in OGM-GE.

    ``present_B2`` (1 or 0 for sound, for picture) says which modalities each clip has; None means that all clips have
    both. An absent modality counts as zeros. Logits are divided by ``temperature``, which is 1 until the head is
    calibrated.
    """

    temperature: Tensor

    def __init__(self, width: int, classes: int, fusion: Fusion = "concat"):
        super().__init__()
        self.fusion = fusion
        self.register_buffer("temperature", torch.ones(()))
        match fusion:
            case "concat":
                self.classifier = nn.Linear(2 * width, classes)
            case "sum":
                self.audio_classifier = nn.Linear(width, classes)
                self.visual_classifier = nn.Linear(width, classes)
            case "film":
                self.modulation = nn.Linear(width, 2 * width)
                self.classifier = nn.Linear(width, classes)
            case "gated":
                self.audio_projection = nn.Linear(width, width)
                self.visual_projection = nn.Linear(width, width)
                self.classifier = nn.Linear(width, classes)
            case _:
                raise ValueError(f"unknown fusion {fusion!r}")

    def forward(self, audio_BD: Tensor, visual_BD: Tensor, present_B2: Tensor | None = None) -> Tensor:
        audio_BD, visual_BD = masked(audio_BD, visual_BD, present_B2)
        logits: Tensor
        match self.fusion:
            case "concat":
                logits = self.classifier(torch.cat([audio_BD, visual_BD], dim=1))
            case "sum":
                logits = self.audio_classifier(audio_BD) + self.visual_classifier(visual_BD)
            case "film":
                scale_BD, shift_BD = self.modulation(audio_BD).chunk(2, dim=1)
                logits = self.classifier(scale_BD * visual_BD + shift_BD)
            case "gated":
                gate_BD = torch.sigmoid(self.audio_projection(audio_BD))
                logits = self.classifier(gate_BD * self.visual_projection(visual_BD))
        return logits / self.temperature

    def linear(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return (W_audio_CD, W_visual_CD, bias_C) if the fusion is linear in the features, else None."""
        if self.fusion == "concat":
            audio_CD, visual_CD = self.classifier.weight.chunk(2, dim=1)
            bias_C: Tensor = self.classifier.bias
        elif self.fusion == "sum":
            audio_CD, visual_CD = torch.clone(self.audio_classifier.weight), torch.clone(self.visual_classifier.weight)
            bias_C = self.audio_classifier.bias + self.visual_classifier.bias
        else:
            return None
        return audio_CD / self.temperature, visual_CD / self.temperature, bias_C / self.temperature

    def shares(self, audio_BD: Tensor, visual_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Return each modality's part of the logits, both (B, C). They sum to the logits; each gets half of the bias.

        Raises ValueError for a fusion that is not linear.
        """
        weights = self.linear()
        if weights is None:
            raise ValueError(f"fusion {self.fusion!r} is not linear: its logits are no sum of the modalities' parts")
        audio_CD, visual_CD, bias_C = weights
        return audio_BD @ audio_CD.T + bias_C / 2, visual_BD @ visual_CD.T + bias_C / 2

    @torch.no_grad()
    def set_weights(self, audio_CD: Tensor, visual_CD: Tensor, temperature: float) -> None:
        """Replace the weights that ``linear`` gives at temperature 1, keep the bias, and set the temperature.

        Raises ValueError for a fusion that is not linear.
        """
        if self.fusion == "concat":
            self.classifier.weight.copy_(torch.cat([audio_CD, visual_CD], dim=1))
        elif self.fusion == "sum":
            self.audio_classifier.weight.copy_(audio_CD)
            self.visual_classifier.weight.copy_(visual_CD)
        else:
            raise ValueError(f"fusion {self.fusion!r} is not linear: it has no weights of one modality alone")
        self.temperature.fill_(temperature)

    @torch.no_grad()
    def start_from_branches(self, audio: nn.Linear, visual: nn.Linear) -> None:
        """Start as the sum of the two branches' own logits, so that joint training begins at the branches' result.

        Only for the linear fusions; the others keep their random start.
        """
        if self.fusion == "concat":
            self.classifier.weight.copy_(torch.cat([audio.weight, visual.weight], dim=1))
            self.classifier.bias.copy_(audio.bias + visual.bias)
        elif self.fusion == "sum":
            self.audio_classifier.load_state_dict(audio.state_dict())
            self.visual_classifier.load_state_dict(visual.state_dict())


def present(captured: Captured, count: int) -> Tensor:
    """Return present_B2 of ``count`` clips that all have exactly these modalities."""
    return torch.tensor([captured is not Captured.PICTURE, captured is not Captured.SOUND]).float().expand(count, 2)


def masked(audio_BD: Tensor, visual_BD: Tensor, present_B2: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return both features, with zeros wherever ``present_B2`` is 0; unchanged if it is None."""
    if present_B2 is None:
        return audio_BD, visual_BD
    return audio_BD * present_B2[:, :1], visual_BD * present_B2[:, 1:]


class RatioHead(nn.Module):
    """One compression ratio: a linear compressor D -> W for each modality and a classifier on the pair (Eq. 5.9).

    ``present_B2`` as in ``FusionHead``. An absent modality is zeros after compression: compressors have biases.
    """

    def __init__(self, feature_width: int, classes: int, ratio: float):
        super().__init__()
        width = compressed_width(feature_width, ratio)
        self.compress_audio = nn.Linear(feature_width, width)
        self.compress_visual = nn.Linear(feature_width, width)
        self.classifier = nn.Linear(2 * width, classes)

    def compress(self, audio_BD: Tensor, visual_BD: Tensor) -> tuple[Tensor, Tensor]:
        return self.compress_audio(audio_BD), self.compress_visual(visual_BD)

    def classify(self, audio_BW: Tensor, visual_BW: Tensor, present_B2: Tensor | None = None) -> Tensor:
        logits: Tensor = self.classifier(torch.cat(masked(audio_BW, visual_BW, present_B2), dim=1))
        return logits

    def forward(self, audio_BD: Tensor, visual_BD: Tensor, present_B2: Tensor | None = None) -> Tensor:
        return self.classify(*self.compress(audio_BD, visual_BD), present_B2)


class HeadBank(nn.Module):
    """The heads of one student, one per compression ratio."""

    def __init__(self, feature_width: int, classes: int, ratios: Sequence[float]):
        super().__init__()
        self.feature_width = feature_width
        self.classes = classes
        self.ratios = tuple(ratios)
        self._heads = nn.ModuleList(RatioHead(feature_width, classes, ratio) for ratio in self.ratios)

    @property
    def local_ratio(self) -> float:
        """The smallest ratio: the device has a copy of its head."""
        return min(self.ratios)

    def __getitem__(self, ratio: float) -> RatioHead:
        """Return the head of a ratio. Raises KeyError for a ratio that the bank does not have."""
        for known, head in zip(self.ratios, self._heads, strict=True):
            if known == ratio:
                assert isinstance(head, RatioHead)
                return head
        raise KeyError(f"no head for ratio {ratio:g}; there are {', '.join(map(ratio_name, self.ratios))}")

    @torch.no_grad()
    def frozen(self) -> "FrozenHeads":
        """Return a copy of the classifiers that answers single clips. Later training does not change it."""
        linears = {ratio: self[ratio].classifier for ratio in self.ratios}
        return FrozenHeads(
            {
                ratio: (linear.weight.cpu().numpy().copy(), linear.bias.cpu().numpy().copy())
                for ratio, linear in linears.items()
            }
        )

    def save(self, path: Path) -> None:
        metadata = {
            "feature_width": str(self.feature_width),
            "classes": str(self.classes),
            "ratios": ",".join(map(ratio_name, self.ratios)),
        }
        save_file({key: value.contiguous() for key, value in self.state_dict().items()}, path, metadata)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a bank that ``save`` wrote. Raises ValueError if the file is not a head bank."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            bank = cls(
                int(metadata["feature_width"]),
                int(metadata["classes"]),
                tuple(float(ratio) for ratio in metadata["ratios"].split(",")),
            )
            bank.load_state_dict(load_file(path))
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path.name} is not a head bank ({error}); 'isthmus distill compress' makes one, heads.safetensors"
            ) from error
        return bank.eval()


@dataclass(frozen=True)
class FrozenHeads:
    """The classifiers of a ``HeadBank`` as plain arrays. One clip takes a few microseconds: a tenth of torch's time.

    ``weights`` holds (W_CF, bias_C) per ratio; F = 2 W, sound then picture. The compressors are the device's part.
    """

    weights: Mapping[float, tuple[Float32s, Float32s]]

    @property
    def ratios(self) -> tuple[float, ...]:
        return tuple(self.weights)

    def probabilities(self, values_F: Float32s, captured: Captured, ratio: float) -> Float32s:
        """Return the class probabilities (C,) of one clip. All are NaN if a value is not finite, or if a logit is
        NaN or plus infinity.

        ``values_F`` holds the compressed vectors of the modalities that were captured, sound first. Raises KeyError for
        an unknown ratio, and ValueError for a wrong number of values.
        """
        known = self.weights.get(ratio)
        if known is None:
            raise KeyError(f"no head for ratio {ratio:g}; there are {', '.join(map(ratio_name, self.ratios))}")
        weight_CF, bias_C = known
        if captured is not Captured.BOTH:
            width = weight_CF.shape[1] // 2
            weight_CF = weight_CF[:, :width] if captured is Captured.SOUND else weight_CF[:, width:]
        # For a few classes, numbers of Python take half the time of five calls of numpy.
        logits = (weight_CF.dot(values_F) + bias_C).tolist()
        if not math.isfinite(sum(logits)):
            return np.full(len(logits), np.nan, np.float32)
        largest = max(logits)
        scores = [math.exp(logit - largest) for logit in logits]
        total = sum(scores)
        return np.array([score / total for score in scores], np.float32)
