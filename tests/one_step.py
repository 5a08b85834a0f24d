"""One training step of a small model on a made-up global batch, alone or as one of several real processes.

As a program, `one_step.py RANK WORLD MEETING_POINT OUT`, it takes part with others and writes what came out.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors.torch import save_file
from torch import Tensor

from setwise.pipelines import train, workers
from setwise.pipelines.batches import Batch, Share
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.trained_model import Retrieval
from setwise.pipelines.workers import Worker

VOCABULARY = 30
CNN = {"kind": "cnn", "channels": [8, 16]}
REGIONS = {"kind": "butd", "feature_dim": 10, "region_drop": 0.3, "head": {"dropout": 0.2}}
GRID = {"kind": "grid", "architecture": "resnet18", "weights": "named", "head": {"dropout": 0.2}}
BERT = {"kind": "bert", "layers": 1, "width": 16, "heads": 2, "ff_width": 32, "max_tokens": 64, "dropout": 0.2}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], list[int]]] = {
    # encoder of images; other settings; captions of each image of the global batch
    "cnn": (CNN, {}, [5] * 12),
    "cnn, uneven": (CNN, {}, [5, 2, 1, 6, 5, 3, 5, 5, 4, 1]),
    "cnn, fewer images than workers": (CNN, {}, [5, 3, 2]),
    "regions": (REGIONS, {}, [5] * 12),
    "regions, uneven": (REGIONS, {}, [5, 2, 1, 6, 5, 3, 5, 5, 4, 1]),
    "regions, fewer images than workers": (REGIONS, {}, [5, 3, 2]),
    "match probability": (CNN, {"similarity": {"kind": "match_probability"}}, [5, 2, 1, 6, 5, 3, 5]),
    "all negatives": (CNN, {"loss": {"negatives": "all"}}, [5, 2, 1, 6, 5, 3, 5]),
    "grid and BERT": (GRID, {"text": BERT}, [5, 2, 1, 6, 5, 3, 5]),
    "sampled slots": (REGIONS, {"slots": "sampled"}, [5, 2, 1, 6, 5, 3, 5]),
}


def recipe(case: str, micro_batch: int | None = None) -> Recipe:
    encoder, settings, _ = CASES[case]
    text = settings.get("text", {"kind": "bigru", "word_dim": 8, "dropout": 0.2})
    slots = {"slots": settings["slots"]} if "slots" in settings else {}
    return Recipe.model_validate(
        {
            "model": {
                "embed_size": 16,
                "image_encoder": encoder,
                "text_encoder": text,
                "set_prediction": {"heads": 2, "head_dim": 8, "iterations": 2, "dropout": 0.2, **slots},
            },
            "train": {"micro_batch": micro_batch},
            **{name: value for name, value in settings.items() if name not in ("slots", "text")},
        }
    )


def share(case: str, rank: int, world: int, dtype: torch.dtype) -> Share:
    """The part of worker `rank` of `world`: every `world`-th image, as in training."""
    encoder, _, captions = CASES[case]
    generator = torch.Generator().manual_seed(1)
    if encoder["kind"] != "butd":
        images = torch.randint(0, 256, (len(captions), 3, 32, 32), dtype=torch.uint8, generator=generator)
    else:
        images = torch.randn(len(captions), 6, encoder["feature_dim"], generator=generator, dtype=dtype)
    lengths = torch.randint(1, 8, (sum(captions),), generator=generator)
    tokens = torch.randint(1, VOCABULARY, (sum(captions), 7), generator=generator) * (
        torch.arange(7) < lengths[:, None]
    )
    firsts = [sum(captions[:image]) for image in range(len(captions))]
    parts = [list(range(other, len(captions), world)) for other in range(world)]
    rows = [[first for i in part for first in range(firsts[i], firsts[i] + captions[i])] for part in parts]
    mine = torch.tensor(rows[rank], dtype=torch.int64)
    width = max(int(lengths[mine].max()) if len(mine) else 1, 1)
    images = images[parts[rank]]
    in_order = [image for part in parts for image in part]
    owners = torch.tensor([place for place, image in enumerate(in_order) for _ in range(captions[image])])
    return Share(
        Batch(images, tokens[mine, :width], lengths[mine], torch.zeros(len(mine), dtype=torch.int64)),
        image_keys=1000 + torch.tensor(parts[rank], dtype=torch.int64),
        text_keys=2000 + mine,
        images=tuple(map(len, parts)),
        captions=tuple(map(len, rows)),
        owners=owners,
    )


def step(case: str, worker: Worker, dtype: torch.dtype, micro_batch: int | None = None) -> dict[str, Tensor]:
    """Loss parts, gradients and buffers after one step, by name."""
    torch.manual_seed(0)
    settings = recipe(case, micro_batch)
    retrieval = Retrieval(settings, VOCABULARY).to(dtype).train()
    forward = workers.parallel(retrieval.retriever, worker)
    parts = train.global_loss(forward, retrieval, share(case, worker.rank, worker.world, dtype), settings, 0.0, worker)
    parts.total.backward()  # type: ignore[no-untyped-call]
    found = {f"loss.{name}": value.detach() for name, value in parts._asdict().items()}
    for name, parameter in retrieval.named_parameters():
        assert parameter.grad is not None, name
        found[f"gradient.{name}"] = parameter.grad
    return found | {f"buffer.{name}": buffer for name, buffer in retrieval.named_buffers()}


def main(rank: int, world: int, meeting_point: str, out: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=world)
    for dtype in (torch.float64, torch.float32):
        for case in CASES:
            found = step(case, Worker(rank, world), dtype)
            save_file(found, out / f"{case}-{dtype}-{rank}.safetensors")
            pieces = step(case, Worker(rank, world), dtype, micro_batch=2)
            save_file(pieces, out / f"{case}-{dtype}-{rank}-pieces.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
