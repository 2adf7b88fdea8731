"""The learning steps of a job, performed by ``isthmus.distill``. Importing this module imports torch."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import torch

from isthmus.cloud.personalise.learning import OnEpoch, RoundWork
from isthmus.cloud.personalise.patching import patch_student
from isthmus.cloud.personalise.students import MEASURED_FILE, PERSON_FILE
from isthmus.data.files import replaced, write_atomically
from isthmus.distill.models.heads import HeadBank
from isthmus.distill.release import Release
from isthmus.distill.selection import Selection, Wanted
from isthmus.distill.student import personalise
from isthmus.distill.student.export import ENCODERS, export_student
from isthmus.distill.student.int8 import quantise_student, read_measure, write_measure
from isthmus.distill.student.measure import measure_public
from isthmus.distill.student.person_model import fit_person_model
from isthmus.distill.training.loop import pick_device
from isthmus.distill.training.teacher_cache import encode_clips
from isthmus.proto.messages import FloatArray, Prototypes, ratio_name

log = logging.getLogger(__name__)


def wanted_by(prototypes: Prototypes) -> Wanted:
    """Return an upload as what selection takes."""
    return Wanted(prototypes.values_KC, prototypes.sizes_K, prototypes.features_KE)


class DistillLearning:
    """Learning on a release. Each step reads the student from the checkpoint and shares no memory with another."""

    def __init__(self, release: Release) -> None:
        self._release = release
        self._in_int8 = release.recipe.student_precision == "int8"

    def select(self, prototypes: Prototypes, *, round: int, seed: int) -> Selection:
        return personalise.select_round(self._release, wanted_by(prototypes), round=round, seed=seed)

    def per_class(self, selection: Selection) -> tuple[int, ...]:
        labels_S = self._release.public.labels_N[selection.indices_S]
        return tuple(int(n) for n in np.bincount(labels_S[labels_S >= 0], minlength=len(self._release.recipe.classes)))

    def distil(self, work: RoundWork, on_epoch: OnEpoch) -> None:
        self._student(work, on_epoch)

    def train_heads(self, work: RoundWork, heads: Path, on_epoch: OnEpoch) -> None:
        student, device = self._student(work), pick_device()
        encoded = encode_clips(student, self._release.public, device)
        bank = personalise.train_heads(
            self._release,
            student,
            work.selection,
            seed=work.seed,
            on_epoch=lambda report: on_epoch(report.epoch, report.epochs),
            device=device,
            encoded=encoded,
        )
        person = fit_person_model(self._release, student, device, encoded)
        if person is not None:
            write_atomically(heads.with_name(PERSON_FILE), person)
        measured = measure_public(self._release, student, bank, work.selection, device, encoded)
        if self._in_int8:
            # 'export' may happen later, and elsewhere, so the encoders are kept.
            with TemporaryDirectory() as folder:
                export_student(self._release, student, bank, Path(folder))
                made, of_int8 = quantise_student(self._release, Path(folder), bank, work.selection, person)
                for name in ENCODERS if made.used else ():
                    write_atomically(heads.with_name(f"int8.{name}"), (Path(folder) / name).read_bytes())
            write_measure(made, heads.parent)
            measured = of_int8 or measured
        write_atomically(heads.with_name(MEASURED_FILE), json.dumps(asdict(measured)))
        with replaced(heads) as part:
            bank.save(part)

    def export(self, work: RoundWork, heads: Path | None, out_dir: Path) -> list[Path]:
        bank = HeadBank.load(heads) if heads is not None else None
        files = export_student(self._release, self._student(work), bank, out_dir)
        if self._in_int8:
            self._quantise(work, bank, heads, out_dir)

        @torch.inference_mode()
        def classify(name: str, outputs: Sequence[FloatArray]) -> npt.NDArray[np.int64]:
            assert bank is not None  # Only a student with heads has compressors.
            ratio = next(ratio for ratio in bank.ratios if name == f"compressor_r{ratio_name(ratio)}.onnx")
            classes_N: npt.NDArray[np.int64] = (
                bank[ratio].classify(*map(torch.from_numpy, outputs)).argmax(dim=1).numpy()
            )
            return classes_N

        selected = self._release.public.subset(np.sort(work.selection.indices_S))
        return patch_student(files, self._release.base_dir, selected, classify=classify)

    def _quantise(self, work: RoundWork, bank: HeadBank | None, heads: Path | None, out_dir: Path) -> None:
        """Replace the encoders in ``out_dir`` by int8 ones, unless these answer worse."""
        made = None if heads is None else read_measure(heads.parent)
        if made is None:  # An interim student, or heads that an earlier version trained.
            person = heads.with_name(PERSON_FILE) if heads is not None else None
            known = person.read_bytes() if person is not None and person.is_file() else None
            made, _ = quantise_student(self._release, out_dir, bank, work.selection, known)
        elif heads is not None and made.used:
            for name in ENCODERS:
                write_atomically(out_dir / name, heads.with_name(f"int8.{name}").read_bytes())
        log.log(logging.INFO if made.used else logging.WARNING, "%s", made)

    def _student(self, work: RoundWork, on_epoch: OnEpoch = lambda epoch, epochs: None) -> personalise.StudentEncoders:
        return personalise.distil_round(
            self._release,
            work.selection,
            round=work.round,
            rounds=work.rounds,
            seed=work.seed,
            checkpoint=work.checkpoint,
            on_epoch=lambda report: on_epoch(report.epoch, report.epochs),
        )
