"""The teacher: two encoders, the fusion head, and each branch's own classifier (chapter 5 of the paper)."""

from pathlib import Path

import torch
from torch import Tensor, nn

from isthmus.distill.models.heads import Fusion, FusionHead
from isthmus.distill.models.pretrained import PretrainedTrunk
from isthmus.distill.models.trunk import EncoderPair


class Teacher(nn.Module):
    """Two encoders (ResNet101 trunks by default) and a head. The branch classifiers serve uni-modal pre-training and
    report each branch's own accuracy.
    """

    def __init__(
        self,
        trunk_name: str,
        feature_width: int,
        classes: int,
        fusion: Fusion = "concat",
        weights: Path | None = None,
        pretrained_trunks: tuple[PretrainedTrunk, PretrainedTrunk] | None = None,
    ):
        super().__init__()
        self.encoders = EncoderPair(
            trunk_name, feature_width, neck=True, weights=weights, pretrained_trunks=pretrained_trunks
        )
        self.audio_classifier = nn.Linear(feature_width, classes)
        self.visual_classifier = nn.Linear(feature_width, classes)
        self.head = FusionHead(feature_width, classes, fusion)

    @torch.no_grad()
    def branches_from_head(self) -> None:
        """Set each branch's classifier to its share of the head, with half of the bias each. Linear fusions only."""
        weights = self.head.linear()
        if weights is None:
            raise ValueError(f"fusion {self.head.fusion!r} is not linear: the branches have no share of it")
        audio_CD, visual_CD, bias_C = weights
        for classifier, weight_CD in ((self.audio_classifier, audio_CD), (self.visual_classifier, visual_CD)):
            classifier.weight.copy_(weight_CD)
            classifier.bias.copy_(bias_C / 2)

    def forward(self, spectrogram_BFT: Tensor, frames_BKCHW: Tensor) -> Tensor:
        """Return logits_BC of the fused pair."""
        audio_BD = self.encoders.audio(spectrogram_BFT)
        visual_BD = self.encoders.visual(frames_BKCHW).mean(dim=1)
        logits: Tensor = self.head(audio_BD, visual_BD)
        return logits
