"""A cell's student as a device that has learned its user: invented people whose clips are all shifted alike."""

import numpy as np

from isthmus.distill.student.centred import fit_centred
from isthmus.distill.student.evaluate import StudentOutputs, accuracy
from isthmus.experiments.personal.cells.offset import accuracy_with_offset

CLASSES, WIDTH, PEOPLE, EACH = 3, 6, 10, 8


def test_the_offset_of_a_shifted_user_is_taken_out() -> None:
    rng = np.random.default_rng(0)
    class_MCD = 2 * rng.standard_normal((2, CLASSES, WIDTH))

    def clips(shift_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        labels_N = np.repeat(np.arange(CLASSES), EACH)
        noise_MND = rng.standard_normal((2, len(labels_N), WIDTH))
        return (class_MCD[:, labels_N] + shift_MD[:, np.newaxis] + noise_MND).astype(np.float32), labels_N

    shifts = 2 * rng.standard_normal((PEOPLE + 4, 2, WIDTH))
    public = [clips(shift_MD) for shift_MD in shifts[:PEOPLE]]
    features_MND = np.concatenate([features for features, _ in public], axis=1)
    labels_N = np.concatenate([labels for _, labels in public])
    names = tuple(f"p{number}" for number in range(PEOPLE) for _ in range(CLASSES * EACH))
    made = fit_centred(features_MND, np.ones((len(labels_N), 2)), labels_N, names)

    def outputs(features_MND: np.ndarray) -> StudentOutputs:
        logits_NC = made.heads.logits(features_MND).sum(axis=0)  # for the average person
        powers_NC = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
        return StudentOutputs(*features_MND, powers_NC / powers_NC.sum(axis=1, keepdims=True))

    before, after = [], []
    for shift_MD in shifts[PEOPLE:]:
        own, tested = clips(shift_MD), clips(shift_MD)
        before.append(accuracy(outputs(tested[0]).probabilities_NC, tested[1]))
        after.append(accuracy_with_offset(made, outputs(own[0]), outputs(tested[0]), tested[1]))
    assert np.mean(after) > np.mean(before) + 0.05
