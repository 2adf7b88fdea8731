"""How both ends of a connection notice that the other end is gone. The settings of device and cloud must fit together.

A device pings after ``PING_AFTER_S`` without data and gives the connection up ``PING_TIMEOUT_S`` later: a connection
that swallows everything is noticed within ``NOTICED_S``. A server counts pings that come sooner than
``SERVER_ALLOWS_S`` after each other, and closes the connection (GOAWAY, ``too_many_pings``) after a few of them.
"""

from typing import Final

PING_AFTER_S: Final = 10.5
"""Longer than ``SERVER_ALLOWS_S``. A second ping is sent at the earliest this long after the answer to the first."""
PING_TIMEOUT_S: Final = 4.0
NOTICED_S: Final = 15.0

SERVER_ALLOWS_S: Final = 10.0
SERVER_PINGS_AFTER_S: Final = 60.0
SERVER_PING_TIMEOUT_S: Final = 20.0

CONNECT_TIMEOUT_S: Final = 5.0
"""An attempt to connect is given up after this time, since an address behind a dead link answers nothing."""
RECONNECT_MOST_S: Final = 3.0
"""The longest pause between attempts; gRPC adds up to a fifth. With the attempt, a device is back within 10 s."""


def device_options() -> list[tuple[str, int]]:
    """Return the channel arguments of a device."""
    return [
        ("grpc.keepalive_time_ms", round(PING_AFTER_S * 1000)),
        ("grpc.keepalive_timeout_ms", round(PING_TIMEOUT_S * 1000)),
        # A ping has a timeout of its own, a minute by default, and the longer of the two applies.
        ("grpc.http2.ping_timeout_ms", round(PING_TIMEOUT_S * 1000)),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        # The time for one attempt, in spite of its name.
        ("grpc.min_reconnect_backoff_ms", round(CONNECT_TIMEOUT_S * 1000)),
        ("grpc.max_reconnect_backoff_ms", round(RECONNECT_MOST_S * 1000)),
    ]


def server_options() -> list[tuple[str, int]]:
    """Return the channel arguments of a server."""
    return [
        ("grpc.keepalive_time_ms", round(SERVER_PINGS_AFTER_S * 1000)),
        ("grpc.keepalive_timeout_ms", round(SERVER_PING_TIMEOUT_S * 1000)),
        ("grpc.http2.ping_timeout_ms", round(SERVER_PING_TIMEOUT_S * 1000)),
        ("grpc.http2.min_ping_interval_without_data_ms", round(SERVER_ALLOWS_S * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
