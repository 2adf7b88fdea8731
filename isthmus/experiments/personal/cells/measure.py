"""Measurements of a finished student on labelled clips."""

from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from isthmus.distill.models.heads import HeadBank
from isthmus.distill.release import Release
from isthmus.distill.student.discrepancy import proxy_a_distance
from isthmus.distill.student.evaluate import StudentOutputs, accuracy, bank_probabilities
from isthmus.edge.own_clips.habits import Habits
from isthmus.experiments.personal.cells.offline import Trace
from isthmus.proto.codec import pack_frame, unpack_values
from isthmus.proto.messages import Captured, FeatureFrame, Features, NumberType

Floats = npt.NDArray[np.float32]

_LEAST_ROWS: Final = 4
"""With fewer uploaded rows no distance is computed."""


@torch.inference_mode()
def accuracy_on_the_wire(
    bank: HeadBank, outputs: StudentOutputs, labels_N: npt.NDArray[np.int64]
) -> dict[str, dict[str, float]]:
    """Return ratio -> number type -> accuracy. Compressed features go through the codec, as on the wire."""
    table: dict[str, dict[str, float]] = {}
    audio, visual = torch.from_numpy(outputs.audio_ND), torch.from_numpy(outputs.visual_ND)
    for ratio in bank.ratios:
        audio_NW, visual_NW = (side.numpy() for side in bank[ratio].compress(audio, visual))
        table[f"{ratio:g}"] = {
            number_type.value: accuracy(_answers(bank, audio_NW, visual_NW, ratio, number_type), labels_N)
            for number_type in NumberType
        }
    return table


def _answers(bank: HeadBank, audio_NW: Floats, visual_NW: Floats, ratio: float, number_type: NumberType) -> Floats:
    rows, heads = [], bank.frozen()
    for audio_W, visual_W in zip(audio_NW, visual_NW, strict=True):
        packed = pack_frame(FeatureFrame(Features(audio_W, visual_W), ratio, number_type))
        got = unpack_values(packed, feature_width=bank.feature_width, ratios=bank.ratios)
        rows.append(heads.probabilities(got.values_F, got.captured, ratio))
    return np.stack(rows)


def accuracy_by_mask(
    bank: HeadBank, outputs: StudentOutputs, labels_N: npt.NDArray[np.int64], habits: Habits | None = None
) -> dict[str, float]:
    """Return accuracy at ratio 1 by modality, as if nothing else was captured, with ``habits`` applied."""
    shares = {}
    for captured in Captured:
        answers_NC = bank_probabilities(bank, outputs, 1.0, captured)
        if habits is not None:
            answers_NC = habits.answers(answers_NC)
        shares[captured.value] = accuracy(answers_NC, labels_N)
    return shares


def a_distances(release: Release, trace: Trace, seed: int) -> dict[str, float]:
    """Return the proxy A-distance of the upload to the whole public set and to the selection (section 5.4).

    It uses the probabilities, which every upload contains. Empty if too little or nothing was sent.
    """
    if trace.sent is None or len(trace.sent.sizes_K) < _LEAST_ROWS:
        return {}
    sent = trace.sent
    public_NC = np.asarray(release.teacher_outputs.probabilities_NC)
    selected_SC = public_NC[trace.selections[-1].indices_S]
    return {
        name: proxy_a_distance(sent.values_KC, rows, seed=seed, ours_weights_N=sent.sizes_K.astype(np.float64))
        for name, rows in (("public", public_NC), ("selection", selected_SC))
        if len(rows) >= _LEAST_ROWS
    }


def per_class(release: Release, trace: Trace) -> tuple[float, ...]:
    """Return the weight of each class in the last selection, in clips (in a hard selection every weight is 1)."""
    if not trace.selections:
        return ()
    last = trace.selections[-1]
    counts_C = np.bincount(
        release.labels()[last.indices_S], weights=last.weights_S, minlength=len(release.recipe.classes)
    )
    return tuple(float(count) for count in counts_C)
