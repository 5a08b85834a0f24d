"""Batch normalisation is torch's where nothing is padded, knows nothing of padding, and is the same for any number of
workers: real processes, with shares of different sizes, an empty one, and one of padding alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from setwise.models.batch_norm import BatchNorm, has_batch_statistics, synchronize

CHANNELS = 5
# For each number of workers: how many of the twelve samples each of them has. The last three are padding alone.
SHARES = {1: [12], 2: [9, 3], 4: [5, 0, 4, 3]}
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tokens(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tokens (12,7,C) that are neither centred nor of one scale, and where they are padding."""
    x = (numbers(12, 7, CHANNELS) * torch.linspace(0.5, 3, CHANNELS) + torch.linspace(-2, 4, CHANNELS)).to(dtype)
    is_padding = numbers(12, 7, seed=1) > 0.5
    is_padding[9:] = True
    return x, is_padding


def images(dtype: torch.dtype) -> Tensor:
    return (numbers(12, CHANNELS, 3, 4, seed=2) * 2 + 1).to(dtype)


def with_other_weights(norm: nn.Module, dtype: torch.dtype) -> nn.Module:
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, CHANNELS))
        norm.bias.copy_(torch.linspace(1, 0, CHANNELS))
    return norm.to(dtype)


def results(norm: nn.Module, x: Tensor, grad: Tensor, *is_padding: Tensor | None) -> dict[str, Tensor]:
    """All that two steps in training and one call in evaluation show; the second step has other inputs."""
    found: dict[str, Tensor] = {}
    for step in (1, 2):
        inputs = (x * step + step).requires_grad_()
        norm.zero_grad()
        y = norm(inputs, *is_padding)
        (y * grad).sum().backward()
        found |= {f"y{step}": y.detach(), f"x_grad{step}": inputs.grad}
        found |= {f"{name}_grad{step}": p.grad.clone() for name, p in norm.named_parameters()}
        found |= {f"{name}{step}": buffer.clone() for name, buffer in norm.named_buffers()}
    norm.eval()
    return found | {"evaluated": norm(x, *is_padding).detach()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        scale = max(expected[name].abs().max().item(), 1) if expected[name].numel() else 1
        torch.testing.assert_close(
            found[name], expected[name], rtol=0, atol=tolerance * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


# --- one worker -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("padding", [None, "nowhere"])  # torch's own kernels, and ours
def test_without_padding_it_is_torchs(dtype: torch.dtype, padding: str | None) -> None:
    x, grad = tokens(dtype)[0], numbers(12, 7, CHANNELS, seed=3, dtype=dtype)
    nowhere = None if padding is None else torch.zeros(12, 7, dtype=torch.bool)
    found = results(with_other_weights(BatchNorm(CHANNELS, momentum=0.3, eps=1e-3), dtype), x, grad, nowhere)
    torchs = with_other_weights(nn.BatchNorm1d(CHANNELS, momentum=0.3, eps=1e-3), dtype)
    expected = results(torchs, x.transpose(1, 2), grad.transpose(1, 2))
    expected = {name: value.transpose(1, 2) if value.ndim == 3 else value for name, value in expected.items()}
    assert_same(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("padding", [None, "nowhere"])
def test_of_images_it_is_torchs(dtype: torch.dtype, padding: str | None) -> None:
    x, grad = images(dtype), numbers(12, CHANNELS, 3, 4, seed=3, dtype=dtype)
    nowhere = None if padding is None else torch.zeros(12, 3, 4, dtype=torch.bool)
    found = results(with_other_weights(BatchNorm(CHANNELS, channel_dim=1), dtype), x, grad, nowhere)
    assert_same(found, results(with_other_weights(nn.BatchNorm2d(CHANNELS), dtype), x, grad), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_padding_counts_for_nothing(dtype: torch.dtype) -> None:
    x, is_padding = tokens(dtype)
    grad = numbers(12, 7, CHANNELS, seed=3, dtype=dtype).masked_fill(is_padding[..., None], 0)
    far_off = x.masked_fill(is_padding[..., None], 1e4)
    found = results(with_other_weights(BatchNorm(CHANNELS), dtype), far_off, grad, is_padding)
    expected = results(with_other_weights(nn.BatchNorm1d(CHANNELS), dtype), x[~is_padding], grad[~is_padding])
    found_valid = {name: value[~is_padding] if value.ndim == 3 else value for name, value in found.items()}
    assert_same(found_valid, expected, 2 * TOLERANCE[dtype])  # other entries are summed in another order
    for name in ("x_grad1", "x_grad2"):
        assert not found[name][is_padding].any()


def test_gradients_are_those_of_finite_differences_at_padding_too() -> None:
    norm, is_padding = BatchNorm(3).double(), torch.tensor([[False, False, True], [False, True, True]])

    def normalized(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x, is_padding))

    inputs = [numbers(2, 3, 3), numbers(3, seed=1), numbers(3, seed=2)]
    assert torch.autograd.gradcheck(normalized, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("valid", [0, 1])
def test_fewer_than_two_entries_say_nothing_of_a_variance(valid: int) -> None:
    norm = with_other_weights(BatchNorm(CHANNELS), torch.float64)
    x = numbers(2, 3, CHANNELS).requires_grad_()
    is_padding = torch.arange(6).view(2, 3) >= valid
    y = norm(x, is_padding)
    y.sum().backward()
    torch.testing.assert_close(y.flatten(0, 1)[:valid], norm.bias.expand(valid, -1))
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert (norm.running_mean == 0).all() and (norm.running_var == 1).all()


def test_an_empty_batch_and_a_single_entry_pass() -> None:
    norm = BatchNorm(CHANNELS)
    assert norm(torch.empty(0, 7, CHANNELS)).shape == (0, 7, CHANNELS)
    assert (norm(torch.ones(1, 1, CHANNELS)) == 0).all()
    assert (norm.running_mean == 0).all() and (norm.running_var == 1).all()


def test_a_small_spread_far_from_zero_is_kept_in_single_precision() -> None:
    x = 1000 + numbers(64, 8, CHANNELS) / 8
    y = BatchNorm(CHANNELS)(x.float(), torch.zeros(64, 8, dtype=torch.bool))
    exact = BatchNorm(CHANNELS).double()(x.float().double())
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-3)  # float32 has steps of 5e-4 of the spread here


@pytest.mark.parametrize("padded", [True, False])
def test_half_precision_is_normalised_by_precise_statistics(padded: bool) -> None:
    x = (numbers(64, 50, CHANNELS) + 20).bfloat16()
    is_padding = numbers(64, 50, seed=1) > 0.5
    norm = BatchNorm(CHANNELS, momentum=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x, is_padding if padded else None)
    valid = x[~is_padding].double() if padded else x.double().flatten(0, 1)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(norm.running_mean.double(), valid.mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(norm.running_var.double(), valid.var(0), rtol=1e-4, atol=0)


def test_another_number_of_channels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected 5 channels in dimension -1, got \(2, 5, 4\)"):
        BatchNorm(5)(torch.zeros(2, 5, 4))
    with pytest.raises(ValueError, match="in dimension 1"):
        BatchNorm(5, channel_dim=1)(torch.zeros(2, 4, 5, 5))


# --- several workers --------------------------------------------------------------------------------------------


def cases(dtype: torch.dtype) -> dict[str, tuple[BatchNorm, Tensor, Tensor, Tensor | None]]:
    """Module, inputs, gradient of the outputs and padding of the whole batch."""
    x, is_padding = tokens(dtype)
    of_images = numbers(12, CHANNELS, 3, 4, seed=3, dtype=dtype)
    return {
        "tokens": (BatchNorm(CHANNELS, momentum=0.19), x, numbers(12, 7, CHANNELS, seed=4, dtype=dtype), is_padding),
        "images": (BatchNorm(CHANNELS, channel_dim=1), images(dtype), of_images, None),
    }


def work(rank: int, workers: int, folder: Path) -> None:
    """One worker of so many: its share of every case, results to a file."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/of{workers}", rank=rank, world_size=workers)
    start = sum(SHARES[workers][:rank])
    share = slice(start, start + SHARES[workers][rank])
    found: dict[str, dict[str, Tensor]] = {}
    for dtype in TOLERANCE:
        for name, (norm, x, grad, is_padding) in cases(dtype).items():
            # Images through one of torch's modules, converted; tokens through ours.
            inside = norm if is_padding is not None else nn.BatchNorm2d(CHANNELS)
            holder = synchronize(nn.Sequential(with_other_weights(inside, dtype)))
            padding = () if is_padding is None else (is_padding[share],)
            found[f"{name} {dtype}"] = results(holder[0], x[share], grad[share], *padding)
    torch.save(found, folder / f"{rank}of{workers}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_workers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each of 1, 2 and 4 workers found: of four processes, the first ones work in the smaller groups too."""
    folder = tmp_path_factory.mktemp("workers")
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(max(SHARES))
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(errors)
    return {
        workers: [torch.load(folder / f"{rank}of{workers}.pt", weights_only=True) for rank in range(workers)]
        for workers in SHARES
    }


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["tokens", "images"])
@pytest.mark.parametrize("workers", SHARES)
def test_any_number_of_workers_is_one_worker(
    of_workers: dict[int, list[dict[str, Any]]], workers: int, name: str, dtype: torch.dtype
) -> None:
    norm, x, grad, is_padding = cases(dtype)[name]
    expected = results(with_other_weights(norm, dtype), x, grad, is_padding)
    shares = [found[f"{name} {dtype}"] for found in of_workers[workers]]
    together: dict[str, Tensor] = {}
    for key, value in expected.items():
        parts = [share[key] for share in shares]
        if value.ndim > 1:  # of samples: each worker has its own
            together[key] = torch.cat(parts)
        elif "grad" in key:  # of parameters: each worker has its samples' part, as DistributedDataParallel expects
            together[key] = torch.stack(parts).sum(0)
        else:  # running statistics: each worker has the same
            assert all(torch.equal(part, parts[0]) for part in parts)
            together[key] = parts[0]
    assert_same(together, expected, TOLERANCE[dtype])


# --- modules of others ------------------------------------------------------------------------------------------


def others() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, 1e-3, 0.2), nn.ReLU(), nn.Sequential(nn.BatchNorm2d(8)))


def test_synchronizing_keeps_names_parameters_modes_and_results() -> None:
    module, x = others(), images(torch.float32)[:, :3]
    module[3].eval()
    module(x)
    before, parameters, expected = module.state_dict(), dict(module.named_parameters()), others()
    expected.load_state_dict(before)
    expected[3].eval()
    assert synchronize(module) is module
    assert {name: id(p) for name, p in module.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert [type(m) for m in (module[1], module[3][0])] == [BatchNorm, BatchNorm]
    assert [m.synchronized for m in (module[1], module[3][0])] == [True, True]
    assert [m.training for m in (module[1], module[3][0])] == [True, False]
    torch.testing.assert_close(module(x), expected(x))
    after = module.state_dict()
    assert list(after) == list(before)
    torch.testing.assert_close(dict(after), dict(expected.state_dict()))


def test_a_lone_normalisation_is_replaced_and_ours_stays() -> None:
    replaced = synchronize(nn.BatchNorm1d(CHANNELS))
    x = numbers(4, CHANNELS, 3, dtype=torch.float32)
    assert isinstance(replaced, BatchNorm)
    torch.testing.assert_close(replaced(x), nn.BatchNorm1d(CHANNELS)(x))
    assert synchronize(replaced) is replaced


@pytest.mark.parametrize("setting", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}])
def test_what_cannot_be_synchronized_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"cannot synchronise BatchNorm2d.*needs weights"):
        synchronize(nn.Sequential(nn.BatchNorm2d(8, **setting)))


def test_what_normalises_by_the_batch_is_told_apart() -> None:
    module = others()
    assert has_batch_statistics(module) and not has_batch_statistics(module.eval())
    assert has_batch_statistics(module[3].train())
    assert has_batch_statistics(nn.Sequential(BatchNorm(4))) and not has_batch_statistics(BatchNorm(4).eval())
    assert has_batch_statistics(nn.BatchNorm1d(4, track_running_stats=False).eval())
    assert not has_batch_statistics(nn.Sequential(nn.GroupNorm(2, 4), nn.LayerNorm(4)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for group in SHARES:
        if int(sys.argv[1]) < group:
            work(int(sys.argv[1]), group, Path(sys.argv[2]))
