"""The demo's child processes: they are awaited, end with their parent, and errors name their log."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from isthmus.demo.processes import ChildFailed, Family, termination_unwinds
from tests.rigs.project.patience import HANGS_S

FOREVER = "import threading; threading.Event().wait()"
SAYS_THAT_IT_RUNS = f"print('running', flush=True); {FOREVER}"
STUBBORN = (
    "import signal, sys, threading\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print('deaf', flush=True)\n"
    "threading.Event().wait()"
)
LISTENER = (
    "import pathlib, socket, sys, threading\n"
    "listener = socket.create_server(('127.0.0.1', 0))\n"
    "pathlib.Path(sys.argv[1]).write_text(f'127.0.0.1:{listener.getsockname()[1]}')\n"
    "threading.Event().wait()"
)


def test_a_child_that_ends_well_is_waited_for_and_its_output_kept(tmp_path: Path) -> None:
    with Family(tmp_path) as family:
        child = family.start("greeter", [sys.executable, "-c", "print('good day')"])
        family.wait(child, timeout_s=600)
    assert (tmp_path / "greeter.log").read_text() == "good day\n"


def test_a_failure_names_the_log_and_its_last_line(tmp_path: Path) -> None:
    with Family(tmp_path) as family:
        child = family.start("bad", [sys.executable, "-c", "import sys; print('out of luck\\n'); sys.exit(3)"])
        with pytest.raises(ChildFailed, match=r"bad failed \(code 3\)") as caught:
            family.wait(child, timeout_s=600)
    assert str(tmp_path / "bad.log") in str(caught.value)
    assert "last line: out of luck" in str(caught.value)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ('{"level": "info", "message": "job 1 is ready"}', "job 1 is ready"),
        ("{}", "{}"),
        ("[1]", "[1]"),
        ("plain", "plain"),
    ],
)
def test_the_last_words_of_a_log_in_json_are_its_message(tmp_path: Path, written: str, words: str) -> None:
    with Family(tmp_path) as family:
        child = family.start("talker", [sys.executable, "-c", f"print({written!r})"])
        family.wait(child, timeout_s=600)
    assert child.last_words() == words


def test_standard_output_may_go_to_a_file_of_its_own(tmp_path: Path) -> None:
    with Family(tmp_path) as family:
        code = "import os, sys; print(os.environ['COLOUR']); print('aside', file=sys.stderr)"
        child = family.start("two ways", [sys.executable, "-c", code], env={"COLOUR": "blue"}, output=tmp_path / "out")
        family.wait(child, timeout_s=600)
    assert (tmp_path / "out").read_text() == "blue\n"
    assert (tmp_path / "two-ways.log").read_text() == "aside\n"


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    with Family(tmp_path) as family, pytest.raises(ChildFailed, match="ghost does not start"):
        family.start("ghost", [tmp_path / "no-such-program"])


def test_a_server_that_dies_ends_the_wait_for_its_clients(tmp_path: Path) -> None:
    with Family(tmp_path) as family:
        family.start("server", [sys.executable, "-c", "raise SystemExit(5)"])
        client = family.start("client", [sys.executable, "-c", FOREVER])
        with pytest.raises(ChildFailed, match=r"server ended \(code 5\) while it was needed"):
            family.wait(client, timeout_s=3_600)
    assert client.process.returncode is not None


def test_a_wait_has_an_end(tmp_path: Path) -> None:
    with Family(tmp_path) as family:
        child = family.start("slow", [sys.executable, "-c", FOREVER])
        with pytest.raises(ChildFailed, match="slow was not done after"):
            family.wait(child, timeout_s=0.2)


def test_children_end_with_the_block_even_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Family(tmp_path) as family:
        child = family.start("orphan", [sys.executable, "-c", FOREVER])
        raise ZeroDivisionError
    assert child.process.returncode is not None


def test_a_child_deaf_to_sigterm_is_killed(tmp_path: Path) -> None:
    with Family(tmp_path, grace_s=0.3) as family:
        child = family.start("deaf", [sys.executable, "-c", STUBBORN])
        while child.last_line() != "deaf":
            assert child.process.poll() is None
            time.sleep(0.01)
    assert child.process.returncode == -9


def test_an_address_counts_once_somebody_answers_there(tmp_path: Path) -> None:
    port_file = tmp_path / "port"
    port_file.write_text("127.0.0.1:1")  # left by an earlier run: no server answers
    with Family(tmp_path) as family:
        child = family.start("listener", [sys.executable, "-c", LISTENER, port_file])
        address = family.wait_for_address(child, port_file, timeout_s=600)
    assert address == port_file.read_text()
    assert address != "127.0.0.1:1"


def test_a_server_that_ends_before_it_listens(tmp_path: Path) -> None:
    with Family(tmp_path) as family:
        child = family.start("mute", [sys.executable, "-c", "print('no such release'); raise SystemExit(1)"])
        with pytest.raises(ChildFailed, match=r"(?s)mute ended \(code 1\) before it listened.*no such release"):
            family.wait_for_address(child, tmp_path / "port", timeout_s=600)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)])
def test_children_end_with_a_parent_that_is_terminated_or_killed(
    tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    program = (
        "import pathlib, sys, threading\n"
        "from isthmus.demo.processes import Family, termination_unwinds\n"
        "with termination_unwinds(), Family(pathlib.Path(sys.argv[1])) as family:\n"
        f"    child = family.start('child', [sys.executable, '-c', {SAYS_THAT_IT_RUNS!r}])\n"
        "    while not child.last_line():\n"
        "        threading.Event().wait(0.02)\n"
        "    print(child.process.pid, flush=True)\n"
        "    threading.Event().wait()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.send_signal(sent)
    assert parent.wait(HANGS_S) == code
    parent.stdout.close()
    psutil.wait_procs([child], timeout=HANGS_S)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_the_handler_before_is_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with termination_unwinds():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
