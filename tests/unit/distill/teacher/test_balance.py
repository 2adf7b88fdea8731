"""OGM-GE's formulas; its noise and scaling reach only the encoders."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from isthmus.distill.models.teacher import Teacher
from isthmus.distill.teacher.balance import OgmGe, coefficient, discrepancy, modulate


def test_rho_is_the_ratio_of_confidences_in_the_right_classes():
    audio_BC, visual_BC, labels_B = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 2), torch.tensor([0, 0])
    by_hand = (math.e**2 / (math.e**2 + 1) + 1 / (1 + math.e)) / (0.5 + 0.5)
    assert discrepancy(audio_BC, visual_BC, labels_B) == pytest.approx(by_hand, rel=1e-5)
    assert discrepancy(visual_BC, audio_BC, labels_B) == pytest.approx(1 / by_hand, rel=1e-5)


def test_only_the_modality_that_is_ahead_is_slowed():
    assert coefficient(0.9, 0.8) == 1.0
    assert coefficient(1.5, 0.8) == pytest.approx(1 - math.tanh(1.2), rel=1e-6)
    assert coefficient(1.5, 0.1) > coefficient(1.5, 0.8) > coefficient(3.0, 0.8)


def test_gradients_are_scaled_and_get_noise_of_their_own_deviation():
    layer = nn.Linear(200, 200)
    rng = np.random.default_rng(0)
    gradient = torch.from_numpy(rng.normal(0.0, 3.0, (200, 200))).float()
    layer.weight.grad = gradient.clone()
    modulate(layer, 0.25, torch.Generator().manual_seed(1))
    noise = layer.weight.grad - 0.25 * gradient
    assert noise.std().item() == pytest.approx(3.0, rel=0.02)
    assert abs(noise.mean().item()) < 0.1
    assert layer.bias.grad is None
    again = nn.Linear(200, 200)
    again.weight.grad = gradient.clone()
    modulate(again, 0.25, torch.Generator().manual_seed(1))
    assert torch.equal(again.weight.grad, layer.weight.grad)


def test_in_training_the_head_keeps_its_gradient_and_a_linear_fusion_is_needed():
    torch.manual_seed(0)
    teacher = Teacher("resnet18", 8, 3)
    balance = OgmGe(teacher, alpha=0.8, label_smoothing=0.0, seed=0)
    balance.loss([torch.rand(4, 32, 32), torch.rand(4, 1, 3, 32, 32), torch.tensor([0, 1, 2, 0])]).backward()
    head, neck = teacher.head.classifier.weight.grad, teacher.encoders.audio_encoder.neck[0].weight.grad
    before = head.clone(), neck.clone()
    balance.on_gradients(0, 0)
    assert torch.equal(head, before[0])
    assert not torch.equal(neck, before[1])
    teacher.branches_from_head()
    audio_BD, visual_BD = torch.rand(2, 8), torch.rand(2, 8)
    torch.testing.assert_close(
        teacher.audio_classifier(audio_BD) + teacher.visual_classifier(visual_BD), teacher.head(audio_BD, visual_BD)
    )
    with pytest.raises(ValueError, match="ogm-ge needs fusion"):
        OgmGe(Teacher("resnet18", 8, 3, "gated"), 0.8, 0.0, 0)
