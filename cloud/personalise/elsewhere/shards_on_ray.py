"""Shards of a public set, searched on a Ray cluster: each search is a task on a machine that can read the shard's file.

A search changes nothing, so Ray repeats it by itself if its process or its machine is lost.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final

from isthmus import __version__
from isthmus.cloud.cluster import connection as cluster
from isthmus.cloud.personalise.learning import StepDied
from isthmus.distill.selection.nearest import Nearest
from isthmus.distill.selection.sharded import Search
from isthmus.distill.training.probability_shards import Shard, ShardsError, ShardsOfFiles
from isthmus.proto.errors import InvalidInput, Unavailable

PATIENCE_S: Final = 600.0
"""Longest time without a finished search."""
END_S: Final = 5.0
RETRIES: Final = 3
"""How often Ray repeats a search whose process or machine was lost."""


def search_on_machine(shard: Shard, version: str, search: Search) -> list[Nearest]:
    """Search one shard; this runs on the cluster.

    Raises ShardsError if the machine has another version of Isthmus, or not these samples at this path.
    """
    if version != __version__:
        raise ShardsError(f"the cluster has isthmus {__version__}, this machine {version}: install one version")
    try:
        return search.of(shard.read())
    except ShardsError as error:
        raise ShardsError(f"on a machine of the cluster: {error}") from error


class ShardsOnRay:
    """Shards that a cluster's machines can read, at the same paths as this one.

    At most one search per CPU of the cluster waits or runs, so that a search begins with what the ones before it have
    found. ``search`` raises ShardsError if a machine cannot read them, StepDied if a search has killed its process more
    than ``RETRIES`` times, and Unavailable if the cluster is lost.
    """

    def __init__(self, files: ShardsOfFiles, *, address: str = cluster.LOCAL, cpus: int = 1) -> None:
        """``cpus``: those of a cluster that this process starts."""
        self._files = files
        self._address = address
        self._cpus = cpus

    @property
    def sizes(self) -> Sequence[int]:
        return self._files.sizes

    @property
    def classes(self) -> int:
        return self._files.classes

    def search(self, asked: Callable[[int], Search]) -> Iterator[tuple[int, list[Nearest]]]:
        try:
            cluster.connect(self._address, self._cpus)
        except InvalidInput as error:
            raise Unavailable(str(error)) from error
        import ray
        from ray.exceptions import RayTaskError, WorkerCrashedError

        remote: Any = ray.remote  # its types know no options of tasks
        task = remote(num_cpus=1, max_retries=RETRIES)(search_on_machine)
        running: dict[Any, int] = {}
        coming = iter(range(len(self.sizes)))
        try:
            room = cluster.cpus()
            while True:
                while len(running) < room and (number := next(coming, None)) is not None:
                    running[task.remote(self._files.shard(number), __version__, asked(number))] = number
                if not running:
                    return
                wait = partial(ray.wait, list(running), timeout=PATIENCE_S)
                done, _ = cluster.bounded(wait, 2 * PATIENCE_S)
                if not done:
                    raise TimeoutError(f"no search has ended in {PATIENCE_S:g} s")
                found: list[Nearest] = cluster.bounded(partial(ray.get, done[0]), PATIENCE_S)
                yield running.pop(done[0]), found
        except RayTaskError as error:
            if isinstance(error.cause, Exception):
                raise error.cause from error
            raise
        except ShardsError:
            raise
        except WorkerCrashedError as error:
            raise StepDied(f"Ray has lost a search {RETRIES + 1} times: {cluster.last_words(error)}") from error
        except Exception as error:  # no machine, no cluster, no connection
            raise Unavailable(f"Ray has lost a search: {cluster.last_words(error)}") from error
        finally:
            with suppress(Exception):
                cluster.bounded(partial(_cancel, list(running)), END_S)


def _cancel(calls: list[Any]) -> None:
    import ray

    for call in calls:
        ray.cancel(call)
