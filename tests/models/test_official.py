"""Weights of the authors' code give the authors' embeddings, and say clearly when they cannot."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from setwise.models.retriever import SetRetriever, from_official

GOLDEN = Path(__file__).parent.parent / "golden" / "dive_model"


def golden(front: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State dict by the authors' names, and the other arrays."""
    arrays: dict[str, Tensor] = {}
    for path in sorted(GOLDEN.glob(f"{front}_*.npz")):
        with np.load(path, allow_pickle=False) as file:
            arrays |= {name: torch.from_numpy(file[name]) for name in file}
    weights = {name.removeprefix("sd."): value for name, value in arrays.items() if name.startswith("sd.")}
    return weights, {name: value for name, value in arrays.items() if not name.startswith("sd.")}


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_regions_and_words_agree_with_the_authors_code() -> None:
    weights, numbers = golden("butd_gru")
    model = from_official(weights, "official")
    images = model.encode_images(numbers["feats"], numbers["lens"])
    assert_close(images.sets, numbers["img"])
    assert_close(images.slots, numbers["img_slots"])
    texts = model.encode_texts(numbers["tokens"], numbers["token_lens"])
    assert_close(texts.sets, numbers["txt"])
    assert_close(texts.slots, numbers["txt_slots"])


@torch.inference_mode()
def test_feature_maps_agree_with_the_authors_code() -> None:
    weights, numbers = golden("cnn_gru")
    model = from_official(weights, "official")
    images = model.encode_images(numbers["grid"])
    assert_close(images.sets, numbers["img"])
    assert_close(images.slots, numbers["img_slots"])
    words = golden("butd_gru")[1]
    assert_close(model.encode_texts(words["tokens"], words["token_lens"]).sets, numbers["txt"])


@torch.inference_mode()
@pytest.mark.parametrize("pooling", ["max", "cls"])
def test_bert_features_agree_with_the_authors_code(pooling: Literal["max", "cls"]) -> None:
    weights, numbers = golden("bert")
    texts = from_official(weights, "official", text_pooling=pooling).encode_texts(
        numbers["hidden"], numbers["token_lens"]
    )
    assert_close(texts.sets, numbers[f"txt_{pooling}"])
    assert_close(texts.slots, numbers[f"txt_slots_{pooling}"])


@torch.inference_mode()
def test_exact_padding_agrees_where_nothing_is_padded_and_only_there() -> None:
    weights, numbers = golden("butd_gru")
    model = from_official(weights, "exact")
    for found, expected, lengths, longest in (
        (model.encode_images(numbers["feats"], numbers["lens"]).sets, numbers["img"], numbers["lens"], 9),
        (model.encode_texts(numbers["tokens"], numbers["token_lens"]).sets, numbers["txt"], numbers["token_lens"], 11),
    ):
        whole = lengths == longest
        assert whole.any() and not whole.all()
        assert_close(found[whole], expected[whole])
        assert (found - expected).abs().amax((1, 2))[~whole].min() > 1e-3


@torch.inference_mode()
def test_exact_embeddings_depend_on_no_neighbour() -> None:
    weights, numbers = golden("butd_gru")
    model = from_official(weights, "exact")
    texts = model.encode_texts(numbers["tokens"], numbers["token_lens"]).sets
    images = model.encode_images(numbers["feats"], numbers["lens"]).sets
    for row, length in enumerate(numbers["token_lens"].tolist()):
        alone = model.encode_texts(numbers["tokens"][row : row + 1, :length], numbers["token_lens"][row : row + 1])
        assert_close(alone.sets[0], texts[row])
    for row, length in enumerate(numbers["lens"].tolist()):
        assert_close(model.encode_images(numbers["feats"][row : row + 1, :length]).sets[0], images[row])


def weights_of(front: str = "butd_gru") -> dict[str, Tensor]:
    return golden(front)[0]


def embeddings(model: SetRetriever) -> Tensor:
    numbers = golden("butd_gru")[1]
    with torch.inference_mode():
        return model.encode_images(numbers["feats"], numbers["lens"]).sets


def test_saved_from_several_gpus_or_with_every_block_it_is_the_same() -> None:
    expected = embeddings(from_official(weights_of()))
    assert torch.equal(embeddings(from_official({f"module.{name}": w for name, w in weights_of().items()})), expected)
    repeated = weights_of()
    for name in list(repeated):
        for block in range(1, 3):
            if ".layers.0." in name:
                repeated[name.replace(".layers.0.", f".layers.{block}.")] = repeated[name].clone()
    repeated["img_enc.mlp.bn.bn.num_batches_tracked"] = torch.tensor(7)
    model = from_official(repeated)
    assert model.config.set_prediction.iterations == 3
    assert torch.equal(embeddings(model), embeddings(from_official(weights_of(), iterations=3)))


def test_one_side_alone_answers_for_itself_and_says_what_is_missing() -> None:
    both, numbers = golden("butd_gru")
    images = from_official({name: weight for name, weight in both.items() if name.startswith("img_enc.")})
    assert torch.equal(embeddings(images), embeddings(from_official(both)))
    with pytest.raises(ValueError, match="no text side"):
        images.encode_texts(numbers["tokens"], numbers["token_lens"])
    bare = {name.removeprefix("img_enc."): weight for name, weight in both.items() if name.startswith("img_enc.")}
    assert torch.equal(embeddings(from_official(bare)), embeddings(images))


def test_float64_weights_give_a_float64_model() -> None:
    model = from_official({name: weight.double() for name, weight in weights_of().items()})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def without(name: str) -> dict[str, Tensor]:
    weights = weights_of()
    del weights[name]
    return weights


def changed(name: str, value: Tensor) -> dict[str, Tensor]:
    return weights_of() | {name: value}


UNTIED = "img_enc.spm.agg_block.layers.1.0.fn.to_q.weight"


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: {}, {}, "no set prediction among these weights"),
        (lambda: {"conv1.weight": torch.zeros(1)}, {}, "no set prediction"),
        (lambda: without("img_enc.mlp.fc2.weight"), {}, r"missing: image_encoder\.head\.mlp\.fc2\.weight"),
        (lambda: without("txt_enc.rnn.bias_hh_l0_reverse"), {}, r"missing: text_encoder\.gru\.bias_hh_l0_reverse"),
        (
            lambda: changed("img_enc.fc.bias", torch.zeros(3)),
            {},
            r"img_enc\.fc\.bias has shape \(3,\), expected \(48,\)",
        ),
        (lambda: changed(UNTIED, torch.zeros(2048, 48)), {}, "share nothing"),
        (
            lambda: changed("img_enc.mlp.fc1.weight", torch.zeros(48, 24)),
            {},
            r"has shape \(48, 24\), expected \(24, 48\)",
        ),
        (lambda: changed("img_enc.spm.fc.weight", torch.zeros(1024, 48)), {}, "an option that is not available"),
        (lambda: changed("txt_enc.linear2.weight", torch.zeros(1)), {}, "sep_bert_fc, which is not available"),
        (weights_of, {"heads": 3}, "2048 cannot be divided among 3 heads"),
    ],
)
def test_what_cannot_be_loaded_is_refused_by_name(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_official(make(), **options)


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(*shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def block(side: str, width: int, read: int) -> dict[str, tuple[int, ...]]:
    layer = f"{side}.spm.agg_block.layers.0."
    return {
        f"{side}.spm.residual_norm.weight": (width,),
        f"{side}.spm.residual_norm.bias": (width,),
        f"{side}.spm.agg_block.latents": (3, width),
        **{f"{layer}0.fn.to_{name}.weight": (16, size) for name, size in (("q", width), ("k", read), ("v", read))},
        f"{layer}0.fn.to_out.0.weight": (width, 16),
        f"{layer}0.fn.to_out.0.bias": (width,),
        **{
            f"{layer}0.norm{name}.{leaf}": (size,)
            for leaf in ("weight", "bias")
            for name, size in (("", width), ("_context", read))
        },
        **{f"{layer}2.norm.{leaf}": (width,) for leaf in ("weight", "bias")},
        f"{layer}2.fn.net.0.weight": (2 * width, width),
        f"{layer}2.fn.net.0.bias": (2 * width,),
        f"{layer}2.fn.net.3.weight": (width, 2 * width),
        f"{layer}2.fn.net.3.bias": (width,),
        **{f"{side}.spm.agg_block.last_layer.0.{leaf}": (width,) for leaf in ("weight", "bias")},
    }


def test_other_options_are_read_off_the_tensors() -> None:
    """Linear features to the slots, a global feature of its own, half-width directions, GRU states, three slots."""
    shapes = {
        "img_enc.fc.weight": (8, 20),
        "img_enc.fc.bias": (8,),
        "img_enc.residual_last_fc.weight": (8, 20),
        "img_enc.residual_last_fc.bias": (8,),
        **block("img_enc", 8, 8),
        "txt_enc.embed.weight": (11, 6),
        **{
            f"txt_enc.rnn.{w}_l0{d}": s
            for d in ("", "_reverse")
            for w, s in (("weight_ih", (12, 6)), ("weight_hh", (12, 4)), ("bias_ih", (12,)), ("bias_hh", (12,)))
        },
        **block("txt_enc", 8, 8),
    }
    model = from_official(random_weights(shapes), heads=2, text_positions="none")
    config = model.config
    assert config.image_encoder.kind == "butd" and config.image_encoder.head.projection == "linear"
    assert config.image_encoder.head.global_feature == "linear" and config.image_encoder.feature_dim == 20
    assert config.text_encoder.kind == "bigru" and config.text_encoder.directions == "concatenated"
    assert config.text_encoder.local_features == "states"
    prediction = config.set_prediction
    assert (prediction.num_slots, prediction.heads, prediction.head_dim, prediction.ff_mult) == (3, 2, 8, 2)
    assert model.encode_images(torch.randn(2, 5, 20)).sets.shape == (2, 3, 8)
    assert model.encode_texts(torch.ones(2, 4, dtype=torch.int64), torch.tensor([4, 2])).sets.shape == (2, 3, 8)


def test_a_backbone_among_the_weights_is_recognised_and_loaded() -> None:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    backbone = {f"img_enc.cnn.{n}": w for n, w in resnet18().state_dict().items() if not n.startswith("fc.")}
    head = random_weights({"img_enc.fc.weight": (8, 512), "img_enc.fc.bias": (8,), **block("img_enc", 8, 8)})
    model = from_official(backbone | head, heads=2)
    assert model.config.image_encoder.kind == "grid" and model.config.image_encoder.architecture == "resnet18"
    loaded = dict(model.image_encoder.named_parameters())
    assert torch.equal(loaded["backbone.conv1.weight"], backbone["img_enc.cnn.conv1.weight"])
    assert model.encode_images(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).sets.shape == (2, 3, 8)


def test_what_the_weights_have_not_is_not_made_up() -> None:
    """Without a backbone, pixels are refused; without BERT, tokens are; feature maps and hidden states are taken."""
    images = from_official(weights_of("cnn_gru"), image_positions="sine")
    assert images.encode_images(golden("cnn_gru")[1]["grid"]).sets.shape == (3, 4, 48)
    with pytest.raises(ValueError, match="these weights have no backbone"):
        images.encode_images(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    texts = from_official(weights_of("bert"), image_positions="sine")
    with pytest.raises(ValueError, match="these weights have no bert"):
        texts.encode_texts(torch.zeros(2, 4, dtype=torch.int64), torch.tensor([4, 2]))


def test_sampled_slots_are_the_same_each_time() -> None:
    weights = weights_of()
    for side in ("img_enc", "txt_enc"):
        block_name = f"{side}.spm.agg_block"
        del weights[f"{block_name}.latents"]
        weights[f"{block_name}.slots_mu"] = torch.full((1, 1, 48), 0.1)
        weights[f"{block_name}.slots_log_sigma"] = torch.zeros(1, 1, 48)
    first, second = (from_official(weights, num_slots=3) for _ in range(2))
    assert embeddings(first).shape == (4, 3, 48) and torch.equal(embeddings(first), embeddings(second))
