"""The work of ``isthmus generate ask``."""

import sys

from isthmus.chat_client import ChatServer
from isthmus.cloud.commands.generation.options import AskOptions


def ask(asked: AskOptions) -> None:
    """Print the answer piece by piece. Ends the command with one line if the server refuses or cannot be reached."""
    server = ChatServer(asked.server, asked.key_file, asked.tls_cert)
    messages = [{"role": "user", "content": asked.prompt}]
    if asked.system is not None:
        messages.insert(0, {"role": "system", "content": asked.system})
    pieces = server.reply(
        messages,
        max_tokens=asked.max_tokens,
        temperature=asked.temperature,
        seed=asked.seed,
        stop=asked.stop or None,
        latency_s=asked.latency_s,
    )
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    usage, times = server.usage, server.times
    if usage:
        line = f"{usage['prompt_tokens']} tokens in, {usage['completion_tokens']} out"
        if times:
            line += f"; first token after {times['ttft_s']:.2f} s, whole answer after {times['total_s']:.2f} s"
        print(line, file=sys.stderr)
