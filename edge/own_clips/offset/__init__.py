"""PURE: how one person differs from others: estimated from their clips without labels, taken out of their answers."""

from isthmus.edge.own_clips.offset.answers import BASE_SHARE, Offset, Ways, answer, corrected, mixed, scores
from isthmus.edge.own_clips.offset.hypotheses import estimate

__all__ = ["BASE_SHARE", "Offset", "Ways", "answer", "corrected", "estimate", "mixed", "scores"]
