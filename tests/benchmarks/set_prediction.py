"""What folding the key and value projections into the slots saves: CPU time of one thread, forward and backward.

    PYTHONPATH=tests python -m benchmarks.set_prediction

The yardstick is the authors' formulation, which projects all inputs to keys and values in every iteration. Sizes are
the published ones: K=4 slots, T=4 iterations, 4 heads of 512, width 1024. Both compute the same function with the same
weights: the last column is the largest difference, in float64, of the sets and of the gradients of all features and
weights, whose largest entries are of the order of 0.1 to 1. The exit status says whether the times asked for are
reached, and this difference is at most 1e-12.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from reference.official_set_prediction import official_sets
from setwise.models.config import Positions, SetPredictionConfig
from setwise.models.set_prediction import Features, SetPrediction, sine_code_1d

EMBED_SIZE = 1024
REPETITIONS = 5
TOLERANCE = 1e-12

Variant = Callable[[SetPrediction, Features, Tensor | None], Tensor]


def ours(module: SetPrediction, features: Features, code: Tensor | None) -> Tensor:
    """`code` is what the module computes for itself."""
    sets: Tensor = module(features).sets
    return sets


def official(module: SetPrediction, features: Features, code: Tensor | None) -> Tensor:
    return official_sets(module, features, code)[0]


def problem(
    batch: int, num: int, width: int, positions: Positions, dtype: torch.dtype
) -> tuple[SetPrediction, Features, Tensor | None, Tensor]:
    """A module, features that want their gradient, their position code, and the gradient of the sets."""
    torch.manual_seed(0)
    module = SetPrediction(SetPredictionConfig(dropout=0), EMBED_SIZE, width, positions).to(dtype)
    local_BNX = torch.randn(batch, num, width, dtype=dtype, requires_grad=True)
    pooled_BD = torch.randn(batch, EMBED_SIZE, dtype=dtype, requires_grad=True)
    code_NX = sine_code_1d(num, width).to(dtype) if positions == "sine" else None
    return module, Features(local_BNX, pooled_BD), code_NX, torch.randn(batch, 4, EMBED_SIZE, dtype=dtype)


def step(
    variant: Variant, module: SetPrediction, features: Features, code: Tensor | None, gradient: Tensor
) -> tuple[float, list[Tensor]]:
    """CPU milliseconds of one forward and backward pass, the sets, and the gradients of features and weights."""
    wanted = [features.local, features.pooled, *module.parameters()]
    for tensor in wanted:
        tensor.grad = None
    start = time.process_time()
    sets = variant(module, features, code)
    torch.autograd.backward(sets, gradient)
    elapsed = 1e3 * (time.process_time() - start)
    return elapsed, [sets.detach(), *(tensor.grad for tensor in wanted if tensor.grad is not None)]


def largest_difference(num: int, width: int, positions: Positions) -> float:
    """Of the sets, and of the gradients of every feature and weight, between both variants in float64."""
    case = problem(2, num, width, positions, torch.float64)
    found, expected = step(ours, *case)[1], step(official, *case)[1]
    assert len(found) == len(expected) == 3 + len(list(case[0].parameters()))
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


def measure(batch: int, num: int, width: int, positions: Positions) -> tuple[list[float], list[float], float, float]:
    """Milliseconds of each repetition, ours and official, interleaved; GFLOP of each."""
    case = problem(batch, num, width, positions, torch.float32)
    operations: list[float] = []
    times: tuple[list[float], list[float]] = ([], [])
    for variant in (ours, official):  # which warms up too
        with FlopCounterMode(display=False) as counter:
            step(variant, *case)
        operations.append(counter.get_total_flops() / 1e9)
    for _ in range(REPETITIONS):
        for variant, measured in zip((ours, official), times, strict=True):
            measured.append(step(variant, *case)[0])
    return *times, operations[0], operations[1]


def main() -> None:
    torch.set_num_threads(1)
    cases: tuple[tuple[str, int, int, int, Positions, float | None], ...] = (
        ("36 regions", 32, 36, 1024, "none", 2.5),
        ("36 regions", 16, 36, 1024, "none", None),
        ("36 regions", 8, 36, 1024, "none", None),
        ("7 x 7 grid", 16, 49, 1024, "none", None),
        ("16 x 16 grid", 16, 256, 1024, "none", 8),
        ("16 x 16 grid", 8, 256, 1024, "none", None),
        ("13 words", 64, 13, 300, "sine", None),
    )
    say = sys.stdout.write
    say(
        f"torch {torch.__version__}, one thread, float32, CPU ms a sample, forward and backward, median of "
        f"{REPETITIONS} (smallest..largest), interleaved\n"
        f"{'inputs':13} width batch {'official':>22} {'ours':>20} {'times':>6} {'asked':>5} "
        f"{'GFLOP':>14} {'times':>5} {'difference':>10}\n"
    )
    met = True
    for name, batch, num, width, positions, asked in cases:
        our_ms, official_ms, our_gflop, official_gflop = measure(batch, num, width, positions)
        difference = largest_difference(num, width, positions)
        speedup = statistics.median(official_ms) / statistics.median(our_ms)
        met = met and difference <= TOLERANCE and (asked is None or speedup >= asked)
        spread = [
            f"{statistics.median(ms) / batch:.1f} ({min(ms) / batch:.1f}..{max(ms) / batch:.1f})"
            for ms in (official_ms, our_ms)
        ]
        say(
            f"{name:13} {width:5} {batch:5} {spread[0]:>22} {spread[1]:>20} {speedup:>5.2f}x {asked or '':>5} "
            f"{official_gflop / batch:>6.2f}, {our_gflop / batch:>6.2f} {official_gflop / our_gflop:>4.1f}x "
            f"{difference:>10.1e}\n"
        )
        sys.stdout.flush()
    sys.exit(0 if met else "a requirement is not met")


if __name__ == "__main__":
    main()
