"""A Ray cluster on this machine whose nodes can be killed: a head without CPUs, and nodes with some.

It is started by a process of its own, which takes orders from its standard input. So it may have another environment
than the process that connects to it.
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from isthmus.cloud.cluster import connection
from tests.rigs.project.ports import free_port

_PR_SET_CHILD_SUBREAPER: Final = 36
_STORE_BYTES: Final = 80 << 20
ROOT: Final = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class RayNodes:
    """A running cluster. ``address`` is that of its Ray Client server, for ``--executor``. Nodes have numbers."""

    process: "subprocess.Popen[str]"
    address: str

    def add(self, cpus: int = 1) -> int:
        """Start a node, without waiting until it takes part; return its number."""
        return self._order(f"add {cpus}")

    def kill(self, node: int) -> None:
        """Kill a node (SIGKILL) with every process on it, as a machine that loses its power."""
        self._order(f"kill {node}")

    def kill_head(self) -> None:
        """Kill the head, and with it the cluster."""
        self._order("kill-head 0")

    def _order(self, line: str) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@contextmanager
def running_ray(more: Mapping[str, str] | None = None) -> Iterator[RayNodes]:
    """Start a head; end it and all nodes afterwards. ``more``: variables of the cluster's environment alone.

    This process and those that it starts connect with the token that is in the environment from here on.
    """
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", "0" * 64)
    port = free_port()
    environment = {
        **os.environ,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # so that it listens on loopback alone
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", "")))),  # actors of tests
        **(more or {}),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.rigs.cloud.ray_nodes", str(port)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdin is not None
        if process.stdout.readline() != "0\n":
            raise RuntimeError("the Ray cluster did not start; its error is above")
        yield RayNodes(process, f"{connection.REMOTE}127.0.0.1:{port}")
    finally:
        if process.stdin is not None:
            process.stdin.close()
        process.wait(300)


def serve(port: int) -> None:
    """Run the cluster, and answer each order with a number, until the input ends."""
    from ray.cluster_utils import Cluster

    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what a killed node leaves behind is ended with the rest
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what Ray prints
    head: dict[str, Any] = {"num_cpus": 0, "include_dashboard": False, "ray_client_server_port": port}
    head |= {"object_store_memory": _STORE_BYTES, "node_ip_address": "127.0.0.1"}
    cluster: Any = Cluster(initialize_head=True, head_node_args=head)
    answers.write("0\n")
    nodes: list[Any] = []
    for line in sys.stdin:
        order, number = line.split()
        if order == "add":
            nodes.append(cluster.add_node(wait=False, num_cpus=int(number), object_store_memory=_STORE_BYTES))
            number = str(len(nodes) - 1)
        elif order == "kill":
            cluster.remove_node(nodes[int(number)], allow_graceful=False)
        else:
            cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
        answers.write(f"{number}\n")
    cluster.shutdown()
    for each in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            each.kill()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
