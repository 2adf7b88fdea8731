"""A student's encoders in int8, compared with float32 on public clips and kept only if they answer as well.

If both together lose too much, one of them alone may be int8: of five weak students of RavFace, the encoder of sound
lost nearly all that was lost (docs/results/person-int8_2026-11-30.md).

Weights are int8 per output channel, activations uint8, with ranges from public clips (static quantisation, QDQ format;
Nagel et al., A White Paper on Neural Network Quantization, 2021, sections 2.4 and 3). Weights use 7 of the 8 bits:
processors with AVX2 and without VNNI add pairs of products in 16 bits, which saturate with 8, so the answers measured
here would not be theirs (ONNX Runtime's documentation of quantisation, "reduce_range"). Heads and compressors are small
and stay float32. Heads and the person model are fitted on float32 features, and are judged here on the features that
the device will have.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quant_pre_process, quantize_static

from isthmus.data.cache.read import ClipArrays
from isthmus.data.class_shares import softmax
from isthmus.data.files import write_atomically
from isthmus.distill.models.heads import HeadBank
from isthmus.distill.release import Release
from isthmus.distill.selection import Selection
from isthmus.distill.student.evaluate import StudentOutputs, accuracy, bank_probabilities
from isthmus.distill.student.export import AUDIO_ENCODER, ENCODERS, VISUAL_ENCODER, encoder_inputs
from isthmus.distill.student.measure import FEWEST_CLIPS, measure_outputs, measured_rows
from isthmus.distill.training.teacher_cache import head_probabilities
from isthmus.proto.convert_person import centred_from_bytes
from isthmus.proto.messages import PublicMeasure
from isthmus.proto.person import Centred

INT8_FILE: Final = "int8.json"
"""In the base student's folder, if the recipe asks for int8: what it costs (Int8Measure)."""
CALIBRATION_CLIPS: Final = 128
"""Clips whose activations give the ranges. They are shown one after the other, so each must fit into memory alone."""
MOST_LOSS: Final = 0.01
"""Accuracy that int8 may cost on public clips, in the mean over the student's heads; one clip may be lost anyway."""
LEAST_AGREEMENT: Final = 0.95
"""Share of public clips for which int8 and float32 must give the same class, at every head."""

_SENSES: Final = {AUDIO_ENCODER: "the encoder of sound", VISUAL_ENCODER: "the encoder of pictures"}
_PERSON: Final = -1.0
"""Stands for the heads of the person model, where others are named by their compression ratio."""
_BATCH_CLIPS: Final = 8


@dataclass(frozen=True)
class Int8Measure:
    """What int8 costs on ``clips`` public clips. ``used``: whether it was little enough.

    Accuracies are means over the heads, ``agreement`` is the least over the heads; sizes are those of both encoders.
    ``encoders``: the files that are int8, or both if it was too much in any case; the figures are of these.
    """

    used: bool
    clips: int
    fp32_accuracy: float
    int8_accuracy: float
    agreement: float
    fp32_bytes: int
    int8_bytes: int
    encoders: tuple[str, ...] = ENCODERS

    def __str__(self) -> str:
        sizes = f"{self.int8_bytes / 1e6:.1f} MB in place of {self.fp32_bytes / 1e6:.1f}"
        told = (
            f"accuracy {self.int8_accuracy:.1%} in place of {self.fp32_accuracy:.1%}, the same class for "
            f"{self.agreement:.1%} of {self.clips} public clips, {sizes}"
        )
        if self.used and len(self.encoders) == 1:
            return f"{_SENSES[self.encoders[0]]} alone in int8, because both lose too much: {told}"
        if self.used:
            return f"encoders in int8: {told}"
        return (
            f"encoders stay float32, because int8 loses too much: {told} (allowed: {MOST_LOSS:.1%} of accuracy, "
            f"{LEAST_AGREEMENT:.0%} the same class)"
        )


def quantise_student(
    release: Release, folder: Path, heads: HeadBank | None, selection: Selection, person: bytes | None = None
) -> tuple[Int8Measure, PublicMeasure | None]:
    """Replace the exported encoders in ``folder`` by int8 ones, both or one, if these answer public clips as well.

    ``heads`` None: an interim student, which is judged by the teacher's head. ``selection``: the clips that the student
    was distilled on; it is calibrated on these, and judged on others as far as there are enough. ``person`` is its
    person model as the manifest holds it; its heads are judged with each public person's own shift taken out, as a
    device that has learned its user answers.

    The second result is what the manifest tells of the student in int8; None if it stays float32, or has no heads.
    Raises ValueError if no public clip has a label.
    """
    public, labels_N = release.public, release.labels()
    chosen = np.sort(selection.indices_S)
    calibration = np.unique(chosen[np.linspace(0, len(chosen) - 1, CALIBRATION_CLIPS).astype(np.int64)])
    rows = measured_rows(labels_N, selection.indices_S)
    others = np.setdiff1d(rows, calibration)
    rows = others if len(others) >= FEWEST_CLIPS else rows
    small = {name: folder / f"int8.{name}" for name in ENCODERS}
    for name, path in small.items():
        quantise_encoder(folder / name, path, encoder_inputs(name, public.subset(calibration), 1))
    clips = public.subset(rows)
    classes, width = len(release.recipe.classes), release.recipe.feature_width
    centred = None if person is None else centred_from_bytes(person, classes, width)

    def answered(outputs: StudentOutputs) -> dict[float, npt.NDArray[np.float32]]:
        told = _answers(heads, outputs)
        return told if centred is None else told | {_PERSON: _learned(centred, outputs, clips.actors)}

    exact = encoded_by(folder / AUDIO_ENCODER, folder / VISUAL_ENCODER, release, clips)
    rounded = encoded_by(small[AUDIO_ENCODER], small[VISUAL_ENCODER], release, clips)
    sizes = {name: ((folder / name).stat().st_size, path.stat().st_size) for name, path in small.items()}
    by_exact = answered(exact)

    def judged(encoders: tuple[str, ...]) -> tuple[Int8Measure, StudentOutputs]:
        outputs = _mixed(release, exact, rounded, encoders)
        told = answered(outputs)
        before, after = (
            float(np.mean([accuracy(each_NC, labels_N[rows]) for each_NC in by_head.values()]))
            for by_head in (by_exact, told)
        )
        same = min(float((by_exact[key].argmax(axis=1) == told[key].argmax(axis=1)).mean()) for key in told)
        used = before - after <= max(MOST_LOSS, 1 / len(rows)) + 1e-9 and same >= LEAST_AGREEMENT
        whole = sum(exact_bytes for exact_bytes, _ in sizes.values())
        spared = sum(sizes[name][0] - sizes[name][1] for name in encoders)
        return Int8Measure(used, len(rows), before, after, same, whole, whole - spared, encoders), outputs

    made, outputs = both = judged(ENCODERS)
    for name in () if made.used else sorted(ENCODERS, key=lambda name: sizes[name][1] - sizes[name][0]):
        made, outputs = judged((name,))
        if made.used:
            break
    else:
        made, outputs = both
    for name, path in small.items():
        if made.used and name in made.encoders:
            path.replace(folder / name)
        else:
            path.unlink()
    return made, measure_outputs(release, heads, selection, rows, outputs) if made.used and heads is not None else None


def write_measure(made: Int8Measure, folder: Path) -> None:
    write_atomically(folder / INT8_FILE, json.dumps(asdict(made), indent=1) + "\n")


def read_measure(folder: Path) -> Int8Measure | None:
    """Return what ``write_measure`` has written; None if the student was never to be int8."""
    path = folder / INT8_FILE
    if not path.is_file():
        return None
    raw = json.loads(path.read_text())
    return Int8Measure(**{**raw, "encoders": tuple(raw.get("encoders", ENCODERS))})


def _answers(heads: HeadBank | None, outputs: StudentOutputs) -> dict[float, npt.NDArray[np.float32]]:
    if heads is None:
        return {0.0: outputs.probabilities_NC}
    return {ratio: bank_probabilities(heads, outputs, ratio) for ratio in heads.ratios}


def _mixed(
    release: Release, exact: StudentOutputs, rounded: StudentOutputs, encoders: tuple[str, ...]
) -> StudentOutputs:
    """Return the outputs of a student of which only ``encoders`` are in int8."""
    audio_ND = (rounded if AUDIO_ENCODER in encoders else exact).audio_ND
    visual_ND = (rounded if VISUAL_ENCODER in encoders else exact).visual_ND
    return StudentOutputs(audio_ND, visual_ND, head_probabilities(release.teacher_head, audio_ND, visual_ND))


def _learned(centred: Centred, outputs: StudentOutputs, persons_N: Sequence[str]) -> npt.NDArray[np.float32]:
    """Return the answers (N, C) of the person model's heads, with the mean shift of each named person taken out.

    A device estimates this shift from its own clips (edge/own_clips/offset); here it is each person's mean.
    """
    logits_MNC = centred.heads.logits(np.stack([outputs.audio_ND, outputs.visual_ND]))
    everyone_MC, names_N = logits_MNC.mean(axis=1), np.array(persons_N)
    for name in sorted(set(persons_N) - {""}):
        own_N = names_N == name
        logits_MNC[:, own_N] += (everyone_MC - logits_MNC[:, own_N].mean(axis=1))[:, np.newaxis]
    answers_NC: npt.NDArray[np.float32] = softmax(centred.person.fusion * logits_MNC.sum(axis=0)).astype(np.float32)
    return answers_NC


def quantise_encoder(path: Path, out_path: Path, calibration: Iterator[npt.NDArray[np.float32]]) -> Path:
    """Quantise an encoder file to static int8. ``calibration`` yields batches of its one input."""
    name = _session(path).get_inputs()[0].name

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # untyped base
        def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
            batch = next(calibration, None)
            return None if batch is None else {name: batch}

    prepared = out_path.with_name(out_path.name + ".prepared")
    try:
        # ONNX Runtime's symbolic shape inference fails on the exported visual encoder's Reshape.
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            out_path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
            reduce_range=True,
        )
    finally:
        prepared.unlink(missing_ok=True)
    model = onnx.load_model(out_path)
    _give_a_layout(model.graph)
    onnx.save_model(model, out_path)
    return out_path


def _give_a_layout(graph: onnx.GraphProto) -> None:
    """Order the nodes, number the values and write every initialiser as raw bytes, in place.

    Files of one architecture then have one layout, as patches need it (proto/patch.py). Otherwise order and names
    follow a counter in torch's export, defaults are written or not, and lists of numbers take more or fewer bytes.
    """
    maker = {name: node for node in graph.node for name in node.output if name}  # "" is an output that nobody wants
    ordered: list[onnx.NodeProto] = []
    emitted: set[int] = set()
    asked = [(maker[value.name], False) for value in reversed(graph.output)]
    while asked:
        node, inputs_done = asked.pop()
        if id(node) in emitted:
            continue
        if inputs_done:
            emitted.add(id(node))
            ordered.append(node)
        else:
            asked.append((node, True))
            asked += [(maker[name], False) for name in reversed(node.input) if name in maker]
    known = {value.name: value.name for value in (*graph.input, *graph.output)}

    def numbered(name: str) -> str:
        return known.setdefault(name, f"v{len(known)}") if name else ""

    for node in ordered:
        node.ClearField("name")
        node.ClearField("doc_string")
        kept = sorted((each for each in node.attribute if not _is_default(each)), key=lambda each: each.name)
        attributes = [onnx.AttributeProto.FromString(each.SerializeToString()) for each in kept]
        del node.attribute[:]
        node.attribute.extend(attributes)
        node.input[:] = [numbered(name) for name in node.input]
        node.output[:] = [numbered(name) for name in node.output]
    place = {name: number for number, name in enumerate(known)}
    used = sorted((each for each in graph.initializer if each.name in known), key=lambda each: place[each.name])
    raw = [numpy_helper.from_array(numpy_helper.to_array(each), known[each.name]) for each in used]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.ClearField("doc_string")
    graph.node.extend(copies)
    graph.initializer.extend(raw)


def _is_default(attribute: onnx.AttributeProto) -> bool:
    """Return whether an attribute says what ONNX assumes without it; ONNX Runtime's optimiser writes these two."""
    return (attribute.name, attribute.s, attribute.i) in (("auto_pad", b"NOTSET", 0), ("storage_order", b"", 0))


def encoded_by(audio: Path, visual: Path, release: Release, clips: ClipArrays) -> StudentOutputs:
    """Return what a device with these encoder files computes of clips."""
    features: list[npt.NDArray[np.float32]] = []
    for name, path in ((AUDIO_ENCODER, audio), (VISUAL_ENCODER, visual)):
        session = _session(path)
        (node,) = session.get_inputs()
        batches: Sequence[Any] = [
            session.run(None, {node.name: batch})[0] for batch in encoder_inputs(name, clips, _BATCH_CLIPS)
        ]
        features.append(np.concatenate(batches))
    audio_ND, visual_ND = features
    return StudentOutputs(audio_ND, visual_ND, head_probabilities(release.teacher_head, audio_ND, visual_ND))


def _session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
