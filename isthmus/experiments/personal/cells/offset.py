"""A student's answers as of a device that has learned its user from the selection clips, without their labels."""

import logging

import numpy as np
import numpy.typing as npt

from isthmus.data.cache.read import ClipArrays
from isthmus.distill.release import Release
from isthmus.distill.student.centred import FEWEST_PEOPLE, CannotCentre, fit_centred
from isthmus.distill.student.evaluate import StudentOutputs, accuracy
from isthmus.distill.training.teacher_cache import Encoded, evaluation_mean
from isthmus.edge.own_clips.personal import understand
from isthmus.edge.own_clips.window import Window
from isthmus.proto.person import Centred

log = logging.getLogger(__name__)

Rows = npt.NDArray[np.int64]


def can_be_measured(release: Release, clips: ClipArrays) -> bool:
    """Return whether all clips are of the same named person, and the public clips name enough others."""
    return len(set(clips.actors)) == 1 and all(clips.actors) and len({*release.public.actors} - {""}) >= FEWEST_PEOPLE


def person_model(release: Release, encoded: Encoded) -> Centred | None:
    """Fit a student's centred heads and person model, given its features of all public clips, as the cloud does.

    Returns None, and says why in the log, if the public clips do not show how people differ.
    """
    public = release.public
    audio_ND, visual_NKD = encoded
    features_MND = np.stack([audio_ND, evaluation_mean(visual_NKD, public)])
    try:
        made = fit_centred(features_MND, np.ones((len(public), 2)), release.labels(), public.actors)
    except CannotCentre as error:
        log.warning("no offset is measured: %s", error)
        return None
    return made if made.heads.bias_MC.shape[1] == len(release.recipe.classes) else None


def accuracy_with_offset(
    made: Centred, own: StudentOutputs, tested: StudentOutputs, labels_T: npt.NDArray[np.int64]
) -> float:
    """Return the accuracy on the test clips after the user's offset was learned from their own clips.

    The ordinary answers are those of the teacher's head, with which the paper predicts.
    """
    clips = len(own.audio_ND)
    names = tuple(map(str, range(clips)))
    window = Window(
        names, np.stack([own.audio_ND, own.visual_ND]), np.ones((clips, 2), np.float32), own.probabilities_NC
    )
    reading = understand("", made, window)
    answers_TC = reading.answers(
        np.stack([tested.audio_ND, tested.visual_ND]),
        np.ones((len(labels_T), 2), np.float32),
        tested.probabilities_NC,
    )
    return accuracy(answers_TC, labels_T)
