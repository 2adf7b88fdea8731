"""Settings of all tests: one compute thread, repeatable property tests, and the real data if it is available."""

import os

# Before numpy or torch is imported: several threads on a busy machine of two cores are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, settings

from isthmus.data.transforms import InputSpec
from isthmus.edge.link.interface import MemoryCloud
from isthmus.proto.codec import unpack_frame
from isthmus.proto.convert_student import manifest_to_bytes
from isthmus.proto.errors import BadFrame
from isthmus.proto.messages import (
    Enrolment,
    InferReply,
    JobStatus,
    PublicMeasure,
    SignedManifest,
    Stage,
    StudentFile,
    StudentManifest,
    compressed_width,
    ratio_name,
)
from isthmus.proto.person import Centred

settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def emopair() -> Path:
    """Return the folder of EmoPair: real speech and faces in CREMA-D's layout. Without it the test is skipped."""
    return _real_data("ISTHMUS_EMOPAIR", "emopair")


@pytest.fixture(scope="session")
def ravface() -> Path:
    """Return the folder of RavFace: voices, with faces drawn from the same recordings. Without it the test is skipped,
    or fails if ISTHMUS_REQUIRE_DATA is set, as in .ci/run where the data lies beside the project.
    """
    return _real_data("ISTHMUS_RAVFACE", "ravface")


def _real_data(variable: str, name: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        reason = f"set {variable} to the {name} folder to run this test on real clips"
        if name in os.environ.get("ISTHMUS_REQUIRE_DATA", "").split(","):
            pytest.fail(reason)
        pytest.skip(reason)
    folder = Path(value)
    if not (folder / "manifest.csv").is_file():
        pytest.fail(f"{variable} is {value}, which has no manifest.csv")
    return folder


CLASSES = ("NEU", "HAP", "SAD")
FEATURE_WIDTH = 12
TINY_RATIOS = (1.0, 1.5)


@dataclass(frozen=True)
class TinyStudents:
    """Makes signed students of a few kilobytes that really run, and a cloud in memory that serves them."""

    key: Ed25519PrivateKey

    @property
    def spec(self) -> InputSpec:
        return InputSpec(
            spectrogram_bins=16, spectrogram_columns=16, frame_px=16, stored_px=18, frames_stored=4, frames_used=2
        )

    @property
    def public_key(self) -> bytes:
        return self.key.public_key().public_bytes_raw()

    def files(self, kind: str, seed: int) -> dict[str, bytes]:
        """Write the ONNX files of StudentManifest; return them by name."""
        rng = np.random.default_rng(seed)
        width, spec = FEATURE_WIDTH, self.spec
        spectrogram = ["B", spec.spectrogram_bins, spec.spectrogram_columns]
        frames = ["B", "K", 3, spec.frame_px, spec.frame_px]
        heads = {"teacher_head.onnx": 0} if kind == "interim" else {"teacher_head.onnx": 0, "local_head.onnx": 1}
        made = {
            "audio_encoder.onnx": _pooled("spectrogram_BFT", spectrogram, [2], spec.spectrogram_bins, rng),
            "visual_encoder.onnx": _pooled("frames_BKCHW", frames, [1, 3, 4], 3, rng),
            **{name: _head(width, np.random.default_rng(salt)) for name, salt in heads.items()},
        }
        if kind != "interim":
            for ratio in TINY_RATIOS:
                made[f"compressor_r{ratio_name(ratio)}.onnx"] = _compressor(width, compressed_width(width, ratio), rng)
        return made

    def signed(
        self,
        student_id: str,
        kind: str,
        files: Mapping[str, bytes],
        measured: PublicMeasure | None = None,
        centred: Centred | None = None,
    ) -> SignedManifest:
        manifest = StudentManifest(
            student_id=student_id,
            kind=kind,
            files=tuple(StudentFile(name, len(data), sha256(data).digest()) for name, data in sorted(files.items())),
            ratios=() if kind == "interim" else TINY_RATIOS,
            classes=CLASSES,
            input_spec_json=self.spec.to_json(),
            feature_width=FEATURE_WIDTH,
            created_s=1.0,
            measured=measured,
            centred=centred,
        )
        manifest_bytes = manifest_to_bytes(manifest)
        return SignedManifest(manifest_bytes, self.key.sign(manifest_bytes))

    def cloud(self) -> MemoryCloud:
        """Return a cloud with the students base, interim and final, and a job of two rounds."""
        students, stored = {}, {}
        for seed, kind in enumerate(("base", "interim", "final")):
            files = self.files(kind, seed)
            students[kind] = self.signed(kind, kind, files)
            stored.update({(kind, name): data for name, data in files.items()})
        return MemoryCloud(
            enrolment=Enrolment("device-1", "token-1", self.public_key, CLASSES, self.spec.to_json(), FEATURE_WIDTH),
            students=students,
            files=stored,
            newest_id="base",
            script=(
                JobStatus("", Stage.SELECTING, 0, 2),
                JobStatus("", Stage.DISTILLING, 0, 2),
                JobStatus("", Stage.AWAITING_PROTOTYPES, 1, 2, student_id="interim"),
                JobStatus("", Stage.DISTILLING, 1, 2),
                JobStatus("", Stage.READY, 1, 2, student_id="final", selected_per_class=(1, 2, 3)),
            ),
            answer=_answer,
        )


def _answer(student_id: str, sequence: int, frame: bytes) -> InferReply:
    """Answer as a cloud that has read the frame: the class is computed from the frame's numbers."""
    try:
        read = unpack_frame(frame, feature_width=FEATURE_WIDTH, ratios=TINY_RATIOS)
    except BadFrame as error:
        return InferReply(sequence, None, error.code, str(error))
    certain_C = np.zeros(len(CLASSES), np.float32)
    certain_C[int(np.abs(read.features.filled()).sum() * 100) % len(CLASSES)] = 1
    return InferReply(sequence, certain_C, server_ms=0.5)


def _model(nodes: list[Any], inputs: dict[str, list[Any]], outputs: dict[str, int], weights: dict[str, Any]) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", width]) for name, width in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return bytes(model.SerializeToString())


def _pooled(name: str, shape: list[Any], axes: list[int], kept: int, rng: np.random.Generator) -> bytes:
    """Add nodes to a graph: mean over ``axes``, a linear map, tanh."""
    from onnx import helper

    nodes = [
        helper.make_node("ReduceMean", [name, "axes"], ["pooled"], keepdims=0),
        helper.make_node("MatMul", ["pooled", "weight"], ["mapped"]),
        helper.make_node("Tanh", ["mapped"], ["features_BD"]),
    ]
    weights = {"axes": np.array(axes, np.int64), "weight": rng.standard_normal((kept, FEATURE_WIDTH), np.float32)}
    return _model(nodes, {name: shape}, {"features_BD": FEATURE_WIDTH}, weights)


def _head(width: int, rng: np.random.Generator) -> bytes:
    from onnx import helper

    nodes = [
        helper.make_node("Split", ["present_B2"], ["audio_B1", "visual_B1"], axis=1, num_outputs=2),
        helper.make_node("Mul", ["audio_BD", "audio_B1"], ["audio"]),
        helper.make_node("Mul", ["visual_BD", "visual_B1"], ["visual"]),
        helper.make_node("Concat", ["audio", "visual"], ["both"], axis=1),
        helper.make_node("MatMul", ["both", "weight"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities_BC"], axis=1),
    ]
    weights = {"weight": 3 * rng.standard_normal((2 * width, len(CLASSES)), np.float32)}
    inputs: dict[str, list[Any]] = {"audio_BD": ["B", width], "visual_BD": ["B", width], "present_B2": ["B", 2]}
    return _model(nodes, inputs, {"probabilities_BC": len(CLASSES)}, weights)


def _compressor(width: int, compressed: int, rng: np.random.Generator) -> bytes:
    from onnx import helper

    nodes = [
        helper.make_node("MatMul", ["audio_BD", "audio_weight"], ["audio_BW"]),
        helper.make_node("MatMul", ["visual_BD", "visual_weight"], ["visual_BW"]),
    ]
    weights = {f"{each}_weight": rng.standard_normal((width, compressed), np.float32) for each in ("audio", "visual")}
    inputs: dict[str, list[Any]] = {"audio_BD": ["B", width], "visual_BD": ["B", width]}
    return _model(nodes, inputs, {"audio_BW": compressed, "visual_BW": compressed}, weights)


@pytest.fixture
def students() -> TinyStudents:
    return TinyStudents(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
