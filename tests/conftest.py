"""What several tests share: a small prepared data set, made once, without a cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import own_process
from fault import pytest_terminal_summary  # noqa: F401  # a hook
from own_process import pytest_runtest_logreport, pytest_runtest_protocol  # noqa: F401  # hooks
from servers import BUCKET, S3Server, s3_server
from setwise.pipelines import prepare, recipe
from setwise.pipelines.digits import DigitsConfig
from setwise.pipelines.prepare import DigitsPreparation, DigitsPrepareConfig
from setwise.pipelines.recipe import Recipe
from setwise.platform import local_cluster
from tiny import TINY_MODEL, write_serially


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first, so that two processes that take file after file end together."""
    items.sort(key=lambda item: item.get_closest_marker("end_to_end") is None)


@pytest.fixture(scope="session", autouse=True)
def _quiet_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One thread, so that sums have one order; a home of its own, so that no user's file is read or written."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    before = os.environ.get("HOME")
    os.environ["HOME"] = str(tmp_path_factory.mktemp("home"))
    for name in ("SETWISE_STORE", "SETWISE_MIRROR", "SETWISE_OPTUNA_URL", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        os.environ.pop(name, None)
    yield
    if before is not None:
        os.environ["HOME"] = before


@pytest.fixture(scope="session", autouse=True)
def _no_ray_in_this_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if not own_process.is_apart():
            patch.setattr(local_cluster, "started", own_process.refuse)
        yield


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with `digits` prepared: 80, 30 and 50 images. Tests only add runs to it, under names of their own."""
    folder = tmp_path_factory.mktemp("store")
    settings = DigitsPreparation(
        generate=DigitsConfig(train=80, val=30, test=50), prepare=DigitsPrepareConfig(rows_per_shard=32)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "_write_shards", write_serially)
        prepare.prepare_digits(folder, settings, say=lambda message: None)
    return folder


@pytest.fixture(scope="session")
def tiny_recipe() -> Recipe:
    return recipe.load("digits_cnn_bigru", TINY_MODEL)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server that speaks S3, with one bucket."""
    with s3_server(tmp_path_factory.mktemp("s3"), BUCKET) as started:
        yield started
