"""Finished cells of a study with chosen accuracies."""

import dataclasses

from isthmus.experiments.personal.cells.cells import Asked, Cell

SIZES = {"fp32": {"1": 100, "2": 60}, "int8": {"1": 40, "2": 20}}


def cell(client: str, method: str, seed: int, plain: float, **changes: object) -> Cell:
    accuracy = {"1": {"fp32": plain, "int8": plain}, "2": {"fp32": plain, "int8": plain - 0.2}}
    made = Cell(
        asked=Asked(client, "sensitive", method, seed),
        selection_clips=20,
        test_clips=20,
        before=0.5,
        accuracy=accuracy,
        teacher_head=0.5,
        teacher=0.6,
        selected=30,
        selected_per_class=(10, 20),
        effective_samples=30.0,
        rows_sent=5,
        smallest_cluster=3,
        upload_bytes=100,
        overlap=(0.5,),
        a_distance={"public": 1.0, "selection": 0.5},
        stage_s={"select": 1.0, "distil": 2.0},
        losses=(1.0, 0.5),
        masks={"both": plain, "sound": 0.5, "picture": 0.4},
    )
    return dataclasses.replace(made, **changes)
