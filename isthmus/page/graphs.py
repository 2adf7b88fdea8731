"""The preparation of clips as ONNX graphs, so that a browser computes what ``transforms`` computes.

Both graphs are made from an ``InputSpec`` and from the constants and windows of ``transforms``; a test compares them
with it. They need the package ``onnx``, which a device has only with its page.

Axes as in ``transforms``; N windows of the waveform, S side of a square picture in pixels.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from isthmus.data.transforms import (
    IMAGENET_DEVIATION,
    IMAGENET_MEAN,
    LOG_FLOOR,
    MEL_LOUDNESS,
    InputSpec,
    mel_bands,
    tukey,
)

OPSET: Final = 17
IR_VERSION: Final = 8
WAVEFORM: Final = "waveform_T"
SPECTROGRAM: Final = "spectrogram_1FT"
PICTURE: Final = "picture_SS3"
FRAME: Final = "frame_3HW"


def spectrogram_graph(spec: InputSpec) -> bytes:
    """Return an ONNX model from a waveform (spec.samples,) to its spectrogram (1, bins, columns), both float32.

    The waveform must have spec.samples samples, as ``fitted`` makes them; it is clipped to [-1, 1]. The spectrogram is
    that of ``transforms.spectrogram``. Raises ImportError without the package ``onnx``.
    """
    graph = _Graph()
    clipped = graph.add("Clip", WAVEFORM, graph.of(-1.0), graph.of(1.0))
    if spec.mel:
        square = graph.add("ReduceMean", graph.add("Mul", *[graph.double(clipped)] * 2), keepdims=0)
        loudness = graph.add("Max", graph.add("Sqrt", square), graph.of(1e-6, np.float64))
        gain = graph.single(graph.add("Div", graph.of(MEL_LOUDNESS, np.float64), loudness))
        clipped = graph.add("Mul", clipped, gain)
    count = spec.native_shape[1]
    places_NW = np.arange(count)[:, np.newaxis] * spec.hop + np.arange(spec.window)
    windows = graph.add("Gather", clipped, graph.of(places_NW, np.int64))
    if spec.mel:
        hann_W = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(spec.window) / spec.window)
        weighted = graph.add("Mul", windows, graph.of(hann_W))
    else:
        centred = graph.add("Sub", windows, graph.add("ReduceMean", windows, axes=[1]))
        weighted = graph.add("Mul", centred, graph.of(tukey(spec.window)))
    spectra_NF2 = graph.add("DFT", graph.add("Unsqueeze", weighted, graph.of([2], np.int64)), axis=1, onesided=1)
    power_NF = graph.add("ReduceSum", graph.add("Mul", spectra_NF2, spectra_NF2), graph.of([2], np.int64), keepdims=0)
    if spec.mel:
        bands_BF = mel_bands(spec.spectrogram_bins, spec.window, spec.sample_rate_hz)
        made = graph.add("MatMul", graph.of(bands_BF), graph.add("Transpose", power_NF, perm=[1, 0]))
    else:
        made = _standardised(graph, graph.add("Mul", power_NF, graph.of(_density(spec))), spec)
    graph.add("Unsqueeze", made, graph.of([0], np.int64), out=SPECTROGRAM)
    shape = [1, spec.spectrogram_bins, spec.spectrogram_columns]
    return graph.model("spectrogram", (WAVEFORM, "FLOAT", [spec.samples]), (SPECTROGRAM, "FLOAT", shape))


def _density(spec: InputSpec) -> npt.NDArray[np.float64]:
    """Return what makes a one-sided power spectral density of each squared magnitude (F,)."""
    scale = 1.0 / (spec.sample_rate_hz * float(np.square(tukey(spec.window), dtype=np.float64).sum()))
    density_F = np.full(spec.native_shape[0], 2.0 * scale)
    density_F[0] = scale
    if spec.window % 2 == 0:
        density_F[-1] = scale
    return density_F


def _standardised(graph: "_Graph", power_NF: str, spec: InputSpec) -> str:
    power_FT = graph.add("Transpose", power_NF, perm=[1, 0])
    bins, columns = spec.native_shape
    if (bins, columns) != (spec.spectrogram_bins, spec.spectrogram_columns):
        rows = graph.of(_area_weights(bins, spec.spectrogram_bins))
        across = graph.of(_area_weights(columns, spec.spectrogram_columns).T)
        power_FT = graph.add("MatMul", graph.add("MatMul", rows, power_FT), across)
    log_FT = graph.double(graph.add("Log", graph.add("Add", power_FT, graph.of(LOG_FLOOR))))
    around_FT = graph.add("Sub", log_FT, graph.add("ReduceMean", log_FT, keepdims=1))
    variance = graph.add("ReduceMean", graph.add("Mul", around_FT, around_FT), keepdims=1)
    deviation = graph.add("Add", graph.add("Sqrt", variance), graph.of(1e-9, np.float64))
    return graph.single(graph.add("Div", around_FT, deviation))


def picture_graph(spec: InputSpec) -> bytes:
    """Return an ONNX model from a square RGB picture to one frame of the visual encoder.

    Input: uint8 (S, S, 3) of any side S. Output: float32 (3, frame_px, frame_px), as ``evaluation_frames`` makes it of
    what ``stored_frame`` makes of the picture. Both resize to whole levels; a level may differ by one. Raises
    ImportError without the package ``onnx``.
    """
    graph = _Graph()
    side = graph.add("Gather", graph.add("Shape", PICTURE), graph.of(0, np.int64))
    levels = graph.add("Transpose", graph.single(PICTURE), perm=[2, 0, 1])
    stored = _resized(graph, levels, side, spec.stored_px)
    frame = stored
    if spec.frame_px != spec.stored_px:
        frame = _resized(graph, stored, graph.of(spec.stored_px, np.int64), spec.frame_px)
    scale_C = (1.0 / (255.0 * IMAGENET_DEVIATION)).astype(np.float32)
    offset_C = IMAGENET_MEAN / IMAGENET_DEVIATION
    scaled = graph.add("Mul", frame, graph.of(scale_C[:, np.newaxis, np.newaxis]))
    graph.add("Sub", scaled, graph.of(offset_C[:, np.newaxis, np.newaxis]), out=FRAME)
    shape = [3, spec.frame_px, spec.frame_px]
    return graph.model("picture", (PICTURE, "UINT8", ["S", "S", 3]), (FRAME, "FLOAT", shape))


def _resized(graph: "_Graph", levels_CSS: str, side: str, px: int) -> str:
    """Return the picture at another size, in whole levels, as ``cv2.resize`` makes it: by area if it shrinks, else
    linearly.
    """
    whole = graph.single(side)
    step = graph.add("Div", whole, graph.of(float(px)))
    source_1S = graph.add("Range", graph.of(0, np.int64), side, graph.of(1, np.int64))
    source_1S = graph.add("Unsqueeze", graph.single(source_1S), graph.of([0], np.int64))
    target_P1 = graph.of(np.arange(px, dtype=np.float32)[:, np.newaxis])
    low, high = graph.add("Mul", target_P1, step), graph.add("Mul", graph.add("Add", target_P1, graph.of(1.0)), step)
    ends = graph.add("Min", high, graph.add("Add", source_1S, graph.of(1.0)))
    shared = graph.add("Max", graph.add("Sub", ends, graph.add("Max", low, source_1S)), graph.of(0.0))
    by_area = graph.add("Div", shared, step)
    half = graph.of(0.5)
    centre = graph.add("Sub", graph.add("Mul", graph.add("Add", target_P1, half), step), half)
    held = graph.add("Max", graph.add("Min", centre, graph.add("Sub", whole, graph.of(1.0))), graph.of(0.0))
    away = graph.add("Abs", graph.add("Sub", held, source_1S))
    linear = graph.add("Max", graph.add("Sub", graph.of(1.0), away), graph.of(0.0))
    shrinks = graph.add("GreaterOrEqual", whole, graph.of(float(px)))
    weights_PS = graph.add("Where", shrinks, by_area, linear)
    rows = graph.add("MatMul", weights_PS, levels_CSS)
    return graph.add("Round", graph.add("MatMul", rows, graph.add("Transpose", weights_PS, perm=[1, 0])))


def _area_weights(of: int, to: int) -> npt.NDArray[np.float64]:
    """Return the share (to, of) that each of ``of`` cells has in each of ``to`` equal stretches of them."""
    step = of / to
    low_P1, source_S = np.arange(to)[:, np.newaxis] * step, np.arange(of)
    shared_PS = np.minimum(low_P1 + step, source_S + 1) - np.maximum(low_P1, source_S)
    weights_PS: npt.NDArray[np.float64] = np.maximum(shared_PS, 0) / step
    return weights_PS


class _Graph:
    """Nodes of an ONNX graph, one after the other; a value is known by its name."""

    def __init__(self) -> None:
        import onnx

        self._onnx = onnx
        self._nodes: list[Any] = []
        self._constants: list[Any] = []

    def add(self, operator: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        name = out or f"{operator.lower()}_{len(self._nodes)}"
        self._nodes.append(self._onnx.helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def of(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"constant_{len(self._constants)}"
        self._constants.append(self._onnx.numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def single(self, value: str) -> str:
        return self.add("Cast", value, to=self._onnx.TensorProto.FLOAT)

    def double(self, value: str) -> str:
        return self.add("Cast", value, to=self._onnx.TensorProto.DOUBLE)

    def model(self, name: str, source: tuple[str, str, list[Any]], made: tuple[str, str, list[Any]]) -> bytes:
        """Return the checked model's bytes. ``source`` and ``made``: name, type and shape of its input and output."""
        helper, kinds = self._onnx.helper, self._onnx.TensorProto
        values = [
            helper.make_tensor_value_info(what, getattr(kinds, kind), shape) for what, kind, shape in (source, made)
        ]
        graph = helper.make_graph(self._nodes, name, values[:1], values[1:], self._constants)
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="isthmus")
        self._onnx.checker.check_model(model, full_check=True)
        content: bytes = model.SerializeToString()
        return content
