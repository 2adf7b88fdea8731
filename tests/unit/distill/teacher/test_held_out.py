"""Clips held out, and the head and temperature fitted on them."""

import numpy as np
import pytest
import torch
from torch import nn

from isthmus.distill.models.heads import FusionHead
from isthmus.distill.teacher.held_out import Held, cross_fit, fit_weights, held_out_clips, temperature
from isthmus.distill.training.losses import classification_loss, masked_loss


def some_actors(sizes: dict[str, int]) -> tuple[str, ...]:
    return tuple(name for name, size in sizes.items() for _ in range(size))


@pytest.mark.parametrize("seed", range(8))
def test_whole_persons_are_held_out_as_few_as_reach_the_share(seed):
    actors = some_actors({"a": 10, "b": 30, "c": 20, "d": 40})
    labels_N = np.arange(100) % 4
    for share, fewest in ((0.1, 1), (0.35, 1), (0.41, 2), (0.7, 2), (0.71, 3)):
        rows = held_out_clips(actors, labels_N, share, seed)
        held = {actors[row] for row in rows}
        assert len(held) == fewest
        assert len(rows) >= share * 100
        assert len(rows) == sum(actor in held for actor in actors)
    assert held_out_clips(actors, labels_N, 0.0, seed).size == 0
    with pytest.raises(ValueError, match="leaves none"):
        held_out_clips(actors, labels_N, 0.95, seed)


def test_who_is_held_out_is_drawn():
    actors = some_actors({"a": 25, "b": 25, "c": 25, "d": 25})
    drawn = {actors[held_out_clips(actors, np.zeros(100, np.int64), 0.2, seed)[0]] for seed in range(30)}
    assert drawn == {"a", "b", "c", "d"}


def test_without_actors_every_class_gives_its_share_and_keeps_a_clip():
    labels_N = np.array([0] * 20 + [1] * 5 + [2])
    rows = held_out_clips(("",) * 26, labels_N, 0.2, seed=3)
    assert np.bincount(labels_N[rows], minlength=3).tolist() == [4, 1, 0]
    with pytest.raises(ValueError, match=r"share of 1 is not in \[0, 1\)"):
        held_out_clips(("",) * 26, labels_N, 1.0, seed=3)


def unequal_branches(clips: int, seed: int) -> Held:
    """Return features in which sound shows the class three times as clearly as the picture."""
    rng = np.random.default_rng(seed)
    labels_N = rng.integers(3, size=clips)
    clear_M = np.array([1.5, 0.5])
    features_NMD = rng.standard_normal((clips, 2, 3)) + clear_M[:, None] * np.eye(3)[labels_N][:, None, :] * 2
    return Held(features_NMD, labels_N, np.zeros(clips, np.int64))


def test_a_head_that_trusts_the_wrong_branch_is_set_right_by_unseen_clips():
    start_MCD = np.stack([0.2 * np.eye(3), 2.0 * np.eye(3)])  # the picture ten times the sound
    bias_C = np.zeros(3)
    fitted_MCD = fit_weights(unequal_branches(100, 0), start_MCD, bias_C, dropout=0.15, decay=0.01)
    strangers = unequal_branches(2000, 1)

    def right(weights_MCD):
        logits_NC = np.einsum("nmd,mcd->nc", strangers.features_NMD, weights_MCD)
        return (logits_NC.argmax(1) == strangers.labels_N).mean()

    assert right(fitted_MCD) > right(start_MCD) + 0.1
    still_MCD = fit_weights(unequal_branches(100, 0), start_MCD, bias_C, dropout=0.15, decay=1e6)
    np.testing.assert_allclose(still_MCD, start_MCD, atol=1e-4)
    with pytest.raises(ValueError, match="do not fit"):
        fit_weights(unequal_branches(100, 0), start_MCD[:, :2], bias_C, dropout=0.15)


def test_the_temperature_undoes_a_factor_on_logits():
    rng = np.random.default_rng(0)
    logits_NC = rng.standard_normal((20_000, 4)) * 2
    gumbel_NC = rng.gumbel(size=logits_NC.shape)
    labels_N = (logits_NC + gumbel_NC).argmax(1)  # drawn from the very softmax of the logits
    for factor in (0.25, 1.0, 5.0):
        assert temperature(factor * logits_NC, labels_N) == pytest.approx(factor, rel=0.05)


@pytest.mark.parametrize("persons", [1, 3])
def test_cross_fitting_tells_what_strangers_would_see(persons):
    held = unequal_branches(150, 2)
    held = Held(held.features_NMD, held.labels_N, np.arange(150) % persons)
    start_MCD, bias_C = np.stack([np.eye(3)] * 2), np.zeros(3)
    crossed = cross_fit(held, start_MCD, bias_C, 0.15, seed=0)
    both, sound, picture = crossed.accuracy_3
    assert both >= sound - 0.03 > picture + 0.1
    assert 0.2 < crossed.temperature < 5
    with pytest.raises(ValueError, match="one held-out clip"):
        cross_fit(held[np.arange(150) == 0], start_MCD, bias_C, 0.15, seed=0)


def test_masked_loss_is_the_expectation_over_drawn_masks():
    torch.manual_seed(0)
    head = FusionHead(4, 3)
    audio_BD, visual_BD, labels_B = torch.rand(6, 4), torch.rand(6, 4), torch.arange(6) % 3
    losses = {
        mask: classification_loss(head(audio_BD * mask[0], visual_BD * mask[1]), labels_B, label_smoothing=0.1).item()
        for mask in ((1, 1), (1, 0), (0, 1))
    }
    expected = 0.6 * losses[1, 1] + 0.2 * (losses[1, 0] + losses[0, 1])
    found = masked_loss(lambda mask: head(audio_BD, visual_BD, mask), labels_B, 0.2, 0.1)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_a_head_trained_with_dropout_answers_better_with_one_modality():
    held, strangers = unequal_branches(400, 4), unequal_branches(2000, 5)
    # The picture sees the sound's noise too, so that without dropout a head learns to subtract one from the other.
    mix = np.array([[1.0, 0.0], [0.9, 0.4]])

    def mixed(of):
        return torch.from_numpy(np.einsum("km,nmd->knd", mix, of.features_NMD)).float()

    def trained(dropout):
        torch.manual_seed(0)
        head = FusionHead(3, 3)
        optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
        audio_BD, visual_BD = mixed(held)
        for _ in range(200):
            optimizer.zero_grad()
            loss = masked_loss(lambda mask: head(audio_BD, visual_BD, mask), torch.from_numpy(held.labels_N), dropout)
            loss.backward()
            optimizer.step()
        return head

    @torch.no_grad()
    def alone_loss(head, mask):
        present_B2 = torch.tensor([mask]).expand(2000, 2)
        return nn.functional.cross_entropy(head(*mixed(strangers), present_B2), torch.from_numpy(strangers.labels_N))

    without, with_dropout = trained(0.0), trained(0.15)
    for mask in ((1.0, 0.0), (0.0, 1.0)):
        assert alone_loss(with_dropout, mask) < alone_loss(without, mask)
