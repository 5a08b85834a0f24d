"""What it costs to prepare many images, and to open what was prepared: seconds, and memory of driver and workers.

    PYTHONPATH=tests python -m benchmarks.preparation 1000000

A folder of small JPEGs (24 x 24 pixels, 4,096 different ones under as many names as there are images) with a
`captions.parquet` of a caption each is prepared by Ray Data, once with a quarter of the images and once with all of
them, so that what grows with the rows is visible. Then three starts follow, each in a process of its own: one after a
tenth of the shards was lost, as when a preparation is killed; one that finds nothing to do; and a training that opens
the data. Images of usual size take longer to decode and to store, and no more memory in the driver.

Two CPUs, one of which Ray Data gets. Peaks are of resident memory, as the operating system counted them (driver) or as
they were seen twice a second (the largest worker, with the pages that it shares). Growth is the difference of both
sizes, divided by the rows. The exit status says whether the driver keeps to LIMIT_BYTES.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from setwise.platform import storage

ROWS = 130_000
"""A quarter of it is more than the rows that are under way at once, which would else seem to grow."""
DIFFERENT = 4_096
FOLDER = 1_000
WORDS = 20_000
LIMIT_BYTES = 1_200
"""Of the driver, a row, with Ray Data's own. From 32,500 to 130,000 rows it took 811, from 50,000 to 1,000,000 386; as
objects 1,546. tests/pipelines/test_rows.py bounds what is ours more closely."""
MIB = 2**20
PARTS = {
    ("datasets", "open_source"): "reading the table",
    ("identity", "of"): "knowing the files again",
    ("prepare", "_write_shards"): "writing shards",
    ("vocabulary", "collect"): "words",
}
"""Functions of pipelines/ that take most of the time."""


def compose(folder: Path, rows: int) -> None:
    """The data set: images that are links to few files, and captions that are all different."""
    import pyarrow
    import pyarrow.parquet

    random = np.random.default_rng(0)
    (folder / "different").mkdir(parents=True)
    for number in range(min(rows, DIFFERENT)):
        pixels = random.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((24, 24), Image.Resampling.BICUBIC).save(folder / f"different/{number}.jpg")
    names = [f"{number // FOLDER:04d}/{number:08d}.jpg" for number in range(rows)]
    for number, name in enumerate(names):
        if number % FOLDER == 0:
            (folder / "images" / name).parent.mkdir(parents=True)
        os.link(folder / f"different/{number % DIFFERENT}.jpg", folder / "images" / name)
    letters = np.array(list("aeioubdklmnrst"))
    words = ["".join(letters[random.integers(len(letters), size=3 + place % 7)]) for place in range(WORDS)]
    chosen = np.minimum(random.zipf(1.3, (rows, 10)), WORDS) - 1
    captions = [" ".join([words[place] for place in own]) for own in chosen.tolist()]
    table = pyarrow.table({"image": names, "caption": captions})
    pyarrow.parquet.write_table(table, folder / "captions.parquet")


class Peaks:
    """Resident memory of this process' descendants, and what is in Ray's object store, twice a second."""

    def __init__(self) -> None:
        self.worker = 0.0
        self.store = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        import ray

        own = psutil.Process()
        while not self._ended.wait(0.5):
            for process in own.children(recursive=True):
                try:
                    if process.name().startswith("ray::"):
                        memory = process.memory_info()
                        self.worker = max(self.worker, memory.rss / MIB)
                except psutil.Error:
                    continue
            total, free = ray.cluster_resources(), ray.available_resources()
            used = total.get("object_store_memory", 0) - free.get("object_store_memory", 0)
            self.store = max(self.store, used / MIB)


def prepare_once(folder: Path, store: Path) -> dict[str, Any]:
    """Prepare in this process, which does nothing else."""
    from setwise.pipelines import datasets, identity, prepare, vocabulary
    from setwise.platform import cluster

    took: dict[str, float] = {}

    def timed(module: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(module, name)

        def noted(*args: Any, **options: Any) -> Any:
            begin = time.monotonic()
            try:
                return function(*args, **options)
            finally:
                took[name] = time.monotonic() - begin

        setattr(module, name, noted)

    for module, name in PARTS:
        timed({"datasets": datasets, "identity": identity, "prepare": prepare, "vocabulary": vocabulary}[module], name)
    settings = prepare.PrepareSettings.model_validate({"source": {"folder": str(folder)}})
    with cluster.connect(cpus=2):
        peaks = Peaks()
        begin, cpu = time.monotonic(), time.process_time()
        prepare.prepare_source("many", store, settings, lambda text: None)
        seconds, cpu = time.monotonic() - begin, time.process_time() - cpu
        peaks.end()
    return {"seconds": seconds, "cpu": cpu, "worker": peaks.worker, "store": peaks.store} | took


def open_once(folder: Path, store: Path) -> dict[str, Any]:
    """Open the training split as a training does, and take a batch of it."""
    from setwise.pipelines import prepare, vocabulary
    from setwise.pipelines.batches import Split, training_batches
    from setwise.pipelines.recipe import DataConfig

    before, begin, cpu = peak_mib(), time.monotonic(), time.process_time()
    prepared = prepare.open_prepared("many", store)
    words = vocabulary.read(prepared.folder / "vocabulary.json")
    split = Split(prepared, "train", DataConfig(image_size=24), words)
    next(training_batches(split, 128, seed=0, epoch=0))
    seconds, cpu = time.monotonic() - begin, time.process_time() - cpu
    return {"seconds": seconds, "cpu": cpu, "more": peak_mib() - before}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_a_process(work: str, folder: Path, store: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.preparation", work, str(folder), str(store)]
    shown = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    found: dict[str, float] = json.loads(shown.splitlines()[-1])
    return found


def lose_a_tenth(prepared: Path) -> None:
    """As if the preparation had been killed before its last shards were written."""
    manifest = json.loads((prepared / "manifest.json").read_bytes())
    for path in sorted(prepared.glob("train-*.json"))[::10]:
        path.unlink()
    (prepared / "manifest.json").unlink()
    prepared.rename(prepared.with_name(f".prepared-{storage.fingerprint(manifest['identity'])}"))


def measure(rows: int, folder: Path) -> dict[str, float]:
    """All figures of a size, by the names of the table's lines."""
    source, store = folder / f"{rows}", folder / f"{rows}-store"
    compose(source, rows)
    whole = in_a_process("prepare", source, store)
    lose_a_tenth(store / "data" / "many" / "prepared")
    rest = in_a_process("prepare", source, store)
    again = in_a_process("prepare", source, store)
    opened = in_a_process("open", source, store)
    shutil.rmtree(source)
    shutil.rmtree(store)
    return {
        "preparation, s": whole["seconds"],
        "  rows/s": rows / whole["seconds"],
        "  CPU of the driver, s": whole["cpu"],
        **{f"  {what}, s": whole[name] for (_, name), what in PARTS.items()},
        "  peak of the driver, MiB": whole["peak"],
        "  peak of the largest worker, MiB": whole["worker"],
        "  object store, MiB": whole["store"],
        "resumed with a tenth missing, s": rest["seconds"],
        "  of these, writing shards, s": rest["_write_shards"],
        "nothing to do, s": again["seconds"],
        "opened by a training, CPU s": opened["cpu"],
        "  memory more, MiB": opened["more"],
    }


def main(rows: int) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        sizes = (rows // 4, rows)
        found = [measure(size, Path(folder)) for size in sizes]
    print(f"{'images, a caption each':36}" + "".join(f"{size:>12,}" for size in sizes) + f"{'growth':>16}")
    for line in found[0]:
        few, many = (each[line] for each in found)
        each_row = (many - few) * MIB / (sizes[1] - sizes[0])
        growth = f"{each_row:,.0f} B/row" if "MiB" in line else ""
        print(f"{line:36}{few:12,.1f}{many:12,.1f}{growth:>16}")
    peaks = [each["  peak of the driver, MiB"] for each in found]
    kept = (peaks[1] - peaks[0]) * MIB <= LIMIT_BYTES * (sizes[1] - sizes[0])
    print(f"\n{'kept' if kept else 'NOT kept'}: the driver takes at most {LIMIT_BYTES} bytes a row")
    return kept


if __name__ == "__main__":
    if len(sys.argv) == 4:
        made = {"prepare": prepare_once, "open": open_once}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
        print(json.dumps(made | {"peak": peak_mib()}))
    else:
        sys.exit(0 if main(int(sys.argv[1]) if len(sys.argv) > 1 else ROWS) else 1)
