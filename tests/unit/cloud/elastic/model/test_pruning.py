"""Pruning by the reducer's interface: which tokens are kept, which are protected, and the operations saved."""

import itertools

import pytest
import torch

from isthmus.cloud.elastic.model.pruning import MAX_PERCENT, Predictor, Pruning
from isthmus.cloud.elastic.model.vit import ElasticViT
from tests.rigs.elastic.vit import images, tiny


def pruned(**changes: object) -> ElasticViT:
    vit = tiny(**changes).vit  # type: ignore[arg-type]
    torch.manual_seed(1)
    return ElasticViT(vit, pruning=Pruning(vit))


def test_gamma_0_is_the_model_without_predictors() -> None:
    model = pruned()
    with torch.inference_mode():
        torch.testing.assert_close(model(images()), model.vit(images()), rtol=1e-4, atol=1e-4)


def test_each_stage_takes_its_share_of_what_is_left() -> None:
    model = pruned()
    assert isinstance(model.reducer, Pruning)
    assert model.reducer.stages == (1, 2)  # of 4 layers; three quarters would be the last, whose tokens are not used
    assert model.reducer.staying(-50) == (18, 9)  # of 36
    assert model.merged_counts(-50) == (0, 18, 9, 0)
    assert model.merged_counts(0) == model.merged_counts(2) == (0, 0, 0, 0)
    assert all(left >= 1 for left in model.reducer.staying(-MAX_PERCENT))
    with torch.inference_mode():
        assert model(images(), -MAX_PERCENT).isfinite().all()


def test_the_tokens_likeliest_to_be_kept_stay_in_their_order_and_protected_ones_always() -> None:
    model = pruned(reg_tokens=2, no_embed_class=True)
    reducer = model.reducer
    assert isinstance(reducer, Pruning)
    tokens_BND = torch.randn(2, 3 + 6, 192)
    reduced_BND, sizes = reducer.reduce(1, tokens_BND, torch.zeros(()), None, 4)
    assert sizes is None
    assert torch.equal(reduced_BND[:, :3], tokens_BND[:, :3])
    kept_BN = reducer.predictors[0](tokens_BND[:, 3:])[..., 1]
    for b in range(2):
        wanted = sorted(kept_BN[b].argsort(descending=True)[:2].tolist())
        assert torch.equal(reduced_BND[b, 3:], tokens_BND[b, 3:][wanted])


def test_a_token_that_has_gone_is_not_in_the_global_feature() -> None:
    torch.manual_seed(0)
    predictor = Predictor(16)
    tokens_BND = torch.randn(1, 5, 16)
    staying_BN = torch.tensor([[1.0, 1.0, 0.0, 1.0, 0.0]])
    masked = predictor(tokens_BND, staying_BN)[:, [0, 1, 3]]
    torch.testing.assert_close(masked, predictor(tokens_BND[:, [0, 1, 3]]))
    torch.testing.assert_close(masked.exp().sum(dim=-1), torch.ones(1, 3))


def test_operations_fall_with_pruning() -> None:
    model = pruned()
    counted = [model.operations(gamma) for gamma in (-70, -50, -30)]
    assert all(fewer < more for fewer, more in itertools.pairwise(counted))
    assert counted[-1] < model.operations(0)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two blocks"):
        pruned(depth=1)
    for pooling in ("avg", "map"):
        with pytest.raises(ValueError, match=f"pools by its class token, not by '{pooling}'"):
            pruned(global_pool=pooling)
    model = pruned()
    with pytest.raises(ValueError, match=r"it must be from -70"):
        model(images(), -71)
    with pytest.raises(ValueError, match="this model prunes"):
        ElasticViT(model.vit, {-5: (-5,) * 4}, Pruning(model.vit))
