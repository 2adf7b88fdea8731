"""PURE: the estimate of one person, whose classes are told by the evidence of hypotheses.

A person's voice and face shift all their clips alike, and everyone has a way of their own to show each class. For a
linear head the first is a bias on the logits, one per modality: the offset. The second moves the mean logits of a
class. Both can be estimated from unlabelled clips if their classes are known. The classes are known only through the
answers, so person and answers are estimated in turn. Both modalities answer together, and this keeps a wrong start from
feeding itself: an error of the sound is corrected by the picture.

The logits of a clip of class c are M[c] + b + w[c] + noise, in each modality. M, B and S are the mean, between and
within of ``PersonModel``; b has the covariance B, w[c] the covariance k S, and the noise (1 - k) S, where k is
``OWN_WAY``. With L the logits of a modality, N_c the sum of the answers r to its clips, p the answers of the student's
ordinary head, pi the shares of the classes, and row vectors:

    r = p pi, rows scaled to 1
    repeat:
        e_c  = k N_c + 1 - k
        D_c  = sum_n r_nc (L_n - M_c)                            distance of class c, summed
        b    = (sum_c D_c / e_c) / W (B + S / W)^-1 B,           W = sum_c N_c / e_c: clips that count
        w_c  = k (D_c - N_c b) / e_c
        t_nc = (L_n - b - M_c - w_c / 2) G^-1 w_c - k (1 - k) tr(G^-1 S) / (2 e_c)
        r    = softmax((1 - s) (f sum (L - b + t) + log(C pi)) + s log p),   sum over the modalities
    answer: the last line, of a new clip

f is the fusion factor of clips with both modalities, else 1, and s is ``BASE_SHARE``. b and w are the posterior means
of a random-effects model (Robinson, "That BLUP is a good thing", Statistical Science 1991), and the turns are those of
EM. t is what the log-likelihood of class c gains if its mean moves by w_c (its expectation, since w_c is uncertain).
G is the covariance under which logits that are calibrated are the log-likelihood ratios of Gaussians with means M: it
is M itself, without its means of rows and columns.

pi must serve people of all classes and people of few. It cannot be learned in the same turns: an offset towards a class
and a class that is frequent look alike, and one error feeds the other. So pi is chosen among hypotheses by how well
they explain all logits. Turns with even shares rank the classes by their sums of r. Hypothesis j says that the person
shows the first j of them, all alike often. Its evidence, after turns under it, is by Laplace's approximation

    l_j = sum_n log sum_c pi_c prod_m N(L_n; M_c + b + w_c, (1 - k) S)^f
          + sum_m log N(b; 0, B) - log|B^-1 + W S^-1| / 2 + sum_c log N(w_c; 0, k S) - log|S^-1 e_c / (k (1 - k))| / 2

for the differences of logits, since what all logits share tells nothing of a class. pi is the mean of the hypotheses'
shares with weights proportional to exp(T l_j) / (C over j), T = t / (t + n) for n clips and t = ``TELLING_CLIPS``: what
is wrong in the model is wrong in all clips of a person, so many of them tell less than they claim. If there are more
than ``MOST_HYPOTHESES`` classes, only so many values of j are compared. The estimate stays on the device.

Fewer clips than ``EVIDENCE_CLIPS`` say too little of both, of which classes there are and of ways of their own: k is 0
then, the turns start with r = p, and pi is learned in them (``data.class_shares``).

Axes: M modalities (sound, picture), N clips, C classes, H hypotheses.
"""

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from isthmus.data.class_shares import UNIFORM_SHARE, softmax
from isthmus.edge.own_clips.offset.answers import (
    BASE_SHARE,
    Offset,
    Reals,
    Ways,
    checked,
    distributions,
    known_answers,
)
from isthmus.edge.own_clips.offset.people import People
from isthmus.edge.own_clips.offset.turns import Turns
from isthmus.proto.person import PersonModel

TELLING_CLIPS: Final = 24
"""However many clips a person has, they speak for a hypothesis about classes as at most so many independent ones."""

MOST_HYPOTHESES: Final = 16
"""A device's time and memory grow with them. With more classes, the values of j are the lower half of
them, then in geometric progression."""

EVIDENCE_CLIPS: Final = 10
"""From so many clips on the classes of a person are told by evidence. RavFace's public people gain by it with 12 and
24 clips, of 3 and all classes, and lose with 8 and 4, of 2 and 1 (docs/results/few-classes)."""

OWN_WAY: Final = 0.1
"""Share of S that is a person's own way of a class, the same in all their clips of it. It is about 0.2 on RavFace
(docs/results/person-spread); half of it is believed, because the classes are uncertain. Public people chose so
(docs/log)."""


def estimate(
    logits_MNC: Reals,
    present_NM: Reals,
    raw_NC: Reals,
    model: PersonModel,
    known_NC: Reals | None = None,
    *,
    base_share: float = BASE_SHARE,
    own_way: float = OWN_WAY,
) -> Offset:
    """Estimate one person's offset, and their own ways of the classes, from clips whose labels are unknown.

    ``logits_MNC`` are those of the centred heads, ``present_NM`` is 1 if clip n has modality m, and ``raw_NC`` are the
    answers of the student's ordinary head, from which the estimate starts. A row of ``known_NC`` that sums to 1 is what
    a person said of the clip: it replaces the answer in every turn. Rows of zeros are unknown. Logits of an absent
    modality are ignored. No clips give no offset.

    Raises ValueError for shapes that do not fit, a clip without sound and picture, NaN or infinity, or rows that are no
    distribution.
    """
    classes = model.mean_MCC.shape[-1]
    kept_MNC, here_NM = checked(logits_MNC, present_NM, classes)
    base_NC = distributions(raw_NC, kept_MNC.shape[1], classes, "the raw answers")
    sure_NC = None if known_NC is None else known_answers(known_NC, kept_MNC.shape[1], classes)
    even_C, clips = np.full(classes, 1 / classes), len(base_NC)
    if not clips:
        return Offset(np.zeros((len(kept_MNC), classes)), even_C, 0, model.fusion)
    few = clips < EVIDENCE_CLIPS
    people = [People.of(model, modality, 0.0 if few else own_way) for modality in range(len(kept_MNC))]
    turns = Turns(kept_MNC, here_NM, base_NC, sure_NC, people, model.fusion, base_share)
    if few:
        found = turns.settled(None)
    else:
        rank_C = np.argsort(-turns.settled(even_C[np.newaxis]).count_HC[0], kind="stable")
        size_H = _hypotheses(classes)
        first_HC = np.tri(classes)[size_H - 1][:, np.argsort(rank_C)]  # The first classes by rank.
        prior_HC = (1 - UNIFORM_SHARE) * first_HC / first_HC.sum(axis=1, keepdims=True) + UNIFORM_SHARE / classes
        sets_H = np.array([math.log(math.comb(classes, int(size))) for size in size_H])
        trust = TELLING_CLIPS / (TELLING_CLIPS + clips)
        weight_1H = softmax((trust * turns.evidence(turns.settled(prior_HC)) - sets_H)[np.newaxis])
        found = turns.settled(weight_1H @ prior_HC)
    offset_MC = np.stack([one.offset_HC[0] for one in found.each_M])
    ways = None if few or not own_way else Ways(*turns.ways(found))
    return Offset(offset_MC, found.prior_HC[0], clips, model.fusion, ways)


def _hypotheses(classes: int) -> npt.NDArray[np.int64]:
    """Return how many classes each hypothesis has, rising from one to all."""
    if classes <= MOST_HYPOTHESES:
        return np.arange(1, classes + 1)
    half = MOST_HYPOTHESES // 2
    larger = np.rint(np.geomspace(half + 1, classes, MOST_HYPOTHESES - half)).astype(np.int64)
    return np.unique(np.concatenate([np.arange(1, half + 1), larger]))
