"""Students in int8: smaller, answering as before, accepted by a device, and not used where they lose too much."""

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from typer.testing import CliRunner

from isthmus import __version__
from isthmus.cloud.offers.offer import offer_of
from isthmus.cloud.personalise.distilling import DistillLearning
from isthmus.cloud.personalise.elsewhere.on_ray import RayLearning, StepActor
from isthmus.cloud.personalise.learning import INT8_FILES, Learning, RoundWork
from isthmus.cloud.personalise.students import HEADS_FILE, MEASURED_FILE
from isthmus.data.transforms import evaluation_frames
from isthmus.distill.cli import app
from isthmus.distill.models.heads import HeadBank
from isthmus.distill.recipes import PRESETS, Recipe
from isthmus.distill.release import Release
from isthmus.distill.selection import Selection
from isthmus.distill.student import int8
from isthmus.distill.student.base import base_heads, make_base
from isthmus.distill.student.evaluate import StudentOutputs, accuracy, bank_probabilities
from isthmus.distill.student.export import AUDIO_ENCODER, ENCODERS, VISUAL_ENCODER, export_student
from isthmus.edge.student.encoder import StudentEncoder
from isthmus.edge.student.onnx_file import check_model_file
from isthmus.proto.convert_person import centred_to_bytes
from isthmus.proto.messages import PublicMeasure
from isthmus.proto.patch import apply_patch
from isthmus.proto.person import Centred
from tests.rigs.data.clips import EMOTIONS
from tests.rigs.distill.people import person_model

CPU = torch.device("cpu")
BOUNDS = (int8.MOST_LOSS, int8.LEAST_AGREEMENT)
RELEASES = sorted((Path(__file__).resolve().parents[2] / "golden" / "releases").glob("*.whl"))


@pytest.fixture(scope="module")
def in_int8(tiny_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    """Yield the tiny release with int8 students, before it has its base student.

    Its answers are nearly chance, and so is how many of them int8 keeps: both bounds are wide here.
    """
    root = tmp_path_factory.mktemp("int8") / "release"
    shutil.copytree(tiny_release, root)
    shutil.rmtree(root / "base")
    recipe = dataclasses.replace(Release.open(tiny_release).recipe, student_precision="int8")
    (root / "recipe.json").write_text(recipe.to_json())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "MOST_LOSS", 0.3)
        patch.setattr(int8, "LEAST_AGREEMENT", 0.6)
        release = Release.open(root)
        base_heads(release, 0, CPU)
        yield release


def of_int8(path: Path) -> bool:
    return any(node.op_type == "DequantizeLinear" for node in onnx.load_model(path).graph.node)


def work(release: Release, folder: Path) -> RoundWork:
    whole = Selection.whole(len(release.public.names))
    return RoundWork(whole, 0, 1, 3, folder / "checkpoint.safetensors")


def test_the_base_student_is_a_third_and_answers_on_a_device_as_the_float32_one(
    in_int8: Release, tmp_path: Path
) -> None:
    make_base(in_int8, CPU)
    heads = HeadBank.load(in_int8.base_dir / HEADS_FILE)
    export_student(in_int8, in_int8.student(0), heads, tmp_path)
    for name in ENCODERS:
        assert of_int8(in_int8.base_dir / name)
        assert (in_int8.base_dir / name).stat().st_size < 0.34 * (tmp_path / name).stat().st_size
        check_model_file(in_int8.base_dir / name)
    small, exact = StudentEncoder(in_int8.base_dir), StudentEncoder(tmp_path)
    public, spec = in_int8.public, in_int8.recipe.input
    for row in range(4):
        clip = np.asarray(public.spectrograms_NFT[row]), evaluation_frames(public.frames_NKHWC[row], spec)
        np.testing.assert_allclose(
            small.local_probabilities(small.features(*clip)), exact.local_probabilities(exact.features(*clip)), atol=0.1
        )


def test_the_layout_hangs_neither_on_names_nor_on_the_order_of_the_file(in_int8: Release) -> None:
    """torch numbers its values differently in each export, and the quantiser orders by these names."""
    make_base(in_int8, CPU)
    model = onnx.load_model(in_int8.base_dir / "audio_encoder.onnx")
    expected, shuffled = model.SerializeToString(), onnx.ModelProto.FromString(model.SerializeToString())
    rng, graph = np.random.default_rng(0), shuffled.graph
    names = {tensor.name: f"onnx::Conv_{rng.integers(10**6)}" for tensor in graph.initializer}
    for tensor in graph.initializer:
        tensor.name = names[tensor.name]
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    order = rng.permutation(len(graph.initializer))
    tensors = [onnx.TensorProto.FromString(graph.initializer[place].SerializeToString()) for place in order]
    weights = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in names.values()]
    others = [node for node in graph.node if node not in weights]
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in [*weights[::-1], *others]]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(tensors)
    graph.node.extend(nodes)
    assert shuffled.SerializeToString() != expected
    int8._give_a_layout(graph)
    assert shuffled.SerializeToString() == expected


def test_outputs_and_inputs_that_are_left_out_join_no_nodes() -> None:
    """An LSTM has both: taken for the name of a value, "" would make the second one wait for itself."""
    nodes = [
        helper.make_node("LSTM", ["x", "w", "r", "", "", "start"], ["first", "", "end"], hidden_size=2),
        helper.make_node("Squeeze", ["first", "axis"], ["between"]),
        helper.make_node("LSTM", ["between", "w", "r", "", "", "end"], ["", "last"], hidden_size=2),
    ]
    given = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("x", "start")]
    known = {"w": np.ones((1, 8, 2), np.float32), "r": np.ones((1, 8, 2), np.float32), "axis": np.int64([1])}
    graph = helper.make_graph(
        nodes[::-1],
        "two",
        given,
        [helper.make_tensor_value_info("last", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in known.items()],
    )
    int8._give_a_layout(graph)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (last,) = session.run(None, {"x": np.ones((3, 1, 2), np.float32), "start": np.zeros((1, 1, 2), np.float32)})
    assert last.shape == (1, 1, 2) and np.isfinite(last).all()
    assert [node.op_type for node in graph.node] == ["LSTM", "Squeeze", "LSTM"]


_OLD_DEVICE = """
import sys
from pathlib import Path
import numpy as np
from isthmus.edge.student.encoder import StudentEncoder
from isthmus.edge.student.onnx_file import check_model_file
folder, given, answer = map(Path, sys.argv[1:])
for path in folder.glob("*.onnx"):
    check_model_file(path)
clip, encoder = np.load(given), StudentEncoder(folder)
np.save(answer, encoder.local_probabilities(encoder.features(clip["spectrogram"], clip["frames"])))
"""


@pytest.mark.parametrize("wheel", RELEASES, ids=lambda path: path.name.split("-")[1])
def test_a_device_of_an_earlier_release_runs_it(in_int8: Release, wheel: Path, tmp_path: Path) -> None:
    make_base(in_int8, CPU)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "old")
    public, given, answer = in_int8.public, tmp_path / "clip.npz", tmp_path / "answer.npy"
    clip = np.asarray(public.spectrograms_NFT[0]), evaluation_frames(public.frames_NKHWC[0], in_int8.recipe.input)
    np.savez(given, spectrogram=clip[0], frames=clip[1])
    subprocess.run(
        [sys.executable, "-P", "-c", _OLD_DEVICE, in_int8.base_dir, given, answer],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "old")},
        check=True,
        timeout=600,
    )
    present = StudentEncoder(in_int8.base_dir)
    np.testing.assert_allclose(np.load(answer), present.local_probabilities(present.features(*clip)), atol=1e-6)


def test_the_manifests_measure_is_of_the_int8_student(in_int8: Release) -> None:
    make_base(in_int8, CPU)
    heads = HeadBank.load(in_int8.base_dir / HEADS_FILE)
    outputs = int8.encoded_by(*(in_int8.base_dir / name for name in ENCODERS), in_int8, in_int8.public)
    measured = PublicMeasure(**json.loads((in_int8.base_dir / MEASURED_FILE).read_text()))
    labels_N = in_int8.labels()
    assert measured.clips == len(labels_N)  # So small a set is measured on all its clips.
    of_ratio = [accuracy(bank_probabilities(heads, outputs, ratio), labels_N) for ratio in heads.ratios]
    assert measured.ratio_accuracies == pytest.approx(of_ratio)
    made = int8.read_measure(in_int8.base_dir)
    assert made is not None
    assert made.used
    assert made.int8_accuracy == pytest.approx(np.mean(of_ratio))
    assert f"{made.int8_accuracy:.1%} in place of {made.fp32_accuracy:.1%}" in str(made)


def test_a_student_that_int8_changes_too_much_stays_float32(
    in_int8: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = HeadBank.load(in_int8.heads_path(0))
    whole = Selection.whole(len(in_int8.public.names))
    export_student(in_int8, in_int8.student(0), heads, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(int8, "LEAST_AGREEMENT", 1.01)
    made, measured = int8.quantise_student(in_int8, tmp_path, heads, whole)
    assert (made.used, measured) == (False, None)
    assert "encoders stay float32, because int8 loses too much" in str(made)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_base_student_that_stays_float32_is_said_once(
    in_int8: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(in_int8.root, tmp_path / "release", ignore=shutil.ignore_patterns("base"))
    monkeypatch.setattr(int8, "LEAST_AGREEMENT", 1.01)
    with caplog.at_level(logging.INFO, "isthmus"):  # as in the command, which shows its log on stderr
        done = CliRunner().invoke(app, ["student", "--release", str(tmp_path / "release")])
    assert done.exit_code == 0, done.output
    assert " ".join(done.output.split()).count("encoders stay float32") == 1
    assert caplog.records, "the log is caught"
    assert not [said for said in caplog.messages if "float32" in said], "it would be on stderr, too"


@pytest.mark.parametrize(("most_loss", "least_agreement"), [(0.01, 0.95), (1.0, 0.0), (-1.0, 0.0)])
def test_the_bounds_decide(
    in_int8: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_loss: float, least_agreement: float
) -> None:
    """The first are those of every release; one clip may be lost by any."""
    monkeypatch.setattr(int8, "MOST_LOSS", most_loss)
    monkeypatch.setattr(int8, "LEAST_AGREEMENT", 0.8)
    heads = HeadBank.load(in_int8.heads_path(0))
    export_student(in_int8, in_int8.student(0), heads, tmp_path)
    made, measured = int8.quantise_student(in_int8, tmp_path, heads, Selection.whole(len(in_int8.public.names)))
    lost = made.fp32_accuracy - made.int8_accuracy
    assert made.used == (lost <= max(most_loss, 1 / made.clips) + 1e-9 and made.agreement >= least_agreement)
    assert [of_int8(tmp_path / name) for name in ENCODERS] == [made.used and name in made.encoders for name in ENCODERS]
    assert (measured is not None) == made.used


def test_an_encoder_that_int8_spoils_stays_float32_and_the_other_is_int8(
    in_int8: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiling(path: Path, out_path: Path, calibration: Iterator[np.ndarray]) -> Path:
        quantise(path, out_path, calibration)
        if path.name == AUDIO_ENCODER:  # its features have the other sign, and drown those of the other encoder
            model = onnx.load_model(out_path)
            (output,) = model.graph.output
            for node in model.graph.node:
                node.output[:] = ["before" if name == output.name else name for name in node.output]
            model.graph.initializer.append(numpy_helper.from_array(np.float32(-1000), "times"))
            model.graph.node.append(helper.make_node("Mul", ["before", "times"], [output.name]))
            onnx.save_model(model, out_path)
        return out_path

    quantise = int8.quantise_encoder
    monkeypatch.setattr(int8, "quantise_encoder", spoiling)
    monkeypatch.setattr(int8, "LEAST_AGREEMENT", 0.8)
    heads, whole = HeadBank.load(in_int8.heads_path(0)), Selection.whole(len(in_int8.public.names))
    export_student(in_int8, in_int8.student(0), heads, tmp_path)
    made, measured = int8.quantise_student(in_int8, tmp_path, heads, whole)
    assert made.used and made.encoders == (VISUAL_ENCODER,) and measured is not None
    assert [of_int8(tmp_path / name) for name in ENCODERS] == [False, True]
    assert made.int8_bytes == sum((tmp_path / name).stat().st_size for name in ENCODERS) < made.fp32_bytes
    assert "alone in int8" in str(made)
    int8.write_measure(made, tmp_path)
    assert int8.read_measure(tmp_path) == made


def test_the_person_models_answers_are_judged_too(
    in_int8: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A person model whose heads live on what rounding changes is refused, though all other heads agree."""
    heads, whole = HeadBank.load(in_int8.heads_path(0)), Selection.whole(len(in_int8.public.names))
    export_student(in_int8, in_int8.student(0), heads, tmp_path)
    known = person_model(len(in_int8.recipe.classes), in_int8.recipe.feature_width)
    seen: list[float] = []

    def learned(centred: Centred, outputs: StudentOutputs, persons_N: Sequence[str]) -> np.ndarray:
        answers_NC = judged(centred, outputs, persons_N)
        seen.append(float(answers_NC.sum()))
        return answers_NC if len(seen) == 1 else np.roll(answers_NC, 1, axis=1)

    judged = int8._learned
    monkeypatch.setattr(int8, "MOST_LOSS", 1.0)
    monkeypatch.setattr(int8, "_learned", learned)
    made, _ = int8.quantise_student(in_int8, tmp_path, heads, whole, centred_to_bytes(known))
    assert seen == pytest.approx([made.clips] * 4), "probabilities of every clip: exact, both in int8, and each alone"
    assert (made.used, made.agreement) == (False, 0.0)


def test_a_shift_that_all_clips_of_a_person_share_changes_no_answer() -> None:
    rng, known = np.random.default_rng(3), person_model(3, 8)
    features_MND = rng.standard_normal((2, 40, 8)).astype(np.float32)
    persons_N = ["anna", "ben"] * 20
    shift_MND = np.zeros_like(features_MND)
    shift_MND[:, ::2] += rng.standard_normal((2, 1, 8)).astype(np.float32)
    answers = [
        int8._learned(known, StudentOutputs(*features_MNO, np.zeros((40, 3), np.float32)), persons_N).argmax(axis=1)
        for features_MNO in (features_MND, features_MND + shift_MND - shift_MND.mean(axis=1, keepdims=True))
    ]
    assert (answers[0] == answers[1]).all()


def test_the_bounds_of_every_release() -> None:
    assert BOUNDS == (0.01, 0.95)


@pytest.fixture
def quantised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the encoders that have been quantised, in order."""
    names: list[str] = []
    real = int8.quantise_encoder

    def counted(path: Path, out_path: Path, calibration: Iterator[np.ndarray]) -> Path:
        names.append(path.name)
        return real(path, out_path, calibration)

    monkeypatch.setattr(int8, "quantise_encoder", counted)
    return names


class Elsewhere(RayLearning):
    """Steps that run as on a cluster: in a folder of their own, with the files that are sent along."""

    def __init__(self, release: Release) -> None:
        named = offer_of(release).release_hash
        super().__init__(DistillLearning(release), release.root, named, address="ray")
        self._actor = StepActor(str(release.root), named, __version__, None)

    def _run(
        self, begin: Callable[[Any, str], Any], note: Callable[..., None] = lambda epochs, checkpoint: None
    ) -> Any:
        return begin(SimpleNamespace(perform=SimpleNamespace(remote=self._actor.perform)), "call")


def trained_heads(
    release: Release, folder: Path, makes: Callable[[Release], Learning] = DistillLearning
) -> tuple[Learning, RoundWork, Path]:
    """Run the steps of a job of one round up to its export."""
    make_base(release, CPU)
    learning, asked, heads = makes(release), work(release, folder), folder / HEADS_FILE
    learning.distil(asked, lambda epoch, epochs: None)
    learning.train_heads(asked, heads, lambda epoch, epochs: None)
    return learning, asked, heads


@pytest.mark.parametrize("makes", [DistillLearning, Elsewhere])
def test_the_encoders_of_a_job_are_quantised_once(
    in_int8: Release, tmp_path: Path, quantised: list[str], makes: Callable[[Release], Learning]
) -> None:
    """Heads that an earlier version trained have no encoders beside them: these are made at the export."""
    make_base(in_int8, CPU)
    quantised.clear()
    learning, asked, heads = trained_heads(in_int8, tmp_path, makes)
    learning.export(asked, heads, tmp_path / "out")
    assert sorted(quantised) == sorted(ENCODERS)
    for name in INT8_FILES:
        (tmp_path / name).unlink()
    learning.export(asked, heads, tmp_path / "again")
    assert sorted(quantised) == sorted(2 * ENCODERS)
    for name in ENCODERS:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_job_whose_student_int8_changes_too_much_stays_float32(
    in_int8: Release, tmp_path: Path, quantised: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_base(in_int8, CPU)
    quantised.clear()
    monkeypatch.setattr(int8, "LEAST_AGREEMENT", 1.01)
    learning, asked, heads = trained_heads(in_int8, tmp_path)
    files = learning.export(asked, heads, tmp_path / "out")
    assert sorted(quantised) == sorted(ENCODERS)
    assert not any(of_int8(path) for path in files if path.name in ENCODERS)


@pytest.mark.parametrize("final", [True, False])
def test_a_job_publishes_int8_and_tells_its_measure(in_int8: Release, tmp_path: Path, final: bool) -> None:
    learning, asked, heads = trained_heads(in_int8, tmp_path)
    files = learning.export(asked, heads if final else None, tmp_path / "out")
    assert all(of_int8(path) for path in files if path.name in ENCODERS)
    for name in ENCODERS:
        path, patch = tmp_path / "out" / name, tmp_path / "out" / f"{name}.patch"
        assert {path, patch} <= set(files), "the base student is in int8, too, and has the same layout"
        content = patch.read_bytes()
        assert apply_patch((in_int8.base_dir / name).read_bytes(), content) == path.read_bytes()
        assert len(content) < 0.6 * path.stat().st_size
    if final:
        bank = HeadBank.load(heads)
        outputs = int8.encoded_by(*(tmp_path / "out" / name for name in ENCODERS), in_int8, in_int8.public)
        measured = json.loads((tmp_path / MEASURED_FILE).read_text())
        expected = accuracy(bank_probabilities(bank, outputs, bank.local_ratio), in_int8.labels())
        assert measured["accuracy"] == pytest.approx(expected)


class Begun(Exception):
    """The release has its recipe, so a test may end there."""


def test_new_releases_are_int8_and_a_begun_one_goes_on_as_it_is(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise Begun

    monkeypatch.setattr("isthmus.distill.teacher.teach.train_teacher", stop)
    private = tmp_path / "private.csv"
    private.write_text("clip,label\n" + "".join(f"1001_A00_{label}_XX,{label}\n" for label in EMOTIONS))
    words = ["teacher", "--data", str(clips), "--private-list", str(private), "--preset", "tiny", "--release"]

    def begun(root: Path, *more: str) -> str:
        done = CliRunner().invoke(app, [*words, str(root), *more])
        assert isinstance(done.exception, Begun), done.output
        return Release.open(root).recipe.student_precision

    assert begun(tmp_path / "new") == "int8"
    assert begun(tmp_path / "before", "--student-precision", "fp32") == "fp32"
    assert begun(tmp_path / "before") == "fp32", "as one that was begun when float32 was the default"
    asked = CliRunner().invoke(app, [*words, str(tmp_path / "before"), "--student-precision", "int8"])
    assert asked.exit_code == 1
    assert "its recipe.json differs in student_precision" in " ".join(asked.output.split())


def test_export_by_hand_follows_the_release(in_int8: Release, tmp_path: Path) -> None:
    words = ["export", "--release", in_int8.root, "--student", in_int8.student_path(0)]
    words += ["--heads", in_int8.heads_path(0), "--out", tmp_path]
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    assert "encoders in int8: accuracy" in done.output
    assert of_int8(tmp_path / "audio_encoder.onnx")


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_recipes_of_float32_have_the_json_of_earlier_versions(preset: str) -> None:
    made: Callable[..., Recipe] = PRESETS[preset]
    recipe = made("crema-d", ("a", "b"))
    assert "student_precision" not in json.loads(recipe.to_json())
    other = dataclasses.replace(recipe, student_precision="int8")
    assert json.loads(other.to_json())["student_precision"] == "int8"
    assert Recipe.from_json(other.to_json()) == other
    with pytest.raises(ValueError, match=r"precision 'int4' is unknown; known: fp32, int8"):
        Recipe.from_json(other.to_json().replace('"int8"', '"int4"'))
