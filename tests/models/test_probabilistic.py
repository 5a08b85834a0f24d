"""Probabilistic embeddings: heads, draws, the closed form, and the losses of PCME and PCME++ as written out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import reference.probabilistic as naive
from setwise.models import probabilistic
from setwise.models.config import GaussianConfig
from setwise.models.dropout import name_layers
from setwise.models.loss_config import MatchingConfig, SimilarityConfig, SoftContrastiveConfig
from setwise.models.probabilistic import Gaussian, kl_divergence, matching, pseudo_positives, soft_contrastive
from setwise.models.set_prediction import Features, SetEmbedding
from setwise.models.similarity import Similarity, closed_form_match
from setwise.pipelines import recipe
from setwise.platform.errors import ConfigError
from tiny import TINY_MODEL
from trainings import start, train_run

DIM = 6
IS_PADDING = torch.tensor([[0, 1, 0, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 1, 1, 1, 1]], dtype=torch.bool)
OWNERS = torch.tensor([1, 0, 1, 3, 1, 0])
"""Of six captions among four images, of which one has none."""
Side = Literal["image", "text"]
each_head = pytest.mark.parametrize("pooling", ["pie_net", "gpo"])
each_number = pytest.mark.parametrize("samples", [0, 3])


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head(pooling: str = "pie_net", samples: int = 3, side: Side = "image", **settings: Any) -> Gaussian:
    torch.manual_seed(0)
    config = GaussianConfig.model_validate({"kind": "gaussian", "pooling": pooling, "samples": samples, **settings})
    module = Gaussian(config, DIM, DIM, side)
    name_layers(module)
    return module.double()


def features(rows: slice = slice(None)) -> Features:
    return Features(random(1, 3, 7, DIM)[rows], random(2, 3, DIM)[rows], IS_PADDING[rows])


def distributions(seed: int, items: int, samples: int = 3, dim: int = DIM) -> SetEmbedding:
    mean, log_sigma = F.normalize(random(seed, items, 1, dim), dim=-1), random(seed + 1, items, 1, dim) / 2 - 1
    draws = mean + log_sigma.exp() * random(seed + 2, items, samples, dim)
    return SetEmbedding(draws, mean, log_sigma=log_sigma)


def similarity(kind: str, scale: float, shift: float) -> Similarity:
    made = Similarity(SimilarityConfig.model_validate({"kind": kind})).double()
    made.load_state_dict({"scale": torch.tensor(scale), "shift": torch.tensor(shift)})
    return made


def soft(**settings: Any) -> SoftContrastiveConfig:
    return SoftContrastiveConfig.model_validate({"kind": "soft_contrastive", **settings})


def match(**settings: Any) -> MatchingConfig:
    return MatchingConfig.model_validate({"kind": "matching", **settings})


def test_log_sigma_is_what_its_attention_reads_and_the_global_feature() -> None:
    module, given = head(), features()
    found = module.eval()(given)
    assert found.log_sigma is not None
    own = module.log_sigma
    assert isinstance(own, probabilistic.AttendedLogSigma)
    for b in range(3):
        inputs = given.local[b][~IS_PADDING[b]]
        logits = [own.attend.logits(torch.tanh(own.attend.hidden(x))) for x in inputs]
        shares = [logit.exp() / sum(other.exp() for other in logits) for logit in logits]
        read = sum(share * x for share, x in zip(shares, inputs, strict=True))
        expected = own.fc.weight @ read + own.fc.bias + own.of_pooled.weight @ given.pooled[b] + own.of_pooled.bias
        torch.testing.assert_close(found.log_sigma[b, 0], expected, rtol=0, atol=1e-12)


@each_head
def test_draws_are_the_mean_and_the_deviation_times_noise(pooling: str) -> None:
    module = head(pooling).eval()
    found = module(features())
    assert found.sets.shape == (3, 3, DIM) and found.slots.shape == (3, 1, DIM) and found.log_sigma is not None
    torch.testing.assert_close(found.slots.norm(dim=-1), torch.ones(3, 1, dtype=torch.float64))
    for b in range(3):
        for j in range(3):
            expected = found.slots[b, 0] + found.log_sigma[b, 0].exp() * module.noise[j]
            torch.testing.assert_close(found.sets[b, j], expected, rtol=0, atol=1e-12)
    assert torch.equal(found.sets, module(features()).sets), "evaluation is random"


def test_draws_in_training_are_standard_normal_and_a_function_of_the_key_and_the_side() -> None:
    image, text, keys = head(samples=200), head(samples=200, side="text"), torch.tensor([5, 6, 7])
    found = image(features(), keys)
    assert found.log_sigma is not None
    noise = ((found.sets - found.slots) / found.log_sigma.exp()).detach()
    assert abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 1) < 0.05
    assert torch.equal(found.sets, image(features(), keys).sets)
    torch.testing.assert_close(image(features(slice(1, 2)), keys[1:2]).sets[0], found.sets[1], rtol=0, atol=1e-12)
    other = text(features(), keys)
    assert other.log_sigma is not None
    other_noise = ((other.sets - other.slots) / other.log_sigma.exp()).detach()
    pairs = (noise[0], noise[1]), (noise[0], other_noise[0])
    for one, another in pairs:
        assert abs(float((one * another).mean())) < 0.1, "draws of different samples or sides are related"
    torch.manual_seed(1)
    assert not torch.equal(image(features()).sets, image(features()).sets)


@each_head
@each_number
@pytest.mark.parametrize("garbage", [1e30, math.inf, math.nan])
def test_what_stands_at_padding_has_no_influence_and_gets_no_gradient(
    pooling: str, samples: int, garbage: float
) -> None:
    module, keys, results = head(pooling, samples), torch.tensor([5, 6, 7]), []
    for value in (0.0, garbage):
        local = features().local.masked_fill(IS_PADDING[..., None], value).requires_grad_()
        found = module(Features(local, features().pooled, IS_PADDING), keys)
        slopes = random(3, *found.sets.shape)
        gradients = torch.autograd.grad(found.sets, [local, *module.parameters()], slopes)
        assert not gradients[0][IS_PADDING].any()
        results.append([found.sets, found.log_sigma, *gradients])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@each_head
@each_number
def test_a_sample_depends_neither_on_its_batch_nor_on_how_much_it_is_padded_nor_on_the_order_of_inputs(
    pooling: str, samples: int
) -> None:
    module, given = head(pooling, samples).eval(), features()
    whole = module(given).sets
    for b in range(3):
        alone = Features(given.local[b : b + 1, ~IS_PADDING[b]].flip(1), given.pooled[b : b + 1])
        torch.testing.assert_close(module(alone).sets, whole[b : b + 1], rtol=0, atol=1e-12)


@each_head
@each_number
def test_every_parameter_gets_a_gradient_and_it_is_that_of_the_function(pooling: str, samples: int) -> None:
    module, keys = head(pooling, samples), torch.tensor([5, 6, 7])
    leaves = [features().local.requires_grad_(), features().pooled.requires_grad_()]

    def function(local: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        found = module(Features(local, pooled, IS_PADDING), keys)
        assert found.log_sigma is not None
        return found.sets, found.log_sigma

    assert torch.autograd.gradcheck(function, leaves)
    function(*leaves)[0].square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@each_head
@each_number
def test_half_precision_of_encoders_leaves_draws_in_single(pooling: str, samples: int) -> None:
    module = head(pooling, samples).float().eval()
    given = Features(features().local.float(), features().pooled.float(), IS_PADDING)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(given)
    assert found.sets.dtype == found.slots.dtype == torch.float32
    assert found.log_sigma is not None and found.log_sigma.dtype == torch.float32
    torch.testing.assert_close(found.sets, module(given).sets, rtol=0.05, atol=0.1)


@each_head
def test_training_begins_near_the_deviation_that_is_asked_for(pooling: str) -> None:
    found = head(pooling, initial_log_sigma=-3)(features())
    other = head(pooling, initial_log_sigma=0)(features())
    assert found.log_sigma is not None and other.log_sigma is not None
    torch.testing.assert_close(found.log_sigma + 3, other.log_sigma, rtol=0, atol=1e-12)


def test_pooling_needs_local_features_as_wide_as_an_embedding() -> None:
    with pytest.raises(ValueError, match="must be embed_size"):
        Gaussian(GaussianConfig(kind="gaussian", pooling="gpo"), DIM, DIM + 1, "image")


@each_head
def test_the_distance_of_two_vectors_is_the_closed_form_of_two_distributions(pooling: str) -> None:
    images, texts = (head(pooling, 0, side).eval()(features()) for side in ("image", "text"))
    assert images.sets.shape == texts.sets.shape == (3, 1, DIM + 2)
    assert images.log_sigma is not None and texts.log_sigma is not None
    parts = (x.detach()[:, 0].numpy() for x in (images.slots, images.log_sigma, texts.slots, texts.log_sigma))
    mean, log_sigma, other, other_log_sigma = parts
    expected = [
        [2.5 - 1.5 * naive.closed_form_distance(mean[i], log_sigma[i], other[t], other_log_sigma[t]) for t in range(3)]
        for i in range(3)
    ]
    found = closed_form_match(images.sets, texts.sets, 1.5, 2.5).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_closed_form_is_the_mean_over_many_draws() -> None:
    pair = [head("pie_net", 0, side).eval()(features(slice(1))) for side in ("image", "text")]
    generator, means = torch.Generator().manual_seed(0), []
    for embedding in pair:
        assert embedding.log_sigma is not None
        noise = torch.randn(20_000, DIM, generator=generator, dtype=torch.float64)
        means.append((embedding.slots[0] + embedding.log_sigma[0].exp() * noise).detach())
    sampled = float((means[0] - means[1]).square().sum(1).mean())
    assert closed_form_match(pair[0].sets, pair[1].sets, -1.0, 0.0).item() == pytest.approx(sampled, rel=0.03)


def test_variances_that_vanish_have_a_gradient() -> None:
    module = head("pie_net", 0, initial_log_sigma=-20).float()
    with torch.no_grad():
        assert isinstance(module.log_sigma, probabilistic.AttendedLogSigma)
        module.log_sigma.fc.bias.fill_(-200)
    given = Features(features().local.float(), features().pooled.float(), IS_PADDING)
    module(given).sets.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("logits", [2**22, 1])
def test_soft_contrastive_is_as_written_out_whether_in_one_block_or_in_many(
    logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probabilistic, "LOGITS", logits)
    images, texts = distributions(10, 4), distributions(20, 6, samples=2)
    config = soft(kl_weight=0.3, uniformity_weight=0.7)
    found = soft_contrastive(images, texts, OWNERS, similarity("pcme", 1.5, 2.5), config)
    contrastive = naive.soft_contrastive(images.sets.numpy(), texts.sets.numpy(), OWNERS.tolist(), 1.5, 2.5)
    kl = sum(divergence(images)) + sum(divergence(texts))
    uniformity = naive.uniformity(torch.cat((images.sets.flatten(0, 1), texts.sets.flatten(0, 1))).numpy())
    expected = {"contrastive": contrastive, "kl": kl, "uniformity": uniformity}
    expected["total"] = contrastive + 0.3 * kl + 0.7 * uniformity
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=1e-10)


def divergence(embedding: SetEmbedding) -> list[float]:
    assert embedding.log_sigma is not None
    each = zip(embedding.slots[:, 0].numpy(), embedding.log_sigma[:, 0].numpy(), strict=True)
    return [value for mean, log_sigma in each for value in naive.kl(mean, log_sigma)]


def test_matching_is_as_written_out() -> None:
    images, texts = distributions(10, 4, 1), distributions(20, 6, 1)
    found = matching(images, texts, OWNERS, similarity("csd", 1.5, 2.5), match(pseudo_positive_weight=0.4, kl_weight=2))
    scores = np.array(
        [[2.5 - 1.5 * float((x - y).square().sum()) for y in texts.sets[:, 0]] for x in images.sets[:, 0]]
    )
    kl = float(np.mean(divergence(images)) + np.mean(divergence(texts)))
    matched, pseudo = naive.matching(scores, OWNERS.tolist()), naive.pseudo_positive(scores, OWNERS.tolist())
    expected = {"matching": matched, "pseudo_positive": pseudo, "kl": kl, "total": matched + 0.4 * pseudo + 2 * kl}
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=1e-10)
    assert pseudo != pytest.approx(matched), "no pair is a pseudo-positive, so they were not tested"


def test_what_scores_no_less_than_the_true_one_is_positive_too() -> None:
    scores = torch.tensor([[0.5, 0.9, 0.7, 0.5], [0.9, 0.1, 0.6, 0.2]])
    of_images, of_texts = pseudo_positives(scores, torch.tensor([0, 1, 1, 0]))
    # The first image's captions are the first and last, both 0.5; the second's the second (0.1) and third (0.6).
    assert of_images.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0.5]]
    assert of_texts.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


@pytest.mark.parametrize("kind", ["pcme", "csd"])
def test_gradients_of_losses_are_those_of_the_function(kind: str) -> None:
    images, texts, compare = distributions(30, 3, 2), distributions(40, 4, 2), similarity(kind, 1.5, 2.5)
    owners = torch.tensor([0, 2, 0, 1])
    leaves = [x for side in (images, texts) for x in (side.sets, side.slots, side.log_sigma) if x is not None]
    leaves = [x.clone().requires_grad_() for x in leaves]

    def function(*x: Tensor) -> Tensor:
        sides = (SetEmbedding(*x[n : n + 2], log_sigma=x[n + 2]) for n in (0, 3))
        if kind == "pcme":
            return soft_contrastive(*sides, owners, compare, soft(kl_weight=0.3, uniformity_weight=0.7))["total"]
        return matching(*sides, owners, compare, match(kl_weight=2))["total"]

    assert torch.autograd.gradcheck(function, leaves)
    function(*leaves).backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None and parameter.grad != 0 for parameter in compare.parameters())


@pytest.mark.parametrize("kind", ["pcme", "csd"])
def test_losses_are_finite_far_from_every_match_and_in_half_precision(kind: str) -> None:
    for length in (1e-3, 1e3):
        sides = [
            SetEmbedding((length * side.sets).bfloat16().requires_grad_(), side.slots, log_sigma=side.log_sigma)
            for side in (distributions(50, 4), distributions(60, 6))
        ]
        compare = Similarity(SimilarityConfig.model_validate({"kind": kind}))
        with torch.autocast("cpu", torch.bfloat16):
            if kind == "pcme":
                found = soft_contrastive(*sides, OWNERS, compare, soft())  # type: ignore[call-arg,arg-type]
            else:
                found = matching(*sides, OWNERS, compare, match())  # type: ignore[call-arg,arg-type]
        found["total"].backward()  # type: ignore[no-untyped-call]
        assert all(value.isfinite() and value.dtype != torch.bfloat16 for value in found.values())
        assert all(side.sets.grad is not None and side.sets.grad.isfinite().all() for side in sides)


def test_sets_that_are_no_distributions_are_refused() -> None:
    with pytest.raises(ValueError, match="without log_sigma"):
        kl_divergence(SetEmbedding(random(1, 2, 3, DIM), random(2, 2, 3, DIM)))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"samples": 0}, "samples=0 goes with similarity.kind=csd"),
        ({"kind": "slots"}, "similarity.kind=pcme and model.set_prediction.kind=gaussian"),
    ],
)
def test_recipes_that_compare_what_is_not_there_are_refused(settings: dict[str, Any], told: str) -> None:
    values = [f"model.set_prediction.{name}={value}" for name, value in settings.items()]
    with pytest.raises(ConfigError, match=told):
        recipe.load("digits_cnn_bigru_pcme", values)


@pytest.mark.parametrize("name", ["digits_cnn_bigru_pcme", "digits_cnn_bigru_pcmepp"])
def test_the_recipe_trains_and_is_ranked(name: str, store: Path) -> None:
    overrides = [value for value in TINY_MODEL if "set_prediction" not in value]
    settings = recipe.load(name, [*overrides, "train.epochs=2", "optimizer.warmup_steps=0"])
    first, last = train_run(store, start(store, f"probabilistic-{name}", settings), settings)
    assert last["train/total"] < first["train/total"]
    assert 0 < last["val/rsum"] <= 600
    assert not any(name.startswith("sets/") for name in last)  # draws are no elements of a set


def test_published_settings_are_the_authors() -> None:
    for name in ("coco_resnet152_bigru_pcme", "f30k_resnet152_bigru_pcme"):
        settings = recipe.load(name)
        sets = settings.retriever.set_prediction
        assert isinstance(sets, GaussianConfig) and isinstance(settings.loss, SoftContrastiveConfig)
        assert (sets.samples, sets.pooling, settings.loss.kl_weight) == (7, "pie_net", 1e-5)
        assert (settings.optimizer.lr, settings.train.batch_size, settings.train.epochs) == (2e-4, 128, 60)
