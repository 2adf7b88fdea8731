"""``isthmus generate`` from the command line: profile, replay, serve, ask."""

import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from isthmus import cli
from isthmus.cloud.generation.scheduling.profile import GenerationProfile
from isthmus.cloud.generation.serve.host import open_generation
from isthmus.cloud.generation.serve.settings import GenerationSettings
from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.own_clips.sharing import Sharing
from tests.rigs.generation.llama import save_tiny_llama, serving_http
from tests.rigs.project.patience import HANGS_S


def isthmus(*words: object) -> int:
    try:
        return cli.main([str(word) for word in words])
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1


def test_a_machine_is_measured_and_a_workload_replayed_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_llama(tmp_path / "model", max_position_embeddings=64)
    assert isthmus("generate", "profile", tmp_path / "model", "--out", tmp_path / "profile.json", "--repeats", 1) == 0
    found = GenerationProfile.from_json((tmp_path / "profile.json").read_text())
    assert found.key.number_type == "float32" and len(found.grid) == 7
    assert "mean error of the fit" in capsys.readouterr().out
    out = tmp_path / "replay.json"
    words = ("--requests", 40, "--load", 0.5, "--heavy", 0.8, "--policy", "vtc", "--out", out)
    assert isthmus("generate", "replay", "chat", "--profile", tmp_path / "profile.json", *words) == 0
    printed = capsys.readouterr().out
    assert "vtc on chat, load 0.5, seed 0: 40 requests" in printed
    figures = json.loads(out.read_text())
    assert figures["outcomes"]["finished"] == 40
    assert figures["goodput"] <= figures["bound_goodput"] + 1e-6
    assert figures["latency_s"]["mean"] >= figures["bound_mean_s"]
    assert set(figures["users"]) == {"u0", "u1", "u2", "u3", "u4"} or len(figures["users"]) > 1


def test_several_seeds_give_medians_and_spreads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs.json"
    words = ("--policy", "paced", "--lengths", "warm", "--requests", 30, "--seeds", 3, "--load", 2, "--out", out)
    assert isthmus("generate", "replay", "lmaas", *words) == 0
    assert "paced on lmaas, load 2, 3 seeds of 30 requests" in capsys.readouterr().out
    runs = json.loads(out.read_text())["runs"]
    assert [run["seed"] for run in runs] == [0, 1, 2]
    assert len({run["tokens"] for run in runs}) > 1
    assert all(run["outcomes"]["finished"] == 30 and run["goodput"] <= run["bound_goodput"] + 1e-6 for run in runs)


def test_a_recorded_trace_is_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:17:{second:02}.0,{80 * second + 80},{second + 1}" for second in range(20)]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows))
    assert isthmus("generate", "replay", trace, "--policy", "srpt", "--lengths", "known") == 0
    assert "20 requests, 210 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("replay", "lmas"), "no workload 'lmas': give lmaas, chat or the CSV file of a trace. Did you mean 'lmaas'?"),
        (("replay", "--policy", "best"), "no policy 'best'; known are static, orca"),
        (("profile", "nowhere", "--out", "x.json"), "nowhere has no config.json; give a model directory"),
        (("convert", "nowhere.gguf", "--out", "x"), "nowhere.gguf: No such file or directory"),
        (("convert", ".", "--out", "x"), "is a folder; give a GGUF file. A folder with safetensors files is served"),
        (("replay", "chat", "--requests", "5", "--kv-tokens", "64"), "--kv-tokens 64: the longest request may take"),
        (("place", "chat", "--requests", "10", "--kv-tokens", "64"), "--kv-tokens 64: the longest request may take"),
    ],
)
def test_what_cannot_be_done_ends_in_one_line(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert isthmus("generate", *words) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"isthmus generate {words[0]}: ") and said in line


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("asked") / "tiny"
    save_tiny_llama(folder)
    with serving_http(open_generation(GenerationSettings(folder, rows=2, kv_tokens=1_024)), "sesame") as url:
        yield url


def test_a_server_is_asked_from_the_command_line(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = tmp_path / "key"
    key.write_text("sesame\n")
    words = ("--server", url, "--key-file", key, "--max-tokens", 9, "--seed", 4)
    printed = []
    for _ in range(2):
        assert isthmus("generate", "ask", "Come back!", "--system", "You are small.", *words) == 0
        printed.append(capsys.readouterr())
    assert printed[0].out == printed[1].out and printed[0].out.strip()
    assert "out; first token after" in printed[0].err
    assert isthmus("generate", "ask", "Come back!", "--server", url) == 1
    assert capsys.readouterr().err == (
        "isthmus generate ask: the API key is missing or wrong; ask the operator for it\n"
    )
    assert isthmus("generate", "ask", "x", *words, "--latency-s", -1) == 1
    assert "latency_s: must be above 0" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert isthmus("generate", "ask", "x", "--server", "http://127.0.0.1:1") == 1
    said = capsys.readouterr().err
    assert "http://127.0.0.1:1 cannot be reached" in said and "'isthmus generate serve' starts a server" in said
    assert isthmus("generate", "ask", "x", "--server", "127.0.0.1:1") == 1
    assert "must begin with http://" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--http", "0.0.0.0:0"), "0.0.0.0 can be reached from other machines"),
        (("--tls-cert", "cert.pem"), "TLS needs both"),
        (("--http", "nowhere"), "is not HOST:PORT"),
    ],
)
def test_an_unsafe_server_is_refused_before_a_model_is_read(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert isthmus("generate", "serve", "nowhere", *words) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("replicas", [(), ("--replicas", "2", "--executor", "process")], ids=["alone", "replicas"])
def test_serve_listens_until_it_is_told_to_stop(replicas: tuple[str, ...], tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "tiny")
    command = [
        sys.executable,
        "-m",
        "isthmus.cli",
        "generate",
        "serve",
        str(tmp_path / "tiny"),
        "--http",
        "127.0.0.1:0",
        *replicas,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            listening, _, address = server.stdout.readline().strip().rpartition(" ")
            assert listening == "listening on"
            with urllib.request.urlopen(f"http://{address}/v1/models", timeout=HANGS_S) as response:
                assert json.loads(response.read())["data"][0]["id"] == "tiny"
            children = psutil.Process(server.pid).children()
            assert len(children) == (2 if replicas else 0)
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=HANGS_S) == 0
        psutil.wait_procs(children, timeout=HANGS_S)
        assert not any(each.is_running() for each in children)


def test_a_device_asks_for_a_reply_and_sends_its_state_with_consent_alone(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = DeviceState(tmp_path / "device")
    (tmp_path / "key").write_text("sesame\n")
    words = ("reply", "I missed my train.", "--server", url, "--state", device.root, "--key-file", tmp_path / "key")

    def reply() -> tuple[dict[str, Any], str]:
        assert isthmus("edge", *words, "--max-tokens", 6, "--seed", 1, "--json") == 0
        printed = capsys.readouterr()
        return json.loads(printed.out), printed.err

    without, said = reply()
    assert without["sent"] is None and "emotion" not in without["server"]
    assert said == "sent with the text: nothing of how you feel\n"
    device.save_sharing(Sharing(allowed=True, name="SAD", probability=0.8, at_s=time.time()))
    with_state, said = reply()
    assert with_state["sent"] == {"class": "SAD", "probability": 0.8} and "SAD" in said
    assert with_state["server"]["emotion"] == {"class": "sad", "probability": 0.8, "template": "state-1"}
    assert with_state["reply"] != without["reply"]
    assert device.sharing().sent == 1
