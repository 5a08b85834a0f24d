"""What computing the loss of a batch in one pass saves: CPU time of one thread and memory, gradients included, against
the authors' formulation and against the bare matrix products.

    PYTHONPATH=tests python -m benchmarks.loss [--repeats N] [IMAGES ...]

Sizes are the published ones: K = J = 4, D = 1024, five captions an image, smooth-Chamfer with alpha = 16, the hardest
negatives. "Products" are the matrix products alone that the algebra needs, in tiles and with their outputs allocated:
images x captions forward and twice backward, and for MMD half of images x images and of captions x captions forward and
all of them backward; without MMD, images x captions forward. "MiB" is the peak of a fresh process over what it held
before the call. "Difference" is the largest of any part and any gradient, relative, in float64; above 512 images, for
which the authors' formulation would take more than 16 GiB, in float32. The exit status says whether the requirements
are met.
"""

import argparse
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from reference.official_loss import official_loss
from setwise.models.batch_loss import batch_loss
from setwise.models.loss_config import SimilarityConfig, TripletConfig
from setwise.models.set_prediction import SetEmbedding
from setwise.models.similarity import Similarity

K, D, CAPTIONS = 4, 1024, 5
SIMILARITY = SimilarityConfig(kind="smooth_chamfer", alpha=16)
CONFIGS = {True: TripletConfig(mmd_weight=0.01), False: TripletConfig(mmd_weight=0)}
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-3}


class Requirement(NamedTuple):
    times_faster: float
    times_products: float
    mib: float


REQUIRED = {
    (200, True): Requirement(2.0, 1.4, 180),
    (1024, True): Requirement(2.5, 1.2, 650),
    (1024, False): Requirement(3.5, math.inf, 650),
}
"""By images, and whether MMD is on."""


class Inputs(NamedTuple):
    image_sets: Tensor
    text_sets: Tensor
    image_slots: Tensor
    text_slots: Tensor

    @property
    def owners(self) -> Tensor:
        return torch.arange(len(self.text_sets)) // CAPTIONS


def inputs(images: int, dtype: torch.dtype = torch.float32) -> Inputs:
    torch.manual_seed(0)
    image_sets, text_sets, image_slots, text_slots = (
        torch.randn(batch, K, D, dtype=dtype) for batch in (images, CAPTIONS * images) * 2
    )
    for sets in (image_sets, text_sets):
        sets.div_(torch.linalg.vector_norm(sets, dim=-1, keepdim=True))
    return Inputs(*(x.requires_grad_() for x in (image_sets, text_sets, image_slots, text_slots)))


def ours(x: Inputs, config: TripletConfig) -> tuple[Tensor, ...]:
    images, texts = SetEmbedding(x.image_sets, x.image_slots), SetEmbedding(x.text_sets, x.text_slots)
    return batch_loss(images, texts, x.owners, Similarity(SIMILARITY), config, "hardest")


def official(x: Inputs, config: TripletConfig) -> tuple[Tensor, ...]:
    return official_loss(*x, x.owners, SIMILARITY, config, "hardest")


VARIANTS = {"official": official, "ours": ours}


def step(variant: str, x: Inputs, config: TripletConfig) -> list[Tensor]:
    """Parts and gradients of one loss, forward and backward."""
    for tensor in x:
        tensor.grad = None
    parts = VARIANTS[variant](x, config)
    parts[-1].backward()  # type: ignore[no-untyped-call]
    return [*(part.detach() for part in parts), *(tensor.grad for tensor in x if tensor.grad is not None)]


def products(images: int, mmd: bool) -> Callable[[], None]:
    """The matrix products alone, in the faster of two sizes of tiles."""
    x_ND, y_MD = torch.randn(K * images, D), torch.randn(CAPTIONS * K * images, D)
    dx_ND, dy_MD, s_NM = torch.zeros_like(x_ND), torch.zeros_like(y_MD), torch.zeros(len(x_ND), len(y_MD))

    def within(rows_ND: Tensor, gradient_ND: Tensor, side: int, buffer: Tensor) -> None:
        rows, gradients = torch.split(rows_ND, side), torch.split(gradient_ND, side)
        for i in range(len(rows)):
            for j in range(i, len(rows)):
                tile = buffer[: len(rows[i]) * len(rows[j])].view(len(rows[i]), len(rows[j]))
                torch.mm(rows[i], rows[j].T, out=tile)
                gradients[i].addmm_(tile, rows[j], alpha=1e-6)
                if i != j:
                    gradients[j].addmm_(tile.T, rows[i], alpha=1e-6)

    def run(side: int, buffer: Tensor) -> None:
        torch.mm(x_ND, y_MD.T, out=s_NM)
        if mmd:
            torch.mm(s_NM, y_MD, out=dx_ND)
            torch.mm(s_NM.T, x_ND, out=dy_MD)
            within(x_ND, dx_ND, side, buffer)
            within(y_MD, dy_MD, side, buffer)

    return min((partial(run, side, torch.zeros(side * side)) for side in (512, 1280)), key=cpu_seconds)


def cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def largest_difference(images: int, mmd: bool, dtype: torch.dtype) -> float:
    x = inputs(images, dtype)
    found, expected = (step(variant, x, CONFIGS[mmd]) for variant in ("ours", "official"))
    pairs = zip(found, expected, strict=True)
    return max((a - b).norm().item() / b.norm().item() if b.any() else a.norm().item() for a, b in pairs)


def extra_mib(variant: str, images: int, mmd: bool) -> float:
    """Of a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.loss",
        "--memory-of",
        variant,
        str(images),
        *([] if mmd else ["--no-mmd"]),
    ]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def extra_mib_of_this_process(variant: str, images: int, mmd: bool) -> float:
    step(variant, inputs(2), CONFIGS[mmd])  # the first call loads libraries
    x = inputs(images)
    before = resident_mib("VmRSS")
    step(variant, x, CONFIGS[mmd])
    return resident_mib("VmHWM") - before


def resident_mib(kind: str) -> float:
    """Linux's account of this process: VmRSS now, VmHWM at its peak. (That of getrusage begins with the parent's.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1024


def measure(images: int, mmd: bool, repeats: int) -> tuple[str, bool]:
    """A line of the table, and whether what is required of it is met."""
    dtype = torch.float64 if images <= 512 else torch.float32
    memory = {variant: extra_mib(variant, images, mmd) for variant in VARIANTS}
    difference = largest_difference(images, mmd, dtype)  # which warms up too
    x = inputs(images)
    calls: dict[str, Callable[[], object]] = {name: partial(step, name, x, CONFIGS[mmd]) for name in VARIANTS}
    calls["products"] = products(images, mmd)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(cpu_seconds(call))
    seconds = {name: statistics.median(measured) for name, measured in times.items()}
    spread = {name: f"{seconds[name]:.3f} ({min(times[name]):.3f}..{max(times[name]):.3f})" for name in times}
    times_faster, times_products = seconds["official"] / seconds["ours"], seconds["ours"] / seconds["products"]
    met = difference <= TOLERANCE[dtype]
    if asked := REQUIRED.get((images, mmd)):
        met = met and times_faster >= asked.times_faster and times_products <= asked.times_products
        met = met and memory["ours"] <= asked.mib
    return (
        f"{images:6} {'on' if mmd else 'off':>3} "
        f"{spread['official']:>24} {spread['ours']:>24} {spread['products']:>24} "
        f"{times_faster:>8.2f} {times_products:>8.2f} {memory['official']:>8.0f} {memory['ours']:>5.0f} "
        f"{difference:>10.1e}{'' if met else '  MISSED'}\n"
    ), met


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else platform.processor()}"


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time and memory of the loss of a batch")
    parser.add_argument("images", nargs="*", type=int, default=[128, 200])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--no-mmd", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    say = sys.stdout.write
    if arguments.memory_of:
        say(str(extra_mib_of_this_process(arguments.memory_of, arguments.images[0], not arguments.no_mmd)))
        return
    say(
        f"torch {torch.__version__}, one thread of {processor()}, float32, CPU seconds of one loss with its gradient, "
        f"median of {arguments.repeats} (smallest..largest), interleaved\n"
        f"images MMD {'official':>24} {'ours':>24} {'products':>24} "
        f"{'official':>8} {'ours /':>8} {'MiB':>8} {'MiB':>5}\n"
        f"{'':84} {'/ ours':>8} {'products':>8} {'official':>8} {'ours':>5} {'difference':>10}\n"
    )
    met = True
    for images in arguments.images:
        for mmd in (True, False):
            line, fine = measure(images, mmd, arguments.repeats)
            say(line)
            sys.stdout.flush()
            met = met and fine
    sys.exit(0 if met else "a requirement is not met")


if __name__ == "__main__":
    main()
