"""Damage to every file of both state folders: empty, half, single random bits, and a folder in the file's place.

Right is a refusal in one line that names the file and the way out, or the answer of a sound student. The copies are on
loopback and in a temporary folder; nothing is timed.
"""

import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.bench.harness import Report
from tests.conftest import TinyStudents
from tests.rigs.cloud.damage import CloudFolder, swept
from tests.rigs.cloud.service import Rig, make_tiny_release
from tests.rigs.edge.damage import DeviceFolder, sweep


def main(
    bits: Annotated[int, typer.Option(help="Random bits to flip in each file of a device, one at a time.")] = 50,
    cloud_bits: Annotated[int, typer.Option(help="Random bits to flip in each file of a cloud.")] = 50,
    only: Annotated[str, typer.Option(help="Beginnings of the cloud's files to take, with commas; empty: all.")] = "",
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Count the outcomes per file, and list every fault."""
    report = Report("damage", {"bits": bits, "cloud_bits": cloud_bits, "only": only}, ("grpcio", "onnxruntime"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        students = TinyStudents(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
        device = DeviceFolder(folder / "device", students.cloud(), students.public_key)
        _add(report, "device", sweep(device.root, folder / "copies", bits, device.use))
        make_tiny_release(folder / "release")
        cloud = CloudFolder(Rig(folder / "release", folder / "cloud"))
        chosen = tuple(each for each in only.split(",") if each)
        _add(report, "cloud", swept(cloud, folder / "copies", cloud_bits, chosen))
    report.finish(
        {
            "folder": lambda row: str(row["folder"]),
            "file": lambda row: str(row["file"]),
            "tried": lambda row: str(row["tried"]),
            "faults": lambda row: str(row["faults"]),
            "outcomes": lambda row: ", ".join(f"{count} {what}" for what, count in sorted(row["outcomes"].items())),
        },
        out,
    )


def _add(report: Report, folder: str, outcomes: dict[str, Counter[str]]) -> None:
    for file, seen in outcomes.items():
        faults = sum(count for what, count in seen.items() if "FAULT" in what)
        report.rows.append(
            {"folder": folder, "file": file, "tried": seen.total(), "faults": faults, "outcomes": dict(seen)}
        )


if __name__ == "__main__":
    typer.run(main)
