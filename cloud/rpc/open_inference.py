"""inference.GRPCInferenceService on the wire. What it answers is decided in elastic/serve/open_inference.py."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

from isthmus.cloud.elastic.serve.open_inference import EXTENSIONS, OpenInference, number_of, server_metadata
from isthmus.cloud.elastic.serve.serving import Elastic
from isthmus.cloud.rpc.scopes import for_caller, tenant
from isthmus.cloud.tenants.roster import Roster
from isthmus.proto.open_inference import inference_pb2 as pb
from isthmus.proto.open_inference import inference_pb2_grpc as pb_grpc

__all__ = ["EXTENSIONS", "OpenInferenceServicer", "number_of"]

_STREAM_IN_FLIGHT: Final = 256
"""Requests of one stream that are answered at a time. Further requests stay with the client."""


class OpenInferenceServicer(pb_grpc.GRPCInferenceServiceServicer):
    """Maps the Open Inference Protocol to elastic serving."""

    def __init__(self, elastic: Elastic, roster: Roster) -> None:
        self.models = OpenInference(elastic, tenant, lambda images: roster.admit(tenant(), images))

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Any) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Any) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self.models.ready)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Any) -> pb.ModelReadyResponse:
        return pb.ModelReadyResponse(ready=self.models.model_ready(request.name, request.version))

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Any) -> pb.ServerMetadataResponse:
        return server_metadata()

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Any) -> pb.ModelMetadataResponse:
        return self.models.metadata(request.name, request.version)

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Any) -> pb.ModelConfigResponse:
        return self.models.config(request.name, request.version)

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Any) -> pb.ModelStatisticsResponse:
        return self.models.statistics(request.name, request.version)

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Any) -> pb.RepositoryIndexResponse:
        return self.models.index()

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:
        return await self.models.infer(request, context.time_remaining(), of_call=True)

    async def ModelStreamInfer(
        self, requests: AsyncIterator[pb.ModelInferRequest], context: Any
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        room = asyncio.Semaphore(_STREAM_IN_FLIGHT)
        # Holds at most the semaphore's number of tasks, plus the end marker.
        replies: asyncio.Queue[asyncio.Task[pb.ModelStreamInferResponse] | None] = asyncio.Queue()
        under_way: set[asyncio.Task[pb.ModelStreamInferResponse]] = set()

        async def read() -> None:
            try:
                async for request in requests:
                    await room.acquire()
                    reply = asyncio.create_task(self.streamed(request, context.time_remaining()))
                    under_way.add(reply)
                    replies.put_nowait(reply)
            finally:
                replies.put_nowait(None)

        reader = asyncio.create_task(read())
        try:
            while (reply := await replies.get()) is not None:
                yield await reply
                under_way.discard(reply)
                room.release()
            await reader
        finally:
            for task in (reader, *under_way):
                task.cancel()
            await asyncio.gather(reader, *under_way, return_exceptions=True)

    async def streamed(self, request: pb.ModelInferRequest, remaining_s: float | None) -> pb.ModelStreamInferResponse:
        """Answer one request of a stream; an error becomes a response."""
        try:
            response = await self.models.infer(request, remaining_s, of_call=False)
        except Exception as error:
            refused = pb.ModelInferResponse(model_name=request.model_name[:64], id=request.id[:64])
            message = str(for_caller(error, "ModelStreamInfer"))
            return pb.ModelStreamInferResponse(error_message=message, infer_response=refused)
        return pb.ModelStreamInferResponse(infer_response=response)
