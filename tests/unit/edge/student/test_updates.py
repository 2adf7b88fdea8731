"""The slot under a hostile or a broken cloud: old, expired and foreign manifests, other keys, bad students, kills."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import ModelProto, TensorProto, helper

from isthmus.edge.student import onnx_file, trust
from isthmus.edge.student.onnx_file import check_model
from isthmus.edge.student.slot import StudentSlot
from isthmus.edge.student.trial import Bounds, try_student
from isthmus.edge.student.trust import Outdated, Refused, Unfit
from isthmus.proto.convert_student import key_change_to_bytes, manifest_from_bytes, manifest_to_bytes
from isthmus.proto.errors import Corrupt, InvalidInput, WrongState
from isthmus.proto.messages import KEY_CHANGE_CONTEXT, Chunk, KeyChange, SignedKeyChange, SignedManifest
from tests.rigs.edge.device import load_test

NOW_S = 1_000_000_000.0


class Cloud:
    """Signs students with its present key; a real one does it in cloud/personalise/students.py."""

    def __init__(self, students: Any) -> None:
        self.students = students
        self.key: Ed25519PrivateKey = students.key
        self.changes: tuple[SignedKeyChange, ...] = ()

    def signed(self, student_id: str, seed: int, version: int, **changes: Any) -> SignedManifest:
        plain = self.students.signed(student_id, "final", self.students.files("final", seed))
        manifest = replace(
            manifest_from_bytes(plain.manifest_bytes),
            **{"version": version, "device_id": "dev", "expires_s": NOW_S + 1, "created_s": NOW_S, **changes},
        )
        content = manifest_to_bytes(manifest)
        return SignedManifest(content, self.key.sign(content), self.changes)

    def rotate(self, signer: Ed25519PrivateKey | None = None) -> None:
        following = Ed25519PrivateKey.generate()
        before, after = (key.public_key().public_bytes_raw() for key in (self.key, following))
        change = key_change_to_bytes(KeyChange(before, after, NOW_S))
        framed = KEY_CHANGE_CONTEXT + change
        self.changes += (SignedKeyChange(change, (signer or self.key).sign(framed), following.sign(framed)),)
        self.key = following

    def install(self, slot: StudentSlot, signed: SignedManifest, seed: int) -> str:
        manifest = slot.begin(signed)
        files = self.students.files("final", seed)
        for file, offset in slot.missing(manifest):
            slot.receive(manifest, file, [Chunk(offset, files[file.name][offset:], 0)])
        slot.verify(manifest.student_id)
        slot.activate(manifest.student_id)
        return manifest.student_id


@pytest.fixture
def cloud(students: Any) -> Cloud:
    return Cloud(students)


def opened(folder: Path, students: Any, load: Any = load_test) -> StudentSlot:
    return StudentSlot(folder, students.public_key, load, device_id="dev", clock=lambda: NOW_S)


def in_use(slot: StudentSlot) -> str:
    current = slot.current()
    assert current is not None
    return current.manifest.student_id


@pytest.fixture
def slot(students: Any, tmp_path: Path) -> StudentSlot:
    return opened(tmp_path, students)


def test_an_older_signed_student_is_refused_after_a_restart_too(
    slot: StudentSlot, cloud: Cloud, students: Any, tmp_path: Path
) -> None:
    first = cloud.signed("first", 1, 10)
    cloud.install(slot, first, 1)
    cloud.install(slot, cloud.signed("second", 2, 11), 2)
    for each in (slot, opened(tmp_path, students)):
        with pytest.raises(Outdated, match="version 10, and this device has accepted version 11"):
            each.begin(first)
        with pytest.raises(Outdated):
            each.check_newest("first")
        each.check_newest("second")
        assert each.begin(first, again=True).student_id == "first", "to repair it"
        each.prune(())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"expires_s": NOW_S - 1}, "expired"), ({"device_id": "other"}, "another device"), ({"version": 0}, "no version")],
)
def test_a_frozen_or_foreign_manifest_is_refused(
    slot: StudentSlot, cloud: Cloud, changes: dict[str, Any], reason: str
) -> None:
    cloud.install(slot, cloud.signed("first", 1, 10), 1)
    with pytest.raises(Outdated, match=reason):
        slot.begin(cloud.signed("second", 2, **{"version": 11, **changes}))
    assert in_use(slot) == "first"


def test_the_key_rotates_and_the_student_in_use_stays(
    slot: StudentSlot, cloud: Cloud, students: Any, tmp_path: Path
) -> None:
    stolen = cloud.key
    cloud.install(slot, cloud.signed("first", 1, 10), 1)
    cloud.rotate()
    cloud.rotate()
    cloud.install(slot, cloud.signed("second", 2, 11), 2)
    again = opened(tmp_path, students)
    assert in_use(again) == "second"
    again.rollback()
    assert in_use(again) == "first", "installed students verify by the key that signed them"
    content = cloud.signed("third", 3, 12).manifest_bytes
    with pytest.raises(Corrupt, match=r"signature does not match.*enrol --again"):
        again.begin(SignedManifest(content, stolen.sign(content), cloud.changes))


def test_a_new_key_that_the_old_one_has_not_signed_is_refused(slot: StudentSlot, cloud: Cloud) -> None:
    cloud.rotate(signer=Ed25519PrivateKey.generate())
    with pytest.raises(Corrupt, match="without the signature of the key before"):
        slot.begin(cloud.signed("first", 1, 10))


def test_a_file_that_does_not_end_is_cut_off_at_its_size(slot: StudentSlot, cloud: Cloud) -> None:
    manifest = slot.begin(cloud.signed("first", 1, 10))
    file, _ = slot.missing(manifest)[0]
    taken = 0

    def endless() -> Iterator[Chunk]:
        nonlocal taken
        while True:
            yield Chunk(taken, bytes(100), 0)
            taken += 100

    with pytest.raises(Corrupt, match="more bytes than the manifest's"):
        slot.receive(manifest, file, endless())
    assert taken <= file.size_bytes


def refusing(final: bool) -> Any:
    def load(folder: Path, manifest: Any) -> None:
        if manifest.student_id != "first":
            raise Unfit("it does not run", final=final)

    return load


def test_a_refused_student_is_not_fetched_again_under_any_name(cloud: Cloud, students: Any, tmp_path: Path) -> None:
    slot = opened(tmp_path, students, refusing(final=True))
    cloud.install(slot, cloud.signed("first", 1, 10), 1)
    with pytest.raises(Unfit):
        cloud.install(slot, cloud.signed("second", 2, 11), 2)
    for each in (slot, opened(tmp_path, students)):
        with pytest.raises(Refused, match="refused it before: it does not run"):
            each.begin(cloud.signed("third", 2, 12))
    assert in_use(slot) == "first"


def test_a_trial_that_ran_out_of_time_is_repeated(cloud: Cloud, students: Any, tmp_path: Path) -> None:
    slot = opened(tmp_path, students, refusing(final=False))
    cloud.install(slot, cloud.signed("first", 1, 10), 1)
    for _ in range(trust.TRIES):
        with pytest.raises(Unfit):
            cloud.install(slot, cloud.signed("second", 2, 11), 2)
    with pytest.raises(Refused):
        slot.begin(cloud.signed("second", 2, 11))


def test_a_student_that_ends_the_process_is_rolled_back_within_three_starts(
    slot: StudentSlot, cloud: Cloud, students: Any, tmp_path: Path
) -> None:
    for student_id, seed in (("first", 1), ("second", 2)):
        cloud.install(slot, cloud.signed(student_id, seed, 10 + seed), seed)
    for _ in range(2):
        opened(tmp_path, students).started("second")  # and the process dies
    third = opened(tmp_path, students)
    with pytest.raises(Refused, match="ended 2 times while this student was new"):
        third.started("second")
    assert third.withdraw("second", ()) == "first"
    assert in_use(opened(tmp_path, students)) == "first"
    with pytest.raises(Refused):
        third.begin(cloud.signed("second", 2, 12))
    with pytest.raises(WrongState, match="no previous student"):
        third.rollback()


def test_starts_that_end_properly_do_not_count(slot: StudentSlot, cloud: Cloud, students: Any, tmp_path: Path) -> None:
    cloud.install(slot, cloud.signed("first", 1, 10), 1)
    for _ in range(5):
        slot = opened(tmp_path, students)
        slot.started("first")
        slot.started("first")
        slot.ended()
    assert slot.trial_of("first") == (0, trust.GOOD_AFTER)
    for _ in range(trust.GOOD_AFTER):
        slot.answered("first", 1.0)
    assert opened(tmp_path, students).trial_of("first") is None


def test_a_slow_student_is_given_up(slot: StudentSlot, cloud: Cloud, students: Any, tmp_path: Path) -> None:
    cloud.install(slot, cloud.signed("first", 1, 10), 1)
    for _ in range(trust.GOOD_AFTER):
        slot.answered("first", 10.0)
    cloud.install(slot, cloud.signed("second", 2, 11), 2)
    for _ in range(trust.JUDGED_AFTER - 1):
        slot.answered("second", 90.0)
    with pytest.raises(Refused, match="90 ms per clip, and the student before took 10 ms"):
        slot.answered("second", 90.0)
    assert slot.withdraw("second", ()) == "first"


def test_without_another_sound_student_the_one_in_use_stays(slot: StudentSlot, cloud: Cloud, tmp_path: Path) -> None:
    cloud.install(slot, cloud.signed("first", 1, 10), 1)
    assert slot.withdraw("first", ("", "gone")) == ""
    assert in_use(slot) == "first"


def test_an_empty_staging_folder_does_not_hide_a_sound_student(slot: StudentSlot, cloud: Cloud, tmp_path: Path) -> None:
    cloud.install(slot, cloud.signed("first", 1, 10), 1)
    (tmp_path / "staging" / "first").mkdir()  # as a power loss may leave it
    assert slot.verify("first").folder == tmp_path / "versions" / "first"
    assert not (tmp_path / "staging" / "first").exists()


def test_a_damaged_record_of_trust_is_named(slot: StudentSlot, cloud: Cloud, students: Any, tmp_path: Path) -> None:
    cloud.install(slot, cloud.signed("first", 1, 10), 1)
    record = tmp_path / "trust.json"
    assert record.stat().st_mode & 0o777 == 0o600
    record.write_bytes(record.read_bytes().replace(b'"own_version": 10', b'"own_version": 11'))
    with pytest.raises(Corrupt, match=r"trust\.json cannot be read; move it away"):
        opened(tmp_path, students)


def altered(students: Any, change: Any) -> dict[str, bytes]:
    files: dict[str, bytes] = students.files("final", 2)
    model = ModelProto.FromString(files["local_head.onnx"])
    change(model)
    return files | {"local_head.onnx": model.SerializeToString()}


def lying_dimensions(model: ModelProto) -> None:
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.extend([1 << 40, 1 << 20])


def sparse_bomb(model: ModelProto) -> None:
    weight = model.graph.initializer[0]
    values = helper.make_tensor(weight.name, TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("indices", TensorProto.INT64, [1], [3])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [1 << 16, 1 << 20]))
    del model.graph.initializer[0]


@pytest.mark.parametrize("bomb", [lying_dimensions, sparse_bomb])
def test_a_small_file_that_unfolds_to_a_huge_one_is_refused(students: Any, tmp_path: Path, bomb: Any) -> None:
    files = altered(students, bomb)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    manifest = manifest_from_bytes(students.signed("bomb", "final", files).manifest_bytes)
    with pytest.raises(Unfit, match="refused"):
        try_student(tmp_path, manifest, Bounds(wall_s=60.0))


def test_a_model_of_too_many_parts_is_refused_without_reading_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "MOST_FIELDS", 1_000)
    model = ModelProto()
    for _ in range(400):
        model.graph.node.add(op_type="Identity", input=["a"], output=["b"])
    with pytest.raises(InvalidInput, match="more than 1000 parts"):
        check_model(memoryview(model.SerializeToString()))
