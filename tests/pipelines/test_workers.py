"""Any number of workers, and any size of micro-batches, give the loss and the gradients of one worker with everything.

With dropout, region drop and sampled slots switched on, batch normalisation over the whole batch, uneven shares, and
workers without any image.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import one_step
from setwise.pipelines import train, trained_model
from setwise.pipelines.workers import Worker

# In float32 what is left is the rounding of sums in another order: 5e-7 in most cases here, 4e-6 with a backbone.
DTYPES = {"float64": (torch.float64, 1e-11), "float32": (torch.float32, 5e-6)}
each_case = pytest.mark.parametrize("case", one_step.CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(scope="module", params=[2, 4])
def steps(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What real processes, as many as the parameter says, made of every case."""
    out = tmp_path_factory.mktemp(f"world-{request.param}")
    program = Path(one_step.__file__)
    environment = os.environ | {"PYTHONPATH": str(program.parent), "GLOO_SOCKET_IFNAME": "lo"}
    meeting_point = (out / "meeting").as_uri()
    started = [
        subprocess.Popen(
            [sys.executable, str(program), str(rank), str(request.param), meeting_point, str(out)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(request.param)
    ]
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return out


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative difference of the loss, of its parts, of the gradient as one long vector, and of each buffer; the most.

    In float64 each parameter's gradient is looked at for itself too. (In float32 the smallest of them are little more
    than rounding.)
    """
    assert found.keys() == expected.keys()
    differences = {name: (found[name] - value).double().norm() for name, value in expected.items()}
    lengths = {name: value.double().norm() for name, value in expected.items()}
    names = [name for name in expected if name.startswith("gradient.")]
    gradient = torch.stack([lengths[name] for name in names]).norm()
    relative = {
        name: float(differences[name] / lengths[name].clamp(min=1e-9)) for name in expected if name not in names
    }
    relative["gradient"] = float(torch.stack([differences[name] for name in names]).norm() / gradient)
    if expected[names[0]].dtype == torch.float64:
        typical = gradient / len(names)
        relative |= {name: float(differences[name] / torch.maximum(lengths[name], typical)) for name in names}
    return max(relative.values())


@each_dtype
@each_case
def test_workers_compute_what_one_does(steps: Path, case: str, dtype: str) -> None:
    kind, tolerance = DTYPES[dtype]
    expected = one_step.step(case, Worker(), kind)
    files = sorted(steps.glob(f"{case}-{kind}-*.safetensors"))  # of whole shares, and of shares in pieces of two
    assert len(files) in (4, 8)
    for file in files:
        assert largest_difference(load_file(file), expected) < tolerance


@pytest.mark.parametrize("micro_batch", [1, 3, 5, 100])
@each_dtype
@each_case
def test_micro_batches_change_neither_loss_nor_gradients(case: str, dtype: str, micro_batch: int) -> None:
    kind, tolerance = DTYPES[dtype]
    whole, pieces = one_step.step(case, Worker(), kind), one_step.step(case, Worker(), kind, micro_batch)
    assert largest_difference(pieces, whole) < tolerance


def test_the_step_depends_on_what_is_dropped() -> None:
    """Were nothing dropped, or nothing by key, the tests above would say less than they seem to."""
    worker = Worker()
    first, again = (one_step.step("regions", worker, torch.float64) for _ in range(2))
    assert largest_difference(again, first) == 0
    share = one_step.share
    try:
        one_step.share = lambda *arguments: (  # type: ignore[assignment]
            lambda one: one.__class__(**{**one.__dict__, "image_keys": one.image_keys + 7})
        )(share(*arguments))
        assert largest_difference(one_step.step("regions", worker, torch.float64), first) > 1e-2
    finally:
        one_step.share = share


class NothingIsReadBack(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU: to look at a value, or at how many elements hold something."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        assert name not in self.WAITS, f"{name} waits for the device"
        if name == "index":  # by a mask, the size of the result has to be looked at
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "indexing by a mask waits"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("micro_batch", [None, 3])
@each_case
def test_a_step_reads_nothing_back_from_the_device(
    case: str, micro_batch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = torch.nn.GRU.forward

    def unwatched(*arguments: Any) -> Any:
        with _disable_current_modes():  # a GRU looks at how many captions go on, which stands on the CPU by design
            return read(*arguments)

    monkeypatch.setattr(torch.nn.GRU, "forward", unwatched)
    settings = one_step.recipe(case, micro_batch)
    torch.manual_seed(0)
    system = trained_model.untrained(settings, one_step.VOCABULARY).train()
    share = one_step.share(case, 0, 1, torch.float32)
    adamw = torch.optim.AdamW(system.parameters(), fused=True)  # as on a GPU
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    failure = train.Failure(torch.device("cpu"))
    with NothingIsReadBack():
        parts = train.global_loss(system.encoder, system, share, 0.0, Worker())
        norm = train.update(parts["total"], system, adamw, scaler, 1.0)
        failure.note(3, parts, norm, torch.tensor(False))
    assert failure.first == -1


@pytest.mark.parametrize(
    "look", [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: bool(x[0] > 0)]
)
def test_a_look_at_the_device_is_noticed(look: Any) -> None:
    with NothingIsReadBack(), pytest.raises(AssertionError, match="waits"):
        look(torch.ones(3))
