"""Every error that may cross the wire, as one tree. Each has a status code and says whether a retry helps.

    IsthmusError
    ├── InvalidInput            INVALID_ARGUMENT      a value that can never be accepted
    │   ├── BadFrame            INVALID_ARGUMENT      a feature frame that does not parse, or holds NaN or infinity
    │   ├── BadPrototypes       INVALID_ARGUMENT      prototypes that are not distributions, or below the floor
    │   └── OutOfOrder          INVALID_ARGUMENT      a sequence number or round that does not follow the last
    ├── TooLarge                RESOURCE_EXHAUSTED    over a bound of limits.py (retry: no)
    ├── Unauthenticated         UNAUTHENTICATED       no token, or an unknown one
    ├── NotYours                NOT_FOUND             unknown, or of another device: both look the same
    ├── WrongState              FAILED_PRECONDITION   the job or student is not in the state this call needs
    ├── Busy                    RESOURCE_EXHAUSTED    too much work at the moment (retry: yes)
    ├── TooLate                 DEADLINE_EXCEEDED     could not be answered in time, so it was not computed
    ├── Unavailable             UNAVAILABLE           the other side cannot be reached (retry: yes)
    ├── Corrupt                 DATA_LOSS             a checksum, hash or signature that does not match (retry: yes)
    ├── StorageFull             RESOURCE_EXHAUSTED    the disk is full; the work so far is kept (retry: yes)
    ├── Locked                  FAILED_PRECONDITION   another process holds this database or folder
    └── Internal                INTERNAL              a fault of the server; details are in its log

Messages are short and say what to do. They never contain a secret, a path of the server or a stack trace.
"""

from collections.abc import Iterator
from typing import ClassVar, Final


class IsthmusError(Exception):
    """Root of the tree. ``code`` is a google.rpc.Code number, equal to grpc.StatusCode.value[0].

    >>> InvalidInput.code, InvalidInput.retryable
    (3, False)
    """

    code: ClassVar[int] = 2
    retryable: ClassVar[bool] = False


class InvalidInput(IsthmusError):
    """A value that can never be accepted. The message says which value, and what is accepted instead.

    >>> raise InvalidInput("rounds: at least 1 is needed")
    Traceback (most recent call last):
        ...
    isthmus.proto.errors.InvalidInput: rounds: at least 1 is needed
    """

    code = 3


class BadFrame(InvalidInput):
    pass


class BadPrototypes(InvalidInput):
    pass


class OutOfOrder(InvalidInput):
    pass


class TooLarge(IsthmusError):
    code = 8


class Unauthenticated(IsthmusError):
    code = 16


class NotYours(IsthmusError):
    code = 5


class WrongState(IsthmusError):
    code = 9


class Busy(IsthmusError):
    """``retry_after_s``: when the other side expects to have room again; None if it does not know."""

    code = 8
    retryable = True

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooLate(IsthmusError):
    code = 4


class Unavailable(IsthmusError):
    code = 14
    retryable = True


class Corrupt(IsthmusError):
    code = 15
    retryable = True


class StorageFull(IsthmusError):
    code = 8
    retryable = True


class Locked(IsthmusError):
    code = 9


class Internal(IsthmusError):
    code = 13


NAME_KEY: Final = "isthmus-error"
"""Key of the trailing metadata that names the error's class, because several classes share a status code."""

RETRY_KEY: Final = "grpc-retry-pushback-ms"
"""Key of the trailing metadata that says after how many milliseconds to try again. gRPC's own name for it."""


def _all_below(root: type[IsthmusError]) -> Iterator[type[IsthmusError]]:
    for error in root.__subclasses__():
        yield error
        yield from _all_below(error)


def retry_after_s(pushback_ms: str) -> float | None:
    """Return the seconds of a value of ``RETRY_KEY``; None for "", and for what is no such value.

    >>> retry_after_s("1500"), retry_after_s("-1"), retry_after_s("soon")
    (1.5, None, None)
    """
    # A negative value means "do not try again" to gRPC. No error of ours is final, so it is no hint.
    is_number = pushback_ms.isascii() and pushback_ms.isdigit() and len(pushback_ms) < 10
    return int(pushback_ms) / 1000 if is_number else None


def from_status(code: int, message: str, name: str = "", pushback_ms: str = "") -> IsthmusError:
    """Return the error of the tree for a status that was received over the wire.

    ``name`` is the value of ``NAME_KEY``. It is empty if gRPC itself or a proxy refused the call. RESOURCE_EXHAUSTED
    then means that the server is busy, unless the message says that a message was over gRPC's bound. ``pushback_ms`` is
    the value of ``RETRY_KEY``, if there is one.
    """
    if code == 1:
        # A server that stops ends calls so that had arrived and were not begun. gRPC's message is just "CANCELLED".
        return Unavailable("the server stopped before it began this call; try again")
    named = {error.__name__: error for error in _all_below(IsthmusError) if error.code == code}
    by_code: dict[int, type[IsthmusError]] = {
        3: InvalidInput,
        4: TooLate,
        5: NotYours,
        8: TooLarge if "larger than max" in message else Busy,
        9: WrongState,
        13: Internal,
        14: Unavailable,
        15: Corrupt,
        16: Unauthenticated,
    }
    kind = named.get(name, by_code.get(code, Internal))
    return Busy(message, retry_after_s=retry_after_s(pushback_ms)) if kind is Busy else kind(message)
