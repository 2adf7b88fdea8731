"""The ports of a server: gRPC, HTTP, health checks, and metrics. A taken port raises InvalidInput."""

import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from prometheus_client import start_http_server

from isthmus.cloud.metrics.calls import Metrics
from isthmus.cloud.rpc import transport
from isthmus.cloud.service.ground import Ground
from isthmus.cloud.settings import CloudSettings, is_loopback, joined, split_listen
from isthmus.proto.errors import InvalidInput

if TYPE_CHECKING:
    from isthmus.cloud.generation.serve.opening import Opened

log = logging.getLogger(__name__)


def bind(server: grpc.aio.Server, settings: CloudSettings, metrics: Metrics) -> int:
    """Bind the port of gRPC, with TLS if there is a certificate, and return it."""
    try:
        if settings.tls_cert is None or settings.tls_key is None:
            return int(server.add_insecure_port(settings.listen))
        certificates = transport.Certificates(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
        metrics.gauge(
            "isthmus_tls_certificate_expiry_timestamp_seconds",
            "When the TLS certificate in use ends.",
            lambda: certificates.expires_s,
        )
        return int(server.add_secure_port(settings.listen, certificates.credentials()))
    except RuntimeError as error:
        raise InvalidInput(
            f"cannot listen on {settings.listen}: the port is taken, or the address is not one of this machine"
        ) from error


async def serve_http(
    listen: str, settings: CloudSettings, ground: Ground, generation: "Opened | None"
) -> tuple[int, Callable[[], Awaitable[None]]]:
    """Serve images, and text if ``generation`` is something, over HTTP; return the port, and what stops it."""
    from isthmus.cloud.http.calls import Door
    from isthmus.cloud.http.server import HttpServer, under_prefix

    openai = inference = None
    if generation is not None:
        from isthmus.cloud.http.openai import openai_app

        door = Door(settings.generate_key(), ground.roster)
        openai = openai_app(generation.answering, door, moves=generation.moves, move_key=generation.move_key)
    if ground.elastic is not None:
        from isthmus.cloud.http.open_inference import inference_app

        inference = inference_app(ground.elastic, Door(settings.elastic_key(), ground.roster))
    app = under_prefix("/v2", inference, openai)
    host, port = split_listen(listen)
    server = HttpServer(app, host, port, tls_cert=settings.tls_cert, tls_key=settings.tls_key)
    port = await server.start()
    log.info("listening for HTTP on port %d", port)
    return port, server.stop


async def serve_health(servicer: health.aio.HealthServicer, listen: str, stack: AsyncExitStack) -> int:
    """Answer health checks on a port without TLS, where nothing else is answered; return the port."""
    options = [("grpc.max_receive_message_length", 1 << 10), ("grpc.max_concurrent_streams", 16)]
    server = grpc.aio.server(options=[*options, ("grpc.max_allowed_incoming_connections", 64)])
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise InvalidInput(f"cannot answer health checks on {listen}: the port is taken") from error
    await server.start()
    stack.push_async_callback(server.stop, 0.0)
    return int(port)


def serve_metrics(settings: CloudSettings, metrics: Metrics, stack: AsyncExitStack) -> int | None:
    """Serve what Prometheus reads, if the settings ask for it; return the port. Beyond loopback it needs mutual TLS."""
    if settings.metrics_port is None and settings.metrics_listen is None:
        return None
    host, port = split_listen(settings.metrics_listen or f"127.0.0.1:{settings.metrics_port}")
    tls: dict[str, Any] = {}
    if not is_loopback(host):
        tls = {
            "certfile": str(settings.tls_cert),
            "keyfile": str(settings.tls_key),
            "client_cafile": str(settings.tls_client_ca),
            "client_auth_required": True,
        }
    try:
        httpd, _ = start_http_server(port, addr=host, registry=metrics.registry, **tls)
    except OSError as error:
        raise InvalidInput(f"metrics cannot be served on {joined(host, port)}: {error.strerror}") from error
    stack.callback(httpd.server_close)
    stack.callback(httpd.shutdown)
    return int(httpd.server_port)
