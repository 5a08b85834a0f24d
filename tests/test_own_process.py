"""Tests that Ray may end: they run apart, are reported as they went, and end no other test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CONFTEST = "from own_process import pytest_runtest_logreport, pytest_runtest_protocol\n"
TESTS = """
import os
from pathlib import Path

import pytest

@pytest.fixture(scope="module")
def apart():
    assert "SETWISE_TEST_REPORTS" in os.environ
    with open("made", "a") as stream:
        stream.write("x")

@pytest.mark.driver
def test_passes(apart): ...

@pytest.mark.driver
def test_fails(apart): assert 1 + 1 == 3

@pytest.mark.driver
@pytest.mark.skipif(True, reason="always")
def test_is_skipped(): ...

def test_here(): assert "SETWISE_TEST_REPORTS" not in os.environ

@pytest.mark.driver
def test_dies_once(apart):
    if not Path("died").exists():
        Path("died").touch()
        os._exit(1)

@pytest.mark.driver
@pytest.mark.parametrize("name", ["a b"])
def test_dies_always(apart, name):
    print("its last words", flush=True)
    os._exit(6)

def test_after(): ...
"""


def test_each_is_reported_as_it_went_and_one_that_dies_is_tried_once_more(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    driver: apart\n")
    environment = {name: value for name, value in os.environ.items() if name != "SETWISE_TEST_REPORTS"}
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "."],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(Path(__file__).parent), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1, ended.stdout
    went = {
        line.split("::")[1].split(" [")[0].strip()
        for line in ended.stdout.splitlines()
        if line.startswith("test_it.py::") and " [" in line
    }
    assert went >= {"test_passes PASSED", "test_fails FAILED", "test_is_skipped SKIPPED (always)", "test_here PASSED"}
    assert went >= {"test_dies_once PASSED", "test_after PASSED"}
    assert "2 failed, 4 passed, 1 skipped" in ended.stdout and "assert (1 + 1) == 3" in ended.stdout
    assert "the process ended with exit code 6" in ended.stdout and "its last words" in ended.stdout
    assert (tmp_path / "made").read_text() == "xx"
