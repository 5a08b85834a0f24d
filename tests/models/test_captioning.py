"""The captioner: its steps written out, both directions, what has no influence on it, and that it learns."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference.captioning import surprise
from setwise.models.captioning import Captioner, CaptionScores, Memory
from setwise.models.pretext_config import CaptionerConfig

VOCABULARY = 12
LENGTHS = torch.tensor([4, 7, 2, 5, 1])
OWNERS = torch.tensor([0, 0, 1, 2, 2])
CNN = {"kind": "cnn", "channels": [8, 8]}
REGIONS = {
    "kind": "butd",
    "feature_dim": 5,
    "region_drop": 0.3,
    "head": {"projection": "none", "global_feature": "linear"},
}


def captioner(dropout: float = 0.0, image_encoder: dict[str, Any] = CNN, **more: Any) -> Captioner:
    torch.manual_seed(0)
    settings = {"width": 8, "layers": 2, "heads": 2, "ff_width": 12, "dropout": dropout, "max_words": 9} | more
    config = CaptionerConfig.model_validate({"kind": "captioner", "image_encoder": image_encoder, **settings})
    model = Captioner(config, VOCABULARY).double()
    for parameter in model.parameters():  # as they begin, all words are about equally probable
        nn.init.normal_(parameter, std=0.4)
    return model


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, VOCABULARY, (5, 7), generator=generator) * (torch.arange(7) < LENGTHS[:, None])
    return images, tokens


def assert_close(found: CaptionScores, expected: CaptionScores, atol: float = 1e-10) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


def test_agrees_with_the_steps_written_out_in_sums_hits_and_gradients() -> None:
    model, (images, tokens) = captioner().eval(), inputs()
    scores = model(images, tokens, LENGTHS, OWNERS)
    local_BMX = model.image_encoder(images).local
    for t, (length, owner) in enumerate(zip(LENGTHS[:4].tolist(), OWNERS[:4].tolist(), strict=True)):
        words = tokens[t, :length].tolist()
        forward, hits = surprise(model, local_BMX[owner], words, backward=False)
        backward, more = surprise(model, local_BMX[owner], words, backward=True)
        torch.testing.assert_close(scores.forward[t], forward, rtol=0, atol=1e-10)
        torch.testing.assert_close(scores.backward[t], backward, rtol=0, atol=1e-10)
        assert (scores.tokens[t], scores.hits[t]) == (length - 1, hits + more)
    assert (scores.forward[4], scores.backward[4], scores.tokens[4]) == (0, 0, 0), "one token predicts nothing"

    wanted = list(model.parameters())
    found = torch.autograd.grad(
        scores.forward[1] + 2 * scores.backward[1], wanted, retain_graph=True, allow_unused=True
    )
    words = tokens[1].tolist()
    steps = surprise(model, local_BMX[0], words, False)[0] + 2 * surprise(model, local_BMX[0], words, True)[0]
    expected = torch.autograd.grad(steps, wanted, allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_the_gradient_is_that_of_the_function() -> None:
    model, (images, tokens) = captioner(layers=1).eval(), inputs()
    features = model.read(images).features.detach()[:, :2].clone().requires_grad_()
    bias = model.output_bias.detach().clone().requires_grad_()

    def sums(features: Tensor, bias: Tensor) -> Tensor:
        model.output_bias = bias  # type: ignore[assignment]
        scores = model.score(Memory(features, None), tokens, LENGTHS, OWNERS)
        return torch.stack((scores.forward, scores.backward))

    del model.output_bias
    assert torch.autograd.gradcheck(sums, (features, bias))


@pytest.mark.parametrize("training", [False, True])
def test_padding_and_neighbours_have_no_influence(training: bool) -> None:
    model, (images, tokens) = captioner(0.3).train(training), inputs()
    image_keys, text_keys = 10 + torch.arange(3), 20 + torch.arange(5)
    scores = model(images, tokens, LENGTHS, OWNERS, image_keys, text_keys)
    garbage = tokens.masked_fill(torch.arange(7) >= LENGTHS[:, None], 10**9)
    assert_close(model(images, garbage, LENGTHS, OWNERS, image_keys, text_keys), scores)
    wider = torch.cat((tokens, torch.zeros(5, 2, dtype=torch.int64)), dim=1)
    assert_close(model(images, wider, LENGTHS, OWNERS, image_keys, text_keys), scores)
    for t, length in enumerate(LENGTHS):
        b = OWNERS[t : t + 1]
        alone = model(
            images[b], tokens[t : t + 1, :length], LENGTHS[t : t + 1], b * 0, image_keys[b], text_keys[t : t + 1]
        )
        assert_close(alone, CaptionScores(*(rows[t : t + 1] for rows in scores)))
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = model(images, tokens[order], LENGTHS[order], OWNERS[order], image_keys, text_keys[order])
    assert_close(shuffled, CaptionScores(*(rows[order] for rows in scores)))


@pytest.mark.parametrize("garbage", [1e30, float("nan")])
def test_what_stands_at_padded_regions_has_no_influence_and_gets_no_gradient(garbage: float) -> None:
    model = captioner(image_encoder=REGIONS).eval()
    _, tokens = inputs()
    regions = torch.randn(3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    model.train()
    keys = torch.arange(3)
    lost = model.image_encoder(regions, None, keys).is_padding
    assert lost.any(), "of regions that are left out, some should be"
    scores = model(regions, tokens, LENGTHS, OWNERS, keys)
    broken = regions.masked_fill(lost[..., None], garbage).requires_grad_()
    again = model(broken, tokens, LENGTHS, OWNERS, keys)
    assert_close(again, scores)
    gradient = torch.autograd.grad(again.forward.sum(), broken)[0]
    assert not gradient[lost].any() and gradient[~lost].isfinite().all() and gradient[~lost].any()


def test_no_direction_sees_the_token_that_it_predicts_nor_those_behind_it() -> None:
    """The last token read forward changes its own part of the sum alone, and so does the first one read backward."""
    model, (images, tokens) = captioner().eval(), inputs()
    memory = model.read(images)
    changed = tokens.clone()
    changed[1, 6] = tokens[1, 6] % (VOCABULARY - 1) + 1
    before, after = (model.score(memory, words, LENGTHS, OWNERS) for words in (tokens, changed))
    prefixes = [
        model.score(memory, words[1:2, :6], torch.tensor([6]), OWNERS[1:2]).forward for words in (tokens, changed)
    ]
    assert torch.equal(*prefixes)
    assert before.forward[1] != after.forward[1] and before.backward[1] != after.backward[1]
    assert torch.equal(before.forward[2:], after.forward[2:])


def test_a_longer_caption_is_cut_and_keeps_its_end() -> None:
    model, (images, tokens) = captioner(max_words=4).eval(), inputs()
    cut = tokens.clone()
    cut[1, 3], cut[3, 3] = tokens[1, 6], tokens[3, 4]
    expected = model(images, cut[:, :4], LENGTHS.clamp(max=4), OWNERS)
    assert_close(model(images, tokens, LENGTHS, OWNERS), expected, atol=0)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_micro_batches_give_the_same_numbers_and_gradients(size: int) -> None:
    model, (images, tokens) = captioner(0.3).train(), inputs()
    keys = 10 + torch.arange(3), 20 + torch.arange(5)
    results = []
    for micro_batch in (None, size):
        scores = model(images, tokens, LENGTHS, OWNERS, *keys, micro_batch=micro_batch)
        wanted = list(model.parameters())
        gradients = torch.autograd.grad((scores.forward + 2 * scores.backward).sum(), wanted)
        results.append([*scores, *gradients])
    for whole, pieces in zip(*results, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-10)


def test_an_encoder_that_normalises_by_its_batch_is_not_cut_into_pieces() -> None:
    regions = {"kind": "butd", "feature_dim": 5, "head": {"projection": "mlp"}}
    model, (_, tokens) = captioner(image_encoder=regions).train(), inputs()
    with pytest.raises(ValueError, match="normalises by its batch cannot run in micro-batches"):
        model(torch.randn(3, 6, 5), tokens, LENGTHS, OWNERS, micro_batch=1)


def test_every_layer_drops_by_key_and_no_two_alike() -> None:
    model, (images, tokens) = captioner(0.3).train(), inputs()
    keys = torch.arange(5)

    def run(keys: Tensor | None) -> Tensor:
        scores: CaptionScores = model(images, tokens, LENGTHS, OWNERS, None, keys)
        return torch.stack((scores.forward, scores.backward))[:, :4]

    assert torch.equal(run(keys), run(keys))
    assert (run(keys) - run(keys + 100)).abs().min() > 1e-6
    assert (run(None) - run(None)).abs().max() > 1e-6, "without keys it is torch's dropout"
    salts = [layer.salt for layer in model.modules() if hasattr(layer, "salt")]
    assert len(set(salts)) == len(salts) == 1 + 2 * 2 * 6


def test_a_worker_without_images_still_has_a_gradient_of_every_weight() -> None:
    model = captioner(0.3).train()
    none = torch.zeros(0, dtype=torch.int64)
    scores = model(
        torch.zeros(0, 3, 16, 16, dtype=torch.uint8), torch.zeros(0, 7, dtype=torch.int64), none, none, none, none
    )
    assert all(rows.shape == (0,) for rows in scores)
    gradients = torch.autograd.grad((scores.forward + scores.backward).sum(), list(model.parameters()))
    assert not any(gradient.any() for gradient in gradients)


def test_a_layer_that_makes_the_global_feature_alone_does_not_learn() -> None:
    model = captioner(image_encoder=REGIONS).train()
    _, tokens = inputs()
    scores = model(torch.randn(3, 6, 5, dtype=torch.float64), tokens, LENGTHS, OWNERS)
    (scores.forward + scores.backward).sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {"image_encoder.head.pooled_fc.weight", "image_encoder.head.pooled_fc.bias"}
    assert all(not parameter.requires_grad for name, parameter in model.named_parameters() if name in without)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_gives_about_the_same_and_sums_in_single(dtype: torch.dtype) -> None:
    model, (images, tokens) = captioner().eval(), inputs()
    expected = model(images, tokens, LENGTHS, OWNERS)
    model = model.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        scores = model(images, tokens, LENGTHS, OWNERS)
    assert scores.forward.dtype == scores.tokens.dtype == torch.float32
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for found, wanted in ((scores.forward, expected.forward), (scores.backward, expected.backward)):
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


def test_it_learns_a_caption_by_heart() -> None:
    torch.manual_seed(0)
    config = CaptionerConfig.model_validate(
        {"kind": "captioner", "image_encoder": CNN, "width": 16, "layers": 1, "heads": 2, "ff_width": 32}
    )
    model, (images, tokens) = Captioner(config, VOCABULARY).train(), inputs()
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        scores = model(images, tokens, LENGTHS, OWNERS)
        loss = (scores.forward + scores.backward).sum() / scores.tokens.sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    scores = model.eval()(images, tokens, LENGTHS, OWNERS)
    assert scores.hits.sum() >= 0.9 * 2 * scores.tokens.sum()


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be divided among 3 heads"):
        CaptionerConfig.model_validate({"kind": "captioner", "image_encoder": CNN, "width": 8, "heads": 3})
    config = CaptionerConfig.model_validate({"kind": "captioner", "image_encoder": CNN, "width": 8, "heads": 2})
    with pytest.raises(ValueError, match="has no word beside the padding"):
        Captioner(config, 1)
