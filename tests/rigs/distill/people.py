"""Person models of invented people, for tests that need one without fitting it."""

import numpy as np

from isthmus.proto.person import MODALITIES, Centred, CentredHeads, PersonModel


def person_model(classes: int, width: int, seed: int = 0) -> Centred:
    """Return random heads of this size, and people who differ as much as their clips do."""
    rng = np.random.default_rng(seed)
    spread_MCC = rng.standard_normal((MODALITIES, classes, classes + 2)).astype(np.float32)
    covariance_MCC = spread_MCC @ spread_MCC.transpose(0, 2, 1)
    return Centred(
        CentredHeads(
            weights_MCD=rng.standard_normal((MODALITIES, classes, width)).astype(np.float32),
            bias_MC=rng.standard_normal((MODALITIES, classes)).astype(np.float32),
            centre_MD=rng.standard_normal((MODALITIES, width)).astype(np.float32),
            spread_MD=rng.uniform(0.5, 2, (MODALITIES, width)).astype(np.float32),
        ),
        PersonModel(
            mean_MCC=np.stack([2 * np.eye(classes, dtype=np.float32)] * MODALITIES),
            between_MCC=covariance_MCC,
            within_MCC=covariance_MCC,
            fusion=0.75,
            people=10,
        ),
    )
