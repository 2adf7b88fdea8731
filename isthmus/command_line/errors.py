"""Errors of a command in one line, and the nearest name."""

import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C or SIGTERM ended: 128 and the number of SIGINT."""
FULL_ERRORS = "ISTHMUS_TRACEBACK"
"""Environment variable. If it is set, an error ends a command with its whole traceback."""


class Refused(Exception):
    """The command cannot do what was asked. The message says why, and what to do instead."""


def fail(message: str) -> NoReturn:
    """End the command with one line on stderr and exit code 1."""
    raise Refused(message)


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


def missing_package(command: str, package: str, extra: str) -> str:
    """Return the line that says how to install what a command lacks."""
    return f"{command}: the package '{package}' is not installed here. Install it with: pip install 'isthmus[{extra}]'"


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return " Did you mean 'X'?" with the nearest of ``names``, or nothing if none is near."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""
