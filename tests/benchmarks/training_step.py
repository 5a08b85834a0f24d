"""Images a second and model FLOPs utilisation (MFU) of a training step, at the shapes of the published recipes.

    PYTHONPATH=tests python -m benchmarks.training_step [--batch N] [--on PRESET] [RECIPE ...]

Synthetic input that is on the device already, real model, loss and update. Without --batch: the recipe's batch on a
GPU, four images on the CPU. FLOPs are those that the mathematics needs, two a multiplication and addition, forward and
backward; the peak is what a large matrix product reaches here in the step's precision.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from setwise.models.config import BertConfig, RegionsConfig
from setwise.pipelines import estimate, footprint, hardware, optimizer, recipe, train
from setwise.pipelines.batches import Batch, Share
from setwise.pipelines.footprint import Inputs
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.retrieval import Retrieval
from setwise.pipelines.workers import Worker

REGIONS, CAPTIONS, MEAN, LONGEST = 36, 5, 15, 30
VOCABULARY = {"coco": 11_755, "coco_butd": 11_353, "f30k": 8_590, "f30k_butd": 8_481}
RECIPES = ("digits_cnn_bigru", "coco_butd_bigru", "coco_resnet152_bigru", "coco_resnext101_bert")
REPEATS = 5
COLUMNS = {"batch": 6, "": 6, "s a step": 10, "images/s": 11, "TFLOP": 10, "GFLOP/s": 10, "MFU %": 8, "GiB": 8}


def share(settings: Recipe, batch: int, vocabulary: int, device: torch.device) -> Share:
    """A batch of made-up images, each with five captions of 8 to 30 tokens, 15 on average as in COCO."""
    generator = torch.Generator().manual_seed(0)
    encoder, size = settings.model.image_encoder, settings.data.image_size
    if isinstance(encoder, RegionsConfig):
        images = torch.rand(batch, REGIONS, encoder.feature_dim, generator=generator)
    else:
        images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)
    lengths = torch.randint(8, 22, (CAPTIONS * batch,), generator=generator)
    lengths[0] = LONGEST
    tokens = torch.randint(5, vocabulary, (len(lengths), LONGEST), generator=generator)
    tokens *= torch.arange(LONGEST) < lengths[:, None]
    owners = torch.arange(len(lengths)) // CAPTIONS
    keys = torch.arange(batch), torch.arange(len(lengths))
    return Share(Batch(images, tokens, lengths, owners), *keys, (batch,), (len(lengths),), owners).to(device)


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    x, y = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: x @ y, device) for _ in range(REPEATS))


def timed(function: object, device: torch.device) -> float:
    assert callable(function)
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(name: str, batch: int | None, on: str, device: torch.device) -> str:
    if device.type == "cuda":
        settings = estimate.settled(hardware.load_recipe(name, [], on), on, Path(".setwise"))
    else:
        settings = recipe.load(name, ["train.precision=fp32"])
    batch = batch or (settings.train.batch_size if device.type == "cuda" else 4)
    vocabulary = VOCABULARY.get(settings.data.name, 100)
    if isinstance(settings.model.text_encoder, BertConfig):
        vocabulary = 30_522
    torch.manual_seed(0)
    retrieval = Retrieval(settings, vocabulary)
    retrieval.to(device).train()
    if device.type == "cuda":
        retrieval.to(memory_format=torch.channels_last)
    adamw = optimizer.make(retrieval, settings.optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.train.precision == "fp16")
    one = share(settings, batch, vocabulary, device)

    def step() -> Tensor:
        parts = train.global_loss(retrieval.retriever, retrieval, one, 0.0, Worker(device=device))
        return train.update(parts["total"], retrieval, adamw, scaler, settings.optimizer.clip_norm)

    step()
    seconds = statistics.median(timed(step, device) for _ in range(REPEATS))
    inputs = Inputs(settings.data.image_size, REGIONS, CAPTIONS, vocabulary, MEAN, LONGEST)
    counted = footprint.count(settings.model, inputs, settings.train.precision != "fp32")
    forward = sum(part.flops for part in counted.parts)
    flops = 3 * batch * forward + estimate.loss_flops(settings, batch, CAPTIONS * batch, inputs)
    dtype = train.PRECISIONS[settings.train.precision]
    gib = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if device.type == "cuda" else "-"
    utilisation = 100 * flops / seconds / peak(device, dtype)
    return (
        f"{name:<24}{batch:>6}{settings.train.precision:>6}{seconds:>10.3f}{batch / seconds:>11.1f}"
        f"{flops / 1e12:>10.3f}{flops / seconds / 1e9:>10.0f}{utilisation:>8.1f}{gib:>8}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="images a second and MFU of a training step")
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--on", default="h200x1", help="preset of the GPU: its precision, and what fits it at a time")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"one thread of {os.cpu_count()} CPUs"
    print(f"{where}, {platform.machine()}, torch {torch.__version__}; median of {REPEATS} steps")
    print(f"{'recipe':<24}" + "".join(f"{head:>{width}}" for head, width in COLUMNS.items()))
    for name in arguments.recipes:
        try:
            print(measure(name, arguments.batch, arguments.on, device))
        except torch.OutOfMemoryError as error:
            print(f"{name:<24}does not fit: {error}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
