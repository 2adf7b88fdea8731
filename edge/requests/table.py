"""The table of requests: each a function with checked arguments, by its name."""

import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

from isthmus.edge.requests.device import Device
from isthmus.proto.errors import InvalidInput


@dataclass(frozen=True)
class Request:
    """One entry. ``arguments``: the type of each by name; ``needed``: those without a default."""

    function: Callable[..., dict[str, Any]]
    changes: bool
    arguments: Mapping[str, Any]
    needed: frozenset[str]


_TABLE: dict[str, Request] = {}
_one_change = threading.Lock()

_Function = TypeVar("_Function", bound=Callable[..., dict[str, Any]])


def request(*, changes: bool) -> Callable[[_Function], _Function]:
    """Add the decorated function to the table.

    ``changes``: it writes to the folder, so it runs alone, and holds the folder if no process runs the device.
    """

    def add(function: _Function) -> _Function:
        hints = get_type_hints(function)
        parameters = list(inspect.signature(function).parameters.values())[1:]
        _TABLE[function.__name__] = Request(
            function,
            changes,
            {each.name: hints[each.name] for each in parameters},
            frozenset(each.name for each in parameters if each.default is each.empty),
        )
        return function

    return add


def wanted_of(question: Mapping[str, Any]) -> tuple[Request, dict[str, Any]]:
    """Return the request that is asked for and its checked arguments. Raises InvalidInput."""
    name, arguments = question.get("request"), question.get("arguments", {})
    if not isinstance(name, str) or name not in _TABLE:
        raise InvalidInput(f"{name!r} is no request of this version; it knows {', '.join(sorted(_TABLE))}")
    wanted = _TABLE[name]
    if not isinstance(arguments, dict) or not wanted.needed <= arguments.keys() <= wanted.arguments.keys():
        raise InvalidInput(f"{name} takes the arguments: {', '.join(wanted.arguments) or 'none'}")
    for argument, value in arguments.items():
        kind = wanted.arguments[argument]
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise InvalidInput(f"{name}: {argument} is {value!r}, which is no {getattr(kind, '__name__', kind)}")
    return wanted, arguments


def perform(device: Device, wanted: Request, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the request's answer. Requests that change something run one at a time. Raises what the request raises."""
    if not wanted.changes:
        return wanted.function(device, **arguments)
    with _one_change:
        return wanted.function(device, **arguments)
