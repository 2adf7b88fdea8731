"""The experiments on a synthetic set: every method and control; a killed run resumes with the same numbers."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from isthmus.data.groups import read_groups
from isthmus.data.layouts.listing import read_listing
from isthmus.data.synthetic.sets import make_crema_d
from isthmus.distill.prepare import begin_release, choose_split, release_split
from isthmus.distill.release import Release
from isthmus.experiments.cli import app
from isthmus.experiments.personal import cost, runs
from isthmus.experiments.personal.cells import study, work
from isthmus.experiments.personal.cells.cells import Asked, load, load_outputs
from isthmus.experiments.personal.cells.methods import METHODS, PAPER
from isthmus.experiments.personal.cost import LOOPS
from isthmus.experiments.personal.findings.habits import user_of
from isthmus.experiments.personal.options import PaperOptions, PeopleOptions
from tests.rigs.distill.release import tiny_recipe


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("synthetic") / "data"
    make_crema_d(root, actors=3, takes=2, seed=0, difficulty=0.2, progress=False)
    return root


def begin(root: Path, data: Path, private: str) -> None:
    """Begin a release in which every training takes one epoch; a personal one takes two."""
    listing = read_listing(data)
    tiny = tiny_recipe()
    once = dataclasses.replace(tiny.all_distill, epochs=1, batch_size=12)
    recipe = dataclasses.replace(
        tiny,
        classes=listing.classes,
        teacher=dataclasses.replace(tiny.teacher, audio=once, visual=once, head=once),
        personalise=dataclasses.replace(tiny.personalise, train=dataclasses.replace(once, epochs=2)),
        heads=once,
    )
    begin_release(root, listing, recipe, choose_split(listing, private_actors=private.split(",")), progress=False)


@pytest.fixture(scope="module")
def release(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a release with teacher and base student, so that every test here can run alone."""
    root = tmp_path_factory.mktemp("paper") / "release"
    begin(root, data, "1003")
    work.teach(work.TeachTask(str(root), 0))
    work.make_seed(work.StudentTask(str(root), 0))
    return root


def invoke(*args: object) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return result.output


def numbers(folder: Path) -> dict[str, Any]:
    """Return every cell without its wall times."""
    cells = {path.stem: json.loads(path.read_text()) for path in sorted((folder / "cells").glob("*.json"))}
    for cell in cells.values():
        del cell["stage_s"]
    return cells


def paper(data: Path, release: Path, out: Path, *more: object) -> list[object]:
    return ["paper", "--data", data, "--release", release, "--out", out, "--seeds", 1, "--workers", 1,
            "--upload-shares", "1", *more]  # fmt: skip


def test_every_method_is_measured(data: Path, release: Path, tmp_path: Path) -> None:
    output = invoke(*paper(data, release, tmp_path, "--clips-per-cluster", "3,6", "--upload-shares", "0.25,1"))
    assert "FAILED" not in output
    assert "1003.sensitive.cluster.s0.c3.u25: not run, since its share of the clips is too few" in output
    assert "| 0.25 |  |  |  | too few clips | too few clips |" in output, "two of six clips"
    made = numbers(tmp_path)
    cells = {(c["asked"]["scenario"], c["asked"]["method"], c["asked"]["clips_per_cluster"]) for c in made.values()}
    assert cells == {("sensitive", name, 3) for name in METHODS} | {("insensitive", name, 3) for name in PAPER} | {
        ("sensitive", "cluster", 6)
    }
    folder = tmp_path / "cells"
    all_serve = load(folder, Asked("1003", "insensitive", "cluster", 0))
    cluster = load(folder, Asked("1003", "sensitive", "cluster", 0))
    assert all_serve.selection_clips == all_serve.test_clips == 12
    half = [c for c in made.values() if c["asked"]["scenario"] == "sensitive"]
    means = {
        (c["asked"]["method"], c["asked"]["clips_per_cluster"]): (c["selected"], c["steps"])
        for c in half
        if c["asked"]["method"] not in ("all", "density-ratio", "own")
    }
    assert cluster.selected == 6, "half of 12 clips are two prototypes of three clips each"
    assert ("cluster", 6) in means and set(means.values()) == {(6, cluster.steps)}
    assert load(folder, Asked("1003", "sensitive", "all", 0)).plain == cluster.before
    on_selection, on_test = load_outputs(folder, cluster.asked)
    assert len(on_selection.labels_N) == cluster.selection_clips
    np.testing.assert_allclose(on_test.new_local_NC.sum(axis=1), 1, atol=1e-4)
    read = {c["asked"]["method"] for c in made.values() if c["masks_read"]}
    assert read == {"all"} | {name for name, method in METHODS.items() if method.heads_on == "all"}
    base = load(folder, Asked("1003", "sensitive", "all", 0))
    user = user_of(base, [base], load_outputs(folder, base.asked))
    assert user is not None
    assert base.masks_read["both"] == pytest.approx(user.right(user.habits()))
    scores = json.loads((tmp_path / "result.json").read_text())["scores"]
    assert scores.keys() == made.keys()
    assert scores[cluster.asked.name]["own head"]["accuracy"] == pytest.approx(cluster.plain, abs=1e-4)
    assert scores[cluster.asked.name]["teacher's head"]["accuracy"] == pytest.approx(cluster.teacher_head, abs=1e-4)
    page = (tmp_path / "report.html").read_text()
    assert (
        "Tables 5.2 and 5.4" in page
        and "guard" in page
        and "Simulated users of few classes" in page
        and "data:image/png;base64," in page
    )
    assert not re.search(r'(src|href)="(?!data:)', page)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("paper", "--upload-shares", "0"), "--upload-shares takes numbers above 0 and up to 1"),
        (("paper", "--upload-shares", "0.5,nan"), "'nan' is not a number"),
        (("paper", "--clips-per-cluster", "0"), "--clips-per-cluster numbers from 1 on"),
        (("people", "--together", "3"), "--together 3 leaves nobody public: this data set names 3 people"),
    ],
)
def test_settings_that_make_no_sense_are_refused_at_once(
    data: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    out = tmp_path / "out"
    refused = CliRunner().invoke(
        app, [words[0], "--data", str(data), "--preset", "tiny", "--out", str(out), *words[1:]]
    )
    assert refused.exit_code in (1, 2) and said in " ".join(refused.output.split()) and not out.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--preset", "smoke"], "other settings than --preset"),
        (["--balance", "joint", "--held-out", "0.3"], "other settings than --balance, --held-out"),
        (["--modality-dropout", "0.4"], "other settings than --modality-dropout"),
        (["--private-actors", "1001"], "other settings than --private-actors or --private-list"),
    ],
)
def test_options_of_a_new_release_are_refused_beside_one_that_differs(
    data: Path, release: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    usual = paper(data, release, tmp_path, "--scenarios", "sensitive", "--ladder", "none")
    refused = CliRunner().invoke(app, [str(arg) for arg in (*usual, *words)])
    assert refused.exit_code == 1 and not (tmp_path / "cells").exists()
    shown = " ".join(refused.output.split())
    assert "is a release already, of preset tiny" in shown and said in shown and "or leave out --release to" in shown


def test_a_release_of_the_folder_itself_sends_to_another_folder_and_changed_data_are_named(
    data: Path, release: Path
) -> None:
    listing = read_listing(data)
    groups = read_groups(data, [ref.name for ref in listing.refs])
    with pytest.raises(ValueError, match="other settings than --preset: leave these out to use it, or give another --"):
        runs._release(release, listing, groups, PaperOptions(data, release, preset="smoke"), [], None)
    people = PeopleOptions(data, release)
    assert runs._release(release, listing, groups, people, ["1003"], None).root == release
    with pytest.raises(
        ValueError, match="begun with other clips of 1001 than the data set has now: give another --out"
    ):
        runs._release(release, listing, groups, people, ["1001"], None)


def test_options_that_the_release_has_are_taken(data: Path, release: Path) -> None:
    opened, listing = Release.open(release), read_listing(data)
    has = PaperOptions(data, release, preset="tiny", balance="unimodal", held_out=opened.recipe.teacher.held_out)
    groups = read_groups(data, [ref.name for ref in listing.refs])
    for asked, private in ((has, ["1003"]), (PaperOptions(data, release), [])):
        assert runs._release(release, listing, groups, asked, private, None).root == release


def test_a_client_of_too_few_clips_is_refused_before_anything_is_trained(data: Path, tmp_path: Path) -> None:
    """A tenth of 36 clips is private: a client has one or two of them."""
    words = ["paper", "--data", str(data), "--preset", "tiny", "--out", str(tmp_path), "--workers", "1"]
    refused = CliRunner().invoke(app, words)
    said = " ".join(refused.output.split())
    assert refused.exit_code == 1 and "clips to select with and" in said and "add clips, or begin a release" in said
    assert not (tmp_path / "release" / "teacher" / "teacher.safetensors").exists() and not (tmp_path / "cells").exists()


def test_only_methods_that_send_prototypes_need_their_floor(data: Path, release: Path) -> None:
    opened, listing = Release.open(release), read_listing(data)
    folders = study.decoded(opened, listing, {"1003": release_split(opened).clients["1003"]})
    alone = Asked("1003", "sensitive", "own", 0, classes=1)  # one clip selects, and one tests
    study.check_clips(opened, folders, [alone, dataclasses.replace(alone, method="all")])
    with pytest.raises(ValueError, match="1 clips to select with and 1 to test"):
        study.check_clips(opened, folders, [dataclasses.replace(alone, method="oracle")])


def test_a_killed_run_goes_on_with_the_same_numbers(
    data: Path, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("--scenarios", "sensitive", "--ladder", "oracle", "--clips-per-cluster", "3")
    whole, killed = paper(data, release, tmp_path / "whole", *few), paper(data, release, tmp_path / "killed", *few)
    invoke(*whole)
    real, begun = work.make_cell, 0

    def make_some(task: work.CellTask) -> str:
        nonlocal begun
        begun += 1
        if begun > 3:
            raise KeyboardInterrupt
        return real(task)

    monkeypatch.setattr("isthmus.experiments.personal.cells.study.make_cell", make_some)
    stopped = CliRunner().invoke(app, [str(arg) for arg in killed])
    assert stopped.exit_code == 130
    assert len(numbers(tmp_path / "killed")) == 3
    monkeypatch.setattr("isthmus.experiments.personal.cells.study.make_cell", real)
    invoke(*killed)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    oracle = load(tmp_path / "whole" / "cells", Asked("1003", "sensitive", "oracle", 0))
    assert max(oracle.selected_per_class) - min(oracle.selected_per_class) <= 1, "the client has equal classes"


def test_cells_of_other_clips_another_release_or_another_student_are_made_again(
    data: Path, release: Path, tmp_path: Path
) -> None:
    few = ("--scenarios", "sensitive", "--ladder", "none", "--clips-per-cluster", "3")
    words = paper(data, release, tmp_path, *few)
    invoke(*words)
    paths = sorted((tmp_path / "cells").glob("*.json"))
    first = {path: json.loads(path.read_text()) for path in paths}
    assert len(first) == 4 and len({cell["of"] for cell in first.values()}) == 1
    of_other, of_before, *same = paths
    of_other.write_text(json.dumps({**first[of_other], "of": "0" * 16, "before": 9.0}))
    of_before.write_text(json.dumps({key: each for key, each in first[of_before].items() if key != "of"}))
    times = {path: path.stat().st_mtime_ns for path in (of_before, *same)}
    invoke(*words)
    assert json.loads(of_other.read_text())["before"] == first[of_other]["before"], "it was made of something else"
    assert {path: path.stat().st_mtime_ns for path in times} == times, "these are kept"
    opened = Release.open(release)
    folder = study.decoded(opened, read_listing(data), {"1003": release_split(opened).clients["1003"]})["1003"]
    copy = tmp_path / "copy"
    shutil.copytree(release, copy)
    assert work.made_of(str(copy), folder, 0) == work.made_of(str(release), folder, 0) == first[of_other]["of"]
    changed = dataclasses.replace(opened.recipe, heads=dataclasses.replace(opened.recipe.heads, epochs=9))
    (copy / "recipe.json").write_text(changed.to_json())
    for cached in (work.made_of, work._release):
        cached.cache_clear()
    assert work.made_of(str(copy), folder, 0) != first[of_other]["of"]


def test_one_failing_cell_is_named_and_the_others_are_kept(data: Path, release: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "cells" / "1003.sensitive.random.s0.c3.u100.json"
    damaged.parent.mkdir()
    damaged.write_text("{}")
    few = ("--scenarios", "sensitive", "--ladder", "none", "--clips-per-cluster", "3")
    result = CliRunner().invoke(app, [str(arg) for arg in paper(data, release, tmp_path, *few)])
    assert result.exit_code == 1
    assert "delete it" in result.output
    assert len(list((tmp_path / "cells").glob("*.npz"))) == 3
    for wrong in (["--ladder", "magic"], ["--scenarios", "none"]):
        refused = CliRunner().invoke(
            app, ["paper", "--data", str(data), "--release", str(release), "--out", str(tmp_path), *wrong]
        )
        assert refused.exit_code == 2 and "Traceback" not in refused.output


def test_every_person_is_left_out_once(data: Path, release: Path, tmp_path: Path) -> None:
    begin(tmp_path / "folds" / "1001-1002" / "release", data, "1001,1002")
    shutil.copytree(release, tmp_path / "folds" / "1003" / "release")
    output = invoke("people", "--data", data, "--out", tmp_path, "--methods", "all,cluster", "--together", 2,
                    "--classes", "0,4", "--workers", 1)  # fmt: skip
    result = json.loads((tmp_path / "result.json").read_text())
    assert sorted({cell["asked"]["client"] for cell in result["cells"]}) == ["1001", "1002", "1003"]
    assert "Leave one person out, users of 4 classes" in output and "The guarded update" in output
    assert "Recall and calibration, users of 4 classes" in output and "worse than all by over 2 points" in output
    assert sorted(result["people"]) == ["1001", "1002", "1003"]
    for cell in result["cells"]:
        few = cell["asked"]["classes"]
        (told,) = result["people"][cell["asked"]["client"]][f"students, sensitive, {few or 'all'} classes"][
            cell["asked"]["method"]
        ]["0"]
        assert told["test_clips"] == cell["test_clips"]
        assert told["own head"]["accuracy"] == pytest.approx(cell["accuracy"]["1"]["fp32"], abs=1e-4)
        assert {"recall", "calibration"} <= set(told["teacher's head"])
        _, on_test = load_outputs(tmp_path / "cells", Asked(**cell["asked"]))
        assert len(set(on_test.labels_N.tolist())) == (few or 6)


def test_every_loop_costs_what_it_says(data: Path, release: Path, tmp_path: Path) -> None:
    output = invoke("cost", "--data", data, "--release", release, "--out", tmp_path, "--plain-rounds", 2,
                    "--plain-epochs", 4)  # fmt: skip
    runs = json.loads((tmp_path / "result.json").read_text())["runs"]
    assert [(run["loop"], run["rounds"], run["epochs"]) for run in runs] == [
        ("plain", 2, 4), ("short", 2, 2), ("default", 2, 2),
    ]  # fmt: skip
    assert all(run["compute_s"]["distil"] > 0 and run["compute_s"]["heads"] > 0 for run in runs)
    assert not list((tmp_path / "work").iterdir()), "a later run finds no checkpoint to go on from"
    kept = tmp_path / "runs" / "short-1003-0-2x4.json"
    noted = json.loads(kept.read_text())
    for of, before in ((noted["of"], 9.0), ("another data set", None)):
        kept.write_text(json.dumps({**noted, "of": of, "before": 9.0}))
        found = cost._kept(kept, noted["of"])
        assert (None if found is None else found.before) == before
    kept.write_text(json.dumps({name: value for name, value in noted.items() if name != "of"}))
    assert cost._kept(kept, noted["of"]) is not None, "measured before the hash was noted"
    assert [LOOPS[run["loop"]].heads_on for run in runs] == ["selection", "selection", "all"]
    assert output.count("times less") == 2


def test_weights_of_a_trunk_that_are_missing_are_named(data: Path, tmp_path: Path) -> None:
    words = ["paper", "--data", data, "--out", tmp_path / "out", "--preset", "tiny", "--weights", tmp_path]
    result = CliRunner().invoke(app, [*map(str, words), "--private-actors", "1003"])
    assert result.exit_code == 1
    assert "lacks resnet18-quarter.safetensors: --weights takes one file per trunk" in result.output


def test_device_weights_and_seed_reach_every_training(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "resnet18-quarter-0000.pth"
    weights.touch()
    asked: list[tuple[str, Any]] = []

    def seen(name: str) -> Any:
        def work_of(task: Any) -> str:
            asked.append((name, task))
            return name

        return work_of

    for name in ("teach", "make_seed"):
        monkeypatch.setattr(f"isthmus.experiments.personal.cells.study.{name}", seen(name))

    def no_cell(task: Any) -> str:
        asked.append(("cell", task))
        raise KeyboardInterrupt

    monkeypatch.setattr("isthmus.experiments.personal.cells.study.make_cell", no_cell)
    words = ["paper", "--data", data, "--out", tmp_path / "out", "--preset", "tiny", "--private-actors", "1003",
             "--weights", tmp_path, "--device", "cpu:0", "--workers", 1, "--seeds", 2, "--own-teachers",
             "--balance", "joint", "--modality-dropout", "0.2"]  # fmt: skip
    CliRunner().invoke(app, [str(word) for word in words])
    teachers = [task for name, task in asked if name == "teach"]
    assert [(Path(task.release).name, task.seed) for task in teachers] == [("release", 0), ("release-1", 1)]
    assert {task.device for _, task in asked} == {"cpu:0"} and [name for name, _ in asked].count("cell") == 1
    assert {task.weights for name, task in asked if name != "cell"} == {tmp_path}
    begun = Release.open(tmp_path / "out" / "release-1")
    assert begun.recipe.teacher.balance == "joint" and begun.recipe.modality_dropout == 0.2
    assert begun.public.names == Release.open(tmp_path / "out" / "release").public.names
