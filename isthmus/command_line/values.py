"""Values of options: those that many commands share, checks, lists of numbers and names, and key files."""

import codecs
import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import typer

from isthmus.command_line.errors import did_you_mean

Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
Device = Annotated[str, typer.Option(help="Where to compute: 'cpu', 'cuda', or 'auto' for a GPU if there is one.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads of torch. 0 leaves the number to torch.")]
Layout = Annotated[
    Literal["auto", "crema-d", "ave"],
    typer.Option(help="How the data set's files are arranged. 'auto' looks at the folder."),
]

_Options = TypeVar("_Options")


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


@dataclasses.dataclass(frozen=True)
class OptionField:
    """One field of a dataclass of options. ``default`` is ``dataclasses.MISSING`` if it must be given."""

    name: str
    annotation: Any
    default: Any


def option_fields(kind: type[Any], prefix: str = "") -> Iterator[OptionField]:
    """Yield the fields of a dataclass of options.

    A field that is a dataclass itself stands for its own fields, whose names begin with its name: ``generate`` with the
    field ``model`` is the option ``--generate-model``.
    """
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        name, annotation = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(annotation):
            assert isinstance(annotation, type)
            yield from option_fields(annotation, f"{name}_")
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield OptionField(name, _named(annotation, name) if prefix else annotation, default)


def _named(annotation: Any, name: str) -> Any:
    """Return the annotation of an option without the names that it has without its prefix."""
    if get_origin(annotation) is not Annotated:
        return annotation
    kind, option, *_ = get_args(annotation)
    option = copy.copy(option)
    option.param_decls = (f"--{name.replace('_', '-')}",) if option.param_decls else ()
    return Annotated[kind, option]


def options_from(kind: type[_Options], values: Mapping[str, Any], prefix: str = "") -> _Options:
    """Return the dataclass of options whose ``option_fields`` have these values; the others have their defaults."""
    hints = get_type_hints(kind)
    fields: Any = dataclasses.fields(kind)  # type: ignore[arg-type]
    given = {}
    for field in fields:
        name, inner = f"{prefix}{field.name}", hints[field.name]
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            given[field.name] = options_from(inner, values, f"{name}_")
        elif name in values:
            given[field.name] = values[name]
    return kind(**given)


def option_values(options: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of ``option_fields`` by their names."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        name = f"{prefix}{field.name}"
        found |= option_values(value, f"{name}_") if dataclasses.is_dataclass(value) else {name: value}
    return found


def check_fields(options: Any) -> None:
    """Check a dataclass of options against the bounds and choices that its options have on the command line.

    So a value that was made in Python keeps the same bounds. Raises ValueError naming the option.
    """
    values = option_values(options)
    for field in option_fields(type(options)):
        value = values[field.name]
        kind, *extras = get_args(field.annotation) if get_origin(field.annotation) is Annotated else (field.annotation,)
        option = f"--{field.name.replace('_', '-')}"
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
    return {name: str(value) if isinstance(value, Path) else value for name, value in option_values(options).items()}


def from_plain(kind: type[_Options], values: Mapping[str, Any]) -> _Options:
    """Return the options that ``to_plain`` was given. Raises TypeError for a field that does not exist."""
    kinds = {field.name: _kinds(field.annotation) for field in option_fields(kind)}
    if unknown := values.keys() - kinds.keys():
        raise TypeError(f"no option {min(unknown)!r}")
    paths = {name: Path(value) for name, value in values.items() if value is not None and Path in kinds[name]}
    return options_from(kind, {**values, **paths})


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """Return the types that a value of an option may have."""
    kind = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    return (kind, *get_args(kind))


def listed(text: str) -> list[str]:
    """Return the parts of a list with commas between them, without surrounding spaces and without empty parts."""
    return [part.strip() for part in text.split(",") if part.strip()]


def whole_numbers(text: str, option: str) -> tuple[int, ...]:
    """Return the whole numbers of a list with commas. Raises a usage error that names the option."""
    return tuple(_number(part, int, option, "a whole number", "0,1,2") for part in listed(text))


def numbers(text: str, option: str, *, distinct: bool = False, above: float | None = None) -> tuple[float, ...]:
    """Return the numbers of a list with commas. Raises a usage error that names the option.

    With ``distinct``, a number that is there twice is an error too. With ``above``, so are a number that is not above
    it, and an empty list.
    """
    found = tuple(_number(part, _finite, option, "a number", "0.5,1,2") for part in listed(text))
    if distinct and len(set(found)) != len(found):
        raise typer.BadParameter(f"a number of '{text}' is there twice.", param_hint=f"'{option}'")
    if above is not None and not (found and min(found) > above):
        wrong = f"{min(found):g} is not above {above:g}" if found else "the list is empty"
        message = f"{wrong}. Give numbers above {above:g}, such as 0.5,1,2."
        raise typer.BadParameter(message, param_hint=f"'{option}'")
    return found


_Number = TypeVar("_Number", int, float)


def _finite(part: str) -> float:
    found = float(part)
    if not math.isfinite(found):
        raise ValueError(part)
    return found


def _number(part: str, kind: Callable[[str], _Number], option: str, what: str, such_as: str) -> _Number:
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
