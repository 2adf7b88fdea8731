"""A GGUF file becomes a model directory with the same weights, tokenizer and template."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from isthmus.cloud.generation.model.configuration import LlamaConfig, ModelDirectoryError
from isthmus.cloud.generation.model.tokenizer import TextTokenizer
from isthmus.cloud.generation.prepare.convert import convert
from tests.rigs.generation.llama import END, START, TEMPLATE, save_tiny_llama

HEADS = {"attn_q": 6, "attn_k": 2}
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path: Path, folder: Path, **changes: Any) -> None:
    """Writes the model directory ``folder`` as its authors' converter would."""
    config = LlamaConfig.read(folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    words = {id: word for word, id in vocabulary["model"]["vocab"].items()}
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_tokenizer_model(changes.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre("gpt-2")
    unused = range(len(words), config.vocabulary)
    writer.add_token_list([words[id] for id in range(len(words))] + [f"<unused{id}>" for id in unused])
    kinds = [gguf.TokenType.NORMAL] * config.vocabulary
    kinds[0] = kinds[1] = gguf.TokenType.CONTROL
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in vocabulary["model"]["merges"]])
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    for name, values in load_file(folder / "model.safetensors").items():
        if name == "model.embed_tokens.weight":
            writer.add_tensor("token_embd.weight", values)
            continue
        if name == "model.norm.weight":
            writer.add_tensor("output_norm.weight", values)
            continue
        _, _, layer, *part, kind = name.split(".")
        short = NAMES[".".join(part)]
        if short in HEADS:  # pairs (d, d + D/2) to (2d, 2d + 1)
            values = values.reshape(HEADS[short], 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if short != changes.get("without"):
            writer.add_tensor(f"blk.{layer}.{short}.{kind}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_converted_model_is_the_model(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "made")
    write_gguf(tmp_path / "tiny.gguf", tmp_path / "made")
    config = convert(tmp_path / "tiny.gguf", tmp_path / "out")
    before = LlamaConfig.read(tmp_path / "made")
    assert (config.rope, config.layers, config.heads, config.end_ids) == (before.rope, 3, 6, (1,))
    assert config.norm_epsilon == pytest.approx(before.norm_epsilon)
    made, found = (load_file(tmp_path / name / "model.safetensors") for name in ("made", "out"))
    assert made.keys() == found.keys()
    for name, values in made.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    said = "the user comes back, naïve 12"
    one, two = (TextTokenizer.read(tmp_path / name, config) for name in ("made", "out"))
    assert one.encode(said) == two.encode(said)
    messages = [{"role": "user", "content": f"{START} is text, {END} too"}]
    assert one.chat(messages) == two.chat(messages)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "mamba"}, "the architecture 'mamba' is not served"),
        ({"tokenizer": "llama"}, "cannot be converted; byte-level ones can"),
        ({"without": "ffn_up"}, "lacks model.layers.0.mlp.up_proj.weight"),
    ],
    ids=["architecture", "tokenizer", "tensor"],
)
def test_what_cannot_be_converted_is_refused_and_leaves_nothing(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    save_tiny_llama(tmp_path / "made")
    write_gguf(tmp_path / "tiny.gguf", tmp_path / "made", **changes)
    with pytest.raises(ModelDirectoryError, match=said):
        convert(tmp_path / "tiny.gguf", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"made", "tiny.gguf"}


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "some.gguf").write_bytes(b"GGML" + bytes(64))
    with pytest.raises(ModelDirectoryError, match="is no GGUF file"):
        convert(tmp_path / "some.gguf", tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        convert(tmp_path / "some.gguf", tmp_path / "out")
