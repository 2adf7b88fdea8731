"""The sentence encoder against torch's own layers, and directories that are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from isthmus.cloud.generation.model.configuration import ModelDirectoryError
from isthmus.cloud.generation.model.embedder import Embedder, expected_shapes
from tests.rigs.generation.llama import tiny_tokenizer

CONFIG: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 320,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "layer_norm_eps": 1e-12,
}


def save(folder: Path, prefix: str = "", **changes: Any) -> dict[str, torch.Tensor]:
    folder.mkdir(exist_ok=True)
    config = {**CONFIG, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    random = torch.Generator().manual_seed(0)
    tensors = {name: 0.3 * torch.randn(shape, generator=random) for name, shape in expected_shapes(CONFIG).items()}
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return tensors


def by_torch(x: dict[str, torch.Tensor], ids: list[int]) -> np.ndarray:
    at = "embeddings"
    states = x[f"{at}.word_embeddings.weight"][ids] + x[f"{at}.position_embeddings.weight"][: len(ids)]
    states = states + x[f"{at}.token_type_embeddings.weight"][0]
    width = CONFIG["hidden_size"]
    states = torch.nn.functional.layer_norm(
        states, (width,), x[f"{at}.LayerNorm.weight"], x[f"{at}.LayerNorm.bias"], 1e-12
    )
    for layer in range(CONFIG["num_hidden_layers"]):
        at = f"encoder.layer.{layer}"
        block = torch.nn.TransformerEncoderLayer(
            width, CONFIG["num_attention_heads"], CONFIG["intermediate_size"], 0.0, "gelu", 1e-12, batch_first=True
        ).eval()
        qkv = [f"{at}.attention.self.{name}" for name in ("query", "key", "value")]
        block.load_state_dict(
            {
                "self_attn.in_proj_weight": torch.cat([x[f"{name}.weight"] for name in qkv]),
                "self_attn.in_proj_bias": torch.cat([x[f"{name}.bias"] for name in qkv]),
                **{
                    f"{theirs}.{kind}": x[f"{at}.{ours}.{kind}"]
                    for theirs, ours in (
                        ("self_attn.out_proj", "attention.output.dense"),
                        ("linear1", "intermediate.dense"),
                        ("linear2", "output.dense"),
                        ("norm1", "attention.output.LayerNorm"),
                        ("norm2", "output.LayerNorm"),
                    )
                    for kind in ("weight", "bias")
                },
            }
        )
        with torch.no_grad():
            states = block(states[None])[0]
    mean = states.mean(dim=0)
    return (mean / mean.norm()).numpy()


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_vectors_are_those_of_torchs_own_layers(tmp_path: Path, prefix: str) -> None:
    tensors = save(tmp_path / "encoder", prefix)
    embedder = Embedder.read(tmp_path / "encoder")
    text = "the words of a small model come back"
    vector = embedder.embed(text)
    np.testing.assert_allclose(vector, by_torch(tensors, tiny_tokenizer().encode(text).ids), atol=1e-5)
    assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-5)
    assert embedder.embed("word " * 500).shape == (24,) and embedder.embed("").shape == (24,)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt2"}, "must be of the type 'bert', not 'gpt2'"),
        ({"num_hidden_layers": 1_000}, "num_hidden_layers must be from 1 to 48"),
        ({"num_attention_heads": 5}, "no multiple of the number of heads"),
        ({"hidden_size": "wide"}, "missing or has a wrong value"),
        ({"vocab_size": 300}, "another shape"),
    ],
)
def test_directories_that_are_no_encoder_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    save(tmp_path / "encoder", **changes)
    with pytest.raises(ModelDirectoryError, match=said):
        Embedder.read(tmp_path / "encoder")


def test_missing_weights_are_named(tmp_path: Path) -> None:
    save(tmp_path / "encoder")
    (tmp_path / "encoder" / "model.safetensors").unlink()
    with pytest.raises(ModelDirectoryError, match="missing, damaged or incomplete"):
        Embedder.read(tmp_path / "encoder")
