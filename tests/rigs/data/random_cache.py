"""Random clips as a finished folder of the decoded cache."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from isthmus.data.cache.read import FORMAT, FRAMES, INDEX, SPECTROGRAMS, frames_shape, spectrogram_shape
from isthmus.data.transforms import InputSpec


def write_clips(folder: Path, spec: InputSpec, classes: Sequence[str], clips: int) -> None:
    """Write as many clips of noise; their labels take turns."""
    rng = np.random.default_rng(7)
    folder.mkdir(parents=True)
    rng.standard_normal((clips, *spectrogram_shape(spec)), np.float32).tofile(folder / SPECTROGRAMS)
    rng.integers(0, 256, (clips, *frames_shape(spec)), np.uint8).tofile(folder / FRAMES)
    listed = [
        {"name": f"clip{i:02}", "label": i % len(classes), "actor": "1001", "key": f"{i:064x}"} for i in range(clips)
    ]
    index = {"format": FORMAT, "spec": json.loads(spec.to_json()), "classes": classes, "clips": listed, "skipped": []}
    (folder / INDEX).write_text(json.dumps(index))
