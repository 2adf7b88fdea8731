"""A generating model in inference.GRPCInferenceService, beside the image tasks that ``open_inference.py`` serves.

Input ``text_input``, BYTES (1); output ``text_output``, BYTES (1). ``ModelInfer`` answers with the whole text.
``ModelStreamInfer`` sends a response per piece of text; the last one of a request is marked final, as Triton does for
decoupled models.
"""

import asyncio
import secrets
import struct
from collections.abc import AsyncIterator
from typing import Any, Final

from isthmus import __version__
from isthmus.cloud.generation.scheduling.request import Outcome, Sampling
from isthmus.cloud.generation.serve.live import Done, Piece
from isthmus.cloud.generation.serve.serving import Answer, Answering, Wishes
from isthmus.cloud.rpc.open_inference import EXTENSIONS, OpenInferenceServicer, number_of
from isthmus.cloud.rpc.scopes import for_caller, tenant
from isthmus.cloud.tenants.names import owner
from isthmus.proto.errors import InvalidInput, NotYours, Unavailable
from isthmus.proto.open_inference import inference_pb2 as pb
from isthmus.proto.open_inference import inference_pb2_grpc as pb_grpc

PLATFORM: Final = "isthmus_generation"
TEXT_INPUT: Final = "text_input"
TEXT_OUTPUT: Final = "text_output"
FINAL: Final = "triton_final_response"
VERSION: Final = "1"
_IN_FLIGHT: Final = 64
"""Requests of one stream that are answered at a time. Further requests stay with the client."""
_NUMBERS: Final = ("max_tokens", "temperature", "top_p", "seed", "ttft_s", "tpot_s", "latency_s", "utility")
_IGNORED: Final = frozenset(
    {
        "sequence_id",
        "sequence_start",
        "sequence_end",
        "priority",
        "binary_data_output",
        "triton_enable_empty_final_response",
    }
)
_PARAMETERS: Final = frozenset({*_NUMBERS, "stop", "kind", "user", "cache_salt", "timeout"})

Response = pb.ModelStreamInferResponse


class GenerationServicer(pb_grpc.GRPCInferenceServiceServicer):
    """Answers for the generating model itself, and passes calls about every other model on to ``tasks``."""

    def __init__(self, generation: Answering, tasks: OpenInferenceServicer | None) -> None:
        self._generation = generation
        self._tasks = tasks

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Any) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Any) -> pb.ServerReadyResponse:
        ready = self._generation.ready
        if ready and self._tasks is not None:
            ready = (await self._tasks.ServerReady(request, context)).ready
        return pb.ServerReadyResponse(ready=ready)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Any) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name="isthmus", version=__version__, extensions=EXTENSIONS)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Any) -> pb.ModelReadyResponse:
        if request.name != self._generation.name and self._tasks is not None:
            return await self._tasks.ModelReady(request, context)
        known = request.name == self._generation.name and request.version in ("", VERSION)
        return pb.ModelReadyResponse(ready=known and self._generation.ready)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Any) -> pb.ModelMetadataResponse:
        if not self._ours(request.name, request.version):
            return await self._others().ModelMetadata(request, context)
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=self._generation.name,
            versions=[VERSION],
            platform=PLATFORM,
            inputs=[tensor(name=TEXT_INPUT, datatype="BYTES", shape=[1])],
            outputs=[tensor(name=TEXT_OUTPUT, datatype="BYTES", shape=[1])],
        )

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Any) -> pb.ModelConfigResponse:
        if not self._ours(request.name, request.version):
            return await self._others().ModelConfig(request, context)
        config = pb.ModelConfig(name=self._generation.name, platform=PLATFORM, backend="isthmus", max_batch_size=0)
        config.input.add(name=TEXT_INPUT, data_type=pb.TYPE_STRING, format=pb.ModelInput.FORMAT_NONE, dims=[1])
        config.output.add(name=TEXT_OUTPUT, data_type=pb.TYPE_STRING, dims=[1])
        config.parameters["context_tokens"].string_value = str(self._generation.context)
        config.parameters["max_tokens"].string_value = str(self._generation.max_tokens)
        return pb.ModelConfigResponse(config=config)

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Any) -> pb.ModelStatisticsResponse:
        if request.name and not self._ours(request.name, request.version):
            return await self._others().ModelStatistics(request, context)
        found = pb.ModelStatisticsResponse()
        if not request.name and self._tasks is not None:
            found = await self._tasks.ModelStatistics(request, context)
        outcomes = self._generation.numbers().outcomes
        finished = outcomes[Outcome.FINISHED]
        ours = found.model_stats.add(name=self._generation.name, version=VERSION, inference_count=finished)
        ours.inference_stats.success.count = finished
        ours.inference_stats.fail.count = sum(outcomes.values()) - finished
        return found

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Any) -> pb.RepositoryIndexResponse:
        found = pb.RepositoryIndexResponse()
        if self._tasks is not None:
            found = await self._tasks.RepositoryIndex(request, context)
        found.models.add(name=self._generation.name, version=VERSION, state="READY")
        return found

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:
        if not self._ours(request.model_name, request.model_version):
            return await self._others().ModelInfer(request, context)
        reply = await self._accept(request)
        text: list[str] = []
        done: Done | None = None
        try:
            async for item in reply:
                if isinstance(item, Piece):
                    text.append(item.text)
                else:
                    done = item
        finally:
            reply.cancel()
        assert done is not None, "an answer ends with Done"
        return self._response(request, "".join(text), done)

    async def ModelStreamInfer(
        self, requests: AsyncIterator[pb.ModelInferRequest], context: Any
    ) -> AsyncIterator[Response]:
        room = asyncio.Semaphore(_IN_FLIGHT)
        # Bounded, so that a client that reads nothing stops the reading of its answers, not the server's memory.
        responses: asyncio.Queue[Response | None] = asyncio.Queue(_IN_FLIGHT)
        under_way: set[asyncio.Task[None]] = set()

        async def answer(request: pb.ModelInferRequest) -> None:
            try:
                async for response in self._streamed(request, context):
                    await responses.put(response)
            finally:
                room.release()

        async def read() -> None:
            try:
                async for request in requests:
                    await room.acquire()
                    task = asyncio.create_task(answer(request))
                    under_way.add(task)
                    task.add_done_callback(under_way.discard)
                while under_way:
                    await asyncio.wait(under_way)
            except Unavailable:  # the server stops: what was asked before is still answered
                while under_way:
                    await asyncio.wait(under_way)
                await responses.put(None)
                raise
            except Exception:  # a message that cannot be decoded ends the stream; a cancelled stream has no reader
                await responses.put(None)
                raise
            await responses.put(None)

        reader = asyncio.create_task(read())
        try:
            while (response := await responses.get()) is not None:
                yield response
            await reader
        finally:
            for task in (reader, *under_way):
                task.cancel()
            await asyncio.gather(reader, *under_way, return_exceptions=True)

    async def _streamed(self, request: pb.ModelInferRequest, context: Any) -> AsyncIterator[Response]:
        try:
            if not self._ours(request.model_name, request.model_version):
                yield await self._others().streamed(request, context.time_remaining())
                return
            reply = await self._accept(request)
            try:
                async for item in reply:
                    if isinstance(item, Done):
                        yield Response(infer_response=self._response(request, "", item))
                    elif item.text:
                        yield Response(infer_response=self._response(request, item.text, None))
            finally:
                reply.cancel()
        except Exception as error:
            refused = pb.ModelInferResponse(model_name=request.model_name[:64], id=request.id[:64])
            refused.parameters[FINAL].bool_param = True
            yield Response(error_message=str(for_caller(error, "ModelStreamInfer")), infer_response=refused)

    async def _accept(self, request: pb.ModelInferRequest) -> Answer:
        return await self._generation.complete(_prompt(request), _wishes(request))

    def _response(self, request: pb.ModelInferRequest, text: str, done: Done | None) -> pb.ModelInferResponse:
        """Returns a response with this text; ``done`` makes it the last one."""
        response = pb.ModelInferResponse(model_name=self._generation.name, model_version=VERSION, id=request.id)
        response.parameters[FINAL].bool_param = done is not None
        if done is not None:
            response.parameters["finish_reason"].string_param = done.reason
            response.parameters["outcome"].string_param = done.outcome.value
            response.parameters["in_time"].bool_param = done.in_time
            for name, count in (("prompt_tokens", done.prompt_tokens), ("tokens", done.tokens)):
                response.parameters[name].int64_param = count
            # KServe's client drops numbers with fractions, so times are given in whole microseconds.
            for name, seconds in (("queue", done.queue_s), ("ttft", done.ttft_s), ("total", done.total_s)):
                response.parameters[f"{name}_us"].int64_param = round(seconds * 1e6)
        data = text.encode()
        response.outputs.add(name=TEXT_OUTPUT, datatype="BYTES", shape=[1])
        response.raw_output_contents.append(struct.pack("<I", len(data)) + data)
        return response

    def _ours(self, name: str, version: str) -> bool:
        if name != self._generation.name:
            return False
        if version not in ("", VERSION):
            raise NotYours(f"model {name!r} has only version {VERSION}")
        return True

    def _others(self) -> OpenInferenceServicer:
        if self._tasks is None:
            raise NotYours(f"only the model {self._generation.name!r} is served here")
        return self._tasks


def _prompt(request: pb.ModelInferRequest) -> str:
    """Returns the text of a request. Raises InvalidInput."""
    if len(request.inputs) != 1 or request.inputs[0].name != TEXT_INPUT:
        raise InvalidInput(f"inputs: exactly one, '{TEXT_INPUT}', is required")
    tensor = request.inputs[0]
    if tensor.datatype != "BYTES" or tuple(tensor.shape) not in ((1,), (1, 1)):
        raise InvalidInput(f"input '{TEXT_INPUT}': BYTES of shape (1) is required")
    if {output.name for output in request.outputs} - {TEXT_OUTPUT}:
        raise InvalidInput(f"outputs: only '{TEXT_OUTPUT}' is served")
    if request.raw_input_contents:
        raw = request.raw_input_contents[0]
        if len(request.raw_input_contents) != 1 or len(raw) < 4 or struct.unpack("<I", raw[:4])[0] != len(raw) - 4:
            raise InvalidInput(f"input '{TEXT_INPUT}': the raw contents are not one text with its length before it")
        data = raw[4:]
    elif len(tensor.contents.bytes_contents) == 1:
        data = tensor.contents.bytes_contents[0]
    else:
        raise InvalidInput(f"input '{TEXT_INPUT}': exactly one text is required")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidInput(f"input '{TEXT_INPUT}': the text is not UTF-8") from error


def _wishes(request: pb.ModelInferRequest) -> Wishes:
    unknown = set(request.parameters) - _PARAMETERS - _IGNORED
    if unknown:
        raise InvalidInput(f"unknown parameter {min(unknown)[:64]!r}; known are {', '.join(sorted(_PARAMETERS))}")
    given = {name: value for name in _NUMBERS if (value := number_of(request, name)) is not None}
    timeout_us = number_of(request, "timeout")
    if timeout_us is not None:
        given.setdefault("latency_s", timeout_us / 1e6)
    for name in ("max_tokens", "seed"):
        if name in given and not (given[name].is_integer() and abs(given[name]) < 1 << 53):
            raise InvalidInput(f"parameter '{name}': must be a whole number")
    stop, kind, user, salt = (_text(request, name) for name in ("stop", "kind", "user", "cache_salt"))
    return Wishes(
        max_tokens=int(given["max_tokens"]) if "max_tokens" in given else None,
        sampling=Sampling(
            temperature=given.get("temperature", 1.0),
            top_p=given.get("top_p", 1.0),
            seed=int(given["seed"]) if "seed" in given else secrets.randbits(63),
        ),
        stops=(stop,) if stop else (),
        kind=kind,
        user=user,
        salt=salt,
        tenant=owner(tenant()),
        ttft_s=given.get("ttft_s"),
        tpot_s=given.get("tpot_s"),
        latency_s=given.get("latency_s"),
        utility=given.get("utility", 1.0),
    )


def _text(request: pb.ModelInferRequest, name: str) -> str:
    if name not in request.parameters:
        return ""
    parameter = request.parameters[name]
    if parameter.WhichOneof("parameter_choice") != "string_param" or len(parameter.string_param) > 128:
        raise InvalidInput(f"parameter '{name}': must be a text of at most 128 characters")
    return str(parameter.string_param)
