"""The memory that a plan predicts, beside what a real training step takes on this machine's processor.

    PYTHONPATH=tests python tests/benchmarks/plan_memory.py

Measured is by how much the largest resident size of a fresh process grows from before the model is made to after its
second step (in the first, AdamW has no moments yet), with random data of the planned sizes. What the process itself
takes is left out on both sides: a small model makes two steps first, for which all libraries are loaded.

"Measured" is with an allocator that gives back what is freed, so it is what the tensors take; "as allocated" is with
glibc's own settings, which keep a part of it. As a program with RECIPE and overrides, it measures one.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from setwise.pipelines.recipe import Recipe

CASES = (
    ("digits_cnn_bigru", "train.batch_size=50"),
    ("digits_cnn_bigru", "train.batch_size=200"),
    ("digits_cnn_bigru", "train.batch_size=200", "train.micro_batch=16"),
    ("coco_butd_bigru", "train.batch_size=16"),
    ("coco_butd_bigru", "train.batch_size=64"),
    ("coco_butd_bigru", "train.batch_size=64", "train.micro_batch=8"),
    ("coco_resnet152_bigru", "train.batch_size=8"),
    ("coco_resnet152_bigru", "train.batch_size=8", "train.micro_batch=2"),
)
ALLOCATOR = "MALLOC_MMAP_THRESHOLD_"
"""glibc's variable: memory of so many bytes or more is given back as soon as it is freed."""
FP32 = "train.precision=fp32"
MIB = 2**20


def predicted(name: str, overrides: list[str]) -> float:
    """Bytes of a step, without the process."""
    from setwise.pipelines import estimate, recipe

    with tempfile.TemporaryDirectory() as store:
        settings = recipe.load(name, overrides)
        memory = estimate.estimate(settings, estimate.sizes(settings, Path(store))).memory
    return memory.total - memory.process


def measured(name: str, overrides: list[str]) -> int:
    """The same, of two real steps in this process, which must be fresh."""
    import torch

    from setwise.models.config import GridConfig
    from setwise.pipelines import recipe

    torch.set_num_threads(1)
    settings = recipe.load(name, overrides)
    small = ["model.embed_size=16", "model.set_prediction.head_dim=4", "train.batch_size=4", FP32]
    if isinstance(settings.model.image_encoder, GridConfig):
        small += ["model.image_encoder.architecture=resnet18", "data.image_size=64"]
    two_steps(recipe.load(name, small))
    before = resident()
    two_steps(settings)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def two_steps(settings: Recipe) -> None:
    """As train.py makes them, on random data."""
    import torch
    from torch import nn

    from setwise.pipelines import estimate, optimizer, train
    from setwise.pipelines.batches import Batch, Share
    from setwise.pipelines.retrieval import Retrieval
    from setwise.pipelines.workers import Worker

    with tempfile.TemporaryDirectory() as store:
        inputs = estimate.sizes(settings, Path(store)).inputs
    images, captions = settings.train.batch_size, settings.train.batch_size * inputs.captions
    if inputs.regions is not None:
        pixels = torch.rand(images, inputs.regions, 2048)
    else:
        pixels = torch.randint(0, 256, (images, 3, inputs.image_size, inputs.image_size), dtype=torch.uint8)
    lengths = torch.full((captions,), inputs.mean_tokens)
    lengths[0] = inputs.longest_tokens
    tokens = torch.randint(1, inputs.vocabulary, (captions, inputs.longest_tokens))
    tokens *= torch.arange(inputs.longest_tokens) < lengths[:, None]
    owners = torch.arange(images).repeat_interleave(inputs.captions)
    keys = torch.arange(images), torch.arange(captions)
    share = Share(Batch(pixels, tokens, lengths, owners), *keys, (images,), (captions,), owners)

    retrieval = Retrieval(settings, inputs.vocabulary).train()
    adamw = optimizer.make(retrieval, settings.optimizer)
    for _ in range(2):
        parts = train.global_loss(retrieval.retriever, retrieval, share, 10.0, Worker())
        adamw.zero_grad(set_to_none=True)
        parts["total"].backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(retrieval.parameters(), settings.optimizer.clip_norm)
        adamw.step()


def resident() -> int:
    """Bytes of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def in_a_fresh_process(case: tuple[str, ...], **environment: str) -> int:
    command = [sys.executable, __file__, *case, FP32]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    return int(done.stdout)


def main() -> None:
    if len(sys.argv) > 1:
        sys.stdout.write(f"{measured(sys.argv[1], sys.argv[2:])}\n")
        return
    sys.stdout.write("MiB of one training step in fp32, without the process itself\n")
    sys.stdout.write(f"{'recipe':<63} {'predicted':>9} {'measured':>15} {'as allocated':>15}\n")
    for case in CASES:
        said = predicted(case[0], [*case[1:], FP32])
        taken = in_a_fresh_process(case, **{ALLOCATOR: "65536"}), in_a_fresh_process(case)
        columns = (f"{size / MIB:>8.0f} {f'({size / said - 1:+.0%})':>6}" for size in taken)
        sys.stdout.write(f"{' '.join(case):<63} {said / MIB:>9.0f} {' '.join(columns)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
