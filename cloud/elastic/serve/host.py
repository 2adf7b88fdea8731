"""Opens elastic serving from the service's settings: model, profile, policy, tasks. Importing this imports torch."""

import logging
from pathlib import Path

import torch

from isthmus.cloud.elastic.model.executor import Image, ModelExecutor
from isthmus.cloud.elastic.model.runner import ElasticRunner, NumberType
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.model.weights import ModelError, load_vit, pixel_spec
from isthmus.cloud.elastic.policies.by_name import make_policy
from isthmus.cloud.elastic.prepare.precision import NUMBER_TYPES, choose, named, noise
from isthmus.cloud.elastic.prepare.profiler import GAMMAS, machine_key, measure
from isthmus.cloud.elastic.scheduling.engine import Engine
from isthmus.cloud.elastic.scheduling.profile import MAX_PROFILE_CHARS, BadProfile, Profile
from isthmus.cloud.elastic.serve.decoding import Decoder
from isthmus.cloud.elastic.serve.live import LiveEngine
from isthmus.cloud.elastic.serve.registry import Registry
from isthmus.cloud.elastic.serve.serving import Elastic
from isthmus.cloud.elastic.serve.settings import ElasticSettings
from isthmus.cloud.elastic.tasks.task import ModelShape, Task
from isthmus.cloud.elastic.warm.models import WarmExecutor, WarmModels
from isthmus.cloud.store.artefacts import Artefacts
from isthmus.cloud.store.database import Database
from isthmus.data.files import write_atomically
from isthmus.data.images import ImageError, PixelSpec, decode_image
from isthmus.proto.errors import InvalidInput

log = logging.getLogger(__name__)


def open_elastic(settings: ElasticSettings, database: Database, artefacts: Artefacts) -> Elastic:
    """Everything but the threads' start. Blocks; for minutes where the machine is to be measured.

    Raises InvalidInput, with the way out, for a model, profile or policy that cannot be had or do not belong together.
    """
    # The number of threads is the calling thread's own; heads on the event loop keep theirs.
    torch.set_num_threads(settings.threads)
    path = settings.profile_path
    before = read_profile(path) if path.is_file() or not settings.measure else None
    runner = _runner(settings, before)
    profile = _measured(runner, path, before) if settings.measure or before is None else before
    for line in profile.key.differences(machine_key(runner)):
        log.warning("the profile was measured elsewhere (%s); '--elastic-measure' measures this machine", line)
    try:
        policy = make_policy(settings.policy, profile)
    except ValueError as error:
        raise InvalidInput(f"--elastic-policy: {error}") from error
    engine = Engine(
        profile,
        policy,
        max_waiting=settings.max_waiting,
        memory_limit_bytes=settings.memory_bytes,
    )
    warm = _warm(settings, runner)
    base = ModelExecutor(runner, runner.pixels)
    executor = base if warm is None else WarmExecutor(base, warm, profile.gammas)
    live = LiveEngine(engine, executor, on_start=lambda: torch.set_num_threads(settings.threads))

    def changed(name: str, task: Task | None) -> None:
        if task is None:
            live.forget(name)
        else:
            executor.prepare(task)
            live.plan_for(task, None if warm is None else warm.accuracy(task, profile.gammas))

    shape = ModelShape(runner.model.depth, runner.model.width, runner.model.image_px)
    registry = Registry(database, artefacts, shape, changed)
    registry.load()
    log.info("elastic serving of %s at gamma %s", settings.model, profile.gammas)
    return Elastic(registry, live, Decoder(lambda data: decoded(data, runner.pixels)), shape, warm)


def decoded(data: bytes, pixels: PixelSpec) -> Image:
    """A file's pixels as the model reads them. Raises InvalidInput for what is no picture, or too large a one."""
    try:
        return decode_image(data, pixels.size_px)
    except ImageError as error:
        raise InvalidInput(f"image: {error}") from error


def read_profile(path: Path) -> Profile:
    """Raises InvalidInput where there is none, or none that can be read."""
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


def _runner(settings: ElasticSettings, profile: Profile | None) -> ElasticRunner:
    """The model on its device, merging by the profile's schedules."""
    schedules = {} if profile is None else {gamma: cuts for gamma, cuts in profile.schedules.items() if gamma < 0}
    source = settings.model
    try:
        vit = load_vit(source)
        model, pixels = ElasticViT(vit, schedules), pixel_spec(vit, source, settings.pixels)
        return ElasticRunner(
            model,
            pixels,
            device=settings.device,
            number_type=_number_type(settings, profile, model, pixels),
            compiler=settings.compiler,
            packed=settings.warm is None,
        )
    except ModelError as error:
        raise InvalidInput(f"--elastic-model: {error}") from error
    except (ValueError, RuntimeError) as error:
        raise InvalidInput(f"the model cannot be served so: {error}") from error


def _warm(settings: ElasticSettings, runner: ElasticRunner) -> WarmModels | None:
    """The warmed models, if a store of them is named; a model that cannot be used is logged and left out."""
    if settings.warm is None:
        return None
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
    """As asked for; else that of the profile; else, or where the machine is measured, what serves best here."""
    known = None if profile is None or settings.measure else profile.key.number_type
    asked = named(known if settings.number_type == "auto" else settings.number_type)
    if asked is not None:
        return asked
    # Without labels a number type is judged by how often it answers as float32 does.
    pictures = noise(pixels.size_px)
    chosen = choose(
        model,
        pixels,
        pictures,
        device=settings.device,
        compiler=settings.compiler,
        packed=settings.warm is None,
        number_types=NUMBER_TYPES if settings.warm is None else ("float32", "bfloat16"),
    )
    log.info("%s", chosen.said())
    return chosen.number_type


def _measured(runner: ElasticRunner, path: Path, before: Profile | None) -> Profile:
    """Measures this machine and keeps the result at ``path``. Accuracy is no matter of the machine: it stays."""
    log.info("measuring this machine; that takes minutes")
    try:
        if before is None:  # a small model has not tokens enough for all usual gammas
            profile = measure(runner, gammas=[gamma for gamma in GAMMAS if -gamma <= runner.model.reducer.most])
        else:
            profile = measure(runner, gammas=before.gammas, sizes=before.sizes)
    except ValueError as error:
        raise InvalidInput(f"the model cannot be measured: {error}") from error
    for task, accuracy in ({} if before is None else before.accuracy).items():
        profile = profile.with_task(task, accuracy)
    write_atomically(path, profile.to_json())
    return profile
