"""What the serving side's page offers: its numbers, and the base student if there is one to try."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the page needs an HTTP server")

from starlette.testclient import TestClient

from isthmus.cloud.commands.paging import page
from isthmus.cloud.page.app import cloud_page
from isthmus.distill.release import Release, ReleaseError
from isthmus.page.student import BrowserStudent
from tests.conftest import CLASSES
from tests.rigs.distill.release import tiny_recipe


def test_without_a_release_there_is_no_student() -> None:
    client = TestClient(cloud_page(1))
    assert client.get("/api/page").json()["student"] is False
    assert client.get("/api/student").status_code == 404


def test_a_release_offers_its_base_student(students: Any, tmp_path: Path) -> None:
    for name, content in students.files("base", 0).items():
        (tmp_path / name).write_bytes(content)
    student = BrowserStudent(tmp_path, "the base student of tests", CLASSES, students.spec.to_json())
    client = TestClient(cloud_page(1, student))
    assert client.get("/api/page").json()["student"] is True
    assert client.get("/api/student").json()["name"] == "the base student of tests"
    assert client.get("/api/student/local_head.onnx").content == (tmp_path / "local_head.onnx").read_bytes()
    assert client.get("/api/student/teacher_head.onnx").status_code == 409
    (tmp_path / "local_head.onnx").unlink()
    assert client.get("/api/student").status_code == 409


def test_a_release_without_a_base_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="is not a release"):
        page(9464, 0, tmp_path)
    Release.create(tmp_path / "release", tiny_recipe())
    with pytest.raises(ValueError, match="no base student yet"):
        page(9464, 0, tmp_path / "release")
