"""ElasticViT: timm's logits at gamma 0, fewer and more tokens elsewhere, and its refusals."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from isthmus.cloud.elastic.model import vit
from isthmus.cloud.elastic.model.int8 import Int8Linear
from isthmus.cloud.elastic.model.timm_import import create_model
from isthmus.cloud.elastic.model.vit import ElasticViT
from tests.rigs.elastic.vit import NAME, TINY, images, tiny


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (NAME, {}),
        (NAME, {"qk_norm": True, "init_values": 0.3}),
        (NAME, {"reg_tokens": 2, "no_embed_class": True, "pre_norm": True, "qkv_bias": False}),
        ("deit_tiny_distilled_patch16_224", {}),
    ],
)
def test_gamma_0_is_timm(name: str, changes: dict[str, object]) -> None:
    model = tiny(name=name, **changes)
    with torch.inference_mode():
        torch.testing.assert_close(model(images()), model.vit(images()), rtol=1e-4, atol=1e-4)
        assert model(images(), -4).shape == (3, 5)


def test_one_sample_does_not_hang_on_the_others() -> None:
    model = tiny()
    with torch.inference_mode():
        together = model(images(), -5)
        alone = torch.cat([model(image[None], -5) for image in images()])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("to", ["float32", "int8"])
@pytest.mark.parametrize("cached_tokens", [1, 50, 90])
def test_the_mlp_in_parts_is_the_mlp(cached_tokens: int, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    if to == "int8":
        model.remake_linears(Int8Linear)
    with torch.inference_mode():
        whole = model.features(images(), -5)
        seen: list[int] = []
        for block in model.blocks:
            block.mlp.register_forward_pre_hook(lambda _mlp, given: seen.append(given[0].shape[-2]))
        monkeypatch.setattr(vit, "CACHED_BYTES", cached_tokens * 4 * 4 * model.width)
        in_parts = model.features(images(), -5)
    assert len(seen) > model.depth
    assert max(seen) <= cached_tokens
    torch.testing.assert_close(in_parts, whole, rtol=1e-4, atol=1e-4)


def test_merged_counts_are_clamped_to_half() -> None:
    model = tiny()
    assert model.tokens == 37
    assert model.merged_counts(-5) == (5, 5, 5, 5)
    assert model.merged_counts(-37) == (18, 9, 4, 2)  # 37 -> 19 -> 10 -> 6 -> 4
    assert model.merged_counts(0) == model.merged_counts(3) == (0, 0, 0, 0)
    with torch.inference_mode():
        assert model(images(), -37).isfinite().all()


def test_merging_identical_tokens_changes_nothing() -> None:
    """Equal patches stay equal, so merging them loses nothing if attention is proportional."""
    model = tiny()
    with torch.no_grad():
        model.vit.pos_embed.zero_()
    flat = torch.full((2, 3, 48, 48), 0.7)
    with torch.inference_mode():
        torch.testing.assert_close(model(flat, -9), model(flat, 0), rtol=1e-4, atol=1e-4)


def test_a_schedule_takes_the_place_of_its_gamma() -> None:
    plain = tiny()
    scheduled = ElasticViT(plain.vit, {-5: (-10, -5, -5, 0), -7: (-5,) * 4})
    assert scheduled.merged_counts(-5) == (10, 5, 5, 0)
    with torch.inference_mode():
        assert torch.equal(scheduled(images(), -7), plain(images(), -5))
        assert not torch.allclose(scheduled(images(), -5), plain(images(), -5))
    for bad in ({2: (0,) * 4}, {-5: (-5,) * 3}, {-5: (-5, -5, -5, 1)}, {-5: (-38, 0, 0, 0)}):
        with pytest.raises(ValueError, match="schedule of gamma"):
            ElasticViT(plain.vit, bad)


def plain_prompted(model: ElasticViT, batch: Tensor, prompts_LGD: Tensor, *, replace: bool) -> Tensor:
    """The definition: timm's own blocks on a sequence that prompts are put into."""
    vit = model.vit
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(batch)))
    plain = tokens.shape[1]
    for block, prompts_GD in zip(vit.blocks, prompts_LGD, strict=True):
        kept = tokens[:, :plain] if replace else tokens
        tokens = block(torch.cat((kept, prompts_GD.expand(len(batch), -1, -1)), dim=1))
    logits: Tensor = vit.forward_head(vit.norm(tokens))
    return logits


@pytest.mark.parametrize("gamma", [1, 4])
def test_prompts_are_as_defined(gamma: int) -> None:
    model = tiny(qk_norm=True)
    prompts_LGD = torch.randn(4, gamma, 192)
    with torch.inference_mode():
        appended = model(images(), gamma, prompts_BLGD=prompts_LGD[None])
        replaced = model(images(), gamma, prompts_BLAHGd=model.prompt_keys_values(prompts_LGD)[None])
        for found, replace in ((appended, False), (replaced, True)):
            expected = plain_prompted(model, images(), prompts_LGD, replace=replace)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(appended, replaced, atol=1e-3)


def test_each_sample_gets_its_own_prompts() -> None:
    model = tiny()
    prompts_BLGD = torch.randn(3, 4, 2, 192)
    with torch.inference_mode():
        keys_values = torch.stack([model.prompt_keys_values(one) for one in prompts_BLGD])
        appended, replaced = model(images(), 2, prompts_BLGD), model(images(), 2, None, keys_values)
        for b, image in enumerate(images()):
            alone = model(image[None], 2, prompts_BLGD[b : b + 1])
            torch.testing.assert_close(appended[b], alone[0], rtol=1e-4, atol=1e-4)
            alone = model(image[None], 2, None, keys_values[b : b + 1])
            torch.testing.assert_close(replaced[b], alone[0], rtol=1e-4, atol=1e-4)


def test_gradients_reach_every_layers_prompts() -> None:
    model = tiny().requires_grad_(False)
    for mode in ("append", "replace"):
        prompts_LGD = torch.randn(4, 2, 192, requires_grad=True)
        given = (prompts_LGD[None], None) if mode == "append" else (None, model.prompt_keys_values(prompts_LGD)[None])
        functional.cross_entropy(model(images(), 2, *given), torch.tensor([0, 1, 2])).backward()
        assert prompts_LGD.grad is not None
        assert (prompts_LGD.grad.abs().amax(dim=(1, 2)) > 0).all(), mode


def test_operations_fall_with_merging_and_rise_with_prompts() -> None:
    model = tiny()
    merging = [model.operations(gamma) for gamma in (-16, -8, -4, 0)]
    assert all(fewer < more for fewer, more in itertools.pairwise(merging))
    assert model.operations(0) < model.operations(4, "replace") < model.operations(4, "append")


def test_what_does_not_fit_is_refused() -> None:
    model = tiny()
    prompts_BLGD = torch.zeros(1, 4, 2, 192)
    for shape in ((3, 48, 48), (1, 1, 48, 48), (1, 3, 32, 48), (0, 3, 48, 48)):
        with pytest.raises(ValueError, match="images of shape"):
            model(torch.zeros(shape))
    for gamma in (-38, 257):
        with pytest.raises(ValueError, match="gamma"):
            model(images(), gamma)
    for gamma, prompts in (
        (3, prompts_BLGD),
        (2, prompts_BLGD[:, :3]),
        (2, prompts_BLGD[..., :100]),
        (-2, prompts_BLGD),
    ):
        with pytest.raises(ValueError, match="prompts of shape"):
            model(images(), gamma, prompts)
    with pytest.raises(ValueError, match="not both"):
        model(images(), 2, prompts_BLGD, torch.zeros(1, 4, 2, 3, 2, 64))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit_tiny_patch16_224", {"global_pool": "max"}),
        ("vit_tiny_patch16_224", {"in_chans": 1}),
        ("vit_tiny_patch16_224", {"img_size": (48, 32)}),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
        ("resnet18", {"num_classes": 3}),
        (NAME, {"attn_drop_rate": 0.1}),
    ],
)
def test_another_kind_of_model_is_refused(name: str, changes: dict[str, object]) -> None:
    kwargs = changes if name == "resnet18" else {**TINY, **changes}
    with pytest.raises(ValueError, match="plain ViT"):
        ElasticViT(create_model(name, pretrained=False, **kwargs))
