"""What the demo looks at before it trains anything."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from isthmus.cloud.generation.model.configuration import ModelDirectoryError
from isthmus.demo.run import Demo, DemoSettings
from tests.rigs.generation.llama import save_tiny_llama


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("config.json", "config.json"),
        ("tokenizer.json", "has no tokenizer.json"),
        ("model-00002-of-00002.safetensors", "the shard model-00002-of-00002.safetensors is missing"),
        ("the template", "has no chat template, so it cannot reply"),
    ],
)
def test_a_language_model_that_cannot_reply_is_refused_before_anything_is_made(
    harm: str, said: str, tmp_path: Path
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    save_tiny_llama(model, shards=2)
    if harm == "the template":
        (model / "tokenizer_config.json").write_text(json.dumps({}))
    else:
        (model / harm).unlink()
    settings = DemoSettings(out, None, 0, "tiny", Path("python"), generate_model=model)
    with pytest.raises((ValueError, ModelDirectoryError), match=said):
        Demo(settings, Console(quiet=True)).run()
    assert list(out.iterdir()) == []
