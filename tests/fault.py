"""A fault that a test injects, and the line that says what came of it, printed after all tests."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

LINE = "fault"
"""The property of a test's last report that holds its line: reports also come from other processes."""


@dataclass
class Fault:
    """What one test broke, and what came of it; `name` begins its line."""

    name: str
    said: dict[str, str] = field(default_factory=dict)
    failed: bool = False
    not_run: str | None = None
    """Why it could not be injected on this machine."""

    def injected(self, what: str) -> None:
        """What was broken, and where that hit: "SIGKILL of rank 1 at step 7"."""
        self.said["injected"] = what

    def recovered(self, how: str) -> None:
        """What brought it back, and how long that took: "on the spare node in 12 s"."""
        self.said["recovered"] = how

    def lost(self, what: str) -> None:
        """What is gone, or had to be done again: "nothing", "2 steps, done again"."""
        self.said["lost"] = what

    @property
    def unsaid(self) -> list[str]:
        return [word for word in ("injected", "recovered", "lost") if word not in self.said]

    @property
    def line(self) -> str:
        if self.not_run is not None:
            return f"{self.name}: NOT RUN: {self.not_run}"
        said = "; ".join(f"{word} {text}" for word, text in self.said.items())
        if not self.failed:
            return f"{self.name}: {said}"
        return f"{self.name}: FAILED, {f'after: {said}' if said else 'before anything was injected'}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for all_of_a_kind in terminalreporter.stats.values() for report in all_of_a_kind]
    ended = [report for report in reports if getattr(report, "when", None) == "teardown"]
    lines = [str(line) for report in ended for name, line in report.user_properties if name == LINE]
    if lines:
        terminalreporter.section("faults")
        for line in lines:
            terminalreporter.line(line)
