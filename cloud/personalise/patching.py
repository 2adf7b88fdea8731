"""Patches of a student's files against the base student, built at export and kept only if the student stays the same.

The device runs the patched file, so the patched file is published. Each float32 file gets the cheapest coding of
``LADDER`` with which it agrees with the exported file on public clips of the selection (the exported file agrees with
torch, see distill/student/export.py). If no coding does, the whole file is published. Encoders in int8 get exact
patches: a personal student's int8 weights differ from the base student's by a few steps at most.
"""

import functools
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from google.protobuf.message import DecodeError

from isthmus.data.cache.read import ClipArrays
from isthmus.distill.student.export import ENCODERS, encoder_inputs
from isthmus.proto.errors import InvalidInput
from isthmus.proto.messages import FloatArray, patch_name
from isthmus.proto.patch import Differences, Span, apply_patch, make_patch

log = logging.getLogger(__name__)

MOST_ERROR: Final = 0.01
"""Relative error of a file's outputs: |patched - exported| / |exported| over all clips."""
LEAST_AGREEMENT: Final = 0.99
"""Share of clips for which each head, on the device and in the cloud, gives the same class."""
MOST_CLIPS: Final = 128
"""More clips would add little, and each personalisation waits for this comparison."""
LEAST_VALUES: Final = 64
"""Smaller tensors are sent unchanged."""

_BATCH_CLIPS: Final = 16


@dataclass(frozen=True)
class Coding:
    """How differences are coded. ``levels`` applies to int8 only."""

    differences: Differences
    levels: int = 127

    def __str__(self) -> str:
        if self.differences is Differences.INT8:
            return f"int8 of {self.levels} levels"
        return "exact bytes" if self.differences is Differences.BYTES else "fp16"


LADDER: Final = (
    Coding(Differences.INT8, 15),
    Coding(Differences.INT8, 31),
    Coding(Differences.INT8, 63),
    Coding(Differences.INT8, 127),
    Coding(Differences.FP16),
)
"""For float32 weights; cheapest first."""
EXACT: Final = Coding(Differences.BYTES)
"""For int8 weights."""


Classify = Callable[[str, Sequence[FloatArray]], npt.NDArray[np.int64]]
"""From a compressor's file name and its two outputs to the classes (N,) given by the cloud's head of that ratio."""


def patch_student(files: Sequence[Path], base_dir: Path, clips: ClipArrays, *, classify: Classify) -> list[Path]:
    """Replace each file that has a patch by the patched file. Returns all files, patches included.

    ``clips``: public clips to compare on. If there are more than ``MOST_CLIPS``, evenly spaced ones are used. Each file
    gets the cheapest coding with which its outputs are close enough to those of the exported file on the same inputs.
    If the student as a whole then answers differently, the cheapest codings are abandoned one after the other. Patches
    of int8 encoders are exact, so these stay in any case.
    """
    exported = {path.name: path.read_bytes() for path in files}
    bases = {name: found for name, content in exported.items() if (found := _against(base_dir / name, content))}
    if not bases:
        log.info("no patch: no file of the student has the same layout as the base student's")
        return list(files)
    world = _World(
        exported, classify, clips.subset(np.unique(np.linspace(0, len(clips.names) - 1, MOST_CLIPS).astype(np.int64)))
    )

    @functools.cache
    def coded(name: str, coding: Coding) -> tuple[bytes, bytes, float]:
        base, weights, _ = bases[name]
        patch = make_patch(base, exported[name], weights, coding=coding.differences, levels=coding.levels)
        content = apply_patch(base, patch)
        return patch, content, world.error(name, content)

    for first in range(len(LADDER) + 1):
        chosen: dict[str, Coding] = {}
        for name, (_, _, ladder) in bases.items():
            for coding in (EXACT,) if ladder == (EXACT,) else ladder[first:]:
                patch, _, error = coded(name, coding)
                if error <= MOST_ERROR and len(patch) < len(exported[name]):
                    chosen[name] = coding
                    break
        patched = {name: coded(name, coding)[1] for name, coding in chosen.items()}
        same_class = world.same_class({**exported, **patched})
        if chosen and same_class >= LEAST_AGREEMENT:
            for name, coding in chosen.items():
                patch, _, error = coded(name, coding)
                sizes = len(patch), len(exported[name])
                log.info("%s: a patch in %s, %d bytes for %d, relative error %.2g", name, coding, *sizes, error)
            log.info("the patched student gives %.1f %% of the clips the same class", 100 * same_class)
            return _write(files, {name: coded(name, coding)[0] for name, coding in chosen.items()}, patched)
    log.info("no patch: none is close enough to the exported student")
    return list(files)


def weight_spans(content: bytes) -> tuple[list[Span], tuple[Coding, ...]]:
    """Find the weights of an ONNX file with ``LEAST_VALUES`` or more values, in rising order, and their codings.

    These are the int8 initialisers of two dimensions or more, or if there are none the float32 ones. A row is an output
    channel (the first axis). Raises InvalidInput if the content is not an ONNX file with its weights inside.
    """
    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as error:
        raise InvalidInput("not an ONNX file") from error
    tensors = model.graph.initializer
    in_int8 = [each for each in tensors if each.data_type == onnx.TensorProto.INT8 and len(each.dims) > 1]
    of_float = [each for each in tensors if each.data_type == onnx.TensorProto.FLOAT]
    spans, position, width = [], 0, 1 if in_int8 else 4
    for tensor in in_int8 or of_float:
        values = len(tensor.raw_data) // width
        if values < LEAST_VALUES:
            continue
        # protobuf writes the initialisers in order, so the next one follows the last.
        offset = content.find(tensor.raw_data, position)
        if offset < 0:
            raise InvalidInput("an ONNX file whose weights are not where they are listed")
        spans.append(Span(offset, values, tensor.dims[0] if len(tensor.dims) > 1 else 1))
        position = offset + width * values
    return spans, (EXACT,) if in_int8 else LADDER


class _World:
    """The clips, and the exported student's outputs on them."""

    def __init__(self, exported: Mapping[str, bytes], classify: Classify, clips: ClipArrays) -> None:
        self._classify = classify
        self._clips = clips
        self._encoded: dict[bytes, FloatArray] = {}
        self._features = [self._encode(name, exported[name]) for name in ENCODERS]
        self._expected = {name: self._run(name, content, self._features) for name, content in exported.items()}

    def error(self, name: str, content: bytes) -> float:
        """Return the largest |this - exported| / |exported| over a file's outputs, on the exported student's inputs."""
        pairs = zip(self._expected[name], self._run(name, content, self._features), strict=True)
        return max(float(np.linalg.norm(got - known) / (np.linalg.norm(known) or 1.0)) for known, got in pairs)

    def same_class(self, files: Mapping[str, bytes]) -> float:
        """Return the share of clips with the same class as from the exported student.

        This is the least over the heads on the device and those in the cloud.
        """
        features = [self._encode(name, files[name]) for name in ENCODERS]
        return min(
            float(
                (
                    self._class(name, self._run(name, content, features)) == self._class(name, self._expected[name])
                ).mean()
            )
            for name, content in files.items()
            if name not in ENCODERS
        )

    def _class(self, name: str, outputs: Sequence[FloatArray]) -> npt.NDArray[np.int64]:
        return outputs[0].argmax(axis=1) if name.endswith("_head.onnx") else self._classify(name, outputs)

    def _run(self, name: str, content: bytes, features: Sequence[FloatArray]) -> list[FloatArray]:
        if name in ENCODERS:
            return [self._encode(name, content)]
        session = _session(content)
        # A head also needs to know which modalities are present: here both.
        given = [*features, np.ones((len(features[0]), 2), np.float32)]
        feed = dict(zip([node.name for node in session.get_inputs()], given, strict=False))
        outputs: list[FloatArray] = session.run(None, feed)
        return outputs

    def _encode(self, name: str, content: bytes) -> FloatArray:
        key = hashlib.sha256(content).digest()
        if key not in self._encoded:
            session = _session(content)
            (node,) = session.get_inputs()
            batches = encoder_inputs(name, self._clips, _BATCH_CLIPS)
            self._encoded[key] = np.concatenate([session.run(None, {node.name: batch})[0] for batch in batches])
        return self._encoded[key]


def _against(base_path: Path, content: bytes) -> tuple[bytes, list[Span], tuple[Coding, ...]] | None:
    """Return the base's file, its spans of weights and their codings, if both files have the same layout and differ."""
    base = base_path.read_bytes() if base_path.is_file() else b""
    if len(base) != len(content) or base == content:
        return None
    try:
        spans, ladder = weight_spans(content)
        return (base, spans, ladder) if spans and (spans, ladder) == weight_spans(base) else None
    except InvalidInput:
        return None


def _write(files: Sequence[Path], patches: Mapping[str, bytes], patched: Mapping[str, bytes]) -> list[Path]:
    written = list(files)
    for path in files:
        if path.name in patches:
            path.write_bytes(patched[path.name])
            beside = path.with_name(patch_name(path.name))
            beside.write_bytes(patches[path.name])
            written.append(beside)
    return sorted(written)


def _session(content: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
