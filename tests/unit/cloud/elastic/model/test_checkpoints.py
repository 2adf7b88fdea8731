"""Checkpoints with and without their configuration: served with timm's own logits, or refused by name."""

import importlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from isthmus.cloud.elastic.model.timm_import import VisionTransformer, create_model
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.model.weights import ModelError, class_names, load_vit, pixel_spec
from isthmus.data.images import decode_image

timm = importlib.import_module("timm")  # only after timm_import

PLAIN_MODULES = ("vision_transformer", "deit")
OTHERS = (
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "crossvit_tiny_240",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3",
    "vit_relpos_small_patch16_224",
    "samvit_base_patch16",
    "naflexvit_base_patch16_gap",
    "vit_base_patch16_rope_224",
    "volo_d1_224",
    "xcit_nano_12_p16_224",
    "tnt_s_legacy_patch16_224",
)
"""One of each of timm's other ViT-shaped families."""


def signature(vit: Any) -> tuple[Any, ...]:
    """Return everything that changes the computation. Models with the same signature need only one test."""
    block = vit.blocks[0]
    attention, mlp, norm = (getattr(block, name, None) for name in ("attn", "mlp", "norm1"))
    parts = (vit, block, attention, mlp, getattr(mlp, "act", None), norm, vit.norm, vit.norm_pre, vit.fc_norm)
    kinds = tuple(type(part).__name__ for part in (*parts, getattr(block, "ls1", None), vit.patch_embed))
    options = (vit.global_pool, vit.has_class_token, vit.num_reg_tokens, vit.no_embed_class, vit.pool_include_prefix)
    return (*kinds, *options, getattr(norm, "eps", None), vit.pos_embed is None, vit.dynamic_img_size)


def families() -> dict[str, tuple[int, int]]:
    """Width and patch size of one model for each signature, the narrowest, over every name of timm's plain ViTs."""
    found: dict[tuple[Any, ...], tuple[int, str, int]] = {}
    for name in timm.list_models():
        if timm.models._registry._model_to_module[name] in PLAIN_MODULES:
            with torch.device("meta"):
                vit = create_model(name, depth=1)
            key = signature(vit)
            one = (int(vit.embed_dim), name, int(vit.patch_embed.patch_size[0]))
            found[key] = min(found.get(key, one), one)
    return {name: (width, patch_px) for width, name, patch_px in found.values()}


def scaled(vit: Any) -> Any:
    """Weights large enough for attention to differ from token to token, and for every option to matter."""
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5 / parameter.shape[-1] ** 0.5 if "pos" not in name else 0.3)
    return vit.eval()


def served_or_refused(folder: Path, vit: Any) -> str:
    """ "served" if the logits at gamma 0 equal timm's, else the reason of the refusal. Fails for other logits."""
    try:
        model = ElasticViT(load_vit(folder / "model.safetensors"))
    except ValueError as error:
        return str(error)
    side = model.image_px
    images_BCHW = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        torch.testing.assert_close(model(images_BCHW), vit(images_BCHW), atol=1e-4, rtol=1e-4)
        merged = model(images_BCHW, -1)
    assert torch.isfinite(merged).all()
    return "served"


def test_every_family_of_timms_plain_vits_is_served_as_timm_does_or_refused_by_name(tmp_path: Path) -> None:
    reasons: dict[str, str] = {}
    for name, (width, patch_px) in families().items():
        torch.manual_seed(0)
        narrow = {"embed_dim": 96, "num_heads": 2} if width > 400 else {}  # the same layers, faster
        vit = scaled(create_model(name, depth=2, img_size=4 * patch_px, num_classes=7, **narrow))
        # Older versions of timm write only the arguments that they are given here.
        timm.models.save_for_hf(vit, str(tmp_path / name), model_args=narrow or None, safe_serialization=True)
        reasons[name] = served_or_refused(tmp_path / name, vit)
    refused = {name: reason for name, reason in reasons.items() if reason != "served"}
    for name, reason in refused.items():
        assert "this is one" in reason and ("Block" in reason or "MLP" in reason or "Attention" in reason), (
            f"{name}: {reason}"
        )
    assert len(reasons) - len(refused) >= 30 and len(refused) <= 7, refused


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_are_refused_by_name(tmp_path: Path, name: str) -> None:
    if name not in timm.list_models():
        pytest.skip(f"this timm has no {name}")
    with torch.device("meta"):
        other = create_model(name)
    assert not isinstance(other, VisionTransformer)
    save_file({"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name}), encoding="utf-8")
    with pytest.raises(ModelError, match=f"{name} is a {type(other).__name__}"):
        load_vit(tmp_path / "model.safetensors")


def saved(folder: Path, vit: Any, config: dict[str, Any] | None, prefix: str = "") -> Path:
    save_file({prefix + name: value for name, value in vit.state_dict().items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder / "model.safetensors"


def small(**changes: Any) -> Any:
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 5, "embed_dim": 96, "num_heads": 3}
    return scaled(VisionTransformer(**{**options, **changes}))


def test_a_hybrid_is_refused_by_the_name_of_its_embedding(tmp_path: Path) -> None:
    path = saved(tmp_path, create_model("vit_tiny_r_s16_p8_224", depth=1), {"architecture": "vit_tiny_r_s16_p8_224"})
    with pytest.raises(ModelError, match="HybridEmbed"):
        load_vit(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads": 6},
        {"act_layer": "quick_gelu"},
        {"act_layer": "gelu_tanh"},
        {"global_pool": "avg"},
        {"global_pool": "avg", "fc_norm": False},
        {"global_pool": "avg", "class_token": False, "reg_tokens": 2},
        {"global_pool": "map", "class_token": False},
        {"qk_norm": True, "init_values": 0.1},
        {"norm_layer": "rmsnorm"},
        {"scale_attn_norm": True, "scale_mlp_norm": True},
        {"no_embed_class": True, "reg_tokens": 4},
        {"pos_embed": "none", "img_size": 32},
        {"mlp_ratio": 3.0, "qkv_bias": False},
        {"pre_norm": True},
    ],
)
def test_each_option_of_a_configuration_counts(tmp_path: Path, changes: dict[str, Any]) -> None:
    vit = small(**changes)
    args = {"num_heads": 3, **changes}
    saved(tmp_path, vit, {"architecture": "vit_small_patch16_224", "num_classes": 5, "model_args": args})
    assert served_or_refused(tmp_path, vit) == "served"


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"architecture": "resnet18"}, "resnet18 is a ResNet"),
        ({"architecture": "../evil"}, "timm has no architecture"),
        ({"architecture": "vit_small_patch16_224"}, "number of heads"),
        (
            {"architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": 3, "attn_layer": "diff"}},
            r"q_norm|lambda|needed",
        ),
        ({"model_args": {"num_heads": 3, "rope": True}}, "'rope' is not supported"),
        ({"model_args": {"num_heads": 3, "block_fn": "__import__"}}, "'block_fn' is not supported"),
        ({"model_args": {"num_heads": 10**9}}, "num_heads '1000000000' is not supported"),
        ({"model_args": {"num_heads": 3, "img_size": [32, 48]}}, "not square"),
        ({"model_args": {"num_heads": 3, "depth": 3}}, r"depth|blocks\.2"),
        ({"model_args": {"num_heads": 3}, "num_classes": 7}, "head of 5 classes; its config.json says 7"),
        ({"architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": 3}, "global_pool": "avg"}, "fc_norm"),
        ({"model_args": {"num_heads": 3}, "pretrained_cfg": {"crop_mode": "squash"}}, "crop_mode 'squash'"),
        ({"model_args": {"num_heads": 3}, "pretrained_cfg": {"crop_pct": 1.5}}, "crop_pct 1.5"),
        ({"model_args": {"num_heads": 3}, "pretrained_cfg": {"interpolation": "random"}}, "interpolation 'random'"),
        ({"model_args": {"num_heads": 3}, "pretrained_cfg": {"mean": [0.5]}}, "mean must be three numbers"),
        ({"label_names": 3}, "label_names"),
        ([], "not a JSON object"),
    ],
)
def test_what_a_configuration_asks_for_in_vain_is_named(tmp_path: Path, config: Any, wanted: str) -> None:
    path = saved(tmp_path, small(), config)
    with pytest.raises(ValueError, match=wanted):
        ElasticViT(load_vit(path))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, "how many heads"),
        ({"embed_dim": 384, "num_heads": 12}, "how many heads"),
        ({"pre_norm": True}, "which form of GELU"),
        ({"global_pool": "avg"}, "how it pools"),
        ({"in_chans": 1}, "pictures of 1 channel"),
    ],
)
def test_what_a_file_alone_cannot_tell_is_asked_for(tmp_path: Path, changes: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ModelError, match=wanted):
        load_vit(saved(tmp_path, small(**changes), None))


def test_an_architecture_named_before_the_file_tells_the_rest(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit = scaled(create_model("vit_small_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=5))
    path = saved(tmp_path, vit, None)
    images_BCHW = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(ElasticViT(load_vit(f"vit_small_patch16_224={path}"))(images_BCHW), vit(images_BCHW))
    saved(tmp_path, vit, {"architecture": "vit_base_patch16_224"})
    with pytest.raises(ModelError, match=r"config\.json says 'vit_base_patch16_224'"):
        load_vit(f"vit_small_patch16_224={path}")


@pytest.mark.parametrize("prefix", ["model.", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.model."])
def test_prefixes_of_training_wrappers_are_taken_off_and_said(
    tmp_path: Path, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    vit = small()
    path = saved(tmp_path, vit, {"model_args": {"num_heads": 3}}, prefix)
    images_BCHW = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(load_vit(path)(images_BCHW), vit(images_BCHW))
    assert repr(prefix) in caplog.text


def test_names_of_classes_come_from_the_configuration(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d", "e"]
    config: dict[str, Any] = {"model_args": {"num_heads": 3}, "label_names": names}
    path = saved(tmp_path, small(), config)
    assert class_names(load_vit(path), path) == tuple(names)
    config["label_descriptions"] = {"a": "crane", "b": "crane", "c": "cat"}
    saved(tmp_path, small(), config)
    assert class_names(load_vit(path), path) == ("crane (a)", "crane (b)", "cat", "d", "e")
    saved(tmp_path, small(), {**config, "label_names": names[:3]})
    assert class_names(load_vit(path), path) == ()
    named = load_vit("vit_tiny_patch16_224.augreg_in21k_ft_in1k", random=True)
    found = class_names(named, "vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    assert len(set(found)) == 1000 and found[0].startswith("tench")


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize(
    ("height", "width", "share"), [(300, 200, 0.875), (97, 260, 0.9), (64, 64, 1.0), (20, 31, 0.95)]
)
def test_pictures_are_seen_as_timm_shows_them(
    tmp_path: Path, interpolation: str, height: int, width: int, share: float
) -> None:
    rng = np.random.default_rng(0)
    rough = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    picture = Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "PNG")
    pictures = {"mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": share, "interpolation": interpolation}
    path = saved(tmp_path, small(), {"model_args": {"num_heads": 3}, "pretrained_cfg": pictures})
    spec = pixel_spec(load_vit(path), path)
    seen = decode_image(file.getvalue(), spec.size_px, spec.crop)
    transform = timm.data.create_transform((3, 32, 32), **pictures)
    shown_CHW = transform(picture).numpy() * 0.25 + 0.5
    inner = np.s_[2:-2, 2:-2]
    apart = np.abs(seen / 255 - shown_CHW.transpose(1, 2, 0))[inner]
    assert apart.mean() < 0.01 and apart.max() < 0.06
