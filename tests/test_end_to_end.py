"""The commands a user types, at the smallest size, in real processes that are really killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import alive, descendants, epochs_logged, setwise, start, wait_for
from setwise.pipelines import references
from setwise.platform.tracking import Tracker

pytestmark = pytest.mark.end_to_end
STUDY = "digits-tiny"
DEMO = ("demo", "--size", "tiny")
SWEEP = (
    *("sweep", "digits", "train.epochs=2", "train.batch_size=20", "pruning.grace_epochs=1", "--trials", "2"),
    *("--name", "interrupted"),
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store in which a demo was killed in the middle of its sweep, and then run to its end."""
    folder = tmp_path_factory.mktemp("demo")
    demo = start(folder, *DEMO)
    first = references.trial_run(STUDY, 0, folder)
    wait_for(lambda: epochs_logged(first) or demo.poll() is not None, "the first epoch of the first trial")
    assert demo.poll() is None, demo.communicate()[0]
    below = descendants(demo.pid)
    demo.send_signal(signal.SIGKILL)
    demo.communicate()
    yield folder
    # Ray's trial processes end within seconds of the driver; two of its agents look for it only once a minute.
    wait_for(lambda: not any(map(alive, below)), "the end of what the killed demo had started", 120)


@pytest.fixture(scope="module")
def resumed(store: Path) -> subprocess.CompletedProcess[str]:
    """The same command again, at once."""
    return setwise(store, *DEMO)


def test_a_killed_demo_goes_on_and_has_every_trial_once(store: Path, resumed: subprocess.CompletedProcess[str]) -> None:
    import optuna

    assert "goes on" in resumed.stderr and "prepared already" in resumed.stderr
    trials = references.trials_of(STUDY, store)
    assert [trial.name for trial in trials] == [f"{STUDY}-{number:03d}" for number in range(3)]
    for trial in trials:
        steps = epochs_logged(trial)
        assert steps == list(range(1, len(steps) + 1)), trial.name

    study = optuna.load_study(study_name=STUDY, storage=f"sqlite:///{store}/studies/{STUDY}/study.db")
    assert [trial.number for trial in study.trials] == [0, 1, 2]
    assert {trial.state.name for trial in study.trials} <= {"COMPLETE", "PRUNED"}
    assert study.trials[0].params["similarity.alpha"] == 16, "trial 0 is the recipe itself"

    tracker = Tracker(store)
    experiment = tracker.client.get_experiment_by_name(STUDY)
    found = {one.data.tags["mlflow.runName"]: one for one in tracker.client.search_runs([experiment.experiment_id])}
    assert sorted(found) == [STUDY, *(trial.name for trial in trials)]
    parent = found[STUDY].info.run_id
    for trial in trials:
        child = found[trial.name]
        assert child.data.tags["mlflow.parentRunId"] == parent
        assert child.info.status == "FINISHED"
        assert child.data.params["model.embed_size"] == "128"
        assert child.inputs.dataset_inputs[0].dataset.name == "digits"
        history = tracker.client.get_metric_history(child.info.run_id, "val/rsum")
        assert [metric.step for metric in history] == epochs_logged(trial)
        artifacts = {file.path for file in tracker.client.list_artifacts(child.info.run_id)}
        assert {"config.yaml", "environment.json", "run.json", "checkpoints"} <= artifacts


def test_the_demo_ends_by_saying_what_was_found_and_what_to_try(resumed: subprocess.CompletedProcess[str]) -> None:
    for expected in ("digits_1k", "digits_5k", "digits_extended", "is the champion now", "Found in", "chance"):
        assert expected in resumed.stdout, expected
    commands = [line.strip() for line in resumed.stderr.partition("Try next:")[2].splitlines() if line.strip()]
    assert len(commands) == 3 and all(command.startswith("setwise ") for command in commands)


def test_a_demo_run_again_reuses_everything(store: Path, resumed: subprocess.CompletedProcess[str]) -> None:
    before = {trial.name: trial.events.read_bytes() for trial in references.trials_of(STUDY, store)}
    again = setwise(store, *DEMO)
    assert "3 of 3 trials are done already" in again.stderr
    assert "these weights are the champion already" in again.stdout
    assert {trial.name: trial.events.read_bytes() for trial in references.trials_of(STUDY, store)} == before


def test_a_caption_finds_images_and_an_image_finds_captions(
    store: Path, resumed: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    answer = json.loads(
        setwise(
            store, "search", "a red three above a green giraffe", "-k", "4", "--save", str(tmp_path), "--json"
        ).stdout
    )
    assert len(answer["hits"]) == 4 and answer["unknown_words"] == ["giraffe"]
    assert [hit["score"] for hit in answer["hits"]] == sorted((hit["score"] for hit in answer["hits"]), reverse=True)
    images = sorted(tmp_path.glob("*.jpg"))
    assert len(images) == 4
    found = json.loads(setwise(store, "search", str(images[0]), "--json").stdout)
    texts = [hit["captions"][0] for hit in found["hits"]]
    assert len(texts) == len(set(texts)) == 5


def test_compare_eval_and_promote(store: Path, resumed: subprocess.CompletedProcess[str]) -> None:
    compared = json.loads(setwise(store, "compare", STUDY, "--json").stdout)["runs"]
    assert len(compared) == 3
    values = [row["values"]["val/rsum"] for row in compared]
    assert values == sorted(values, reverse=True)
    assert "similarity.alpha" in compared[0]["settings"]

    worst = compared[-1]["name"]
    measured = json.loads(setwise(store, "eval", worst, "--json").stdout)["benchmarks"]
    assert {one["benchmark"]: len(one["fingerprint"]) for one in measured} == {
        "digits_1k": 16,
        "digits_5k": 16,
        "digits_extended": 16,
    }
    refused = setwise(store, "promote", worst, code=3)
    assert "Not promoting" in refused.stderr and "--override" in refused.stderr
    champion = setwise(store, "promote", f"best:{STUDY}", "--dry-run")
    assert "champion already" in champion.stdout
    ledger = json.loads(setwise(store, "models", "history", "digits", "--json").stdout)
    assert len(ledger["entries"]) == 1, ledger
    setwise(store, "doctor")


def test_a_tampered_champion_is_not_served(store: Path, resumed: subprocess.CompletedProcess[str]) -> None:
    weights = next((store / "registry").glob("*/v1/model.safetensors"))
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused = setwise(store, "search", "a red three", code=5)
    assert "damaged" in refused.stderr
    weights.write_bytes(data)
    setwise(store, "search", "a red three")


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing_running_and_says_how_to_go_on(
    store: Path, resumed: subprocess.CompletedProcess[str], signal_number: signal.Signals
) -> None:
    sweep = start(store, *SWEEP)
    assert sweep.stdout is not None
    printed = ""
    while "running" not in printed:
        line = sweep.stdout.readline()
        assert line, printed
        printed += line
    below = descendants(sweep.pid)
    assert below, "Ray's processes"
    sweep.send_signal(signal_number)
    printed += sweep.communicate(timeout=60)[0]
    assert sweep.returncode == 130, printed
    assert "To go on: setwise sweep digits" in printed and "--name interrupted" in printed
    assert "Traceback" not in printed
    wait_for(lambda: not any(map(alive, below)), "the end of its processes", 30)


def test_two_sweeps_of_one_name_do_not_mix(store: Path, resumed: subprocess.CompletedProcess[str]) -> None:
    one_name = ("sweep", "digits", "train.epochs=30", "train.batch_size=20", "--trials", "1", "--name", "contended")
    first = start(store, *one_name)
    assert first.stdout is not None
    printed = ""
    while "running" not in printed:
        line = first.stdout.readline()
        assert line, printed
        printed += line
    second = setwise(store, *one_name, code=1)
    assert "is in use by process" in second.stderr
    printed += first.communicate(timeout=300)[0]
    assert first.returncode == 0, printed
    assert [epochs_logged(trial) for trial in references.trials_of("contended", store)] == [list(range(1, 31))]


def test_a_failed_trial_ends_with_its_reason_and_the_sweep_goes_on(
    store: Path, resumed: subprocess.CompletedProcess[str]
) -> None:
    """The folder of the second trial is taken by a run with another configuration."""
    taken = store / "runs" / "failing-001"
    taken.mkdir()
    (taken / "config.yaml").write_text("data: {}\n")
    (taken / "run.json").write_text('{"experiment": "another", "parent": null}')
    settings = ("train.epochs=1", "train.batch_size=20", "pruning.grace_epochs=1")
    done = setwise(store, "sweep", "digits", *settings, "--trials", "3", "--name", "failing", code=4)
    assert not (taken / "events.jsonl").exists()
    assert "1 failed" in done.stdout
    assert "trial 1: " in done.stderr and "exists with another configuration" in done.stderr
    assert [epochs_logged(references.trial_run("failing", number, store)) for number in (0, 2)] == [[1], [1]]


def test_an_interrupted_sweep_goes_on(store: Path, resumed: subprocess.CompletedProcess[str]) -> None:
    done = setwise(store, *SWEEP)
    assert "2 complete" in done.stdout or "pruned" in done.stdout
    assert [trial.name for trial in references.trials_of("interrupted", store)] == [
        "interrupted-000",
        "interrupted-001",
    ]


def test_a_sweep_is_stopped_from_elsewhere_and_goes_on(store: Path, resumed: subprocess.CompletedProcess[str]) -> None:
    settings = ("sweep", "digits", "train.epochs=60", "train.batch_size=20", "pruning=null", "--trials", "1")
    sweep = start(store, *settings, "--name", "stopped")
    trial = references.trial_run("stopped", 0, store)
    wait_for(lambda: epochs_logged(trial) or sweep.poll() is not None, "its first epoch")
    status = json.loads(setwise(store, "sweep", "status", "stopped", "--json").stdout)
    assert status["owner"].startswith("process") and [one["state"] for one in status["trials"]] == ["running"]
    assert "was stopped" in setwise(store, "sweep", "stop", "stopped").stdout
    printed = sweep.communicate(timeout=60)[0]
    assert sweep.returncode == 0 and "1 to go on" in printed, printed
    command = printed.partition("To go on: setwise ")[2].splitlines()[0]
    assert json.loads(setwise(store, "sweep", "status", "stopped", "--json").stdout)["owner"] is None
    before = len(epochs_logged(trial))
    assert 0 < before < 60
    again = setwise(store, *command.split())
    assert "1 were interrupted and resume" in again.stderr and "1 complete" in again.stdout
    assert epochs_logged(trial) == list(range(1, 61))


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (("sweep", "stop", f"{STUDY}"), 2, "nobody is at work"),
        (("sweep", "status", "digts-tiny"), 2, f"Did you mean '{STUDY}'?"),
        (("sweep", "digits", "--budget", "8"), 2, "such as 8h"),
        (("sweep", "digits", "sampler=grid"), 2, "a grid is made of choices"),
        (("rollback", "digits"), 2, "digits"),
        (("train", "digits_cnn_bigruu"), 2, "Did you mean 'digits_cnn_bigru'?"),
        (("train", "digits_cnn_bigru", "model.temprature=3"), 2, "is not a setting"),
        (("train", "digits_cnn_bigru", "los.margin=3", "train.epochs=x"), 2, "2 mistakes; nothing was started"),
        (("sweep", "digts"), 2, "Did you mean 'digits'?"),
        (("swep", "digits"), 2, "sweep"),
        (("eval", "nothing"), 2, "no run is called 'nothing'"),
        (("eval", "best:nothing"), 2, "no study is called 'nothing'"),
        (("eval", "models:/setwise-birds@champion"), 2, "not registered"),
        (("search", "missing.jpg"), 5, "cannot be read"),
        (("data", "prepare", "digit"), 2, "Did you mean 'digits'?"),
        (("demo", "--size", "huge"), 2, "There are: full, tiny"),
    ],
)
def test_a_mistake_gets_one_clear_message_and_its_exit_code(
    store: Path, resumed: subprocess.CompletedProcess[str], arguments: tuple[str, ...], code: int, expected: str
) -> None:
    refused = setwise(store, *arguments, code=code)
    assert expected in refused.stderr and "Traceback" not in refused.stderr


def test_a_typo_in_a_file_is_shown_with_its_place_in_under_two_seconds(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("extends: digits_cnn_bigru\nmodel:\n  embed_sise: 64\nsimilarity: {temperature: 9}\n")
    began = time.process_time(), time.monotonic()
    refused = setwise(tmp_path, "train", str(recipe), code=2)
    assert time.monotonic() - began[1] < 2 or os.getloadavg()[0] > 2, "on a busy machine the time says nothing"
    assert f"{recipe}:3:3: 'model.embed_sise' is not a setting. Did you mean 'model.embed_size'?" in refused.stderr
    assert f"{recipe}:4:14: 'similarity.temperature' is not a setting." in refused.stderr
