"""The image head computes once what the authors' order of computation gives; dropout masks are independent, and padding
has no influence."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from setwise.models.config import ImageHeadConfig
from setwise.models.dropout import name_layers
from setwise.models.image_head import ImageHead, pool

KINDS = [
    *(("mlp", "projected"), ("mlp", "linear"), ("raw_mlp", "projected"), ("raw_mlp", "linear")),
    *(("linear", "projected"), ("linear", "linear"), ("none", "linear")),
]
INPUT_DIM, EMBED_SIZE = 6, 8


def head(projection: str = "mlp", global_feature: str = "projected", **settings: Any) -> ImageHead:
    torch.manual_seed(0)
    config = ImageHeadConfig.model_validate(
        {"projection": projection, "global_feature": global_feature, "dropout": 0} | settings
    )
    module = ImageHead(config, INPUT_DIM, EMBED_SIZE).double()
    name_layers(module)
    return module


def features(batch: int = 4, num: int = 5) -> tuple[Tensor, Tensor]:
    """Local features (B,N,F) and their padding, which is not always at the end."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, num, INPUT_DIM, dtype=torch.float64, generator=generator)
    is_padding = torch.rand(batch, num, generator=generator) < 0.4
    is_padding[:, 2] = False
    return x, is_padding


def in_the_authors_order(module: ImageHead, x: Tensor, is_padding: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """phi anew for the slots and for the pooling, fc twice in each, image by image where nothing goes across images;
    the batch normalisation is torch's, over the valid tokens, and moves its statistics in every call. VSE-infinity,
    whose MLP reads raw features, computes phi once."""
    reads_raw = module.mlp is not None and module.mlp.fc1.in_features == INPUT_DIM

    def normalized(x_MH: Tensor) -> Tensor:
        norm = module.mlp.norm
        statistics = (norm.running_mean, norm.running_var)
        return F.batch_norm(x_MH, *statistics, norm.weight, norm.bias, module.training, momentum=0.1)

    def phi(x_BNF: Tensor) -> Tensor:
        if module.fc is None:
            return x_BNF
        if module.mlp is None:
            return module.fc(x_BNF)
        output = torch.zeros(*x_BNF.shape[:2], EMBED_SIZE, dtype=x_BNF.dtype)
        read = x_BNF if reads_raw else module.fc(x_BNF)
        hidden = F.relu(normalized(module.mlp.fc1(read)[~is_padding]))
        output[~is_padding] = module.mlp.fc2(hidden) + module.fc(x_BNF)[~is_padding]
        return output

    def pooled(values: Tensor) -> Tensor:
        valid = [sample[~padding] for sample, padding in zip(values, is_padding, strict=True)]
        return torch.stack([v.max(0).values if how == "max" else v.mean(0) for v in valid])

    local = phi(x)
    if module.pooled_fc is not None:
        return local, module.pooled_fc(pooled(x))
    return local, pooled(local if reads_raw else phi(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize(("projection", "global_feature"), KINDS)
def test_agrees_with_the_authors_order(projection: str, global_feature: str, pooling: str, training: bool) -> None:
    (x, is_padding), found = features(), []
    for compute in (lambda m: m(x, is_padding), lambda m: in_the_authors_order(m, x, is_padding, pooling)):
        module = head(projection, global_feature, pooling=pooling).train(training)
        x.grad = None
        x.requires_grad_()
        local, pooled = compute(module)
        (local[~is_padding].square().sum() + pooled.pow(3).sum()).backward()
        gradients = {name: p.grad for name, p in module.named_parameters()}
        # Steps of the running statistics are counted by calls, of which there is one here.
        statistics = {name: b.clone() for name, b in module.named_buffers() if not name.endswith("tracked")}
        found.append((local[~is_padding].detach(), pooled.detach(), x.grad, gradients, statistics))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("projection", "global_feature", "names"),
    [
        ("mlp", "projected", ["fc", "mlp.fc1", "mlp.norm", "mlp.fc2"]),
        ("mlp", "linear", ["fc", "mlp.fc1", "mlp.norm", "mlp.fc2", "pooled_fc"]),
        ("raw_mlp", "projected", ["fc", "mlp.fc1", "mlp.norm", "mlp.fc2"]),
        ("linear", "projected", ["fc"]),
        ("linear", "linear", ["fc", "pooled_fc"]),
        ("none", "linear", ["pooled_fc"]),
    ],
)
def test_each_kind_has_the_weights_that_it_needs(projection: str, global_feature: str, names: list[str]) -> None:
    module = head(projection, global_feature)
    assert list(dict.fromkeys(name.rpartition(".")[0] for name, _ in module.named_parameters())) == names
    assert module.local_dim == (INPUT_DIM if projection == "none" else EMBED_SIZE)
    local, pooled = module(*features())
    assert local.shape == (4, 5, module.local_dim) and pooled.shape == (4, EMBED_SIZE)


def test_the_projection_is_computed_once() -> None:
    module, calls = head(dropout=0.5), Counter[str]()
    for name, layer in module.named_modules():
        layer.register_forward_hook(lambda *_, name=name: calls.update([name]))
    module(*features())
    assert {name: calls[name] for name in ("fc", "mlp.fc1", "mlp.norm", "mlp.fc2")} == dict.fromkeys(
        ("fc", "mlp.fc1", "mlp.norm", "mlp.fc2"), 1
    )
    assert calls["dropout"] == 2


def test_the_mlp_reads_the_projected_or_the_raw_features() -> None:
    of_projected, of_raw = head("mlp").mlp, head("raw_mlp").mlp
    assert of_projected.fc1.weight.shape == (EMBED_SIZE // 2, EMBED_SIZE)
    assert of_raw.fc1.weight.shape == (EMBED_SIZE // 2, INPUT_DIM)
    assert of_raw.fc2.weight.shape == of_projected.fc2.weight.shape == (EMBED_SIZE, EMBED_SIZE // 2)
    module, (x, _) = head("raw_mlp").eval(), features()
    torch.nn.init.zeros_(module.fc.weight)  # what is left then comes of the raw features alone
    torch.nn.init.zeros_(module.fc.bias)
    expected = module.mlp.fc2(F.relu(module.mlp.norm(module.mlp.fc1(x))))
    torch.testing.assert_close(module(x)[0], expected, rtol=0, atol=1e-12)


def test_raw_features_go_to_the_slots_as_they_are() -> None:
    x, is_padding = features()
    assert head("none", "linear", dropout=0.5)(x, is_padding)[0] is x


@pytest.mark.parametrize("projection", ["mlp", "linear"])
def test_slots_and_pooling_have_dropout_masks_of_their_own(projection: str) -> None:
    module, plain, (x, _) = head(projection, dropout=0.5), head(projection), features(64, 9)
    keys = torch.arange(64)
    local, pooled = module(x, keys=keys)
    phi, _ = plain(x)
    kept = local != 0
    torch.testing.assert_close(local, torch.where(kept, 2 * phi, 0))
    assert 0.47 < kept.double().mean() < 0.53
    of_pooling = module.dropout(phi, keys, call=1)
    torch.testing.assert_close(pooled, of_pooling.amax(1))
    agree = ((of_pooling != 0) == kept).double().mean()
    assert 0.47 < agree < 0.53, "independent masks agree by chance alone"


def test_dropout_depends_on_the_key_and_not_on_the_batch() -> None:
    x, _ = features(6)
    module, keys = head("linear", dropout=0.5), torch.arange(6) * 7
    local, pooled = module(x, keys=keys)
    order = torch.tensor([4, 1])
    torch.testing.assert_close(module(x[order], keys=keys[order]), (local[order], pooled[order]))
    assert not torch.equal(module(x, keys=keys + 1)[0], local)
    assert not torch.equal(module(x)[0], module(x)[0]), "without keys, torch's generator decides"


def test_evaluation_drops_nothing() -> None:
    x, is_padding = features()
    torch.testing.assert_close(head(dropout=0.9).eval()(x, is_padding), head().eval()(x, is_padding))


@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize(("projection", "global_feature"), KINDS)
def test_what_stands_at_padding_has_no_influence(projection: str, global_feature: str, pooling: str) -> None:
    (x, is_padding), found = features(), []
    for value in (0.0, 1e3):
        module = head(projection, global_feature, pooling=pooling)
        padded = x.masked_fill(is_padding[..., None], value).requires_grad_()
        local, pooled = module(padded, is_padding)
        (local[~is_padding].square().sum() + pooled.pow(3).sum()).backward()
        assert not padded.grad[is_padding].any()
        gradients = {name: p.grad for name, p in module.named_parameters()}
        found.append((local[~is_padding].detach(), pooled.detach(), gradients, dict(module.named_buffers())))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


def test_pooling_takes_the_valid_ones_alone() -> None:
    x = torch.tensor([[[1.0], [5.0], [9.0]], [[-4.0], [-2.0], [3.0]]])
    is_padding = torch.tensor([[False, False, True], [False, False, True]])
    assert pool(x, is_padding, "max").tolist() == [[5], [-2]]
    assert pool(x, is_padding, "mean").tolist() == [[3], [-3]]
    assert pool(x, None, "max").tolist() == [[9], [3]]
    assert pool(x, None, "mean").tolist() == [[5], [-1]]


@pytest.mark.parametrize(("projection", "global_feature"), KINDS)
def test_half_precision_is_taken_under_autocast_and_converted_without(projection: str, global_feature: str) -> None:
    x, is_padding = features()
    module = head(projection, global_feature).float().eval()
    expected = module(x.float(), is_padding)
    converted = module(x.half(), is_padding)
    assert [value.dtype for value in converted] == [torch.float32, torch.float32]
    torch.testing.assert_close(converted, expected, rtol=0, atol=5e-3)
    with torch.autocast("cpu", torch.bfloat16):
        local, pooled = module.train()(x.half(), is_padding)
    assert local.dtype == (torch.half if projection == "none" else torch.bfloat16)
    assert local.isfinite().all() and pooled.isfinite().all()


@pytest.mark.parametrize(("projection", "global_feature"), KINDS)
def test_every_parameter_learns(projection: str, global_feature: str) -> None:
    module = head(projection, global_feature, dropout=0.1)
    local, pooled = module(*features(), torch.arange(4))
    (local.square().sum() + pooled.pow(3).sum()).backward()
    # A bias ahead of a batch normalisation is subtracted again, so its gradient is zero but for rounding.
    idle = [name for name, p in module.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-12]
    assert idle == (["mlp.fc1.bias"] if projection.endswith("mlp") else [])
