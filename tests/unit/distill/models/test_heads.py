"""Fusion, compression and their start from the teacher."""

import copy

import numpy as np
import pytest
import torch

from isthmus.distill.models.heads import FrozenHeads, FusionHead, HeadBank, present
from isthmus.distill.models.trunk import Encoder, EncoderPair, weights_file
from isthmus.distill.training.losses import classification_loss, feature_distillation_loss
from isthmus.proto.messages import Captured, compressed_width


@pytest.mark.parametrize("fusion", ["concat", "sum", "film", "gated"])
def test_every_fusion_gives_logits_that_depend_on_both_modalities(fusion):
    torch.manual_seed(0)
    head = FusionHead(16, 5, fusion)
    audio_BD, visual_BD = torch.rand(3, 16), torch.rand(3, 16)
    logits_BC = head(audio_BD, visual_BD)
    assert logits_BC.shape == (3, 5)
    assert not torch.equal(logits_BC, head(audio_BD + 1, visual_BD))
    assert not torch.equal(logits_BC, head(audio_BD, visual_BD + 1))


@pytest.mark.parametrize("fusion", ["concat", "sum"])
def test_a_linear_fusion_starts_as_the_sum_of_its_branches(fusion):
    torch.manual_seed(0)
    audio, visual, head = torch.nn.Linear(8, 3), torch.nn.Linear(8, 3), FusionHead(8, 3, fusion)
    head.start_from_branches(audio, visual)
    audio_BD, visual_BD = torch.rand(4, 8), torch.rand(4, 8)
    torch.testing.assert_close(head(audio_BD, visual_BD), audio(audio_BD) + visual(visual_BD))
    weights = head.linear()
    assert weights is not None
    torch.testing.assert_close(
        audio_BD @ weights[0].T + visual_BD @ weights[1].T + weights[2], head(audio_BD, visual_BD)
    )


def test_an_unknown_fusion_is_refused():
    with pytest.raises(ValueError, match="unknown fusion"):
        FusionHead(8, 3, "blend")  # type: ignore[arg-type]


def test_a_bank_has_floor_d_over_ratio_wide_compressors_and_survives_its_file(tmp_path):
    torch.manual_seed(0)
    bank = HeadBank(512, 6, (1.0, 1.5, 2.0, 3.0))
    assert [bank[ratio].compress_audio.out_features for ratio in bank.ratios] == [512, 341, 256, 170]
    bank.save(tmp_path / "heads.safetensors")
    again = HeadBank.load(tmp_path / "heads.safetensors").frozen()
    features_D = np.random.default_rng(0).random((2, 512), dtype=np.float32)
    for ratio in bank.ratios:
        with torch.inference_mode():
            audio_BW, visual_BW = bank[ratio].compress(*torch.from_numpy(features_D).split(1))
            expected_C = torch.softmax(bank[ratio].classify(audio_BW, visual_BW), dim=1)[0]
        pair_F = torch.cat([audio_BW[0], visual_BW[0]]).numpy()
        answered_C = again.probabilities(pair_F, Captured.BOTH, ratio)
        assert len(audio_BW[0]) == compressed_width(512, ratio)
        np.testing.assert_allclose(answered_C, expected_C.numpy(), rtol=1e-4)
        assert answered_C.sum() == pytest.approx(1.0, abs=1e-5)
        for captured, one_BW in ((Captured.SOUND, audio_BW), (Captured.PICTURE, visual_BW)):
            with torch.inference_mode():
                logits_BC = bank[ratio].classify(audio_BW, visual_BW, present(captured, 1))
            alone_C = again.probabilities(one_BW[0].numpy(), captured, ratio)
            np.testing.assert_allclose(alone_C, torch.softmax(logits_BC, dim=1)[0].numpy(), rtol=1e-4)
    with pytest.raises(KeyError, match="no head for ratio 4"):
        again.probabilities(features_D.reshape(-1), Captured.BOTH, 4.0)
    with pytest.raises(ValueError, match="not aligned"):
        again.probabilities(features_D[0], Captured.BOTH, 1.0)


def test_answers_whose_logits_overflow_are_nan() -> None:
    heads = FrozenHeads({1.0: (np.ones((3, 16), np.float32), np.zeros(3, np.float32))})
    with np.errstate(over="ignore"):
        assert np.isnan(heads.probabilities(np.full(16, 3e38, np.float32), Captured.BOTH, 1.0)).all()


def test_answers_with_one_logit_or_value_that_is_not_finite_are_nan() -> None:
    weight_CF = np.array([[-10, 1e-9], [1, 1e-9]], np.float32)
    heads = FrozenHeads({1.0: (weight_CF, np.zeros(2, np.float32))})
    with np.errstate(over="ignore", invalid="ignore"):
        for value in (1e38, np.inf, -np.inf, np.nan):  # 1e38: the first class alone overflows, to minus infinity
            assert np.isnan(heads.probabilities(np.array([value, 1], np.float32), Captured.BOTH, 1.0)).all()


def test_frozen_heads_stay_when_the_bank_is_trained_on() -> None:
    bank = HeadBank(8, 3, (1.0,))
    frozen, values_F = bank.frozen(), np.ones(16, np.float32)
    before_C = frozen.probabilities(values_F, Captured.BOTH, 1.0)
    with torch.no_grad():
        bank[1.0].classifier.bias += torch.arange(3.0)
    np.testing.assert_array_equal(frozen.probabilities(values_F, Captured.BOTH, 1.0), before_C)
    assert not np.allclose(bank.frozen().probabilities(values_F, Captured.BOTH, 1.0), before_C)


def test_a_file_that_is_no_bank_is_named(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors is not a head bank"):
        HeadBank.load(tmp_path / "other.safetensors")
    (tmp_path / "other.safetensors").write_text("{}")
    with pytest.raises(
        ValueError, match=r"other\.safetensors is not a head bank .*'isthmus distill compress' makes one"
    ):
        HeadBank.load(tmp_path / "other.safetensors")


def test_losses_are_the_printed_ones():
    logits_BC, labels_B = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
    by_hand = -(np.log(np.exp(2) / (np.exp(2) + 1)) + np.log(1 / (1 + np.e))) / 2
    assert classification_loss(logits_BC, labels_B).item() == pytest.approx(by_hand, rel=1e-5)
    assert feature_distillation_loss(torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.0, 3.0]])).item() == 2.5


def test_trunks_pool_to_their_width_and_take_one_or_three_channels():
    student = EncoderPair("resnet18", 512, neck=False).eval()
    with torch.inference_mode():
        assert student.audio(torch.zeros(2, 40, 50)).shape == (2, 512)
        assert student.visual(torch.zeros(2, 3, 3, 32, 32)).shape == (2, 3, 512)
    with pytest.raises(ValueError, match="needs a neck"):
        Encoder("resnet50", 1, 512, neck=False)
    with pytest.raises(ValueError, match="unknown trunk"):
        Encoder("resnet19", 1, 512, neck=True)


def test_the_layout_of_a_trunk_changes_no_number():
    torch.manual_seed(0)
    encoder = Encoder("resnet18", 1, 512, neck=False)
    plain = copy.deepcopy(encoder)
    plain.trunk.layer4._forward_pre_hooks.clear()
    plain.to(memory_format=torch.contiguous_format)
    x_BCHW = torch.randn(2, 1, 40, 40)
    outs = []
    for each in (encoder, plain):
        out_BD = each(x_BCHW) if each is encoder else each.trunk(x_BCHW)
        out_BD.square().mean().backward()
        outs.append(out_BD)
    torch.testing.assert_close(*outs)
    for ours, expected in zip(encoder.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-3, atol=1e-5)
    stage = encoder.trunk.layer4[0].conv2.weight
    assert stage.is_contiguous() and not encoder.trunk.layer3[0].conv2.weight.is_contiguous()


def test_imagenet_weights_come_from_a_file_with_conv1_averaged_over_rgb(tmp_path):
    from safetensors.torch import save_file

    source = Encoder("resnet18", 3, 512, neck=False)
    save_file(
        {**{key: value.contiguous() for key, value in source.trunk.state_dict().items()}, "fc.bias": torch.zeros(1000)},
        tmp_path / "resnet18.safetensors",
    )
    mono = Encoder("resnet18", 1, 512, neck=False, weights=tmp_path / "resnet18.safetensors")
    expected = source.trunk.state_dict()["conv1.weight"].mean(dim=1, keepdim=True)
    torch.testing.assert_close(mono.trunk.state_dict()["conv1.weight"], expected)
    with pytest.raises(ValueError, match="does not hold torchvision's resnet50"):
        Encoder("resnet50", 3, 512, neck=True, weights=tmp_path / "resnet18.safetensors")
    torch.save(source.trunk.state_dict(), tmp_path / "resnet34-0000.pth")
    assert weights_file(tmp_path, "resnet18") == tmp_path / "resnet18.safetensors"
    assert weights_file(None, "resnet18") is None
    theirs = weights_file(tmp_path, "resnet34")
    assert theirs is not None and weights_file(theirs, "resnet18") == theirs
    same = Encoder("resnet18", 3, 512, neck=False, weights=theirs)
    torch.testing.assert_close(same.trunk.state_dict(), source.trunk.state_dict())
    with pytest.raises(ValueError, match=r"lacks resnet50\.safetensors: --weights takes one file per trunk"):
        weights_file(tmp_path, "resnet50")
    theirs.write_bytes(theirs.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"resnet34-0000\.pth is not a file of weights, or is damaged"):
        Encoder("resnet18", 3, 512, neck=False, weights=theirs)
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        Encoder("resnet18", 3, 512, neck=False, weights=tmp_path / "pointer.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "resnet18.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cut\.safetensors is not a safetensors file, or is damaged"):
        Encoder("resnet18", 3, 512, neck=False, weights=tmp_path / "cut.safetensors")
