"""Conversions between dataclasses and protobuf: pairs agree, and incoming messages are bounded and checked."""

import zlib

import numpy as np
import pytest

from isthmus.proto import checks, convert, convert_student
from isthmus.proto.errors import BadPrototypes, Corrupt, InvalidInput, IsthmusError, TooLarge
from isthmus.proto.limits import CHUNK_BYTES
from isthmus.proto.messages import (
    Chunk,
    Enrolment,
    InferReply,
    JobStatus,
    Prototypes,
    PublicMeasure,
    SignedManifest,
    Stage,
    StudentFile,
    StudentManifest,
    StudentPatch,
    UploadMode,
)
from isthmus.proto.v1 import isthmus_pb2 as pb

PROTOTYPES = Prototypes(
    np.array([[0.25, 0.75], [1.0, 0.0]], np.float32), np.array([3, 5], np.int32), UploadMode.PROTOTYPES, 3, 2.0
)
FILE = StudentFile("compressor_r1.5.onnx", 10, b"h" * 32, StudentPatch(b"b" * 32, 5, b"p" * 32))
LARGE_PATCH = StudentPatch(b"b" * 32, 1 << 29, b"p" * 32)
MEASURED = PublicMeasure(512, 0.75, 0.4, (0.25, 0.75), (0.75, 0.8))
MANIFEST = StudentManifest("s-1", "final", (FILE,), (1.0, 1.5), ("a", "b"), "{}", 8, 12.5, MEASURED)


def message(**changes: object) -> pb.Prototypes:
    sound = convert.prototypes_to_pb(PROTOTYPES)
    for name, value in changes.items():
        if name == "sizes":
            del sound.sizes[:]
            sound.sizes.extend(value)
        else:
            setattr(sound, name, value)
    return sound


WITH_FEATURES = Prototypes(
    PROTOTYPES.values_KC, PROTOTYPES.sizes_K, UploadMode.FEATURES, 3, None, np.arange(8, dtype=np.float32).reshape(2, 4)
)


def test_prototypes_with_features_pair() -> None:
    read = convert.prototypes_from_pb(convert.prototypes_to_pb(WITH_FEATURES))
    assert (read.mode, read.epsilon) == (UploadMode.FEATURES, None)
    np.testing.assert_array_equal(read.features_KE, WITH_FEATURES.features_KE)


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"features": b"1234"}, BadPrototypes, "bytes of features"),
        ({"features": b"", "feature_values": 0}, BadPrototypes, "bytes of features"),
        ({"features": b"1234" * 6, "feature_values": 3}, BadPrototypes, "both modalities"),
        ({"feature_values": -4}, BadPrototypes, "bytes of features"),
        ({"features": np.full(8, np.nan, np.float32).tobytes()}, BadPrototypes, "NaN"),
        ({"epsilon": 1.0}, BadPrototypes, "noise"),
        ({"min_cluster": 4}, BadPrototypes, "floor"),
        ({"mode": pb.Prototypes.MODE_PROTOTYPES}, BadPrototypes, "mode features alone"),
        ({"feature_values": 9_000}, TooLarge, "over the bound"),
        ({"rows": 100, "feature_values": 4_000}, TooLarge, "over the bound"),
    ],
)
def test_features_out_of_bounds_are_refused(changes: dict[str, object], error: type[IsthmusError], reason: str) -> None:
    sent = convert.prototypes_to_pb(WITH_FEATURES)
    for name, value in changes.items():
        setattr(sent, name, value)
    with pytest.raises(error, match=reason):
        convert.prototypes_from_pb(sent)


def test_prototypes_pair() -> None:
    read = convert.prototypes_from_pb(convert.prototypes_to_pb(PROTOTYPES))
    np.testing.assert_array_equal(read.values_KC, PROTOTYPES.values_KC)
    np.testing.assert_array_equal(read.sizes_K, PROTOTYPES.sizes_K)
    assert (read.mode, read.min_cluster, read.epsilon) == (UploadMode.PROTOTYPES, 3, 2.0)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"rows": 3}, BadPrototypes),
        ({"rows": -1}, BadPrototypes),
        ({"rows": 0, "values": b""}, BadPrototypes),
        ({"rows": 1 << 30, "classes": 2}, TooLarge),
        ({"rows": 10_000, "classes": 1_000}, TooLarge),
        ({"classes": 1_001, "rows": 1}, TooLarge),
        ({"values": b"\0" * 15}, BadPrototypes),
        ({"values": np.array([[np.nan, 1], [1, 0]], "<f4").tobytes()}, BadPrototypes),
        ({"values": np.array([[np.inf, 0], [1, 0]], "<f4").tobytes()}, BadPrototypes),
        ({"values": np.array([[-0.5, 1.5], [1, 0]], "<f4").tobytes()}, BadPrototypes),
        ({"values": np.array([[0.5, 0.6], [1, 0]], "<f4").tobytes()}, BadPrototypes),
        ({"sizes": [3]}, BadPrototypes),
        ({"sizes": [3, 2]}, BadPrototypes),
        ({"sizes": [3, -5]}, BadPrototypes),
        ({"min_cluster": 0}, BadPrototypes),
        ({"mode": pb.Prototypes.MODE_UNSPECIFIED}, BadPrototypes),
        ({"mode": pb.Prototypes.MODE_PROBABILITIES}, BadPrototypes),
        ({"epsilon": -1.0}, BadPrototypes),
        ({"epsilon": float("nan")}, BadPrototypes),
    ],
)
def test_bad_prototypes_are_refused(changes: dict[str, object], error: type[IsthmusError]) -> None:
    with pytest.raises(error):
        convert.prototypes_from_pb(message(**changes))


def test_probabilities_have_size_one() -> None:
    read = convert.prototypes_from_pb(message(mode=pb.Prototypes.MODE_PROBABILITIES, sizes=[1, 1]))
    assert read.mode is UploadMode.PROBABILITIES


def test_the_other_pairs() -> None:
    enrolment = Enrolment("d-1", "hush-hush", b"k" * 32, ("a", "b"), "{}", 512)
    assert convert.enrolment_from_pb(convert.enrolment_to_pb(enrolment)) == enrolment
    assert "hush" not in repr(enrolment)
    status = JobStatus("j", Stage.AWAITING_PROTOTYPES, 1, 2, 3, 4, 0.5, 6.0, "s", (1, 2), {"queued": 0.5}, "e")
    assert convert.job_status_from_pb(convert.job_status_to_pb(status)) == status
    assert convert_student.manifest_from_bytes(convert_student.manifest_to_bytes(MANIFEST)) == MANIFEST
    signed = SignedManifest(b"m", b"s" * 64)
    assert convert_student.signed_manifest_from_pb(convert_student.signed_manifest_to_pb(signed)) == signed
    chunk = Chunk(7, b"abc", zlib.crc32(b"abc"))
    assert convert_student.chunk_from_pb(convert_student.chunk_to_pb(chunk)) == chunk
    refused = InferReply(4, None, 3, "no", True, 1.5)
    assert convert.infer_reply_from_pb(convert.infer_reply_to_pb(refused)) == refused
    answered = convert.infer_reply_from_pb(convert.infer_reply_to_pb(InferReply(5, np.array([0.5, 0.5], np.float32))))
    assert answered.sequence == 5
    np.testing.assert_array_equal(answered.probabilities_C, [0.5, 0.5])


@pytest.mark.parametrize("stage", Stage)
def test_every_stage_travels(stage: Stage) -> None:
    assert convert.job_status_from_pb(convert.job_status_to_pb(JobStatus("j", stage))).stage is stage


@pytest.mark.parametrize(
    "name", ["../x.onnx", "/etc/x.onnx", "a/b.onnx", ".x.onnx", "x.pkl", "x.onnx\n", "X.onnx", "", "x" * 60 + ".onnx"]
)
def test_a_file_name_is_no_path(name: str) -> None:
    with pytest.raises(InvalidInput):
        convert_student.student_file_from_pb(pb.StudentFile(name=name, size_bytes=1, sha256=b"h" * 32))


@pytest.mark.parametrize("text", ["", "../a", "a/b", ".a", "a\n", "a" * 65, "é"])
def test_an_id_is_no_path(text: str) -> None:
    with pytest.raises(InvalidInput):
        checks.identifier("student id", text)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"kind": "other"}, InvalidInput),
        ({"files": []}, InvalidInput),
        ({"files": [FILE, FILE]}, InvalidInput),
        ({"files": [StudentFile("a.onnx", 1 << 31, b"h" * 32)]}, TooLarge),
        ({"files": [StudentFile("a.onnx", 1, b"h")]}, InvalidInput),
        ({"files": [StudentFile(f"{n}.onnx", 1, b"h" * 32) for n in range(65)]}, TooLarge),
        ({"files": [StudentFile(f"{n}.onnx", 1 << 29, b"h" * 32) for n in range(3)]}, TooLarge),
        ({"files": [StudentFile(f"{n}.onnx", 1, b"h" * 32, LARGE_PATCH) for n in range(3)]}, TooLarge),
        ({"ratios": (0.5,)}, InvalidInput),
        ({"ratios": (float("nan"),)}, InvalidInput),
        ({"classes": ("a", "a")}, InvalidInput),
        ({"feature_width": 0}, InvalidInput),
        ({"feature_width": 1 << 20}, TooLarge),
        ({"student_id": "../../x"}, InvalidInput),
    ],
)
def test_bad_manifests_are_refused(changes: dict[str, object], error: type[IsthmusError]) -> None:
    bad = StudentManifest(**{**vars(MANIFEST), **changes})
    with pytest.raises(error):
        convert_student.manifest_from_bytes(convert_student.manifest_to_bytes(bad))


def test_bytes_that_are_no_manifest() -> None:
    with pytest.raises(InvalidInput, match="parse"):
        convert_student.manifest_from_bytes(b"\xff\xff\xff")


def test_chunks_are_bounded_and_checked() -> None:
    with pytest.raises(Corrupt, match="checksum"):
        convert_student.chunk_from_pb(pb.FetchStudentResponse(offset_bytes=0, data=b"abc", crc32=1))
    with pytest.raises(TooLarge):
        convert_student.chunk_from_pb(pb.FetchStudentResponse(data=b"\0" * (CHUNK_BYTES + 1)))
    with pytest.raises(InvalidInput):
        convert_student.chunk_from_pb(pb.FetchStudentResponse(offset_bytes=-1, data=b"a", crc32=zlib.crc32(b"a")))


@pytest.mark.parametrize("values", [[], [1.0], [0.7, 0.7], [float("nan"), 1.0], [-0.5, 1.5]])
def test_an_answer_is_a_distribution(values: list[float]) -> None:
    with pytest.raises(InvalidInput):
        convert.infer_reply_from_pb(pb.InferResponse(sequence=1, probabilities=values))


def test_the_generated_code_is_not_stale() -> None:
    generate = pytest.importorskip("isthmus.proto.generate")
    pytest.importorskip("grpc_tools", reason="grpcio-tools compiles the contract; extra dev")
    assert generate.main(["--check"]) == 0
