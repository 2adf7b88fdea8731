"""The person model of a student, fitted on the public clips of its release."""

import logging

import numpy as np
import torch

from isthmus.distill.models.trunk import EncoderPair
from isthmus.distill.release import Release
from isthmus.distill.student.centred import CannotCentre, fit_centred
from isthmus.distill.training.teacher_cache import Encoded, encode_clips, evaluation_mean
from isthmus.proto.convert_person import centred_to_bytes
from isthmus.proto.errors import TooLarge

log = logging.getLogger(__name__)


def fit_person_model(
    release: Release, student: EncoderPair, device: torch.device, encoded: Encoded | None = None
) -> bytes | None:
    """Fit the person model of a student on all public clips and return it as the manifest will hold it.

    ``encoded`` are the features of the clips, if they are known. Returns None, and says why in the log, if the public
    clips do not show how people differ, or if the model does not fit into a manifest. Devices then go on without it.
    """
    public = release.public
    try:
        audio_ND, visual_NKD = encoded or encode_clips(student, public, device)
        features_MND = np.stack([audio_ND, evaluation_mean(visual_NKD, public)])
        made = fit_centred(features_MND, np.ones((len(public), 2)), release.labels(), public.actors)
        if made.heads.bias_MC.shape[1] < len(release.recipe.classes):
            raise CannotCentre("a class has no public clip")
        return centred_to_bytes(made)
    except (CannotCentre, TooLarge) as error:
        log.warning("this student gets no person model: %s", error)
        return None
