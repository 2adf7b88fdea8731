"""PURE. Choose the public samples on which a device's student is distilled, and weight them.

A strategy maps the device's upload and the public set to a weighted choice. ``STRATEGIES`` holds the strategies that a
recipe may name. ``cosine`` is the paper's (Eq. 5.5, SelectData of Alg. 7); the others are ours.
"""

from typing import Final

from isthmus.distill.selection.controls import class_oracle, everything, random
from isthmus.distill.selection.density import density_ratio
from isthmus.distill.selection.interface import FeatureRows, Public, Selection, Strategy, Wanted
from isthmus.distill.selection.quota import quota
from isthmus.distill.selection.transport import transport
from isthmus.distill.selection.turns import cosine, round_robin, select_cosine

STRATEGIES: Final[dict[str, Strategy]] = {
    "cosine": cosine,
    "random": random,
    "all": everything,
    "round_robin": round_robin,
    "quota": quota,
    "transport": transport,
    "density_ratio": density_ratio,
}

__all__ = [
    "STRATEGIES",
    "FeatureRows",
    "Public",
    "Selection",
    "Strategy",
    "Wanted",
    "class_oracle",
    "cosine",
    "density_ratio",
    "everything",
    "quota",
    "random",
    "round_robin",
    "select_cosine",
    "transport",
]
