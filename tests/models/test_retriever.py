"""The whole model: what it returns, what has no influence on it, and that it can learn."""

from typing import Any

import pytest
import torch
from torch import Tensor

from setwise.models.batch_loss import batch_loss
from setwise.models.config import ModelConfig
from setwise.models.loss_config import Negatives, SimilarityConfig, TripletConfig
from setwise.models.retriever import SetRetriever
from setwise.models.similarity import Similarity

LENGTHS = torch.tensor([3, 7, 5, 7, 2, 6])


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 40, (6, 7), generator=generator) * (torch.arange(7) < LENGTHS[:, None])
    return images, tokens


def retriever(dropout: float = 0.1, **prediction: Any) -> SetRetriever:
    torch.manual_seed(0)
    config = ModelConfig.model_validate(
        {
            "embed_size": 16,
            "image_encoder": {"kind": "cnn", "channels": [8, 16, 24]},
            "text_encoder": {"kind": "bigru", "word_dim": 12, "dropout": dropout},
            "set_prediction": {"num_slots": 3, "heads": 2, "head_dim": 8, "dropout": dropout} | prediction,
        }
    )
    return SetRetriever(config, vocabulary_size=40)


def test_both_sides_give_unit_sets_of_the_same_shape_and_forward_gives_both() -> None:
    model, (images, tokens) = retriever().eval(), inputs()
    image_sets, text_sets = model(images, tokens, LENGTHS)
    for embedding in (image_sets, text_sets):
        assert embedding.sets.shape == embedding.slots.shape == (6, 3, 16)
        torch.testing.assert_close(embedding.sets.norm(dim=-1), torch.ones(6, 3))
    assert torch.equal(image_sets.sets, model.encode_images(images).sets)
    assert torch.equal(text_sets.sets, model.encode_texts(tokens, LENGTHS).sets)


def test_padding_and_neighbours_have_no_influence() -> None:
    model, (images, tokens) = retriever().double().eval(), inputs()
    image_sets, text_sets = model(images, tokens, LENGTHS)
    for b, length in enumerate(LENGTHS):
        image = model.encode_images(images[b : b + 1]).sets
        torch.testing.assert_close(image, image_sets.sets[b : b + 1], rtol=0, atol=1e-6)
        text = model.encode_texts(tokens[b : b + 1, :length], length[None]).sets
        torch.testing.assert_close(text, text_sets.sets[b : b + 1], rtol=0, atol=1e-6)


def test_each_side_has_its_own_position_code() -> None:
    plain, (images, tokens) = retriever(text_positions="none").eval(), inputs()
    for setting, changed in (("text_positions", 1), ("image_positions", 0)):
        settings: dict[str, Any] = {"text_positions": "none", setting: "sine"}
        model = retriever(**settings).eval()
        differs = [
            not torch.equal(with_code.sets, without.sets)
            for with_code, without in zip(model(images, tokens, LENGTHS), plain(images, tokens, LENGTHS), strict=True)
        ]
        assert differs == [side == changed for side in (0, 1)]


def test_attention_maps_cover_the_grid_and_the_words() -> None:
    model, (images, tokens) = retriever().eval(), inputs()
    image_maps = model.encode_images(images, keep_attention=True).attention
    text_maps = model.encode_texts(tokens, LENGTHS, keep_attention=True).attention
    assert [tuple(maps.shape) for maps in image_maps] == [(6, 2, 3, 16)] * 4
    assert [tuple(maps.shape) for maps in text_maps] == [(6, 2, 3, 7)] * 4


def test_the_loss_reaches_every_parameter() -> None:
    model, (images, tokens) = retriever(), inputs()
    image_sets, text_sets = model(images, tokens, LENGTHS)
    similarity = Similarity(SimilarityConfig())
    batch_loss(image_sets, text_sets, torch.arange(6), similarity, TripletConfig(), "all").total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_it_learns_to_tell_six_pairs_apart() -> None:
    model, (images, tokens) = retriever(dropout=0), inputs()
    similarity, config = Similarity(SimilarityConfig()), TripletConfig()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(60):
        image_sets, text_sets = model(images, tokens, LENGTHS)
        negatives: Negatives = "hardest" if step >= 30 else "all"
        parts = batch_loss(image_sets, text_sets, torch.arange(6), similarity, config, negatives)
        optimizer.zero_grad()
        parts.total.backward()
        optimizer.step()
    scores = similarity(image_sets.sets, text_sets.sets)
    assert scores.argmax(1).tolist() == scores.argmax(0).tolist() == list(range(6))
    assert parts.i2t + parts.t2i < 0.1


def pairs_of_encoders() -> list[dict[str, Any]]:
    bigru = {"kind": "bigru", "word_dim": 12, "dropout": 0.3}
    bert = {"kind": "bert", "layers": 1, "width": 16, "heads": 2, "ff_width": 32, "max_tokens": 64, "dropout": 0.3}
    cnn = {"kind": "cnn", "channels": [8, 16]}
    regions = {"kind": "butd", "feature_dim": 10, "head": {"projection": "linear"}}
    return [{"image_encoder": image, "text_encoder": text} for image in (cnn, regions) for text in (bigru, bert)]


@pytest.mark.parametrize("encoders", pairs_of_encoders())
def test_in_training_a_sample_depends_on_its_key_and_not_on_its_batch(encoders: dict[str, Any]) -> None:
    """With dropout, region drop and sampled slots at work: a part of the batch, padded less, gives the same sets."""
    torch.manual_seed(0)
    prediction = {"heads": 2, "head_dim": 8, "slots": "sampled", "dropout": 0.3}
    config = ModelConfig.model_validate({"embed_size": 16, "set_prediction": prediction, **encoders})
    model = SetRetriever(config, vocabulary_size=40).double().train()
    images, tokens = inputs()
    if encoders["image_encoder"]["kind"] == "butd":
        images = torch.randn(6, 7, 10, dtype=torch.float64)
    keys = torch.arange(6) * 1000
    chosen = torch.tensor([4, 0, 2])
    whole = model(images, tokens, LENGTHS, LENGTHS if images.dim() == 3 else None, keys, keys + 1)
    lengths = LENGTHS[chosen]
    longest = int(lengths.max())
    part = model(
        images[chosen, :longest] if images.dim() == 3 else images[chosen],
        tokens[chosen, :longest],
        lengths,
        lengths if images.dim() == 3 else None,
        keys[chosen],
        keys[chosen] + 1,
    )
    for of_whole, of_part in zip(whole, part, strict=True):
        torch.testing.assert_close(of_whole.sets[chosen], of_part.sets, rtol=0, atol=1e-10)
    other = model(images, tokens, LENGTHS, LENGTHS if images.dim() == 3 else None, keys + 7, keys + 8)
    assert all((a.sets - b.sets).abs().amax((1, 2)).min() > 1e-4 for a, b in zip(whole, other, strict=True))
