"""Shards as tasks of Ray Data, some at a time, so that neither the driver nor the object store holds all rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from setwise.pipelines import shards
from setwise.pipelines.datasets import Row
from setwise.platform import cluster
from setwise.platform.errors import DataError, SetwiseError

EACH_CPU = 8
"""Tasks for each CPU in an execution of Ray Data; at its end some CPUs wait for the last tasks of others."""
LEAST = 64
"""Tasks in an execution at least, since to start one takes about as long as a shard of small images."""


def run(
    tasks: Sequence[tuple[str, Sequence[Row]]], folder: Path, shorter_side: int | None, quality: int, halved: bool
) -> None:
    """Write shards to `folder`, one Ray Data task each; rows are handed over as their turn comes.

    Args:
        tasks: the file of each shard, and its rows.

    Raises:
        DataError: a file of features cannot be used at all.
        SetwiseError: a shard cannot be written.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it reports each execution, and that bars are off
    ray.data.DataContext.get_current().enable_progress_bars = False

    def write(task: dict[str, str]) -> dict[str, str]:
        wrong = unwritable = ""  # an error that is raised here does not reach the driver as what it is
        try:
            shards.write(folder / task["file"], shards.load_rows(task["rows"]), shorter_side, quality, halved)
        except DataError as error:
            wrong = str(error)
        except OSError as error:
            unwritable = f"{folder / task['file']} cannot be written ({error.strerror or error})"
        return {"file": task["file"], "wrong": wrong, "unwritable": unwritable}

    one_is_for_the_driver = max(1, cluster.cpus() - 1)
    together = max(LEAST, EACH_CPU * one_is_for_the_driver)
    for start in range(0, len(tasks), together):
        # Rows go as JSON, since Ray Data would store nested lists as pickles; what was written is read from the folder.
        items = [{"file": file, "rows": shards.dump_rows(rows)} for file, rows in tasks[start : start + together]]
        given = ray.data.from_items(items, override_num_blocks=len(items))
        for row in given.map(write, concurrency=one_is_for_the_driver).iter_rows():
            if row["wrong"]:
                raise DataError(row["wrong"])
            if row["unwritable"]:
                raise SetwiseError(f"{row['unwritable']}. When it can be written, the same command goes on")
