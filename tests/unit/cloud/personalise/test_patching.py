"""Patches of tiny students that really run: kept only if the student stays the same."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from isthmus.cloud.personalise.patching import EXACT, LADDER, MOST_CLIPS, MOST_ERROR, patch_student, weight_spans
from isthmus.data.transforms import InputSpec
from isthmus.proto.errors import InvalidInput
from isthmus.proto.patch import apply_patch


@dataclass(frozen=True)
class Clips:
    """Random clips in memory, with the attributes of ``ClipArrays`` that patching reads."""

    spec: InputSpec
    spectrograms_NFT: np.ndarray
    frames_NKHWC: np.ndarray

    @property
    def names(self) -> list[str]:
        return [f"clip{row}" for row in range(len(self.spectrograms_NFT))]

    def subset(self, rows: np.ndarray) -> "Clips":
        return Clips(self.spec, self.spectrograms_NFT[rows], self.frames_NKHWC[rows])


@pytest.fixture
def clips(students: Any) -> Clips:
    rng, spec = np.random.default_rng(5), students.spec
    spectrograms = rng.standard_normal((MOST_CLIPS + 9, 16, 16), np.float32)
    return Clips(spec, spectrograms, rng.integers(0, 256, (MOST_CLIPS + 9, 4, 18, 18, 3), np.uint8))


def nudged(content: bytes, by: float) -> bytes:
    """Return the same network with its weights changed by noise of scale ``by``."""
    model, rng = onnx.load_model_from_string(content), np.random.default_rng(6)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            value = numpy_helper.to_array(tensor)
            tensor.CopyFrom(
                numpy_helper.from_array(value + by * rng.standard_normal(value.shape, np.float32), tensor.name)
            )
    return bytes(model.SerializeToString())


def write(folder: Path, files: dict[str, bytes]) -> list[Path]:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return sorted(folder.iterdir())


def compressed(content: bytes) -> np.ndarray:
    pair = np.random.default_rng(7).standard_normal((2, 50, 12)).astype(np.float32)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return np.concatenate(session.run(None, {"audio_BD": pair[0], "visual_BD": pair[1]}), axis=1)


@pytest.mark.parametrize("by", [1e-3, 3.0])
def test_what_is_published_is_what_the_patch_gives_and_near_what_was_exported(
    students: Any, clips: Any, tmp_path: Path, by: float
) -> None:
    """Weights moved a little, or so far that coarse codings no longer suffice."""
    base = students.files("base", 1)
    exported = {name: content if "head" in name else nudged(content, by) for name, content in base.items()}
    write(tmp_path / "base", base)
    made = patch_student(write(tmp_path / "new", exported), tmp_path / "base", clips, classify=first_sign)
    contents = {path.name: path.read_bytes() for path in made}
    assert set(contents) - {name for name in contents if name.endswith(".patch")} == set(exported)
    assert "compressor_r1.onnx.patch" in contents
    for name in base:
        patch = contents.get(f"{name}.patch")
        assert contents[name] == (exported[name] if patch is None else apply_patch(base[name], patch))
    assert "teacher_head.onnx.patch" not in contents, "what did not change needs no patch"
    assert "visual_encoder.onnx.patch" not in contents, "its few weights travel as they are"
    got, expected = compressed(contents["compressor_r1.onnx"]), compressed(exported["compressor_r1.onnx"])
    assert 0 < np.linalg.norm(got - expected) <= 2 * MOST_ERROR * np.linalg.norm(expected)


def first_sign(name: str, outputs: Any) -> np.ndarray:
    """A head of two classes."""
    assert name.startswith("compressor_r")
    return (outputs[0][:, 0] > 0).astype(np.int64)


def test_a_student_that_would_be_answered_otherwise_is_not_patched_coarsely(
    students: Any, clips: Any, tmp_path: Path
) -> None:
    base = students.files("base", 1)
    exported = {name: content if "head" in name else nudged(content, 1e-3) for name, content in base.items()}
    write(tmp_path / "base", base)
    files = write(tmp_path / "new", exported)

    def touchy(name: str, outputs: Any) -> np.ndarray:
        """Classify by the last bits, so that no rounding passes unnoticed."""
        return np.ascontiguousarray(outputs[0]).view(np.uint32).sum(axis=1)

    assert patch_student(files, tmp_path / "base", clips, classify=touchy) == files
    assert all(path.read_bytes() == exported[path.name] for path in files)


def test_another_layout_or_no_base_gives_whole_files(students: Any, clips: Any, tmp_path: Path) -> None:
    exported = students.files("final", 2)
    files = write(tmp_path / "new", exported)
    assert patch_student(files, tmp_path / "nowhere", clips, classify=first_sign) == files
    write(tmp_path / "other", {name: bytes(len(content)) for name, content in exported.items()})
    assert patch_student(files, tmp_path / "other", clips, classify=first_sign) == files
    assert all(path.read_bytes() == exported[path.name] for path in files)


def test_where_the_weights_are(students: Any) -> None:
    content = students.files("base", 1)["compressor_r1.onnx"]
    spans, ladder = weight_spans(content)
    assert ladder == LADDER
    assert [(span.values, span.rows) for span in spans] == [(144, 12), (144, 12)]
    for span, tensor in zip(spans, onnx.load_model_from_string(content).graph.initializer, strict=True):
        assert content[span.offset_bytes : span.offset_bytes + 4 * span.values] == tensor.raw_data
    with pytest.raises(InvalidInput, match="not an ONNX"):
        weight_spans(b"\xff not a model")


def int8_network(seed: int, by: int = 0) -> bytes:
    """Return a visual encoder of the tiny students' size with int8 weights; ``by`` steps of noise are added to them."""
    rng = np.random.default_rng(seed)
    weights_IO = rng.integers(-64, 65, (3 * 16 * 16, 12), np.int8)
    noise = np.random.default_rng(9).integers(-by, by + 1, weights_IO.shape, np.int8)
    scale_O, zeros_O = np.float32([1e-3 + 1e-6 * by] * 12), np.zeros(12, np.int8)
    tensors = {"w": np.clip(weights_IO + noise, -64, 64).astype(np.int8), "scale": scale_O, "zero": zeros_O}
    nodes = [
        helper.make_node("ReduceMean", ["frames_BKCHW"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["weights"], axis=1),
        helper.make_node("MatMul", ["flat", "weights"], ["visual_BD"]),
    ]
    graph = helper.make_graph(
        nodes,
        "int8",
        [helper.make_tensor_value_info("frames_BKCHW", onnx.TensorProto.FLOAT, ["B", "K", 3, 16, 16])],
        [helper.make_tensor_value_info("visual_BD", onnx.TensorProto.FLOAT, ["B", 12])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(made.SerializeToString())


@pytest.mark.parametrize("touchy", [False, True])
def test_int8_encoders_get_exact_patches_of_a_few_bits_per_weight(
    students: Any, clips: Any, tmp_path: Path, touchy: bool
) -> None:
    """They stay also if every rounding of the float32 files would change an answer."""
    name = "visual_encoder.onnx"
    base = {**students.files("base", 1), name: int8_network(1)}
    exported = {key: each if "head" in key else nudged(each, 1e-3) for key, each in base.items()}
    exported[name] = int8_network(1, by=2)
    assert weight_spans(base[name])[1] == (EXACT,)
    write(tmp_path / "base", base)

    def by_last_bits(_: str, outputs: Any) -> np.ndarray:
        return np.ascontiguousarray(outputs[0]).view(np.uint32).sum(axis=1)

    classify = by_last_bits if touchy else first_sign
    made = patch_student(write(tmp_path / "new", exported), tmp_path / "base", clips, classify=classify)
    contents = {path.name: path.read_bytes() for path in made}
    patch = contents[f"{name}.patch"]
    assert contents[name] == exported[name] == apply_patch(base[name], patch)
    weights = 3 * 16 * 16 * 12
    assert 8 * len(patch) < 3.5 * weights, "five values are as frequent, so Huffman codes take 2.4 bits"
    assert ("compressor_r1.onnx.patch" in contents) is not touchy
