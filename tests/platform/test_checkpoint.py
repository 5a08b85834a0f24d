"""Checkpoints: what is damaged is noticed, what was cut short is not there, and nothing in them is ever run."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from setwise.platform import checkpoint, storage
from setwise.platform.errors import DataError

torch.set_num_threads(1)

WEIGHTS = {"a.weight": torch.arange(12.0).reshape(3, 4).t(), "b": torch.tensor(3, dtype=torch.int64)}
METADATA = {"epoch": 3, "history": [{"loss": 0.25}], "words": ["é", "b"]}


def training_state() -> dict[str, Any]:
    return {"optimizer": {"state": {0: {"step": torch.tensor(2.0)}}, "lr": 0.1}, "random": torch.get_rng_state()}


def save(folder: Path, value: float = 1.0) -> Path:
    checkpoint.save(folder, {"w": torch.full((5,), value)}, {"value": value}, {"step": 1})
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "epoch_0001"
    checkpoint.save(folder, WEIGHTS, METADATA, training_state())
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / whole.name))


def test_what_was_saved_is_read_back(whole: Path) -> None:
    checkpoint.verify(whole)
    weights = checkpoint.weights(whole)
    assert weights.keys() == WEIGHTS.keys()
    for name, value in WEIGHTS.items():
        assert torch.equal(weights[name], value)
        assert weights[name].dtype == value.dtype
    assert checkpoint.metadata(whole) == METADATA
    state = checkpoint.training_state(whole)
    assert state["optimizer"]["lr"] == 0.1
    assert torch.equal(state["random"], training_state()["random"])
    assert [path.name for path in whole.parent.iterdir()] == [whole.name], "nothing is left beside it"


def test_saving_again_replaces_the_whole_checkpoint(folder: Path) -> None:
    checkpoint.save(folder, {"w": torch.zeros(1)}, {"new": True}, None)
    checkpoint.verify(folder)
    assert not (folder / checkpoint.TRAINING_STATE).exists()
    assert checkpoint.metadata(folder) == {"new": True}


def flip(path: Path, position: int, mask: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.METADATA, checkpoint.TRAINING_STATE])
def test_any_changed_byte_is_noticed(folder: Path, name: str) -> None:
    chance = random.Random(f"{name} 7")
    path = folder / name
    size = path.stat().st_size
    for position in (0, size - 1, *(chance.randrange(size) for _ in range(60))):
        mask = 1 << chance.randrange(8)
        flip(path, position, mask)
        with pytest.raises(DataError, match=rf"{name}: damaged"):
            checkpoint.verify(folder)
        flip(path, position, mask)
    checkpoint.verify(folder)


def test_a_changed_manifest_is_noticed_or_changes_nothing_that_it_says(folder: Path) -> None:
    path = folder / checkpoint.MANIFEST
    good = json.loads(path.read_bytes())["files"]
    chance = random.Random(11)
    for position in range(path.stat().st_size):
        mask = 1 << chance.randrange(8)
        flip(path, position, mask)
        try:
            checkpoint.verify(folder)
        except DataError:
            pass
        else:
            assert json.loads(path.read_bytes())["files"] == good, f"byte {position} ^ {mask}"
        flip(path, position, mask)


@pytest.mark.parametrize(
    "name", [checkpoint.WEIGHTS, checkpoint.METADATA, checkpoint.TRAINING_STATE, checkpoint.MANIFEST]
)
def test_a_cut_an_empty_and_a_missing_file_are_noticed(folder: Path, name: str) -> None:
    path = folder / name
    data = path.read_bytes()
    for kept in (len(data) - 1, len(data) // 2, 0):
        path.write_bytes(data[:kept])
        if name == checkpoint.MANIFEST and data[kept:].isspace():
            continue
        with pytest.raises(DataError):
            checkpoint.verify(folder)
    path.write_bytes(data + b"x")
    with pytest.raises(DataError):
        checkpoint.verify(folder)
    path.unlink()
    with pytest.raises(DataError):
        checkpoint.verify(folder)


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "[]",
        "null",
        '{"files": []}',
        '{"files": {}}',
        '{"files": null}',
        '{"files": {"model.safetensors": {"size": 1, "sha256": ""}}}',
        '{"files": {"model.safetensors": 3, "metadata.json": 3}}',
        '{"files": {"model.safetensors": {}, "metadata.json": {}}}',
        '{"files": {"model.safetensors": null, "metadata.json": null}}',
        '{"files": "model.safetensors metadata.json"}',
    ],
)
def test_a_manifest_of_another_form_is_damage(folder: Path, manifest: str) -> None:
    (folder / checkpoint.MANIFEST).write_text(manifest)
    with pytest.raises(DataError):
        checkpoint.verify(folder)


def test_a_manifest_cannot_point_outside(folder: Path) -> None:
    outside = folder.parent / "outside"
    outside.write_text("x")
    manifest = json.loads((folder / checkpoint.MANIFEST).read_bytes())
    manifest["files"]["../outside"] = {"size": 1, "sha256": storage.sha256(outside)}
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError):
        checkpoint.verify(folder)


# --- the newest that is whole -----------------------------------------------------------------------------------


def test_newest_is_none_before_there_is_one(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "never made") is None


def test_newest_is_the_last_by_name(tmp_path: Path) -> None:
    for epoch in (2, 10, 9):
        save(tmp_path / f"epoch_{epoch:04d}")
    assert checkpoint.newest(tmp_path) == tmp_path / "epoch_0010"


def test_newest_falls_back_past_a_damaged_one_and_sets_it_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for epoch in (1, 2, 3):
        save(tmp_path / f"epoch_{epoch:04d}")
    flip(tmp_path / "epoch_0003" / checkpoint.WEIGHTS, 30, 1)
    (tmp_path / "epoch_0002" / checkpoint.MANIFEST).unlink()
    assert checkpoint.newest(tmp_path) == tmp_path / "epoch_0001"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "epoch_0001",
        "epoch_0002.damaged",
        "epoch_0003.damaged",
    ]
    assert "epoch_0003/model.safetensors: damaged" in caplog.text
    save(tmp_path / "epoch_0002")  # training goes on and writes the same names again
    assert checkpoint.newest(tmp_path) == tmp_path / "epoch_0002"


def test_newest_falls_back_past_a_damaged_manifest(tmp_path: Path) -> None:
    save(tmp_path / "epoch_0001")
    save(tmp_path / "epoch_0002")
    path = tmp_path / "epoch_0002" / checkpoint.MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"size"', b'"sizf"'))
    assert checkpoint.newest(tmp_path) == tmp_path / "epoch_0001"


def test_going_on_from_nothing_is_refused_where_all_are_damaged(tmp_path: Path) -> None:
    for epoch in (1, 2):
        save(tmp_path / f"epoch_{epoch:04d}")
        flip(tmp_path / f"epoch_{epoch:04d}" / checkpoint.METADATA, 3, 4)
    for _ in range(2):  # and again at the next start
        with pytest.raises(DataError, match=r"every checkpoint is damaged \(epoch_0001\.damaged, epoch_0002\.damaged"):
            checkpoint.newest(tmp_path)


def test_prune_keeps_what_it_is_told_and_what_was_set_aside(tmp_path: Path) -> None:
    for epoch in range(1, 5):
        save(tmp_path / f"epoch_{epoch:04d}")
    (tmp_path / "epoch_0000.damaged").mkdir()
    (tmp_path / "best.json").write_text("{}")
    checkpoint.prune(tmp_path, keep={"epoch_0002", "epoch_0004", "no such"})
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"epoch_0000.damaged", "best.json", "epoch_0002", "epoch_0004"}


# --- writers that are killed --------------------------------------------------------------------------------------

WRITER = """
import os, signal, sys
from pathlib import Path
import safetensors.torch, torch
from setwise.platform import checkpoint, storage

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def after(function, count=1):
    calls = []
    def wrapped(*args, **keywords):
        value = function(*args, **keywords)
        calls.append(1)
        if len(calls) == count:
            die()
        return value
    return wrapped

point, folder = sys.argv[1], Path(sys.argv[2])
if point == "after the weights":
    safetensors.torch.save_file = after(safetensors.torch.save_file)
elif point == "after half of the state":
    def half(value, path):
        Path(path).write_bytes(b"PK" * 50)
        die()
    torch.save = half
elif point == "before the manifest":
    checkpoint.write_manifest = die
elif point == "after the manifest":
    checkpoint.write_manifest = after(checkpoint.write_manifest)
elif point == "before the rename":
    Path.rename = die
elif point == "after the rename":
    Path.rename = after(Path.rename)
checkpoint.save(folder, {"w": torch.ones(5)}, {"value": 1.0}, {"step": 1})
die()
"""
POINTS = (
    "after the weights",
    "after half of the state",
    "before the manifest",
    "after the manifest",
    "before the rename",
    "after the rename",
)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each point, a folder in which epoch_0001 was whole when a writer of epoch_0002 was killed there."""
    parents = {}
    for point in POINTS:
        parents[point] = tmp_path_factory.mktemp("killed")
        save(parents[point] / "epoch_0001", 0.0)
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, point, str(parents[point] / "epoch_0002")]) for point in POINTS
    ]
    for point, writer in zip(POINTS, writers, strict=True):
        assert writer.wait(timeout=120) == -signal.SIGKILL, point
    return parents


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_writer_leaves_no_half_checkpoint(killed: dict[str, Path], point: str) -> None:
    parent = killed[point]
    visible = sorted(path.name for path in parent.iterdir() if not path.name.startswith("."))
    expected = ["epoch_0001", "epoch_0002"] if point == "after the rename" else ["epoch_0001"]
    assert visible == expected
    newest = checkpoint.newest(parent)
    assert newest == parent / expected[-1]
    save(parent / "epoch_0002", 2.0)  # the next start writes it again and clears what was left
    assert checkpoint.metadata(parent / "epoch_0002") == {"value": 2.0}
    checkpoint.verify(parent / "epoch_0002")
    assert sorted(path.name for path in parent.iterdir()) == ["epoch_0001", "epoch_0002"]


# --- nothing in a checkpoint is run -------------------------------------------------------------------------------


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_in_the_training_state_is_not_run(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = folder / checkpoint.TRAINING_STATE
    for payload in ({"optimizer": Canary(canary)}, Canary(canary)):
        torch.save(payload, path)
        checkpoint.write_manifest(folder)
        checkpoint.verify(folder)
        with pytest.raises(pickle.UnpicklingError):
            checkpoint.training_state(folder)
        path.write_bytes(pickle.dumps(payload, protocol=2))
        with pytest.raises((pickle.UnpicklingError, RuntimeError)):
            checkpoint.training_state(folder)
        assert not canary.exists()
    pickle.loads(path.read_bytes())
    assert canary.exists(), "the payload would have worked"


@pytest.mark.parametrize("data", [b"", b"garbage", b"PK\x03\x04" + bytes(200), b"\x80\x02}q\x00."[:4]])
def test_malformed_files_raise_and_are_never_taken_for_values(folder: Path, data: bytes) -> None:
    (folder / checkpoint.TRAINING_STATE).write_bytes(data)
    with pytest.raises(Exception):  # noqa: B017  # torch raises many kinds
        checkpoint.training_state(folder)
    (folder / checkpoint.WEIGHTS).write_bytes(data)
    with pytest.raises(Exception):  # noqa: B017
        checkpoint.weights(folder)


def test_weights_with_a_lying_header_are_refused(folder: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (folder / checkpoint.WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(Exception, match=r"(?i)header|buffer|metadata"):
        checkpoint.weights(folder)


def test_metadata_that_is_no_object_is_refused(folder: Path) -> None:
    (folder / checkpoint.METADATA).write_text("[1]")
    with pytest.raises(DataError, match="expected an object"):
        checkpoint.metadata(folder)


# --- copies for use ------------------------------------------------------------------------------------------------


def test_a_copy_for_inference_verifies_and_leaves_the_training_state(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "best" / "epoch_0001"
    checkpoint.copy_for_inference(folder, target)
    checkpoint.copy_for_inference(folder, target)  # as a second end of the run would
    checkpoint.copy_for_inference(target, target)  # as promoting the copy would
    checkpoint.verify(target)
    assert {path.name for path in target.iterdir()} == {
        checkpoint.WEIGHTS,
        checkpoint.METADATA,
        checkpoint.MANIFEST,
    }
    assert checkpoint.metadata(target) == METADATA
    assert torch.equal(checkpoint.weights(target)["a.weight"], WEIGHTS["a.weight"])


def test_a_damaged_checkpoint_is_not_copied(folder: Path, tmp_path: Path) -> None:
    flip(folder / checkpoint.TRAINING_STATE, 100, 1)
    with pytest.raises(DataError):
        checkpoint.copy_for_inference(folder, tmp_path / "best")
    assert not (tmp_path / "best").exists()
