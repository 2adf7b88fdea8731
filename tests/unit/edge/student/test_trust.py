"""What a device accepts of its cloud: rollback, freeze, mix and wrong keys are refused; bad students are given up."""

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from isthmus.edge.student import trust
from isthmus.edge.student.signed import is_signed
from isthmus.edge.student.trust import Outdated, Refused, Trust
from isthmus.proto.convert_student import key_change_to_bytes
from isthmus.proto.errors import Corrupt
from isthmus.proto.messages import KEY_CHANGE_CONTEXT, KeyChange, SignedKeyChange, StudentFile, StudentManifest

DAY_S = 86_400.0
NOW_S = 1_000 * DAY_S


def manifest(name: str = "s1", version: int = 5, *, device: str = "dev", expires_s: float = 0.0) -> StudentManifest:
    """Return a manifest whose files are those of ``name``."""
    files = (StudentFile("audio_encoder.onnx", 10, name.encode().ljust(32, b"\0")),)
    kind = "final" if device else "base"
    return StudentManifest(
        name, kind, files, (), ("a", "b"), "{}", 4, NOW_S, version=version, expires_s=expires_s, device_id=device
    )


def trusting(*manifests: StudentManifest) -> Trust:
    known = Trust((bytes(32),), "dev")
    for each in manifests:
        known = trust.accepted(known, each, NOW_S)
    return known


def test_a_newer_student_is_accepted_and_an_older_one_refused() -> None:
    known = trusting(manifest("s1", 5), manifest("s2", 6))
    assert known.own_version == 6
    with pytest.raises(Outdated, match=r"version 5, and this device has accepted version 6.*enrol --again"):
        trust.accepted(known, manifest("s1", 5), NOW_S)
    with pytest.raises(Outdated):
        trust.accepted(known, manifest("s3", 6), NOW_S)
    assert trust.accepted(known, manifest("s2", 6), NOW_S) == known, "the same one, described again"


def test_a_damaged_student_is_fetched_again_although_it_is_older() -> None:
    known = trusting(manifest("s1", 5), manifest("s2", 6))
    after = trust.accepted(known, manifest("s1", 5), NOW_S, again=True)
    assert (after.own_version, after.newest) == (6, known.newest)
    with pytest.raises(Outdated):
        trust.accepted(known, manifest("s0", 4), NOW_S, again=True)


def test_base_students_and_own_ones_have_versions_of_their_own() -> None:
    known = trusting(manifest("base", 9, device=""), manifest("s1", 5))
    with pytest.raises(Outdated):
        trust.accepted(known, manifest("older-base", 8, device=""), NOW_S)


def test_an_expired_manifest_is_refused_also_if_the_clock_was_set_back() -> None:
    frozen = manifest("s1", 5, expires_s=NOW_S + 30 * DAY_S)
    assert trusting(frozen).own_version == 5
    with pytest.raises(Outdated, match=r"expired on 1972-10-27.*clock is wrong"):
        trust.accepted(Trust((bytes(32),), "dev"), frozen, NOW_S + 31 * DAY_S)
    seen = replace(trusting(), signed_s=NOW_S + 31 * DAY_S)
    with pytest.raises(Outdated, match="expired"):
        trust.accepted(seen, frozen, 0.0)


def test_another_devices_student_is_refused() -> None:
    with pytest.raises(Outdated, match="made for another device"):
        trust.accepted(trusting(), manifest("s1", 5, device="other"), NOW_S)


def test_a_cloud_of_version_0_1_is_accepted_until_it_has_given_versions() -> None:
    old = manifest("s1", 0, device="")
    assert trusting(old, manifest("s2", 0, device="")).base_version == 0
    with pytest.raises(Outdated, match="has no version"):
        trust.accepted(trusting(manifest("s3", 7)), old, NOW_S)


def test_refused_bytes_are_not_fetched_under_another_name() -> None:
    known = trust.refused(trusting(), manifest("s1"), "it loops")
    renamed = replace(manifest("s1", 99), student_id="other-name", created_s=NOW_S + 1)
    with pytest.raises(Refused, match=r"refused it before: it loops.*run --again"):
        trust.accepted(known, renamed, NOW_S)


def test_a_trial_that_a_busy_machine_may_have_ended_is_tried_three_times() -> None:
    known = trusting()
    for _ in range(trust.TRIES):
        trust.accepted(known, manifest("s1"), NOW_S)
        known = trust.refused(known, manifest("s1"), "it took too long", final=False)
    with pytest.raises(Refused):
        trust.accepted(known, manifest("s1"), NOW_S)


def test_what_is_remembered_is_bounded() -> None:
    known = trusting()
    for number in range(200):
        one = manifest(f"s{number}", 10 + number)
        known = trust.accepted(known, one, NOW_S)
        known, _ = trust.started(trust.refused(known, one, "x" * 5_000), one.student_id)
        known, _ = trust.answered(known, one.student_id, 1.0)
    assert max(len(known.accepted), len(known.refusals), len(known.trials), len(known.times)) <= 64
    assert len(known.refusals[0].reason) <= 300
    with pytest.raises(Refused):
        trust.accepted(known, manifest("s199", 999), NOW_S)


def public(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def change(
    before: Ed25519PrivateKey, after: Ed25519PrivateKey, signed_by: Ed25519PrivateKey | None = None
) -> SignedKeyChange:
    content = key_change_to_bytes(KeyChange(public(before), public(after), NOW_S))
    framed = KEY_CHANGE_CONTEXT + content
    return SignedKeyChange(content, (signed_by or before).sign(framed), after.sign(framed))


KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([number] * 32)) for number in range(4)]


def test_changes_of_the_key_are_followed_from_the_pinned_key_on() -> None:
    steps = [change(KEYS[0], KEYS[1]), change(KEYS[1], KEYS[2]), change(KEYS[2], KEYS[3])]
    for pinned in (0, 1, 3):
        followed = trust.after_changes(Trust((public(KEYS[pinned]),)), steps, is_signed)
        assert followed.keys == tuple(map(public, KEYS[pinned:]))


def test_a_change_without_the_signature_of_the_key_before_is_refused() -> None:
    with pytest.raises(Corrupt, match="without the signature"):
        trust.after_changes(Trust((public(KEYS[0]),)), [change(KEYS[0], KEYS[1], signed_by=KEYS[2])], is_signed)
    unproven = replace(change(KEYS[0], KEYS[1]), next_signature=bytes(64))
    with pytest.raises(Corrupt, match="without the signature"):
        trust.after_changes(Trust((public(KEYS[0]),)), [unproven], is_signed)
    # A signature of a manifest is none of a change, even if the bytes were the same.
    content = key_change_to_bytes(KeyChange(public(KEYS[0]), public(KEYS[1]), NOW_S))
    unframed = SignedKeyChange(content, KEYS[0].sign(content), KEYS[1].sign(content))
    with pytest.raises(Corrupt, match="without the signature"):
        trust.after_changes(Trust((public(KEYS[0]),)), [unframed], is_signed)


def test_a_change_to_a_key_that_anybody_can_sign_with_is_refused() -> None:
    """The neutral element of the curve as a key: one signature fits every content."""
    neutral = b"\1".ljust(32, b"\0")
    content = key_change_to_bytes(KeyChange(public(KEYS[0]), neutral, NOW_S))
    signed = SignedKeyChange(content, KEYS[0].sign(KEY_CHANGE_CONTEXT + content), neutral + bytes(32))
    with pytest.raises(Corrupt, match="without the signature"):
        trust.after_changes(Trust((public(KEYS[0]),)), [signed], is_signed)


def test_a_retired_key_does_not_come_back() -> None:
    with pytest.raises(Corrupt, match="had retired"):
        there_and_back = [change(KEYS[0], KEYS[1]), change(KEYS[1], KEYS[0])]
        trust.after_changes(Trust((public(KEYS[0]),)), there_and_back, is_signed)


def test_a_device_that_enrols_anew_begins_anew_with_versions_alone() -> None:
    known = trust.refused(trusting(manifest("s1", 5)), manifest("bad"), "it loops")
    same = trust.begun(known, bytes(32), "dev")
    assert same == known
    anew = trust.begun(known, bytes(32), "dev-2")
    assert (anew.own_version, anew.device_id, anew.refusals) == (0, "dev-2", known.refusals)
    assert trust.begun(known, b"k" * 32, "dev-2").keys == (b"k" * 32,)
    rotated = replace(known, keys=(bytes(32), b"n" * 32))
    assert trust.begun(rotated, bytes(32), "dev").keys == rotated.keys, "the enrolment still has the first key"
    restored = trust.begun(rotated, bytes(32), "dev-2")  # The cloud was restored from a backup with the first key.
    assert restored.keys == (b"n" * 32, bytes(32))


def test_a_student_is_good_after_enough_answers() -> None:
    known, usable = trust.started(trusting(), "s1")
    assert usable
    for _ in range(trust.GOOD_AFTER):
        assert "s1" not in known.good
        known, reason = trust.answered(known, "s1", 10.0)
        assert not reason
    assert (known.good, known.trials) == (("s1",), ())
    for _ in range(9):
        known, usable = trust.started(known, "s1")
        assert usable, "a good student is never given up for crashes, which have other reasons"


def test_a_student_that_ends_the_process_is_given_up_at_its_third_start() -> None:
    known = trusting()
    for _ in range(2):
        known, usable = trust.started(known, "s1")
        assert usable
        known, _ = trust.answered(known, "s1", 10.0)
    known, usable = trust.started(known, "s1")
    assert not usable


def test_a_proper_end_of_the_process_begins_the_count_anew() -> None:
    known = trusting()
    for _ in range(9):
        known, usable = trust.started(known, "s1")
        assert usable
        known = trust.ended(known, "s1")


@pytest.mark.parametrize(("cpu_ms", "slow"), [(299.0, False), (301.0, True)])
def test_a_student_three_times_slower_than_the_good_one_is_given_up(cpu_ms: float, slow: bool) -> None:
    known = trusting()
    for _ in range(trust.GOOD_AFTER):
        known, _ = trust.answered(known, "s1", 100.0)
    reasons = []
    for _ in range(trust.JUDGED_AFTER):
        known, reason = trust.answered(known, "s2", cpu_ms)
        reasons.append(reason)
    assert not any(reasons[:-1]), "one slow answer proves nothing"
    assert bool(reasons[-1]) is slow
    assert not slow or "301 ms per clip, and the student before took 100 ms" in reasons[-1]


def test_milliseconds_alone_make_no_student_slow() -> None:
    known = trusting()
    for _ in range(trust.GOOD_AFTER):
        known, _ = trust.answered(known, "s1", 0.3)
    for _ in range(trust.JUDGED_AFTER):
        known, reason = trust.answered(known, "s2", 5.0)
        assert not reason


def test_a_student_that_was_given_up_is_no_measure_for_the_next() -> None:
    known = trusting()
    for _ in range(trust.GOOD_AFTER):
        known, _ = trust.answered(known, "s1", 100.0)
    for _ in range(trust.JUDGED_AFTER):
        known, reason = trust.answered(known, "s2", 900.0)
    known = trust.given_up(known, manifest("s2"), reason)
    for _ in range(trust.JUDGED_AFTER):
        known, reason = trust.answered(known, "s3", 900.0)
    assert reason
