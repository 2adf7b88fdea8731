"""A bare gRPC server that answers every message with its own bytes: what gRPC alone can do on this machine.

Runs as ``python -m isthmus.cloud.load.echo PORT_FILE`` until its input ends.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from isthmus.cloud.load.callers import ECHO_UNARY
from isthmus.data.files import write_atomically
from isthmus.proto import keepalive


class Echo(grpc.GenericRpcHandler):
    """Handles the load generator's unary method, and any other as a stream of bytes in both directions."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        if handler_call_details.method == ECHO_UNARY:
            return grpc.unary_unary_rpc_method_handler(_unary)
        return grpc.stream_stream_rpc_method_handler(_stream)


async def _unary(request: bytes, context: object) -> bytes:
    return request


async def _stream(requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


async def serve(port_file: Path, end: Callable[[], Awaitable[object]]) -> None:
    """Serve on a free port of loopback, which is written to ``port_file``, until ``end`` returns."""
    server = grpc.aio.server(handlers=[Echo()], options=keepalive.server_options())
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    write_atomically(port_file, f"127.0.0.1:{port}\n")
    await end()
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), partial(asyncio.to_thread, sys.stdin.buffer.read)))
