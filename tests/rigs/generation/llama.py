"""A tiny Llama with random weights as a model directory, its forward written plainly in float64, and requests."""

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from isthmus.cloud.generation.model.configuration import LlamaConfig
from isthmus.cloud.generation.model.weights import expected_shapes
from isthmus.cloud.generation.serve.serving import Generation
from isthmus.cloud.http.calls import Door
from isthmus.cloud.http.openai import openai_app
from isthmus.cloud.http.server import HttpServer
from tests.rigs.project.patience import HANGS_S

START, END = "<|start|>", "<|end|>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "eos_token_id": 1,
}


def tiny_tokenizer() -> Tokenizer:
    """Returns a byte-level tokenizer of under 320 tokens; every text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[AddedToken(START, special=True), AddedToken(END, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user assistant system the words of a small model come back"] * 4, trainer)
    return tokenizer


def save_tiny_llama(folder: Path, *, seed: int = 0, shards: int = 1, **changes: Any) -> LlamaConfig:
    """Writes a model directory with random weights; ``changes`` replace entries of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "chat_template": TEMPLATE}))
    config = LlamaConfig.read(folder)
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_shapes(config).items():
        values = torch.randn(shape, generator=random)
        # Wide weights, so that the most likely token is clearly ahead and texts vary.
        tensors[name] = 1 + 0.1 * values if name.endswith("norm.weight") else 1.6 * values * shape[-1] ** -0.5
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return config
    where = {name: f"model-{at % shards + 1:05}-of-{shards:05}.safetensors" for at, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return config


def plain_logits(tensors: dict[str, np.ndarray], config: LlamaConfig, ids: Sequence[int]) -> np.ndarray:
    """Returns the logits of every position, (T, V), computed token by token as the papers write it, in float64."""
    x = {name: values.astype(np.float64) for name, values in tensors.items()}
    tokens, group = len(ids), config.heads // config.kv_heads
    angles = np.outer(np.arange(tokens), config.rope.theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim))

    def norm(states: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return states / np.sqrt((states**2).mean(-1, keepdims=True) + config.norm_epsilon) * weight

    def product(states: np.ndarray, name: str) -> np.ndarray:
        return states @ x[f"{name}.weight"].T + x.get(f"{name}.bias", 0.0)

    def turned(heads: np.ndarray) -> np.ndarray:
        first, second = np.split(heads, 2, axis=-1)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)

    states = x["model.embed_tokens.weight"][list(ids)]
    for layer in range(config.layers):
        at = f"model.layers.{layer}"
        normed = norm(states, x[f"{at}.input_layernorm.weight"])
        q, k, v = (
            product(normed, f"{at}.self_attn.{name}_proj").reshape(tokens, -1, config.head_dim) for name in "qkv"
        )
        q, k = turned(q), turned(k)
        out = np.zeros_like(q)
        for head in range(config.heads):
            scores = q[:, head] @ k[:, head // group].T / np.sqrt(config.head_dim)
            scores[np.triu_indices(tokens, 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, head // group]
        states = states + product(out.reshape(tokens, -1), f"{at}.self_attn.o_proj")
        normed = norm(states, x[f"{at}.post_attention_layernorm.weight"])
        gate, up = product(normed, f"{at}.mlp.gate_proj"), product(normed, f"{at}.mlp.up_proj")
        states = states + product(gate / (1 + np.exp(-gate)) * up, f"{at}.mlp.down_proj")
    head = x["model.embed_tokens.weight"] if config.tied else x["lm_head.weight"]
    return norm(states, x["model.norm.weight"]) @ head.T


def plain_greedy(tensors: dict[str, np.ndarray], config: LlamaConfig, prompt: Sequence[int], count: int) -> list[int]:
    """Returns the ``count`` most likely tokens after ``prompt``, each with everything before it."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(plain_logits(tensors, config, ids)[-1].argmax()))
    return ids[len(prompt) :]


@contextmanager
def serving_http(generation: Generation, key: str | None = None, *, move_key: str | None = None) -> Iterator[str]:
    """Serves the model over HTTP on loopback, on a loop in a thread of its own. Yields the URL."""
    ready: Future[str] = Future()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        app = openai_app(generation, Door(key), moves=generation.moves, move_key=move_key)
        server = HttpServer(app, "127.0.0.1", 0)
        generation.live.start()
        try:
            port = await server.start()
            ready.set_result(f"http://127.0.0.1:{port}")
            await stop.wait()
        finally:
            await server.stop()
            await asyncio.to_thread(generation.live.stop)
            generation.close()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    try:
        yield ready.result(timeout=HANGS_S)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=HANGS_S)
        loop.close()
