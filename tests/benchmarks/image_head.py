"""What computing the image projection once saves: CPU time of one thread, and floating-point operations.

    PYTHONPATH=tests python -m benchmarks.image_head

"Four times" is the order of the authors' code: phi(x) anew for the slots and for the pooling, and fc(x) twice in each.
Dropout is left out in both, so that both compute the same numbers, which is checked first. Region features are data;
cells come from a backbone, which wants their gradient.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from setwise.models.config import ImageHeadConfig
from setwise.models.image_head import ImageHead, pool

WIDTH, EMBED_SIZE = 2048, 1024
REPETITIONS = 9


def once(head: ImageHead, x_BNF: Tensor) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = head(x_BNF)
    return result


def four_times(head: ImageHead, x_BNF: Tensor) -> tuple[Tensor, Tensor]:
    assert head.fc is not None and head.mlp is not None
    local_BND = head.mlp(head.fc(x_BNF), None) + head.fc(x_BNF)
    for_pooling_BND = head.mlp(head.fc(x_BNF), None) + head.fc(x_BNF)
    return local_BND, pool(for_pooling_BND, None, "max")


def cpu_ms(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start)


def measure(batch: int, num: int, from_backbone: bool) -> list[tuple[str, str, list[float], float]]:
    """(name, direction, ms an image of each repetition, GFLOP an image), the repetitions interleaved."""
    torch.manual_seed(0)
    head = ImageHead(ImageHeadConfig(dropout=0), WIDTH, EMBED_SIZE)
    x_BNF = torch.rand(batch, num, WIDTH, requires_grad=from_backbone)
    for ours, theirs in zip(once(head, x_BNF), four_times(head, x_BNF), strict=True):
        torch.testing.assert_close(ours, theirs)

    def forward(variant: Callable[[ImageHead, Tensor], tuple[Tensor, Tensor]]) -> None:
        with torch.no_grad():
            variant(head, x_BNF)

    def step(variant: Callable[[ImageHead, Tensor], tuple[Tensor, Tensor]]) -> None:
        local_BND, pooled_BD = variant(head, x_BNF)
        (local_BND.square().mean() + pooled_BD.square().mean()).backward()

    runs = {
        (variant.__name__, direction): (lambda run=run, variant=variant: run(variant))
        for variant in (once, four_times)
        for direction, run in (("forward", forward), ("forward and backward", step))
    }
    operations = {}
    for key, call in runs.items():  # the first call warms up too
        with FlopCounterMode(display=False) as counter:
            call()
        operations[key] = counter.get_total_flops() / batch / 1e9
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(REPETITIONS):
        for key, call in runs.items():
            times[key].append(cpu_ms(call) / batch)
    return [(*key, times[key], operations[key]) for key in runs]


def main() -> None:
    torch.set_num_threads(1)
    lines = [
        f"torch {torch.__version__}, one thread, float32, {WIDTH} -> {EMBED_SIZE}",
        f"{'':44}{f'CPU ms / image, median of {REPETITIONS}':>36}{'GFLOP / image':>15}",
    ]
    for batch, num, what in ((16, 36, "regions"), (4, 256, "cells")):
        results = measure(batch, num, from_backbone=what == "cells")
        for name, direction, times, operations in sorted(results, key=lambda row: row[1]):
            spread = f"{statistics.median(times):.1f} ({min(times):.1f}..{max(times):.1f})"
            lines.append(f"{num:>4} {what:8} {name:11}{direction:20}{spread:>36}{operations:>15.2f}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
