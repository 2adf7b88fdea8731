"""``isthmus generate``: convert, measure and serve a language model, ask it, and replay workloads."""

from isthmus.cloud.commands.generation.options import (
    AskOptions,
    ConvertOptions,
    GenerateProfileOptions,
    GenerateReplayOptions,
    GenerateServeOptions,
    PlaceOptions,
)
from isthmus.command_line import App

app = App(
    "isthmus generate",
    help="Stream replies of a small language model to many clients.\n\n"
    "'convert' makes a model directory of a GGUF file, 'profile' measures this machine, 'serve' answers OpenAI's "
    "clients, 'ask' is a client, 'replay' simulates how a policy copes with a workload, and "
    "'place' how replicas share it.",
    extra="generate",
)


@app.command(example="isthmus generate convert SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2")
def convert(asked: ConvertOptions) -> None:
    """Make a model directory of a GGUF file: weights, configuration, tokenizer and chat template.

    Needs a GGUF file of a Llama, Mistral or Qwen2 model with a byte-level tokenizer. Writes --out; quantised weights
    are expanded once.
    """
    from isthmus.cloud.commands.generation.preparing import convert

    convert(asked)


@app.command(example="isthmus generate profile smollm2 --out profile.json")
def profile(asked: GenerateProfileOptions) -> None:
    """Measure how long a step of the model takes on this machine, and fit the profile's five costs to it.

    Needs a model directory. Writes --out, and prints the costs and the error of the fit.
    """
    from isthmus.cloud.commands.generation.preparing import profile

    profile(asked)


@app.command(
    example="""
    isthmus generate serve smollm2 --http 127.0.0.1:8000
    isthmus generate serve smollm2 --http 0.0.0.0:8443 --key-file key --tls-cert cert.pem --tls-key key.pem
    isthmus generate serve --generate-upstream http://gpu-1:8000 --generate-upstream http://gpu-2:8000 --policy vtc
    """
)
def serve(asked: GenerateServeOptions) -> None:
    """Serve a language model over HTTP, as OpenAI's clients expect it, until interrupted.

    Needs a model directory, or other servers with OpenAI's interface (--generate-upstream). Prints "listening on
    HOST:PORT" once it is ready. It answers /v1/chat/completions, /v1/completions and /v1/models, whole or streamed.
    Writes --port-file if it is given.

    In front of other servers, admission, order (--policy fused, sjf, hrrn or vtc), the choice of the replica, retries
    and the sentence about how the user feels are ours. The steps are theirs, so layout, number type, device and profile
    do not matter, and --rows and --kv-tokens bound what each of them is given at a time.
    """
    from isthmus.cloud.commands.generation.serving import serve

    serve(asked)


@app.command(
    extra="client",
    example="""
    isthmus generate ask "Say hello to Ada." --server http://127.0.0.1:8000
    isthmus generate ask "Say hello to Ada." --server https://cloud.example:8443 --key-file key --tls-cert cert.pem
    """,
)
def ask(asked: AskOptions) -> None:
    """Ask a running server, and print the answer as it comes.

    Needs a server of 'isthmus generate serve', or another one with OpenAI's interface and one model. How many tokens
    the answer has, and its times, are printed on standard error.
    """
    from isthmus.cloud.commands.generation.asking import ask

    ask(asked)


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
    from isthmus.cloud.commands.generation.replaying import replay

    replay(asked)


@app.command(
    example="""
    isthmus generate place chat --replicas 2 --ttft-s 1 --tpot-s 0.1
    isthmus generate place azure_llm_2023_code.csv --replicas 2 --tpot-s 0.07 --out placement.json
    """
)
def place(asked: PlaceOptions) -> None:
    """Search how replicas serve a workload best: all alike, or some for prompts and the others for decodes.

    Needs nothing for lmaas and chat. For each placement it simulates the highest rate at which enough requests are in
    time. Prints all rates, the best first, and writes --out if it is given.
    """
    from isthmus.cloud.commands.generation.placing import place

    place(asked)
