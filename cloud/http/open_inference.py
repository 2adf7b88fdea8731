"""The Open Inference Protocol over HTTP (``/v2/...``): JSON, and the binary-data extension of Triton.

Triton's and KServe's HTTP clients work unchanged. Bodies become the same messages as gRPC's, so limits, parameters and
answers are the same (elastic/serve/open_inference.py). Compressed bodies and shared memory are refused.

An image file as JSON is a base64 text, in an input whose parameter ``content_type`` is "base64".
"""

import asyncio
import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from google.protobuf.message import Message
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from isthmus.cloud.elastic.serve.infer_tensors import texts_of
from isthmus.cloud.elastic.serve.open_inference import OpenInference, server_metadata
from isthmus.cloud.elastic.serve.serving import Elastic
from isthmus.cloud.http.calls import Door, bytes_of, guarded, parsed, status_of, tenant, with_disconnect
from isthmus.proto.errors import InvalidInput, IsthmusError, NotYours, TooLarge
from isthmus.proto.limits import MAX_IMAGE_MESSAGE_BYTES
from isthmus.proto.open_inference import inference_pb2 as pb

HEADER_LENGTH: Final = "inference-header-content-length"
"""The length of a body's JSON, if binary data follows it."""
MAX_BODY_BYTES: Final = MAX_IMAGE_MESSAGE_BYTES
"""As in gRPC. As JSON, numbers take several times the bytes that they take as binary data."""
_IN_A_THREAD_BYTES: Final = 64 << 10
"""Larger bodies are parsed off the event loop."""
_REQUEST: Final = frozenset({"id", "parameters", "inputs", "outputs", "model_name", "model_version"})
_INPUT: Final = frozenset({"name", "shape", "datatype", "parameters", "data"})
_OUTPUT: Final = frozenset({"name", "parameters"})
_MAX_PARAMETERS: Final = 64
_INT64: Final = 1 << 63


def inference_app(elastic: Elastic, door: Door) -> Starlette:
    """Returns the application. Each tenant sees its own models.

    As over gRPC, anyone may ask without a key whether the server is there and ready.
    """
    models = OpenInference(elastic, tenant, door.admit)

    def route(path: str, handler: Any, *methods: str, open: bool = False) -> Route:
        return Route(path, guarded(handler, None if open else door, refusal), methods=list(methods) or ["GET"])

    async def live(request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(request: Request) -> Response:
        return JSONResponse({"ready": models.ready}, 200 if models.ready else 503)

    async def server(request: Request) -> Response:
        return _json(server_metadata())

    async def model_ready(request: Request) -> Response:
        name, version = _model(request)
        found = models.model_ready(name, version)
        return JSONResponse({"name": name[:64], "ready": found}, 200 if found else 404)

    async def metadata(request: Request) -> Response:
        return _json(models.metadata(*_model(request)))

    async def config(request: Request) -> Response:
        return _json(models.config(*_model(request)).config)

    async def statistics(request: Request) -> Response:
        return _json(models.statistics(*_model(request)))

    async def index(request: Request) -> Response:
        return JSONResponse([plain(model) for model in models.index().models])

    async def infer(request: Request) -> Response:
        encoding = request.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise InvalidInput(f"Content-Encoding {encoding[:16]!r}: compressed bodies are not accepted")
        length = request.headers.get("content-length", "")
        with elastic.room.of(min(int(length), MAX_BODY_BYTES) if length.isdecimal() else MAX_BODY_BYTES):
            body = bytes(await bytes_of(request, MAX_BODY_BYTES, door))
            name, version = _model(request)
            header = request.headers.get(HEADER_LENGTH)
            if len(body) > _IN_A_THREAD_BYTES:
                asked, binary = await asyncio.to_thread(request_of, body, header, name, version)
            else:
                asked, binary = request_of(body, header, name, version)
            del body
            answer = await with_disconnect(request, models.infer(asked, None, of_call=True))
        return response_of(answer, binary)

    async def nothing_here(request: Request) -> Response:
        raise NotYours("no such path; served are /v2, /v2/health/..., /v2/models/NAME and /v2/models/NAME/infer")

    routes = [
        route("/v2/health/live", live, open=True),
        route("/v2/health/ready", ready, open=True),
        route("/v2", server),
        route("/v2/", server),
        route("/v2/models/stats", statistics),
        route("/v2/repository/index", index, "POST"),
    ]
    for prefix in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        routes += [
            route(prefix, metadata),
            route(f"{prefix}/ready", model_ready),
            route(f"{prefix}/config", config),
            route(f"{prefix}/stats", statistics),
            route(f"{prefix}/infer", infer, "POST"),
        ]
    return Starlette(routes=[*routes, route("/{rest:path}", nothing_here, "GET", "POST", "PUT", "PATCH", "DELETE")])


def refusal(error: IsthmusError) -> Response:
    """Returns the error as the protocol's clients expect it: a JSON object with one text."""
    status, headers = status_of(error)
    return JSONResponse({"error": str(error)}, status, headers)


def request_of(
    body: bytes, header_length: str | None, name: str, version: str
) -> tuple[pb.ModelInferRequest, frozenset[str] | None]:
    """Returns a body as gRPC's message, and the outputs that the client wants as binary data (None: all of them).

    Raises InvalidInput or TooLarge, naming the field.
    """
    try:
        return _request_of(body, header_length, name, version)
    except UnicodeEncodeError as error:
        raise InvalidInput("the body holds half of a surrogate pair, which is no text") from error


def _request_of(
    body: bytes, header_length: str | None, name: str, version: str
) -> tuple[pb.ModelInferRequest, frozenset[str] | None]:
    if header_length is None:
        header_bytes = len(body)
    elif not (header_length.isdecimal() and len(header_length) < 12 and int(header_length) <= len(body)):
        raise InvalidInput("Inference-Header-Content-Length: must be the length of the JSON in the body")
    else:
        header_bytes = int(header_length)
    raw = _object(parsed(body[:header_bytes]), _REQUEST, "the body")
    for field, of_path in (("model_name", name), ("model_version", version)):
        # KServe's client repeats what the path says.
        if raw.get(field) not in (None, "", of_path):
            raise InvalidInput(f"{field}: it differs from that of the path")
    id = raw.get("id", "")
    if not isinstance(id, str):
        raise InvalidInput("id: must be a text")
    request = pb.ModelInferRequest(model_name=name, model_version=version, id=id)
    _parameters(raw.get("parameters"), request.parameters)
    offset = header_bytes
    for given in _objects(raw.get("inputs"), _INPUT, "inputs"):
        offset = _add_input(request, given, body, offset)
    if offset != len(body):
        raise InvalidInput(f"{len(body) - offset} bytes of binary data beyond the last input")
    binary: set[str] = set()
    outputs = _objects(raw.get("outputs", []), _OUTPUT, "outputs")
    every = request.parameters["binary_data_output"].bool_param if "binary_data_output" in request.parameters else False
    for given in outputs:
        output = request.outputs.add(name=_text(given, "name", "outputs"))
        _parameters(given.get("parameters"), output.parameters)
        wants = output.parameters["binary_data"].bool_param if "binary_data" in output.parameters else every
        if wants:
            binary.add(output.name)
    return request, None if every and not outputs else frozenset(binary)


def response_of(answer: pb.ModelInferResponse, binary: frozenset[str] | None) -> Response:
    """Returns an answer with raw contents as JSON, with the outputs in ``binary`` (None: all) as binary data."""
    outputs, behind = [], []
    for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
        shown: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": list(output.shape)}
        if binary is None or output.name in binary:
            shown["parameters"] = {"binary_data_size": len(raw)}
            behind.append(raw)
        else:
            shown["data"] = texts_of(raw) if output.datatype == "BYTES" else memoryview(raw).cast("f").tolist()
        outputs.append(shown)
    whole: dict[str, Any] = {
        "model_name": answer.model_name,
        "model_version": answer.model_version,
        "parameters": {name: _value(answer.parameters[name]) for name in sorted(answer.parameters)},
        "outputs": outputs,
    }
    if answer.id:
        whole["id"] = answer.id
    if not behind:
        return JSONResponse(whole)
    header = json.dumps(whole, allow_nan=False, separators=(",", ":")).encode()
    return Response(
        b"".join((header, *behind)),
        headers={HEADER_LENGTH: str(len(header))},
        media_type="application/octet-stream",
    )


def plain(message: Message) -> dict[str, Any]:
    """Returns a message as JSON values. Numbers stay numbers, and what a message does not hold is left out."""
    return dict(_fields(message))


def _fields(message: Message) -> Iterator[tuple[str, Any]]:
    fields: Any = message.DESCRIPTOR.fields
    for field in fields:
        value = getattr(message, field.name)
        entry = field.message_type
        if entry is not None and entry.GetOptions().map_entry:
            items = {key: value[key] for key in sorted(value)}
            yield field.name, {key: plain(of) if isinstance(of, Message) else of for key, of in items.items()}
        elif field.is_repeated:
            yield field.name, [_shown(field, each) for each in value]
        elif not field.has_presence or message.HasField(field.name):
            yield field.name, _shown(field, value)


def _shown(field: Any, value: Any) -> Any:
    if isinstance(value, Message):
        return plain(value)
    return field.enum_type.values_by_number[value].name if field.enum_type is not None else value


def _json(message: Message) -> Response:
    return JSONResponse(plain(message))


def _model(request: Request) -> tuple[str, str]:
    return request.path_params.get("name", ""), request.path_params.get("version", "")


def _add_input(request: pb.ModelInferRequest, given: Mapping[str, Any], body: bytes, offset: int) -> int:
    """Adds an input to the request. Returns where the next one's binary data begins in ``body``."""
    name = _text(given, "name", "inputs")
    shape = given.get("shape")
    if not isinstance(shape, list) or not all(_whole(side) for side in shape) or len(shape) > 8:
        raise InvalidInput(f"input '{name[:64]}': shape must be a list of whole numbers")
    tensor = request.inputs.add(name=name, datatype=_text(given, "datatype", "inputs"), shape=shape)
    _parameters(given.get("parameters"), tensor.parameters)
    if "binary_data_size" in tensor.parameters:
        size = tensor.parameters["binary_data_size"].int64_param
        if "data" in given or not 0 <= size <= len(body) - offset:
            raise InvalidInput(f"input '{name[:64]}': binary_data_size must be bytes of the body, and without data")
        request.raw_input_contents.append(body[offset : offset + size])
        return offset + size
    data = given.get("data")
    if not isinstance(data, list):
        raise InvalidInput(f"input '{name[:64]}': data must be a list, or binary_data_size be given")
    values = list(_flat(data, len(shape)))
    try:
        if tensor.datatype == "BYTES":
            tensor.contents.bytes_contents.extend(_files(values, tensor))
        elif tensor.datatype == "FP32":
            tensor.contents.fp32_contents.extend(values)
        elif tensor.datatype == "UINT8":
            tensor.contents.uint_contents.extend(values)
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise InvalidInput(f"input '{name[:64]}': data holds what is not {tensor.datatype}") from error
    return offset


def _files(values: list[Any], tensor: Any) -> list[bytes]:
    if "content_type" in tensor.parameters and tensor.parameters["content_type"].string_param == "base64":
        try:
            return [base64.b64decode(text, validate=True) for text in values]
        except binascii.Error as error:
            raise InvalidInput(f"input '{tensor.name[:64]}': data holds a text that is not base64") from error
    return [text.encode() for text in values]


def _flat(data: list[Any], depth: int) -> Iterator[Any]:
    """Yields the elements of a list that is nested at most ``depth`` deep: flat and nested data mean the same."""
    for each in data:
        if isinstance(each, list) and depth > 1:
            yield from _flat(each, depth - 1)
        else:
            yield each


def _parameters(raw: Any, into: Any) -> None:
    if raw is None:
        return
    if not isinstance(raw, dict) or len(raw) > _MAX_PARAMETERS:
        raise InvalidInput(f"parameters: must be an object of at most {_MAX_PARAMETERS} values")
    for name, value in raw.items():
        if isinstance(value, bool):
            into[name].bool_param = value
        elif isinstance(value, str):
            into[name].string_param = value
        elif isinstance(value, float):
            into[name].double_param = value
        elif _whole(value):
            into[name].int64_param = value
        else:
            raise InvalidInput(f"parameter {name[:64]!r}: must be a number, a text, true or false")


def _value(parameter: pb.InferParameter) -> Any:
    return getattr(parameter, parameter.WhichOneof("parameter_choice"))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -_INT64 <= value < _INT64


def _text(given: Mapping[str, Any], name: str, where: str) -> str:
    value = given.get(name)
    if not isinstance(value, str):
        raise InvalidInput(f"{where}: each needs a {name}")
    return value


def _objects(raw: Any, known: frozenset[str], where: str) -> list[Mapping[str, Any]]:
    if not isinstance(raw, list):
        raise InvalidInput(f"{where}: must be a list")
    if len(raw) > _MAX_PARAMETERS:
        raise TooLarge(f"{where}: at most {_MAX_PARAMETERS}")
    return [_object(each, known, where) for each in raw]


def _object(raw: Any, known: frozenset[str], where: str) -> Mapping[str, Any]:
    if not isinstance(raw, dict):
        raise InvalidInput(f"{where}: must be an object")
    unknown = raw.keys() - known
    if unknown:
        raise InvalidInput(f"{where}: unknown field {min(unknown)[:64]!r}")
    return raw
