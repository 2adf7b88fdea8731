"""Answers every message, streamed or alone, with its own bytes. It shows gRPC's own speed on this machine.

python tests/bench/echo.py PORT_FILE
"""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
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
            return grpc.unary_unary_rpc_method_handler(_echo_one)
        return grpc.stream_stream_rpc_method_handler(_echo)


async def _echo_one(request: bytes, context: object) -> bytes:
    return request


async def _echo(requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


async def serve(port_file: Path) -> None:
    stop = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    server = grpc.aio.server(handlers=[Echo()], options=keepalive.server_options())
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    write_atomically(port_file, f"127.0.0.1:{port}\n")
    await stop.wait()
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
