"""Tensors of the Open Inference Protocol: read images from a request, write answers to a response.

Axes: N images of one request, H, W in pixels, C classes.
"""

import math
import struct
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

from isthmus.cloud.elastic.model.executor import Image
from isthmus.cloud.elastic.serve.live import Answer
from isthmus.cloud.elastic.tasks.task import ModelShape, Task
from isthmus.proto.errors import InvalidInput, TooLarge
from isthmus.proto.limits import MAX_IMAGES_PER_REQUEST
from isthmus.proto.open_inference import inference_pb2 as pb

IMAGE: Final = "image"
"""BYTES (N): JPEG or PNG files."""
PIXELS: Final = "pixels"
"""UINT8 (N, H, W, 3): RGB at the model's image size."""
TENSOR: Final = "tensor"
"""FP32 (N, 3, H, W): standardised as the model expects it."""
LOGITS: Final = "logits"
"""FP32 (N, C)."""
LABEL: Final = "label"
"""BYTES (N): the name of the most likely class."""

_TYPES: Final[dict[str, np.dtype[Any]]] = {"UINT8": np.dtype("u1"), "FP32": np.dtype("<f4")}


def image_shape(name: str, model: ModelShape) -> tuple[str, tuple[int, ...]]:
    """Returns the data type of an input and its shape without N."""
    side = model.image_px
    return {IMAGE: ("BYTES", ()), PIXELS: ("UINT8", (side, side, 3)), TENSOR: ("FP32", (3, side, side))}[name]


def images_of(request: pb.ModelInferRequest, model: ModelShape) -> list[bytes] | list[Image]:
    """Returns the images of a request, at least one. Raises InvalidInput or TooLarge before anything is copied."""
    if len(request.inputs) != 1 or request.inputs[0].name not in (IMAGE, PIXELS, TENSOR):
        raise InvalidInput(f"inputs: exactly one of '{IMAGE}', '{PIXELS}' and '{TENSOR}' is required")
    tensor = request.inputs[0]
    if any(name.startswith("shared_memory") for name in tensor.parameters):
        raise InvalidInput(f"input '{tensor.name}': shared memory is not supported; send the data")
    datatype, rest = image_shape(tensor.name, model)
    shape = tuple(tensor.shape)
    if tensor.name == IMAGE and shape[1:] == (1,):
        shape = shape[:1]
    if tensor.datatype != datatype or not shape or shape[1:] != rest or shape[0] < 1:
        wanted = ", ".join(("N", *map(str, rest)))
        raise InvalidInput(
            f"input '{tensor.name}': {datatype} of shape ({wanted}) is required; "
            f"this is {tensor.datatype[:16]} of {list(shape)[:8]}"
        )
    if shape[0] > MAX_IMAGES_PER_REQUEST:
        raise TooLarge(f"at most {MAX_IMAGES_PER_REQUEST} images are accepted in one request")
    if len(request.raw_input_contents) > 1:
        raise InvalidInput("there are more raw contents than inputs")
    raw = request.raw_input_contents[0] if request.raw_input_contents else None
    if datatype == "BYTES":
        return _files(tensor, raw, shape[0])
    if raw is not None:
        wanted_bytes = math.prod(shape) * _TYPES[datatype].itemsize
        if len(raw) != wanted_bytes:
            raise InvalidInput(f"input '{tensor.name}': {len(raw)} bytes; {wanted_bytes} are required")
        values = np.frombuffer(raw, _TYPES[datatype])
    else:
        values = _typed(tensor, datatype, math.prod(shape))
    return list(values.reshape(shape))


def _files(tensor: Any, raw: bytes | None, count: int) -> list[bytes]:
    files = list(tensor.contents.bytes_contents) if raw is None else list(_elements(raw, count))
    if len(files) != count:
        raise InvalidInput(f"input '{tensor.name}': {len(files)} elements; {count} are required")
    return files


def _elements(raw: bytes, count: int) -> Iterator[bytes]:
    offset = 0
    for _ in range(count):
        if len(raw) - offset < 4:
            break
        (length,) = struct.unpack_from("<I", raw, offset)
        offset += 4
        if length > len(raw) - offset:
            raise InvalidInput(f"input '{IMAGE}': an element ends beyond the data")
        yield raw[offset : offset + length]
        offset += length
    if offset != len(raw):
        raise InvalidInput(f"input '{IMAGE}': {len(raw) - offset} bytes beyond the last element")


def _typed(tensor: Any, datatype: str, count: int) -> Image:
    contents = tensor.contents.fp32_contents if datatype == "FP32" else tensor.contents.uint_contents
    if len(contents) != count:
        raise InvalidInput(f"input '{tensor.name}': {len(contents)} numbers; {count} are required")
    if datatype == "FP32":
        return np.array(contents, np.float32)
    values = np.array(contents, np.uint32)
    if (values > 255).any():
        raise InvalidInput(f"input '{tensor.name}': a number over 255")
    return values.astype(np.uint8)


def wanted_outputs(request: pb.ModelInferRequest, task: Task) -> list[tuple[str, int]]:
    """Returns the names of the outputs to send, each with the number of classes to rank (0: the tensor itself).

    Raises InvalidInput for an unknown output, an output named twice, and an impossible ranking.
    """
    wanted = []
    for output in request.outputs:
        if output.name not in (LOGITS, LABEL):
            raise InvalidInput(f"outputs: '{LOGITS}' and '{LABEL}' exist, not {output.name[:64]!r}")
        if any(name.startswith("shared_memory") for name in output.parameters):
            raise InvalidInput(f"output '{output.name}': shared memory is not supported")
        ranked = output.parameters["classification"].int64_param if "classification" in output.parameters else 0
        if ranked < 0 or (ranked and output.name != LOGITS):
            raise InvalidInput(f"classification: a number of classes is required, on the output '{LOGITS}'")
        wanted.append((output.name, min(ranked, len(task.spec.classes))))
    if len({name for name, _ in wanted}) != len(wanted):
        raise InvalidInput("outputs: one is named twice")
    return wanted or [(LOGITS, 0), (LABEL, 0)]


def add_outputs(response: pb.ModelInferResponse, answers: Sequence[Answer], wanted: Sequence[tuple[str, int]]) -> None:
    """Adds the tensors as raw contents. A ranking is BYTES (N, k): "logit:index:class", best first, as in Triton."""
    count = len(answers)
    logits_NC = np.stack([answer.logits_C for answer in answers])
    classes = answers[0].task.spec.classes
    for name, ranked in wanted:
        if ranked:
            order_NK = np.argsort(-logits_NC, axis=1, kind="stable")[:, :ranked]
            lines = [
                f"{logits_C[index]:f}:{index}:{classes[index]}"
                for logits_C, order_K in zip(logits_NC, order_NK, strict=True)
                for index in order_K
            ]
            _add(response, name, "BYTES", (count, ranked), _packed(lines))
        elif name == LABEL:
            _add(response, name, "BYTES", (count,), _packed([classes[index] for index in logits_NC.argmax(axis=1)]))
        else:
            _add(response, name, "FP32", logits_NC.shape, logits_NC.astype("<f4", copy=False).tobytes())


def _add(response: pb.ModelInferResponse, name: str, datatype: str, shape: Sequence[int], raw: bytes) -> None:
    response.outputs.add(name=name, datatype=datatype, shape=shape)
    response.raw_output_contents.append(raw)


def texts_of(raw: bytes) -> list[str]:
    """Reads the elements of a BYTES tensor that ``add_outputs`` wrote."""
    texts, offset = [], 0
    while offset < len(raw):
        (length,) = struct.unpack_from("<I", raw, offset)
        offset += 4 + length
        texts.append(raw[offset - length : offset].decode())
    return texts


def _packed(texts: Sequence[str]) -> bytes:
    return b"".join(struct.pack("<I", len(data)) + data for data in (text.encode() for text in texts))
