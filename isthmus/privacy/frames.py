"""What the frames of a device's questions give away: the clips behind them, drawn by an attacker, per setting.

A question sends one clip's features, compressed by a ratio and in a number type. The attacker has the release: its
public clips, the student's encoders and its compressors. They learn from the public clips to draw sound and picture
from what was received, and draw the private clips.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from isthmus.data.cache.read import ClipArrays
from isthmus.data.transforms import evaluation_frames
from isthmus.distill.release import Release
from isthmus.edge.student.encoder import StudentEncoder
from isthmus.privacy.attacks import Basis, Decode, ridge_decoders, scenes_of
from isthmus.privacy.likeness import retrieval_rate, same_class_rate, squared_distances
from isthmus.privacy.uploads import Floats
from isthmus.proto.codec import pack_frame, unpack_frame
from isthmus.proto.messages import FeatureFrame, Features, NumberType

HELD_OUT: Final = 5
"""One in so many public people is held out, to choose the attacker's penalty."""


def measure(
    release: Release,
    clients: dict[str, ClipArrays],
    *,
    most: int,
    report: Callable[[str], None],
    advance: Callable[[int], None],
    encoder: StudentEncoder | None = None,
) -> dict[str, Any]:
    """Attack every ratio and number type of the release's base student; ``most`` public clips are used.

    ``advance`` is called after each encoded clip. ``encoder`` replaces the base student's. Raises what it raises.
    """
    public = release.public
    step = max(1, len(public) // most)
    public = public.subset(np.arange(0, len(public), step)[:most])
    encoder = encoder or StudentEncoder(release.base_dir)
    known = _features(encoder, public, advance)
    of_clients = {name: _features(encoder, clips, advance) for name, clips in clients.items()}
    scenes = scenes_of(public)
    basis = Basis(scenes)
    targets_NP = basis.coefficients(scenes)
    true = {name: scenes_of(clips).flat() for name, clips in clients.items()}
    rows = []
    for ratio in release.recipe.ratios:
        for number_type in NumberType:

            def received(
                features: Sequence[Features], ratio: float = ratio, number_type: NumberType = number_type
            ) -> Floats:
                return np.stack([_received(encoder, each, ratio, number_type, release) for each in features])

            decode = _best(received(known), targets_NP, np.asarray(public.actors), basis.sound_width)
            cells = []
            for name, features in of_clients.items():
                drawn = basis.scenes(decode(received(features))).flat()
                labels_N = np.asarray(clients[name].labels_N)
                distances = [squared_distances(*pair) for pair in zip(drawn, true[name], strict=True)]
                cells.append(
                    [same_class_rate(each, labels_N) for each in distances]
                    + [retrieval_rate(each) for each in distances]
                )
            sound, picture, sound_found, picture_found = (float(each) for each in np.nanmean(cells, axis=0))
            frame = _frame(encoder, known[0], ratio, number_type)
            rows.append(
                {
                    "ratio": ratio,
                    "number_type": number_type.value,
                    "frame_bytes": len(frame),
                    "picture_same_class": picture,
                    "sound_same_class": sound,
                    "picture_retrieval": picture_found,
                    "sound_retrieval": sound_found,
                }
            )
            report(f"ratio {ratio:g}, {number_type.value}: right on faces in {picture:.0%} of pairs, sound {sound:.0%}")
    return {
        "what": "how often a clip drawn from one received frame is nearer to its own clip than to another",
        "recipe": release.recipe.name,
        "public_clips": len(public),
        "clients": {name: len(clips) for name, clips in clients.items()},
        "chance": {
            "same_class": 0.5,
            "retrieval": float(np.mean([1 / len(clips) for clips in clients.values()])),
        },
        "settings": rows,
    }


def _features(encoder: StudentEncoder, clips: ClipArrays, advance: Callable[[int], None]) -> list[Features]:
    found = []
    for row in range(len(clips)):
        frames_KCHW = evaluation_frames(np.asarray(clips.frames_NKHWC[row]), clips.spec)
        found.append(encoder.features(np.asarray(clips.spectrograms_NFT[row], np.float32), frames_KCHW))
        advance(1)
    return found


def _frame(encoder: StudentEncoder, features: Features, ratio: float, number_type: NumberType) -> bytes:
    return pack_frame(FeatureFrame(encoder.compress(features, ratio), ratio, number_type))


def _received(
    encoder: StudentEncoder, features: Features, ratio: float, number_type: NumberType, release: Release
) -> Floats:
    """Return the numbers that the cloud has after it has read the frame."""
    recipe = release.recipe
    frame = _frame(encoder, features, ratio, number_type)
    read = unpack_frame(frame, feature_width=recipe.feature_width, ratios=recipe.ratios)
    return np.concatenate(read.features.filled())


def _best(rows_NV: Floats, targets_NP: Floats, actors_N: Any, sound_width: int) -> Decode:
    """Fit linear maps, keep the penalty that draws held-out people's pictures best, and fit it on everybody."""
    _, person_N = np.unique(actors_N, return_inverse=True)
    held_N = person_N % HELD_OUT == 0
    if held_N.all():
        held_N = np.arange(len(rows_NV)) % HELD_OUT == 0
    part = slice(sound_width, None)
    errors = {
        name: float(np.square(decode(rows_NV[held_N])[:, part] - targets_NP[held_N][:, part]).mean())
        for name, decode in ridge_decoders(rows_NV[~held_N], targets_NP[~held_N]).items()
    }
    return ridge_decoders(rows_NV, targets_NP)[min(errors, key=errors.__getitem__)]
