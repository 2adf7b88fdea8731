"""The connection of this process to Ray: a cluster that it starts on loopback, or one that runs elsewhere.

Ray pickles what it sends, and runs whatever it is sent: anyone who reaches a cluster's ports runs code on its machines.
So the cluster of ``--executor ray`` listens on loopback alone and wants a token that is new at each start. Nothing that
a client sends to Isthmus is unpickled: images and weights are arrays that were checked before.
"""

import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeVar, cast

from isthmus.proto.errors import InvalidInput

log = logging.getLogger(__name__)

LOCAL: Final = "ray"
REMOTE: Final = "ray://"
OBJECT_STORE_BYTES: Final = 256 << 20
"""Shared memory of a cluster that this process starts. What does not fit waits on the disk."""
EXTRA: Final = "--executor ray needs the extra 'ray': pip install 'isthmus[ray]'"

_END_S: Final = 30.0
_LOOK_S: Final = 5.0
"""How often to look whether the cluster is still there, while it finds room."""

_turn = threading.Lock()
_home = ThreadPoolExecutor(1, thread_name_prefix="ray-home")
"""A thread that lives as long as this process."""
_Found = TypeVar("_Found")


def is_ray(executor: str) -> bool:
    """Returns whether ``executor`` names a Ray cluster.

    >>> [is_ray(name) for name in ("thread", "ray", "ray://10.0.0.5:10001")]
    [False, True, True]
    """
    return executor == LOCAL or executor.startswith(REMOTE)


def check_name(executor: str) -> None:
    """Raises ValueError unless ``executor`` is "thread", "process", "ray" or "ray://HOST:PORT"."""
    host, _, port = executor.removeprefix(REMOTE).rpartition(":")
    if executor in ("thread", "process", LOCAL) or (executor.startswith(REMOTE) and host and port.isdecimal()):
        return
    raise ValueError(f"executor: {executor!r} is none of thread, process, ray and ray://HOST:PORT")


def connect(executor: str, cpus: int) -> None:
    """Connects this process to Ray, if it is not connected. "ray" starts a cluster of ``cpus`` on this machine.

    Usage statistics and the dashboard stay off. Raises InvalidInput, with the way out, if Ray is not installed, or the
    cluster cannot be reached, is of another version or refuses the token.
    """
    # Before Ray's first import, which reads them.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a lost connection must not become a cluster of its own
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves executors beside any other process
    if executor == LOCAL:
        # Ray takes 127.0.0.1 for the machine's address and listens on all interfaces, unless clusters are switched off.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray reads it once per process
    try:
        import ray
    except ImportError as error:
        raise InvalidInput(EXTRA) from error
    with _turn:
        if ray.is_initialized():
            if _alive():
                return
            log.warning("the Ray cluster is gone; connecting again")
            with suppress(Exception):
                bounded(ray.shutdown, _END_S)
        try:
            if executor == LOCAL:
                # The kernel ends Ray's processes with the thread that started them.
                start = partial(
                    ray.init,
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    configure_logging=False,
                    log_to_driver=False,
                    _node_ip_address="127.0.0.1",
                )
                _home.submit(start).result()
                services: Any = ray.util
                if (address := services.get_node_ip_address()) != "127.0.0.1":
                    raise RuntimeError(f"Ray listens on {address}, beyond loopback")
            else:
                ray.init(address=executor, configure_logging=False, log_to_driver=False)
        except Exception as error:  # many types, and each means that there is no cluster to work on
            with suppress(Exception):
                ray.shutdown()
            raise InvalidInput(f"--executor {executor}: {_said(error, ray.__version__)}") from error
        log.info("connected to Ray %s at %s", ray.__version__, executor)


def actor(kind: type, *, cpus: int, gpus: int) -> Any:
    """Returns what makes actors of ``kind`` with ``.remote(...)``, which answer two calls at once.

    Ray restarts and repeats nothing: the code that uses an actor knows what it was doing.
    """
    import ray

    remote: Any = ray.remote  # its types know no options of actors
    options = {"num_cpus": cpus, "num_gpus": gpus, "max_concurrency": 2, "max_restarts": 0, "max_task_retries": 0}
    return remote(**options)(kind)


def bounded(call: Callable[[], _Found], within_s: float) -> _Found:
    """Makes a call of Ray on a thread of its own. Raises what the call raises, and TimeoutError after ``within_s``.

    Some calls of Ray Client never return once its connection is gone, whatever their own time limit says.
    """
    done: queue.SimpleQueue[tuple[_Found | None, Exception | None]] = queue.SimpleQueue()

    def make() -> None:
        try:
            done.put((call(), None))
        except Exception as error:
            done.put((None, error))

    threading.Thread(target=make, name="ray-call", daemon=True).start()
    try:
        found, error = done.get(timeout=within_s)
    except queue.Empty:
        raise TimeoutError(f"Ray gave no answer for {within_s:g} s") from None
    if error is not None:
        raise error
    return cast(_Found, found)


def first_answer(call: Any, within_s: float) -> Any:
    """Waits for a new actor's first answer, while the cluster finds room for it.

    Raises the actor's own error, TimeoutError after ``within_s``, and ConnectionError once no machine is left.
    """
    import ray
    from ray.exceptions import GetTimeoutError

    until_s = time.monotonic() + within_s
    while True:
        try:
            return ray.get(call, timeout=_LOOK_S)
        except GetTimeoutError:
            if not _alive():
                raise ConnectionError("the cluster is gone") from None
            if time.monotonic() > until_s:
                raise TimeoutError(f"the cluster has found no room in {within_s:g} s") from None


def has_gpu() -> bool:
    """Returns whether a machine of the cluster has a GPU."""
    import ray

    found: Any = ray
    return bool(found.cluster_resources().get("GPU", 0) >= 1)


def cpus() -> int:
    """Returns the number of CPUs of the cluster, at least 1."""
    import ray

    found: Any = ray
    return max(1, int(bounded(found.cluster_resources, _END_S).get("CPU", 0)))


def last_words(error: Exception) -> str:
    """Returns the last line of an error of Ray, which brings whole pages with it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:400]


def leave() -> None:
    """Leaves the cluster. One that this process has started ends with it."""
    import ray

    with _turn, suppress(Exception):
        bounded(ray.shutdown, _END_S)


def _alive() -> bool:
    """Returns whether a machine of the cluster answers."""
    import ray

    found: Any = ray
    try:
        return any(node["Alive"] for node in bounded(found.nodes, _END_S))
    except Exception:  # Ray raises many types, and each means that it does not
        return False


def _said(error: Exception, version: str) -> str:
    text = " ".join(str(error).split())
    if "version" in text.lower() and "mismatch" in text.lower():
        return f"the cluster has another version than Ray {version} here: install one version on both. {text[:400]}"
    if isinstance(error, ConnectionError | TimeoutError):
        return (
            "the cluster cannot be reached: start it with 'ray start --head', and name the port of its Ray Client "
            f"server (10001 unless told otherwise). {text[:200]}"
        )
    return f"no Ray cluster to work on: {text[:400] or type(error).__name__}"
