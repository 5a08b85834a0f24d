"""Generalised pooling: the operator as written, weights by number of inputs, order and padding without influence; and
the pooled global feature of VSE++, which is its simplest ancestor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reference.gpo import place_weights, pool
from setwise.models.config import GPOConfig, ModelConfig, RegionsConfig
from setwise.models.gpo import GPO, SortedPooling
from setwise.models.loss_config import TripletConfig
from setwise.models.pooled import Pooled
from setwise.models.retriever import SetRetriever
from setwise.models.set_prediction import Features
from setwise.pipelines import recipe
from setwise.platform import checkpoint
from tiny import TINY_MODEL
from trainings import start, train_run

DIM = 5
IS_PADDING = torch.tensor([[0, 1, 0, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 1, 1, 1, 1]], dtype=torch.bool)


def operator(**settings: Any) -> SortedPooling:
    torch.manual_seed(0)
    config = GPOConfig.model_validate({"kind": "gpo", "position_dim": 6, "hidden": 4, "temperature": 0.5} | settings)
    return SortedPooling(config).double()


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


INPUTS = random(1, 3, 7, DIM)


@pytest.mark.parametrize("padded", [True, False])
def test_agrees_with_the_operator_written_out_in_output_and_gradients(padded: bool) -> None:
    pooling, inputs = operator(), INPUTS.clone().requires_grad_()
    is_padding = IS_PADDING if padded else torch.zeros_like(IS_PADDING)
    found, _ = pooling(inputs, is_padding if padded else None)
    expected = torch.stack([pool(pooling, x[~row]) for x, row in zip(inputs, is_padding, strict=True)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    wanted, slope = [inputs, *pooling.parameters()], random(2, 3, DIM)
    for ours, theirs in zip(
        torch.autograd.grad(found, wanted, slope), torch.autograd.grad(expected, wanted, slope), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
        assert ours.any()


def test_a_row_of_weights_for_each_number_of_inputs() -> None:
    pooling = operator()
    by_count = pooling.weights_by_count(9)
    for count in range(1, 10):
        expected = torch.stack(place_weights(pooling, count))
        torch.testing.assert_close(by_count[count - 1, :count], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(pooling.weights(count), expected, rtol=0, atol=1e-12)
        assert not by_count[count - 1, count:].any()
    torch.testing.assert_close(by_count[:4, :4], pooling.weights_by_count(4), rtol=0, atol=1e-12)


def test_the_gradient_is_that_of_finite_differences() -> None:
    pooling = operator()
    assert torch.autograd.gradcheck(lambda x: pooling(x, IS_PADDING)[0], INPUTS.clone().requires_grad_())
    names = [name for name, _ in pooling.named_parameters()]

    def of_weights(*values: Tensor) -> Tensor:
        pooled: Tensor = torch.func.functional_call(
            pooling, dict(zip(names, values, strict=True)), (INPUTS, IS_PADDING)
        )[0]
        return pooled

    assert torch.autograd.gradcheck(
        of_weights, tuple(p.detach().clone().requires_grad_() for p in pooling.parameters())
    )


def test_it_can_be_the_maximum_and_the_mean() -> None:
    pooling = operator()
    torch.nn.init.zeros_(pooling.logit.weight)
    torch.testing.assert_close(pooling(INPUTS)[0], INPUTS.mean(1), rtol=0, atol=1e-12)
    valid = [x[~row].mean(0) for x, row in zip(INPUTS, IS_PADDING, strict=True)]
    torch.testing.assert_close(pooling(INPUTS, IS_PADDING)[0], torch.stack(valid), rtol=0, atol=1e-12)
    sharp = operator(temperature=1e-7)
    best = int(sharp.weights(7).argmax())
    torch.testing.assert_close(sharp(INPUTS)[0], INPUTS.sort(1, descending=True).values[:, best], rtol=0, atol=1e-9)


def test_order_and_place_of_padding_have_no_influence() -> None:
    pooling, turned = operator(), torch.tensor([4, 2, 6, 0, 1, 5, 3])
    whole, _ = pooling(INPUTS, IS_PADDING)
    torch.testing.assert_close(pooling(INPUTS[:, turned], IS_PADDING[:, turned])[0], whole, rtol=0, atol=1e-12)
    alone, _ = pooling(INPUTS[:1, ~IS_PADDING[0]])
    torch.testing.assert_close(alone, whole[:1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("garbage", [1e6, math.inf, -math.inf, math.nan])
def test_what_stands_at_padding_has_no_influence_and_gets_no_gradient(garbage: float) -> None:
    pooling, results = operator(), []
    for value in (0.0, garbage):
        inputs = INPUTS.masked_fill(IS_PADDING[..., None], value).requires_grad_()
        pooled, weights = pooling(inputs, IS_PADDING, keep_weights=True)
        gradients = torch.autograd.grad(pooled, [inputs, *pooling.parameters()], random(3, 3, DIM))
        assert torch.equal(gradients[0].any(-1), ~IS_PADDING)
        assert weights is not None and not weights[IS_PADDING].any()
        results.append([pooled, weights, *gradients])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_attention_is_the_mean_weight_of_an_input() -> None:
    gpo = GPO(GPOConfig(kind="gpo"), DIM, DIM).double()
    features = Features(INPUTS, random(4, 3, DIM), IS_PADDING)
    plain, kept = gpo(features), gpo(features, keep_attention=True)
    assert plain.attention == () and plain.slot_iterations == () and len(kept.slot_iterations) == 1
    (attention,) = kept.attention
    assert attention.shape == (3, 1, 1, 7) and not attention.requires_grad
    torch.testing.assert_close(attention.sum(-1), torch.ones(3, 1, 1, dtype=torch.float64), rtol=0, atol=1e-12)
    for b, row in enumerate(IS_PADDING):
        places = [int(n) for n in (~row).nonzero()]
        weights, received = place_weights(gpo.pool, len(places)), dict.fromkeys(places, 0.0)
        for d in range(DIM):
            ordered = sorted(places, key=lambda n: float(INPUTS[b, n, d]), reverse=True)
            for n, weight in zip(ordered, weights, strict=True):
                received[n] += weight.item() / DIM
        expected = torch.tensor([received.get(n, 0.0) for n in range(7)], dtype=torch.float64)
        torch.testing.assert_close(attention[b, 0, 0], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(plain.sets, F.normalize(plain.slots, dim=-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(plain.slots[:, 0], gpo.pool(INPUTS, IS_PADDING)[0], rtol=0, atol=1e-12)


def test_no_sample_at_all_gives_every_weight_a_gradient_of_zero() -> None:
    """Workers whose share of a batch is empty have part in the sum of gradients too."""
    for is_padding in (None, IS_PADDING[:0]):
        gpo = GPO(GPOConfig(kind="gpo"), DIM, DIM)
        sets = gpo(Features(torch.zeros(0, 7, DIM), torch.zeros(0, DIM), is_padding)).sets
        assert sets.shape == (0, 1, DIM)
        sets.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in gpo.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_precision_is_near_and_autocast_pools_in_it(dtype: torch.dtype) -> None:
    exact, _ = operator()(INPUTS.to(dtype).double(), IS_PADDING)
    pooling = operator().float()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        pooled, _ = pooling(INPUTS.to(dtype), IS_PADDING)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.double(), exact, rtol=0, atol=1e-5)


def test_local_features_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="9 must be embed_size, which is 5"):
        GPO(GPOConfig(kind="gpo"), DIM, 9)


# --- in a model -------------------------------------------------------------------------------------------------

MODEL: dict[str, Any] = {
    "embed_size": 16,
    "image_encoder": {"kind": "butd", "feature_dim": 10, "region_drop": 0.3, "head": {"projection": "raw_mlp"}},
    "text_encoder": {"kind": "bigru", "word_dim": 8, "local_features": "states"},
    "set_prediction": {"kind": "gpo"},
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image_encoder": {"kind": "butd", "head": {"global_feature": "linear"}}}, "global_feature='projected'"),
        (
            {"image_encoder": {"kind": "grid", "head": {"projection": "none", "global_feature": "linear"}}},
            "global_feature='projected'",
        ),
        ({"text_encoder": {"kind": "bigru"}}, "local_features='states'"),
        (
            {
                "set_prediction": {"kind": "pooled"},
                "image_encoder": {"kind": "butd", "head": {"projection": "mlp", "global_feature": "linear"}},
            },
            "reads the global feature alone",
        ),
    ],
)
def test_models_with_weights_that_could_not_learn_are_refused(changed: dict[str, Any], message: str) -> None:
    ModelConfig.model_validate(MODEL)
    with pytest.raises(ValueError, match=message):
        ModelConfig.model_validate(MODEL | changed)


@pytest.mark.parametrize("kind", ["gpo", "pooled"])
def test_every_weight_of_a_model_learns(kind: str) -> None:
    torch.manual_seed(0)
    model = SetRetriever(ModelConfig.model_validate(MODEL | {"set_prediction": {"kind": kind}}), 30)
    lengths = torch.tensor([4, 6, 1])
    tokens = torch.randint(1, 30, (3, 6)) * (torch.arange(6) < lengths[:, None])
    images, texts = model(torch.randn(3, 7, 10), tokens, lengths, image_keys=torch.arange(3), text_keys=torch.arange(3))
    assert images.sets.shape == texts.sets.shape == (3, 1, 16)
    (images.sets.pow(3).sum() + texts.sets.pow(3).sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_pooled_feature_is_normalised_and_all_there_is() -> None:
    pooled = random(5, 3, DIM)
    found = Pooled()(Features(INPUTS, pooled, IS_PADDING), torch.arange(3), keep_attention=True)
    torch.testing.assert_close(found.sets[:, 0], pooled / pooled.square().sum(1, keepdim=True).sqrt())
    assert torch.equal(found.slots[:, 0], pooled) and found.attention == ()
    assert list(Pooled().state_dict()) == []


@pytest.mark.parametrize("name", ["digits_cnn_bigru_vse_infinity", "digits_cnn_bigru_vse"])
def test_the_recipe_trains_through_the_real_loop(store: Path, name: str) -> None:
    tiny = [override for override in TINY_MODEL if "set_prediction" not in override]
    settings = recipe.load(name, [*tiny, "train.epochs=4"])
    training = start(store, f"{name.removeprefix('digits_cnn_bigru_')}-trains", settings)
    seen = train_run(store, training, settings)
    assert [values["epoch"] for values in seen] == [1, 2, 3, 4]
    assert all(math.isfinite(value) for values in seen for value in values.values())
    # The first epoch averages over all negatives, so losses are comparable from the second on.
    assert seen[-1]["train/total"] < seen[1]["train/total"]
    weights = checkpoint.weights(training.checkpoints / "epoch_0004")
    pooling = [key for key in weights if key.startswith(("retriever.image_sets.", "retriever.text_sets."))]
    assert bool(pooling) == name.endswith("vse_infinity")


@pytest.mark.parametrize("name", ["coco_butd_bigru", "coco_butd_bert", "f30k_butd_bigru"])
def test_the_published_recipes_of_vse_infinity_have_the_published_settings(name: str) -> None:
    settings = recipe.load(f"{name}_vse_infinity")
    assert isinstance(settings.loss, TripletConfig) and isinstance(settings.retriever.image_encoder, RegionsConfig)
    encoder, loss, optimizer = settings.retriever.image_encoder, settings.loss, settings.optimizer
    assert settings.retriever.set_prediction == GPOConfig(kind="gpo", position_dim=32, hidden=32, temperature=0.1)
    assert (encoder.head.projection, encoder.region_drop, settings.data.word_drop) == ("raw_mlp", 0.2, 0.2)
    assert (loss.margin, loss.negatives, loss.all_negatives_epochs) == (0.2, "hardest", 1)
    assert (loss.mmd_weight, loss.diversity_weight, settings.similarity.kind) == (0, 0, "cosine")
    assert (optimizer.kind, optimizer.lr, optimizer.weight_decay, optimizer.clip_norm) == ("adamw", 5e-4, 1e-4, 2)
    assert (optimizer.schedule, optimizer.step_epochs, optimizer.step_factor) == ("step", 15, 0.1)
    assert optimizer.text_scale == (0.1 if "bert" in name else 1)
    assert (settings.train.epochs, settings.train.batch_size) == (25, 128)
    assert settings.retriever.text_local_dim == settings.retriever.image_local_dim == 1024


@pytest.mark.parametrize("data", ["coco", "f30k"])
def test_the_published_recipe_of_vse_has_the_published_settings(data: str) -> None:
    settings = recipe.load(f"{data}_resnet152_bigru_vse")
    assert isinstance(settings.loss, TripletConfig) and settings.data.name == data
    loss, optimizer = settings.loss, settings.optimizer
    assert (settings.retriever.set_prediction.kind, settings.similarity.kind) == ("pooled", "cosine")
    assert (loss.margin, loss.negatives, loss.mmd_weight, loss.diversity_weight) == (0.2, "hardest", 0, 0)
    assert (optimizer.kind, optimizer.lr, optimizer.step_epochs, optimizer.step_factor) == ("adam", 2e-4, 15, 0.1)
    assert (settings.train.epochs, settings.train.batch_size, optimizer.frozen_backbone_epochs) == (45, 128, 30)
    assert optimizer.lr * optimizer.backbone_scale * optimizer.step_factor**2 == pytest.approx(2e-5)
