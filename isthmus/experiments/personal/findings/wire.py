"""The cost of one clip on the wire: the exact bytes of an inference message, by ratio and number type."""

import numpy as np

from isthmus.proto.codec import pack_frame
from isthmus.proto.messages import FeatureFrame, Features, NumberType, compressed_width
from isthmus.proto.v1 import isthmus_pb2

GRPC_PREFIX_BYTES = 5
"""Bytes of compression flag and length before every gRPC message. HTTP/2 frames are not counted."""


def bytes_per_clip(feature_width: int, ratios: tuple[float, ...]) -> dict[str, dict[str, int]]:
    """Return number type -> ratio -> bytes of one InferRequest with its gRPC prefix."""
    table: dict[str, dict[str, int]] = {}
    for number_type in NumberType:
        row = {}
        for ratio in ratios:
            vector = np.ones(compressed_width(feature_width, ratio), dtype=np.float32)
            frame = pack_frame(FeatureFrame(Features(vector, vector), ratio, number_type))
            message = isthmus_pb2.InferRequest(sequence=1_000, frame=frame)
            row[f"{ratio:g}"] = message.ByteSize() + GRPC_PREFIX_BYTES
        table[number_type.value] = row
    return table
