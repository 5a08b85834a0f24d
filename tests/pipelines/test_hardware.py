"""Presets: one layer of the configuration that says how a recipe is computed, and never what."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from setwise.pipelines import hardware, recipe
from setwise.platform.errors import ConfigError

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
    how = dict.fromkeys(hardware.HOW)
    assert there.model_dump(exclude={"train": set(how)}) == plain.model_dump(exclude={"train": set(how)})
    assert there.train.batch_size == plain.train.batch_size


def test_a_preset_lies_between_the_file_and_the_overrides() -> None:
    assert recipe.load("coco_butd_bigru").train.precision == "fp16"
    assert hardware.load_recipe("coco_butd_bigru", on="a100x8").train.precision == "bf16"
    assert hardware.load_recipe("coco_butd_bigru", ["train.precision=fp32"], "a100x8").train.precision == "fp32"
    assert hardware.load_recipe("coco_butd_bigru", ["train.precision=fp32"], "a100x8").train.workers == 8


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
