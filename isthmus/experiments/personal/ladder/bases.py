"""The base student of each fold, as features of all clips: made once, kept as files, so that methods take seconds.

Axes: M modalities (sound, picture), N clips, W width of a trunk, D feature width, C classes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isthmus.data.cache.keys import digest
from isthmus.data.cache.read import ClipArrays
from isthmus.data.files import replaced
from isthmus.data.groups import Groups
from isthmus.data.transforms import evaluation_frames
from isthmus.distill.models import pretrained
from isthmus.distill.models.pretrained import PretrainedTrunk
from isthmus.distill.recipes import Recipe
from isthmus.distill.release import Release
from isthmus.distill.selection import Selection
from isthmus.distill.student.base import base_heads
from isthmus.distill.student.evaluate import StudentOutputs, bank_probabilities
from isthmus.distill.student.personalise import train_heads
from isthmus.distill.teacher.on_trunks import fit_necks_and_head
from isthmus.distill.training.teacher_cache import encode_clips, evaluation_mean, head_probabilities
from isthmus.experiments.personal.ladder.person import HEADS, Integers, Person
from isthmus.proto.messages import Captured, FloatArray

_BATCH = 16


@dataclass(frozen=True, eq=False)
class Base:
    """One fold's student: features and answers of every clip. ``public_N`` are the rows it was made from."""

    fold: str
    clips: ClipArrays
    public_N: Integers
    features_MND: FloatArray
    raw: Mapping[str, Mapping[Captured, FloatArray]]

    def person(self, name: str, rows_N: Integers) -> Person:
        """Return a person's clips, given their rows."""
        names = tuple(self.clips.names[row] for row in rows_N)
        parts = [each.split("_") for each in names]
        named = all(len(each) == 4 for each in parts)  # CREMA-D's names; the sentence's last digit is the repetition
        return Person(
            name,
            self.fold,
            names,
            np.asarray(self.clips.labels_N)[rows_N],
            self.features_MND[:, rows_N],
            {head: {mask: rows[rows_N] for mask, rows in of.items()} for head, of in self.raw.items()},
            tuple(each[1][:2] if named else "" for each in parts),
            tuple(("normal" if each[3] == "NO" else "other") if named else "" for each in parts),
        )


def trunk_rows(
    clips: ClipArrays, trunks: Sequence[PretrainedTrunk], files: Sequence[Path], path: Path
) -> tuple[FloatArray, FloatArray]:
    """Return the trunks' features of every clip (N, W) for sound and picture, from ``path`` if they are there.

    The trunks never change, so one pass serves every fold and seed.
    """
    key = "-".join((clips.content_hash, *(trunk.sha256 for trunk in trunks)))
    if path.exists():
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["key"]) == key:
                return arrays["sound_NW"], arrays["picture_NW"]
    sound, picture = (pretrained.build(trunk) for trunk in trunks)
    for module, trunk, file in zip((sound, picture), trunks, files, strict=True):
        pretrained.load(module, trunk, file)
    sounds, pictures = [], []
    with torch.inference_mode():
        for first in range(0, len(clips), _BATCH):
            rows = range(first, min(first + _BATCH, len(clips)))
            mel_B1FT = torch.from_numpy(np.array(clips.spectrograms_NFT[first : rows.stop], np.float32)).unsqueeze(1)
            sounds.append(sound(mel_B1FT).numpy())
            for row in rows:
                frames_KCHW = torch.from_numpy(evaluation_frames(clips.frames_NKHWC[row], clips.spec))
                pictures.append(picture(frames_KCHW).mean(dim=0).numpy())
    sound_NW, picture_NW = np.concatenate(sounds), np.stack(pictures)
    with replaced(path) as part, part.open("wb") as written:
        np.savez(written, key=key, sound_NW=sound_NW, picture_NW=picture_NW)
    return sound_NW, picture_NW


def key(clips: ClipArrays, public_N: Integers, recipe: Recipe) -> str:
    """Return what a base is made of, for the names of its files: another data set or preset has files of its own."""
    return digest([*clips.identity, ",".join(map(str, public_N)), recipe.to_json()])[:12]


def on_trunks(
    folder: Path,
    recipe: Recipe,
    clips: ClipArrays,
    public_N: Integers,
    rows_MNW: tuple[FloatArray, FloatArray],
    seed: int,
) -> Base:
    """Return the base of a release on pretrained trunks, fitted on the public rows, from ``folder`` if it is there."""
    path = folder / f"base-{seed}-{key(clips, public_N, recipe)}.npz"
    if not path.exists():
        recipe = dataclasses.replace(recipe, ratios=(1.0,))
        release = Release(folder, recipe)
        vars(release)["public"] = clips.subset(public_N)
        teacher = vars(release)["teacher"] = release.new_teacher()
        fit_necks_and_head(release, teacher, tuple(rows_NW[public_N] for rows_NW in rows_MNW), seed)  # type: ignore[arg-type]
        teacher.eval()
        with torch.inference_mode():
            audio_ND = teacher.encoders.audio_encoder.neck(torch.from_numpy(rows_MNW[0])).numpy()
            visual_ND = teacher.encoders.visual_encoder.neck(torch.from_numpy(rows_MNW[1])).numpy()
        visual_NKD = np.repeat(visual_ND[public_N][:, np.newaxis], recipe.input.frames_used, axis=1)
        everything = Selection.whole(len(public_N))
        bank = train_heads(
            release, teacher.encoders, everything, seed=seed, device=torch.device("cpu"),
            encoded=(audio_ND[public_N], visual_NKD),
        )  # fmt: skip
        outputs = StudentOutputs(audio_ND, visual_ND, head_probabilities(teacher.head, audio_ND, visual_ND))
        _save(path, outputs, _answers(teacher.head, outputs), {
            mask: bank_probabilities(bank, outputs, 1.0, mask) for mask in Captured
        })  # fmt: skip
    return _open(path, folder.name, clips, public_N)


def kept(folder: Path, recipe: Recipe, clips: ClipArrays, public_N: Integers, seed: int) -> Base:
    """Read the base that ``on_trunks`` left in ``folder``. Raises OSError if there is none."""
    return _open(folder / f"base-{seed}-{key(clips, public_N, recipe)}.npz", folder.name, clips, public_N)


def of_release(release: Release, clips: ClipArrays, public_N: Integers, seed: int, device: torch.device) -> Base:
    """Return the base of a trained release's student of ``seed``: its features of all clips."""
    path = release.root / "ladder" / f"base-{seed}-{key(clips, public_N, release.recipe)}.npz"
    if not path.exists():
        audio_ND, visual_NKD = encode_clips(release.student(seed), clips, device)
        visual_ND = evaluation_mean(visual_NKD, clips)
        bank = base_heads(release, seed, device)
        outputs = StudentOutputs(audio_ND, visual_ND, head_probabilities(release.teacher_head, audio_ND, visual_ND))
        own = {mask: bank_probabilities(bank, outputs, 1.0, mask) for mask in Captured}
        _save(path, outputs, _answers(release.teacher_head, outputs), own)
    return _open(path, release.root.parent.name, clips, public_N)


def _answers(head: torch.nn.Module, outputs: StudentOutputs) -> dict[Captured, FloatArray]:
    return {mask: head_probabilities(head, outputs.audio_ND, outputs.visual_ND, mask) for mask in Captured}  # type: ignore[arg-type]


def _save(
    path: Path, outputs: StudentOutputs, teachers: Mapping[Captured, FloatArray], own: Mapping[Captured, FloatArray]
) -> None:
    arrays: dict[str, Any] = {
        f"raw_{number}_{mask.value}": rows for number, of in enumerate((teachers, own)) for mask, rows in of.items()
    }
    with replaced(path) as part, part.open("wb") as file:
        np.savez(file, features_MND=np.stack([outputs.audio_ND, outputs.visual_ND]), **arrays)


def _open(path: Path, fold: str, clips: ClipArrays, public_N: Integers) -> Base:
    with np.load(path, allow_pickle=False) as arrays:
        raw = {
            head: {mask: arrays[f"raw_{number}_{mask.value}"] for mask in Captured} for number, head in enumerate(HEADS)
        }
        return Base(fold, clips, public_N, arrays["features_MND"], raw)


def rows_of(clips: ClipArrays, groups: Groups, left_out: Sequence[str]) -> tuple[Integers, dict[str, Integers]]:
    """Return the public rows and, per person left out, the rows of at most one clip per recording and picture.

    No public clip shares a recording or a picture with a clip of a person left out.
    """
    rows_of_person: dict[str, Integers] = {}
    for person in left_out:
        own = [name for name, actor in zip(clips.names, clips.actors, strict=True) if actor == person]
        rows_of_person[person] = clips.indices(groups.distinct(own))
    kept = {clips.names[row] for rows_N in rows_of_person.values() for row in rows_N}
    public = [
        row
        for row, (name, actor) in enumerate(zip(clips.names, clips.actors, strict=True))
        if actor not in left_out and not groups.share(name, kept)
    ]
    return np.array(public, np.int64), rows_of_person
