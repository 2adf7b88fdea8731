"""Make a model with experts, its task and its answers with the installed version. ``test_expert_format.py`` opens them.

    python tests/golden/formats/make_experts.py [--into FOLDER]

writes ``FOLDER/<version>/experts`` (default: beside this file) in about half a minute of processor time. The dense
model and the pictures are those of 0.1.0.dev0. As in make.py, only the ``isthmus`` command makes files.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import grpc
from make import Workshop, wait_for

from isthmus import __version__
from isthmus.proto.v1 import elastic_pb2 as pb
from isthmus.proto.v1 import elastic_pb2_grpc as pb_grpc

DENSE = Path(__file__).parent / "0.1.0.dev0" / "elastic"


def answers(address: str) -> dict[str, dict[str, object]]:
    """Return the server's answers to the two pictures, with gamma and experts per token."""
    found: dict[str, dict[str, object]] = {}
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.ElasticServiceStub(channel)
        for name in ("dark", "bright"):
            encoded = (DENSE / f"{name}.png").read_bytes()
            reply = stub.MakeQuery(pb.MakeQueryRequest(task="bright-dark", encoded=encoded, latency_s=60))
            found[name] = {
                "class": reply.class_name,
                "logits": list(reply.logits),
                "gamma": reply.gamma,
                "experts": reply.experts,
            }
    return found


def make(into: Path, scratch: Path) -> None:
    at = Workshop(scratch)
    shutil.copytree(DENSE, scratch / "dense")
    given = ["--model", "dense/model.safetensors", "--pixels", "half", "--data", "dense/pictures.parquet"]
    task = ["--task", "dense/bright-dark.task.json", "--threads", 1, "--device", "cpu"]
    shape = ["--experts", 4, "--used", 2, "--ratio", 0.25, "--epochs", 2, "--measured=-4,0", "--out", "experts"]
    at.run("elastic", "experts", *given, *task, *shape)
    profile = ["--gammas=-4,0", "--sizes", "1,4", "--repeats", 1, "--number-type", "float32", "--out", "profile.json"]
    tasks = ["--tasks", "experts/tasks", "--data", "dense/pictures.parquet", "--threads", 1, "--device", "cpu"]
    at.run("elastic", "profile", "--model", "experts/model", *tasks, *profile)
    serve = ["cloud", "serve", "--state", "state", "--elastic-model", "experts/model", "--port-file", "port"]
    process = at.start(*serve, "--elastic-profile", "profile.json")
    try:
        wait_for((scratch / "port").exists, "the server's address", process)
        address = (scratch / "port").read_text().strip()
        at.run("elastic", "register", "experts/tasks/bright-dark.json", "--server", address)
        expected = answers(address)
    finally:
        process.terminate()
        process.wait(60)
    out = into / __version__ / "experts"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name in ("model", "tasks"):
        shutil.copytree(scratch / "experts" / name, out / name)
    shutil.copy(scratch / "profile.json", out / "profile.json")
    for name in ("dark", "bright"):
        shutil.copy(DENSE / f"{name}.png", out / f"{name}.png")
    (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=Path(__file__).parent)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        make(asked.into, Path(made))
