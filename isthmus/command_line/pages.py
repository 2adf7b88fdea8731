"""The help of every command as data, for documentation."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import typer

from isthmus.command_line.app import CONTEXT_SETTINGS


@dataclass(frozen=True)
class OptionPage:
    """One option or argument of a command, as documentation shows it."""

    names: tuple[str, ...]
    """Every spelling, such as ("--output", "-o"); an argument has one name without dashes."""
    value: str
    """What follows the name, such as "INTEGER" or "[auto|crema-d|ave]"; empty for a switch."""
    help: str
    default: str | None
    """None if there is none."""
    required: bool
    environment: str | None
    """The environment variable that sets it, if there is one."""
    argument: bool = False


@dataclass(frozen=True)
class CommandPage:
    """The help page of a command or of a group of commands."""

    path: str
    """The whole command, such as "isthmus data check"."""
    usage: str
    summary: str
    help: str
    example: str
    options: tuple[OptionPage, ...]
    below: tuple[str, ...]
    """Paths of a group's commands; empty for a command."""
    text: str
    """The page as ``--help`` prints it."""


def pages_of(app: typer.Typer, name: str) -> list[CommandPage]:
    """Return the pages of an app and of all commands below it, depth first. No command is run."""
    return list(_pages(typer.main.get_command(app), name, None))


def _pages(command: Any, name: str, parent: Any) -> Iterator[CommandPage]:
    context = typer.Context(command, info_name=name, parent=parent, **CONTEXT_SETTINGS)
    below: Mapping[str, Any] = getattr(command, "commands", {})
    path = context.command_path
    help = inspect.cleandoc(command.help or "")
    example = inspect.cleandoc((command.epilog or "").partition("\b\n")[2])
    yield CommandPage(
        path=path,
        usage=command.get_usage(context).removeprefix("Usage: "),
        summary=" ".join(help.partition("\n\n")[0].split()),
        help=help,
        example=example,
        options=tuple(_option_page(each, context) for each in command.params if not getattr(each, "hidden", False)),
        below=tuple(f"{path} {each}" for each in below),
        text=command.get_help(context),
    )
    for each, child in below.items():
        yield from _pages(child, each, context)


def _option_page(parameter: Any, context: Any) -> OptionPage:
    argument = parameter.param_type_name == "argument"
    names = (parameter.name,) if argument else (*parameter.opts, *parameter.secondary_opts)
    switch = bool(getattr(parameter, "is_flag", False))
    record = parameter.get_help_record(context) or ("", "")
    default = parameter.default
    shown = getattr(default, "value", default)
    if isinstance(shown, bool) and len(names) == 2:
        shown = names[0] if shown else names[1]
    return OptionPage(
        names=names,
        value="" if switch else (parameter.metavar or record[0].rpartition(" ")[2]),
        help=parameter.help or "",
        default=None if parameter.required or shown is None or shown is False or shown in ("", []) else str(shown),
        required=parameter.required,
        environment=parameter.envvar if isinstance(parameter.envvar, str) else None,
        argument=argument,
    )
