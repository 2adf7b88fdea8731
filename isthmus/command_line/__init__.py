"""The kit of every command line: options from dataclasses, errors in one line, the nearest name, lists, tables, pages.

It imports typer and the standard library alone, so that ``--help`` needs none of the libraries that a command works
with. A module that declares commands imports those libraries inside the command's function.
"""

from isthmus.command_line.app import App
from isthmus.command_line.errors import (
    FULL_ERRORS,
    INTERRUPTED,
    Refused,
    did_you_mean,
    ending_clearly,
    fail,
    is_expected,
    missing_package,
    one_line,
)
from isthmus.command_line.pages import CommandPage, OptionPage, pages_of
from isthmus.command_line.tables import print_table
from isthmus.command_line.values import (
    Device,
    Layout,
    Seed,
    Threads,
    check_fields,
    check_writable,
    from_plain,
    key_in,
    known,
    listed,
    numbers,
    option_fields,
    to_plain,
    whole_numbers,
)

__all__ = [
    "FULL_ERRORS",
    "INTERRUPTED",
    "App",
    "CommandPage",
    "Device",
    "Layout",
    "OptionPage",
    "Refused",
    "Seed",
    "Threads",
    "check_fields",
    "check_writable",
    "did_you_mean",
    "ending_clearly",
    "fail",
    "from_plain",
    "is_expected",
    "key_in",
    "known",
    "listed",
    "missing_package",
    "numbers",
    "one_line",
    "option_fields",
    "pages_of",
    "print_table",
    "to_plain",
    "whole_numbers",
]
