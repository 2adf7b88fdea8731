"""Bounds on connections and streams that gRPC itself keeps, and the open files that they need."""

import logging
import resource
from typing import Final

from isthmus.proto import keepalive
from isthmus.proto.limits import MAX_IMAGE_MESSAGE_BYTES, MAX_MESSAGE_BYTES

log = logging.getLogger(__name__)

_DEVICE_STREAMS: Final = 512
_ELASTIC_STREAMS: Final = 1_024
"""Calls that one connection may have open. A client of elastic serving sends many pictures at a time."""
_OWN_FILES: Final = 256
"""Files that the server itself has open: database, students, worker."""


def options(connections: int, *, elastic: bool) -> tuple[tuple[str, int], ...]:
    """Return the server's channel arguments. Raises this process's limit of open files to fit ``connections``.

    ``elastic``: whether pictures arrive too; then messages and connections may be larger.
    """
    message_bytes = MAX_IMAGE_MESSAGE_BYTES if elastic else MAX_MESSAGE_BYTES
    return (
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_send_message_length", message_bytes),
        ("grpc.max_metadata_size", 8 << 10),
        ("grpc.max_concurrent_streams", _ELASTIC_STREAMS if elastic else _DEVICE_STREAMS),
        ("grpc.max_allowed_incoming_connections", min(connections, _raise_file_limit(connections))),
        # A connection that never completes its handshake, or has had no call for long, makes room for others.
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.max_connection_idle_ms", 300_000),
        # With port reuse, two servers on one port would each receive some of the devices at random.
        ("grpc.so_reuseport", 0),
        *keepalive.server_options(),
    )


def _raise_file_limit(connections: int) -> int:
    """Allow as many open files as ``connections`` and our own need; return how many connections fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OWN_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < wanted:
            log.warning("the system allows %d open files, %d connections need %d", soft, connections, wanted)
    return connections if soft == resource.RLIM_INFINITY else max(64, soft - _OWN_FILES)
