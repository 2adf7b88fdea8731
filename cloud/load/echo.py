"""A bare gRPC server that answers every message with its own bytes: what gRPC alone can do on this machine.

Runs as ``python -m isthmus.cloud.load.echo PORT_FILE`` until its input ends.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from isthmus.cloud.load.callers import ECHO_STREAM
from isthmus.data.files import write_atomically
from isthmus.proto import keepalive


class _Echo(grpc.GenericRpcHandler):
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        if handler_call_details.method == ECHO_STREAM:
            return grpc.stream_stream_rpc_method_handler(_stream)
        return grpc.unary_unary_rpc_method_handler(_unary)


async def _unary(request: bytes, context: object) -> bytes:
    return request


async def _stream(requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


async def serve(port_file: Path) -> None:
    """Serve on a free port of loopback, which is written to ``port_file``, until the standard input ends."""
    server = grpc.aio.server(handlers=[_Echo()], options=keepalive.server_options())
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    write_atomically(port_file, f"127.0.0.1:{port}\n")
    await asyncio.to_thread(sys.stdin.buffer.read)
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
