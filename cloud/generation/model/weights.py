"""Loads the weights of a model directory: one safetensors file, or the shards that its index names.

Every tensor's shape is compared with config.json before it is read. There is no pickle, and no code of the model's.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from isthmus.cloud.generation.model.configuration import LlamaConfig, ModelDirectoryError, read_json
from isthmus.cloud.generation.model.llama import Llama

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
_MAX_SHARDS: Final = 1_024
NUMBER_TYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_llama(folder: Path, config: LlamaConfig, *, number_type: str = "float32", device: str = "cpu") -> Llama:
    """Returns the model with its weights, in ``number_type``, for inference alone.

    Raises ModelDirectoryError for a missing shard or tensor, or one whose shape is not that of the configuration.
    """
    dtype = NUMBER_TYPES[number_type]
    with torch.device("meta"):
        model = Llama(config)
    tensors = _read(folder, expected_shapes(config), dtype, device)
    model.to_empty(device=device)
    model.to(dtype).take(tensors)
    return model.requires_grad_(False).eval()


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Returns name and shape of every tensor of the model, with Hugging Face's names."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocabulary, config.width),
        "model.norm.weight": (config.width,),
    }
    if not config.tied:
        shapes["lm_head.weight"] = (config.vocabulary, config.width)
    for layer in range(config.layers):
        at = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}.{name}.weight"] = (config.width,)
        for name, rows, columns, bias in (
            ("self_attn.q_proj", queries, config.width, config.qkv_bias),
            ("self_attn.k_proj", keys, config.width, config.qkv_bias),
            ("self_attn.v_proj", keys, config.width, config.qkv_bias),
            ("self_attn.o_proj", config.width, queries, config.output_bias),
            ("mlp.gate_proj", config.mlp_width, config.width, config.mlp_bias),
            ("mlp.up_proj", config.mlp_width, config.width, config.mlp_bias),
            ("mlp.down_proj", config.width, config.mlp_width, config.mlp_bias),
        ):
            shapes[f"{at}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{at}.{name}.bias"] = (rows,)
    return shapes


def _read(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: str
) -> Iterator[tuple[str, Tensor]]:
    """Checks names and shapes of all tensors first, then yields them one by one, so that memory holds one copy."""
    with ExitStack() as stack:
        owner: dict[str, Any] = {}  # the library's files carry no annotations
        for path in weight_files(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="pt", device=device))
            except (SafetensorError, OSError) as error:
                raise ModelDirectoryError(f"{path.name} is damaged or no safetensors file; fetch it again") from error
            owner |= dict.fromkeys(file.keys(), file)
        for name, shape in shapes.items():
            if name not in owner:
                raise ModelDirectoryError(f"the weights lack {name}; the directory is incomplete: fetch it again")
            found = tuple(owner[name].get_slice(name).get_shape())
            if found != shape:
                raise ModelDirectoryError(
                    f"{name} has shape {list(found)}, and config.json asks for {list(shape)}: they are of two models"
                )
        for name in shapes:
            yield name, owner[name].get_tensor(name).to(dtype)


def weight_files(folder: Path) -> list[Path]:
    """Returns the files with the weights. Raises ModelDirectoryError if there are none, or a shard is missing."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ModelDirectoryError(
            f"{folder.name} has neither {WEIGHTS} nor {INDEX}; weights are read from safetensors files alone"
        )
    names = read_json(folder, INDEX).get("weight_map")
    if not isinstance(names, dict) or not names or len(set(map(str, names.values()))) > _MAX_SHARDS:
        raise ModelDirectoryError(f"{INDEX} names no shards, or over {_MAX_SHARDS}")
    shards = sorted(set(map(str, names.values())))
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelDirectoryError(f"{INDEX} names {shard[:64]!r}, which is no safetensors file of the directory")
        if not (folder / shard).is_file():
            raise ModelDirectoryError(f"the shard {shard} is missing; fetch it again")
    return [folder / shard for shard in shards]
