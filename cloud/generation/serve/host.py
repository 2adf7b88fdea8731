"""Opens generation from its settings: model, tokenizer, profile, policy. Importing this module imports torch."""

import logging
import time
from typing import Final

import torch

from isthmus.cloud.generation.model.configuration import LlamaConfig
from isthmus.cloud.generation.model.executor import ModelExecutor, kv_shape, make_cache
from isthmus.cloud.generation.model.llama import Llama
from isthmus.cloud.generation.model.swap import SwapPool
from isthmus.cloud.generation.model.tokenizer import TextTokenizer
from isthmus.cloud.generation.model.weights import load_llama
from isthmus.cloud.generation.policies.by_name import make_policy
from isthmus.cloud.generation.prepare.profiler import machine_key, measure
from isthmus.cloud.generation.scheduling.blocks import BLOCK_TOKENS
from isthmus.cloud.generation.scheduling.engine import Engine
from isthmus.cloud.generation.scheduling.policy import Limits
from isthmus.cloud.generation.scheduling.profile import MAX_PROFILE_CHARS, BadProfile, GenerationProfile
from isthmus.cloud.generation.serve.live import LiveGeneration
from isthmus.cloud.generation.serve.moving import Moves
from isthmus.cloud.generation.serve.serving import Generation
from isthmus.cloud.generation.serve.settings import GenerationSettings
from isthmus.cloud.generation.serve.text import AnswerText
from isthmus.data.files import read_text
from isthmus.proto.errors import InvalidInput

log = logging.getLogger(__name__)

MAX_NAME_CHARS: Final = 64


def open_generation(settings: GenerationSettings) -> Generation:
    """Opens everything except the engine's thread. It blocks: weights are read, and the machine may be measured.

    Raises ValueError if ``settings`` name no model. Raises InvalidInput, with the way out, if model, tokenizer, profile
    or policy are not available or do not belong together.
    """
    folder = settings.model
    if folder is None:
        raise ValueError("a model directory is needed")
    # The number of threads belongs to the calling thread.
    torch.set_num_threads(settings.threads)
    try:
        policy = make_policy(settings.policy)
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    name = settings.name or folder.resolve().name
    if not 1 <= len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise InvalidInput(f"the model's name must have from 1 to {MAX_NAME_CHARS} printable characters")
    config = LlamaConfig.read(folder)
    tokenizer = TextTokenizer.read(folder, config)
    model = load_llama(folder, config, number_type=settings.number_type, device=settings.device)
    swap_blocks = settings.swap_tokens // BLOCK_TOKENS
    limits = Limits(
        settings.rows,
        max(1, settings.kv_tokens // BLOCK_TOKENS),
        BLOCK_TOKENS,
        swap_blocks=swap_blocks,
        prefix_blocks=settings.prefix_tokens // BLOCK_TOKENS,
    )
    profile, weights = _profile(settings, model)
    engine = Engine(profile, policy, limits, max_requests=settings.max_waiting)
    pool = SwapPool(swap_blocks * BLOCK_TOKENS, folder=settings.swap_folder) if swap_blocks else None
    cache = make_cache(settings.layout, model, limits)
    executor = ModelExecutor(model, cache, pool)
    live = LiveGeneration(engine, executor, on_start=lambda: torch.set_num_threads(settings.threads))
    log.info("generation: %s, %s, policy %s, layout %s", name, settings.number_type, settings.policy, settings.layout)
    moves = Moves(
        live,
        cache,
        kv_shape(model),
        lambda stops: AnswerText(tokenizer.stream(), stops, config.end_ids),
        model=f"{config} {settings.number_type} {weights}",
        context=config.context,
        vocabulary=config.vocabulary,
    )
    return Generation(name, config, tokenizer, live, settings.max_tokens, time.time(), moves)


def _profile(settings: GenerationSettings, model: Llama) -> tuple[GenerationProfile, str]:
    """Returns the profile, and the hash of the model's weights."""
    if settings.profile is None:
        log.info("measuring this machine; 'isthmus generate profile' measures more exactly, for --profile")
        made = measure(model, layout=settings.layout, rows=(1, 4), contexts=(16, 48), chunks=(8, 16, 32), repeats=1)
        return made, made.key.model_hash
    try:
        found = GenerationProfile.from_json(read_text(settings.profile, limit_bytes=MAX_PROFILE_CHARS))
    except (OSError, BadProfile, ValueError) as error:
        raise InvalidInput(f"profile {settings.profile.name}: {error}") from error
    here = machine_key(model)
    for difference in found.key.differences(here):
        log.warning("the profile was measured on another machine or model: %s", difference)
    return found, here.model_hash
