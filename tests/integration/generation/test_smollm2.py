"""SmolLM2-135M: our forward in float32 against transformers. Needs ISTHMUS_SMOLLM2, a converted model directory."""

import os
from pathlib import Path

import pytest
import torch

from isthmus.cloud.elastic.model.packed import PackedLinear
from isthmus.cloud.generation.model.configuration import LlamaConfig
from isthmus.cloud.generation.model.executor import make_cache
from isthmus.cloud.generation.model.kv import LAYOUTS, Span
from isthmus.cloud.generation.model.tokenizer import TextTokenizer
from isthmus.cloud.generation.model.weights import load_llama
from isthmus.cloud.generation.scheduling.policy import Limits

GENERATED = 12


@pytest.fixture(scope="module")
def smollm2() -> Path:
    value = os.environ.get("ISTHMUS_SMOLLM2")
    if not value:
        pytest.skip("set ISTHMUS_SMOLLM2 to SmolLM2-135M as 'isthmus generate convert' writes it")
    pytest.importorskip("transformers", reason="install transformers to compare with it")
    return Path(value)


def test_with_ordinary_products_logits_are_those_of_transformers(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    import isthmus.distill.torchvision_import  # noqa: F401  (transformers imports torchvision)

    # Packed products, which are faster with few rows, add up in another order; see the next test.
    monkeypatch.setattr(PackedLinear, "_packs", lambda self, inputs: False)
    config = LlamaConfig.read(smollm2)
    model, tokenizer = load_llama(smollm2, config), TextTokenizer.read(smollm2, config)
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    prompt = tokenizer.chat([{"role": "user", "content": "What is the capital of France? 12 34, naïve €5."}])
    cache = make_cache("slots", model, Limits())
    cache.begin([Span(0, 0, 0, len(prompt))])
    positions = torch.arange(len(prompt))
    ours = model(torch.tensor(prompt), positions, positions, cache)
    with torch.no_grad():
        reference = theirs(torch.tensor([prompt])).logits[0]
    assert float((ours - reference).abs().max()) < 1e-4


def test_logits_and_greedy_tokens_are_those_of_transformers(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import isthmus.distill.torchvision_import  # noqa: F401  (transformers imports torchvision)

    config = LlamaConfig.read(smollm2)
    model, tokenizer = load_llama(smollm2, config), TextTokenizer.read(smollm2, config)
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    their_tokenizer = AutoTokenizer.from_pretrained(smollm2)
    messages = [{"role": "user", "content": "What is the capital of France? 12 34, naïve €5."}]
    prompt = tokenizer.chat(messages)
    assert prompt == their_tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    for text in ("Hello world  x\n\n y 1234 it's", "日本語 😀 é", "def f(x):\n\treturn x**2"):
        assert tokenizer.encode(text) == their_tokenizer(text, add_special_tokens=False)["input_ids"]

    answers, logits = {}, {}
    for layout in LAYOUTS:
        cache = make_cache(layout, model, Limits())
        ids, first, rows = list(prompt), 0, []
        for _ in range(GENERATED):
            new = ids[first:]
            cache.begin([Span(0, 0, first, len(new), tuple(range(40)))])
            last = torch.tensor([len(new) - 1])
            rows.append(model(torch.tensor(new), torch.arange(first, len(ids)), last, cache)[0])
            cache.end()
            first = len(ids)
            ids.append(int(rows[-1].argmax()))
        answers[layout], logits[layout] = ids[len(prompt) :], torch.stack(rows)
    whole = torch.tensor([[*prompt, *answers["slots"][:-1]]])
    with torch.no_grad():
        reference = theirs(whole).logits[0, len(prompt) - 1 :]
        exact = theirs.double()(whole).logits[0, len(prompt) - 1 :]
    assert answers["slots"] == answers["paged"] == answers["padded"] == reference.argmax(-1).tolist()
    # Both round differently; ours are not further from the exact logits.
    their_error = float((reference - exact).abs().max())
    for layout in LAYOUTS:
        assert float((logits[layout] - exact).abs().max()) < max(1e-4, their_error), layout
