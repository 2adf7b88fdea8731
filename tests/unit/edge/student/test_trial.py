"""The trial of a student in a child process: sound ones pass, and what passes a bound harms only the child."""

import contextlib
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from isthmus.edge.student import trial
from isthmus.edge.student.onnx_file import check_model, check_model_file
from isthmus.edge.student.trial import Bounds, try_student
from isthmus.edge.student.trust import Unfit
from isthmus.proto.convert_student import manifest_from_bytes
from isthmus.proto.errors import InvalidInput
from isthmus.proto.messages import StudentFile

node, value = helper.make_node, helper.make_tensor_value_info


def local_head(width: int, classes: int, kind: str) -> bytes:
    """A head that loops for ever, needs 2.8 GB, or answers NaN unless the clip is silent."""
    weights: dict[str, Any] = {"weight": np.ones((width, classes), np.float32)}
    nodes = [node("MatMul", ["audio_BD", "weight"], ["first"])]
    if kind == "loop":
        inner = [node("Identity", ["go_in"], ["go_out"]), node("Sin", ["x_in"], ["x_out"])]
        go, x = TensorProto.BOOL, TensorProto.FLOAT
        takes = [value("i", TensorProto.INT64, []), value("go_in", go, []), value("x_in", x, None)]
        body = helper.make_graph(inner, "body", takes, [value("go_out", go, []), value("x_out", x, None)])
        nodes += [node("Loop", ["turns", "go", "first"], ["logits"], body=body)]
        weights |= {"turns": np.array(1 << 62, np.int64), "go": np.array(True)}
    elif kind == "memory":
        zero = helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0])
        nodes += [
            node("ConstantOfShape", ["size"], ["zeros"], value=zero),
            node("ReduceMax", ["zeros"], ["most"], keepdims=0),
            node("Add", ["first", "most"], ["logits"]),
        ]
        weights |= {"size": np.array([700_000_000], np.int64)}
    else:
        nodes += [
            node("Abs", ["audio_BD"], ["size"]),
            node("ReduceSum", ["size", "axis"], ["sum"], keepdims=1),
            node("Sub", ["little", "sum"], ["less"]),
            node("Log", ["less"], ["log"]),
            node("Mul", ["log", "none"], ["nothing"]),
            node("Add", ["first", "nothing"], ["logits"]),
        ]
        weights |= {"axis": np.array([1]), "little": np.float32(1e-3), "none": np.float32(0)}
    nodes += [node("Softmax", ["logits"], ["probabilities_BC"], axis=1)]
    inputs = {"audio_BD": ["B", width], "visual_BD": ["B", width], "present_B2": ["B", 2]}
    graph = helper.make_graph(
        nodes,
        "head",
        [value(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [value("probabilities_BC", TensorProto.FLOAT, ["B", classes])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    content: bytes = model.SerializeToString()
    return content


def written(folder: Path, students: Any, files: dict[str, bytes]) -> Any:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return manifest_from_bytes(students.signed("trial", "final", files).manifest_bytes)


def test_a_sound_student_passes(students: Any, tmp_path: Path) -> None:
    try_student(tmp_path, written(tmp_path, students, students.files("final", 2)))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("loop", "too much processor time|within 8 s"), ("memory", "ConstantOfShape|bad_alloc"), ("nan", "distribution")],
)
def test_a_student_without_bounds_is_refused(
    students: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, reason: str
) -> None:
    files = students.files("final", 2)
    manifest = written(tmp_path, students, files)
    head = local_head(manifest.feature_width, len(manifest.classes), kind)
    manifest = written(tmp_path, students, files | {"local_head.onnx": head})
    monkeypatch.setattr(trial, "check_model_file", lambda path: None)  # It refuses the loop before it can run.
    with pytest.raises(Unfit, match=reason):
        try_student(tmp_path, manifest, Bounds(wall_s=8.0, cpu_s=2))


def test_another_number_of_classes_is_refused(students: Any, tmp_path: Path) -> None:
    manifest = written(tmp_path, students, students.files("final", 2))
    wrong = manifest.__class__(**{**vars(manifest), "classes": (*manifest.classes, "MORE")})
    with pytest.raises(Unfit, match="does not give 4 probabilities"):
        try_student(tmp_path, wrong)


def test_a_file_that_is_no_model_is_refused(students: Any, tmp_path: Path) -> None:
    files = students.files("final", 2) | {"teacher_head.onnx": b"no model"}
    manifest = written(tmp_path, students, files)
    assert StudentFile("teacher_head.onnx", 8, sha256(b"no model").digest()) in manifest.files
    with pytest.raises(Unfit, match="is no ONNX model"):
        try_student(tmp_path, manifest)


def test_a_loop_is_refused_before_it_runs(students: Any, tmp_path: Path) -> None:
    manifest = written(tmp_path, students, students.files("final", 2))
    head = local_head(manifest.feature_width, len(manifest.classes), "loop")
    manifest = written(tmp_path, students, students.files("final", 2) | {"local_head.onnx": head})
    with pytest.raises(Unfit, match=r"local_head\.onnx: control flow"):
        try_student(tmp_path, manifest)


def external(model: ModelProto) -> None:
    weight = model.graph.initializer[0]
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../../credentials.json")


def constant_elsewhere(model: ModelProto) -> None:
    tensor = TensorProto(name="stolen", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    model.graph.node.append(helper.make_node("Constant", [], ["stolen"], value=tensor))


def function(model: ModelProto) -> None:
    model.functions.append(helper.make_function("own", "f", ["x"], ["y"], [], [helper.make_opsetid("", 18)]))


def foreign(model: ModelProto) -> None:
    model.graph.node[0].domain = "evil.example"


@pytest.mark.parametrize("change", [external, constant_elsewhere, function, foreign])
def test_what_a_model_file_may_not_contain(students: Any, tmp_path: Path, change: Any) -> None:
    model = ModelProto.FromString(students.files("final", 2)["local_head.onnx"])
    change(model)
    path = tmp_path / "local_head.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InvalidInput, match=r"local_head\.onnx: .*not allowed"):
        check_model_file(path)


@given(st.binary(max_size=200), st.integers(0, 2000))
def test_no_bytes_end_in_another_error(noise: bytes, cut: int) -> None:
    head = local_head(4, 3, "nan")
    for content in (noise, head[:cut], head[:cut] + noise):
        with contextlib.suppress(IndexError, ValueError, InvalidInput):
            check_model(memoryview(content))
