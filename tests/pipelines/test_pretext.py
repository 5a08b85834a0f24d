"""Captioning and object discovery as systems: their loss, what they are measured by, and real trainings of both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from setwise.models.captioning import CaptionScores
from setwise.models.slot_autoencoder import Errors
from setwise.pipelines import batches, digits, prepare, pretext, recipe, trained_model
from setwise.pipelines.batches import Split
from setwise.pipelines.digit_scenes import draw_scene, handwriting
from setwise.pipelines.digits import DigitsConfig
from setwise.pipelines.pretext import Captioning, ObjectDiscovery
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.segmentation import adjusted_rand_index
from setwise.platform.errors import ConfigError, DivergedError
from trainings import KilledError, digest, start, train_run, without_time

CAPTIONER = [
    *("model.image_encoder.channels=[8, 8]", "model.width=16", "model.ff_width=32", "train.batch_size=20"),
    "train.epochs=3",
]
SLOTS = [
    *("data.image_size=16", "model.slot_dim=8", "model.channels=8", "model.mlp_hidden=16", "model.broadcast_size=4"),
    *("train.batch_size=20", "train.epochs=3", "optimizer.lr=4e-3", "optimizer.warmup_steps=2"),
]
DRAWN_BY = DigitsConfig(train=80, val=30, test=50)


def captioner(*more: str) -> Recipe:
    return recipe.load("digits_cnn_captioner", [*CAPTIONER, *more])


def autoencoder(*more: str) -> Recipe:
    return recipe.load("digits_slot_autoencoder", [*SLOTS, *more])


def split_of(settings: Recipe, store: Path, name: str = "val") -> Split:
    prepared = prepare.open_prepared(settings.data.name, store)
    return Split(prepared, name, settings.data, batches.open_words(settings, prepared))


@pytest.mark.parametrize(
    ("settings", "run", "falls", "rises"),
    [
        (captioner(), "pretext-captioner", "train/total", "val/log_likelihood"),
        (autoencoder(), "pretext-slots", "train/total", "val/psnr"),
    ],
)
def test_a_killed_training_goes_on_as_if_it_never_was_and_improves(
    store: Path, settings: Recipe, run: str, falls: str, rises: str
) -> None:
    whole = start(store, run, settings)
    seen = train_run(store, whole, settings)
    assert [values["epoch"] for values in seen] == [1, 2, 3]
    assert seen[-1][falls] < seen[0][falls] and seen[-1][rises] > seen[0][rises]
    assert whole.best_checkpoint().name == "epoch_0003"

    killed = start(store, f"{run}-killed", settings)
    with pytest.raises(KilledError):
        train_run(store, killed, settings, stop_after=2)
    again = train_run(store, killed, settings)
    assert without_time(again) == without_time(seen)
    assert digest(killed.best_checkpoint()) == digest(whole.best_checkpoint())


def test_micro_batches_train_to_the_same_numbers(store: Path) -> None:
    for name, settings in (("captioner", captioner()), ("slots", autoencoder())):
        seen = []
        for micro_batch in (None, 7):
            train = settings.train.model_copy(update={"micro_batch": micro_batch, "epochs": 1})
            pieces = settings.model_copy(update={"train": train})
            seen.append(train_run(store, start(store, f"pretext-{name}-pieces-of-{micro_batch or 0}", pieces), pieces))
        for value in ("train/total", "train/gradient_norm"):
            assert seen[1][0][value] == pytest.approx(seen[0][0][value], rel=1e-4), (name, value)


def test_a_captioner_whose_encoder_normalises_by_its_batch_refuses_micro_batches() -> None:
    settings = Recipe.model_validate(
        {
            "model": {"kind": "captioner", "image_encoder": {"kind": "butd", "head": {"projection": "mlp"}}},
            "train": {"micro_batch": 8},
        }
    )
    with pytest.raises(ConfigError, match=r"train\.micro_batch would change the result"):
        trained_model.untrained(settings, 30)


def test_the_loss_of_captions_is_a_mean_over_tokens_and_not_over_captions() -> None:
    system = Captioning(captioner(), 30)
    rows = CaptionScores(*(torch.tensor(x) for x in ([6.0, 1.0], [3.0, 2.0], [3.0, 1.0], [0.0, 0.0])))
    parts = system.loss(None, rows, torch.zeros(2, dtype=torch.int64), 0.0)
    assert {name: float(part) for name, part in parts.items()} == {"forward": 1.75, "backward": 1.25, "total": 3.0}


def test_the_loss_of_images_is_the_mean_of_their_errors() -> None:
    system = ObjectDiscovery(autoencoder())
    parts = system.loss(Errors(torch.tensor([1.0, 2.0, 6.0])), None, torch.zeros(0, dtype=torch.int64), 0.0)
    assert {name: float(part) for name, part in parts.items()} == {"total": 3.0}


def test_captions_are_measured_by_the_mean_of_their_tokens_whatever_the_batch(store: Path) -> None:
    settings = captioner()
    split = split_of(settings, store)
    torch.manual_seed(0)
    system = Captioning(settings, len(split.words)).train()
    device = torch.device("cpu")
    found = system.validate(split, 7, device)
    assert system.training and found == pytest.approx(system.validate(split, 30, device), rel=1e-5)
    system.eval()
    batch = split.batch(list(range(len(split))))
    with torch.no_grad():
        scores = system.captioner(batch.images, batch.tokens, batch.lengths, batch.owners)
    tokens = 2 * float((batch.lengths - 1).sum())
    nats = float(scores.forward.sum() + scores.backward.sum()) / tokens
    assert found["val/log_likelihood"] == pytest.approx(-nats, rel=1e-5)
    assert found["val/perplexity"] == pytest.approx(np.exp(nats), rel=1e-4)
    assert found["val/token_accuracy"] == pytest.approx(100 * float(scores.hits.sum()) / tokens)
    assert nats == pytest.approx(np.log(len(split.words)), rel=0.1), "before it has learned, any word may come"


def test_images_are_measured_by_error_and_agreement_whatever_the_batch(store: Path) -> None:
    settings = autoencoder()
    split = split_of(settings, store)
    torch.manual_seed(0)
    system = ObjectDiscovery(settings).train()
    found = system.validate(split, 7, torch.device("cpu"))
    assert system.training and found == pytest.approx(system.validate(split, 30, torch.device("cpu")), rel=1e-5)
    system.eval()
    errors, agreement = [], []
    for index, image_id in enumerate(split.image_ids.tolist()):
        images = split.batch([index]).images
        with torch.no_grad():
            decomposition = system.autoencoder.decompose(images)
            errors.append(float(system.autoencoder(images).squared))
        labels = pretext.seen_objects(image_id, DRAWN_BY, settings)
        clusters = decomposition.masks[0].argmax(0).numpy()
        agreement.append(adjusted_rand_score(labels[labels > 0], clusters[labels > 0]))
    assert found["val/mse"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert found["val/psnr"] == pytest.approx(np.mean(10 * np.log10(4 / np.array(errors))), rel=1e-5)
    assert found["val/ari"] == pytest.approx(100 * np.mean(agreement), abs=1e-6)


def test_slots_that_find_the_objects_have_an_index_of_a_hundred(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = autoencoder("data.image_size=32", "model.broadcast_size=8")
    split, system = split_of(settings, store), ObjectDiscovery(settings)
    ids = iter(split.image_ids.tolist())
    decompose = system.autoencoder.decompose

    def knowing(images: torch.Tensor) -> object:
        labels = torch.stack([torch.from_numpy(pretext.seen_objects(next(ids), DRAWN_BY, settings)) for _ in images])
        masks = torch.nn.functional.one_hot((labels + 2) % 5, 5).permute(0, 3, 1, 2).float()
        return decompose(images)._replace(masks=masks)

    monkeypatch.setattr(system.autoencoder, "decompose", knowing)
    assert system.validate(split, 8, torch.device("cpu"))["val/ari"] == pytest.approx(100)


def test_a_data_set_whose_objects_are_not_known_has_no_index(store: Path) -> None:
    settings = autoencoder()
    split = split_of(settings, store)
    manifest = split.prepared.manifest
    for folder in (None, "/nowhere"):
        split.prepared = replace(
            split.prepared, manifest={**manifest, "source": {**manifest["source"], "folder": folder}}
        )
        assert set(ObjectDiscovery(settings).validate(split, 30, torch.device("cpu"))) == {"val/mse", "val/psnr"}


@pytest.mark.parametrize("settings", [captioner(), autoencoder()])
def test_weights_that_are_not_finite_are_told(settings: Recipe, store: Path) -> None:
    split = split_of(settings, store)
    system = trained_model.untrained(settings, len(split.words))
    torch.nn.init.constant_(next(iter(system.parameters())), torch.nan)
    with pytest.raises(DivergedError, match="not a finite number"):
        system.validate(split, 30, torch.device("cpu"))


@pytest.mark.parametrize("side", [64, 32, 96])
def test_a_mask_covers_the_strokes_of_each_digit_inside_its_box(side: int) -> None:
    config = DigitsConfig(train=5, val=5, test=5, image_size=96)
    mask = digits.object_mask(2_000_003, config)
    scene = draw_scene(handwriting(), "val", 3, 96, config.seed)
    assert mask.shape == (96, 96) and set(np.unique(mask)) == set(range(len(scene.digits) + 1))
    for number, digit in enumerate(scene.digits, start=1):
        rows, columns = np.nonzero(mask == number)
        x, y, width, height = digit.box
        assert x <= columns.min() and columns.max() < x + width and y <= rows.min() and rows.max() < y + height
        assert 0.1 < (mask == number).sum() / (width * height) < 0.9
    seen = pretext.seen_objects(
        2_000_003, config, autoencoder(f"data.image_size={side}", f"model.broadcast_size={side // 4}")
    )
    assert seen.shape == (side, side) and set(np.unique(seen)) == set(np.unique(mask))
    shares = [np.bincount(one.ravel()) / one.size for one in (mask, seen)]
    np.testing.assert_allclose(shares[1], shares[0], rtol=0.25)


def test_a_mask_is_where_the_image_has_the_colour_of_its_digit(store: Path) -> None:
    """The pixels that belong to one digit differ less from each other than from the ground."""
    settings = autoencoder("data.image_size=64", "model.broadcast_size=8")
    split = split_of(settings, store, "test")
    for index in range(10):
        pixels = split.batch([index]).images[0].double()
        mask = torch.from_numpy(digits.object_mask(int(split.image_ids[index]), DRAWN_BY))
        ground = pixels[:, mask == 0].median(1).values
        for number in range(1, int(mask.max()) + 1):
            own = pixels[:, mask == number]
            colour = own.median(1).values
            assert (own - colour[:, None]).norm(dim=0).mean() < 0.5 * (ground - colour).norm()


@pytest.mark.parametrize("image_id", [1_000_080, 2_000_030, 3_000_050, 999_999, 4_000_000, -1])
def test_an_image_of_no_scene_has_no_mask(image_id: int) -> None:
    with pytest.raises(ValueError, match="is none of this data set"):
        digits.object_mask(image_id, DRAWN_BY)


def test_the_index_is_that_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    for labels, clusters in [(2, 3), (4, 4), (1, 3), (3, 1), (1, 1), (9, 2)]:
        for pixels in (1, 2, 3, 10, 200):
            one, other = random.integers(labels, size=pixels), random.integers(clusters, size=pixels)
            expected = adjusted_rand_score(one, other)
            assert adjusted_rand_index(one, other) == pytest.approx(expected, abs=1e-12), (labels, clusters, pixels)
            assert adjusted_rand_index(one, (one * 7 + 3) % 11) == pytest.approx(1), "names of parts say nothing"
    alone = np.arange(6)
    assert adjusted_rand_index(alone, alone[::-1]) == adjusted_rand_score(alone, alone[::-1]) == 1


def test_the_index_of_partitions_of_different_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="two partitions of the same pixels"):
        adjusted_rand_index(np.zeros(3, int), np.zeros(4, int))


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("digits_cnn_captioner", "data.word_drop=0.2", "would teach a captioner words that were masked"),
        ("digits_slot_autoencoder", "data.image_size=48", "needs a model.broadcast_size that becomes 48"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(name: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe.load(name, [override])
