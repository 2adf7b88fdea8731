"""The person model on the wire: the same numbers arrive, and nothing else is taken for one."""

import dataclasses
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from isthmus.proto import convert_student
from isthmus.proto.convert_person import centred_from_bytes, centred_from_pb, centred_to_bytes, centred_to_pb
from isthmus.proto.errors import InvalidInput, IsthmusError, TooLarge
from isthmus.proto.messages import StudentFile, StudentManifest
from isthmus.proto.v1 import isthmus_pb2 as pb
from tests.rigs.distill.people import person_model

RELEASES = sorted((Path(__file__).resolve().parents[2] / "golden" / "releases").glob("*.whl"))
CLASSES, WIDTH = 3, 5
MANIFEST = StudentManifest(
    "s-1", "final", (StudentFile("a.onnx", 1, b"h" * 32),), (1.0,), ("a", "b", "c"), "{}", WIDTH, 1.0
)


def test_the_numbers_arrive() -> None:
    sent = person_model(CLASSES, WIDTH)
    manifest = convert_student.manifest_from_bytes(convert_student.manifest_to_bytes(replace(MANIFEST, centred=sent)))
    for came in (manifest.centred, centred_from_bytes(centred_to_bytes(sent), CLASSES, WIDTH)):
        assert came is not None
        for part in ("heads", "person"):
            for field in dataclasses.fields(getattr(sent, part)):
                before, after = (getattr(getattr(one, part), field.name) for one in (sent, came))
                np.testing.assert_array_equal(before, after)
    assert convert_student.manifest_from_bytes(convert_student.manifest_to_bytes(MANIFEST)).centred is None


def floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": floats(1, 2)}, "of weights"),
        ({"bias": b"abc"}, "of bias"),
        ({"centre": b""}, "of centre"),
        ({"bias": floats(1, 2, 3, 4, 5, float("nan"))}, "NaN or infinity in bias"),
        ({"bias": floats(1, 2, 3, 4, 5, float("inf"))}, "NaN or infinity in bias"),
        ({"spread": floats(*[1.0] * 9, 0.0)}, "a spread is not positive"),
        ({"spread": floats(*[1.0] * 9, -1.0)}, "a spread is not positive"),
        ({"between": floats(*np.arange(18.0))}, "between is no covariance"),
        ({"within": floats(*np.stack([-np.eye(3)] * 2).ravel())}, "within is no covariance"),
        ({"mean": floats(*np.zeros(9))}, "of mean"),
        ({"fusion": 0.0}, "out of bounds"),
        ({"fusion": float("nan")}, "out of bounds"),
        ({"fusion": 1e9}, "out of bounds"),
        ({"people": 1}, "out of bounds"),
    ],
)
def test_a_damaged_model_is_refused(changes: dict[str, object], words: str) -> None:
    message = centred_to_pb(person_model(CLASSES, WIDTH))
    for name, value in changes.items():
        setattr(message, name, value)
    with pytest.raises(InvalidInput, match=words):
        centred_from_pb(message, CLASSES, WIDTH)


@pytest.mark.parametrize(("classes", "width"), [(CLASSES + 1, WIDTH), (CLASSES, WIDTH - 1)])
def test_a_model_of_another_student_is_refused(classes: int, width: int) -> None:
    with pytest.raises(InvalidInput, match="are wanted"):
        centred_from_pb(centred_to_pb(person_model(CLASSES, WIDTH)), classes, width)


def test_the_size_is_bounded_before_memory_is_taken() -> None:
    with pytest.raises(TooLarge):
        centred_to_bytes(person_model(300, 4))
    with pytest.raises(TooLarge):
        centred_from_pb(pb.PersonModel(fusion=1, people=9), 1_000, 4_096)


def test_bytes_that_are_no_model() -> None:
    for content in (b"\xff\xff\xff", b""):
        with pytest.raises(IsthmusError):
            centred_from_bytes(content, CLASSES, WIDTH)


@pytest.mark.parametrize("wheel", RELEASES, ids=lambda path: path.name.split("-")[1])
def test_an_earlier_release_reads_the_manifest_and_ignores_the_model(wheel: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.pb"
    manifest.write_bytes(convert_student.manifest_to_bytes(replace(MANIFEST, centred=person_model(CLASSES, WIDTH))))
    program = (
        "import pathlib, sys; from isthmus.proto.convert import manifest_from_bytes\n"
        "read = manifest_from_bytes(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "print(sys.modules['isthmus'].__file__, read.student_id, hasattr(read, 'centred'))"
    )
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    env = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", program, str(manifest)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "site" / "isthmus" / "__init__.py"), "s-1", "False"]
