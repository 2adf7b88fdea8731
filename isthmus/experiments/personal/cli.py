"""``isthmus experiment`` paper, people and cost: personalisation compared, over methods, clients and seeds."""

from isthmus.command_line import App
from isthmus.experiments.personal.options import CostOptions, PaperOptions, PeopleOptions


def add_commands(app: App) -> None:
    """Add the commands of this file to the ``isthmus experiment`` command."""
    app.command(
        "paper", resumes=True, example="isthmus experiment paper --data clips/CREMA-D --preset smoke --out paper"
    )(paper_command)
    app.command(
        "people", resumes=True, example="isthmus experiment people --data clips/CREMA-D --preset smoke --out people"
    )(people_command)
    app.command(
        "cost", resumes=True, example="isthmus experiment cost --data clips/CREMA-D --release release --out cost"
    )(cost_command)


def paper_command(asked: PaperOptions) -> None:
    """Run the paper's Tables 5.2 to 5.4 and Figures 5.6 to 5.15, with more selection methods and controls.

    Needs a data set. A teacher is trained first if there is no release. Writes --out. Every cell (client, scenario,
    method, seed) is a file: a run that was stopped continues, and seeds or methods can be added later.
    """
    from isthmus.experiments.personal.runs import compare_methods

    compare_methods(asked)


def people_command(asked: PeopleOptions) -> None:
    """Leave one person out: every actor in turn is the user of a release that was trained without them.

    Needs a data set whose clips name their actors. Trains one teacher per --together persons. Measures the methods of
    the cloud, and what helps each person on the device: offset, habits, corrections. Writes --out; every cell and fold
    is a file, so a run that was stopped continues.
    """
    from isthmus.experiments.personal.runs import leave_people_out

    leave_people_out(asked)


def cost_command(asked: CostOptions) -> None:
    """Measure the processor time of one personalisation: the paper's loop with the teacher in it, and ours.

    Needs a data set and a release whose teacher is trained. Writes result.json and result.md to --out.
    """
    from isthmus.experiments.personal.runs import measure_cost

    measure_cost(asked)
