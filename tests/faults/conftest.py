"""Fault tests say what they did: one line a fault, after the tests (fault.py prints them).

    worker_killed_in_mid_epoch: injected SIGKILL of rank 1 at step 7; recovered in 9 s; lost 2 steps, done again

A test takes the fixture `fault` (of type Fault, from fault.py) and calls `fault.injected(...)` when the fault has
happened, `fault.recovered(...)` when the platform is well again, and `fault.lost(...)` with what is gone or had to be
done twice ("nothing"). A test that passes has to have said all three. The line of one that fails says FAILED, and what
had been said until then; one that this machine does not let us inject says NOT RUN, and why.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from fault import LINE, Fault

_PASSED = pytest.StashKey[bool]()
_SKIPPED = pytest.StashKey[str]()


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Iterator[Fault]:
    made = Fault(request.node.name.removeprefix("test_"), failed=True)
    yield made
    made.not_run = request.node.stash.get(_SKIPPED, None)
    passed = request.node.stash.get(_PASSED, False)
    made.failed = not passed or bool(made.unsaid)
    request.node.user_properties.append((LINE, made.line))
    assert not passed or not made.unsaid, f"the test passed and did not say: {', '.join(made.unsaid)}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "call":
        item.stash[_PASSED] = report.passed
        if call.excinfo is not None and report.skipped:
            item.stash[_SKIPPED] = str(call.excinfo.value)
    return report
