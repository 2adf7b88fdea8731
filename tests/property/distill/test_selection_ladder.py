"""Every strategy is compared with brute force and keeps its promises, on any input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from isthmus.data.label_shift import class_prior
from isthmus.distill.selection import STRATEGIES, Public, Selection, Wanted, class_oracle, nearest, turns
from isthmus.distill.selection.density import MOST, NEGLIGIBLE
from isthmus.distill.selection.prior import client_prior, own_prior
from isthmus.distill.selection.quota import largest_remainder, quotas
from isthmus.distill.selection.space import by_both, by_probability
from isthmus.distill.selection.transport import EPSILON, _round, sinkhorn

PICKING = ("cosine", "random", "round_robin", "quota", "transport")


def chosen(name: str, wanted: Wanted, public: Public, samples_per_row: int) -> Selection:
    return STRATEGIES[name](wanted, public, samples_per_row, np.random.default_rng(0))


@st.composite
def problems(draw, with_features=None):
    """Draw coarse probabilities with dozens of ties, labels that mostly agree, and coarse features or none."""
    classes = draw(st.integers(2, 6))
    rows, samples = draw(st.integers(1, 6)), draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = rng.integers(0, 4, size=(draw(st.integers(1, 8)), classes)) + 1e-3
    pool = (levels / levels.sum(axis=1, keepdims=True)).astype(np.float32)
    of_row, of_sample = rng.integers(0, len(pool), rows), rng.integers(0, len(pool), samples)
    features_NE = features_KE = None
    if draw(st.booleans()) if with_features is None else with_features:
        grid = rng.integers(-2, 3, size=(len(pool), 4)).astype(np.float32)
        features_NE = grid[of_sample] + rng.integers(0, 2, size=(samples, 4)).astype(np.float32)
        features_KE = grid[of_row] + np.float32(0.25)
    labels_N = np.where(rng.random(samples) < 0.8, pool[of_sample].argmax(axis=1), rng.integers(0, classes, samples))
    wanted = Wanted(pool[of_row], rng.integers(1, 9, rows).astype(np.int32), features_KE)
    return wanted, Public(pool[of_sample], labels_N, features_NE), draw(st.integers(1, 9))


@given(problems())
@settings(max_examples=60, deadline=None)
def test_promised_number_no_duplicates_mean_weight_one_and_the_same_again(problem):
    wanted, public, samples_per_row = problem
    for name in STRATEGIES:
        selection = chosen(name, wanted, public, samples_per_row)
        assert len(set(selection.indices_S.tolist())) == len(selection) > 0
        assert selection.indices_S.min() >= 0
        assert selection.indices_S.max() < len(public)
        assert selection.weights_S.dtype == np.float32
        assert selection.weights_S.mean() == pytest.approx(1, abs=1e-4)
        assert 0 < selection.effective_size <= len(selection) * (1 + 1e-6)
        if name in PICKING:
            assert len(selection) == min(len(wanted.sizes_K) * samples_per_row, len(public))
            assert not selection.weighted
        again = chosen(name, wanted, public, samples_per_row)
        assert np.array_equal(again.indices_S, selection.indices_S)
        assert np.array_equal(again.weights_S, selection.weights_S)


@given(problems(), st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_blocks_guesses_and_groups_change_nothing(problem, block_rows):
    """The sweep in small blocks and groups, with guessed floors, gives the same result as in one piece."""
    wanted, public, samples_per_row = problem
    space = by_probability(wanted, public) if wanted.features_KE is None else by_both(wanted, public)
    exact_KN = space.queries_KV @ space.vectors(slice(None)).T
    keep_K = np.full(len(wanted.sizes_K), samples_per_row)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest, "_SAMPLE", 4)
        patch.setattr(nearest, "GROUP_ROWS", 2)
        found = nearest.best(space.queries_KV, space.pool(block_rows), keep_K)
        swept = {name: chosen(name, wanted, public, samples_per_row) for name in PICKING}
    for (similarity_M, index_M), exact_N in zip(found, exact_KN, strict=True):
        order_N = np.argsort(-exact_N, kind="stable")[:samples_per_row]
        assert index_M.tolist() == order_N.tolist()
        assert similarity_M.tolist() == exact_N[order_N].tolist()
    for name, selection in swept.items():
        assert np.array_equal(selection.indices_S, chosen(name, wanted, public, samples_per_row).indices_S)


def likeness(wanted: Wanted, public: Public) -> np.ndarray:
    """Return round-robin's similarity on the whole matrix: exact cosines, times that of features if there are any."""
    if wanted.features_KE is None:
        space = by_probability(wanted, public)
        return space.queries_KV @ space.vectors(slice(None)).T
    space, classes = by_both(wanted, public), wanted.prototypes_KC.shape[1]
    vectors_NV = space.vectors(slice(None))
    probability_KN = space.queries_KV[:, :classes] @ vectors_NV[:, :classes].T / space.unit
    return probability_KN * (1 + space.queries_KV[:, classes:] @ vectors_NV[:, classes:].T / space.unit)


@given(problems(), st.sampled_from([1, 6, 4_000_000]))
@settings(max_examples=100, deadline=None)
def test_round_robin_takes_turns_however_few_candidates_it_keeps(problem, candidates):
    wanted, public, samples_per_row = problem
    if wanted.features_KE is not None:
        samples_per_row = len(public)  # Every sample is then a candidate of every row, and the product alone decides.
        candidates = 4_000_000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "CANDIDATES", candidates)
        selection = chosen("round_robin", wanted, public, samples_per_row)
    order_KN = np.argsort(-likeness(wanted, public), axis=1, kind="stable")
    taken: list[int] = []
    while len(taken) < min(len(order_KN) * samples_per_row, len(public)):
        for order_N in order_KN[: min(len(order_KN) * samples_per_row, len(public)) - len(taken)]:
            taken.append(next(index for index in order_N.tolist() if index not in taken))
    assert selection.indices_S.tolist() == taken


@given(problems())
@settings(max_examples=80, deadline=None)
def test_quota_meets_the_quotas_with_the_nearest_of_each_class(problem):
    wanted, public, samples_per_row = problem
    classes = wanted.prototypes_KC.shape[1]
    selection = chosen("quota", wanted, public, samples_per_row)
    prior_C, own_C = client_prior(wanted, public)
    capacity_C = np.bincount(public.labels_N, minlength=classes)
    counts_C = quotas(prior_C, capacity_C, len(selection))
    labels_S = public.labels_N[selection.indices_S]
    assert np.bincount(labels_S, minlength=classes).tolist() == counts_C.tolist()
    behind_KC = wanted.sizes_K[:, None] * wanted.prototypes_KC * (prior_C / own_C)
    behind_KC /= (wanted.prototypes_KC * (prior_C / own_C)).sum(axis=1, keepdims=True)
    if wanted.features_KE is None:
        exact_KN = nearest.rounded_unit(wanted.prototypes_KC) @ nearest.rounded_unit(public.probabilities_NC).T
        for c in np.flatnonzero(counts_C):
            taken: list[int] = []
            for exact_N, count in zip(exact_KN, largest_remainder(behind_KC[:, c], counts_C[c]), strict=True):
                order = [i for i in np.argsort(-exact_N, kind="stable").tolist() if public.labels_N[i] == c]
                taken += [i for i in order if i not in taken][:count]
            assert selection.indices_S[labels_S == c].tolist() == taken


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.integers(0, 2**32 - 1), st.floats(0, 1), st.booleans())
@settings(max_examples=100, deadline=None)
def test_quotas_are_filled_and_never_over_capacity(capacity, seed, share, hollow):
    capacity_C = np.array(capacity)
    rng = np.random.default_rng(seed)
    prior_C = rng.dirichlet(np.ones(len(capacity)))
    if hollow:
        prior_C[rng.integers(len(capacity))] = 0
        prior_C = prior_C / prior_C.sum() if prior_C.sum() > 0 else np.ones(len(capacity)) / len(capacity)
    total = int(share * capacity_C.sum())
    counts_C = quotas(prior_C, capacity_C, total)
    assert counts_C.sum() == total
    assert (counts_C <= capacity_C).all()
    if (capacity_C >= total).all() and total:
        assert (np.abs(counts_C - prior_C * total) < 1).all()


@given(st.integers(0, 2**32 - 1), st.integers(2, 4), st.integers(1, 12), st.sampled_from([0.0, 1.0, 5.0]))
@settings(max_examples=40, deadline=None)
def test_em_finds_what_a_direct_search_for_the_likeliest_prior_finds(seed, classes, rows, pseudo_clips):
    rng = np.random.default_rng(seed)
    rows_KC = rng.dirichlet(np.full(classes, 0.7), rows).astype(np.float32)
    sizes_K = rng.integers(1, 9, rows)
    own_C = rng.dirichlet(np.full(classes, 5.0))

    def objective(prior_C):
        evidence_K = rows_KC.astype(float) @ (prior_C / own_C) / rows_KC.sum(axis=1)
        return sizes_K @ np.log(evidence_K) + pseudo_clips * own_C @ np.log(np.maximum(prior_C, 1e-300))

    def search(logits_C):
        prior_C = np.exp(logits_C - logits_C.max())
        return -objective(prior_C / prior_C.sum())

    found_C = class_prior(rows_KC, sizes_K, own_C, pseudo_clips=pseudo_clips)
    assert found_C.sum() == pytest.approx(1)
    likeliest = max(
        -minimize(search, start, method="Nelder-Mead", options={"maxiter": 4_000, "fatol": 1e-10}).fun
        for start in (np.zeros(classes), np.log(found_C + 1e-9))
    )
    assert objective(found_C) >= likeliest - 1e-4


def test_em_recovers_a_shifted_prior_from_single_outputs():
    """EM recovers the prior from calibrated outputs of 4,000 draws; their plain mean does not."""
    rng = np.random.default_rng(0)
    own_C, true_C = np.array([1, 1, 1]) / 3, np.array([0.7, 0.2, 0.1])
    means_CD = 1.5 * np.eye(3)
    points_ND = means_CD[rng.choice(3, 4_000, p=true_C)] + rng.standard_normal((4_000, 3))
    likelihood_NC = np.exp(-0.5 * np.square(points_ND[:, None] - means_CD).sum(axis=2))
    outputs_NC = (likelihood_NC / likelihood_NC.sum(axis=1, keepdims=True)).astype(np.float32)
    np.testing.assert_allclose(class_prior(outputs_NC, np.ones(4_000), own_C), true_C, atol=0.03)
    assert np.abs(outputs_NC.mean(axis=0) - true_C).max() > 0.1


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 30), st.floats(1.05, 4.0))
@settings(max_examples=60, deadline=None)
def test_sinkhorn_keeps_its_marginals(seed, rows, columns, room):
    rng = np.random.default_rng(seed)
    cost_KM = rng.random((rows, columns)) * 2
    mass_K = rng.dirichlet(np.ones(rows))
    room_U = np.full(columns, room / columns)
    plan = sinkhorn(cost_KM, np.tile(np.arange(columns), (rows, 1)), mass_K, room_U, epsilon=EPSILON)
    np.testing.assert_allclose(plan.mass_KM.sum(axis=1), mass_K, rtol=1e-9)
    load_U = plan.mass_KM.sum(axis=0)
    assert (load_U <= room_U * (1 + plan.excess) * (1 + 1e-9)).all()
    assert plan.excess < 0.05


def test_sinkhorn_solves_its_problem():
    """The plan equals that of a general optimiser on the same problem."""
    rng = np.random.default_rng(3)
    cost_KM, mass_K, room_U, epsilon = rng.random((2, 4)), np.array([0.6, 0.4]), np.full(4, 0.3), 0.2
    plan = sinkhorn(cost_KM, np.tile(np.arange(4), (2, 1)), mass_K, room_U, epsilon=epsilon)

    def value(flat):
        mass = np.maximum(flat, 1e-12)
        return float(mass @ cost_KM.ravel() + epsilon * mass @ np.log(mass))

    constraints = [
        {"type": "eq", "fun": lambda flat: flat.reshape(2, 4).sum(axis=1) - mass_K},
        {"type": "ineq", "fun": lambda flat: room_U - flat.reshape(2, 4).sum(axis=0)},
    ]
    start = np.outer(mass_K, np.full(4, 0.25)).ravel()
    found = minimize(value, start, method="SLSQP", bounds=[(1e-9, 1)] * 8, constraints=constraints)
    np.testing.assert_allclose(plan.mass_KM.ravel(), found.x, atol=2e-3)


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_rounding_takes_pairs_by_falling_mass(seed, rows, width):
    rng = np.random.default_rng(seed)
    index_KM = np.stack([rng.permutation(15)[:width] for _ in range(rows)])
    mass_KM = rng.integers(0, 4, (rows, width)) / 4
    counts_K = rng.integers(0, 4, rows)
    pairs = sorted((-mass_KM[k, m], index_KM[k, m], k) for k in range(rows) for m in range(width))
    expected: list[list[int]] = [[] for _ in range(rows)]
    for _, index, row in pairs:
        if len(expected[row]) < counts_K[row] and not any(index in taken for taken in expected):
            expected[row].append(index)
    assert _round(mass_KM, index_KM, counts_K) == expected


@given(problems(with_features=False))
@settings(max_examples=60, deadline=None)
def test_transport_gives_each_prototype_its_share(problem):
    """Rows that are the only ones of their kind, far apart: each gets its share by size from its own kind."""
    wanted, _, samples_per_row = problem
    classes = wanted.prototypes_KC.shape[1]
    sizes_C = np.resize(wanted.sizes_K, classes)
    corners = Wanted(np.eye(classes, dtype=np.float32), sizes_C)
    labels_N = np.repeat(np.arange(classes), 2 * classes * samples_per_row)
    public = Public(np.eye(classes, dtype=np.float32)[labels_N], labels_N)
    picks = chosen("transport", corners, public, samples_per_row).indices_S
    shares_C = largest_remainder(sizes_C / sizes_C.sum(), classes * samples_per_row)
    assert np.bincount(labels_N[picks], minlength=classes).tolist() == shares_C.tolist()


def test_transport_prefers_one_of_each_kind_to_many_of_one():
    """18 copies of the nearest sample and 6 different ones a little farther, 12 to be picked."""
    copies = np.tile(np.float32([0.6, 0.4, 0.0]), (18, 1))
    step_N = 0.015 * np.arange(6, dtype=np.float32)
    others = np.stack([0.6 - step_N, 0 * step_N, 0.4 + step_N], axis=1)
    wanted = Wanted(np.float32([[0.6, 0.2, 0.2]]), np.int32([9]))
    public = Public(np.concatenate([copies, others]), np.zeros(24, np.int64))
    assert np.isin(np.arange(18, 24), chosen("transport", wanted, public, 12).indices_S).all()
    assert np.isin(np.arange(18, 24), chosen("cosine", wanted, public, 12).indices_S).sum() <= 1


@given(problems())
@settings(max_examples=40, deadline=None)
def test_density_weights_are_bounded_and_do_not_hang_on_the_order_of_the_rows(problem):
    wanted, public, _ = problem
    selection = chosen("density_ratio", wanted, public, 1)
    assert selection.weights_S.max() <= MOST * 1.0001
    assert selection.weights_S.min() >= NEGLIGIBLE * len(selection) / len(public) * 0.999
    assert (np.diff(selection.indices_S) > 0).all()
    order_K = np.random.default_rng(1).permutation(len(wanted.sizes_K))
    features_KE = None if wanted.features_KE is None else wanted.features_KE[order_K]
    turned = chosen(
        "density_ratio", Wanted(wanted.prototypes_KC[order_K], wanted.sizes_K[order_K], features_KE), public, 1
    )
    if np.array_equal(turned.indices_S, selection.indices_S):
        np.testing.assert_allclose(turned.weights_S, selection.weights_S, rtol=1e-3)
    else:  # A sample on the very bound of what is negligible.
        assert len(np.setxor1d(turned.indices_S, selection.indices_S)) <= 0.1 * len(public) + 1


def test_density_weights_near_the_true_ratio():
    """Two Gaussian classes in the logit; 4 in 5 of the client's clips are of the second. The true ratio is known."""
    rng = np.random.default_rng(0)
    labels_N = rng.integers(0, 2, 4_000)
    points_N = 2.0 * (labels_N * 2 - 1) + rng.standard_normal(4_000)
    second_N = 1 / (1 + np.exp(-4 * points_N))
    public = Public(np.stack([1 - second_N, second_N], axis=1).astype(np.float32), labels_N)
    mine = np.concatenate([rng.choice(np.flatnonzero(labels_N == 0), 60), rng.choice(np.flatnonzero(labels_N), 240)])
    wanted = Wanted(public.probabilities_NC[mine], np.ones(300, np.int32))
    selection = chosen("density_ratio", wanted, public, 1)
    weights_N = np.zeros(4_000)
    weights_N[selection.indices_S] = selection.weights_S
    share = weights_N[labels_N == 1].sum() / weights_N.sum()
    assert share == pytest.approx(0.8, abs=0.05)


@given(problems(), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_the_oracle_fills_the_true_counts(problem, seed):
    wanted, public, samples_per_row = problem
    classes = wanted.prototypes_KC.shape[1]
    true_C = np.random.default_rng(seed).integers(0, 5, classes)
    true_C[0] += 1
    selection = class_oracle(true_C)(wanted, public, samples_per_row, np.random.default_rng(seed))
    capacity_C = np.bincount(public.labels_N, minlength=classes)
    expected_C = quotas(true_C / true_C.sum(), capacity_C, len(selection))
    assert np.bincount(public.labels_N[selection.indices_S], minlength=classes).tolist() == expected_C.tolist()
    assert len(set(selection.indices_S.tolist())) == len(selection)
    assert "class_oracle" not in STRATEGIES


def test_the_classifiers_own_prior_is_the_mean_of_its_outputs():
    outputs_NC = np.random.default_rng(0).dirichlet(np.ones(4), 100_000).astype(np.float32)
    np.testing.assert_allclose(own_prior(outputs_NC), outputs_NC.mean(axis=0, dtype=np.float64), rtol=1e-6)
