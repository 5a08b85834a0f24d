"""What each slot sees: weights, where they lie on the image, and what elements are nearest to."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from setwise.pipelines import attention, recipe, set_health, vocabulary
from setwise.pipelines.embeddings import Embeddings
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.retrieval import Retrieval
from setwise.pipelines.trained_model import TrainedModel
from setwise.pipelines.word_pieces import SPECIAL, WordPieces
from setwise.platform import seeding

CAPTION = "a large red three above a zero"


def untrained(settings: Recipe, seed: int = 0) -> TrainedModel:
    words = vocabulary.collect([CAPTION, "two blue digits"])
    seeding.seed_everything(seed)
    retrieval = Retrieval(settings, len(words)).eval()
    return TrainedModel(retrieval, settings, words, {}, torch.device("cpu"))


def picture(height: int = 64, width: int = 96) -> Tensor:
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def oranges(painted: Tensor) -> Tensor:
    """How much redder than blue each pixel is: grey is 0."""
    return painted[0].float() - painted[2].float()


def middle_of_mass(weight: Tensor) -> tuple[float, float]:
    """Row and column, as shares of the height and the width."""
    share = weight / weight.sum()
    rows, columns = ((torch.arange(size) + 0.5) / size for size in weight.shape)
    return float(share.sum(1) @ rows), float(share.sum(0) @ columns)


def test_weights_are_the_last_iterations_averaged_over_heads_and_sum_to_one(tiny_recipe: Recipe) -> None:
    model = untrained(tiny_recipe)
    retriever, image = model.retrieval.retriever, picture()
    with torch.inference_mode():
        whole = retriever.encode_images(image[None], keep_attention=True)
    seen = attention.of_image(model, image)
    slots = tiny_recipe.model.set_prediction.num_slots
    assert seen.grid == (8, 12) and seen.names == [] and seen.weights.shape == (slots, 96) and slots > 1
    torch.testing.assert_close(seen.sets, whole.sets[0])
    for slot in range(slots):
        by_hand = sum(whole.attention[-1][0, head, slot] for head in range(whole.attention[-1].shape[1]))
        torch.testing.assert_close(seen.weights[slot], by_hand / by_hand.sum())
    torch.testing.assert_close(seen.weights.sum(1), torch.ones(slots))
    assert len(whole.attention) > 1 and not torch.allclose(whole.attention[0][0].mean(0), seen.weights, atol=1e-4)


def test_every_word_of_a_caption_has_its_weight(tiny_recipe: Recipe) -> None:
    model = untrained(tiny_recipe)
    seen = attention.of_caption(model, CAPTION + ", zebra")
    assert seen.names == ["<start>", *CAPTION.split(), "<unk>", "<end>"] and seen.grid is None
    assert seen.weights.shape[1] == len(seen.names)
    torch.testing.assert_close(seen.weights.sum(1), torch.ones(len(seen.weights)))
    torch.testing.assert_close(seen.sets, model.encode_captions([CAPTION + ", zebra"])[0])


def test_word_pieces_are_shown_as_pieces() -> None:
    words = WordPieces((*SPECIAL, "play", "##ing", "<b>"))
    assert attention.pieces(words, words.encode("Playing xyz")) == ["[CLS]", "play", "##ing", "[UNK]", "[SEP]"]


def test_regions_go_by_their_numbers() -> None:
    overrides = ["model.image_encoder.feature_dim=6", "model.embed_size=16", "model.text_encoder.word_dim=8"]
    model = untrained(recipe.load("coco_butd_bigru", [*overrides, "model.set_prediction.head_dim=4"]))
    features = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    seen = attention.of_image(model, features)
    assert seen.grid is None and seen.names == [str(number) for number in range(9)]
    torch.testing.assert_close(seen.weights.sum(1), torch.ones(len(seen.weights)))
    # Regions have no order: what stood last and now stands first has its weight with it.
    turned = attention.of_image(model, features.roll(1, 0))
    torch.testing.assert_close(turned.weights.roll(-1, 1), seen.weights, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("grid", [(2, 4), (4, 2), (7, 7), (1, 3)])
def test_orange_is_where_the_weight_is_and_nowhere_else(grid: tuple[int, int]) -> None:
    rows, columns = grid
    image = picture(56, 84)
    for cell in range(rows * columns):
        weights = torch.zeros(rows * columns)
        weights[cell] = 0.3
        orange = oranges(attention.overlay(image, weights, grid))
        row, column = middle_of_mass(orange)
        assert int(row * rows) == cell // columns and int(column * columns) == cell % columns
        height, width = 56 / rows, 84 / columns
        r, c = int((cell // columns + 0.5) * height), int((cell % columns + 0.5) * width)
        assert orange[r, c] >= 0.85 * orange.max() and orange.max() > 150
        others = torch.ones_like(orange, dtype=torch.bool)
        others[max(0, int(r - height)) : int(r + height) + 1, max(0, int(c - width)) : int(c + width) + 1] = False
        assert not orange[others].any()


def test_an_even_map_paints_all_of_an_image_the_same_and_a_black_one_too() -> None:
    orange = oranges(attention.overlay(torch.zeros(3, 32, 32, dtype=torch.uint8), torch.full((16,), 1 / 16), (4, 4)))
    assert orange.min() == orange.max() > 150


def test_what_stands_in_the_picture_is_where_the_map_says(tiny_recipe: Recipe) -> None:
    """Through the encoder, on an image that is not square: a bright patch changes attention at its own cells."""
    model = untrained(tiny_recipe)
    empty = torch.full((3, 64, 96), 40, dtype=torch.uint8)
    before = attention.of_image(model, empty)
    for row, column in ((0, 11), (7, 0), (2, 3), (6, 9)):
        marked = empty.clone()
        marked[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 255
        after = attention.of_image(model, marked)
        assert after.grid == (8, 12)
        change = (after.weights - before.weights).abs().sum(0)
        strongest = int(change.argmax())
        assert abs(strongest // 12 - row) <= 1 and abs(strongest % 12 - column) <= 1
        # and the overlay of that change marks the patch in the picture
        orange = oranges(attention.overlay(marked, change, after.grid))
        place = int(orange.argmax())
        assert abs(place // 96 - (8 * row + 4)) <= 12 and abs(place % 96 - (8 * column + 4)) <= 12


def test_the_nearest_item_has_the_nearest_element() -> None:
    random = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(3, 5, generator=random), torch.randn(20, 2, 5, generator=random)
    found = attention.nearest(queries, gallery)
    for query, (item, cosine) in zip(queries, found, strict=True):
        by_hand = [max(float(query @ element) for element in elements) for elements in gallery]
        assert item == by_hand.index(max(by_hand)) and cosine == pytest.approx(max(by_hand), abs=1e-6)


def embeddings(images: Tensor, texts: Tensor, owners: list[int]) -> Embeddings:
    return Embeddings(images, texts, torch.arange(len(images)), torch.arange(len(texts)), torch.tensor(owners))


def test_usage_counts_the_elements_that_hold_the_best_cosine_of_a_true_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "PAIRS", 4)  # several blocks
    random = torch.Generator().manual_seed(0)
    images, texts = (
        torch.nn.functional.normalize(torch.randn(n, k, 8, generator=random), dim=2) for n, k in ((5, 3), (11, 2))
    )
    sets = embeddings(images, texts, [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    count_images, count_texts = [0, 0, 0], [0, 0]
    for text, owner in zip(texts, sets.owners.tolist(), strict=True):
        _, k, j = max((float(images[owner, k] @ text[j]), k, j) for k in range(3) for j in range(2))
        count_images[k] += 1
        count_texts[j] += 1
    shares = attention.usage(sets)
    assert shares[0] == pytest.approx([count / 11 for count in count_images])
    assert shares[1] == pytest.approx([count / 11 for count in count_texts])
    for side, used in zip(shares, set_health.slot_usage(images, texts, sets.owners), strict=True):
        assert math.exp(-sum(share * math.log(share) for share in side if share)) == pytest.approx(used, rel=1e-5)
