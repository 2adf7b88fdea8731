"""A task's description as a message. Free of torch, so that a client needs neither the model nor the server."""

from typing import Final

from isthmus.cloud.elastic.tasks.task import TaskSpec
from isthmus.proto.v1 import elastic_pb2 as pb

_MODES_TO_PB: Final = {"append": pb.PROMPT_MODE_APPEND, "replace": pb.PROMPT_MODE_REPLACE}


def spec_to_pb(spec: TaskSpec) -> pb.TaskDescription:
    """Return the message that describes a task to a server."""
    return pb.TaskDescription(
        name=spec.name,
        classes=spec.classes,
        prompt_mode=_MODES_TO_PB[spec.prompt_mode],
        accuracy=dict(spec.accuracy),
        default_latency_s=spec.default_latency_s,
        default_utility=spec.default_utility,
    )
