"""PURE. What a device trusts of its cloud's students: keys, versions, what was refused, and what is still on trial.

A manifest from the cloud is accepted as The Update Framework accepts its metadata (TUF specification 1.0, sections 5.3
to 5.6), with one key in place of its roles:

- The key changes only by a statement that the key before has signed (``after_changes``), so it can be exchanged without
  enrolling again, and a retired key signs nothing that is new.
- A student that was not accepted before must have a higher version than all that were (``accepted``): no rollback.
- A manifest that has expired is refused: no freeze. Time never runs backwards here: a clock that was set back counts as
  the newest time of signing that was seen.
- A manifest names its device, its files and their hashes: no mix of two students, or of two devices.

A student whose bytes were refused once is not fetched again (``refused_for``). A new student is on trial until it has
answered ``GOOD_AFTER`` clips (``started``, ``answered``): if it ends the process or is too slow, it is given up.
"""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Final

import numpy as np

from isthmus.proto.convert_student import key_change_from_bytes
from isthmus.proto.errors import Corrupt, InvalidInput
from isthmus.proto.messages import KEY_CHANGE_CONTEXT, SignedKeyChange, StudentManifest

GOOD_AFTER: Final = 20
"""Clips that a new student must answer until it counts as good."""

MOST_STARTS: Final = 2
"""Uses of a student on trial that may end without a proper end. Before the next one it is given up."""

TRIES: Final = 3
"""Trial runs that may fail for reasons that a busy machine can have, until the student is refused."""

SLOWER: Final = 3.0
"""A student that takes this many times the processor time of the good one before is too slow,"""
SLOWER_BY_MS: Final = 20.0
"""if it also takes so much more."""
JUDGED_AFTER: Final = 5
"""Answers of a student from which its time is judged."""

_MOST_KEYS: Final = 1_024
_MOST_REMEMBERED: Final = 64
_MOST_TIMES: Final = 32

Verify = Callable[[bytes, bytes, bytes], bool]
"""(public key, signature, content) -> whether the signature is the key's."""


class Unfit(InvalidInput):
    """A student that is what the cloud signed, but that this device does not use.

    ``final``: its bytes alone are the reason. Otherwise a busy machine may be, and it may be tried again.
    """

    def __init__(self, message: str, *, final: bool = True) -> None:
        super().__init__(message)
        self.final = final


class Refused(InvalidInput):
    """A student that this device has refused or given up before; its bytes are not fetched or used again."""


class Outdated(InvalidInput):
    """A signed manifest that is older than what the device has accepted, or has expired, or is for another device."""


@dataclass(frozen=True)
class Refusal:
    """Why a student was refused. ``tries``: it is final at ``TRIES``."""

    digest: str
    reason: str
    tries: int = TRIES


@dataclass(frozen=True)
class Trial:
    """A student in use that is not known to be good: clips answered, and uses that have not ended properly."""

    student_id: str
    answered: int = 0
    starts: int = 0


@dataclass(frozen=True)
class Times:
    """Milliseconds of processor time that a student took to encode each of its last clips."""

    student_id: str
    cpu_ms: tuple[float, ...] = ()


@dataclass(frozen=True)
class Trust:
    """Everything that a device remembers of its cloud's students.

    ``keys``: the key pinned at enrolment and those that followed it; only the last one signs what is fetched.
    ``base_version``, ``own_version``: the highest accepted. ``signed_s``: the newest time at which an accepted manifest
    was made. ``accepted``: digests of accepted students, newest last, and ``newest`` those of the two versions.
    """

    keys: tuple[bytes, ...]
    device_id: str = ""
    base_version: int = 0
    own_version: int = 0
    signed_s: float = 0.0
    accepted: tuple[str, ...] = ()
    newest: tuple[str, str] = ("", "")
    refusals: tuple[Refusal, ...] = ()
    good: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = ()
    times: tuple[Times, ...] = ()


def digest_of(manifest: StudentManifest) -> str:
    """Return a digest of a student's bytes: the same for the same files, whatever its id, version and time."""
    facts = (
        manifest.kind,
        sorted((file.name, file.size_bytes, file.sha256.hex()) for file in manifest.files),
        manifest.ratios,
        manifest.classes,
        manifest.input_spec_json,
        manifest.feature_width,
    )
    return sha256(repr(facts).encode()).hexdigest()


def begun(known: Trust | None, pinned: bytes, device_id: str) -> Trust:
    """Return what is trusted at a start. ``pinned``: the key of the enrolment.

    A device that has enrolled again starts over with versions, and with the key of that enrolment; what it refused and
    what was good are about bytes and stay.
    """
    if known is None:
        return Trust((pinned,), device_id)
    keys = known.keys if pinned in known.keys else (pinned,)
    if device_id and known.device_id not in ("", device_id):
        keys = (*(key for key in keys if key != pinned), pinned)
        return Trust(keys, device_id, refusals=known.refusals, good=known.good, trials=known.trials, times=known.times)
    return replace(known, keys=keys, device_id=device_id or known.device_id)


def after_changes(trust: Trust, changes: Iterable[SignedKeyChange], verify: Verify) -> Trust:
    """Follow the changes of the key from the newest known one on.

    Raises Corrupt for a change of that key that it has not signed, or that the next key has not signed, and for a
    change back to an earlier key.
    """
    for signed in changes:
        change = key_change_from_bytes(signed.change_bytes)
        if change.previous_key != trust.keys[-1]:
            continue  # Known already, or of a line of keys that this device has never trusted.
        content = KEY_CHANGE_CONTEXT + signed.change_bytes
        if not (
            verify(change.previous_key, signed.previous_signature, content)
            and verify(change.next_key, signed.next_signature, content)
        ):
            raise Corrupt("the cloud changed its signing key without the signature of the key before")
        if change.next_key in trust.keys:
            raise Corrupt("the cloud changed back to a signing key that it had retired")
        if len(trust.keys) >= _MOST_KEYS:
            raise Corrupt(f"the cloud changed its signing key over {_MOST_KEYS} times")
        trust = replace(trust, keys=(*trust.keys, change.next_key))
    return trust


def accepted(trust: Trust, manifest: StudentManifest, now_s: float, *, again: bool = False) -> Trust:
    """Return the trust after a manifest whose signature is verified. ``now_s``: Unix time by the device's clock.

    ``again``: the device fetches a student that it has accepted before, because it was damaged: then it may be an older
    one. Raises Outdated for an older, expired or another device's student, and Refused for one that was refused before.
    """
    name, digest, own = f"student {manifest.student_id}", digest_of(manifest), bool(manifest.device_id)
    reason = refused_for(trust, digest)
    if reason is not None:
        raise Refused(
            f"{name} is not fetched, because this device has refused it before: {reason}. It goes on when the cloud "
            "offers another one ('isthmus edge run --again')"
        )
    if own and trust.device_id and manifest.device_id != trust.device_id:
        raise Outdated(f"{name} was made for another device ({manifest.device_id}), so it is refused")
    now_s = max(now_s, trust.signed_s)
    if manifest.expires_s and now_s > manifest.expires_s:
        raise Outdated(
            f"the manifest of {name} expired on {_date(manifest.expires_s)}, and today is {_date(now_s)} on this "
            "device: the cloud, or somebody between, sends old answers. If this device's clock is wrong, set it; if "
            "the cloud's was, 'isthmus edge enrol --again' starts over"
        )
    if not (again and digest in trust.accepted):
        _check_version(trust, manifest, digest)
    highest = max(trust.own_version if own else trust.base_version, manifest.version)
    is_newest = manifest.version == highest
    return replace(
        trust,
        base_version=trust.base_version if own else highest,
        own_version=highest if own else trust.own_version,
        newest=(
            digest if is_newest and not own else trust.newest[0],
            digest if is_newest and own else trust.newest[1],
        ),
        signed_s=max(trust.signed_s, manifest.created_s),
        accepted=(*(each for each in trust.accepted if each != digest), digest)[-_MOST_REMEMBERED:],
    )


def check_version(trust: Trust, manifest: StudentManifest) -> None:
    """Raise Outdated for a student that is older than the newest accepted one of its kind."""
    _check_version(trust, manifest, digest_of(manifest))


def _check_version(trust: Trust, manifest: StudentManifest, digest: str) -> None:
    own = bool(manifest.device_id)
    highest, newest = (trust.own_version, trust.newest[1]) if own else (trust.base_version, trust.newest[0])
    if not manifest.version and max(trust.own_version, trust.base_version):
        raise Outdated(
            f"student {manifest.student_id} has no version, although this cloud's students have: it is refused"
        )
    if manifest.version < highest or (highest and manifest.version == highest and digest != newest):
        raise Outdated(
            f"student {manifest.student_id} has version {manifest.version}, and this device has accepted version "
            f"{highest}: older students are refused. If the cloud was set back on purpose, 'isthmus edge enrol "
            "--again' starts over"
        )


def refused_for(trust: Trust, digest: str) -> str | None:
    """Return why the student of this digest must not be fetched or used; None if it may be."""
    found = next((each for each in trust.refusals if each.digest == digest), None)
    return None if found is None or found.tries < TRIES else found.reason


def refused(trust: Trust, manifest: StudentManifest, reason: str, *, final: bool = True) -> Trust:
    """Return the trust after a refusal. One that is not final counts as one of ``TRIES``."""
    digest = digest_of(manifest)
    tries = sum(each.tries for each in trust.refusals if each.digest == digest)
    others = tuple(each for each in trust.refusals if each.digest != digest)
    refusal = Refusal(digest, reason[:300], TRIES if final else min(TRIES, tries + 1))
    return replace(trust, refusals=(*others, refusal)[-_MOST_REMEMBERED:])


def started(trust: Trust, student_id: str) -> tuple[Trust, bool]:
    """Count a use of a student before it begins. Return also whether the student may be used.

    A good student may always be used. One on trial is given up after ``MOST_STARTS`` uses that did not end properly.
    """
    if student_id in trust.good:
        return trust, True
    trial = _trial(trust, student_id)
    if trial.starts >= MOST_STARTS:
        return _with(trust, replace(trial, starts=0)), False
    return _with(trust, replace(trial, starts=trial.starts + 1)), True


def ended(trust: Trust, student_id: str) -> Trust:
    """Return the trust after a use of a student has ended properly: it has not ended the process."""
    found = next((each for each in trust.trials if each.student_id == student_id), None)
    return trust if found is None else _with(trust, replace(found, starts=0))


def answered(trust: Trust, student_id: str, cpu_ms: float) -> tuple[Trust, str]:
    """Count an answer. Return also why the student must be given up, or "".

    ``cpu_ms``: processor time of its encoders for the clip. It is compared with the median of the newest good student.
    """
    known = next((each for each in trust.times if each.student_id == student_id), Times(student_id))
    times = replace(known, cpu_ms=(*known.cpu_ms, cpu_ms)[-_MOST_TIMES:])
    others = tuple(each for each in trust.times if each.student_id != student_id)
    trust = replace(trust, times=(*others, times)[-4:])
    if student_id in trust.good:
        return trust, ""
    usual = next(
        (
            statistics.median(each.cpu_ms)
            for each in reversed(others)
            if each.student_id in trust.good or len(each.cpu_ms) >= JUDGED_AFTER
        ),
        None,
    )
    if usual is not None and len(times.cpu_ms) >= JUDGED_AFTER:
        median_ms = statistics.median(times.cpu_ms)
        if median_ms > SLOWER * usual and median_ms > usual + SLOWER_BY_MS:
            return trust, f"it takes {median_ms:.0f} ms per clip, and the student before took {usual:.0f} ms"
    trial = _trial(trust, student_id)
    trial = replace(trial, answered=trial.answered + 1)
    if trial.answered < GOOD_AFTER:
        return _with(trust, trial), ""
    left = tuple(each for each in trust.trials if each.student_id != student_id)
    return replace(trust, trials=left, good=(*trust.good, student_id)[-_MOST_REMEMBERED:]), ""


def given_up(trust: Trust, manifest: StudentManifest, reason: str) -> Trust:
    """Return the trust after a student on trial was given up: it is refused from now on."""
    student_id = manifest.student_id
    return replace(
        refused(trust, manifest, reason),
        trials=tuple(each for each in trust.trials if each.student_id != student_id),
        times=tuple(each for each in trust.times if each.student_id != student_id),
        good=tuple(each for each in trust.good if each != student_id),
    )


def _trial(trust: Trust, student_id: str) -> Trial:
    return next((each for each in trust.trials if each.student_id == student_id), Trial(student_id))


def _with(trust: Trust, trial: Trial) -> Trust:
    others = tuple(each for each in trust.trials if each.student_id != trial.student_id)
    return replace(trust, trials=(*others, trial)[-_MOST_REMEMBERED:])


def _date(unix_s: float) -> str:
    """Return the day of a time within 100,000 years."""
    return str(np.datetime64(int(min(unix_s, 3e12)), "s"))[:10]
