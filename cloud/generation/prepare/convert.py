"""Converts a GGUF file of a Llama-shaped model to a model directory: weights, configuration, tokenizer, chat template.

Quantised weights are expanded once. GGUF keeps the rows of the query and key products in the order of its own rotary
embedding, pairs (2d, 2d + 1); they are put back to pairs (d, d + D/2).
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from isthmus.cloud.generation.model.configuration import (
    ARCHITECTURES,
    CONFIG,
    GENERATION_CONFIG,
    LlamaConfig,
    ModelDirectoryError,
)
from isthmus.cloud.generation.model.tokenizer import TOKENIZER, TOKENIZER_CONFIG
from isthmus.cloud.generation.model.weights import NUMBER_TYPES, WEIGHTS, expected_shapes

_NAMES: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA3_WORDS: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITTERS: Final[Mapping[str, Callable[[], list[Any]]]] = {
    "smollm": lambda: [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "gpt-2": lambda: [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "default": lambda: [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": lambda: _by_words("1,3"),
    "qwen2": lambda: _by_words("1"),
}
"""How each kind of byte-level tokenizer splits text before its merges, by GGUF's name."""


def convert(source: Path, out: Path, *, number_type: str = "float32") -> LlamaConfig:
    """Writes the model directory ``out``, which must not exist, and returns the model's configuration.

    Nothing is left behind if it fails. Raises ModelDirectoryError for a file that is no GGUF, an architecture or a
    tokenizer that is not served, or missing tensors; FileExistsError if ``out`` exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already; give another --out")
    if source.is_dir():
        raise ModelDirectoryError(
            f"{source} is a folder; give a GGUF file. A folder with safetensors files is served as it is"
        )
    try:
        reader = GGUFReader(source)
    except (ValueError, IndexError, KeyError) as error:
        raise ModelDirectoryError(f"{source.name} is no GGUF file, or was cut off") from error
    fields = {name: _value(field) for name, field in reader.fields.items()}
    kind = str(fields.get("general.architecture"))
    if kind not in ARCHITECTURES:
        raise ModelDirectoryError(
            f"{source.name}: the architecture {kind[:64]!r} is not served; served are {', '.join(ARCHITECTURES)}"
        )
    tokenizer, texts = _tokenizer(fields)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        raw = _config(kind, fields, reader)
        _write_json(partial / CONFIG, raw)
        _write_json(partial / GENERATION_CONFIG, {"eos_token_id": raw["eos_token_id"]})
        _write_json(partial / TOKENIZER_CONFIG, texts)
        tokenizer.save(str(partial / TOKENIZER))
        config = LlamaConfig.read(partial)
        tensors = dict(_tensors(reader, config, NUMBER_TYPES[number_type]))
        lacking = sorted(expected_shapes(config).keys() - tensors.keys())
        if lacking:
            raise ModelDirectoryError(f"{source.name} lacks {lacking[0]}")
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return config


def _value(field: Any) -> Any:
    return field.contents()


def _config(kind: str, fields: Mapping[str, Any], reader: GGUFReader) -> dict[str, Any]:
    def of(name: str, default: Any = None) -> Any:
        found = fields.get(f"{kind}.{name}", default)
        if found is None:
            raise ModelDirectoryError(f"the GGUF file lacks {kind}.{name}")
        return found

    names = {tensor.name for tensor in reader.tensors}
    heads = int(of("attention.head_count"))
    ends = {int(fields[name]) for name in _END_FIELDS if name in fields}
    raw = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": int(of("embedding_length")),
        "intermediate_size": int(of("feed_forward_length")),
        "num_hidden_layers": int(of("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(of("attention.head_count_kv", heads)),
        "head_dim": int(of("attention.key_length", int(of("embedding_length")) // heads)),
        "max_position_embeddings": int(of("context_length")),
        "rms_norm_eps": float(of("attention.layer_norm_rms_epsilon")),
        "rope_theta": float(of("rope.freq_base", 10_000.0)),
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": False,
        "hidden_act": "silu",
        "eos_token_id": sorted(ends),
    }
    scaling = fields.get(f"{kind}.rope.scaling.type", "none")
    if scaling not in ("none", "linear") or "rope_freqs.weight" in names:
        raise ModelDirectoryError(f"the GGUF file scales its rotary embedding ({scaling}), which cannot be converted")
    if scaling == "linear":
        raw["rope_scaling"] = {"rope_type": "linear", "factor": float(of("rope.scaling.factor"))}
    return raw


_END_FIELDS: Final = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")


def _tensors(reader: GGUFReader, config: LlamaConfig, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    heads = {"attn_q": config.heads, "attn_k": config.kv_heads}
    for tensor in reader.tensors:
        prefix, _, rest = tensor.name.partition("blk.")
        layer, part, kind = rest.split(".") if not prefix and rest else ("", *tensor.name.split("."))
        if part not in _NAMES:
            raise ModelDirectoryError(f"the GGUF file has a tensor {tensor.name[:64]!r}, which is not served")
        name = f"{_NAMES[part]}.{kind}" if not layer else f"model.layers.{layer}.{_NAMES[part]}.{kind}"
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        if part in heads and config.kind != "qwen2":
            values = _unpaired(values, heads[part])
        yield name, torch.from_numpy(np.require(values, requirements=["C", "W"])).to(dtype)


def _unpaired(values: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Puts rows (2d, 2d + 1) of each head to (d, d + D/2)."""
    paired = values.reshape(heads, -1, 2, *values.shape[1:])
    return paired.swapaxes(1, 2).reshape(values.shape)


def _tokenizer(fields: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """Returns the tokenizer, and what tokenizer_config.json says: names of special tokens and the chat template."""
    kind, splitter = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or splitter not in _SPLITTERS:
        raise ModelDirectoryError(
            f"the GGUF file's tokenizer ({kind}, {splitter}) cannot be converted; byte-level ones can "
            f"({', '.join(_SPLITTERS)}). Give the model directory as Hugging Face publishes it"
        )
    words: list[str] = list(fields["tokenizer.ggml.tokens"])
    kinds = list(fields.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(words)))
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={word: id for id, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_SPLITTERS[splitter]())
    tokenizer.decoder = decoders.ByteLevel()
    control = {TokenType.CONTROL, TokenType.UNKNOWN}
    tokenizer.add_special_tokens(
        [
            AddedToken(word, special=True, normalized=False)
            for word, of in zip(words, kinds, strict=True)
            if of in control
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(word, normalized=False)
            for word, of in zip(words, kinds, strict=True)
            if of == TokenType.USER_DEFINED
        ]
    )
    texts: dict[str, Any] = {}
    for name in ("bos", "eos"):
        id = fields.get(f"tokenizer.ggml.{name}_token_id")
        if id is not None:
            texts[f"{name}_token"] = words[int(id)]
    if "tokenizer.chat_template" in fields:
        texts["chat_template"] = fields["tokenizer.chat_template"]
    return tokenizer, texts


def _by_words(digits: str) -> list[Any]:
    return [
        pre_tokenizers.Split(Regex(_LLAMA3_WORDS % digits), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
