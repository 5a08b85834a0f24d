"""Tests marked `driver` connect to Ray themselves. They run apart, one process a file.

When Ray's node dies, Ray ends the process that is connected to it, without an exception: that would end all tests.
With SETWISE_TEST_REPORTS=/dev/null they run here, as a debugger needs it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NoReturn

import pytest

REPORTS = "SETWISE_TEST_REPORTS"
"""Names, in the process apart, the file that takes its reports."""
ATTEMPTS = 2

Reports = dict[str, list[pytest.TestReport]]
KNOWN = pytest.StashKey[Reports]()


def is_apart() -> bool:
    """Whether this process may connect to Ray."""
    return REPORTS in os.environ


def refuse(*_: object) -> NoReturn:
    """In place of a cluster, in the process of all other tests."""
    pytest.fail("a test that connects to Ray itself is marked `driver`")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Let a test marked `driver` be reported as it went in the process of its file's drivers."""
    if is_apart() or item.get_closest_marker("driver") is None:
        return None
    known = item.session.stash.setdefault(KNOWN, {})
    if item.nodeid not in known:
        signal.setitimer(signal.ITIMER_REAL, 0)  # the tests have time limits of their own there
        known.update(run_apart([one for one in item.session.items if one.path == item.path]))
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in known[item.nodeid]:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    item.session._setupstate.teardown_exact(nextitem)
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the process apart: keep what is known of a test, whatever happens next."""
    if file := os.environ.get(REPORTS):
        with Path(file).open("a") as stream:
            stream.write(json.dumps(report._to_json()) + "\n")


def read_report(line: str) -> pytest.TestReport | None:
    """None of a line that the process did not come to end."""
    try:
        report = json.loads(line)
    except ValueError:
        return None
    if isinstance(report["longrepr"], list):  # of a skipped test pytest expects a tuple
        report["longrepr"] = tuple(report["longrepr"])
    return pytest.TestReport._from_json(report)


def run_apart(items: list[pytest.Item]) -> Reports:
    """The reports of all drivers among tests of one file. What Ray's death left undone is tried once more."""
    config = items[0].config
    left = {item.nodeid: item for item in items if item.get_closest_marker("driver")}
    known: Reports = {}
    output = ""
    for _ in range(ATTEMPTS):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "reports.jsonl"
            file.touch()
            command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *left]  # -s: of last words
            ended = subprocess.run(
                command,
                cwd=config.rootpath,
                env=os.environ | {REPORTS: str(file)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            lines = file.read_text().splitlines()
            reports = [report for line in lines if (report := read_report(line)) is not None]
        whole = {report.nodeid for report in reports if report.when == "teardown"}
        known |= {name: [report for report in reports if report.nodeid == name] for name in whole}
        left = {name: item for name, item in left.items() if name not in known}
        if not left:
            return known
        output = f"the process ended with exit code {ended.returncode}\n{ended.stdout[-4000:]}"
        warnings.warn(f"{next(iter(left))}: {output}", stacklevel=1)
    for name, item in left.items():
        known[name] = [pytest.TestReport(name, item.location, {}, "failed", output, "call")]
    return known
