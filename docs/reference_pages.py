"""Write the generated parts of the reference: commands, settings, RPCs, errors and the public API, all as Markdown.

A page holds a line such as ``<!-- generated: commands -->``. When the site is built, the text that the function of this
name returns takes the line's place. Nothing is written to disk, so nothing can be out of date.
"""

import ast
import dataclasses
import importlib
import inspect
import itertools
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import typer

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

CODES = {
    3: "INVALID_ARGUMENT",
    4: "DEADLINE_EXCEEDED",
    5: "NOT_FOUND",
    8: "RESOURCE_EXHAUSTED",
    9: "FAILED_PRECONDITION",
    13: "INTERNAL",
    14: "UNAVAILABLE",
    15: "DATA_LOSS",
    16: "UNAUTHENTICATED",
}
"""Names of the google.rpc.Code numbers in use."""


def fill_in(app: Any, document: str, source: list[str]) -> None:
    """Replace the marked lines of a page, and turn links to files that are no part of the site into their text."""
    text = source[0]
    for name, write in GENERATED.items():
        marker = f"<!-- generated: {name} -->"
        if marker in text:
            text = text.replace(marker, write())
    if (
        document.startswith("results/") and document.count("/") > 1
    ):  # a page that a command wrote, linked from its result
        text = f"---\norphan: true\n---\n{text}"
    source[0] = unlinked(text, (DOCS / document).parent)


def unlinked(text: str, folder: Path) -> str:
    """Return ``text`` without the links of ``folder``'s page that leave docs/ or lead to a folder."""

    def replace(found: re.Match[str]) -> str:
        label, target = found[1], found[2]
        if target.startswith(("http:", "https:", "#", "mailto:")):
            return found[0]
        path = (folder / target.partition("#")[0]).resolve()
        if path.is_dir() or (path.exists() and not path.is_relative_to(DOCS)):
            return label if "`" in label or " " in label else f"`{label}`"
        return found[0]

    return re.sub(r"(?<!!)\[([^\]\n]+)\]\(([^)\s]+)\)", replace, text)


# Commands


def commands() -> str:
    """The help of every command, from the commands themselves. None of them is run."""
    from typer.main import get_command

    from isthmus.cli import SUBCOMMANDS

    parts: list[str] = []
    for name, command in SUBCOMMANDS.items():
        parts += _command(get_command(importlib.import_module(command.module).app), f"isthmus {name}")
    return "\n".join(parts)


def _command(command: Any, path: str) -> Iterator[str]:
    below = getattr(command, "commands", {})
    yield f"{'#' * min(len(path.split()), 4)} {path}\n"
    yield _plain(inspect.cleandoc(command.help or "")) + "\n"
    if below:
        yield "Commands: " + ", ".join(f"`{path} {each}`" for each in below) + ".\n"
    if not below or path.count(" ") == 1:
        yield f"```text\n{path} {_usage(command, below)}\n```\n"
    if command.epilog:
        example = inspect.cleandoc(command.epilog.partition("\b\n")[2] or command.epilog)
        yield f"```sh\n{textwrap.dedent(example)}\n```\n"
    shown = [each for each in command.params if not _hidden(each)]
    if shown:
        yield "| option | meaning |\n| --- | --- |"
        yield "\n".join(f"| {_spelled(each, command)} | {_meaning(each)} |" for each in shown) + "\n"
    for each, child in below.items():
        yield from _command(child, f"{path} {each}")


def _hidden(parameter: Any) -> bool:
    completion = {"--help", "--install-completion", "--show-completion"}
    return getattr(parameter, "hidden", False) or bool(completion & set(parameter.opts))


def _usage(command: Any, below: Any) -> str:
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    names = [(each.metavar or each.name).upper() for each in arguments]
    return " ".join(["[OPTIONS]", *(["COMMAND [ARGS]..."] if below else names)])


def _spelled(parameter: Any, command: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{(parameter.metavar or parameter.name).upper()}`"
    names = " / ".join((*parameter.opts, *parameter.secondary_opts))
    record = parameter.get_help_record(typer.Context(command)) or ("",)
    kind = re.search(r" ([<\[A-Z].*)$", record[0])
    value = "" if parameter.is_flag else f" {parameter.metavar or (kind[1] if kind else '')}".rstrip()
    return f"`{names}{value}`".replace("|", "\\|")


def _meaning(parameter: Any) -> str:
    parts = [_plain(" ".join((getattr(parameter, "help", None) or "").split())).replace("|", "\\|")]
    default = parameter.default
    if parameter.required:
        parts.append("Required.")
    elif not callable(default) and default not in (None, False, "", [], ()):
        shown = getattr(default, "value", default)
        names = [*parameter.opts, *parameter.secondary_opts]
        parts.append(f"Default: `{names[0] if shown is True else shown}`.")
    if isinstance(parameter.envvar, str):
        parts.append(f"Environment: `{parameter.envvar}`.")
    return " ".join(part for part in parts if part)


# Settings


def settings() -> str:
    """The settings of the cloud: environment variable, type, default and meaning, from the class that checks them."""
    from isthmus.cloud.settings import ENVIRONMENT, CloudSettings
    from isthmus.command_line import option_fields

    lines = ["| setting | environment | type | default | meaning |", "| --- | --- | --- | --- | --- |"]
    for field in option_fields(CloudSettings):
        kind, option = get_args(field.annotation)
        default = "required" if field.default is dataclasses.MISSING else f"`{field.default}`"
        meaning = " ".join([_plain(option.help or ""), *_bounds(option.min, option.max)])
        name = f"{ENVIRONMENT}{field.name.upper()}"
        lines.append(f"| `{field.name}` | `{name}` | `{_type(kind)}` | {default} | {meaning} |")
    return "\n".join(lines)


def _bounds(least: float | None, most: float | None) -> Iterator[str]:
    if least is not None:
        yield f"At least {least:g}" + (f", at most {most:g}." if most is not None else ".")
    elif most is not None:
        yield f"At most {most:g}."


def _type(kind: Any) -> str:
    text = kind.__name__ if isinstance(kind, type) else str(kind)
    return re.sub(r"\b(?:pathlib(?:\._local)?|typing)\.", "", text).replace("|", "\\|")


def _fields(body: list[ast.stmt]) -> Iterator[tuple[Any, str]]:
    """The annotated fields of a class with the docstring below each."""
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not node.target.id.startswith("_"):
            has = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            yield node, _plain(" ".join(str(after.value.value).split())) if has else ""  # type: ignore[union-attr]


# RPCs


def rpcs() -> str:
    """The services and messages of the wire contract with the comments of the .proto files."""
    parts = []
    for path in (ROOT / "proto" / "v1" / "isthmus.proto", ROOT / "proto" / "v1" / "elastic.proto"):
        parts += [f"## {path.relative_to(ROOT).as_posix()}", "", *_proto(path.read_text(encoding="utf-8")), ""]
    return "\n".join(parts)


def _proto(text: str) -> list[str]:
    lines: list[str] = []
    comment: list[str] = []
    header = True
    rows: list[str] = []
    message: list[str] = []

    def flush() -> None:
        if rows:
            lines.extend(["| field | meaning |", "| --- | --- |", *rows, ""])
            rows.clear()

    for line in map(str.strip, text.splitlines()):
        said = _plain(" ".join(comment))
        if line.startswith("//"):
            comment.append(line.lstrip("/ "))
            continue
        if line.startswith("syntax"):
            lines += [said, ""]
            header = False
        elif found := re.match(r"service (\w+)", line):
            flush()
            lines += [f"### {found[1]}", "", said, ""]
        elif found := re.match(r"rpc (\w+)\((.+?)\) returns \((.+?)\)", line):
            lines += [f"`{found[1]}({found[2]}) → {found[3]}`", f": {said or 'See the comment of the service.'}", ""]
        elif found := re.match(r"(message|enum|oneof) (\w+)", line):
            if not message:
                flush()
                lines += [f"### {found[2]}", "", said, ""]
            if "}" not in line:
                message.append(found[2])
        elif line == "}" and message:
            message.pop()
            if not message:
                flush()
        elif message and (found := re.match(r"((?:repeated |optional )?[\w.<>, ]+?) ?(\w+) = (\d+)", line)):
            name = ".".join([*message[1:], found[2]])
            rows.append(f"| `{(found[1] + ' ' + name).strip()}` | {said} |")
        elif message and (found := re.match(r"(\w+) = (\d+);", line)):
            rows.append(f"| `{'.'.join([*message[1:], found[1]])}` | {said} |")
        if not header:
            comment = []
    flush()
    return lines


# Errors


def errors() -> str:
    """Every error of the tree with its status and whether a retry helps."""
    module = importlib.import_module("isthmus.proto.errors")
    said = {}
    for line in (module.__doc__ or "").splitlines():
        if found := re.match(r"[ │├└─]+(\w+)\s+[A-Z_]+\s+(.*)$", line):
            said[found[1]] = re.sub(r"\s*\(retry: \w+\)", "", found[2])
    rows = ["| error | status | retry helps | meaning |", "| --- | --- | --- | --- |"]
    for error in _below(module.IsthmusError):
        retry = "yes" if error.retryable else "no"
        rows.append(f"| `{error.__name__}` | `{CODES[error.code]}` | {retry} | {_plain(said[error.__name__])} |")
    return "\n".join(rows)


def _below(root: Any) -> Iterator[Any]:
    """The errors of the tree itself, without those that another module derives for itself."""
    for error in root.__subclasses__():
        if error.__module__ == root.__module__:
            yield error
            yield from _below(error)


# Public API


def api() -> str:
    """Every public name with its signature and docstring."""
    import isthmus

    rooms: dict[str, list[str]] = {}
    for name in getattr(isthmus, "__all__", ()):
        value = getattr(isthmus, name)
        module = getattr(value, "__module__", None) or ""
        room = module.split(".")[1] if module.startswith("isthmus.") else "constants"
        rooms.setdefault(room, []).append(_public(name, value))
    titles = {"data": "Data", "distill": "Learning", "edge": "The device", "cloud": "The cloud", "proto": "Messages"}
    known = [room for room in titles if room in rooms] + sorted(set(rooms) - set(titles))
    return "\n\n".join(f"## {titles.get(room, room.capitalize())}\n\n" + "\n\n".join(rooms[room]) for room in known)


def _public(name: str, value: Any) -> str:
    heading = f"### {name}\n\n"
    if inspect.isclass(value):
        inside = [_markdown(inspect.getdoc(value) or ""), *_members(value)]
        exception = issubclass(value, Exception)
        kind, signature = ("exception", "") if exception else ("class", _signature(value))
        return heading + _directive(4, f"py:{kind}", f"isthmus.{name}{signature}", "\n\n".join(inside))
    if callable(value):
        text = _markdown(inspect.getdoc(value) or "")
        return heading + _directive(4, "py:function", f"isthmus.{name}{_signature(value)}", text)
    return heading + _directive(4, "py:data", f"isthmus.{name}", _constant(name))


def _members(kind: Any) -> Iterator[str]:
    described = _described_fields(kind) if dataclasses.is_dataclass(kind) or hasattr(kind, "model_fields") else {}
    for name, text in described.items():
        if text:
            yield _directive(3, "py:attribute", name, text)
    for name, member in vars(kind).items():
        if name.startswith("_") or not inspect.getdoc(member) or name in described:
            continue
        text = _markdown(inspect.getdoc(member) or "")
        if isinstance(member, property):
            yield _directive(3, "py:property", name, text)
        elif isinstance(member, (staticmethod, classmethod)):
            yield _directive(3, "py:method", f"{name}{_signature(getattr(kind, name))}", text)
        elif inspect.isfunction(member):
            yield _directive(3, "py:method", f"{name}{_signature(member, bound=True)}", text)


def _described_fields(kind: Any) -> dict[str, str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except OSError:
        return {}
    (definition,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return {node.target.id: text for node, text in _fields(definition.body)}


def _constant(name: str) -> str:
    """The docstring below a constant of a public module."""
    stub = ast.parse((ROOT / "isthmus" / "__init__.pyi").read_text(encoding="utf-8"))
    for node in stub.body:
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            source = inspect.getsource(importlib.import_module(f"isthmus.{node.module}"))
            body = ast.parse(source).body
            for statement, after in itertools.pairwise(body):
                targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
                named = any(isinstance(target, ast.Name) and target.id == name for target in targets)
                if named and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    return _markdown(inspect.cleandoc(str(after.value.value)))
    return ""


def _signature(value: Any, bound: bool = False) -> str:
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return "()"
    parameters = list(signature.parameters.values())
    if bound and parameters:
        parameters = parameters[1:]
    shown = []
    for parameter in parameters:
        default = parameter.default
        text = str(parameter.replace(annotation=inspect.Parameter.empty, default=inspect.Parameter.empty))
        if default is not inspect.Parameter.empty:
            simple = isinstance(default, (int, float, str, bool, tuple, type(None)))
            text += f"={default!r}" if simple else "=..."
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not any(each.startswith("*") for each in shown):
            shown.append("*")
        shown.append(text)
    return f"({', '.join(shown)})"


def _directive(colons: int, name: str, argument: str, text: str) -> str:
    fence = ":" * colons
    return f"{fence}{{{name}}} {argument}\n{text}\n{fence}"


def _markdown(docstring: str) -> str:
    """A docstring as Markdown: examples with ``>>>`` become blocks of Python."""
    parts: list[str] = []
    for block in re.split(r"\n\s*\n", docstring):
        if block.lstrip().startswith(">>>"):
            if parts and parts[-1].endswith("\n```") and parts[-1].startswith("```pycon"):
                parts[-1] = parts[-1].removesuffix("```") + f"\n{textwrap.dedent(block)}\n```"
            else:
                parts.append(f"```pycon\n{textwrap.dedent(block)}\n```")
        elif block.startswith("    "):
            parts.append(f"```text\n{textwrap.dedent(block)}\n```")
        else:
            parts.append(_plain(re.sub(r"^(\w+):$", r"**\1**", block)))
    return "\n\n".join(parts)


def _plain(text: str) -> str:
    """Escape what Markdown would take for markup outside code: angle brackets, and stars beside words."""
    pieces = re.split(r"(``.*?``|`.*?`)", text, flags=re.DOTALL)
    return "".join(
        piece if index % 2 else re.sub(r"([<*])", r"\\\1", piece) for index, piece in enumerate(pieces)
    ).replace("``", "`")


GENERATED: dict[str, Callable[[], str]] = {
    "commands": commands,
    "settings": settings,
    "rpcs": rpcs,
    "errors": errors,
    "api": api,
}
