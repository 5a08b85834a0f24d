"""The train loop as a plain function: its numbers, and that stopping anywhere changes none of them."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from setwise.pipelines import prepare, recipe, train, trained_model
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.retrieval import Retrieval
from setwise.platform import checkpoint, run, seeding
from setwise.platform.errors import DataError, DivergedError
from trainings import TIMES, KilledError, digest, overrides_of, start, train_run, without_time

GOLDEN = Path(__file__).parents[1] / "golden" / "training_step.json"


def test_two_steps_give_the_golden_numbers(store: Path, tiny_recipe: Recipe) -> None:
    """One epoch of two steps from a fixed seed, so that an update lies between, against numbers in the repository."""
    settings = recipe.load("digits_cnn_bigru", [*overrides_of(tiny_recipe), "train.epochs=1", "train.batch_size=40"])
    values = train_run(store, start(store, "golden", settings), settings)[0]
    measured = {name: values[name] for name in sorted(values) if name.startswith("train/") and name not in TIMES}
    if os.environ.get("SETWISE_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(measured, indent=1) + "\n")
    expected = json.loads(GOLDEN.read_text())
    assert measured == pytest.approx(expected, rel=1e-4), (
        "The loss parts of two training steps have changed. If you only meant to refactor, this is a bug. If it is "
        "meant, write them anew with SETWISE_WRITE_GOLDEN=1 and put old and new numbers into the commit message."
    )


@pytest.mark.parametrize("stop_after", [1, 2])
def test_stopped_and_resumed_equals_trained_through(store: Path, tiny_recipe: Recipe, stop_after: int) -> None:
    through, stopped = (start(store, f"{name}-{stop_after}", tiny_recipe) for name in ("through", "stopped"))
    expected = train_run(store, through, tiny_recipe)
    with pytest.raises(KilledError):
        train_run(store, stopped, tiny_recipe, stop_after)
    resumed = train_run(store, stopped, tiny_recipe)

    assert without_time(resumed) == without_time(expected)
    assert [values["epoch"] for values in resumed] == [1, 2, 3]
    assert digest(stopped.checkpoints / "epoch_0003") == digest(through.checkpoints / "epoch_0003")
    steps = [event["step"] for event in run.read_events(stopped.events) if event["kind"] == "metrics"]
    assert steps == [1, 2, 3]


def test_an_epoch_tells_the_curves_that_people_look_for(store: Path, tiny_recipe: Recipe) -> None:
    settings = recipe.load("digits_cnn_bigru", [*overrides_of(tiny_recipe), "train.epochs=1"])
    values = train_run(store, start(store, "curves", settings), settings)[0]
    loss = ("i2t", "t2i", "mmd", "diversity", "total")
    assert {f"train/{name}" for name in (*loss, "gradient_norm", "lr", *(n.removeprefix("train/") for n in TIMES))} == {
        name for name in values if name.startswith("train/")
    }
    assert all(-32.3 < values[f"sets/{side}_log_circular_variance"] < 0 for side in ("image", "text"))
    slots = settings.model.set_prediction.num_slots
    assert all(1 <= values[f"sets/{side}_slot_usage"] <= slots for side in ("image", "text"))


def test_images_a_second_are_those_of_training_without_validation(
    store: Path, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that runs only in steps, 2 s each, and in validation: 80 images in 8 s, of which an epoch of 18 images
    a batch leaves out 8."""
    now = [0.0]
    real_loss, real_validate = train.global_loss, Retrieval.validate

    def global_loss(*arguments: Any) -> Any:
        now[0] += 2
        return real_loss(*arguments)

    def validate(*arguments: Any) -> Any:
        now[0] += 1000
        return real_validate(*arguments)

    monkeypatch.setattr(train, "global_loss", global_loss)
    monkeypatch.setattr(Retrieval, "validate", validate)
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: now[0]))
    for batch, drop_last, expected in ((20, True, 80 / 8), (18, True, 72 / 8), (18, False, 80 / 10)):
        changed = [f"train.batch_size={batch}", f"train.drop_last={json.dumps(drop_last)}", "train.epochs=2"]
        settings = recipe.load("digits_cnn_bigru", [*overrides_of(tiny_recipe), *changed])
        values = train_run(store, start(store, f"speed-{batch}-{drop_last}".lower(), settings), settings)
        assert [epoch["train/images_per_second"] for epoch in values] == [expected, expected]


def test_dropout_goes_on_where_it_was(store: Path, tiny_recipe: Recipe) -> None:
    """With dropout the random state matters: a resume that forgot it would part from the straight run."""
    settings = recipe.load("digits_cnn_bigru", [*overrides_of(tiny_recipe), "model.set_prediction.dropout=0.3"])
    through, stopped = (start(store, f"dropout-{name}", settings) for name in ("through", "stopped"))
    expected = train_run(store, through, settings)
    with pytest.raises(KilledError):
        train_run(store, stopped, settings, stop_after=1)
    torch.manual_seed(12345)
    assert without_time(train_run(store, stopped, settings)) == without_time(expected)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_taken(store: Path, tiny_recipe: Recipe) -> None:
    training = start(store, "damaged", tiny_recipe)
    with pytest.raises(KilledError):
        train_run(store, training, tiny_recipe, stop_after=2)
    weights = training.checkpoints / "epoch_0002" / checkpoint.WEIGHTS
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    epochs = [values["epoch"] for values in train_run(store, training, tiny_recipe)]
    assert epochs == [1, 2, 3]
    assert (training.checkpoints / "epoch_0002.damaged").is_dir()
    assert [e["step"] for e in run.read_events(training.events) if e["kind"] == "metrics"] == [1, 2, 3]


def test_a_run_does_not_go_on_with_other_data(
    store: Path, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = start(store, "other-data", tiny_recipe)
    with pytest.raises(KilledError):
        train_run(store, training, tiny_recipe, stop_after=1)
    prepared = prepare.open_prepared("digits", store)
    other = prepare.Prepared(prepared.folder, {**prepared.manifest, "fingerprint": "another"})
    monkeypatch.setattr(prepare, "open_prepared", lambda name, folder: other)
    with pytest.raises(DataError, match="is another"):
        train_run(store, training, tiny_recipe)


def test_killed_in_the_middle_it_ends_on_the_same_weights(store: Path, tiny_recipe: Recipe) -> None:
    """SIGKILL of a real process within the second epoch, then the same command again."""
    through, killed = (start(store, f"kill-{name}", tiny_recipe) for name in ("through", "killed"))
    train_run(store, through, tiny_recipe)
    code = f"""
import os, signal, torch
from pathlib import Path
from setwise.pipelines import train
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.workers import Worker
from setwise.platform.errors import DataError, DivergedError
from setwise.platform.run import Run
recipe = Recipe.model_validate_json({tiny_recipe.model_dump_json()!r})
real, calls = train.global_loss, []
def global_loss(*arguments):
    calls.append(1)
    if len(calls) == 6:  # four steps an epoch
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
train.global_loss = global_loss
train.train(recipe, Run(Path({str(killed.folder)!r})), Path({str(store)!r}), Worker(), print)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(path.name for path in killed.checkpoints.iterdir()) == ["epoch_0001"]
    train_run(store, killed, tiny_recipe)
    assert digest(killed.checkpoints / "epoch_0003") == digest(through.checkpoints / "epoch_0003")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_good(
    store: Path, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = start(store, "diverged", tiny_recipe)
    real = train.global_loss
    calls: list[int] = []

    def poisoned(*arguments: object) -> object:
        calls.append(1)
        parts = real(*arguments)  # type: ignore[arg-type]
        return parts | {"total": parts["total"] * math.nan} if len(calls) == 6 else parts

    monkeypatch.setattr(train, "global_loss", poisoned)
    with pytest.raises(DivergedError, match=r"step 5 \(epoch 2\).*gradient norm nan"):
        train_run(store, training, tiny_recipe)
    assert training.best_checkpoint().name == "epoch_0001"


def test_best_and_newest_checkpoints_are_kept_and_no_others(store: Path, tiny_recipe: Recipe) -> None:
    settings = recipe.load("digits_cnn_bigru", [*overrides_of(tiny_recipe), "train.epochs=5", "optimizer.lr=0.01"])
    training = start(store, "kept", settings)
    values = train_run(store, training, settings)
    best = max(values, key=lambda epoch: epoch["val/rsum"])
    kept = {path.name for path in training.checkpoints.iterdir()}
    assert kept == {"epoch_0004", "epoch_0005", f"epoch_{int(best['epoch']):04d}"}
    assert checkpoint.metadata(training.best_checkpoint())["history"][-1]["val/rsum"] == best["val/rsum"]


def test_it_learns(store: Path) -> None:
    """Forty steps on eighty images: the training loss falls, and the training images are told apart."""
    prepared = prepare.open_prepared("digits", store)
    assert prepared.manifest["splits"]["train"]["images"] == 80
    overrides = ["model.embed_size=32", "model.image_encoder.channels=[16, 16, 32]", "train.batch_size=20"]
    settings = recipe.load("digits_cnn_bigru", [*overrides, "train.epochs=10", "optimizer.lr=0.003"])
    values = train_run(store, start(store, "learns", settings), settings)
    assert values[-1]["train/total"] < 0.9 * values[0]["train/total"]
    assert values[-1]["val/rsum"] > 2 * 62  # chance among 30 images is about 62 (metrics.chance_rsum)


AUGMENTED = ["data.crop_scale=[0.5, 1]", "data.flip=true", "data.word_drop=0.2", "model.text_encoder.dropout=0.2"]


def test_augmented_training_stopped_and_resumed_equals_trained_through(store: Path, tiny_recipe: Recipe) -> None:
    settings = recipe.load("digits_cnn_bigru", [*overrides_of(tiny_recipe), *AUGMENTED, "train.drop_last=false"])
    through, stopped = (start(store, f"augmented-{name}", settings) for name in ("through", "stopped"))
    expected = train_run(store, through, settings)
    with pytest.raises(KilledError):
        train_run(store, stopped, settings, stop_after=1)
    assert without_time(train_run(store, stopped, settings)) == without_time(expected)


def test_micro_batches_train_the_same_model(store: Path, tiny_recipe: Recipe) -> None:
    curves = []
    for micro_batch in ("null", "7"):
        changed = [*overrides_of(tiny_recipe), *AUGMENTED, f"train.micro_batch={micro_batch}"]
        settings = recipe.load("digits_cnn_bigru", changed)
        curves.append(train_run(store, start(store, f"micro-{micro_batch}", settings), settings))
    for whole, pieces in zip(*curves, strict=True):
        names = [name for name in whole if name.startswith("train/") and name not in TIMES]
        assert [pieces[name] for name in names] == pytest.approx([whole[name] for name in names], rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_much_as_single_does(store: Path, tiny_recipe: Recipe, precision: str) -> None:
    curves = []
    for kind in ("fp32", precision):
        settings = recipe.load("digits_cnn_bigru", [*overrides_of(tiny_recipe), f"train.precision={kind}"])
        training = start(store, f"{precision}-{kind}", settings)
        curves.append(train_run(store, training, settings))
        dtypes = {tensor.dtype for tensor in checkpoint.weights(training.best_checkpoint()).values()}
        assert dtypes == {torch.float32}
    single, half = (curve[-1]["train/total"] for curve in curves)
    assert half == pytest.approx(single, rel=0.05) and half != single


def test_a_compiled_set_prediction_computes_the_same(store: Path, tiny_recipe: Recipe) -> None:
    curves = []
    for compiled in ("false", "true"):
        settings = recipe.load(
            "digits_cnn_bigru", [*overrides_of(tiny_recipe), f"train.compile={compiled}", "train.epochs=1"]
        )
        training = start(store, f"compiled-{compiled}", settings)
        curves.append(train_run(store, training, settings)[0])
        assert set(checkpoint.weights(training.best_checkpoint())) >= {"retriever.image_sets.slots"}
    names = [name for name in curves[0] if name.startswith("train/") and name not in TIMES]
    assert [curves[1][name] for name in names] == pytest.approx([curves[0][name] for name in names], rel=1e-4)


def test_a_backbone_stands_still_until_its_epoch(store: Path, tiny_recipe: Recipe) -> None:
    values = tiny_recipe.model_dump()
    values["model"]["image_encoder"] = {
        "kind": "grid", "architecture": "resnet18", "frozen_batch_norm": False, "head": {"dropout": 0}
    }  # fmt: skip
    values["optimizer"]["frozen_backbone_epochs"] = 1
    values["train"] |= {"epochs": 2, "batch_size": 40}
    settings = Recipe.model_validate(values)
    training = start(store, "standing", settings)
    train_run(store, training, settings)
    first, second = (checkpoint.weights(training.checkpoints / f"epoch_{epoch:04d}") for epoch in (1, 2))
    seeding.seed_everything(seeding.derive(0, "weights"))
    untrained = Retrieval(settings, len(checkpoint.metadata(training.best_checkpoint())["vocabulary"])).state_dict()
    backbone = "retriever.image_encoder.backbone.layer4.0.conv1.weight"
    head = "retriever.image_encoder.head.fc.weight"
    assert torch.equal(first[backbone], untrained[backbone]) and not torch.equal(second[backbone], first[backbone])
    assert not torch.equal(first[head], untrained[head])
    statistics = "retriever.image_encoder.backbone.bn1.running_mean"
    assert torch.equal(first[statistics], untrained[statistics])
    assert not torch.equal(second[statistics], first[statistics])


def test_bert_trains_from_a_folder_and_its_checkpoint_needs_the_folder_no_more(store: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "green", "three", "##s", "above", "left", "of"]
    folder = tmp_path / "bert"
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(pieces), max_position_embeddings=64, **sizes)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    values = recipe.load(
        "digits_cnn_bigru", ["model.embed_size=16", "train.batch_size=40", "train.epochs=1"]
    ).model_dump()
    values["model"]["text_encoder"] = {
        "kind": "bert", "weights": str(folder), "layers": 1, "width": 16, "heads": 2, "ff_width": 32, "max_tokens": 64
    }  # fmt: skip
    values["data"]["word_drop"] = 0.2
    settings = Recipe.model_validate(values)
    training = start(store, "bert", settings)
    assert math.isfinite(train_run(store, training, settings)[0]["train/total"])
    tags = [event["values"] for event in run.read_events(training.events) if event["kind"] == "tags"]
    assert tags[0]["setwise.text_weights"] == str(folder)
    shutil.rmtree(folder)
    model = trained_model.load(training.best_checkpoint())
    assert model.encode_captions(["a red three", "threes left of a"]).shape == (2, 4, 16)
    assert model.vocabulary.unknown("a blue threes") == ["blue"]


class Spoilt(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * math.inf


def spoil(monkeypatch: pytest.MonkeyPatch, steps: range) -> None:
    """Let the gradient overflow in some steps, the loss being finite."""
    real, calls = train.global_loss, []

    def spoilt(*arguments: object) -> object:
        calls.append(1)
        parts = real(*arguments)  # type: ignore[arg-type]
        return parts | {"total": Spoilt.apply(parts["total"])} if len(calls) - 1 in steps else parts

    monkeypatch.setattr(train, "global_loss", spoilt)


def test_a_gradient_that_overflows_in_fp16_is_left_out_and_spoils_no_number(
    store: Path, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, range(1, 3))
    settings = recipe.load("digits_cnn_bigru", [*overrides_of(tiny_recipe), "train.precision=fp16"])
    values = train_run(store, start(store, "overflow", settings), settings)
    assert all(math.isfinite(value) for epoch in values for value in epoch.values())
    assert values[0]["train/gradient_norm"] > 0 and values[-1]["train/total"] < values[0]["train/total"]


@pytest.mark.parametrize(("precision", "step"), [("fp16", 51), ("fp32", 1)])
def test_a_gradient_that_never_comes_back_stops_the_run(
    store: Path, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, precision: str, step: int
) -> None:
    spoil(monkeypatch, range(1, 10_000))
    changed = [f"train.precision={precision}", "train.batch_size=2"]
    settings = recipe.load("digits_cnn_bigru", [*overrides_of(tiny_recipe), *changed])
    with pytest.raises(DivergedError, match=rf"not finite any more at step {step} .*gradient norm (inf|nan)"):
        train_run(store, start(store, f"never-{precision}", settings), settings)


def test_a_checkpoint_that_another_version_wrote_is_said_to_be_one(store: Path, tiny_recipe: Recipe) -> None:
    training = start(store, "other-version", tiny_recipe)
    with pytest.raises(KilledError):
        train_run(store, training, tiny_recipe, stop_after=1)
    folder = training.best_checkpoint()
    weights = checkpoint.weights(folder)
    weights["retriever.old_name"] = weights.pop("retriever.image_sets.slots")
    other = folder.with_name("other")
    checkpoint.save(other, weights, checkpoint.metadata(folder), {})
    with pytest.raises(DataError, match="another version of setwise wrote it"):
        trained_model.load(other)
