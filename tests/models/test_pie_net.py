"""PIE-Net: the steps as written, attentions over what is no padding, dropout by keys, and a short training of PVSE."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reference.pie_net import embed
from setwise.models.config import ModelConfig, PIENetConfig
from setwise.models.dropout import name_layers
from setwise.models.loss_config import TripletConfig
from setwise.models.pie_net import PIENet
from setwise.models.retriever import SetRetriever
from setwise.models.set_prediction import Features
from setwise.pipelines import recipe
from tiny import TINY_MODEL
from trainings import start, train_run

DIM, INPUT_DIM = 5, 6
IS_PADDING = torch.tensor([[0, 1, 0, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 1, 1, 1, 1]], dtype=torch.bool)


def net(num_slots: int = 3, dropout: float = 0.0) -> PIENet:
    torch.manual_seed(0)
    module = PIENet(PIENetConfig(kind="pie_net", num_slots=num_slots, dropout=dropout), DIM, INPUT_DIM)
    name_layers(module)
    return module.double()


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


INPUTS, POOLED = random(1, 3, 7, INPUT_DIM), random(2, 3, DIM)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("num_slots", [1, 3])
def test_agrees_with_the_steps_written_out_in_output_and_gradients(num_slots: int, padded: bool) -> None:
    module, leaves = net(num_slots), [INPUTS.clone().requires_grad_(), POOLED.clone().requires_grad_()]
    is_padding = IS_PADDING if padded else torch.zeros_like(IS_PADDING)
    found = module(Features(*leaves, IS_PADDING if padded else None), keep_attention=True)
    steps = [embed(module, x[~row], pooled) for x, pooled, row in zip(leaves[0], leaves[1], is_padding, strict=True)]
    sets, residuals = (torch.stack([step[part] for step in steps]) for part in (0, 1))
    torch.testing.assert_close((found.sets, found.slots), (sets, residuals), rtol=0, atol=1e-12)
    (attention,) = found.attention
    assert attention.shape == (3, 1, num_slots, 7) and not attention.requires_grad
    for b, (_, _, map_KN) in enumerate(steps):
        torch.testing.assert_close(attention[b, 0][:, ~is_padding[b]], map_KN.detach(), rtol=0, atol=1e-12)
        assert not attention[b, 0][:, is_padding[b]].any()
    wanted, slopes = [*leaves, *module.parameters()], [random(seed, 3, num_slots, DIM) for seed in (3, 4)]
    ours = torch.autograd.grad((found.sets, found.slots), wanted, slopes)
    theirs = torch.autograd.grad((sets, residuals), wanted, slopes)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        assert a.any()


def test_the_gradient_is_that_of_finite_differences() -> None:
    module = net()
    leaves = INPUTS.clone().requires_grad_(), POOLED.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, pooled: module(Features(x, pooled, IS_PADDING))[:2], leaves)


@pytest.mark.parametrize("garbage", [1e6, math.inf, -math.inf, math.nan])
def test_what_stands_at_padding_has_no_influence_and_gets_no_gradient(garbage: float) -> None:
    module, results = net(), []
    for value in (0.0, garbage):
        inputs = INPUTS.masked_fill(IS_PADDING[..., None], value).requires_grad_()
        found = module(Features(inputs, POOLED, IS_PADDING), keep_attention=True)
        gradients = torch.autograd.grad(found.sets, [inputs, *module.parameters()], random(3, 3, 3, DIM))
        assert torch.equal(gradients[0].any(-1), ~IS_PADDING)
        results.append([found.sets, found.slots, *found.attention, *gradients])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_order_of_inputs_and_neighbours_have_no_influence() -> None:
    module, turned = net(), torch.tensor([4, 2, 6, 0, 1, 5, 3])
    whole = module(Features(INPUTS, POOLED, IS_PADDING)).sets
    again = module(Features(INPUTS[:, turned], POOLED, IS_PADDING[:, turned])).sets
    torch.testing.assert_close(again, whole, rtol=0, atol=1e-12)
    alone = module(Features(INPUTS[:1, ~IS_PADDING[0]], POOLED[:1])).sets
    torch.testing.assert_close(alone, whole[:1], rtol=0, atol=1e-12)
    apart_B = (whole[:, 0] - whole[:, 1]).norm(dim=1)
    assert apart_B[:2].min() > 1e-3 and apart_B[2] < 1e-12, "of one input all attentions read the same"


def test_dropout_is_a_function_of_the_key_and_of_residuals_alone() -> None:
    module, keys = net(dropout=0.5), torch.arange(3) * 7
    features = Features(INPUTS, POOLED, IS_PADDING)
    first, plain = module(features, keys), module.eval()(features, keys)
    module.train()
    kept = first.slots != 0
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(first.slots, torch.where(kept, 2 * plain.slots, 0), rtol=0, atol=1e-12)
    order = torch.tensor([2, 0])
    part = module(Features(INPUTS[order], POOLED[order], IS_PADDING[order]), keys[order])
    torch.testing.assert_close(part.sets, first.sets[order], rtol=0, atol=1e-12)
    assert not torch.equal(module(features, keys + 1).slots, first.slots)
    torch.testing.assert_close(plain[:2], net()(features)[:2], rtol=0, atol=0)


def test_autocast_attends_in_single_precision() -> None:
    module, features = net().float(), Features(INPUTS.float(), POOLED.float(), IS_PADDING)
    exact = module(features)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(features, keep_attention=True)
    assert found.attention[0].dtype == torch.float32
    torch.testing.assert_close(found.attention[0].sum(-1), torch.ones(3, 1, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.sets.float(), exact.sets, rtol=0, atol=0.05)
    assert not torch.equal(found.sets.float(), exact.sets)


def test_a_width_of_one_still_has_a_hidden_unit() -> None:
    module = PIENet(PIENetConfig(kind="pie_net"), DIM, 1)
    assert module(Features(torch.randn(2, 3, 1), torch.randn(2, DIM))).sets.shape == (2, 2, DIM)


@pytest.mark.parametrize("bad", [{"num_slots": 0}, {"dropout": 1.0}, {"heads": 2}])
def test_settings_that_mean_nothing_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        PIENetConfig.model_validate({"kind": "pie_net"} | bad)


def test_every_weight_of_a_model_as_published_learns() -> None:
    """Raw cells are attended to, their mean goes through a layer of its own, and words are read as they are."""
    torch.manual_seed(0)
    head = {"projection": "none", "global_feature": "linear", "pooling": "mean"}
    config = ModelConfig.model_validate(
        {
            "embed_size": 16,
            "image_encoder": {"kind": "butd", "feature_dim": 10, "region_drop": 0, "head": head},
            "text_encoder": {"kind": "bigru", "word_dim": 8, "directions": "concatenated", "dropout": 0},
            "set_prediction": {"kind": "pie_net"},
        }
    )
    model = SetRetriever(config, 30)
    assert model.image_sets.fc.weight.shape == (16, 10) and model.text_sets.fc.weight.shape == (16, 8)
    lengths = torch.tensor([4, 6, 1])
    tokens = torch.randint(1, 30, (3, 6)) * (torch.arange(6) < lengths[:, None])
    images, texts = model(torch.randn(3, 7, 10), tokens, lengths)
    (images.sets.pow(3).sum() + texts.sets.pow(3).sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_recipe_trains_through_the_real_loop(store: Path) -> None:
    tiny = [override for override in TINY_MODEL if "set_prediction" not in override]
    settings = recipe.load("digits_cnn_bigru_pvse", [*tiny, "train.epochs=4"])
    seen = train_run(store, start(store, "pvse-trains", settings), settings)
    assert [values["epoch"] for values in seen] == [1, 2, 3, 4]
    assert all(math.isfinite(value) for values in seen for value in values.values())
    assert seen[-1]["train/total"] < seen[1]["train/total"]  # in the first, all negatives were averaged
    assert all(0 < values["train/diversity"] <= 2 * math.sqrt(2) / 4 + 1e-6 for values in seen)


@pytest.mark.parametrize("data", ["coco", "f30k"])
def test_the_published_recipe_has_the_published_settings(data: str) -> None:
    settings = recipe.load(f"{data}_resnet152_bigru_pvse")
    assert isinstance(settings.loss, TripletConfig)
    sets, loss, optimizer = settings.retriever.set_prediction, settings.loss, settings.optimizer
    assert (sets.kind, sets.num_slots, settings.similarity.kind) == ("pie_net", 2, "mil")
    assert (loss.margin, loss.mmd_weight, loss.mmd_gamma) == (0.1, 0.01, 0.5)
    assert (loss.diversity, loss.diversity_weight, loss.negatives) == ("gram", 0.1, "hardest")
    assert (optimizer.kind, optimizer.amsgrad, optimizer.lr, optimizer.weight_decay) == ("adam", True, 2e-4, 0)
    assert (optimizer.schedule, optimizer.step_factor, optimizer.plateau_patience) == ("plateau", 0.5, 10)
    assert (settings.train.epochs, settings.train.batch_size, settings.data.name) == (30, 256, data)
    assert (settings.retriever.image_local_dim, settings.retriever.text_local_dim) == (2048, 300)
