"""``isthmus generate``: convert and measure a language model, and replay workloads."""

from isthmus.cloud.commands.generate_options import ConvertOptions, GenerateProfileOptions, GenerateReplayOptions
from isthmus.command_line import App

app = App(
    "isthmus generate",
    help="Stream replies of a small language model to many clients.\n\n"
    "'convert' makes a model directory of a GGUF file, 'profile' measures this machine, and 'replay' simulates how a "
    "policy copes with a workload.",
    extra="generate",
)


@app.command(example="isthmus generate convert SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2")
def convert(asked: ConvertOptions) -> None:
    """Make a model directory of a GGUF file: weights, configuration, tokenizer and chat template.

    Needs a GGUF file of a Llama, Mistral or Qwen2 model with a byte-level tokenizer. Writes --out; quantised weights
    are expanded once.
    """
    from isthmus.cloud.commands.generating import convert

    convert(asked)


@app.command(example="isthmus generate profile smollm2 --out profile.json")
def profile(asked: GenerateProfileOptions) -> None:
    """Measure how long a step of the model takes on this machine, and fit the profile's five costs to it.

    Needs a model directory. Writes --out, and prints the costs and the error of the fit.
    """
    from isthmus.cloud.commands.generating import profile

    profile(asked)


@app.command(
    example="""
    isthmus generate replay lmaas --policy fused --load 1.2
    isthmus generate replay azure_llm_2023_code.csv --policy srpt --load 0.7 --requests 2000
    """
)
def replay(asked: GenerateReplayOptions) -> None:
    """Simulate a policy on a workload, and print how its requests ended beside what no policy can pass.

    Needs nothing for lmaas and chat. Writes --out if it is given.
    """
    from isthmus.cloud.commands.generate_replaying import replay

    replay(asked)
