"""What helps one person: scores, splits, the methods on invented people, and the whole of it on invented features."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from isthmus.data.cache.read import ClipArrays
from isthmus.data.groups import Groups
from isthmus.data.transforms import InputSpec
from isthmus.distill.recipes import Recipe
from isthmus.distill.student.centred import fit_centred
from isthmus.distill.student.evaluate import StudentOutputs
from isthmus.experiments.personal.findings.scores import Scores, agreement, calibration_error, scores
from isthmus.experiments.personal.ladder import bases, cloud, nested, run
from isthmus.experiments.personal.ladder.measure import (
    CHOSEN,
    RUNNING,
    Row,
    device_rows,
    measured,
    over_people,
    running_rows,
)
from isthmus.experiments.personal.ladder.membership import separation, suspect
from isthmus.experiments.personal.ladder.methods import LADDER, Known, Seen, as_it_answers, as_the_device, lame
from isthmus.experiments.personal.ladder.person import HALVES, HEADS, LEVEL, SENTENCE, tasks
from isthmus.experiments.personal.ladder.run import by_person
from isthmus.experiments.personal.ladder.tables import cloud_section, membership, sections
from isthmus.proto.messages import Captured
from tests.rigs.distill.release import tiny_recipe

CLASSES = ("NEU", "HAP", "SAD")
PEOPLE = 12
WIDTH = 6


def _softmax(scores_NC: np.ndarray) -> np.ndarray:
    powers_NC = np.exp(scores_NC - scores_NC.max(axis=1, keepdims=True))
    return (powers_NC / powers_NC.sum(axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def base() -> bases.Base:
    """A base student of 12 invented people, whose features are a class, a shift of the person and noise."""
    rng = np.random.default_rng(1)
    names, labels, actors = [], [], []
    for person in range(PEOPLE):
        for sentence in ("AA1", "AA2", "BB1", "BB2"):
            for label, emotion in enumerate(CLASSES):
                for level in ("NO", "ST"):
                    names.append(f"{1000 + person}_{sentence}_{emotion}_{level}")
                    labels.append(label)
                    actors.append(str(1000 + person))
    labels_N, person_N = np.array(labels), np.array([int(actor) - 1000 for actor in actors])
    shape_MCD = 1.5 * rng.normal(size=(2, len(CLASSES), WIDTH))
    shift_MPD = 2.0 * rng.normal(size=(2, PEOPLE, WIDTH))
    noise_MND = rng.normal(size=(2, len(labels), WIDTH))
    features_MND = (shape_MCD[:, labels_N] + shift_MPD[:, person_N] + noise_MND).astype(np.float32)
    own_MNC = np.einsum("mnd,mcd->mnc", features_MND, shape_MCD) / 4
    raw = {
        Captured.BOTH: _softmax(own_MNC.sum(axis=0)),
        Captured.SOUND: _softmax(own_MNC[0]),
        Captured.PICTURE: _softmax(own_MNC[1]),
    }
    clips = ClipArrays(
        names=tuple(names),
        labels_N=labels_N,
        actors=tuple(actors),
        keys=tuple(names),
        spectrograms_NFT=np.zeros((len(names), 1, 1), np.float32),
        frames_NKHWC=np.zeros((len(names), 1, 1, 1, 3), np.uint8),
        spec=InputSpec(),
        classes=CLASSES,
        skipped=(),
        source=None,
    )
    public_N = np.flatnonzero(person_N >= 2)
    return bases.Base("1000-1001", clips, public_N, features_MND, dict.fromkeys(HEADS, raw))


@pytest.fixture(scope="module")
def known(base: bases.Base) -> Known:
    public_N = base.public_N
    labels_N = np.asarray(base.clips.labels_N)[public_N]
    actors = [base.clips.actors[row] for row in public_N]
    made = fit_centred(base.features_MND[:, public_N], np.ones((len(public_N), 2)), labels_N, actors)
    return Known(made, np.full(3, 1 / 3, np.float32))


def _rows(base: bases.Base, actor: str) -> np.ndarray:
    return np.flatnonzero([each == actor for each in base.clips.actors])


def test_splits_have_no_clip_on_both_sides(base: bases.Base) -> None:
    person = base.person("1000", _rows(base, "1000"))
    found = tasks(person, 0, (0, 2))
    assert [task.protocol for task in found] == [HALVES, HALVES, SENTENCE, SENTENCE, LEVEL, LEVEL]
    for task in found:
        assert not set(task.own_S) & set(task.test_T)
    assert len(set(person.labels_N[found[1].own_S])) == 2
    said = {person.clips[row].split("_")[1][:2] for row in found[2].own_S}
    assert said == {"AA"} and {person.clips[row].split("_")[1][:2] for row in found[2].test_T} == {"BB"}
    again = tasks(person, 0, (0, 2))
    assert all(np.array_equal(one.own_S, other.own_S) for one, other in zip(found, again, strict=True))
    assert not np.array_equal(found[0].own_S, tasks(person, 1, (0,))[0].own_S)


def test_scores_by_hand() -> None:
    sure, half = [1.0, 0.0], [0.45, 0.55]
    found = scores(np.array([sure, sure, half]), np.array([sure, half, half]), np.array([0, 1, 1]))
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.recall == pytest.approx(3 / 4)
    assert found.changed == pytest.approx(1 / 3)
    assert found.calibration == pytest.approx(2 / 3 * 0.5 + 1 / 3 * 0.45)
    assert calibration_error(np.array([sure]), np.array([0])) == 0
    assert agreement(np.array([sure]), np.array([half])) == pytest.approx(0.45)
    with pytest.raises(ValueError, match="no clips"):
        scores(np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0, int))


def test_lame_turns_a_doubtful_clip_to_its_neighbours() -> None:
    features_ND = np.array([[1, 0], [1, 0.1], [1, -0.1], [0, 1], [0.1, 1], [-0.1, 1.0]])
    answers_NC = np.array([[0.9, 0.1], [0.9, 0.1], [0.45, 0.55], [0.1, 0.9], [0.1, 0.9], [0.1, 0.9]])
    told_N = lame(answers_NC, features_ND, neighbours=2).argmax(axis=1)
    assert told_N.tolist() == [0, 0, 0, 1, 1, 1]


def test_the_offset_helps_people_who_differ_by_a_shift(base: bases.Base, known: Known) -> None:
    gains = []
    for actor in ("1000", "1001"):
        person = base.person(actor, _rows(base, actor))
        task = tasks(person, 0, (0,))[0]
        seen = Seen.of(person, task, known, 0)
        right = {
            name: (LADDER[name](seen, known).argmax(axis=1) == person.labels_N[task.test_T]).mean()
            for name in ("base", "offset", "offset by true labels (bound)", "plain mean")
        }
        gains.append(right["offset"] - right["base"])
        assert right["offset by true labels (bound)"] >= right["base"]
    assert np.mean(gains) > 0.1


def test_a_device_that_runs_learns_from_what_it_has_answered(base: bases.Base, known: Known) -> None:
    """Its first answers are those of the device, its later ones are not; each clip is answered before it is learned."""
    person = base.person("1000", _rows(base, "1000"))
    task = tasks(person, 0, (0,))[0]
    still = as_the_device(Seen.of(person, task, known, 0), known, by_margin=True).answers[0]
    order_T = Seen.of(person, task, known, 0).rng.permutation(len(still))
    told = as_it_answers(Seen.of(person, task, known, 0), known, 5)
    np.testing.assert_array_equal(told[order_T[:5]], still[order_T[:5]])
    assert np.abs(told[order_T[5:]] - still[order_T[5:]]).max() > 1e-6
    at_once = as_it_answers(Seen.of(person, task, known, 0), known, len(still))
    np.testing.assert_array_equal(at_once, still)
    rows = list(running_rows(person, known, 0, (0,)))
    assert {row.method for row in rows} == {RUNNING} and rows[0].test_clips == len(still)


def test_every_method_is_measured_and_tabulated(base: bases.Base, known: Known, tmp_path: Path) -> None:
    public = {str(1000 + person): _rows(base, str(1000 + person)) for person in range(2, PEOPLE)}
    constants = nested.choose(base, public, (0,), 0) if PEOPLE - 2 > 10 else nested.GRID[0]
    rows: list[Row] = []
    for actor in ("1000", "1001"):
        rows += device_rows(base.person(actor, _rows(base, actor)), known, 0, (0, 1))
        rows += measured(base.person(actor, _rows(base, actor)), known, constants, 0, (0, 1))
    methods = {row.method for row in rows}
    assert set(LADDER) | {CHOSEN, "device, no labels", "device, 12 corrections asked by margin"} <= methods
    assert all(row.gain == 0 and row.scores.changed == 0 for row in rows if row.method == "base")
    whole = [row for row in rows if (row.protocol, row.classes) == (HALVES, 0)]
    of_base = over_people([row for row in whole if row.method == "base"])
    asked = over_people([row for row in whole if row.method == "device, 12 corrections asked by margin"])
    assert asked.accuracy >= of_base.accuracy and asked.people == 2
    kept = by_person(rows)["1000"][f"{HALVES}, all classes"]["offset"]["0"][0]
    assert kept["accuracy"] == pytest.approx(
        next(row.scores.accuracy for row in whole if (row.person, row.method) == ("1000", "offset")), abs=1e-4
    )
    ladder, guard = sections(rows)
    assert "halves, users of all classes: 2 people" in ladder.tables[0].markdown()
    assert "agreement" in guard.tables[0].markdown()


def test_picks_in_the_cloud_are_equally_many(base: bases.Base, known: Known) -> None:
    person = base.person("1000", _rows(base, "1000"))
    rows = list(cloud.of_person(base, person, known, 0, (0,)))
    assert [row.method for row in rows[:2]] == ["base", "offset"]
    assert {row.method.split(",")[0] for row in rows[2:]} == set(cloud.PICKS)
    assert "cluster, centred heads and offset" in cloud_section(rows).tables[0].markdown()
    task = tasks(person, 0, (0,))[0]
    weights = cloud._weights(base, Seen.of(person, task, known, 0), known, 0)
    picked = {name: int((weights_N > 1).sum()) for name, weights_N in weights.items()}
    assert picked["all"] == 0 < picked["cluster"] == picked["random"] == picked["people"]


def test_a_member_is_told_from_a_stranger_only_as_far_as_signals_go(base: bases.Base, known: Known) -> None:
    people = [
        suspect(base.person(a, _rows(base, a)), a > "1001", known.centred) for a in ("1000", "1001", "1002", "1003")
    ]
    assert [one.member for one in people] == [False, False, True, True]
    assert all(np.isfinite(one.signals).all() for one in people)
    assert "loss" in membership([people]).tables[0].markdown()
    assert separation(np.array([2.0, 3.0]), np.array([1.0, 2.0])) == pytest.approx(0.875)
    with pytest.raises(ValueError, match="no members"):
        separation(np.zeros(0), np.zeros(2))


def test_people_are_the_units() -> None:
    def row(person: str, seed: int, gain: float) -> Row:
        return Row(person, "", seed, HALVES, 0, "offset", 9, 9, Scores(0.5 + gain, 0.5, 0.1, 0.2), gain, 0.01, {})

    found = over_people([row("a", 0, 0.1), row("a", 1, 0.3), row("b", 0, -0.1), row("b", 1, -0.1)])
    assert found.people == 2
    assert found.gain == pytest.approx(0.05)
    assert found.standard_error == pytest.approx(0.15)
    assert (found.worse, found.surely_worse) == (0.5, 0.5)


def test_no_public_clip_shares_a_recording_with_a_person_left_out(base: bases.Base) -> None:
    names = base.clips.names
    own, other = names[0], names[-1]
    groups = Groups({name: frozenset({"shared"} if name in (own, other) else {name}) for name in names})
    public_N, of_person = bases.rows_of(base.clips, groups, ("1000",))
    assert len(of_person["1000"]) == 24
    assert len(names) - 1 not in public_N and len(public_N) == len(names) - 24 - 1


def test_kept_rows_are_of_the_same_clips_preset_and_classes(
    base: bases.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips, recipe = base.clips, tiny_recipe()
    groups = Groups({name: frozenset({name}) for name in clips.names})
    public_N, _ = bases.rows_of(clips, groups, ("1000",))
    outputs = StudentOutputs(*base.features_MND, base.raw[HEADS[0]][Captured.BOTH])
    path = tmp_path / "folds" / "1000" / f"base-0-{bases.key(clips, public_N, recipe)}.npz"
    bases._save(path, outputs, *(base.raw[head] for head in HEADS))

    def rows(*counts: int, recipe: Recipe = recipe, clips: ClipArrays = clips) -> list[Row]:
        return run.on_device(tmp_path, recipe, clips, groups, run.Plan((("1000",),), (0,), counts), lambda line: None)

    found = rows(0)
    assert {row.classes for row in found} == {0} and {row.classes for row in rows(0, 2)} == {0, 2}
    monkeypatch.setattr(run, "device_rows", pytest.fail)
    assert rows(0) == found
    labels_N = clips.labels_N.copy()
    labels_N[0] = 1
    with pytest.raises(FileNotFoundError):
        rows(0, recipe=replace(recipe, name="other"))
    with pytest.raises(FileNotFoundError):
        rows(0, clips=replace(clips, labels_N=labels_N))
