"""Draws a profile: accuracy and throughput by gamma, throughput by batch size, similarity of tokens by layer.

The content is that of figures 3.3, 3.4, 3.7 and 3.8 of J. Chen's thesis (PolyU, 2025).
"""

from collections.abc import Sequence
from pathlib import Path

from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.data.files import write_atomically
from isthmus.distill.figures import png


def draw(profile: Profile, similarity_L: Sequence[float], path: Path) -> None:
    """Writes four plots side by side as one PNG file. ``similarity_L`` may be empty."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(18, 4))
    by_gamma, rates, by_size, by_layer = figure.subplots(1, 4)
    for task, shares in profile.accuracy.items():
        able = [gamma for gamma in profile.gammas if gamma <= 0 or shares[gamma] > 0]
        by_gamma.plot(able, [100 * shares[gamma] for gamma in able], marker="o", label=task)
    by_gamma.set(xlabel="gamma", ylabel="accuracy, %", title="Accuracy")
    if profile.accuracy:
        by_gamma.legend()
    rates.plot(profile.gammas, [profile.capacity_per_s(gamma) for gamma in profile.gammas], marker="o")
    rates.set(xlabel="gamma", ylabel="images/s", title="Throughput at the best batch size")
    for gamma in profile.gammas:
        by_size.plot(
            profile.sizes, [profile.capacity_per_s(gamma, size) for size in profile.sizes], marker=".", label=str(gamma)
        )
    by_size.set(xlabel="batch size", ylabel="images/s", title="Throughput by batch size", xscale="log")
    by_size.legend(title="gamma", fontsize="small")
    by_layer.plot(range(len(similarity_L)), similarity_L, marker="o")
    by_layer.set(xlabel="layer", ylabel="mean cosine of keys", title="Similarity of tokens")
    for axis in (by_gamma, rates, by_size, by_layer):
        axis.grid(alpha=0.3)
    key = profile.key
    figure.suptitle(f"{key.processor}, {key.device}, {key.threads} threads, {key.number_type}")
    figure.tight_layout()
    write_atomically(path, png(figure))
