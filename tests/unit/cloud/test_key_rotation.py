"""The cloud's side of safe updates: the key changes and devices follow, versions increase, and nothing expires."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy.exc import IntegrityError

from isthmus.cloud import continuity
from isthmus.cloud.personalise import signing, students
from isthmus.cloud.personalise.signing import Signer
from isthmus.cloud.releases.catalogue import withdraw
from isthmus.cloud.store import pins
from isthmus.cloud.store import students as rows
from isthmus.cloud.store.database import Unusable
from isthmus.edge.student.slot import StudentSlot
from isthmus.edge.student.trust import Outdated
from isthmus.proto.convert_student import manifest_from_bytes
from isthmus.proto.errors import Busy, Corrupt, InvalidInput, NotYours
from isthmus.proto.limits import MAX_KEY_CHANGES
from isthmus.proto.messages import SignedManifest, StudentManifest
from tests.rigs.cloud.jobs import Bench

DAY_S = 86_400.0


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(tmp_path)
    bench.signer = continuity.same_key(bench.database, tmp_path / "key")
    return bench


def publish(bench: Bench, student_id: str, now_s: float, device_id: str | None = "dev") -> StudentManifest:
    file = bench.folder / "audio_encoder.onnx"
    file.write_text(student_id)
    return students.publish(
        bench.shelf,
        bench.signer,
        bench.offer,
        student_id=student_id,
        device_id=device_id,
        kind="final" if device_id else "base",
        files=[file],
        heads=None,
        now_s=now_s,
    )


def described(bench: Bench, student_id: str, now_s: float, signer: Signer | None = None) -> SignedManifest:
    return replace(bench.described(student_id, now_s, signer), key_changes=continuity.key_changes(bench.database))


def device(folder: Path, key: bytes, now_s: float) -> StudentSlot:
    return StudentSlot(folder / "device", key, lambda folder, manifest: None, device_id="dev", clock=lambda: now_s)


def test_a_device_follows_two_changes_of_the_key(bench: Bench, tmp_path: Path) -> None:
    pinned = bench.signer.public_key
    publish(bench, "s1", 1_000.0)
    for at_s in (1_001.0, 1_002.0):
        bench.signer = continuity.rotate_key(bench.database, tmp_path / "key", at_s)
    assert signing.load(tmp_path / "key").public_key == bench.signer.public_key != pinned
    assert continuity.same_key(bench.database, tmp_path / "key").public_key == bench.signer.public_key
    signed = described(bench, "s1", 1_003.0)
    assert device(tmp_path, pinned, 1_003.0).begin(signed).student_id == "s1"
    with pytest.raises(Corrupt, match="does not match the key pinned"):
        device(tmp_path / "2", bytes(31) + b"\x09", 1_003.0).begin(signed)


def test_a_kill_between_database_and_file_is_finished_at_the_next_start(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(continuity, "move", killed)
        continuity.rotate_key(bench.database, tmp_path / "key", 1_000.0)
    signer = continuity.same_key(bench.database, tmp_path / "key")
    assert signer.public_key == pins.get(bench.database, "signing_public_key") != bench.signer.public_key
    assert not (tmp_path / "key.next").exists()


def test_a_kill_before_the_database_leaves_the_old_key(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(database: object, values: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pins, "put_all", killed)
        continuity.rotate_key(bench.database, tmp_path / "key", 1_000.0)
    assert continuity.same_key(bench.database, tmp_path / "key").public_key == bench.signer.public_key
    assert continuity.rotate_key(bench.database, tmp_path / "key", 1_001.0).public_key != bench.signer.public_key


def test_a_retired_or_foreign_key_is_named_as_such(bench: Bench, tmp_path: Path) -> None:
    old = (tmp_path / "key").read_bytes()
    continuity.rotate_key(bench.database, tmp_path / "key", 1_000.0)
    (tmp_path / "key").write_bytes(old)
    with pytest.raises(Unusable, match="retired: copy the new one here"):
        continuity.same_key(bench.database, tmp_path / "key")
    with pytest.raises(Unusable, match="retired"):
        continuity.rotate_key(bench.database, tmp_path / "key", 1_001.0)
    (tmp_path / "key").write_bytes(bytes(32))
    with pytest.raises(Unusable, match="damaged or exchanged"):
        continuity.same_key(bench.database, tmp_path / "key")
    (tmp_path / "key").unlink()
    with pytest.raises(InvalidInput, match="no signing key"):
        continuity.rotate_key(bench.database, tmp_path / "key", 1_002.0)


def test_changes_of_the_key_are_bounded(bench: Bench, tmp_path: Path) -> None:
    pins.put_all(bench.database, {f"key_change_{number:04}": b"" for number in range(MAX_KEY_CHANGES)})
    with pytest.raises(Unusable, match=f"changed {MAX_KEY_CHANGES} times"):
        continuity.rotate_key(bench.database, tmp_path / "key", 1_000.0)


def test_a_signature_that_is_remembered_is_still_the_keys_own() -> None:
    one, other = (Signer(Ed25519PrivateKey.generate()) for _ in range(2))
    signature = one.sign(b"manifest")
    for _ in range(2):
        assert one.has_signed(signature, b"manifest")
        assert not one.has_signed(signature, b"another manifest")
        assert not other.has_signed(signature, b"manifest")


def test_versions_increase_also_if_the_clock_or_the_database_went_back(bench: Bench) -> None:
    versions = [publish(bench, name, at_s).version for name, at_s in (("s1", 1_000.0), ("s2", 1_000.5), ("s3", 10.0))]
    assert versions == [1_000, 1_001, 1_002]
    for name in ("s1", "s2", "s3"):  # A database without them, as after the restore of an old backup.
        rows.remove(bench.database, name)
    assert publish(bench, "s4", 2_000.0).version == 2_000
    own = publish(bench, "s5", 2_000.0)
    assert (own.device_id, own.expires_s) == ("dev", 2_000.0 + students.VALID_S)
    assert publish(bench, "base-x", 5.0, None).version == 5, "base students are counted apart"


def test_a_manifest_is_signed_anew_before_it_expires(bench: Bench) -> None:
    publish(bench, "s1", 1_000.0)
    first = described(bench, "s1", 1_000.0 + 14 * DAY_S)
    assert first == described(bench, "s1", 1_000.0)
    again = manifest_from_bytes(described(bench, "s1", 1_000.0 + 16 * DAY_S).manifest_bytes)
    assert again.expires_s == 1_000.0 + 16 * DAY_S + students.VALID_S
    assert replace(again, expires_s=0.0) == replace(manifest_from_bytes(first.manifest_bytes), expires_s=0.0)
    stored = rows.get(bench.database, "s1")
    assert stored is not None and manifest_from_bytes(stored.signed.manifest_bytes) == again


def test_a_student_that_version_0_1_has_signed_gets_version_expiry_and_device(bench: Bench, tmp_path: Path) -> None:
    manifest = publish(bench, "s1", 1_000.0)
    old = replace(manifest, version=0, expires_s=0.0, device_id="")
    rows.sign_anew(bench.database, "s1", students._signed(bench.signer, old))
    now = manifest_from_bytes(described(bench, "s1", 3_000.0).manifest_bytes)
    assert (now.version, now.device_id, now.expires_s) == (1_000, "dev", 3_000.0 + students.VALID_S)


def test_a_release_that_is_offered_again_gets_a_new_version(bench: Bench, tmp_path: Path) -> None:
    """A device goes from the first release to the second and back: each time the base student's version is higher."""
    slot = device(tmp_path, bench.signer.public_key, 1_000.0)
    first, second = bench.offer, replace(bench.offer, release_hash="second")
    for offer in (first, second):
        folder = tmp_path / offer.release_hash
        folder.mkdir()
        for name in ("audio_encoder.onnx", students.HEADS_FILE):
            (folder / name).write_text(f"of {offer.release_hash}")
        students.publish_base(bench.shelf, bench.signer, offer, folder, 1_000.0)

    def looked(now_s: float) -> tuple[str, int]:
        manifest = slot.begin(described(bench, "", now_s))
        return manifest.release, manifest.version

    versions = [looked(1_000.0)]
    bench.publish(second)
    versions.append(looked(1_000.0))
    withdraw(bench.database, "second", 1_000.0)
    versions += [looked(1_000.0), looked(1_000.0)]
    assert [release for release, _ in versions] == ["release", "second", "release", "release"]
    assert versions[0][1] < versions[1][1] < versions[2][1] == versions[3][1]
    with pytest.raises(Outdated):
        slot.begin(described(bench, students.base_student_id(second), 1_000.0))


def test_calls_at_once_sign_a_base_student_once(bench: Bench, tmp_path: Path) -> None:
    """A call that read the row before another call signed it returns what that one signed: no version goes back."""
    publish(bench, "base-release", 1_000.0, None)
    bench.publish(bench.offer)
    offered, read_before = bench.catalogue.offered("dev"), rows.get(bench.database, "base-release")
    assert read_before is not None
    faster = described(bench, "", 3_000.0)
    assert manifest_from_bytes(faster.manifest_bytes).version == 3_000
    assert students.describe(bench.shelf, bench.signer, offered, read_before, 2_000.0) == faster
    stored = rows.get(bench.database, "base-release")
    assert stored is not None and stored.signed == faster


def test_an_offer_that_changed_meanwhile_signs_nothing(bench: Bench) -> None:
    publish(bench, "base-release", 1_000.0, None)
    bench.publish(bench.offer)
    offered, before = bench.catalogue.offered("dev"), rows.get(bench.database, "base-release")
    assert before is not None
    bench.publish(bench.offer)
    with pytest.raises(Busy, match="has just changed; try again"):
        students.describe(bench.shelf, bench.signer, offered, before, 2_000.0)
    assert rows.get(bench.database, "base-release") == before
    rows.remove(bench.database, "base-release")
    with pytest.raises(NotYours):
        students.describe(bench.shelf, bench.signer, offered, before, 2_000.0)


def test_two_servers_that_publish_one_base_student_at_once_keep_its_files(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    for name in ("audio_encoder.onnx", students.HEADS_FILE):
        (folder / name).write_text(name)
    put = rows.put

    def after_another(*args: Any) -> None:
        put(*args)
        raise IntegrityError("INSERT", {}, Exception("the other server's row is there"))

    monkeypatch.setattr(rows, "put", after_another)
    student_id = students.publish_base(bench.shelf, bench.signer, bench.offer, folder, 1_000.0)
    known = rows.get(bench.database, student_id)
    assert known is not None and known.heads_sha256 is not None
    bench.shelf.check(student_id, students.HEADS_FILE, known.heads_sha256)
    assert students.check_fetch(bench.shelf, "dev", student_id, "audio_encoder.onnx", 0).size_bytes
