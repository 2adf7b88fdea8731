"""The work of ``isthmus generate place``: search the best placement of replicas. It needs no torch."""

import json
from dataclasses import asdict

import typer

from isthmus.cloud.commands.generation.options import PlaceOptions
from isthmus.cloud.generation.prepare.placement import Goals, best_rate, placements
from isthmus.cloud.generation.prepare.replaying import check_room, sizes_of
from isthmus.cloud.generation.scheduling.blocks import BLOCK_TOKENS
from isthmus.cloud.generation.scheduling.policy import Limits
from isthmus.cloud.generation.scheduling.profile import GenerationProfile, reference_profile
from isthmus.command_line import print_table
from isthmus.data.files import read_text, write_atomically


def place(asked: PlaceOptions) -> None:
    """Search, print, and write ``asked.out`` if it is given. Raises ValueError or OSError."""
    profile = reference_profile() if asked.profile is None else GenerationProfile.from_json(read_text(asked.profile))
    limits = Limits(rows=asked.rows, blocks=max(1, asked.kv_tokens // BLOCK_TOKENS))
    goals = Goals(asked.ttft_s, asked.tpot_s, asked.share)
    sizes, _ = sizes_of(asked.workload, asked.requests, asked.seed, asked.shrink)
    check_room(int((sizes.prompts_N + sizes.answers_N).max()), asked.kv_tokens)
    found = [
        (each, best_rate(each, sizes, goals, profile, limits, seed=asked.seed)) for each in placements(asked.replicas)
    ]
    found.sort(key=lambda pair: -pair[1])
    print_table(("placement", "requests per second"), [(str(each), f"{rate:.2f}") for each, rate in found])
    best, rate = found[0]
    typer.echo(f"best for {asked.workload}: {best}" if rate else "no placement keeps these times at any rate")
    if asked.out is not None:
        rates = [{**asdict(each), "requests_per_s": rate} for each, rate in found]
        settings = {"workload": asked.workload, "seed": asked.seed, "requests": asked.requests, **asdict(goals)}
        write_atomically(asked.out, json.dumps({**settings, "placements": rates}, indent=1) + "\n")
        typer.echo(f"written: {asked.out}")
