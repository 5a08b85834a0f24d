"""The arithmetic of a plan: what fits where, and that only how a batch is cut is ever adapted to a machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from setwise.models.batch_loss import batch_loss
from setwise.models.set_prediction import SetEmbedding
from setwise.pipelines import datasets, estimate, hardware, optimizer, prepare, recipe
from setwise.pipelines.datasets import Source
from setwise.pipelines.digits import DigitsConfig
from setwise.pipelines.estimate import GIB
from setwise.pipelines.hardware import Preset
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.retrieval import Retrieval
from setwise.platform import checkpoint
from setwise.platform.errors import ConfigError, DataError
from tiny import images_source, regions_source, run, write_serially

NOWHERE = Path("/nowhere")
DIGITS = "digits_cnn_bigru"


def machine(memory_gib: float, **more: object) -> Preset:
    return Preset.model_validate(
        {
            "device": "a card",
            "count": 1,
            "memory_gib": memory_gib,
            "tflops": {"fp32": 10},
            "utilisation": {"convolutions": 0.5, "products": 0.5},
            **more,
        }
    )


def planned(settings: recipe.Recipe, preset: Preset | None = None) -> estimate.Estimate:
    return estimate.estimate(settings, estimate.sizes(settings, NOWHERE), preset)


def test_a_smaller_card_takes_smaller_pieces_and_no_smaller_batch() -> None:
    settings = recipe.load("coco_resnet152_bigru", ["train.precision=bf16"])
    of = estimate.sizes(settings, NOWHERE)
    pieces = [estimate.fitted(settings, of, machine(size)).train.micro_batch for size in (24, 12, 8, 6, 4.5)]
    assert pieces == [None, 64, 32, 16, 8]
    needs = [planned(settings.model_copy(update={"train": settings.train.model_copy(update={"micro_batch": m})}))
             for m in (64, 32, 16, 8, 1)]  # fmt: skip
    totals = [found.memory.total for found in needs]
    assert totals == sorted(totals, reverse=True)


def test_what_is_set_is_not_adapted() -> None:
    settings = recipe.load("coco_resnet152_bigru", ["train.micro_batch=4", "train.eval_batch_size=250"])
    assert estimate.fitted(settings, estimate.sizes(settings, NOWHERE), machine(2)) == settings


def test_a_recipe_written_out_with_its_defaults_is_adapted_as_well() -> None:
    """`micro_batch: null`, as `config show` and a run's config.yaml have it, insists on nothing."""
    settings = Recipe.model_validate(recipe.load("coco_resnet152_bigru").model_dump())
    fitted = estimate.fitted(settings, estimate.sizes(settings, NOWHERE), machine(8))
    assert fitted.train.micro_batch is not None


def test_a_backbone_that_normalises_by_its_batch_is_not_cut() -> None:
    settings = recipe.load("coco_resnet152_bigru", ["model.image_encoder.frozen_batch_norm=false"])
    assert estimate.fitted(settings, estimate.sizes(settings, NOWHERE), machine(5)).train.micro_batch is None


def test_images_are_embedded_in_smaller_batches_where_memory_is_short() -> None:
    settings = recipe.load("coco_resnet152_bigru")
    of = estimate.sizes(settings, NOWHERE)
    fitted = estimate.fitted(settings, of, machine(4))
    assert fitted.train.eval_batch_size == 64
    assert estimate.estimate(fitted, of, machine(4)).embedding_bytes < 0.9 * 4 * GIB


def test_trials_that_share_a_gpu_share_its_memory() -> None:
    settings = hardware.load_recipe("coco_resnet152_bigru", on="rtx3090x1")
    alone, shared = (estimate.settled(settings, "rtx3090x1", NOWHERE, sharing).train.micro_batch for sharing in (1, 2))
    assert alone is None and shared is not None and shared < settings.train.batch_size
    several = hardware.load_recipe("coco_resnet152_bigru", ["train.workers=2"], on="rtx3090x4")
    assert estimate.settled(several, "rtx3090x4", NOWHERE, 2) == estimate.settled(several, "rtx3090x4", NOWHERE)


def test_what_fits_in_no_way_is_refused_unless_the_recipe_insists(tmp_path: Path) -> None:
    on = tmp_path / "small.yaml"
    on.write_text(
        "device: a card\ncount: 1\nmemory_gib: 2\ntflops: {fp32: 1}\nutilisation: {convolutions: 1, products: 1}\n"
    )
    settings = hardware.load_recipe("coco_butd_bigru", on=str(on))
    with pytest.raises(ConfigError, match=r"does not fit '.*small\.yaml': a worker needs \d\.\d GiB, and 1\.8 of"):
        estimate.settled(settings, str(on), NOWHERE)
    insisting = hardware.load_recipe("coco_butd_bigru", ["train.micro_batch=8"], str(on))
    assert estimate.settled(insisting, str(on), NOWHERE).train.micro_batch == 8
    unfrozen = ["model.image_encoder.frozen_batch_norm=false"]
    with pytest.raises(ConfigError, match="so that it can run in pieces"):
        estimate.settled(hardware.load_recipe("coco_resnet152_bigru", unfrozen, "cpu"), "cpu", NOWHERE)


def test_memory_of_what_a_step_holds_is_known_exactly_but_for_activations() -> None:
    memory = planned(recipe.load("coco_butd_bigru")).memory
    weights = 4 * 45_330_596
    assert memory.weights == weights + 2 * 4 * 512 + 8  # and the statistics of one batch normalisation
    assert (memory.gradients, memory.moments) == (weights, 2 * weights)
    others = [[f"optimizer.{setting}"] for setting in ("amsgrad=true", "lookahead_steps=5", "kind=sgd")]
    remembered = [planned(recipe.load("coco_butd_bigru", other)).memory.moments for other in others]
    assert remembered == [3 * weights, 3 * weights, weights]
    assert memory.inputs == 200 * (4 * 36 * 2048 + 8 * 5 * 32)
    parallel = planned(recipe.load("coco_butd_bigru", ["train.workers=4"])).memory
    assert parallel.gradients == 2 * memory.gradients
    assert parallel.inputs == memory.inputs / 4
    assert parallel.loss == memory.loss, "every worker computes the loss of the whole batch"


def test_operations_of_the_loss_are_those_of_its_products() -> None:
    settings = recipe.load(DIGITS, ["model.embed_size=16", "loss.negatives=hardest"])
    images, captions, slots, width = 400, 2000, 4, 16
    generator = torch.Generator().manual_seed(0)
    sides = [
        torch.nn.functional.normalize(torch.randn(n, slots, width, generator=generator), dim=-1).requires_grad_()
        for n in (images, captions)
    ]
    owners = torch.arange(images).repeat_interleave(5)
    similarity = Retrieval(settings, 10).similarity

    def added(_: torch.Size, a: torch.Size, b: torch.Size, **__: object) -> int:
        return 2 * a[0] * a[1] * b[1]

    in_place = {torch.ops.aten.addmm_: added}  # which torch does not count
    inputs = estimate.sizes(settings, NOWHERE).inputs
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        embeddings = (SetEmbedding(sets, sets) for sets in sides)
        batch_loss(*embeddings, owners, similarity, settings.loss, "hardest").total.backward()  # type: ignore[no-untyped-call]
    assert estimate.loss_flops(settings, images, captions, inputs) == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_a_backbone_that_stands_still_takes_less_time() -> None:
    frozen, learning = (
        planned(recipe.load("coco_resnet152_bigru", [f"optimizer.frozen_backbone_epochs={n}"]), machine(40)).seconds
        for n in (120, 0)
    )
    assert frozen is not None and learning is not None
    assert 0.35 < frozen / learning < 0.55  # the backbone is 85 % of the operations, and does a third of them
    half_way = planned(recipe.load("coco_resnet152_bigru", ["optimizer.frozen_backbone_epochs=60"]), machine(40))
    assert half_way.seconds == pytest.approx((frozen + learning) / 2)


def test_time_is_that_of_starting_the_operations_where_they_are_small() -> None:
    settings = recipe.load(DIGITS)
    slow, fast = (planned(settings, machine(9, tflops={"fp32": speed})).seconds for speed in (0.01, 1000))
    free = planned(settings, machine(9, tflops={"fp32": 1000}, launch_us=0)).seconds
    twice = planned(settings, machine(9, tflops={"fp32": 1000}, launch_us=10)).seconds
    assert slow is not None and fast is not None and free is not None
    assert free < fast < slow
    assert twice == pytest.approx(2 * fast)


def test_pieces_cost_one_forward_pass_more() -> None:
    whole, pieces = (planned(recipe.load("coco_resnet152_bigru", [f"train.micro_batch={m}"])) for m in ("null", "16"))
    for name in ("image backbone", "image sets", "text encoder"):
        assert pieces.flops[name] == pytest.approx(whole.flops[name] * 4 / 3)
    assert pieces.flops["loss"] == whole.flops["loss"]


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_checkpoint_is_as_large_as_planned(tmp_path: Path, kind: str) -> None:
    settings = recipe.load(DIGITS, [f"optimizer.kind={kind}"])
    retrieval = Retrieval(settings, 57)
    made = optimizer.make(retrieval, settings.optimizer)
    sum(parameter.sum() for parameter in retrieval.parameters()).backward()  # type: ignore[union-attr]
    made.step()
    checkpoint.save(
        tmp_path / "epoch", retrieval.state_dict(), {"words": ["word"] * 57}, {"optimizer": made.state_dict()}
    )
    real = sum(file.stat().st_size for file in (tmp_path / "epoch").iterdir())
    assert planned(settings).checkpoint_bytes == pytest.approx(real, rel=0.05)


def test_sizes_are_those_of_the_prepared_data_where_there_is_some(store: Path) -> None:
    settings = recipe.load(DIGITS)
    prepared, published = estimate.sizes(settings, store), estimate.sizes(settings, NOWHERE)
    assert (prepared.images, prepared.inputs.captions, prepared.inputs.vocabulary) == (80, 5, 58)
    assert 10 < prepared.inputs.mean_tokens < prepared.inputs.longest_tokens < 25
    assert published.images == 6000 and "'digits' is not prepared" in published.source
    assert planned(settings).steps_per_epoch == 120


def test_published_sizes_of_the_embedded_data_are_its_defaults() -> None:
    default, published = DigitsConfig(), datasets.PUBLISHED["digits"]
    assert (published.train, published.val, published.test) == (default.train, default.val, default.test)


def test_published_sizes() -> None:
    published = {
        "coco_butd_bigru": 567,
        "f30k_butd_bigru": 227,
        "coco_resnet152_bigru": 886,
        "f30k_resnet152_bigru": 227,
        "coco_resnext101_bert": 886,
        "f30k_resnext101_bert": 454,
    }
    assert {name: planned(recipe.load(name)).steps_per_epoch for name in published} == published
    assert planned(recipe.load("coco_butd_bigru", ["train.drop_last=true"])).steps_per_epoch == 566


def test_a_data_set_that_nobody_knows_has_to_be_prepared() -> None:
    settings = recipe.load(DIGITS, ["data.name=mine"])
    with pytest.raises(DataError, match="data set 'mine' is not prepared"):
        estimate.sizes(settings, NOWHERE)


def prepared(store: Path, monkeypatch: pytest.MonkeyPatch, source: Source) -> Path:
    """The folder in which `source` is prepared."""
    monkeypatch.setattr(prepare, "_write_shards", write_serially)
    (store / "files").mkdir(exist_ok=True)
    return run(source, store / "data" / source.name / "prepared").folder


BUTD = ["data.name=coco_butd", "model.image_encoder.feature_dim=5"]


def test_regions_are_those_of_the_prepared_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a data set whose published features have 36."""
    prepared(tmp_path, monkeypatch, replace(regions_source(tmp_path / "files"), name="coco_butd"))
    of = estimate.sizes(recipe.load("coco_butd_bigru", BUTD), tmp_path)
    assert (of.images, of.inputs.regions, of.inputs.captions) == (20, 6, 2)
    assert estimate.sizes(recipe.load("coco_butd_bigru", BUTD), NOWHERE).inputs.regions == 36


def test_a_recipe_that_cannot_read_what_was_prepared_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(tmp_path, monkeypatch, replace(regions_source(tmp_path / "files"), name="coco_butd"))
    with pytest.raises(ConfigError, match=r"Set model\.image_encoder\.feature_dim=5"):
        estimate.sizes(recipe.load("coco_butd_bigru"), tmp_path)


def test_a_damaged_data_set_is_not_taken_for_one_that_is_not_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepared(tmp_path, monkeypatch, replace(regions_source(tmp_path / "files"), name="coco_butd"))
    (folder / "train-00000.parquet").unlink()
    with pytest.raises(DataError, match=r"train-00000\.parquet is missing"):
        estimate.sizes(recipe.load("coco_butd_bigru", BUTD), tmp_path)


def test_a_data_set_without_training_images_has_no_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = images_source(tmp_path / "files")
    prepared(tmp_path, monkeypatch, replace(source, rows=[row for row in source.rows if row.split == "test"]))
    with pytest.raises(DataError, match="'pictures' has no split train"):
        estimate.sizes(recipe.load(DIGITS, ["data.name=pictures"]), tmp_path)


def test_the_loss_of_cross_attention_is_counted_by_pairs() -> None:
    """What torch counts of a real step, forward, forward again and back, with no fragment missing."""
    settings = recipe.load("digits_cnn_bigru_caan")
    images, captions, width = 4, 20, settings.retriever.embed_size
    retrieval = Retrieval(settings, 10)
    inputs = estimate.sizes(settings, NOWHERE).inputs
    sets = [
        torch.nn.functional.normalize(torch.randn(number, fragments, width), dim=-1).requires_grad_()
        for number, fragments in ((images, 16), (captions, 16))
    ]
    with FlopCounterMode(display=False) as counter:
        retrieval.similarity(*sets).sum().backward()  # type: ignore[no-untyped-call]
    assert estimate.loss_flops(settings, images, captions, inputs) == pytest.approx(counter.get_total_flops(), rel=0.3)
