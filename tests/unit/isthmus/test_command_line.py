"""The kit of all command lines: options from dataclasses, one-line errors, similar names, lists and tables."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from typer.testing import CliRunner, Result

from isthmus.command_line import (
    App,
    check_fields,
    fail,
    from_plain,
    key_in,
    known,
    listed,
    numbers,
    pages_of,
    print_table,
    to_plain,
    whole_numbers,
)
from isthmus.proto.errors import InvalidInput

app = App("isthmus test", help="Commands for a test.", extra="train")
below = App("isthmus test below", help="A group below.", extra="train")
app.add(below)


@dataclass(frozen=True)
class Shared:
    """Options that two commands share."""

    out: Annotated[Path, typer.Option("--output", "-o", help="Where to write.")]
    mode: Annotated[Literal["fast", "slow"], typer.Option(help="How.")] = "fast"
    name: Annotated[list[str], typer.Option(help="Repeat it.")] = field(default_factory=list)
    size: Annotated[int, typer.Option(min=1, max=9, help="How many.")] = 3

    def __post_init__(self) -> None:
        check_fields(self)
        if self.mode == "slow" and not self.name:
            raise ValueError("--mode slow needs --name")


@app.command(example="isthmus test show --output x", environment="ISTHMUS_TEST_")
def show(shared: Shared, seeds: Annotated[str, typer.Option(help="Seeds.")] = "0,1") -> None:
    """Show what was given."""
    typer.echo(f"{shared} {whole_numbers(seeds, '--seeds')}")


@below.command("break", resumes=True)
def break_it(
    how: Annotated[str, typer.Argument(help="The way it breaks.")],
) -> None:
    """Break in a way."""
    errors: dict[str, BaseException] = {
        "file": FileNotFoundError(2, "No such file or directory", "/x/[/old] clips/a.json"),
        "value": ValueError("two\nlines of [bold]text[/bold] \x1b[31m"),
        "ours": InvalidInput("not like this"),
        "bug": ZeroDivisionError("a bug"),
        "empty": ValueError(),
        "interrupt": KeyboardInterrupt(),
        "missing": ModuleNotFoundError("No module named 'sherpa'", name="sherpa.core"),
    }
    if how == "refused":
        fail("cannot do that; do this")
    raise errors[how]


def call(*arguments: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), env=env)


def test_a_dataclass_becomes_options() -> None:
    done = call("show", "-o", "x", "--name", "a", "--name", "b", "--size", "4", "--seeds", "3, 4,")
    assert done.exit_code == 0, done.output
    expected = Shared(Path("x"), "fast", ["a", "b"], 4)
    assert done.output == f"{expected} (3, 4)\n"


def test_an_option_is_read_from_the_environment_and_an_empty_variable_is_unset() -> None:
    assert "size=7" in call("show", env={"ISTHMUS_TEST_OUT": "x", "ISTHMUS_TEST_SIZE": "7"}).output
    done = call("show", "-o", "x", env={"ISTHMUS_TEST_SIZE": "", "ISTHMUS_TEST_MODE": "", "ISTHMUS_TEST_SEEDS": ""})
    assert (done.exit_code, "size=3" in done.output) == (0, True)
    assert call("show", env={"ISTHMUS_TEST_OUT": ""}).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shwo"], "isthmus test: no command 'shwo'. Did you mean 'show'?"),
        (["below", "brake"], "isthmus test below: no command 'brake'. Did you mean 'break'?"),
        (["show", "--oputput", "x"], "isthmus test show: no option '--oputput'. Did you mean '--output'?"),
        (["--hlep"], "isthmus test: no option '--hlep'. Did you mean '--help'?"),
        (["show"], "Missing option '--output'"),
        (["show", "-o", "x", "--size", "10"], "--size"),
        (["show", "-o", "x", "--mode", "fats"], "'fats' is not one of 'fast', 'slow'"),
        (["show", "-o", "x", "--seeds", "1,x"], "'--seeds': 'x' is not a whole number"),
        (["show", "-o", "x", "--mode", "slow"], "isthmus test show: --mode slow needs --name"),
    ],
)
def test_a_usage_error_is_one_line_with_the_way_out(arguments: list[str], message: str) -> None:
    done = call(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "--help" in done.stderr or "needs --name" in done.stderr


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("file", "/x/[/old] clips/a.json: No such file or directory"),
        ("value", "two lines of [bold]text[/bold] \N{REPLACEMENT CHARACTER}[31m"),
        ("ours", "not like this"),
        ("empty", "ValueError"),
        ("refused", "cannot do that; do this"),
        (
            "missing",
            "the package 'sherpa.core' is not installed here. Install it with: pip install 'isthmus[train]'",
        ),
    ],
)
def test_an_error_is_one_line_and_shows_names_as_they_are(how: str, line: str) -> None:
    done = call("below", "break", how)
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", f"isthmus test below break: {line}\n")


@pytest.mark.parametrize("out", ["file/result.json", "file/deeper/result", "/proc/result.json"])
def test_what_cannot_be_written_is_refused_before_the_work(tmp_path: Path, out: str) -> None:
    app, worked = App("isthmus try", help="Try.", extra="x"), []

    @app.command()
    def measure(out: Path, report: Path | None = None) -> None:
        """Measure."""
        worked.append(out)

    (tmp_path / "file").write_text("no folder")
    for words in ([str(tmp_path / out)], [str(tmp_path / "new"), "--report", str(tmp_path / out)]):
        refused = CliRunner().invoke(app, words)
        assert (refused.exit_code, worked) == (1, [])
        assert "nothing can be written to" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
    fine = CliRunner().invoke(app, [str(tmp_path / "new" / "deeper" / "result.json")])
    assert (fine.exit_code, len(worked)) == (0, 1)
    assert not (tmp_path / "new").exists(), "trying leaves nothing behind"


def test_an_interruption_says_that_the_work_is_kept() -> None:
    done = call("below", "break", "interrupt")
    assert done.exit_code == 130
    assert "the same command continues it" in done.stderr


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(call("below", "break", "bug").exception, ZeroDivisionError)
    monkeypatch.setenv("ISTHMUS_TRACEBACK", "1")
    assert isinstance(call("below", "break", "value").exception, ValueError)


def test_a_group_without_a_command_shows_its_help() -> None:
    for arguments in ([], ["below"]):
        done = call(*arguments)
        assert done.exit_code == 0
        assert done.stdout.startswith("Usage: ")


def test_options_made_in_python_keep_the_bounds_of_the_command_line() -> None:
    with pytest.raises(ValueError, match="--size: 10 is above 9"):
        Shared(Path("x"), size=10)
    with pytest.raises(ValueError, match="--size: 0 is below 1"):
        Shared(Path("x"), size=0)
    with pytest.raises(ValueError, match="--mode: 'fats' is not one of fast, slow"):
        Shared(Path("x"), mode="fats")  # type: ignore[arg-type]


def test_options_as_plain_values_and_back() -> None:
    made = Shared(Path("x"), "slow", ["a"], 4)
    assert to_plain(made) == {"out": "x", "mode": "slow", "name": ["a"], "size": 4}
    assert from_plain(Shared, to_plain(made)) == made
    with pytest.raises(TypeError):
        from_plain(Shared, {"out": "x", "other": 1})


def test_lists() -> None:
    assert listed(" a, b,,") == ["a", "b"]
    assert whole_numbers("2,1", "--x") == (2, 1) and numbers("0.5,1", "--x") == (0.5, 1.0)
    assert numbers("0", "--x") == (0.0,) and numbers("0.1", "--x", above=0) == (0.1,)
    assert known("b,a", ["a", "b"], "--x") == ("b", "a")
    for wrong in (
        lambda: whole_numbers("1.5", "--x"),
        lambda: numbers("1,1", "--x", distinct=True),
        lambda: numbers("0,1", "--x", above=0),
        lambda: numbers("", "--x", above=0),
        lambda: known("", ["a"], "--x"),
    ):
        with pytest.raises(typer.BadParameter):
            wrong()
    with pytest.raises(typer.BadParameter, match="Did you mean 'cluster'"):
        known("clutser", ["cluster", "random"], "--methods")


def test_a_key_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    assert key_in(None) is None
    file.write_text(" secret\n")
    assert key_in(file) == "secret"
    file.write_text("\n")
    with pytest.raises(ValueError, match="holds no key: it is empty"):
        key_in(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="it is not text"):
        key_in(file)


def test_a_table_shows_cells_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("class [x]", "clips"), [("[bold]a[/bold]", "1"), ("[/old]", "2")], title="of [set]", right=True)
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("class [x]", "[bold]a[/bold]", "[/old]", "of [set]"))
    print_table(("class", "clips"), [("[bold]a[/bold]", "1")], tabs_in_pipes=True)
    assert capsys.readouterr().out == "[bold]a[/bold]\t1\n"


def test_pages_of_a_tree() -> None:
    pages = {page.path: page for page in pages_of(app, "isthmus test")}
    assert list(pages) == ["isthmus test", "isthmus test show", "isthmus test below", "isthmus test below break"]
    assert pages["isthmus test"].below == ("isthmus test show", "isthmus test below")
    show_page = pages["isthmus test show"]
    assert (show_page.summary, show_page.example) == ("Show what was given.", "isthmus test show --output x")
    by_name = {option.names[0]: option for option in show_page.options}
    assert by_name["--output"].names == ("--output", "-o") and by_name["--output"].required
    assert (by_name["--size"].default, by_name["--size"].environment) == ("3", "ISTHMUS_TEST_SIZE")
    assert show_page.text.startswith("Usage: isthmus test show")
