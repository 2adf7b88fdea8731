"""Reads the metrics of a running service from its port on this machine."""

import http.client
from typing import Any, Final

from prometheus_client.parser import text_string_to_metric_families

from isthmus.proto.errors import InvalidInput, Unavailable

MOST_BYTES: Final = 4 << 20
WITHIN_S: Final = 3.0
_OURS: Final = ("isthmus_", "grpc_server_")


def read_numbers(port: int) -> dict[str, list[dict[str, Any]]]:
    """Return the samples of the service's own metrics: labels and value, by the sample's name.

    Raises Unavailable if no service answers there, InvalidInput if what answers are no metrics of Isthmus.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WITHIN_S)
    try:
        connection.request("GET", "/metrics")
        reply = connection.getresponse()
        content = reply.read(MOST_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(
            f"no service shows its metrics on port {port} of this machine: start it with --metrics-port {port}"
        ) from error
    finally:
        connection.close()
    if reply.status != 200 or len(content) > MOST_BYTES:
        raise InvalidInput(f"port {port} shows no metrics of Isthmus")
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        for family in text_string_to_metric_families(content.decode()):
            for sample in family.samples:
                if sample.name.startswith(_OURS):
                    found.setdefault(sample.name, []).append({"labels": sample.labels, "value": sample.value})
    except (ValueError, KeyError, IndexError) as error:
        raise InvalidInput(f"port {port} shows no metrics of Isthmus") from error
    if not found:
        raise InvalidInput(f"port {port} shows no metrics of Isthmus")
    return {name: [each for each in samples if each["value"] == each["value"]] for name, samples in found.items()}
