"""What an ONNX file from the cloud may contain, checked without ONNX: no control flow, no functions, no other files.

Without subgraphs a model runs each of its nodes once, so its running time has a bound that no input can pass. Weights
in other files (external data) could name any file of the device. The numbers are those of the fields in onnx.proto.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from isthmus.proto.errors import InvalidInput

_GRAPH, _TRAINING, _FUNCTIONS = 7, 20, 25  # ModelProto
_NODE, _INITIALIZER, _SPARSE = 1, 5, 15  # GraphProto
_ATTRIBUTE, _DOMAIN = 5, 7  # NodeProto
_TENSOR, _SUBGRAPH, _TENSORS, _SUBGRAPHS, _SPARSE_TENSOR, _SPARSE_TENSORS = 5, 6, 10, 11, 22, 23  # AttributeProto
_EXTERNAL, _LOCATION = 13, 14  # TensorProto
MOST_FIELDS: Final = 1_000_000
"""Parts of one model that are looked at; ResNet18 has some thousands. More would take the device minutes."""

_DOMAINS: Final = (b"", b"ai.onnx", b"com.microsoft")


def check_model_file(path: Path) -> None:
    """Raise InvalidInput if the model has subgraphs, functions, operators of others, or weights in other files."""
    try:
        with path.open("rb") as file:
            # Not closed here: an error's traceback may still refer to parts of it.
            check_model(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    except (IndexError, ValueError) as error:
        raise InvalidInput(f"{path.name} is no ONNX model") from error
    except InvalidInput as error:
        raise InvalidInput(f"{path.name}: {error}") from error


def check_model(model: memoryview) -> None:
    """Check the bytes of a ModelProto. Raises InvalidInput, and ValueError or IndexError for what does not parse."""
    _Check().model(model)


class _Check:
    """One pass over a model, which ends at ``MOST_FIELDS`` fields."""

    def __init__(self) -> None:
        self._left = MOST_FIELDS

    def model(self, model: memoryview) -> None:
        for field, value in self._fields(model):
            if field in (_TRAINING, _FUNCTIONS):
                raise InvalidInput("functions and training steps are not allowed in a student")
            if field == _GRAPH and isinstance(value, memoryview):
                self._graph(value)

    def _graph(self, graph: memoryview) -> None:
        for field, value in self._fields(graph):
            if isinstance(value, int):
                continue
            if field == _NODE:
                self._node(value)
            elif field == _INITIALIZER:
                self._tensor(value)
            elif field == _SPARSE:
                self._sparse(value)

    def _node(self, node: memoryview) -> None:
        for field, value in self._fields(node):
            if isinstance(value, int):
                continue
            if field == _DOMAIN and bytes(value[:64]) not in _DOMAINS:
                raise InvalidInput("operators of other domains are not allowed in a student")
            if field == _ATTRIBUTE:
                self._attribute(value)

    def _attribute(self, attribute: memoryview) -> None:
        for field, value in self._fields(attribute):
            if field in (_SUBGRAPH, _SUBGRAPHS):
                raise InvalidInput("control flow (loops and branches) is not allowed in a student")
            if isinstance(value, int):
                continue
            if field in (_TENSOR, _TENSORS):
                self._tensor(value)
            elif field in (_SPARSE_TENSOR, _SPARSE_TENSORS):
                self._sparse(value)

    def _sparse(self, sparse: memoryview) -> None:
        for _, value in self._fields(sparse):
            if isinstance(value, memoryview):
                self._tensor(value)

    def _tensor(self, tensor: memoryview) -> None:
        for field, value in self._fields(tensor):
            if field == _EXTERNAL or (field == _LOCATION and value != 0):
                raise InvalidInput("weights in other files are not allowed in a student")

    def _fields(self, message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
        """Yield (field number, number or bytes) of a protobuf message.

        Raises IndexError or ValueError if it is cut, InvalidInput if the model has too many fields.
        """
        at, end = 0, len(message)
        while at < end:
            self._left -= 1
            if self._left < 0:
                raise InvalidInput(f"a model of more than {MOST_FIELDS} parts is not allowed in a student")
            key, at = _varint(message, at)
            wire = key & 7
            if wire == 0:
                value, at = _varint(message, at)
                yield key >> 3, value
                continue
            if wire == 2:
                size, at = _varint(message, at)
            elif wire in (1, 5):
                size = 8 if wire == 1 else 4
            else:
                raise ValueError(f"wire type {wire}")
            if size > end - at:
                raise ValueError("cut short")
            yield key >> 3, message[at : at + size]
            at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than 64 bits")
