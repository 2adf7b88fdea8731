"""Opens elastic serving from its settings: model, profile, policy, tasks. Importing this module imports torch."""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from isthmus.cloud.cluster import connection as cluster
from isthmus.cloud.elastic.executors.on_ray import RayExecutor
from isthmus.cloud.elastic.executors.opening import Opening, opened
from isthmus.cloud.elastic.executors.process import ProcessExecutor
from isthmus.cloud.elastic.model.executor import ExecutorLost, ModelExecutor, Supervised
from isthmus.cloud.elastic.model.runner import ElasticRunner, NumberType
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.model.weights import ModelError, load_vit, pixel_spec
from isthmus.cloud.elastic.policies.by_name import make_policy
from isthmus.cloud.elastic.prepare.precision import NUMBER_TYPES, choose, named, noise
from isthmus.cloud.elastic.prepare.profiler import machine_key, measure, measure_briefly
from isthmus.cloud.elastic.scheduling.engine import Engine
from isthmus.cloud.elastic.scheduling.merge_order import MergeOrder, order_for
from isthmus.cloud.elastic.scheduling.profile import MAX_PROFILE_CHARS, BadProfile, Profile
from isthmus.cloud.elastic.scheduling.scaling import Scaler, ScaleRule
from isthmus.cloud.elastic.serve.decoding import Decoder, decoded
from isthmus.cloud.elastic.serve.growth import Growth
from isthmus.cloud.elastic.serve.live import LiveEngine
from isthmus.cloud.elastic.serve.measuring import Measurer
from isthmus.cloud.elastic.serve.registry import Registry
from isthmus.cloud.elastic.serve.serving import Elastic
from isthmus.cloud.elastic.serve.settings import ElasticSettings
from isthmus.cloud.elastic.serve.variant_host import open_variants
from isthmus.cloud.elastic.tasks.task import Task
from isthmus.cloud.elastic.warm.models import WarmExecutor, WarmModels
from isthmus.cloud.elastic.warm.store import StoreError, WarmStore
from isthmus.cloud.store.artefacts import Artefacts
from isthmus.cloud.store.database import Database
from isthmus.data.files import write_atomically
from isthmus.data.images import PixelSpec
from isthmus.proto.errors import InvalidInput

log = logging.getLogger(__name__)

PROGRESS_S: Final = 5.0


def open_elastic(settings: ElasticSettings, database: Database, artefacts: Artefacts) -> Elastic:
    """Opens everything except the threads. It blocks, for up to a few minutes if the machine is measured.

    The machine is measured if the settings ask for it, or if no profile is named and none was kept before.
    Raises InvalidInput, with the way out, if model, profile or policy are not available or do not belong together.
    """
    if settings.variants is not None:
        return open_variants(settings)
    most = _most(settings)
    # The number of threads belongs to the calling thread; heads on the event loop keep theirs.
    torch.set_num_threads(settings.threads)
    path = settings.profile_path
    first = settings.profile is None and not path.exists()
    before = None if first or (settings.measure and not path.is_file()) else read_profile(path)
    device = device_of(settings, before)
    # The model of a cluster elsewhere is opened here for its shape alone.
    elsewhere = settings.executor.startswith(cluster.REMOTE)
    if elsewhere and (before is None or settings.measure):
        raise InvalidInput(
            "--executor ray://... needs --elastic-profile, measured on a machine of the cluster with 'isthmus elastic "
            "profile'; this machine's times say nothing about it"
        )
    settings = replace(settings, device="cpu" if elsewhere else device)
    runner = _runner(settings, before)
    profile = _measured(runner, path, before) if settings.measure or before is None else before
    for line in () if elsewhere else profile.key.differences(machine_key(runner)):
        log.warning("the profile belongs to another machine (%s); '--elastic-measure' measures this one", line)
    try:
        policy = make_policy(settings.policy, profile)
    except ValueError as error:
        raise InvalidInput(f"--elastic-policy: {error}") from error
    engine = Engine(
        profile,
        policy,
        max_waiting=settings.max_waiting,
        memory_limit_bytes=settings.memory_bytes,
        executors=most,
    )
    warm = _warm(settings, runner)
    shape = runner.model.shape
    pixels = runner.pixels
    opening = _opening(settings, profile, runner, device)
    executors: Sequence[WarmExecutor | ModelExecutor | ProcessExecutor | RayExecutor]
    measuring: ModelExecutor | ProcessExecutor | RayExecutor
    if settings.executor != "thread":
        del runner  # each executor has a copy of its own
        executors = outside = _outside(settings, opening, pixels)
        measuring = outside[0]
    else:
        # A runner serves one thread at a time, so each executor has one of its own.
        runners = [runner, *(opened(opening) for _ in range(settings.executors - 1))]
        bases = [ModelExecutor(each, pixels) for each in runners]
        executors = bases if warm is None else [WarmExecutor(bases[0], warm, profile.gammas)]
        measuring = bases[0]
    live = LiveEngine(engine, *executors, on_start=lambda: torch.set_num_threads(settings.threads))
    growth = None
    if settings.most_executors is not None:
        rule = ScaleRule(settings.executors, settings.most_executors)
        growth = Growth(live, Scaler(rule, profile, time.monotonic()))

    def changed(name: str, task: Task | None) -> None:
        if task is None:
            live.forget(name)
        else:
            for executor in executors:
                executor.prepare(task)
            live.plan_for(task, None if warm is None else warm.accuracy(task, profile.gammas))

    # Tasks of warmed models have the accuracies that were measured when these were tuned.
    measurer = Measurer(measuring, profile, live.idle, on_start=lambda: torch.set_num_threads(settings.threads))
    registry = Registry(database, artefacts, shape, changed, measurer.ask)
    measurer.attach(registry)
    try:
        registry.load()
    except BaseException:
        for executor in executors:
            if isinstance(executor, Supervised):
                executor.close()
        raise
    log.info("elastic serving of %s at gamma %s", settings.model, profile.gammas)
    decoder = Decoder(lambda data: decoded(data, pixels))
    return Elastic(registry, live, decoder, shape, warm, measurer=measurer, growth=growth)


def _most(settings: ElasticSettings) -> int:
    """Returns the largest number of executors. Raises InvalidInput for one that cannot be."""
    if settings.most_executors is None:
        return settings.executors
    if settings.executor == "thread":
        raise InvalidInput(
            "--elastic-most-executors: a thread of the server keeps its copy of the model, so nothing would be saved; "
            "add --executor process"
        )
    if settings.most_executors < settings.executors:
        raise InvalidInput(
            f"--elastic-most-executors {settings.most_executors} is below --elastic-executors {settings.executors}"
        )
    return settings.most_executors


def _opening(settings: ElasticSettings, profile: Profile, runner: ElasticRunner, device: str) -> Opening:
    """Returns how other executors open the model that ``runner`` has opened, on ``device``."""
    return Opening(
        source=settings.model,
        pixels=settings.pixels,
        device=device,
        number_type=runner.number_type,
        compiler=settings.compiler,
        packed=_packed(settings),
        threads=settings.threads,
        schedules={gamma: cuts for gamma, cuts in profile.schedules.items() if gamma < 0},
        merge_order=profile.merge_order,
        expert_bytes=settings.expert_bytes,
        # Weights that are packed for a processor have another form on a GPU.
        model_hash="" if device != settings.device else machine_key(runner).model_hash,
        # An executor that starts under load would measure the load. Machines of a cluster measure themselves.
        mixing=None if settings.executor.startswith(cluster.REMOTE) else runner.model.mixing,
    )


def _outside(
    settings: ElasticSettings, opening: Opening, pixels: PixelSpec
) -> list[ProcessExecutor] | list[RayExecutor]:
    """Makes executors outside this process, and starts all that are always there at once.

    Raises InvalidInput if one of them cannot open the model.
    """
    executors: list[ProcessExecutor] | list[RayExecutor]
    if settings.executor == "process":
        executors = [ProcessExecutor(opening, pixels) for _ in range(_most(settings))]
    else:
        cpus = _most(settings) * settings.threads
        executors = [RayExecutor(opening, pixels, address=settings.executor, cpus=cpus) for _ in range(_most(settings))]
    try:
        with ThreadPoolExecutor(settings.executors) as pool:
            list(pool.map(lambda executor: executor.restore(), executors[: settings.executors]))
    except ExecutorLost as error:
        for executor in executors:
            executor.close()
        raise InvalidInput(f"--executor {settings.executor}: {error}") from error
    return executors


def read_profile(path: Path) -> Profile:
    """Reads a profile. Raises InvalidInput, with the way out, if it is missing or cannot be read."""
    way_out = "measure one with 'isthmus elastic profile', or start with --elastic-measure"
    try:
        with path.open(encoding="utf-8") as file:
            return Profile.from_json(file.read(MAX_PROFILE_CHARS + 1))
    except FileNotFoundError as error:
        raise InvalidInput(f"there is no profile of this model; {way_out}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"the profile {path.name} cannot be read; {way_out}") from error
    except BadProfile as error:
        raise InvalidInput(f"{path.name}: {error}; {way_out}") from error


def device_of(settings: ElasticSettings, profile: Profile | None) -> str:
    """Returns the device that is asked for. "auto" keeps to the profile, as its times would be wrong elsewhere."""
    if settings.device != "auto":
        return settings.device
    if settings.executor.startswith(cluster.REMOTE):
        return "cpu" if profile is None or profile.key.device == "cpu" else "cuda"
    keeps_to_cpu = profile is not None and not settings.measure and profile.key.device == "cpu"
    return "cuda" if torch.cuda.is_available() and not keeps_to_cpu else "cpu"


def _runner(settings: ElasticSettings, profile: Profile | None) -> ElasticRunner:
    """Returns the model on its device. It merges by the schedules of the profile and in the order of ``_order``."""
    schedules = {} if profile is None else {gamma: cuts for gamma, cuts in profile.schedules.items() if gamma < 0}
    source = settings.model
    try:
        order = _order(settings, profile)
        vit = load_vit(source, on_shelf=True, expert_bytes=settings.expert_bytes)
        if settings.expert_bytes is not None and getattr(vit, "identity", None) is None:
            raise InvalidInput(f"--elastic-expert-bytes: {Path(source).name} has no experts; leave it out")
        model, pixels = ElasticViT(vit, schedules, merge_order=order), pixel_spec(vit, source, settings.pixels)
        return ElasticRunner(
            model,
            pixels,
            device=settings.device,
            number_type=_number_type(settings, profile, model, pixels),
            compiler=settings.compiler,
            packed=_packed(settings),
        )
    except ModelError as error:
        raise InvalidInput(f"--elastic-model: {error}") from error
    except StoreError as error:
        raise InvalidInput(f"--elastic-warm: {error}") from error
    except (ValueError, RuntimeError) as error:
        raise InvalidInput(f"the model cannot be served: {error}") from error


def _order(settings: ElasticSettings, profile: Profile | None) -> MergeOrder:
    """Returns the order to merge in: that of the profile, and without one that of warmed models, else the default.

    If this machine is measured again, warmed models come before a profile that holds times alone. Raises InvalidInput
    for models of another order than a profile that this server has measured itself, and StoreError.
    """
    warmed = None if settings.warm is None else WarmStore(settings.warm).merge_order()
    if profile is None:
        return order_for(None, {"--elastic-warm": warmed})
    of_times_alone = not profile.accuracy and not profile.schedules
    if warmed is None or warmed == profile.merge_order or not of_times_alone:
        return profile.merge_order
    if settings.measure:
        return warmed
    raise InvalidInput(
        f"--elastic-warm: its models were tuned with tokens merged in the order {warmed}, and the profile was measured "
        f"in the order {profile.merge_order}: start once with --elastic-measure"
    )


def _packed(settings: ElasticSettings) -> bool:
    """Returns whether weights are kept a second time, packed: not if memory is to be saved."""
    return settings.warm is None and settings.expert_bytes is None


def _warm(settings: ElasticSettings, runner: ElasticRunner) -> WarmModels | None:
    """Returns the warmed models if a store of them is named. A model that cannot be used is logged and left out."""
    if settings.warm is None:
        return None
    if settings.executors > 1 or settings.executor != "thread":
        raise InvalidInput(
            "--elastic-warm places its models for one executor in a thread: leave out --elastic-executors and "
            "--executor"
        )
    try:
        warm = WarmModels(settings.warm, runner, limit_bytes=settings.warm_bytes)
    except ValueError as error:
        raise InvalidInput(f"--elastic-warm: {error}") from error
    if warm.common.reducer == "pruning" and settings.measure:
        warm.close()
        raise InvalidInput(
            "--elastic-measure times merging, and the warmed models prune: use 'isthmus elastic profile --warm'"
        )
    log.info("%d warmed models for task %s", len(warm.cards), warm.common.task)
    return warm


def _number_type(
    settings: ElasticSettings, profile: Profile | None, model: ElasticViT, pixels: PixelSpec
) -> NumberType:
    """Returns the requested number type, else the profile's. If the machine is measured, it is the best one here."""
    known = None if profile is None or settings.measure else profile.key.number_type
    asked = named(known if settings.number_type == "auto" else settings.number_type)
    if asked is not None:
        return asked
    if settings.expert_bytes is not None:
        return "float32"  # comparing would hold experts in each of the types at once
    log.info("choosing among float32, bfloat16 and int8 the fastest on this machine that keeps the answers")
    # Without labels a number type is judged by how often its answer equals float32's.
    pictures = noise(pixels.size_px, 8)
    chosen = choose(
        model,
        pixels,
        pictures,
        device=settings.device,
        batch=2,
        repeats=2,
        compiler=settings.compiler,
        packed=_packed(settings),
        number_types=NUMBER_TYPES if settings.warm is None else ("float32", "bfloat16"),
    )
    log.info("%s", chosen.said())
    return chosen.number_type


def _measured(runner: ElasticRunner, path: Path, before: Profile | None) -> Profile:
    """Measures this machine and writes the profile to ``path``. Accuracies stay: they do not depend on the machine."""
    began_s = time.monotonic()
    log.info("measuring how fast this machine runs the model, once; the profile is kept in %s", path)
    try:
        if before is None:
            profile = measure_briefly(runner, on_step=_Progress())
        else:
            profile = measure(runner, gammas=before.gammas, sizes=before.sizes, on_step=_Progress())
    except ValueError as error:
        raise InvalidInput(f"the model cannot be measured: {error}") from error
    for task, accuracy in ({} if before is None else before.accuracy).items():
        profile = profile.with_task(task, accuracy)
    log.info(
        "measured in %.0f s: %.3g images/s with all tokens, %.3g at gamma %d",
        time.monotonic() - began_s,
        profile.capacity_per_s(0) if 0 in profile.gammas else profile.capacity_per_s(profile.gammas[-1]),
        profile.capacity_per_s(profile.gammas[0]),
        profile.gammas[0],
    )
    write_atomically(path, profile.to_json())
    return profile


class _Progress:
    """Logs the progress of a measurement, at most every few seconds."""

    def __init__(self) -> None:
        self._said_s = time.monotonic()

    def __call__(self, what: str, done: int, all: int) -> None:
        now_s = time.monotonic()
        if now_s - self._said_s >= PROGRESS_S:
            self._said_s = now_s
            log.info("measuring %s: %d of %d steps", what, done, all)
