"""Bodies of the Open Inference Protocol over HTTP: any JSON becomes a message, or is refused with an error of ours."""

import json
from contextlib import suppress
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud.http.open_inference import request_of
from isthmus.proto.errors import InvalidInput, TooLarge

TEXTS = st.one_of(
    st.sampled_from(["pixels", "image", "UINT8", "FP32", "BYTES", "base64", "binary_data_size", "content_type"]),
    st.text(st.characters(exclude_categories=()), max_size=8),
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False), TEXTS
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=12
)
TENSORS = st.fixed_dictionaries(
    {"name": TEXTS | VALUES, "shape": st.lists(st.integers(-2, 4), max_size=9) | VALUES, "datatype": TEXTS},
    optional={"parameters": st.dictionaries(TEXTS, SCALARS, max_size=4) | VALUES, "data": VALUES},
)
BODIES = st.fixed_dictionaries(
    {"inputs": st.lists(TENSORS, max_size=3) | VALUES},
    optional={
        "id": VALUES,
        "parameters": st.dictionaries(TEXTS, SCALARS, max_size=4) | VALUES,
        "outputs": st.lists(st.fixed_dictionaries({"name": TEXTS}, optional={"parameters": VALUES}), max_size=3),
        "model_name": VALUES,
    },
)


@given(BODIES | VALUES, st.binary(max_size=16), st.booleans())
def test_any_json_becomes_a_message_or_is_refused(body: Any, behind: bytes, declared: bool) -> None:
    whole = json.dumps(body).encode()
    with suppress(InvalidInput, TooLarge):
        request, binary = request_of(whole + behind, str(len(whole)) if declared else None, "task", "")
        assert request.model_name == "task" and (binary is None or binary <= {one.name for one in request.outputs})
        request.SerializeToString()


@given(st.binary(max_size=64), st.text(max_size=6) | st.none())
def test_any_bytes_are_refused_or_a_message(body: bytes, length: str | None) -> None:
    with suppress(InvalidInput, TooLarge):
        request_of(body, length, "task", "1")
