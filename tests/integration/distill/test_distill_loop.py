"""From clips to a personal student, by the functions that cloud, command line and experiments share."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch.utils.data import default_collate
from typer.testing import CliRunner

from isthmus.distill.cli import app
from isthmus.distill.models.heads import present
from isthmus.distill.recipes import PRESETS, Recipe
from isthmus.distill.release import Release, ReleaseError
from isthmus.distill.selection import STRATEGIES, Selection, Wanted
from isthmus.distill.student.base import make_base, make_student
from isthmus.distill.student.evaluate import bank_probabilities, outputs_of, student_outputs
from isthmus.distill.student.export import export_student
from isthmus.distill.student.measure import measure_public
from isthmus.distill.student.person_model import fit_person_model
from isthmus.distill.student.personalise import distil_round, select_round, train_heads
from isthmus.distill.teacher.teach import cache_teacher_outputs, teacher_accuracy, train_teacher
from isthmus.distill.training.checkpoint import state_hash
from isthmus.distill.training.datasets import DistillationClips
from isthmus.distill.training.loop import EpochReport
from isthmus.distill.training.losses import classification_loss, feature_distillation_loss
from isthmus.distill.training.teacher_cache import TeacherFeatures, encode_clips, head_probabilities
from isthmus.proto.convert_person import centred_from_bytes
from isthmus.proto.messages import Captured

CPU = torch.device("cpu")


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def taught(tiny_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Release:
    """Return the tiny release with a trained teacher, an AllDistill student and a base student."""
    root = tmp_path_factory.mktemp("taught") / "release"
    shutil.copytree(tiny_release, root)
    for made in ("teacher", "teacher_outputs", "students", "base"):
        shutil.rmtree(root / made)
    tiny = Release.open(tiny_release).recipe
    once = dataclasses.replace(tiny.all_distill, epochs=1, batch_size=8)
    recipe = dataclasses.replace(tiny, teacher=dataclasses.replace(tiny.teacher, audio=once, visual=once, head=once))
    (root / "recipe.json").write_text(recipe.to_json())
    release = Release.open(root)

    def stop_in_the_second_stage(stage: str, _: EpochReport) -> None:
        if stage == "visual":
            raise Stopped

    with pytest.raises(Stopped):
        train_teacher(release, seed=0, device=CPU, watch=stop_in_the_second_stage)
    losses = train_teacher(release, seed=0, device=CPU)  # resumes where it was stopped
    held_out = json.loads((release.teacher_path.parent / "held_out.json").read_text())
    assert held_out["clips"] == 3  # a tenth of each class's eight, rounded up
    assert release.teacher_head.temperature.item() == pytest.approx(held_out["temperature"])
    assert {stage: len(values) for stage, values in losses.items()} == {"audio": 1, "visual": 1}
    cache_teacher_outputs(release, CPU)
    make_student(release, 0, CPU)
    make_base(release, CPU)
    return release


def another(taught: Release, root: Path, **changes: object) -> Release:
    """Return a release of the same public clips with another recipe for the teacher; nothing is trained yet."""
    root.mkdir()
    shutil.copytree(taught.public_dir, root / "public")
    shutil.copy(taught.root / "public.json", root)
    fusion = changes.pop("fusion", "concat")
    teacher = dataclasses.replace(taught.recipe.teacher, **changes)  # type: ignore[arg-type]
    recipe = dataclasses.replace(taught.recipe, fusion=fusion, teacher=teacher)  # type: ignore[arg-type]
    (root / "recipe.json").write_text(recipe.to_json())
    return Release.open(root)


def test_a_balanced_teacher_stopped_in_between_ends_as_the_undisturbed_one(taught: Release, tmp_path: Path) -> None:
    twice = dataclasses.replace(taught.recipe.teacher.joint, epochs=2, batch_size=8)
    ways = {"joint": twice, "balance": "ogm-ge"}
    whole, stopped = another(taught, tmp_path / "whole", **ways), another(taught, tmp_path / "stopped", **ways)

    def stop(stage: str, _: EpochReport) -> None:
        assert stage == "joint"
        raise Stopped

    assert list(train_teacher(whole, seed=0, device=CPU)) == ["joint"]
    with pytest.raises(Stopped):
        train_teacher(stopped, seed=0, device=CPU, watch=stop)
    train_teacher(stopped, seed=0, device=CPU)
    assert state_hash([whole.teacher]) == state_hash([stopped.teacher])


def test_a_fusion_that_is_not_linear_is_trained_on_the_rest_and_calibrated_on_what_was_held_out(
    taught: Release, tmp_path: Path
) -> None:
    gated = another(taught, tmp_path / "gated", fusion="gated")
    assert list(train_teacher(gated, seed=0, device=CPU)) == ["audio", "visual", "head"]
    assert gated.teacher_head.temperature.item() != 1
    assert not (gated.teacher_path.parent / "held_out.json").exists()


def some_selection(release: Release) -> Selection:
    prototypes_KC = np.eye(3, dtype=np.float32)[:2] * 0.9 + 0.1 / 3
    return select_round(release, Wanted(prototypes_KC, np.full(2, 3, np.int32)), round=0, seed=0)


def test_every_strategy_selects_from_a_release_with_features_and_without(taught: Release) -> None:
    outputs = taught.teacher_outputs
    features_NE = TeacherFeatures(outputs, taught.public.spec)[:]
    np.testing.assert_allclose(
        head_probabilities(taught.teacher_head, *np.split(features_NE, 2, axis=1)), outputs.probabilities_NC, atol=1e-5
    )
    rows = np.array([3, 8])
    for strategy in STRATEGIES:
        for features_KE in (None, features_NE[rows]):
            wanted = Wanted(outputs.probabilities_NC[rows], np.full(2, 3, np.int32), features_KE)
            chosen = select_round(taught, wanted, round=0, seed=0, strategy=strategy, samples_per_row=4)
            assert len(set(chosen.indices_S.tolist())) == len(chosen) > 0
            assert chosen.weights_S.mean() == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="unknown strategy 'class_oracle'"):
        select_round(taught, wanted, round=0, seed=0, strategy="class_oracle")
    with pytest.raises(ValueError, match="wide"):
        narrow = Wanted(outputs.probabilities_NC[rows], np.full(2, 3, np.int32), features_NE[rows, :7])
        select_round(taught, narrow, round=0, seed=0, strategy="round_robin")


def as_printed(release: Release) -> Release:
    """Return the release with the paper's settings: heads on the selection, nothing kept of the base student."""
    config = dataclasses.replace(release.recipe.personalise, keep=0.0, heads_on="selection")
    return release.under(dataclasses.replace(release.recipe, personalise=config))


def test_a_finished_student_keeps_its_share_of_the_base_and_heads_may_learn_from_all_clips(
    taught: Release, tmp_path: Path
) -> None:
    selection = some_selection(taught)
    plain = as_printed(taught)
    kept = plain.under(
        dataclasses.replace(plain.recipe, personalise=dataclasses.replace(plain.recipe.personalise, keep=0.25))
    )
    made = {
        name: distil_round(release, selection, round=1, rounds=2, seed=5, checkpoint=tmp_path / name).state_dict()
        for name, release in (("plain", plain), ("kept", kept))
    }
    base = taught.student(0).state_dict()
    moved = 0
    for name, value in made["kept"].items():
        if value.is_floating_point():
            expected = 0.75 * made["plain"][name] + 0.25 * base[name]
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
            moved += int(not torch.equal(made["plain"][name], base[name]))
    assert moved > 20
    interim = {
        name: state_hash(
            [distil_round(release, selection, round=0, rounds=2, seed=5, checkpoint=tmp_path / f"{name}0")]
        )
        for name, release in (("plain", plain), ("kept", kept))
    }
    assert interim["plain"] == interim["kept"], "only the finished student is averaged"
    everything = Selection.of(np.arange(len(taught.public.names), dtype=np.int64))
    of_all = state_hash([train_heads(taught, taught.student(0), selection, seed=0)])
    assert of_all == state_hash([train_heads(plain, taught.student(0), everything, seed=0)])
    assert of_all != state_hash([train_heads(plain, taught.student(0), selection, seed=0)])


def test_weights_move_what_is_learned_and_weights_of_one_change_nothing(taught: Release) -> None:
    selection = some_selection(taught)
    weights_S = np.linspace(0.1, 1.9, len(selection), dtype=np.float32)
    on_selection = as_printed(taught)
    made = [
        state_hash([train_heads(on_selection, taught.student(0), chosen, seed=0)])
        for chosen in (selection, Selection.of(selection.indices_S), Selection(selection.indices_S, weights_S))
    ]
    assert made[0] == made[1] != made[2]


def test_a_clip_of_no_weight_teaches_nothing(taught: Release) -> None:
    """The loss does not depend on the target of a clip with weight 0."""
    indices_S = np.arange(4)
    weights_S = np.array([2, 2, 0, 0], np.float32)
    data = DistillationClips(taught.public, taught.teacher_outputs, Selection(indices_S, weights_S), seed=0)
    _, _, audio_BD, _, weights_B = default_collate([data[index] for index in range(4)])
    student_BD = torch.randn(audio_BD.shape)
    loss = feature_distillation_loss(student_BD, audio_BD, weights_B)
    assert loss == pytest.approx(float((student_BD[:2] - audio_BD[:2]).square().mean()), rel=1e-5)
    logits_BC, labels_B = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    weighted = classification_loss(logits_BC, labels_B, 0.1, weights_B)
    assert weighted == pytest.approx(float(classification_loss(logits_BC[:2], labels_B[:2], 0.1)), rel=1e-5)
    ones = torch.ones(4)
    assert classification_loss(logits_BC, labels_B, 0.0, ones) == pytest.approx(
        float(classification_loss(logits_BC, labels_B)), rel=1e-6
    )


def test_teacher_outputs_are_the_teachers_and_are_found_again(taught: Release) -> None:
    outputs = taught.teacher_outputs
    assert isinstance(outputs.probabilities_NC, np.memmap)
    assert outputs.visual_features_NKD.shape == (24, 2, 128)
    np.testing.assert_allclose(outputs.probabilities_NC.sum(axis=1), 1, atol=1e-5)
    folder = taught.root / "teacher_outputs" / taught.outputs_key()
    before = folder.stat().st_mtime_ns
    cache_teacher_outputs(Release.open(taught.root), CPU)
    assert folder.stat().st_mtime_ns == before
    accuracy = teacher_accuracy(taught.teacher, taught.public, CPU)
    labels_N = np.asarray(taught.public.labels_N)
    assert accuracy.joint == pytest.approx((outputs.probabilities_NC.argmax(1) == labels_N).mean())


def test_a_job_stopped_in_mid_round_ends_with_the_same_student(taught: Release, tmp_path: Path) -> None:
    selection = some_selection(taught)

    def job(checkpoint: Path, stop_after: int | None) -> str:
        def on_epoch(report: EpochReport) -> None:
            if report.epoch == stop_after:
                raise Stopped

        student = taught.student(0)
        for number in range(2):
            student = distil_round(
                taught, selection, round=number, rounds=2, seed=5, checkpoint=checkpoint, on_epoch=on_epoch
            )
        return state_hash([student])

    whole = job(tmp_path / "whole.safetensors", None)
    epochs = taught.recipe.personalise.train.epochs
    for stop_after in (1, epochs - 1):
        checkpoint = tmp_path / f"stopped-{stop_after}.safetensors"
        with pytest.raises(Stopped):
            job(checkpoint, stop_after)
        assert job(checkpoint, None) == whole
    assert whole != state_hash([taught.student(0)])


def test_heads_start_at_the_teachers_own_answer_and_training_moves_them(taught: Release) -> None:
    student, selection = taught.student(0), some_selection(taught)
    recipe = taught.recipe
    untrained = dataclasses.replace(recipe, heads=dataclasses.replace(recipe.heads, epochs=0), ratios=(1.0, 1.5, 3.0))
    still = Release(taught.root, untrained)
    bank = train_heads(still, student, selection, seed=0)
    seen = student_outputs(student, taught.teacher_head, taught.public.subset(np.sort(selection.indices_S)), CPU)
    np.testing.assert_allclose(bank_probabilities(bank, seen, 1.0), seen.probabilities_NC, atol=1e-4)
    # The selected clips span fewer directions than any compressor keeps, so nothing of them is lost.
    np.testing.assert_allclose(bank_probabilities(bank, seen, 3.0), seen.probabilities_NC, atol=1e-3)
    trained = train_heads(taught, student, selection, seed=0)
    assert np.abs(bank_probabilities(trained, seen, 1.0) - seen.probabilities_NC).max() > 1e-4


def test_exported_files_answer_as_torch_does(taught: Release, tmp_path: Path) -> None:
    student, selection = taught.student(0), some_selection(taught)
    bank = train_heads(taught, student, selection, seed=0)
    files = export_student(taught, student, bank, tmp_path)
    assert [path.name for path in files] == [
        "audio_encoder.onnx",
        "compressor_r1.onnx",
        "compressor_r2.onnx",
        "local_head.onnx",
        "teacher_head.onnx",
        "visual_encoder.onnx",
    ]
    outputs = student_outputs(student, taught.teacher_head, taught.public, CPU)
    run = {path.stem: onnxruntime.InferenceSession(path).run for path in files}
    pair = {"audio_BD": outputs.audio_ND, "visual_BD": outputs.visual_ND}
    (audio_ND,) = run["audio_encoder"](None, {"spectrogram_BFT": np.asarray(taught.public.spectrograms_NFT)})
    np.testing.assert_allclose(audio_ND, outputs.audio_ND, atol=1e-3)
    for captured in Captured:
        masked = {**pair, "present_B2": present(captured, len(outputs.audio_ND)).numpy()}
        (local_NC,) = run["local_head"](None, masked)
        np.testing.assert_allclose(local_NC, bank_probabilities(bank, outputs, 1.0, captured), atol=1e-4)
        (teacher_NC,) = run["teacher_head"](None, masked)
        expected_NC = head_probabilities(taught.teacher_head, outputs.audio_ND, outputs.visual_ND, captured)
        np.testing.assert_allclose(teacher_NC, expected_NC, atol=1e-4)
    audio_NW, visual_NW = run["compressor_r2"](None, pair)
    np.testing.assert_allclose(
        bank.frozen().probabilities(np.concatenate([audio_NW[0], visual_NW[0]]), Captured.BOTH, 2.0),
        bank_probabilities(bank, outputs, 2.0)[0],
        atol=1e-4,
    )


def test_recipes_survive_their_json_and_strangers_are_refused() -> None:
    for preset in PRESETS.values():
        for dataset in ("crema-d", "ave"):
            recipe = preset(dataset, ("a", "b"))
            assert Recipe.from_json(recipe.to_json()) == recipe
    teacher = PRESETS["smoke"]("crema-d", ("a", "b")).teacher
    with pytest.raises(ValueError, match="needs sgd"):
        dataclasses.replace(teacher, balance="ogm-ge", joint=teacher.audio)
    with pytest.raises(ValueError, match="balance 'pmr' is unknown"):
        dataclasses.replace(teacher, balance="pmr")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="held-out share"):
        dataclasses.replace(teacher, held_out=1.0)
    for text in ("{}", "[]", '{"teacher": {"audio": 3}}'):
        with pytest.raises(ValueError, match="not a recipe"):
            Recipe.from_json(text)


def test_a_folder_that_is_no_release_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="isthmus distill teacher"):
        Release.open(tmp_path)
    result = CliRunner().invoke(app, ["student", "--release", str(tmp_path)])
    assert result.exit_code == 1
    assert "is not a release" in result.output
    assert "Traceback" not in result.output


def test_selecting_by_hand_and_distilling_on_it(taught: Release, tmp_path: Path) -> None:
    prototypes, selection, out = tmp_path / "prototypes.json", tmp_path / "selection.json", tmp_path / "student"
    prototypes.write_text(json.dumps({"values": [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]], "sizes": [3, 4]}))
    at = ["--release", str(taught.root)]
    runner = CliRunner()
    chosen = runner.invoke(app, ["select", *at, "--prototypes", str(prototypes), "--out", str(selection)])
    assert chosen.exit_code == 0, chosen.output
    assert len(json.loads(selection.read_text())["clips"]) == 6
    by_density = [*at, "--prototypes", str(prototypes), "--out", str(tmp_path / "soft.json")]
    assert runner.invoke(app, ["select", *by_density, "--strategy", "density_ratio"]).exit_code == 0
    soft = json.loads((tmp_path / "soft.json").read_text())
    assert len(soft["weights"]) == len(soft["indices"])
    assert 0 < soft["effective_size"] <= len(soft["weights"])
    for values in ([[0.5, "x"]], [[0.5, 0.5], [1.0]]):
        prototypes.write_text(json.dumps({"values": values, "sizes": [3]}))
        refused = runner.invoke(app, ["select", *by_density])
        assert refused.exit_code == 1 and "are rows of numbers of one length" in " ".join(refused.output.split())
    unknown = runner.invoke(app, ["select", *by_density, "--strategy", "class_oracle"])
    assert (unknown.exit_code, "'class_oracle' is not one of cosine" in unknown.output) == (2, True)
    made = runner.invoke(app, ["student", *at, "--selection", str(selection), "--out", str(out)])
    assert made.exit_code == 0, made.output
    assert len(json.loads((out / "history.json").read_text())["distillation"]) == taught.recipe.personalise.train.epochs
    assert (out / "loss.png").stat().st_size > 1_000
    student = ["--student", str(out / "student.safetensors")]
    heads = out / "heads.safetensors"
    pressed = runner.invoke(app, ["compress", *at, *student, "--selection", str(selection), "--out", str(heads)])
    assert pressed.exit_code == 0, pressed.output
    assert heads.exists()
    foreign = tmp_path / "foreign.json"
    foreign.write_text(json.dumps({"release": "another", "indices": [0]}))
    refused = runner.invoke(app, ["compress", *at, *student, "--selection", str(foreign), "--out", str(heads)])
    assert refused.exit_code == 1
    assert "another release" in refused.output


def test_a_student_gets_a_person_model_if_the_public_clips_have_people(
    taught: Release, caplog: pytest.LogCaptureFixture
) -> None:
    student = taught.student(0)
    encoded = encode_clips(student, taught.public, CPU)
    assert fit_person_model(taught, student, CPU, encoded) is None
    assert "1 people with labelled clips" in caplog.text and not (taught.base_dir / "person.pb").exists()
    eight = dataclasses.replace(taught.public, actors=tuple(str(clip // 3) for clip in range(len(taught.public))))
    content = fit_person_model(taught.over(eight, taught.teacher_outputs), student, CPU, encoded)
    assert content is not None
    made = centred_from_bytes(content, 3, taught.recipe.feature_width)
    assert made.person.people == 8
    outputs = outputs_of(encoded, taught.teacher_head, eight)
    logits_MNC = made.heads.logits(np.stack([outputs.audio_ND, outputs.visual_ND]))
    assert logits_MNC.shape == (2, len(eight), 3) and np.isfinite(logits_MNC).all()


def test_features_that_are_known_make_the_same_heads(taught: Release) -> None:
    student, whole = taught.student(0), Selection.whole(len(taught.public))
    encoded = encode_clips(student, taught.public, CPU)
    heads = train_heads(taught, student, whole, seed=0, encoded=encoded)
    assert state_hash([heads]) == state_hash([train_heads(taught, student, whole, seed=0)])
    measured = measure_public(taught, student, heads, whole, CPU)
    assert measured == measure_public(taught, student, heads, whole, CPU, encoded)
