"""A student's files as patches against the base student's, built at export: kept only where the student stays as it is.

What a patch gives is what the device will run, so it is what is published; the exact weights stay in the cloud. The
cheapest coding of ``LADDER`` is taken with which the patched student, on public clips of its selection, agrees with the
exported one (which agrees with torch, see distill/export.py); where none does, whole files are published.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError

from isthmus.data.stored import ClipArrays
from isthmus.data.transforms import evaluation_frames
from isthmus.proto.errors import InvalidInput
from isthmus.proto.messages import FloatArray, NumberType, patch_name
from isthmus.proto.patch import Span, apply_patch, make_patch

log = logging.getLogger(__name__)

MOST_ERROR: Final = 0.01
"""Relative error, |patched - exported| / |exported| over all clips, of every encoder and compressor."""
LEAST_AGREEMENT: Final = 0.99
"""Share of clips to which every head gives the same class."""
MOST_CLIPS: Final = 128
"""More clips would say little more, and every personalisation waits for it."""
LEAST_VALUES: Final = 256
"""Smaller tensors travel as they are."""

_BATCH_CLIPS: Final = 16


@dataclass(frozen=True)
class Coding:
    """How differences are coded; ``levels`` counts for int8 alone."""

    number_type: NumberType
    levels: int = 127

    def __str__(self) -> str:
        return f"int8 of {self.levels} levels" if self.number_type is NumberType.INT8 else self.number_type.value


LADDER: Final = (
    Coding(NumberType.INT8, 15),
    Coding(NumberType.INT8, 31),
    Coding(NumberType.INT8, 127),
    Coding(NumberType.FP16),
)
"""Cheapest first."""


@dataclass(frozen=True)
class Agreement:
    """Of a patched student with the exported one: the largest relative error, the least share of same answers."""

    error: float
    same_class: float

    @property
    def good(self) -> bool:
        return self.error <= MOST_ERROR and self.same_class >= LEAST_AGREEMENT


def patch_student(files: Sequence[Path], base_dir: Path, clips: ClipArrays) -> list[Path]:
    """Replaces each file that has a patch by what the patch gives; returns all files, with the patches beside them.

    ``clips``: public clips to compare on; evenly spaced ones are taken where they are more than ``MOST_CLIPS``.
    """
    exported = {path.name: path.read_bytes() for path in files}
    bases = {name: found for name, content in exported.items() if (found := _against(base_dir / name, content))}
    if not bases:
        log.info("no patch: no file of the student has the layout of the base student's")
        return list(files)
    subset = clips.subset(np.unique(np.linspace(0, len(clips.names) - 1, MOST_CLIPS).astype(np.int64)))
    expected = answers(exported, subset)
    for coding in LADDER:
        patches, patched = {}, dict(exported)
        for name, (base, weights) in bases.items():
            patch = make_patch(base, exported[name], weights, coding=coding.number_type, levels=coding.levels)
            if len(patch) < len(exported[name]):
                patches[name], patched[name] = patch, apply_patch(base, patch)
        agreement = compare(expected, answers(patched, subset))
        log.info(
            "patches in %s: %d bytes for files of %d; error %.2g, same class %.1f %%: %s",
            coding,
            sum(map(len, patches.values())),
            sum(len(exported[name]) for name in patches),
            agreement.error,
            100 * agreement.same_class,
            "taken" if agreement.good else "not good enough",
        )
        if agreement.good:
            return _write(files, patches, patched)
    log.info("no patch: none agrees well enough with the exported student")
    return list(files)


def weight_spans(content: bytes) -> list[Span]:
    """Where an ONNX file holds float32 initialisers of some size, rising; a row is an output channel (the first axis).

    Raises InvalidInput for what is no ONNX file.
    """
    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as error:
        raise InvalidInput("not an ONNX file") from error
    spans, position = [], 0
    for tensor in model.graph.initializer:
        values = len(tensor.raw_data) // 4
        if tensor.data_type != onnx.TensorProto.FLOAT or values < LEAST_VALUES:
            continue
        # protobuf writes the initialisers in their order, so the next one stands after the last.
        offset = content.find(tensor.raw_data, position)
        spans.append(Span(offset, values, tensor.dims[0] if len(tensor.dims) > 1 else 1))
        position = offset + 4 * values
    return spans


def answers(files: Mapping[str, bytes], clips: ClipArrays) -> dict[str, FloatArray]:
    """What each file gives on the clips, by its name and output: heads and compressors get these encoders' features."""
    rows = range(len(clips.names))
    spectrograms = (clips.spectrograms_NFT[row] for row in rows)
    frames = (evaluation_frames(clips.frames_NKHWC[row], clips.spec) for row in rows)
    encoded = {
        "audio_encoder.onnx": _encoded(files["audio_encoder.onnx"], spectrograms),
        "visual_encoder.onnx": _encoded(files["visual_encoder.onnx"], frames),
    }
    made = dict(encoded)
    for name in sorted(files.keys() - encoded.keys()):
        session = _session(files[name])
        feed = dict(zip([node.name for node in session.get_inputs()], encoded.values(), strict=True))
        for node, values in zip(session.get_outputs(), session.run(None, feed), strict=True):
            made[f"{name}/{node.name}"] = values
    return made


def compare(expected: Mapping[str, FloatArray], got: Mapping[str, FloatArray]) -> Agreement:
    """Of two students' ``answers`` on the same clips."""
    errors, same = [0.0], [1.0]
    for name, expected_NX in expected.items():
        if "_head.onnx" in name:
            same.append(float((expected_NX.argmax(axis=1) == got[name].argmax(axis=1)).mean()))
        else:
            scale = float(np.linalg.norm(expected_NX))
            errors.append(float(np.linalg.norm(got[name] - expected_NX)) / (scale or 1.0))
    return Agreement(max(errors), min(same))


def _against(base_path: Path, content: bytes) -> tuple[bytes, list[Span]] | None:
    """The base's file and the spans of weights, where the two have the same layout and are not the same."""
    base = base_path.read_bytes() if base_path.is_file() else b""
    if len(base) != len(content) or base == content:
        return None
    try:
        spans = weight_spans(content)
        return (base, spans) if spans and spans == weight_spans(base) else None
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


def _encoded(content: bytes, clips: Iterable[FloatArray]) -> FloatArray:
    session = _session(content)
    (node,) = session.get_inputs()
    outputs = [session.run(None, {node.name: np.stack(batch)})[0] for batch in _batches(clips)]
    return np.concatenate(outputs)


def _batches(clips: Iterable[FloatArray]) -> Iterator[list[FloatArray]]:
    batch: list[FloatArray] = []
    for clip in clips:
        batch.append(np.asarray(clip, np.float32))
        if len(batch) == _BATCH_CLIPS:
            yield batch
            batch = []
    if batch:
        yield batch


def _session(content: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
