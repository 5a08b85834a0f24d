"""A run goes on from its mirror where its folder is lost, and no mirror that is away or damaged stops a training."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from commands import wait_for
from servers import BUCKET, S3Server, killed_in_mid_upload
from setwise.platform import checkpoint, run, run_mirror, storage
from setwise.platform.errors import ConfigError, DataError, UnreachableError
from setwise.platform.mirror import Mirror, open_mirror
from setwise.platform.outbox import Outbox
from setwise.platform.run import Run
from setwise.platform.run_mirror import RunMirror, Uploader

CONFIG = "train:\n  epochs: 3\n"


@pytest.fixture(params=["s3", "file"])
def mirror(request: pytest.FixtureRequest, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mirror:
    address = s3.address(f"{BUCKET}/{tmp_path.name}") if request.param == "s3" else (tmp_path / "far").as_uri()
    return mirror_at(address, s3, tmp_path / "store", monkeypatch)


def mirror_at(address: str, s3: S3Server, store: Path, monkeypatch: pytest.MonkeyPatch) -> Mirror:
    for name, value in s3.keys.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SETWISE_MIRROR", address)
    opened = open_mirror(store)
    assert opened is not None
    return opened


def begin(store: Path, config: str = CONFIG) -> Run:
    return run.create(store / "runs", "mine", config, "experiment")


def publish(training: Run, name: str, value: float, best: str | None = None) -> Path:
    """A checkpoint, `checkpoints/NAME` or `steps/NAME`, whose weights are `value`."""
    folder = training.folder / name
    checkpoint.save(folder, {"w": torch.full((5,), value)}, {"value": value}, {"step": 1})
    if best is not None:
        storage.write_json(training.folder / "best.json", {"checkpoint": best})
    return folder


def flip(mirror: Mirror, name: str) -> None:
    content = mirror.read(name)
    assert content is not None
    mirror.write(name, content[:-1] + bytes([content[-1] ^ 1]))


def whole(mirror: Mirror) -> list[str]:
    """The checkpoints of the run that the mirror has with their manifests."""
    files = mirror.files("runs/mine")
    return sorted(file.removesuffix("/MANIFEST.json") for file in files if file.endswith("/MANIFEST.json"))


def test_a_machine_that_lost_its_disk_has_the_run_again(mirror: Mirror, tmp_path: Path) -> None:
    training = begin(mirror.store)
    storage.write_bytes(training.folder / "mlflow_key", b"known")
    storage.write_json(training.evaluation / "full.json", {"R@1": 50})
    Outbox(training.events).metrics(1, {"loss": 0.5})
    publish(training, "checkpoints/epoch_0001", 1.0, best="epoch_0001")
    publish(training, "checkpoints/epoch_0002", 2.0)
    publish(training, "steps/epoch_0002_step_000150", 2.5)
    RunMirror(mirror, training).push()

    fresh = tmp_path / "fresh"
    again = Run(fresh / "runs" / "mine")
    assert run_mirror.restore_record(again, fresh, CONFIG)
    assert begin(fresh).config.read_text() == CONFIG
    for name in ("run.json", "environment.json", "mlflow_key", "events.jsonl", "evaluation/full.json", "best.json"):
        assert (again.folder / name).read_bytes() == (training.folder / name).read_bytes()
    assert run_mirror.restore(again, fresh) == "steps/epoch_0002_step_000150"
    assert checkpoint.newest(again.checkpoints, again.steps) == again.steps / "epoch_0002_step_000150"
    assert again.best_checkpoint() == again.checkpoints / "epoch_0001"
    assert not run_mirror.restore_record(again, fresh, CONFIG), "what is here stays"
    assert run_mirror.restore(again, fresh) is None


@pytest.mark.parametrize("status", ["FINISHED", None])
def test_with_the_record_of_a_run_that_has_ended_come_its_checkpoints(
    status: str | None, mirror: Mirror, tmp_path: Path
) -> None:
    training = begin(mirror.store)
    publish(training, "checkpoints/epoch_0001", 1.0, best="epoch_0001")
    publish(training, "checkpoints/epoch_0002", 2.0)
    if status is not None:
        Outbox(training.events).append({"kind": "status", "value": status})
    RunMirror(mirror, training).push()
    again = Run(tmp_path / "fresh" / "runs" / "mine")
    assert run_mirror.restore_record(again, tmp_path / "fresh", CONFIG)
    assert len(list(again.checkpoints.glob("epoch_*"))) == (0 if status is None else 2)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_is_taken(
    mirror: Mirror, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = begin(mirror.store)
    for number in (1, 2, 3):
        publish(training, f"checkpoints/epoch_000{number}", number)
    RunMirror(mirror, training).push()
    flip(mirror, "runs/mine/checkpoints/epoch_0003/model.safetensors")
    fresh = tmp_path / "fresh"
    again = begin(fresh)
    assert run_mirror.restore(again, fresh) == "checkpoints/epoch_0002"
    assert "epoch_0003/model.safetensors: damaged" in caplog.text
    assert checkpoint.metadata(again.checkpoints / "epoch_0002") == {"value": 2.0}
    publish(again, "checkpoints/epoch_0003", 3.0)  # trained again, to the same bits
    other = open_mirror(fresh)
    assert other is not None
    RunMirror(other, again).push()
    last = tmp_path / "last"
    assert run_mirror.restore(begin(last), last) == "checkpoints/epoch_0003", "the damaged one was put right"


def test_a_run_of_which_everything_is_damaged_does_not_begin_from_nothing(mirror: Mirror, tmp_path: Path) -> None:
    training = begin(mirror.store)
    publish(training, "checkpoints/epoch_0001", 1.0)
    RunMirror(mirror, training).push()
    flip(mirror, "runs/mine/checkpoints/epoch_0001/training_state.pt")
    fresh = tmp_path / "fresh"
    for _ in range(2):  # it is set aside the first time
        with pytest.raises(DataError, match=r"every checkpoint of 'runs/mine'.*setwise store remove runs/mine"):
            run_mirror.restore(begin(fresh), fresh)


def test_what_was_removed_here_is_removed_there_and_what_is_newer_stays(mirror: Mirror, tmp_path: Path) -> None:
    training = begin(mirror.store)
    copy = RunMirror(mirror, training)
    for number in (1, 2, 3):
        publish(training, f"checkpoints/epoch_000{number}", number, best="epoch_0001")
    publish(training, "steps/epoch_0003_step_000100", 3.5)
    copy.push()
    publish(training, "checkpoints/epoch_0004", 4.0)
    checkpoint.prune(training.checkpoints, keep={"epoch_0001", "epoch_0004"})
    checkpoint.prune(training.steps, keep=())
    copy.push()
    assert whole(mirror) == ["checkpoints/epoch_0001", "checkpoints/epoch_0004"]
    behind = begin(tmp_path / "behind")  # a machine that began from nothing while the mirror was away
    publish(behind, "checkpoints/epoch_0002", 2.0)
    other = open_mirror(tmp_path / "behind")
    assert other is not None
    RunMirror(other, behind).push()
    assert whole(mirror) == ["checkpoints/epoch_0002", "checkpoints/epoch_0004"]
    Outbox(behind.events).append({"kind": "status", "value": "FINISHED"})
    RunMirror(other, behind).push()
    assert whole(mirror) == ["checkpoints/epoch_0002"], "a run that has ended has all that there will be of it"


def test_the_newest_and_the_best_go_first_and_others_only_if_nothing_newer_waits(mirror: Mirror) -> None:
    training = begin(mirror.store)
    for number in (1, 2, 3, 4):
        publish(training, f"checkpoints/epoch_000{number}", number, best="epoch_0002")
    copy = RunMirror(mirror, training)
    copy.push(superseded=lambda: True)
    assert whole(mirror) == ["checkpoints/epoch_0002", "checkpoints/epoch_0004"]
    copy.push()
    assert len(whole(mirror)) == 4


def test_another_run_of_the_same_name_is_neither_taken_nor_overwritten(mirror: Mirror, tmp_path: Path) -> None:
    training = begin(mirror.store)
    publish(training, "checkpoints/epoch_0001", 1.0)
    RunMirror(mirror, training).push()
    fresh = tmp_path / "fresh"
    with pytest.raises(ConfigError, match="another configuration"):
        run_mirror.restore_record(Run(fresh / "runs" / "mine"), fresh, "train: {}\n")
    another = begin(fresh, "train: {}\n")
    assert run_mirror.restore(another, fresh) is None
    other = open_mirror(fresh)
    assert other is not None
    with pytest.raises(ConfigError, match="setwise store remove runs/mine"):
        RunMirror(other, another).push()
    assert mirror.read("runs/mine/config.yaml") == CONFIG.encode()


def test_an_uploader_sends_in_the_background_and_at_its_end_all_is_there(mirror: Mirror) -> None:
    training = begin(mirror.store)
    uploader = Uploader(mirror, training)
    publish(training, "checkpoints/epoch_0001", 1.0)
    uploader.publish()
    wait_for(lambda: whole(mirror) == ["checkpoints/epoch_0001"], "it was sent", 30)
    publish(training, "checkpoints/epoch_0002", 2.0)
    storage.write_json(training.folder / "best.json", {"checkpoint": "epoch_0002"})
    uploader.close()
    assert whole(mirror) == ["checkpoints/epoch_0001", "checkpoints/epoch_0002"]
    assert mirror.read("runs/mine/best.json") == (training.folder / "best.json").read_bytes()


def test_a_training_without_a_mirror_sends_nothing(tmp_path: Path) -> None:
    uploader = Uploader(None, begin(tmp_path))
    uploader.publish()
    uploader.close()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_mirror_that_is_away_stops_nothing_and_gets_later_what_it_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    s3 = S3Server(tmp_path)
    mirror = mirror_at(s3.address(BUCKET), s3, tmp_path / "store", monkeypatch)
    training = begin(mirror.store)
    assert run_mirror.restore(training, mirror.store) is None, "nothing was trained before, as far as is known here"
    uploader = Uploader(mirror, training)
    longest = 0.0
    for number in (1, 2, 3):
        publish(training, f"checkpoints/epoch_000{number}", number)
        began = time.monotonic()
        uploader.publish()
        longest = max(longest, time.monotonic() - began)
        time.sleep(2)  # longer than it takes to notice that nobody answers
    assert longest < 0.5
    assert caplog.text.count("The training goes on") == 1, "said once"
    try:
        s3.start(BUCKET)
        publish(training, "checkpoints/epoch_0004", 4.0)
        uploader.publish()
        wait_for(lambda: len(whole(mirror)) == 4, "all was sent", 60)
        uploader.close()
    finally:
        s3.kill()
    assert "has all of run 'mine' again" in caplog.text
    assert "not all of run" not in caplog.text


def test_what_is_not_sent_at_the_end_is_said_and_does_not_hold_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    s3 = S3Server(tmp_path)
    mirror = mirror_at(s3.address(BUCKET), s3, tmp_path / "store", monkeypatch)
    training = begin(mirror.store)
    publish(training, "checkpoints/epoch_0001", 1.0)
    uploader = Uploader(mirror, training)
    began = time.monotonic()
    uploader.close(limit_s=0.2)
    assert time.monotonic() - began < 5
    assert "setwise store push runs/mine" in caplog.text


def test_a_run_that_was_trained_before_does_not_begin_from_nothing_while_its_mirror_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3 = S3Server(tmp_path)
    store = mirror_at(s3.address(BUCKET), s3, tmp_path / "store", monkeypatch).store
    with pytest.raises(UnreachableError, match="not known whether run 'mine' was begun elsewhere"):
        run_mirror.restore_record(Run(store / "runs" / "mine"), store, CONFIG)
    training = begin(store)
    Outbox(training.events).metrics(1, {"loss": 0.5})
    with pytest.raises(UnreachableError, match="does not answer"):
        run_mirror.restore(training, store)


UPLOAD = """
from setwise.platform.run import Run
from setwise.platform.run_mirror import Uploader
store = Path(sys.argv[2])
uploader = Uploader(open_mirror(store), Run(store / "runs" / "mine"))
uploader.publish()
uploader.close(600)
"""


def test_a_training_killed_while_it_sends_leaves_the_checkpoint_before_and_the_next_one_heals_it(
    mirror: Mirror, tmp_path: Path
) -> None:
    training = begin(mirror.store)
    publish(training, "checkpoints/epoch_0001", 1.0)
    RunMirror(mirror, training).push()
    publish(training, "checkpoints/epoch_0002", 2.0)
    killed_in_mid_upload("model.safetensors", UPLOAD, str(mirror.store))
    assert whole(mirror) == ["checkpoints/epoch_0001"]
    fresh = tmp_path / "fresh"
    assert run_mirror.restore(begin(fresh), fresh) == "checkpoints/epoch_0001"
    publish(training, "checkpoints/epoch_0003", 3.0)
    RunMirror(mirror, training).push()
    assert whole(mirror) == [f"checkpoints/epoch_000{number}" for number in (1, 2, 3)]
    last = tmp_path / "last"
    assert run_mirror.restore(begin(last), last) == "checkpoints/epoch_0003"
