"""The file of what a device trusts of its cloud's students."""

from dataclasses import asdict, fields
from pathlib import Path

from isthmus.edge.student.kept import read_kept, unreadable, write_kept
from isthmus.edge.student.trust import Refusal, Times, Trial, Trust
from isthmus.proto.checks import identifier
from isthmus.proto.errors import IsthmusError


def read_trust(path: Path) -> Trust | None:
    """Return what is known, None if there is no file. Raises Corrupt with the way out."""
    raw = read_kept(path)
    if raw is None:
        return None
    try:
        known = {each.name: raw[each.name] for each in fields(Trust)}
        base_digest, own_digest = map(str, raw["newest"])
        found = Trust(
            **{
                **known,
                "keys": tuple(bytes.fromhex(key) for key in raw["keys"]),
                "device_id": identifier("device id", raw["device_id"], optional=True),
                "accepted": tuple(map(str, raw["accepted"])),
                "newest": (base_digest, own_digest),
                "refusals": tuple(Refusal(**each) for each in raw["refusals"]),
                "good": tuple(map(str, raw["good"])),
                "trials": tuple(Trial(**each) for each in raw["trials"]),
                "times": tuple(Times(each["student_id"], tuple(map(float, each["cpu_ms"]))) for each in raw["times"]),
            }
        )
        counts = [
            found.base_version,
            found.own_version,
            *(n for each in found.trials for n in (each.answered, each.starts)),
        ]
        if not found.keys or any(len(key) != 32 for key in found.keys) or any(type(n) is not int for n in counts):
            raise ValueError("keys or counts")
        if not found.signed_s >= 0:
            raise ValueError("time")
    except (AttributeError, IsthmusError, KeyError, TypeError, ValueError) as error:
        raise unreadable(path) from error
    return found


def write_trust(path: Path, known: Trust) -> None:
    """Write what is known. Raises what ``write_atomically`` raises."""
    write_kept(path, {**asdict(known), "keys": [key.hex() for key in known.keys]})
