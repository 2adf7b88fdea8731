"""Sentences as vectors, by a BERT-shaped encoder with mean pooling (Reimers and Gurevych 2019, "Sentence-BERT").

The semantic cache compares questions with it. Axes: T tokens, W width, H heads, D values per head.
"""

from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from isthmus.cloud.generation.model.configuration import CONFIG, ModelDirectoryError, read_json
from isthmus.data.files import read_text

WEIGHTS: Final = "model.safetensors"
MOST_TOKENS: Final = 256
"""Longer texts are cut: what decides is nearly always at the beginning."""
_MOST: Final = {
    "vocab_size": 1 << 18,
    "hidden_size": 1 << 12,
    "intermediate_size": 1 << 14,
    "num_hidden_layers": 48,
    "num_attention_heads": 64,
    "max_position_embeddings": 1 << 14,
}


class Embedder:
    """An encoder in float32 on the CPU. Its methods may be called from any thread, one at a time."""

    def __init__(
        self, config: dict[str, int], epsilon: float, tensors: dict[str, Tensor], tokenizer: Tokenizer
    ) -> None:
        self._heads, self._layers, self._epsilon = config["num_attention_heads"], config["num_hidden_layers"], epsilon
        self._longest = min(MOST_TOKENS, config["max_position_embeddings"])
        self._tensors = tensors
        self._tokenizer = tokenizer

    @staticmethod
    def read(folder: Path) -> "Embedder":
        """Reads config.json, model.safetensors and tokenizer.json.

        Raises ModelDirectoryError for another architecture, a missing or damaged file, or shapes that do not fit.
        """
        raw = read_json(folder, CONFIG)
        kind = str(raw.get("model_type"))[:32]
        if kind != "bert":
            raise ModelDirectoryError(f"{CONFIG}: the embedder must be of the type 'bert', not {kind!r}")
        try:
            config = {name: int(raw[name]) for name in _MOST}
            epsilon = float(raw.get("layer_norm_eps", 1e-12))
        except (KeyError, TypeError, ValueError) as error:
            raise ModelDirectoryError(f"{CONFIG}: {error!r} is missing or has a wrong value") from error
        for name, most in _MOST.items():
            if not 1 <= config[name] <= most:
                raise ModelDirectoryError(f"{CONFIG}: {name} must be from 1 to {most}")
        if config["hidden_size"] % config["num_attention_heads"]:
            raise ModelDirectoryError(f"{CONFIG}: the width is no multiple of the number of heads")
        try:
            tokenizer = Tokenizer.from_str(read_text(folder / "tokenizer.json", limit_bytes=64 << 20))
        except Exception as error:  # the library raises plain Exception for a file that is no tokenizer
            raise ModelDirectoryError("tokenizer.json is missing or damaged; fetch it again") from error
        tokenizer.no_padding()
        return Embedder(config, epsilon, _tensors(folder / WEIGHTS, config), tokenizer)

    @torch.inference_mode()
    def embed(self, text: str) -> npt.NDArray[np.float32]:
        """Returns the text's vector of length 1, (W,)."""
        ids = self._tokenizer.encode(text).ids[: self._longest] or [0]
        x, at = self._tensors, "embeddings"
        states_TW = (
            x[f"{at}.word_embeddings.weight"][torch.tensor(ids)]
            + x[f"{at}.position_embeddings.weight"][: len(ids)]
            + x[f"{at}.token_type_embeddings.weight"][0]
        )
        states_TW = self._normed(states_TW, f"{at}.LayerNorm")
        for layer in range(self._layers):
            states_TW = self._layer(states_TW, f"encoder.layer.{layer}")
        mean_W = states_TW.mean(dim=0)
        vector: npt.NDArray[np.float32] = (mean_W / mean_W.norm().clamp_min(1e-12)).numpy()
        return vector

    def _layer(self, states_TW: Tensor, at: str) -> Tensor:
        projected = [self._product(states_TW, f"{at}.attention.self.{name}") for name in ("query", "key", "value")]
        heads_HTD = [each.view(len(states_TW), self._heads, -1).transpose(0, 1) for each in projected]
        queries_HTD, keys_HTD, values_HTD = heads_HTD
        out_HTD = functional.scaled_dot_product_attention(queries_HTD[None], keys_HTD[None], values_HTD[None])[0]
        attended_TW = out_HTD.transpose(0, 1).reshape(states_TW.shape)
        attended_TW = self._product(attended_TW, f"{at}.attention.output.dense")
        states_TW = self._normed(states_TW + attended_TW, f"{at}.attention.output.LayerNorm")
        wide_TM = functional.gelu(self._product(states_TW, f"{at}.intermediate.dense"))
        return self._normed(states_TW + self._product(wide_TM, f"{at}.output.dense"), f"{at}.output.LayerNorm")

    def _product(self, states: Tensor, name: str) -> Tensor:
        return functional.linear(states, self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"])

    def _normed(self, states: Tensor, name: str) -> Tensor:
        weight, bias = self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"]
        return functional.layer_norm(states, weight.shape, weight, bias, self._epsilon)


def expected_shapes(config: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Returns name and shape of every tensor of the encoder, with Hugging Face's names."""
    width, wide = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], width),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": (2, width),
    }
    norms = ["embeddings.LayerNorm"]
    for layer in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{layer}"
        norms += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
        for name, rows, columns in (
            ("attention.self.query", width, width),
            ("attention.self.key", width, width),
            ("attention.self.value", width, width),
            ("attention.output.dense", width, width),
            ("intermediate.dense", wide, width),
            ("output.dense", width, wide),
        ):
            shapes |= {f"{at}.{name}.weight": (rows, columns), f"{at}.{name}.bias": (rows,)}
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes


def _tensors(path: Path, config: dict[str, int]) -> dict[str, Tensor]:
    """Reads the tensors after their shapes were compared with the configuration."""
    try:
        with safe_open(path, framework="pt") as opened:
            file: Any = opened  # the library's files carry no annotations
            prefix = "bert." if "bert.embeddings.LayerNorm.weight" in file.keys() else ""  # noqa: SIM118
            found = {}
            for name, shape in expected_shapes(config).items():
                if tuple(file.get_slice(prefix + name).get_shape()) != shape:
                    raise ModelDirectoryError(f"{WEIGHTS}: {name} has another shape than {CONFIG} asks for")
                found[name] = file.get_tensor(prefix + name).float()
            return found
    except (SafetensorError, OSError) as error:
        raise ModelDirectoryError(f"{WEIGHTS} is missing, damaged or incomplete; fetch it again") from error
