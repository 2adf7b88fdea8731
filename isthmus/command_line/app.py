"""Groups of commands: options from dataclasses, plain help, and errors in one line."""

import copy
import dataclasses
import inspect
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from isthmus.command_line.errors import did_you_mean, ending_clearly, one_line
from isthmus.command_line.values import check_writable, option_fields, options_from

CONTEXT_SETTINGS: dict[str, Any] = {"max_content_width": 100, "help_option_names": ["--help", "-h"]}

_WRITTEN = frozenset({"out", "report", "to", "port_file"})
"""Options that name what a command writes at its end: they are tried at its beginning."""

_Function = TypeVar("_Function", bound=Callable[..., None])
_UsageError: Any = typer.BadParameter.__mro__[1]
_ClickException: Any = typer.BadParameter.__mro__[2]
"""The base classes of usage errors: typer has its own copy of click and exports neither class."""


class _EndsInOneLine:
    """Prints a usage error as one line on stderr and exits with its code, 2."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        above: Any = super()
        rest = {"complete_var": complete_var, "windows_expand_args": windows_expand_args, **extra}
        if not standalone_mode:
            return above.main(args, prog_name, standalone_mode=False, **rest)
        try:
            code = above.main(args, prog_name, standalone_mode=False, **rest)
        except _ClickException as error:
            typer.echo(_usage_line(error, prog_name or "isthmus"), err=True)
            sys.exit(error.exit_code)
        except typer.Abort:
            sys.exit(1)
        sys.exit(code if isinstance(code, int) else 0)


class _Command(_EndsInOneLine, TyperCommand):
    pass


class _Group(_EndsInOneLine, TyperGroup):
    """A group that shows its help if no command is given, and offers the nearest command for one it does not know."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands and not args[0].startswith("-"):
            ctx.fail(f"no command '{args[0]}'.{did_you_mean(args[0], self.commands)}")
        return super().resolve_command(ctx, args)


def _usage_line(error: Any, prog_name: str) -> str:
    context = getattr(error, "ctx", None)
    path = prog_name if context is None else context.command_path
    option = getattr(error, "option_name", None)
    if hasattr(error, "possibilities") and option and context is not None:
        known = [name for each in context.command.params for name in (*each.opts, *each.secondary_opts)]
        message = f"no option '{option}'.{did_you_mean(option, [*known, '--help'])}"
    else:
        message = " ".join(error.format_message().replace("Value error, ", "").split())
        if hasattr(error, "says_the_way_out"):
            return f"{path}: {message}"
        message = message if message.endswith((".", "?")) else f"{message}."
    return f"{path}: {message} '{path} --help' lists what it takes."


class App(typer.Typer):
    """A group of commands whose help is plain text and whose errors are one line.

    ``name`` is the whole command, such as "isthmus data". ``extra`` names the extra of the package that its commands
    need. ``log_level``: log records from this level on are
    written to stderr, as bare messages; None leaves logging as it is.
    """

    def __init__(self, name: str, *, help: str, extra: str, log_level: int | None = None) -> None:
        super().__init__(
            name=name,
            cls=_Group,
            help=help,
            short_help=" ".join(help.partition("\n\n")[0].split()),
            no_args_is_help=False,
            add_completion=False,
            rich_markup_mode=None,
            pretty_exceptions_enable=False,
            context_settings=CONTEXT_SETTINGS,
        )
        self.name = name
        self.extra = extra
        self._log_level = log_level

    def command(  # type: ignore[override]
        self,
        name: str | None = None,
        *,
        example: str = "",
        resumes: bool = False,
        extra: str | None = None,
        environment: str | None = None,
    ) -> Callable[[_Function], _Function]:
        """Register a function as a command. Its docstring is the help.

        A parameter whose type is a dataclass takes each of the dataclass's fields as an option. ``example`` is one
        command line, or several. ``resumes`` says that running the command again continues an interrupted run.
        ``extra`` replaces the app's. With ``environment``, each option can be set by the environment variable of this
        prefix and the option's name in capitals; an empty variable counts as unset.
        """

        def register(function: _Function) -> _Function:
            expanded = _expanded(function, environment)
            level = self._log_level

            def run(context: typer.Context, **given: Any) -> None:
                if level is not None:
                    logging.basicConfig(level=level, format="%(message)s")
                with ending_clearly(context.command_path, extra=extra or self.extra, resumes=resumes):
                    for option in _WRITTEN & given.keys():
                        if isinstance(given[option], Path):
                            check_writable(given[option], f"--{option.replace('_', '-')}")
                    function(**_arguments(expanded, given, context))

            called: Any = wraps(function)(run)
            parameters = [
                Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context),
                *expanded.parameters,
            ]
            called.__signature__ = inspect.Signature(parameters)
            called.__annotations__ = {each.name: each.annotation for each in parameters}
            help = inspect.cleandoc(function.__doc__ or "")
            typer.Typer.command(
                self,
                name,
                cls=_Command,
                help=help,
                short_help=" ".join(help.partition("\n\n")[0].split()),
                epilog=f"Example:\n\n\b\n{_indented(example)}" if example else None,
                context_settings=CONTEXT_SETTINGS,
            )(called)
            return function

        return register

    def add(self, below: "App") -> None:
        """Add another app, whose name begins with this one's, as a group."""
        self.add_typer(below, name=below.name.rpartition(" ")[2], cls=_Group)


def _arguments(expanded: "_Expanded", given: Mapping[str, Any], context: typer.Context) -> dict[str, Any]:
    """Make the dataclasses of options. Options that do not go together are a usage error."""
    try:
        return expanded.arguments(given)
    except ValueError as error:
        refused = _UsageError(one_line(error), ctx=context)
        refused.says_the_way_out = True
        raise refused from error


def _indented(example: str) -> str:
    return "\n".join(f"  {line}" for line in inspect.cleandoc(example).splitlines())


@dataclass(frozen=True)
class _Expanded:
    """A function's parameters for typer, required ones first, and which of them belong to one of its dataclasses."""

    parameters: list[Parameter]
    groups: Mapping[str, type[Any]]

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        rest = dict(given)
        grouped = {
            name: options_from(kind, {field.name: rest.pop(field.name) for field in option_fields(kind)})
            for name, kind in self.groups.items()
        }
        return {**grouped, **rest}


def _expanded(function: Callable[..., None], environment: str | None) -> _Expanded:
    hints = get_type_hints(function, include_extras=True)
    parameters: list[Parameter] = []
    groups: dict[str, type[Any]] = {}
    for one in inspect.signature(function).parameters.values():
        kind = hints[one.name]
        if not dataclasses.is_dataclass(kind):
            parameters.append(_parameter(one.name, kind, one.default, environment))
            continue
        assert isinstance(kind, type)
        groups[one.name] = kind
        for field in option_fields(kind):
            default = Parameter.empty if field.default is dataclasses.MISSING else field.default
            parameters.append(_parameter(field.name, field.annotation, default, environment))
    return _Expanded(sorted(parameters, key=lambda one: one.default is not Parameter.empty), groups)


def _parameter(name: str, annotation: Any, default: Any, environment: str | None) -> Parameter:
    if environment is not None and get_origin(annotation) is Annotated:
        kind, option, *_ = get_args(annotation)
        option = copy.copy(option)
        option.envvar = f"{environment}{name.upper()}"
        option.show_envvar = False
        annotation = Annotated[kind, option]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
