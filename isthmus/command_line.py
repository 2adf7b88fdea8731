"""The kit of every command line: options from dataclasses, errors in one line, the nearest name, lists, tables, pages.

It imports typer and the standard library alone, so that ``--help`` needs none of the libraries that a command works
with. A module that declares commands imports those libraries inside the command's function.
"""

import codecs
import copy
import dataclasses
import difflib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
Device = Annotated[str, typer.Option(help="Where to compute: 'cpu', 'cuda', or 'auto' for a GPU if there is one.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads of torch. 0 leaves the number to torch.")]
Layout = Annotated[
    Literal["auto", "crema-d", "ave"],
    typer.Option(help="How the data set's files are arranged. 'auto' looks at the folder."),
]

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C or SIGTERM ended: 128 and the number of SIGINT."""
FULL_ERRORS = "ISTHMUS_TRACEBACK"
"""Environment variable. If it is set, an error ends a command with its whole traceback."""

_WRITTEN = frozenset({"out", "report", "to", "port_file"})
"""Options that name what a command writes at its end: they are tried at its beginning."""

_Function = TypeVar("_Function", bound=Callable[..., None])
_Options = TypeVar("_Options")
_UsageError: Any = typer.BadParameter.__mro__[1]
_ClickException: Any = typer.BadParameter.__mro__[2]
"""The base classes of usage errors: typer has its own copy of click and exports neither class."""
_PIPE_COLUMNS = 200
"""Width of a table that is written to a file or a pipe."""


class Refused(Exception):
    """The command cannot do what was asked. The message says why, and what to do instead."""


def fail(message: str) -> NoReturn:
    """End the command with one line on stderr and exit code 1."""
    raise Refused(message)


# Errors


def is_expected(error: BaseException) -> bool:
    """Return whether a person can act on the error: a system error, a refused value, or an exception class of ours."""
    return isinstance(error, (OSError, ValueError)) or type(error).__module__.partition(".")[0] == "isthmus"


def one_line(error: BaseException) -> str:
    """Return what the error says in one line: for a system error the file and the reason, not its number."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{os.fsdecode(error.filename)}: {error.strerror}"
    else:
        text = str(error) or type(error).__name__
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in " ".join(text.split()))


@contextmanager
def ending_clearly(command: str, *, extra: str = "", resumes: bool = False) -> Iterator[None]:
    """Turn an error that a person can act on into one line on stderr and exit code 1; an interruption into 130.

    ``command`` is the command's whole name. ``extra`` is the extra of the package that brings what the command
    imports. ``resumes`` says that the same command continues the work. Other errors are bugs and pass through.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of our output has gone: typer ends the command without a word
    except KeyboardInterrupt:
        kept = "; finished work is kept, and the same command continues it" if resumes else ""
        typer.echo(f"{command}: interrupted{kept}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except ModuleNotFoundError as error:
        if not extra or error.name is None or error.name.partition(".")[0] == "isthmus" or FULL_ERRORS in os.environ:
            raise
        typer.echo(missing_package(command, error.name, extra), err=True)
        raise typer.Exit(1) from error
    except Exception as error:
        if not is_expected(error) or FULL_ERRORS in os.environ:
            raise
        typer.echo(f"{command}: {one_line(error)}", err=True)
        raise typer.Exit(1) from error


def check_writable(path: Path, option: str) -> None:
    """Check that a file or folder can be made at ``path``, by making one beside it. Raises ValueError."""
    import tempfile

    folder = path if path.is_dir() else path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{option} {path}: nothing can be written to {folder}: {error.strerror}") from error


def missing_package(command: str, package: str, extra: str) -> str:
    """Return the line that says how to install what a command lacks."""
    return f"{command}: the package '{package}' is not installed here. Install it with: pip install 'isthmus[{extra}]'"


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return " Did you mean 'X'?" with the nearest of ``names``, or nothing if none is near."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


# Commands


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
            context_settings=_SETTINGS,
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
                context_settings=_SETTINGS,
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


_SETTINGS: dict[str, Any] = {"max_content_width": 100, "help_option_names": ["--help", "-h"]}


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
            name: kind(**{field.name: rest.pop(field.name) for field in dataclasses.fields(kind)})
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
        of_fields = get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            elif default is dataclasses.MISSING:
                default = Parameter.empty
            parameters.append(_parameter(field.name, of_fields[field.name], default, environment))
    return _Expanded(sorted(parameters, key=lambda one: one.default is not Parameter.empty), groups)


def _parameter(name: str, annotation: Any, default: Any, environment: str | None) -> Parameter:
    if environment is not None and get_origin(annotation) is Annotated:
        kind, option, *_ = get_args(annotation)
        option = copy.copy(option)
        option.envvar = f"{environment}{name.upper()}"
        option.show_envvar = False
        annotation = Annotated[kind, option]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


# Options as a value


def check_fields(options: Any) -> None:
    """Check a dataclass of options against the bounds and choices that its options have on the command line.

    So a value that was made in Python keeps the same bounds. Raises ValueError naming the option.
    """
    for name, annotation in get_type_hints(type(options), include_extras=True).items():
        value = getattr(options, name)
        kind, *extras = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
        option = f"--{name.replace('_', '-')}"
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise ValueError(f"{option}: {value!r} is not one of {', '.join(get_args(kind))}")
        for extra in extras:
            if value is None or not isinstance(value, (int, float)):
                continue
            if getattr(extra, "min", None) is not None and value < extra.min:
                raise ValueError(f"{option}: {value:g} is below {extra.min:g}")
            if getattr(extra, "max", None) is not None and value > extra.max:
                raise ValueError(f"{option}: {value:g} is above {extra.max:g}")


def to_plain(options: Any) -> dict[str, Any]:
    """Return the fields of a dataclass of options as JSON can hold them. Secrets are included."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def from_plain(kind: type[_Options], values: Mapping[str, Any]) -> _Options:
    """Return the options that ``to_plain`` was given. Raises TypeError for a field that does not exist."""
    hints = get_type_hints(kind)
    return kind(
        **{
            name: Path(value) if value is not None and Path in (hints.get(name), *get_args(hints.get(name))) else value
            for name, value in values.items()
        }
    )


# Lists on the command line


def listed(text: str) -> list[str]:
    """Return the parts of a list with commas between them, without surrounding spaces and without empty parts."""
    return [part.strip() for part in text.split(",") if part.strip()]


def whole_numbers(text: str, option: str) -> tuple[int, ...]:
    """Return the whole numbers of a list with commas. Raises a usage error that names the option."""
    return tuple(_number(part, int, option, "a whole number", "0,1,2") for part in listed(text))


def numbers(text: str, option: str, *, distinct: bool = False) -> tuple[float, ...]:
    """Return the numbers of a list with commas. Raises a usage error that names the option.

    With ``distinct``, a number that is there twice is an error too.
    """
    found = tuple(_number(part, float, option, "a number", "0.5,1,2") for part in listed(text))
    if distinct and len(set(found)) != len(found):
        raise typer.BadParameter(f"a number of '{text}' is there twice.", param_hint=f"'{option}'")
    return found


_Number = TypeVar("_Number", int, float)


def _number(part: str, kind: type[_Number], option: str, what: str, such_as: str) -> _Number:
    try:
        return kind(part)
    except ValueError:
        message = f"'{part}' is not {what}. Give numbers with commas between them, such as {such_as}."
        raise typer.BadParameter(message, param_hint=f"'{option}'") from None


def known(text: str, names: Iterable[str], option: str) -> tuple[str, ...]:
    """Return the names of a list with commas, each one of ``names``. Raises a usage error for an unknown name, and for
    an empty list."""
    names, chosen = list(names), tuple(listed(text))
    for each in chosen:
        if each not in names:
            message = f"'{each}' is not one of {', '.join(names)}.{did_you_mean(each, names)}"
            raise typer.BadParameter(message, param_hint=f"'{option}'")
    if not chosen:
        raise typer.BadParameter(f"Name at least one of {', '.join(names)}.", param_hint=f"'{option}'")
    return chosen


def key_in(path: Path | None) -> str | None:
    """Return the key that a file holds, without surrounding spaces; None if there is no file to read.

    Raises ValueError if the file holds no text or no key, OSError if it cannot be read. No error shows the key.
    """
    if path is None:
        return None
    content = path.read_bytes()
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        key = content.decode("utf-16" if marked else "utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: this file holds no key: it is not text") from None
    if not key:
        raise ValueError(f"{path}: this file holds no key: it is empty")
    return key


# Tables


def print_table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    right: bool = False,
    tabs_in_pipes: bool = False,
) -> None:
    """Print a table. Cells are shown as they are: square brackets in a name are no markup.

    ``right`` aligns every column but the first to the right. With ``tabs_in_pipes``, output to a file or a pipe is the
    rows alone, with tabs between cells, for another program.
    """
    if tabs_in_pipes and not sys.stdout.isatty():
        for row in rows:
            typer.echo("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=None if title is None else Text(title), title_justify="left")
    for position, header in enumerate(headers):
        table.add_column(Text(header), justify="right" if right and position else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    (console if console.is_terminal else Console(width=_PIPE_COLUMNS)).print(table)


# Pages


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
    context = typer.Context(command, info_name=name, parent=parent, **_SETTINGS)
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
