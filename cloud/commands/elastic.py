"""``isthmus elastic``: prepare a model, measure it and replay a trace; the client's commands are added here."""

from isthmus.cloud.commands.client import add_commands
from isthmus.cloud.commands.options import (
    ExpertOptions,
    Picturing,
    ProfileOptions,
    PromptOptions,
    ReplayOptions,
    ScheduleOptions,
    VariantOptions,
)
from isthmus.cloud.commands.warmup import app as warmup_app
from isthmus.command_line import App

app = App(
    "isthmus elastic",
    help="Serve many image tasks with one vision transformer.\n\n"
    "'prompts' makes a task of labelled pictures, 'experts' makes a model with experts and several tasks for it, "
    "'schedules' finds the layers at which to merge tokens, and 'profile' measures this machine. Then "
    "'isthmus cloud serve --elastic-model MODEL --elastic-profile PROFILE' serves. A command that was stopped "
    "continues when it is run again.",
    extra="elastic",
)


@app.command(
    "prompts",
    resumes=True,
    example="""
    isthmus elastic prompts --model vit.safetensors --pixels cifar10 --data train.parquet --task animals --out tasks
    """,
)
def learn_prompts(asked: PromptOptions, picturing: Picturing) -> None:
    """Learn a task: a head, then prompts for each number of --gammas, every one starting from the one before.

    Needs a vision transformer and labelled pictures. Writes NAME.safetensors, NAME.json and NAME.recipe.json to --out,
    and prints the accuracy per gamma on the pictures that were held out.
    """
    from isthmus.cloud.commands.preparing import learn_prompts

    learn_prompts(asked, picturing)


@app.command(
    "experts",
    resumes=True,
    example="""
    isthmus elastic experts --model vit.safetensors --pixels cifar10 --data train.parquet --task cifar10 \\
        --task animals-vehicles --out experts
    """,
)
def learn_experts(asked: ExpertOptions, picturing: Picturing) -> None:
    """Make experts of a dense model's MLPs, and learn several tasks with them at once.

    Needs a vision transformer and labelled pictures. Writes the model's folder to OUT/model and the tasks to OUT/tasks,
    and prints the accuracy per task and number of experts on the pictures that were held out.
    """
    from isthmus.cloud.commands.specialising import learn_experts

    learn_experts(asked, picturing)


@app.command(
    "schedules",
    resumes=True,
    example="""
    isthmus elastic schedules --model vit.safetensors --pixels cifar10 --data train.parquet --tasks tasks \\
        --out schedules.json
    """,
)
def search_schedules(asked: ScheduleOptions, picturing: Picturing) -> None:
    """Find the layers at which to merge tokens: the best mean accuracy over the tasks, at no more operations.

    Needs a vision transformer, labelled pictures and tasks. Writes --out. Schedules are compared with merging the same
    number of tokens in every layer.
    """
    from isthmus.cloud.commands.preparing import search_schedules

    search_schedules(asked, picturing)


@app.command(
    "profile",
    example="""
    isthmus elastic profile --model vit.safetensors --pixels cifar10 --tasks tasks --data train.parquet \\
        --threads 1 --out profile.json
    """,
)
def measure_profile(asked: ProfileOptions, picturing: Picturing) -> None:
    """Measure accuracy per task and gamma, and time and memory per gamma and batch size, on this machine.

    A model with experts is measured for each number of experts per token as well.

    Needs a vision transformer; --tasks and --data add the accuracies. Writes --out and a PNG file beside it.
    """
    from isthmus.cloud.commands.preparing import measure_profile

    measure_profile(asked, picturing)


@app.command(
    "variants",
    example="""
    isthmus elastic variants --task cifar10 --small vit_s.safetensors --base vit_b.safetensors \\
        --large vit_l.safetensors --data test.parquet --threads 1 --out variants
    """,
)
def add_variants(asked: VariantOptions) -> None:
    """Add a task's models of several sizes to a folder, for serving as INFaaS does.

    Needs a base model trained for the task, and a small or large one, each with its own head. Writes copies
    to --out, with the accuracy of each size. The first task of a folder also measures time, memory and loading on this
    machine.
    """
    from isthmus.cloud.commands.varying import add_variants

    add_variants(asked)


@app.command(
    "replay",
    example="""
    isthmus elastic replay --policy priced --load 1.5
    isthmus elastic replay trace.csv --live --profile profile.json --model vit.safetensors --tasks tasks \\
        --data test.parquet
    isthmus elastic replay trace.csv --server 127.0.0.1:50051 --profile profile.json --tasks tasks --data test.parquet
    isthmus elastic replay trace.csv --policy infaas:0.5 --variants variants
    """,
)
def replay(asked: ReplayOptions) -> None:
    """Serve the queries of a trace, and report how they ended, beside the most that any policy could earn.

    Needs nothing for a simulation of the synthetic trace. With --live it runs the model in this process, and
    needs --profile, --model, --tasks and --data. With --server it asks a running server, and needs --profile, --tasks
    and --data. Writes --out if it is given.
    """
    from isthmus.cloud.commands.replaying import replay

    replay(asked)


add_commands(app)
app.add(warmup_app)
