"""A device of an earlier release, by its own code, with students of this version."""

import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from isthmus.proto.convert_student import manifest_from_bytes, manifest_to_bytes
from isthmus.proto.messages import SignedManifest, StudentPatch
from isthmus.proto.patch import Differences, Span, make_patch

RELEASES = sorted((Path(__file__).parents[3] / "golden" / "releases").glob("*.whl"))
ENCODER = "visual_encoder.onnx"

DEVICE = """
import sys, zlib
from pathlib import Path
from isthmus.edge.student.slot import StudentSlot
from isthmus.proto.messages import Chunk, SignedManifest

sent = Path(sys.argv[1])
slot = StudentSlot(sent / "device", (sent / "key").read_bytes(), lambda folder, manifest: None)
for name in ("base", "own"):
    folder = sent / name
    manifest = slot.begin(SignedManifest((folder / "manifest").read_bytes(), (folder / "signature").read_bytes()))
    while missing := slot.missing(manifest):
        file, _ = missing[0]
        print(name, file.name)
        data = (folder / file.name).read_bytes()
        slot.receive(manifest, file, [Chunk(0, data, zlib.crc32(data))])
    slot.verify(name)
    slot.activate(name)
"""


@pytest.mark.parametrize("wheel", RELEASES, ids=lambda path: path.name.split("-")[1])
def test_it_fetches_a_file_whole_whose_patch_has_a_coding_that_it_does_not_know(
    students: Any, wheel: Path, tmp_path: Path
) -> None:
    base, own = students.files("base", 1), students.files("final", 2)
    patch = make_patch(base[ENCODER], own[ENCODER], [Span(100, 64)], coding=Differences.BYTES)
    of_patch = StudentPatch(sha256(base[ENCODER]).digest(), len(patch), sha256(patch).digest())
    for name, files in (("base", base), ("own", own)):
        kind = "base" if name == "base" else "final"
        manifest = manifest_from_bytes(students.signed(name, kind, files).manifest_bytes)
        if name == "own":
            entries = [replace(each, patch=of_patch) if each.name == ENCODER else each for each in manifest.files]
            manifest = replace(manifest, files=tuple(entries))
        content = manifest_to_bytes(manifest)
        signed = SignedManifest(content, students.key.sign(content))
        sent = {**files, f"{ENCODER}.patch": patch, "manifest": signed.manifest_bytes, "signature": signed.signature}
        (tmp_path / name).mkdir()
        for each, data in sent.items():
            (tmp_path / name / each).write_bytes(data)
    (tmp_path / "key").write_bytes(students.public_key)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "old")
    done = subprocess.run(
        [sys.executable, "-P", "-c", DEVICE, tmp_path],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "old")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    fetched = [line.removeprefix("own ") for line in done.stdout.splitlines() if line.startswith("own ")]
    assert fetched.count(f"{ENCODER}.patch") == fetched.count(ENCODER) == 1
    assert fetched.index(f"{ENCODER}.patch") < fetched.index(ENCODER)
    assert (tmp_path / "device" / "current" / ENCODER).read_bytes() == own[ENCODER]
