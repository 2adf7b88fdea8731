"""AllDistill students of a release, and the base student that every new device gets."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from isthmus.data.files import replaced
from isthmus.distill.models.heads import HeadBank
from isthmus.distill.release import Release, save_weights
from isthmus.distill.selection import Selection
from isthmus.distill.student.export import export_student
from isthmus.distill.student.int8 import quantise_student, write_measure
from isthmus.distill.student.measure import measure_public
from isthmus.distill.student.person_model import fit_person_model
from isthmus.distill.student.personalise import all_distill, train_heads
from isthmus.distill.training.loop import OnEpoch, ignore_epochs
from isthmus.distill.training.teacher_cache import encode_clips


def make_student(
    release: Release,
    seed: int,
    device: torch.device,
    on_epoch: OnEpoch = ignore_epochs,
    weights: Path | None = None,
) -> None:
    """Train the AllDistill student of ``seed``, unless it exists. Resumes after a kill.

    >>> make_student(release, 1, CPU)
    >>> release.student_path(1).is_file()
    True
    """
    path = release.student_path(seed)
    if path.exists():
        return
    checkpoint = path.with_name(f"{seed}.checkpoint.safetensors")
    student = all_distill(release, seed=seed, checkpoint=checkpoint, weights=weights, device=device, on_epoch=on_epoch)
    save_weights(student, path)
    checkpoint.unlink(missing_ok=True)


def base_heads(release: Release, seed: int, device: torch.device, on_epoch: OnEpoch = ignore_epochs) -> HeadBank:
    """Return the heads of the AllDistill student of ``seed`` on all public clips: trained once, then read from the
    release.
    """
    path = release.heads_path(seed)
    if not path.exists():
        everything = Selection.whole(len(release.public.names))
        heads = train_heads(release, release.student(seed), everything, seed=seed, on_epoch=on_epoch, device=device)
        with replaced(path) as part:
            heads.save(part)
    return HeadBank.load(path)


def make_base(release: Release, device: torch.device, on_epoch: OnEpoch = ignore_epochs) -> None:
    """Train heads of the seed-0 student on all public clips, fit its person model, and export its ONNX files: a new
    device's first student.

    The folder appears whole or not at all. If it exists, nothing is done.

    >>> make_base(release, CPU)  # nothing happens: this release has its base student
    >>> sorted(path.name for path in release.base_dir.glob("*.onnx"))
    ['audio_encoder.onnx', 'teacher_head.onnx', 'visual_encoder.onnx']
    """
    if release.base_dir.exists():
        return
    heads = base_heads(release, 0, device, on_epoch)
    part = release.base_dir.with_name("base.part")
    student = release.student(0)
    export_student(release, student, heads, part)
    everything = Selection.whole(len(release.public.names))
    encoded = encode_clips(student, release.public, device)
    person = fit_person_model(release, student, device, encoded)
    if person is not None:
        (part / "person.pb").write_bytes(person)
    measured = measure_public(release, student, heads, everything, device, encoded)
    if release.recipe.student_precision == "int8":
        made, in_int8 = quantise_student(release, part, heads, everything, person)
        write_measure(made, part)
        measured = in_int8 or measured
    (part / "measured.json").write_text(json.dumps(asdict(measured)))
    part.replace(release.base_dir)
