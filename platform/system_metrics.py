"""How busy the machine is while a run trains: processor, memory, disk, network and GPUs, under MLflow's own names.

MLflow shows what is called `system/...` in a tab of its own. The samples are a series of the run's outbox, as its
epochs are, and reach MLflow as those do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # it comes without types

from setwise.platform.outbox import Outbox
from setwise.platform.run import Run

log = logging.getLogger(__name__)

SERIES = "system"
MEGABYTE = 1e6


@contextlib.contextmanager
def sampled(run: Run, interval: float = 10.0) -> Iterator[None]:
    """Sample every `interval` seconds while the block runs, for `run`, in a thread of this process.

    Steps count the samples of the run, over all of its starts. Where sampling fails it ends, and the block goes on.
    """
    ended = threading.Event()

    def work() -> None:
        try:
            sampler, outbox = Sampler(run.folder), Outbox(run.events)
            while not ended.wait(interval):
                outbox.metrics(outbox.last_step(SERIES) + 1, sampler.sample(), series=SERIES)
        except Exception as error:  # as on a full disk, which the training itself will complain of
            log.warning("no more system metrics of %s: %s", run.name, error)

    thread = threading.Thread(target=work, name="system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Sampler:
    """Reads the counters of this machine, of this process and what it started, and of the GPUs it may use.

    Args:
        folder: its disk is the one that is measured.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process = psutil.Process()
        self._gpus = _gpus()
        psutil.cpu_percent()  # the first reading is the beginning of the first interval
        self._network = psutil.net_io_counters()

    def sample(self) -> dict[str, float]:
        """Percentages of the time since the last sample; megabytes (1e6) now, of the network since the beginning."""
        memory, disk, network = psutil.virtual_memory(), psutil.disk_usage(str(self.folder)), psutil.net_io_counters()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system_memory_usage_percentage": memory.used / memory.total * 100,
            "process_tree_memory_usage_megabytes": self._own_memory() / MEGABYTE,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / MEGABYTE,
            "disk_available_megabytes": disk.free / MEGABYTE,
            "network_receive_megabytes": (network.bytes_recv - self._network.bytes_recv) / MEGABYTE,
            "network_transmit_megabytes": (network.bytes_sent - self._network.bytes_sent) / MEGABYTE,
        }
        for index, handle in self._gpus:
            values |= {f"gpu_{index}_{name}": value for name, value in _gpu_values(handle).items()}
        return {f"system/{name}": round(float(value), 2) for name, value in values.items()}

    def _own_memory(self) -> int:
        """Bytes that this process and all below it hold for themselves; pages that they share are not counted."""
        total = 0
        for process in [self._process, *self._process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):  # it ended meanwhile
                held = process.memory_info()
                total += held.rss - getattr(held, "shared", 0)
        return total


def _gpus() -> list[tuple[int, Any]]:
    """Number and NVML's handle of each GPU that this process may use; none without a driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
        allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
        count = pynvml.nvmlDeviceGetCount()
        found = [(index, pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(count)]
        if allowed is None:
            return found
        names = [name.strip() for name in allowed.split(",")]
        return [(index, handle) for index, handle in found if {str(index), _uuid(handle)} & set(names)]
    except Exception as error:  # no driver, no permission, a driver that is too old: all are no GPU metrics
        log.debug("no GPU metrics: %s", error)
        return []


def _uuid(handle: Any) -> str:
    import pynvml

    return str(pynvml.nvmlDeviceGetUUID(handle))


def _gpu_values(handle: Any) -> dict[str, float]:
    """What one GPU tells of itself; what it does not tell is left out."""
    import pynvml

    def read(*readings: Callable[[Any], Any]) -> list[Any]:
        try:
            return [reading(handle) for reading in readings]
        except pynvml.NVMLError:
            return []

    values = {}
    for memory in read(pynvml.nvmlDeviceGetMemoryInfo):
        values["memory_usage_megabytes"] = memory.used / MEGABYTE
        values["memory_usage_percentage"] = memory.used / memory.total * 100
    for rates in read(pynvml.nvmlDeviceGetUtilizationRates):
        values["utilization_percentage"] = rates.gpu
    if power := read(pynvml.nvmlDeviceGetPowerUsage, pynvml.nvmlDeviceGetEnforcedPowerLimit):
        values["power_usage_watts"] = power[0] / 1000
        values["power_usage_percentage"] = power[0] / power[1] * 100
    return values
