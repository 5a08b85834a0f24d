"""Presets: one layer of the configuration that says how a recipe is computed, and never what."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from setwise.pipelines import hardware, recipe
from setwise.pipelines.recipe import TrainConfig
from setwise.platform import cluster
from setwise.platform.cluster import Capacity, Node
from setwise.platform.errors import ConfigError, UnreachableError

MACHINE = """\
device: a card
count: 2
memory_gib: 10
tflops: {fp32: 10, fp16: 80}
utilisation: {convolutions: 0.5, products: 0.25}
"""


def preset_file(folder: Path, text: str) -> str:
    file = folder / "mine.yaml"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize("name", hardware.names())
def test_every_shipped_preset_uses_what_its_machine_has(name: str) -> None:
    preset, layer = hardware.load(name)
    train = layer.values["train"]
    assert train["workers"] == preset.count
    assert train["precision"] == ("bf16" if preset.tflops.fp16 else "fp32")
    assert preset.tflops.fp32 <= (preset.tflops.bf16 or 0)


@pytest.mark.parametrize("on", hardware.names())
@pytest.mark.parametrize("name", recipe.names())
def test_a_preset_changes_nothing_but_how_a_recipe_is_computed(name: str, on: str) -> None:
    plain, there = hardware.load_recipe(name), hardware.load_recipe(name, on=on)
    assert plain == recipe.load(name)
    how = {"train": {*hardware.HOW, "accelerators"}}
    assert there.model_dump(exclude=how) == plain.model_dump(exclude=how)
    assert there.train.batch_size == plain.train.batch_size


def test_a_preset_lies_between_the_file_and_the_overrides() -> None:
    assert recipe.load("coco_butd_bigru").train.precision == "fp16"
    assert hardware.load_recipe("coco_butd_bigru", on="a100x8").train.precision == "bf16"
    assert hardware.load_recipe("coco_butd_bigru", ["train.precision=fp32"], "a100x8").train.precision == "fp32"
    assert hardware.load_recipe("coco_butd_bigru", ["train.precision=fp32"], "a100x8").train.workers == 8


@pytest.mark.parametrize("on", hardware.names())
def test_a_preset_asks_for_its_own_kind_of_machine_and_the_command_line_wins(on: str, tmp_path: Path) -> None:
    preset, _ = hardware.load(on)
    file = tmp_path / "mine.yaml"
    file.write_text("extends: digits_cnn_bigru\ntrain: {accelerators: [T4, L4, L40S]}\n")
    assert hardware.load_recipe(str(file)).train.accelerators == ("T4", "L4", "L40S")
    assert hardware.load_recipe(str(file), on=on).train.accelerators == preset.accelerators
    one = hardware.load_recipe(str(file), ["train.accelerators=[A100]"], on)
    assert one.train.accelerators == ("A100",)
    assert hardware.load_recipe(str(file), ["train.accelerators=[]"], on).train.accelerators == ()


def test_labels_that_a_preset_lays_over_a_recipe_stand_where_the_preset_names_them(tmp_path: Path) -> None:
    on = preset_file(tmp_path, MACHINE + "accelerators: [A100, A100-80G]\n")
    _, layer = hardware.load(on)
    assert str(layer.places["train", "accelerators"]) == f"{on}:6:1"
    assert str(layer.places["train", "accelerators", 1]) == f"{on}:6:22"


def test_a_study_takes_the_labels_of_a_preset_as_well() -> None:
    from setwise.sweeps import space

    assert space.load("digits", on="rtx3090x1")[1].train.accelerators == ("RTX3090", "GeForce-RTX-3090")


def test_a_preset_may_set_an_elastic_range(tmp_path: Path) -> None:
    on = preset_file(tmp_path, MACHINE + "settings: {train: {workers: 2, min_workers: 1}}\n")
    assert hardware.load_recipe("digits_cnn_bigru", on=on).train.min_workers == 1


def test_a_preset_may_be_a_file(tmp_path: Path) -> None:
    on = preset_file(tmp_path, MACHINE + "settings: {train: {workers: 2, micro_batch: 7}}\n")
    loaded = hardware.load_recipe("coco_butd_bigru", on=on)
    assert (loaded.train.workers, loaded.train.micro_batch, loaded.train.precision) == (2, 7, "fp16")


def test_an_unknown_preset_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no preset is called 'rtx3090x2'\. Did you mean 'rtx3090x"):
        hardware.load_recipe("coco_butd_bigru", on="rtx3090x2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MACHINE + "settings:\n  train: {batch_size: 64}\n", ":7:11: 'train.batch_size': a preset says how"),
        (MACHINE + "settings:\n  loss: {margin: 0.1}\n", ":7:3: 'loss': a preset says how"),
        (MACHINE + "settings:\n  train: {accelerators: [A100]}\n", ":7:11: 'train.accelerators': a preset says how"),
        (MACHINE + "accelerators: [[A100]]\n", ":6:16: accelerators.0: input should be a valid string"),
        (MACHINE + "settings: 3\n", ":6:1: 'settings': expected settings of train, found 3"),
        (MACHINE + "settings:\n  train: {workers: many}\n", ":7:11: train.workers: input should be a valid integer"),
        (MACHINE + "memory: 3\n", ":6:1: 'memory' is not a setting. Did you mean 'memory_gib'?"),
        (MACHINE.replace("count: 2", "count: 0"), ":2:1: count: input should be greater than or equal to 1"),
    ],
)
def test_a_mistake_in_a_preset_is_told_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    on = preset_file(tmp_path, text)
    with pytest.raises(ConfigError, match=re.escape(f"{on}{message}")):
        hardware.load_recipe("digits_cnn_bigru", on=on)


def test_a_section_of_a_preset_without_settings_sets_nothing(tmp_path: Path) -> None:
    on = preset_file(tmp_path, MACHINE + "settings: {train: {}}\n")
    assert hardware.load_recipe("digits_cnn_bigru", on=on) == recipe.load("digits_cnn_bigru")


def test_speed_is_the_peak_times_what_is_reached_of_it(tmp_path: Path) -> None:
    preset, _ = hardware.load(preset_file(tmp_path, MACHINE))
    assert preset.speed("fp16") == 80e12 * 0.25
    assert preset.speed("fp16", convolutions=True) == 80e12 * 0.5
    assert preset.speed("bf16") == 10e12 * 0.25, "a card without it computes in fp32"
    assert preset.speed("fp32", convolutions=True) == 10e12 * 0.5
    a100, _ = hardware.load("a100x2")
    assert a100.speed("fp32", convolutions=True) == 156e12 * 0.3, "torch takes tf32 for convolutions, not for products"
    assert a100.speed("fp32") == 19.5e12 * 0.45


def test_a_mistake_is_told_without_loading_torch() -> None:
    load = "from setwise.pipelines import hardware; hardware.load_recipe('f30k_butd_bigru', on='cpu')"
    code = f"import sys; {load}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


FOUR = Capacity(4, 32, False)
CPUS = Capacity(0, 32, False)
GROWING = Capacity(0, 0, True)
A100 = ("A100",)


@pytest.mark.parametrize(
    ("train", "found", "gpus"),
    [
        (TrainConfig(workers=4), FOUR, True),
        (TrainConfig(workers=4, accelerators=A100), FOUR, True),
        (TrainConfig(workers=8, min_workers=2), FOUR, True),
        (TrainConfig(workers=4), CPUS, False),
        (TrainConfig(workers=40, min_workers=20), CPUS, False),
        (TrainConfig(workers=8, accelerators=A100), GROWING, True),
        (TrainConfig(workers=8), Capacity(4, 32, True), True),
        (TrainConfig(workers=40), Capacity(0, 4, True), False),
    ],
)
def test_a_training_runs_on_gpus_where_there_are_some_or_can_be(
    monkeypatch: pytest.MonkeyPatch, train: TrainConfig, found: Capacity, gpus: bool
) -> None:
    monkeypatch.setattr(cluster, "can_start", lambda kinds: kinds == A100)
    assert hardware.on_gpus(train, found) is gpus


@pytest.mark.parametrize(
    ("train", "found", "said"),
    [
        (TrainConfig(workers=8), FOUR, "train.workers=8, but the cluster has 4 GPUs and 32 CPUs"),
        (TrainConfig(workers=8, min_workers=6), FOUR, "train.min_workers=6, but the cluster has 4 GPUs and"),
        (TrainConfig(workers=8, accelerators=A100), FOUR, "has 4 GPUs with the label A100 and 32 CPUs"),
        (TrainConfig(workers=40), CPUS, "train.workers=40, but the cluster has 0 GPUs and 32 CPUs"),
        (TrainConfig(workers=1), GROWING, "the cluster has no machine yet, .* --on PRESET"),
    ],
)
def test_a_cluster_that_is_too_small_is_refused(train: TrainConfig, found: Capacity, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        hardware.on_gpus(train, found)


@pytest.mark.parametrize("found", [CPUS, GROWING])
@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([], "there is no GPU to train on with the label A100, and none of another label"),
        ([Node("a", 8, 2, 64, "H200")], "GPUs of another label: 2 x H200. Where .* train.accelerators=\\[H200\\]"),
        ([Node("a", 8, 2, 64, None)], "2 x no label. .*accelerator-type=A100, or train.accelerators=\\[\\]"),
    ],
)
def test_another_kind_of_gpu_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, nodes: list[Node], said: str, found: Capacity
) -> None:
    monkeypatch.setattr(cluster, "nodes", lambda: nodes)
    monkeypatch.setattr(cluster, "can_start", lambda kinds: False)
    with pytest.raises(UnreachableError, match=said):
        hardware.on_gpus(TrainConfig(accelerators=A100), found)
