"""Attacks on uploads: their measures against plain references, and attacks that succeed or fail as they must."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.distill.student.evaluate import StudentOutputs
from isthmus.edge.own_clips.prototypes import make_prototypes
from isthmus.privacy.attacks import (
    RIDGES,
    TRAINING,
    Basis,
    Scenes,
    attacker_view,
    closeness,
    fit_likelihood_ratio,
    network_decoder,
    reconstruct,
    ridge_decoders,
    train_decoder,
)
from isthmus.privacy.likeness import (
    auc,
    bootstrapped,
    retrieval_rate,
    same_class_rate,
    squared_distances,
    ssim,
    true_positive_rate,
)
from isthmus.privacy.report import ModeSummary, Spread, words
from isthmus.privacy.shadows import draw, hash_seed, picked
from isthmus.privacy.uploads import Mode, all_modes, make_upload, mode_rows
from isthmus.proto.errors import BadPrototypes

CPU = torch.device("cpu")


def some_outputs(clips: int = 40, classes: int = 4, seed: int = 0) -> StudentOutputs:
    rng = np.random.default_rng(seed)
    audio_ND, visual_ND = (rng.standard_normal((clips, 8)).astype(np.float32) for _ in range(2))
    return StudentOutputs(audio_ND, visual_ND, rng.dirichlet(np.ones(classes), clips).astype(np.float32))


def test_ssim_of_known_pictures() -> None:
    picture = np.random.default_rng(0).random((2, 16, 18, 3))
    np.testing.assert_allclose(ssim(picture, picture, 1.0), 1.0)
    # Constant pictures have no variance: only the first factor of Eq. 13 remains.
    one, two = np.full((1, 12, 12, 1), 0.2), np.full((1, 12, 12, 1), 0.8)
    expected = (2 * 0.2 * 0.8 + 1e-4) / (0.2**2 + 0.8**2 + 1e-4)
    assert ssim(one, two, 1.0)[0] == pytest.approx(expected, rel=1e-9)
    # The finest stripes have no local mean: inverted, they are as dissimilar as possible.
    wave = np.cos(np.pi * np.arange(12))[np.newaxis, :, np.newaxis, np.newaxis] * np.ones((1, 12, 12, 1))
    assert ssim(wave, -wave, 2.0)[0] < -0.5


def test_ssim_is_the_papers_formula_in_a_single_window() -> None:
    first, second = np.random.default_rng(1).random((2, 11, 11))
    line = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(line, line) / line.sum() ** 2
    a, b = (window * first).sum(), (window * second).sum()
    va, vb = (window * (first - a) ** 2).sum(), (window * (second - b) ** 2).sum()
    cov = (window * (first - a) * (second - b)).sum()
    expected = (2 * a * b + 1e-4) * (2 * cov + 9e-4) / ((a * a + b * b + 1e-4) * (va + vb + 9e-4))
    assert ssim(first[np.newaxis, ..., np.newaxis], second[np.newaxis, ..., np.newaxis], 1.0)[0] == pytest.approx(
        expected
    )


def test_pictures_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="smaller than the window"):
        ssim(np.zeros((1, 10, 20, 1)), np.zeros((1, 10, 20, 1)), 1.0)
    with pytest.raises(ValueError, match="both must be N x H x W x C"):
        ssim(np.zeros((1, 20, 20, 1)), np.zeros((1, 20, 21, 1)), 1.0)


scores = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12)


@given(scores, scores)
def test_auc_equals_counting_pairs(members: list[float], others: list[float]) -> None:
    counted = np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in itertools.product(members, others)])
    assert auc(members, others) == pytest.approx(counted)


@given(scores, scores, st.sampled_from([0.01, 0.05, 0.3, 1.0]))
def test_members_found_equal_the_best_threshold_by_trying_all(
    members: list[float], others: list[float], rate: float
) -> None:
    tried = [-np.inf, *others, *members]
    allowed = [
        np.mean([m > threshold for m in members])
        for threshold in tried
        if np.mean([o > threshold for o in others]) <= rate + 1e-12
    ]
    assert true_positive_rate(members, others, rate) == pytest.approx(max(allowed))


def test_nobody_to_tell_from_is_refused() -> None:
    with pytest.raises(ValueError, match="no non-members"):
        auc([1.0], [])


def test_bootstrap_holds_the_estimate_and_narrows_with_more_clips() -> None:
    rng = np.random.default_rng(3)
    few, many = (bootstrapped(auc, rng.normal(0.5, 1, count), rng.normal(0, 1, count), seed=0) for count in (30, 600))
    for interval in (few, many):
        assert interval.low <= interval.value <= interval.high
    assert many.high - many.low < 0.5 * (few.high - few.low)


def test_a_constant_reconstruction_identifies_nobody() -> None:
    clips_NP = np.random.default_rng(0).random((12, 6))
    distances_NN = squared_distances(np.tile(clips_NP.mean(axis=0), (12, 1)), clips_NP)
    assert same_class_rate(distances_NN, np.arange(12) % 3) == pytest.approx(0.5)
    assert retrieval_rate(distances_NN) == pytest.approx(1 / 12)
    exact_NN = squared_distances(clips_NP, clips_NP)
    assert same_class_rate(exact_NN, np.arange(12) % 3) == 1
    assert retrieval_rate(exact_NN) == 1
    assert np.isnan(same_class_rate(exact_NN, np.arange(12)))


def toy(clips: int, seed: int) -> tuple[np.ndarray, Scenes]:
    """Return scenes of two hidden numbers, with rows that reveal both."""
    rng = np.random.default_rng(seed)
    hidden_N2 = rng.random((clips, 2)).astype(np.float32)
    ramp = np.linspace(0, 1, 16, dtype=np.float32)
    sound = hidden_N2[:, :1, np.newaxis] * ramp[:, np.newaxis] * ramp
    picture = (hidden_N2[:, 1, np.newaxis, np.newaxis] * ramp[:, np.newaxis] * ramp[::-1])[..., np.newaxis]
    return hidden_N2, Scenes(sound, np.repeat(picture, 3, axis=3))


def test_a_decoder_learns_what_rows_tell_and_nothing_from_rows_that_tell_nothing() -> None:
    rows_N2, public = toy(300, 0)
    private_N2, private = toy(30, 1)
    basis = Basis(public, components=8)
    targets_NP = basis.coefficients(public)
    config = dataclasses.replace(TRAINING, epochs=30)

    def rates(train_N2: np.ndarray, given_N2: np.ndarray) -> tuple[float, float]:
        decoder = train_decoder(
            train_N2, targets_NP, np.arange(300) % 10, basis.sound_width, seed=0, device=CPU, config=config
        )
        drawn = reconstruct(decoder, basis, given_N2)
        one_class_N = np.zeros(len(given_N2), np.int64)
        sound, picture = (
            same_class_rate(squared_distances(made, true), one_class_N)
            for made, true in zip(drawn.flat(), private.flat(), strict=True)
        )
        return sound, picture

    assert min(rates(rows_N2, private_N2)) > 0.9
    noise = np.random.default_rng(2)
    blind = rates(noise.random((300, 2), np.float32), noise.random((30, 2), np.float32))
    assert max(abs(rate - 0.5) for rate in blind) < 0.2
    # The best decoder also loses what the basis cannot represent; here it represents everything.
    np.testing.assert_allclose(basis.scenes(basis.coefficients(private)).frames_NHWC, private.frames_NHWC, atol=1e-3)


def test_network_and_linear_map_learn_the_toy_each_and_the_better_is_kept() -> None:
    rows_N2, public = toy(200, 0)
    private_N2, private = toy(20, 1)
    basis = Basis(public, components=4)
    targets_NP, wanted_NP = basis.coefficients(public), basis.coefficients(private)
    worst = np.square(wanted_NP - targets_NP.mean(axis=0)).sum()
    made = ridge_decoders(rows_N2, targets_NP)
    made["network"] = network_decoder(rows_N2, targets_NP, seed=0, device=CPU)
    assert len(made) == len(RIDGES) + 1
    for name, decode in made.items():
        share = 0.2 if name == "network" else 0.99
        assert np.square(decode(private_N2) - wanted_NP).sum() < share * worst, name
    least = made[f"linear, ridge {RIDGES[0]:g}"]
    assert np.square(least(private_N2) - wanted_NP).sum() < 0.01 * worst
    groups_N = np.arange(200) % 5
    chosen = train_decoder(rows_N2, targets_NP, groups_N, basis.sound_width, seed=0, device=CPU)
    assert set(chosen.names) <= made.keys()
    assert np.square(chosen(private_N2) - wanted_NP).sum() < 0.2 * worst


def test_prototypes_are_those_the_device_makes() -> None:
    outputs = some_outputs()
    for epsilon in (None, 2.0):
        made = make_upload(
            Mode("prototypes", 6, epsilon), outputs, seed=3, noise_seed=9, clip_per_cluster=3, labels_N=None
        )
        sent = make_prototypes(
            outputs.probabilities_NC, seed=3, min_cluster=6, noise=epsilon, noise_seed=None if epsilon is None else 9
        )
        np.testing.assert_allclose(made.rows_KV, sent.values_KC, atol=1e-6)
        np.testing.assert_array_equal(made.sizes_K, sent.sizes_K)
        np.testing.assert_array_equal(np.bincount(made.labels_N), sent.sizes_K)


def test_feature_centroids_are_means_over_the_same_clusters() -> None:
    outputs = some_outputs()
    options = {"seed": 3, "noise_seed": 0, "clip_per_cluster": 3, "labels_N": None}
    prototypes = make_upload(Mode("prototypes", 3), outputs, **options)
    centroids = make_upload(Mode("feature-centroids", 3), outputs, **options)
    np.testing.assert_array_equal(prototypes.labels_N, centroids.labels_N)
    first = prototypes.labels_N == 0
    np.testing.assert_allclose(centroids.rows_KV[0, :8], outputs.audio_ND[first].mean(axis=0), atol=1e-6)
    assert centroids.message_bytes > prototypes.message_bytes
    with pytest.raises(BadPrototypes, match="too few"):
        make_upload(Mode("prototypes", 41), outputs, **options)


def test_bad_modes_are_refused() -> None:
    assert len(all_modes([3, 6], [1.0])) == 8
    with pytest.raises(ValueError, match="floors are at least 2"):
        all_modes([1, 3], [])
    with pytest.raises(ValueError, match="above 0"):
        all_modes([3], [0.0])


def person(rng: np.random.Generator, clips: int) -> StudentOutputs:
    """Return clips of one person, which are close together like real ones."""
    place_C = rng.dirichlet(np.ones(4))
    return StudentOutputs(
        (rng.standard_normal(8) + rng.standard_normal((clips, 8))).astype(np.float32),
        (rng.standard_normal(8) + rng.standard_normal((clips, 8))).astype(np.float32),
        rng.dirichlet(20 * place_C + 0.5, clips).astype(np.float32),
    )


@pytest.mark.parametrize(
    ("mode", "low", "high"),
    [(Mode("features"), 0.999, 1.0), (Mode("probabilities"), 0.999, 1.0), (Mode("stranger", 3), 0.44, 0.56)],
)
def test_membership_is_certain_with_every_row_and_chance_with_a_strangers(mode: Mode, low: float, high: float) -> None:
    rng = np.random.default_rng(5)
    drawn = draw([np.arange(60) + 60 * group for group in range(4)], 240, size=30, seed=1, shadows=24)
    people = [person(rng, 60) for _ in range(4)]
    public = StudentOutputs(
        *(np.concatenate([getattr(p, f.name) for p in people]) for f in dataclasses.fields(people[0]))
    )

    def upload(outputs: StudentOutputs, rows_N: np.ndarray) -> np.ndarray:
        return make_upload(
            mode, picked(outputs, rows_N), seed=0, noise_seed=0, clip_per_cluster=3, labels_N=None
        ).rows_KV

    shadows = [upload(public, np.flatnonzero(member_N)) for member_N in drawn.member_SN]
    near_SN = closeness(shadows, mode_rows(mode, public), 1.0)
    ratio = fit_likelihood_ratio(near_SN, drawn.member_SN, drawn.pool_SN & ~drawn.member_SN, drawn.stranger_SN)
    areas: dict[str, list[float]] = {"distance": [], "ratio": []}
    for _ in range(6):
        user = person(rng, 120)
        source = person(rng, 120) if mode.kind == "stranger" else user
        sent_KV = upload(source, np.arange(60))
        (near_N,) = closeness([sent_KV], mode_rows(mode, user), 1.0)
        base_N = closeness(shadows, mode_rows(mode, user), 1.0).mean(axis=0)
        for name, score_N in (("distance", near_N), ("ratio", ratio.score(near_N, base_N))):
            areas[name].append(auc(score_N[:60], score_N[60:]))
    for values in areas.values():
        assert low <= np.mean(values) <= high


def test_closeness_is_to_the_nearest_row_of_each_upload() -> None:
    rng = np.random.default_rng(0)
    uploads = [rng.random((rows, 3), np.float32) for rows in (1, 4, 2)]
    candidates_NV = np.concatenate([rng.random((5, 3), np.float32), uploads[1][2:3]])
    near_SN = closeness(uploads, candidates_NV, 2.0)
    for upload, near_N in zip(uploads, near_SN, strict=True):
        distances_NK = np.linalg.norm(candidates_NV[:, np.newaxis].astype(np.float64) - upload, axis=2)
        np.testing.assert_allclose(near_N, -np.log(distances_NK.min(axis=1) / 2 + 1e-4), rtol=1e-3)
    assert near_SN[1, 5] == near_SN.max()


def test_shadow_uploads_leave_half_of_a_person_out() -> None:
    pools = [np.arange(10), np.arange(10, 16)]
    drawn = draw(pools, 16, size=50, seed=0, shadows=4)
    assert drawn.member_SN.sum(axis=1).tolist() == [5, 3, 5, 3]
    assert not (drawn.member_SN & ~drawn.pool_SN).any()
    np.testing.assert_array_equal(drawn.stranger_SN, ~drawn.pool_SN)
    alone = draw([np.arange(16)], 16, size=4, seed=0, shadows=4)
    np.testing.assert_array_equal(alone.stranger_SN, ~alone.member_SN)
    with pytest.raises(ValueError, match="too few public clips"):
        draw([np.arange(1)], 1, size=4, seed=0, shadows=4)
    assert hash_seed(1, "a", "b") != hash_seed(1, "a", "c")


def test_small_probabilities_are_shown_by_their_logarithms() -> None:
    view = attacker_view(np.array([[0.999, 0.001], [0.99, 0.01]], np.float32), in_features=False)
    assert view.shape == (2, 4)
    assert view[1, 3] - view[0, 3] > 2


def summary(kind: str, rate: float, area: float, epsilon: float | None = None, spread: float = 0.02) -> ModeSummary:
    def of(value: float) -> Spread:
        return Spread(value, spread, 6)

    keys = [f"{what}_{how}" for what in ("sound", "picture") for how in ("same_class", "retrieval")]
    return ModeSummary(
        "a mode",
        kind,
        3,
        epsilon,
        of(300),
        of(10),
        dict.fromkeys(keys, of(rate)),
        {"distance, same person": of(area)},
        {"distance, same person": of(area)},
        {"prior_error": of(0.2), "prior_error_uniform": of(0.6)},
    )


def test_words_follow_the_figures_and_promise_nothing_of_k_means() -> None:
    said = " ".join(words(summary("features", 0.97, 1.0), 0.02))
    assert "nearly always identifies the right clip" in said
    assert "can nearly always tell whether it was among the clips" in said
    assert "every clip has its own row" in said
    assert "a little better than by guessing" in " ".join(words(summary("prototypes", 0.55, 0.55), 0.02))
    plain = " ".join(words(summary("prototypes", 0.5, 0.7), 0.02))
    assert "was not shown to reveal more of a clip than its class" in plain
    assert "can tell better than by guessing" in plain
    assert "That is no formal guarantee" in plain
    assert "private" not in plain
    # A mean of 0.65 within two standard errors of one half is not reported as success.
    assert "was not shown to be able to tell" in " ".join(words(summary("prototypes", 0.5, 0.65, spread=0.4), 0.02))
    noisy = " ".join(words(summary("prototypes", 0.5, 0.5, epsilon=10.0), 0.02))
    assert "formal guarantee of epsilon 10 per upload" in noisy
    assert "promises little" in noisy
