"""What a caller gets for each of our errors: gRPC's status, the error's name, and when to try again."""

from typing import Any, Final

import grpc

from isthmus.proto.errors import NAME_KEY, RETRY_KEY, Busy, IsthmusError

STATUS: Final = {status.value[0]: status for status in grpc.StatusCode}


def status_of(error: IsthmusError) -> grpc.StatusCode:
    """Return the status of an error."""
    return STATUS[error.code]


async def end_with(context: Any, error: IsthmusError) -> None:
    """End a call with an error."""
    trailing = [(NAME_KEY, _name(error))]
    if isinstance(error, Busy) and error.retry_after_s is not None:
        trailing.append((RETRY_KEY, str(round(1e3 * error.retry_after_s))))
    await context.abort(status_of(error), str(error), tuple(trailing))


def _name(error: IsthmusError) -> str:
    """Return the name of an error's nearest type in the contract."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == IsthmusError.__module__)
