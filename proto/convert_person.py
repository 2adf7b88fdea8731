"""Conversion between a person model (person.py) and protobuf, as convert.py does for the other messages.

The model is signed by the cloud, but a device trusts no number of it: every array has exactly the size that classes and
feature width give, no value is undefined, and the covariances are covariances.
"""

from typing import Final

import numpy as np
from google.protobuf.message import DecodeError

from isthmus.proto.errors import InvalidInput, TooLarge
from isthmus.proto.limits import MAX_PERSON_MODEL_BYTES
from isthmus.proto.person import MODALITIES, Centred, CentredHeads, Float32s, PersonModel
from isthmus.proto.v1 import isthmus_pb2 as pb

_LEAST_SPREAD: Final = 1e-12
_MOST_FUSION: Final = 100.0
_TOLERANCE: Final = 1e-3
"""Of the largest value: how far a covariance may be from symmetric, and its least eigenvalue below 0."""


def centred_to_pb(centred: Centred) -> pb.PersonModel:
    """Return the message. Raises TooLarge if it is over the bound of a manifest."""
    heads, person = centred.heads, centred.person
    message = pb.PersonModel(
        weights=_bytes(heads.weights_MCD),
        bias=_bytes(heads.bias_MC),
        centre=_bytes(heads.centre_MD),
        spread=_bytes(heads.spread_MD),
        mean=_bytes(person.mean_MCC),
        between=_bytes(person.between_MCC),
        within=_bytes(person.within_MCC),
        fusion=person.fusion,
        people=person.people,
    )
    _, classes, width = heads.weights_MCD.shape
    _check_size(classes, width)
    return message


def centred_from_pb(message: pb.PersonModel, classes: int, width: int) -> Centred:
    """Return the person model of a student with so many classes and this feature width.

    Raises TooLarge over the bound. Raises InvalidInput for an array of another size, NaN or infinity, a spread or
    fusion that is not positive, fewer than two people, or a covariance that is none.
    """
    _check_size(classes, width)
    if not (0 < message.fusion <= _MOST_FUSION) or message.people < 2:
        raise InvalidInput("person model: the fusion or the number of people is out of bounds")
    spread_MD = _array("spread", message.spread, width)
    if (spread_MD < _LEAST_SPREAD).any():
        raise InvalidInput("person model: a spread is not positive")
    return Centred(
        CentredHeads(
            weights_MCD=_array("weights", message.weights, classes, width),
            bias_MC=_array("bias", message.bias, classes),
            centre_MD=_array("centre", message.centre, width),
            spread_MD=spread_MD,
        ),
        PersonModel(
            mean_MCC=_array("mean", message.mean, classes, classes),
            between_MCC=_covariance("between", message.between, classes),
            within_MCC=_covariance("within", message.within, classes),
            fusion=message.fusion,
            people=message.people,
        ),
    )


def centred_to_bytes(centred: Centred) -> bytes:
    """Return the bytes of a file. Raises TooLarge as ``centred_to_pb`` does."""
    content: bytes = centred_to_pb(centred).SerializeToString(deterministic=True)
    return content


def centred_from_bytes(content: bytes, classes: int, width: int) -> Centred:
    """Parse the bytes of a file. Raises as ``centred_from_pb`` does, and InvalidInput if they do not parse."""
    try:
        return centred_from_pb(pb.PersonModel.FromString(content), classes, width)
    except DecodeError as error:
        raise InvalidInput("person model: it does not parse") from error


def _check_size(classes: int, width: int) -> None:
    size_bytes = MODALITIES * (classes * width + classes + 2 * width + 3 * classes * classes) * 4
    if size_bytes > MAX_PERSON_MODEL_BYTES:
        raise TooLarge(f"person model: {size_bytes} bytes; at most {MAX_PERSON_MODEL_BYTES} are accepted")


def _bytes(array: Float32s) -> bytes:
    return np.ascontiguousarray(array, dtype="<f4").tobytes()


def _array(name: str, data: bytes, *shape: int) -> Float32s:
    wanted = (MODALITIES, *shape)
    if len(data) != int(np.prod(wanted)) * 4:
        raise InvalidInput(f"person model: {len(data)} bytes of {name}; float32 of shape {wanted} are wanted")
    array = np.frombuffer(data, dtype="<f4").reshape(wanted).astype(np.float32)
    if not np.isfinite(array).all():
        raise InvalidInput(f"person model: NaN or infinity in {name}")
    return array


def _covariance(name: str, data: bytes, classes: int) -> Float32s:
    array_MCC = _array(name, data, classes, classes)
    slack = _TOLERANCE * float(np.abs(array_MCC).max())
    if np.abs(array_MCC - array_MCC.transpose(0, 2, 1)).max() > slack or np.linalg.eigvalsh(array_MCC).min() < -slack:
        raise InvalidInput(f"person model: {name} is no covariance")
    return array_MCC
