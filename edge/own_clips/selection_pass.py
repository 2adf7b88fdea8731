"""One pass over the selection clips: encode each with a student, then make the prototypes that may leave."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from isthmus.data.clip import ClipRef, Damage
from isthmus.data.transforms import InputSpec
from isthmus.edge.capture.sources import Clock, replay
from isthmus.edge.own_clips.prototypes import each_clip, make_prototypes
from isthmus.edge.student.encoder import StudentEncoder, encode
from isthmus.proto.errors import BadPrototypes
from isthmus.proto.messages import Features, Prototypes, UploadMode


@dataclass(frozen=True)
class PrototypeChoices:
    """How prototypes are made. ``noise`` is the epsilon of one upload; None adds no noise.

    Raises BadPrototypes for noise in mode FEATURES, before any clip is read.
    """

    min_cluster: int = 3
    clip_per_cluster: int = 3
    mode: UploadMode = UploadMode.PROTOTYPES
    noise: float | None = None

    def __post_init__(self) -> None:
        if self.mode is UploadMode.FEATURES and self.noise is not None:
            raise BadPrototypes("noise is promised for probabilities alone: choose mode prototypes, or no noise")


def prototypes_of(
    refs: Sequence[ClipRef],
    encoder: StudentEncoder,
    spec: InputSpec,
    choices: PrototypeChoices,
    *,
    classes: int,
    seed: int,
    clock: Clock,
    on_clip: Callable[[int, int], None],
    on_damage: Callable[[Damage], None],
) -> Prototypes:
    """Return the prototypes of the clips; labels are never read.

    Raises BadPrototypes if too few clips can be used, Corrupt for a student that fails.
    """
    encoded = encode_selection(refs, (encoder,), spec, clock=clock, on_clip=on_clip, on_damage=on_damage)
    features = [of_student for (of_student,) in encoded.values()]
    return prototypes_from(features, encoder, choices, classes=classes, seed=seed)


def encode_selection(
    refs: Sequence[ClipRef],
    encoders: Sequence[StudentEncoder],
    spec: InputSpec,
    *,
    clock: Clock,
    on_clip: Callable[[int, int], None],
    on_damage: Callable[[Damage], None],
) -> dict[str, tuple[Features, ...]]:
    """Return each clip's features from every student, by clip name. Each clip is decoded once and then dropped."""
    encoded: dict[str, tuple[Features, ...]] = {}
    for taken in replay(refs, spec, clock, on_damage):
        encoded[taken.ref.name] = tuple(encode(encoder, taken, spec, clock).features for encoder in encoders)
        on_clip(len(encoded), len(refs))
    return encoded


def prototypes_from(
    features: Sequence[Features], encoder: StudentEncoder, choices: PrototypeChoices, *, classes: int, seed: int
) -> Prototypes:
    """Return the prototypes of these features. Raises BadPrototypes if there are too few clips."""
    probabilities_NC = encoder.teacher_probabilities(features) if features else np.zeros((0, classes), np.float32)
    if choices.mode is UploadMode.PROBABILITIES:
        return each_clip(probabilities_NC)
    features_NE = None
    if choices.mode is UploadMode.FEATURES and features:
        features_NE = np.stack([np.concatenate([each.audio_D, each.visual_D]) for each in features])
    return make_prototypes(
        probabilities_NC,
        seed=seed,
        min_cluster=choices.min_cluster,
        clip_per_cluster=choices.clip_per_cluster,
        noise=choices.noise,
        noise_seed=None if choices.noise is None else secrets.randbits(128),
        features_NE=features_NE,
    )
