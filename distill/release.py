"""A release: the folder that holds all a cloud needs to personalise students.

recipe.json                     the whole configuration, and the hash of the data
public/                         the decoded public clips (data/cache/build.py)
teacher/teacher.safetensors     and history.json, loss.png
teacher_outputs/<hash>/         features and probabilities on the public clips, memory-mapped
students/<seed>.safetensors     AllDistill students, one per seed; their heads in <seed>-heads.safetensors
base/                           the student a new device gets: ONNX files, heads.safetensors, measured.json, person.pb
"""

import json
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from safetensors.torch import load_file, save
from torch import nn

from isthmus.data.cache.read import ClipArrays
from isthmus.data.files import not_the_file, write_atomically
from isthmus.distill.models.heads import FusionHead
from isthmus.distill.models.teacher import Teacher
from isthmus.distill.models.trunk import EncoderPair
from isthmus.distill.recipes import Recipe
from isthmus.distill.training.checkpoint import state_hash
from isthmus.distill.training.teacher_cache import TeacherOutputs, open_outputs
from isthmus.extensions import load_extensions

M = TypeVar("M", bound=nn.Module)


class ReleaseError(Exception):
    """A release that is missing, incomplete or made by another version. The message names the command that makes it."""


@dataclass(frozen=True)
class Release:
    """An opened release. Parts are loaded when first used; a missing part raises ReleaseError then.

    >>> Release.open(release.root).recipe.classes
    ('NEU', 'HAP', 'SAD')
    """

    root: Path
    recipe: Recipe

    @staticmethod
    def create(root: Path, recipe: Recipe) -> "Release":
        """Begin a release, or open the one that was begun with the same recipe.

        Raises ReleaseError if the folder holds a release of another recipe.
        """
        path = root / "recipe.json"
        if path.exists():
            existing = Release.open(root)
            if existing.recipe != recipe:
                names = [each.name for each in fields(Recipe)]
                others = [name for name in names if getattr(existing.recipe, name) != getattr(recipe, name)]
                raise ReleaseError(
                    f"{root} holds a release of another configuration: its recipe.json differs in "
                    f"{', '.join(others)}. Choose another --release folder, or remove this one."
                )
            return existing
        write_atomically(path, recipe.to_json())
        return Release(root, recipe)

    @staticmethod
    def open(root: Path) -> "Release":
        """Open the release in ``root``. Extensions are loaded first, since its recipe may name one's strategy.

        Raises ReleaseError if the folder holds no release of this version, InvalidInput for a broken extension.
        """
        load_extensions()
        try:
            return Release(root, Recipe.from_json((root / "recipe.json").read_text()))
        except FileNotFoundError as error:
            raise ReleaseError(
                f"{root} is not a release. 'isthmus distill teacher --release {root}' makes one."
            ) from error
        except ValueError as error:
            raise ReleaseError(f"{root}/recipe.json: {error}") from error

    @property
    def public_dir(self) -> Path:
        return self.root / "public"

    @property
    def teacher_path(self) -> Path:
        return self.root / "teacher" / "teacher.safetensors"

    @property
    def base_dir(self) -> Path:
        """The folder with ONNX files and heads of the student that a new device gets."""
        return self.root / "base"

    def student_path(self, seed: int) -> Path:
        return self.root / "students" / f"{seed}.safetensors"

    def heads_path(self, seed: int) -> Path:
        return self.root / "students" / f"{seed}-heads.safetensors"

    @cached_property
    def public(self) -> ClipArrays:
        pointer = self.root / "public.json"
        if not pointer.exists():
            raise ReleaseError(f"{self.root} has no public clips yet: run 'isthmus distill teacher' first.")
        return ClipArrays.open(self.public_dir / json.loads(pointer.read_text())["folder"])

    def set_public(self, clips: ClipArrays) -> None:
        """Record which decoded clips below ``public_dir`` this release uses."""
        folder = clips.folder.relative_to(self.public_dir)
        write_atomically(self.root / "public.json", json.dumps({"folder": str(folder)}))

    def new_teacher(self, weights: Path | None = None) -> Teacher:
        recipe = self.recipe
        return Teacher(
            recipe.teacher_trunk,
            recipe.feature_width,
            len(recipe.classes),
            recipe.fusion,
            weights,
            recipe.pretrained_trunks,
        )

    def new_student(self, weights: Path | None = None) -> EncoderPair:
        """Return a student to be trained; if it shares the teacher's encoders, an untrained pair of these."""
        recipe = self.recipe
        if recipe.shares_encoders:
            return self.new_teacher(weights).encoders
        signed = recipe.pretrained_trunks is not None
        return EncoderPair(recipe.student_trunk, recipe.feature_width, neck=False, linear_neck=signed, weights=weights)

    @cached_property
    def teacher(self) -> Teacher:
        return load_weights(self.new_teacher(), self.teacher_path, "isthmus distill teacher")

    @property
    def teacher_head(self) -> FusionHead:
        return self.teacher.head

    def student(self, seed: int = 0) -> EncoderPair:
        """Load the AllDistill student of a seed (0: the base student)."""
        return load_weights(self.new_student(), self.student_path(seed), f"isthmus distill student --seed {seed}")

    @cached_property
    def teacher_outputs(self) -> TeacherOutputs:
        try:
            outputs = open_outputs(self.outputs_dir)
        except FileNotFoundError as error:
            raise ReleaseError(f"{self.root} has no teacher outputs: run 'isthmus distill teacher' again.") from error
        if len(outputs.probabilities_NC) != len(self.public.names):
            raise ReleaseError(
                f"{self.root}: teacher outputs and public clips differ in number; remove teacher_outputs/."
            )
        return outputs

    def over(self, clips: ClipArrays, outputs: TeacherOutputs) -> "Release":
        """Return this release with other clips in place of the public ones; recipe, teacher and students stay the same.

        Raises ValueError if the number of outputs is not the number of clips.
        """
        if len(outputs.probabilities_NC) != len(clips):
            raise ValueError(f"teacher outputs of {len(outputs.probabilities_NC)} clips for {len(clips)}")
        other = Release(self.root, self.recipe)
        vars(other).update(public=clips, teacher_outputs=outputs, teacher=self.teacher)
        return other

    def under(self, recipe: Recipe) -> "Release":
        """Return this release with another recipe for what is still to be made; clips and teacher stay the same."""
        other = Release(self.root, recipe)
        vars(other).update(public=self.public, teacher_outputs=self.teacher_outputs, teacher=self.teacher)
        return other

    @property
    def outputs_dir(self) -> Path:
        """The folder of ``teacher_outputs``."""
        return self.root / "teacher_outputs" / self.outputs_key()

    def outputs_key(self) -> str:
        """Return the hash of the teacher's weights and of the public data."""
        return f"{state_hash([self.teacher])}-{self.public.content_hash[:16]}"

    @cached_property
    def release_hash(self) -> str:
        """Return 16 hex digits over recipe, teacher, public data and base student."""
        return self.recipe.hash(self.outputs_key(), state_hash([self.student(0)]))

    def files(self) -> list[Path]:
        """Return every file that personalising and serving read. Raises ReleaseError if public clips are missing."""
        folders = [self.public.folder, self.outputs_dir, self.base_dir]
        single = [self.root / "recipe.json", self.root / "public.json", self.teacher_path, self.student_path(0)]
        return sorted([*single, *(path for folder in folders for path in folder.glob("*") if path.is_file())])

    def labels(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.asarray(self.public.labels_N)


def save_weights(module: nn.Module, path: Path) -> None:
    """Write the module's weights to ``path``. Raises DiskFull."""
    state = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
    write_atomically(path, save(state))


def load_weights(module: M, path: Path, command: str) -> M:
    """Load the weights strictly and set evaluation mode. Raises ReleaseError naming the command that makes the file."""
    if not path.exists():
        raise ReleaseError(f"{path} is missing: run '{command}' first.")
    reason = not_the_file(path)
    if reason is not None:
        raise ReleaseError(f"{path} {reason}")
    try:
        module.load_state_dict(load_file(path))
    except Exception as error:  # safetensors raises its own untyped errors on damage
        raise ReleaseError(
            f"{path} does not fit this release or is damaged ({error}); run '{command}' again."
        ) from error
    return module.eval()
