"""Studies in a real PostgreSQL, and Optuna's dashboard on a study."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from commands import SETWISE, environment
from servers import free_port, postgres
from setwise.platform import run
from setwise.sweeps import space, study

WRITERS = 6
WRITER = """
import sys
from pathlib import Path
from setwise.sweeps import space, study
spec, base = space.load("digits", ["seed=" + sys.argv[2]])
made = study.open_study(Path(), sys.argv[1], spec, "identity", [(space.default_values(spec, base), "recipe")])
search = study.StudySearch(made, spec, {}, 3)
for trial in "abc":
    search.suggest(trial)
    for epoch in (1, 2, 3):
        search.on_trial_result(trial, {"epoch": epoch, "rsum": float(epoch), "val/rsum": float(epoch)})
    search.on_trial_complete(trial, {"epoch": 3, "rsum": 3.0, "val/rsum": 3.0})
search.suggest("killed")
"""


def test_studies_at_once_in_one_postgresql_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with postgres(tmp_path) as url:
        monkeypatch.setenv(study.URL, url)
        spec, base = space.load("digits")
        study.open_study(tmp_path, "first", spec, "identity", [(space.default_values(spec, base), "recipe")])
        writers = [
            subprocess.Popen([sys.executable, "-c", WRITER, f"study-{number}", str(number)])
            for number in range(WRITERS)
        ]
        assert [writer.wait(timeout=300) for writer in writers] == [0] * WRITERS
        for number in range(WRITERS):
            made = study.load(tmp_path, f"study-{number}")
            assert [trial.number for trial in made.trials] == [0, 1, 2, 3]
            assert [trial.state.name for trial in made.trials] == ["COMPLETE"] * 3 + ["RUNNING"]
            assert all(trial.intermediate_values == {1: 1.0, 2: 2.0, 3: 3.0} for trial in made.trials[:3])
        spec, _ = space.load("digits", ["seed=3"])
        again = study.StudySearch(study.load(tmp_path, "study-3"), spec, {}, 3).suggest("again")
        assert again is not None and again["trial"] == 3


def test_optunas_dashboard_opens_on_the_same_study(tmp_path: Path) -> None:
    spec, base = space.load("digits")
    folder = run.create(tmp_path / "studies", "seen", "# study\n", "seen").folder
    study.open_study(folder, "seen", spec, "identity", [(space.default_values(spec, base), "recipe")])
    port = free_port()
    arguments = ["sweep", "dashboard", "seen", "--port", str(port)]
    log = (tmp_path / "log").open("wb")
    with log, subprocess.Popen([SETWISE, *arguments], env=environment(tmp_path), stdout=log, stderr=log) as dashboard:
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=5) as answer:
                        found = json.load(answer)
                    break
                except (urllib.error.URLError, OSError):
                    assert time.monotonic() < deadline and dashboard.poll() is None, (tmp_path / "log").read_text()
                    time.sleep(0.2)
        finally:
            dashboard.terminate()
    assert [one["study_name"] for one in found["study_summaries"]] == ["seen"]
