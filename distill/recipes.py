"""A run is a named function that returns its whole frozen configuration.

``thesis`` holds the sizes of the paper; ``small`` the same networks on inputs sized for two CPU cores; ``smoke`` takes
minutes and serves the demo and the tests; ``tiny`` takes seconds and learns next to nothing. A comment beside a value
says where it differs from the paper.
"""

import dataclasses
import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from isthmus.data.transforms import CROP_SCALE, InputSpec
from isthmus.distill.models.heads import Fusion
from isthmus.distill.models.pretrained import PretrainedTrunk
from isthmus.distill.selection import STRATEGIES


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one optimisation, as ``loop.fit`` needs them."""

    epochs: int
    batch_size: int = 64
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: Literal["steps", "cosine", "constant"] = "steps"
    drop_epochs: tuple[int, ...] = (70,)
    """Epochs from which the rate falls tenfold; for ``steps``."""
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    augment: bool = True
    """Whether clips are augmented: for the teacher's branches, alone or joint. Students and heads are never trained on
    augmented clips, because their targets or inputs are cached features of the clips as they are."""
    crop_scale: tuple[float, float] = CROP_SCALE
    """Share of a picture's area that a training crop keeps; the published range leaves little of a small face."""


TEACHERS_ENCODERS: Final = "teacher"
"""A ``student_trunk``: the student's encoders are the teacher's own, which are small enough for a device."""


@dataclass(frozen=True)
class TeacherConfig:
    """How the teacher is trained. ``balance`` is the method that keeps one branch from dominating the other.

    "joint": both branches and the head at once by ``joint`` on the head's cross-entropy alone (Eq. 5.3, as printed).
    "unimodal": each branch alone, then the head on their features. "ogm-ge": both branches and the head at once by
    ``joint``, with gradients modulated by ``alpha`` (distill/teacher/balance.py), then the head again on features.
    """

    audio: TrainConfig
    visual: TrainConfig
    head: TrainConfig
    joint: TrainConfig
    balance: Literal["unimodal", "ogm-ge", "joint"] = "unimodal"
    alpha: float = 0.8
    """Strength of the modulation; the paper takes 0.8 for CREMA-D."""
    held_out: float = 0.1
    """Share of the public clips that no branch is trained on. A linear head is fitted on them instead of being trained
    by ``head`` (distill/teacher/held_out.py)."""

    def __post_init__(self) -> None:
        if self.balance not in ("unimodal", "ogm-ge", "joint"):
            raise ValueError(f"balance {self.balance!r} is unknown; known: unimodal, ogm-ge, joint")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"a held-out share of {self.held_out:g} is not in [0, 1)")
        if self.balance == "ogm-ge" and self.joint.optimizer != "sgd":
            raise ValueError("ogm-ge scales gradients, which AdamW divides out again: its joint stage needs sgd")


SGD: Final[dict[str, Any]] = {"optimizer": "sgd", "learning_rate": 1e-2, "weight_decay": 1e-4}
"""From random weights, ten times the paper's rate: its 1e-3 is for ImageNet weights."""


@dataclass(frozen=True)
class PersonaliseConfig:
    """Alg. 7: rounds of selection, each followed by ``train.epochs / rounds`` epochs of distillation."""

    train: TrainConfig
    rounds: int = 15
    strategy: str = "cosine"
    """One of ``selection.STRATEGIES``."""
    samples_per_row: int = 10
    """n of SelectData; the paper does not give it."""
    clips_per_cluster: int = 3
    min_cluster: int = 3
    settled_at: float | None = None
    """Overlap (Jaccard) of two rounds' selections from which the job trains to its end without another round; None runs
    every round (distill/student/settling.py)."""

    keep: float = 0.5
    """Share of the base student's weights in the finished one (``personalise.averaged``); the paper keeps none."""
    heads_on: Literal["all", "selection"] = "all"
    """The clips that heads are trained on. The paper takes the selection; with a few tens of clips that loses more
    accuracy than it gains (docs/results/personalisation)."""

    def __post_init__(self) -> None:
        if not 0 <= self.keep < 1:
            raise ValueError(f"keep is {self.keep:g}; a share of at least 0 and below 1 of the base student is kept")
        if self.heads_on not in ("all", "selection"):
            raise ValueError(f"heads_on {self.heads_on!r} is unknown; known: all, selection")
        if self.settled_at is not None and not 0 < self.settled_at <= 1:
            raise ValueError(f"settled_at is {self.settled_at:g}; an overlap is above 0 and at most 1, or None")
        if self.strategy not in STRATEGIES:
            raise ValueError(f"unknown strategy {self.strategy!r}; known: {', '.join(STRATEGIES)}")


@dataclass(frozen=True)
class Recipe:
    """The whole configuration of a release: networks, preparation of clips, and every training.

    ``ratios`` are the compression ratios for which heads are trained. ``feature_width`` is D, the width of the features
    of both teacher and student (after the teacher's projection).

    >>> Recipe.from_json(recipe.to_json()) == recipe
    True
    """

    name: str
    dataset: Literal["crema-d", "ave"]
    classes: tuple[str, ...]
    input: InputSpec
    teacher: TeacherConfig
    all_distill: TrainConfig
    personalise: PersonaliseConfig
    heads: TrainConfig
    teacher_trunk: str = "resnet101"
    student_trunk: str = "resnet18"
    feature_width: int = 512
    fusion: Fusion = "concat"
    ratios: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0)
    sound_trunk: PretrainedTrunk | None = None
    """With ``picture_trunk`` instead of ``teacher_trunk``; both or neither are given."""
    picture_trunk: PretrainedTrunk | None = None
    modality_dropout: float = 0.15
    """Probability that a head in training gets no sound; the same again for the picture; never both."""

    frames_distilled: int | None = None
    """Frames of a clip in one step of distillation, drawn from the stored ones; None: as many as in evaluation."""
    student_precision: Literal["fp32", "int8"] = "fp32"
    """Number type of the exported encoders. int8 is used for each student that it costs little (student/int8.py)."""

    def __post_init__(self) -> None:
        if self.student_precision not in ("fp32", "int8"):
            raise ValueError(f"a student's precision {self.student_precision!r} is unknown; known: fp32, int8")
        if (self.sound_trunk is None) != (self.picture_trunk is None):
            raise ValueError("a recipe has pretrained trunks for sound and picture, or for neither")
        if not 0 <= self.modality_dropout <= 0.5:
            raise ValueError(f"a modality dropout of {self.modality_dropout:g} is not in [0, 0.5]: never both are gone")

    @property
    def shares_encoders(self) -> bool:
        """Whether the student's encoders are the teacher's own."""
        return self.student_trunk == TEACHERS_ENCODERS

    @property
    def pretrained_trunks(self) -> tuple[PretrainedTrunk, PretrainedTrunk] | None:
        """Both pretrained trunks, sound and picture, or None."""
        if self.sound_trunk is None or self.picture_trunk is None:
            return None
        return self.sound_trunk, self.picture_trunk

    def to_json(self) -> str:
        """Return the recipe as JSON. New fields are left out if they are off, so that hashes of old recipes stay."""
        raw = asdict(self)
        if not raw["input"]["mel"]:
            del raw["input"]["mel"]
        for key in ("sound_trunk", "picture_trunk", "frames_distilled"):
            if raw[key] is None:
                del raw[key]
        if self.student_precision == "fp32":
            del raw["student_precision"]
        return json.dumps(raw, sort_keys=True, indent=1)

    @staticmethod
    def from_json(text: str) -> "Recipe":
        """Read a recipe. Raises ValueError if the text is not a recipe of this version."""
        try:
            raw: dict[str, Any] = json.loads(text)
            stages = {key: _train_config(raw["teacher"][key]) for key in ("audio", "visual", "head", "joint")}
            teacher: dict[str, Any] = {**raw.pop("teacher"), **stages}
            personalise = raw.pop("personalise")
            for key in ("sound_trunk", "picture_trunk"):
                trunk = raw.pop(key, None)
                raw[key] = None if trunk is None else PretrainedTrunk(**trunk)
            return Recipe(
                classes=tuple(raw.pop("classes")),
                input=InputSpec(**raw.pop("input")),
                teacher=TeacherConfig(**teacher),
                all_distill=_train_config(raw.pop("all_distill")),
                personalise=PersonaliseConfig(**{**personalise, "train": _train_config(personalise["train"])}),
                heads=_train_config(raw.pop("heads")),
                ratios=tuple(raw.pop("ratios")),
                **raw,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a recipe of this version: {error}") from error

    def hash(self, *parts: str) -> str:
        """Return 16 hex digits over the whole configuration and the given parts (a data hash, a seed)."""
        return hashlib.sha256("\n".join([self.to_json(), *parts]).encode()).hexdigest()[:16]


def _train_config(raw: dict[str, Any]) -> TrainConfig:
    pairs: dict[str, Any] = {key: tuple(raw[key]) for key in ("drop_epochs", "crop_scale") if key in raw}
    return TrainConfig(**{**raw, **pairs})


def thesis(dataset: Literal["crema-d", "ave"], classes: tuple[str, ...]) -> Recipe:
    """Return the paper's sizes: SGD, momentum 0.9, weight decay 1e-4, rate 1e-3 and from epoch 70 1e-4, batch 64."""
    long = dataset == "ave"
    spec = InputSpec(duration_s=10.0, spectrogram_columns=1004) if long else InputSpec()
    return Recipe(
        name="thesis",
        dataset=dataset,
        classes=classes,
        input=spec,
        teacher=TeacherConfig(
            audio=TrainConfig(epochs=100),
            visual=TrainConfig(epochs=100),
            head=TrainConfig(epochs=20),
            joint=TrainConfig(epochs=100),
        ),
        all_distill=TrainConfig(epochs=1),
        personalise=PersonaliseConfig(train=TrainConfig(epochs=150), rounds=15, keep=0.0, heads_on="selection"),
        heads=TrainConfig(epochs=100, augment=False),
    )


def small(dataset: Literal["crema-d", "ave"], classes: tuple[str, ...]) -> Recipe:
    """Return the paper's networks on 64-pixel frames and spectrograms of 64 x 75 (AVE: 64 x 251), from random weights.

    It uses AdamW and more AllDistill epochs than the paper's one, because there are no ImageNet weights to start from.
    """
    base = thesis(dataset, classes)
    columns = 251 if dataset == "ave" else 75
    adamw = TrainConfig(
        epochs=30,
        batch_size=32,
        optimizer="adamw",
        learning_rate=1e-3,
        weight_decay=0.05,
        schedule="cosine",
        warmup_epochs=2,
        label_smoothing=0.1,
    )
    return dataclasses.replace(
        base,
        name="small",
        input=dataclasses.replace(
            base.input, spectrogram_bins=64, spectrogram_columns=columns, frame_px=64, stored_px=72, frames_used=1
        ),
        teacher=TeacherConfig(
            audio=dataclasses.replace(adamw, epochs=14),
            visual=dataclasses.replace(adamw, epochs=22),
            head=dataclasses.replace(adamw, epochs=20, learning_rate=3e-4, warmup_epochs=0),
            joint=dataclasses.replace(adamw, epochs=30, **SGD),
        ),
        all_distill=dataclasses.replace(adamw, epochs=10, warmup_epochs=1),
        personalise=PersonaliseConfig(
            train=dataclasses.replace(adamw, epochs=12, learning_rate=3e-4, warmup_epochs=0), rounds=3
        ),
        heads=dataclasses.replace(adamw, epochs=30, learning_rate=3e-4, warmup_epochs=0, augment=False),
    )


def smoke(dataset: Literal["crema-d", "ave"], classes: tuple[str, ...]) -> Recipe:
    """Return a recipe of minutes: ResNet18 for both networks, 48-pixel frames, gentle crops, small batches."""
    base = small(dataset, classes)
    columns = 160 if dataset == "ave" else 48
    quick = dataclasses.replace(base.teacher.audio, batch_size=16, warmup_epochs=1, crop_scale=(0.7, 1.0))
    return dataclasses.replace(
        base,
        name="smoke",
        teacher_trunk="resnet18",
        input=dataclasses.replace(
            base.input, spectrogram_bins=48, spectrogram_columns=columns, frame_px=48, stored_px=56, frames_used=1
        ),
        teacher=TeacherConfig(
            audio=dataclasses.replace(quick, epochs=16),
            visual=dataclasses.replace(quick, epochs=24),
            head=dataclasses.replace(base.teacher.head, epochs=10),
            joint=dataclasses.replace(quick, epochs=24, **SGD),
        ),
        all_distill=dataclasses.replace(base.all_distill, epochs=10, batch_size=16),
        personalise=dataclasses.replace(
            base.personalise,
            train=dataclasses.replace(base.personalise.train, epochs=10, batch_size=16),
            rounds=2,
            samples_per_row=8,
        ),
        heads=dataclasses.replace(base.heads, epochs=10),
    )


def demo(dataset: Literal["crema-d", "ave"], classes: tuple[str, ...]) -> Recipe:
    """Return the recipe of `isthmus demo`: a quarter of smoke's width on inputs as large as small's, and more
    epochs of the teacher's branches. It is faster than smoke, and more accurate on the demo's
    synthetic people.
    """
    base, inputs = smoke(dataset, classes), small(dataset, classes).input
    teacher = dataclasses.replace(
        base.teacher,
        audio=dataclasses.replace(base.teacher.audio, epochs=24),
        visual=dataclasses.replace(base.teacher.visual, epochs=48),
    )
    return dataclasses.replace(
        base,
        name="demo",
        input=inputs,
        teacher=teacher,
        teacher_trunk="resnet18-quarter",
        student_trunk="resnet18-quarter",
        feature_width=128,
        ratios=(1.0, 2.0),
    )


def tiny(dataset: Literal["crema-d", "ave"], classes: tuple[str, ...]) -> Recipe:
    """Return a recipe of seconds, to try the commands: narrow networks on 32-pixel frames, a few epochs, one round."""
    base = smoke(dataset, classes)
    columns = 96 if dataset == "ave" else 32
    return dataclasses.replace(
        base,
        name="tiny",
        input=dataclasses.replace(
            base.input, spectrogram_bins=32, spectrogram_columns=columns, frame_px=32, stored_px=36
        ),
        teacher_trunk="resnet18-quarter",
        student_trunk="resnet18-quarter",
        feature_width=128,
        teacher=dataclasses.replace(
            base.teacher,
            audio=dataclasses.replace(base.teacher.audio, epochs=4),
            visual=dataclasses.replace(base.teacher.visual, epochs=4),
            head=dataclasses.replace(base.teacher.head, epochs=4),
            joint=dataclasses.replace(base.teacher.joint, epochs=4),
        ),
        all_distill=dataclasses.replace(base.all_distill, epochs=2),
        personalise=dataclasses.replace(
            base.personalise, train=dataclasses.replace(base.personalise.train, epochs=2), rounds=1
        ),
        heads=dataclasses.replace(base.heads, epochs=4),
        ratios=(1.0, 2.0),
    )


def on_trunks(
    recipe: Recipe, sound: PretrainedTrunk, picture: PretrainedTrunk, *, student_trunk: str | None = None
) -> Recipe:
    """Return the recipe with pretrained trunks, on the input that these read.

    Sound: 40 mel bands every 10 ms. Picture: six whole frames of 128 pixels. The student shares the encoders, unless
    ``student_trunk`` names a ResNet that is to be distilled from them; each of its steps then sees one of the six
    frames. The heads per ratio start as the teacher's and are trained for little: 30 epochs cost 8 points on people of
    RavFace whom they had not seen.
    """
    spec = dataclasses.replace(
        recipe.input, mel=True, window=400, hop=160, spectrogram_bins=40, frame_px=128, stored_px=128
    )
    spec = dataclasses.replace(spec, spectrogram_columns=spec.native_shape[1], frames_stored=6, frames_used=6)
    return dataclasses.replace(
        recipe,
        input=spec,
        sound_trunk=sound,
        picture_trunk=picture,
        student_trunk=student_trunk or TEACHERS_ENCODERS,
        frames_distilled=1 if student_trunk else None,
        heads=dataclasses.replace(recipe.heads, epochs=3, learning_rate=1e-4),
    )


PRESETS = {"thesis": thesis, "small": small, "smoke": smoke, "demo": demo, "tiny": tiny}
