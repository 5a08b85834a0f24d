"""Samples of the machine lie in the run's outbox, each step once, and never harm the run."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from setwise.platform import run, system_metrics
from setwise.platform.outbox import Outbox
from setwise.platform.run import Run
from setwise.platform.system_metrics import Sampler, sampled


def samples(of: Run) -> list[dict[str, Any]]:
    return [event for event in run.read_events(of.events) if event.get("series") == "system"]


def wait_for(of: Run, count: int) -> None:
    deadline = time.monotonic() + 20
    while len(samples(of)) < count:
        assert time.monotonic() < deadline, "no sample came"
        time.sleep(0.01)


def test_steps_go_on_after_a_restart_and_each_is_once(tmp_path: Path) -> None:
    one = Run(tmp_path / "run")
    Outbox(one.events).metrics(70, {"loss": 0.5})
    for start in (1, 2):
        with sampled(one, interval=0.01):
            wait_for(one, 3 * start)
        kept = len(samples(one))
        time.sleep(0.05)
        assert len(samples(one)) == kept, "it samples on after the block"
    assert [event["step"] for event in samples(one)] == list(range(1, len(samples(one)) + 1))


def test_the_block_ends_promptly_and_its_error_goes_through(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(KeyError), sampled(Run(tmp_path / "run"), interval=60):
        raise KeyError
    assert time.monotonic() - started < 5
    assert "system-metrics" not in {thread.name for thread in threading.enumerate()}
    assert samples(Run(tmp_path / "run")) == []


def test_sampling_that_fails_ends_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()

    def fail(self: Sampler) -> dict[str, float]:
        failed.set()
        raise OSError("no space left")

    monkeypatch.setattr(Sampler, "sample", fail)
    with sampled(Run(tmp_path / "run"), interval=0.01):
        assert failed.wait(10)
    assert samples(Run(tmp_path / "run")) == []


def test_values_have_mlflow_s_names_and_are_possible(tmp_path: Path) -> None:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    sampler = Sampler(tmp_path)
    values = sampler.sample()
    expected: set[str] = set()
    for monitor in (CPUMonitor(), DiskMonitor(), NetworkMonitor()):
        monitor.collect_metrics()
        expected |= {f"system/{name}" for name in monitor.aggregate_metrics()}
    assert expected - set(values) == set()
    assert [name for name, value in values.items() if name.endswith("percentage") and not 0 <= value <= 100] == []
    own = values["system/process_tree_memory_usage_megabytes"]
    held = b"x" * 300_000_000
    grown = sampler.sample()["system/process_tree_memory_usage_megabytes"] - own
    assert 200 < grown < 600, f"{len(held):,} bytes more are held"


def test_what_the_process_started_counts_as_its_own(tmp_path: Path) -> None:
    import subprocess

    sampler = Sampler(tmp_path)
    before = sampler.sample()["system/process_tree_memory_usage_megabytes"]
    code = "x = b'x' * 200_000_000; print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        during = sampler.sample()["system/process_tree_memory_usage_megabytes"]
        child.communicate(b"\n")
    assert 150 < during - before < 400


class NoGpuError(Exception):
    pass


def fake_nvml(**missing: bool) -> Any:
    """A driver that knows two GPUs and may not tell of their power."""

    def power(handle: str) -> int:
        if missing.get("power"):
            raise NoGpuError
        return 250_000

    return SimpleNamespace(
        NVMLError=NoGpuError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: f"gpu{index}",
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle}",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=6e9, total=24e9),
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=87),
        nvmlDeviceGetPowerUsage=power,
        nvmlDeviceGetEnforcedPowerLimit=lambda handle: 500_000,
    )


GPU = {"utilization_percentage": 87.0, "memory_usage_megabytes": 6000.0, "memory_usage_percentage": 25.0}
POWER = {"power_usage_watts": 250.0, "power_usage_percentage": 50.0}


@pytest.mark.parametrize(
    ("visible", "numbers"),
    [(None, [0, 1]), ("1", [1]), ("0,1", [0, 1]), ("GPU-gpu1", [1]), ("", [])],
)
@pytest.mark.parametrize("power", [True, False])
def test_each_gpu_that_the_process_may_use_is_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, numbers: list[int], power: bool
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(power=not power))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    told = GPU | (POWER if power else {})
    expected = {f"system/gpu_{number}_{name}": value for number in numbers for name, value in told.items()}
    values = Sampler(tmp_path).sample()
    assert {name: value for name, value in values.items() if "/gpu_" in name} == expected


def test_without_a_driver_there_are_no_gpu_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise NoGpuError("driver not loaded")

    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(NVMLError=NoGpuError, nvmlInit=no_driver))
    assert system_metrics._gpus() == []
    assert not [name for name in Sampler(tmp_path).sample() if "/gpu_" in name]
