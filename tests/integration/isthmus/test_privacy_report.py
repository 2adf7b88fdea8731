"""``isthmus privacy report`` on synthetic clips and an untrained release: complete, interrupted, with bad options."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from isthmus.data.cli import app as data_app
from isthmus.data.layouts.listing import read_listing
from isthmus.data.made_by import code
from isthmus.data.splits import by_actor
from isthmus.distill.prepare import begin_release, decode, release_split
from isthmus.distill.release import Release, save_weights
from isthmus.distill.student.evaluate import student_outputs
from isthmus.distill.teacher.teach import cache_teacher_outputs
from isthmus.privacy import attacks, frames, material, measure
from isthmus.privacy.cli import app
from isthmus.proto.messages import Features, compressed_width
from tests.rigs.distill.release import tiny_recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Make a synthetic set of four people, two of them clients, and a release of random weights on it."""
    root = tmp_path_factory.mktemp("privacy")
    data = root / "data"
    ended = CliRunner().invoke(data_app, ["make", "crema-d", str(data), "--actors", "4", "--takes", "2"])
    assert ended.exit_code == 0, ended.output
    listing = read_listing(data)
    recipe = tiny_recipe(listing.classes)
    release = begin_release(root / "release", listing, recipe, by_actor(listing, ["1003", "1004"]), progress=False)
    torch.manual_seed(0)
    save_weights(release.new_teacher(), release.teacher_path)
    save_weights(release.new_student(), release.student_path(0))
    cache_teacher_outputs(release, CPU)
    return data, root / "release"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use fewer shadow uploads and epochs: these tests do not depend on how well the attack succeeds."""
    for module in (material, measure):
        monkeypatch.setattr(module, "SHADOWS", 8)
    short = dataclasses.replace(attacks.TRAINING, epochs=2)
    monkeypatch.setattr(material, "train_decoder", functools.partial(attacks.train_decoder, config=short))


def report(made: tuple[Path, Path], out: Path, *more: str) -> Any:
    data, release = made
    options = ["report", "--data", str(data), "--release", str(release), "--out", str(out), "--device", "cpu"]
    return CliRunner().invoke(app, [*options, "--floors", "3,7", "--epsilons", "", *more])


class Stopped(Exception):
    pass


def test_a_stopped_report_goes_on_and_ends_as_one_that_was_not(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = report(made, whole)
    assert done.exit_code == 0, done.output
    result = json.loads((whole / "result.json").read_text())
    # 12 clips a client, 6 of them sent: a floor of 7 is too high for both.
    assert len(result["skipped"]) == 2
    assert result["code"] == [code()] and "other code" not in done.output
    assert "6 clips are too few" in result["skipped"][0]
    cells = {(cell["client"], cell["slug"]): cell for cell in result["cells"] if cell["kind"] == "mode"}
    assert len(cells) == 2 * 5
    every = cells["1003", "features"]
    assert every["membership"]["distance, same person"]["auc"]["value"] == 1
    assert every["message_bytes"] > cells["1003", "prototypes-floor-3"]["message_bytes"]
    assert cells["1003", "prototypes-floor-3"]["smallest_cluster"] >= 3
    assert every["selection"]["overlap"] == 1
    assert cells["1004", "stranger-floor-3"]["inversion"] is None
    base = next(cell for cell in result["cells"] if cell["kind"] == "baselines")
    assert base["inversion"]["mean public clip"]["sound_same_class"] is None  # only one clip per class
    assert base["chance"]["retrieval"] == pytest.approx(1 / 6)
    assert base["inversion"]["mean public clip"]["sound_retrieval"] == pytest.approx(1 / 6)
    page = (whole / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 + 4
    assert "2 cells could not be measured" in page
    assert "no formal guarantee" in page
    assert "cannot be measured here (the exact clip out of all in" in page
    assert len(list((whole / "pictures").glob("*.png"))) == 7
    assert "Skipped: 2 cells." in (whole / "result.md").read_text()

    really = material.train_decoder
    calls = []

    def stop_at_the_third(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise Stopped
        return really(*arguments, **options)

    monkeypatch.setattr(material, "train_decoder", stop_at_the_third)
    assert isinstance(report(made, parts).exception, Stopped)
    kept = {path: path.stat().st_mtime_ns for path in (parts / "cells").rglob("*.json")}
    assert len(kept) == 2 + 2 * 2
    monkeypatch.setattr(material, "train_decoder", really)
    assert report(made, parts).exit_code == 0
    assert (parts / "result.json").read_text() == (whole / "result.json").read_text()
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())


def test_wrong_questions_are_answered_in_one_line(made: tuple[Path, Path], tmp_path: Path) -> None:
    for more, said in (
        (("--clients", "1003,9999"), "no client 9999 in this release's split; it has 1003, 1004"),
        (("--floors", "1"), "floors are at least 2"),
        (("--epsilons", "0"), "an epsilon is a number above 0"),
        (("--seeds", "7"), "isthmus distill student --seed 7"),
        (("--seeds", ""), "name at least one seed"),
    ):
        ended = report(made, tmp_path / "out", *more)
        assert ended.exit_code == (2 if more == ("--seeds", "") else 1)
        assert said in ended.output
        assert "Traceback" not in ended.output
    assert not (tmp_path / "out" / "result.json").exists()


def test_outputs_do_not_hang_on_frames_that_nobody_looks_at(made: tuple[Path, Path]) -> None:
    release = Release.open(made[1])
    clips = release.public.subset(np.arange(5))
    whole = student_outputs(release.student(0), release.teacher_head, clips, CPU)
    alone = material.evaluated_frames_alone(clips)
    assert alone.frames_NKHWC.shape[1] == 1
    few = student_outputs(release.student(0), release.teacher_head, alone, CPU)
    np.testing.assert_allclose(few.visual_ND, whole.visual_ND, atol=1e-5)
    np.testing.assert_allclose(few.probabilities_NC, whole.probabilities_NC, atol=1e-5)


class Telling:
    """An encoder whose uncompressed features tell the picture, and whose compressors keep nothing."""

    def features(self, spectrogram_FT: Any, frames_KCHW: Any) -> Features:
        coarse = np.asarray(frames_KCHW)[0].mean(axis=0)
        cells_D = coarse[: len(coarse) // 4 * 4, : len(coarse) // 4 * 4].reshape(4, -1, 4, len(coarse) // 4)
        return Features(np.asarray(spectrogram_FT).mean(axis=1)[:16], cells_D.mean(axis=(1, 3)).ravel())

    def compress(self, features: Features, ratio: float) -> Features:
        width = compressed_width(16, ratio)
        return features if ratio == 1 else Features(np.zeros(width, np.float32), np.zeros(width, np.float32))


def test_frames_that_tell_the_picture_are_seen_to(made: tuple[Path, Path]) -> None:
    data, folder = made
    release = Release.open(folder)
    release = dataclasses.replace(
        release, recipe=dataclasses.replace(release.recipe, feature_width=16, ratios=(1.0, 2.0))
    )
    clients = {
        name: decode(read_listing(data), clips, release.recipe, folder / "private")
        for name, clips in release_split(release).clients.items()
    }
    said: list[str] = []
    encoded: list[int] = []
    result = frames.measure(
        release, clients, most=20, report=said.append, advance=encoded.append, encoder=cast("Any", Telling())
    )
    assert len(encoded) == result["public_clips"] + sum(result["clients"].values())
    found = {(each["ratio"], each["number_type"]): each for each in result["settings"]}
    assert len(found) == len(said) == 2 * 3
    shares = ("picture_same_class", "sound_same_class", "picture_retrieval", "sound_retrieval")
    guess = [0.5, 0.5, *[result["chance"]["retrieval"]] * 2]
    for number_type in ("fp32", "fp16", "int8"):
        seen, blind = ([found[ratio, number_type][each] for each in shares] for ratio in (1.0, 2.0))
        assert sum(seen) > sum(guess) + 0.1, "two public people teach a little"
        assert blind == pytest.approx(guess), "nothing is told from zeros"
    assert found[1.0, "int8"]["frame_bytes"] < found[1.0, "fp32"]["frame_bytes"]


def test_frames_of_an_unknown_client(made: tuple[Path, Path], tmp_path: Path) -> None:
    data, release = made
    options = ["frames", "--data", str(data), "--release", str(release), "--out", str(tmp_path / "a.json")]
    ended = CliRunner().invoke(app, [*options, "--clients", "nobody"])
    assert ended.exit_code == 2
    assert "no client nobody" in ended.output
