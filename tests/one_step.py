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

from setwise.pipelines import train, trained_model, workers
from setwise.pipelines.batches import Batch, Share
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.workers import Worker

VOCABULARY = 30
CNN = {"kind": "cnn", "channels": [8, 16]}
REGIONS = {"kind": "butd", "feature_dim": 10, "region_drop": 0.3, "head": {"dropout": 0.2}}
GRID = {"kind": "grid", "architecture": "resnet18", "weights": "named", "head": {"dropout": 0.2}}
BERT = {"kind": "bert", "layers": 1, "width": 16, "heads": 2, "ff_width": 32, "max_tokens": 64, "dropout": 0.2}
STATES = {"kind": "bigru", "word_dim": 8, "dropout": 0.2, "local_features": "states"}
RAW_REGIONS = REGIONS | {"head": {"projection": "raw_mlp", "dropout": 0.2}}
ONE_VECTOR = {"similarity": {"kind": "cosine"}, "loss": {"mmd_weight": 0, "diversity_weight": 0}}
FRAGMENTS = {
    "set_prediction": {"kind": "fragments", "max_words": 5},
    "similarity": {"kind": "cross_attention"},
    "loss": {"mmd_weight": 0, "diversity_weight": 0},
}
WORD_SPACE = {
    "text": {"kind": "word_mean"},
    "set_prediction": {"kind": "word_space"},
    "similarity": {"kind": "cosine"},
    "loss": {"kind": "hinge_rank"},
}
CAPTIONER = {"model": {"kind": "captioner", "width": 16, "heads": 2, "ff_width": 24, "dropout": 0.2, "max_words": 5}}
SLOT_AUTOENCODER = {
    "model": {"kind": "slot_autoencoder", "num_slots": 3, "slot_dim": 8, "channels": 6, "mlp_hidden": 9},
    "data": {"image_size": 32},
}
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
    "VSE++": (CNN, ONE_VECTOR | {"set_prediction": {"kind": "pooled"}}, [5, 2, 1, 6, 5, 3, 5]),
    "VSE-infinity": (RAW_REGIONS, ONE_VECTOR | {"set_prediction": {"kind": "gpo"}, "text": STATES}, [5, 3, 2]),
    "VSE-infinity of cells": (
        CNN | {"cell_drop": 0.3},
        ONE_VECTOR | {"set_prediction": {"kind": "gpo"}, "text": STATES},
        [5, 2, 1, 6, 5, 3, 5],
    ),
    "PVSE": (
        REGIONS,
        {
            "set_prediction": {"kind": "pie_net", "dropout": 0.2},
            "similarity": {"kind": "mil"},
            "loss": {"diversity": "gram", "diversity_weight": 0.1},
        },
        [5, 2, 1, 6, 5, 3, 5],
    ),
    "PCME": (
        REGIONS,
        {
            "set_prediction": {"kind": "gaussian", "samples": 3, "initial_log_sigma": -3},
            "similarity": {"kind": "pcme"},
            "loss": {"kind": "soft_contrastive", "kl_weight": 0.01, "uniformity_weight": 0.1},
        },
        [5, 2, 1, 6, 5, 3, 5],
    ),
    "PCME++": (
        CNN,
        {
            "text": STATES,
            "set_prediction": {"kind": "gaussian", "pooling": "gpo", "samples": 0},
            "similarity": {"kind": "csd"},
            "loss": {"kind": "matching", "kl_weight": 0.01},
        },
        [5, 2, 1, 6, 5, 3, 5],
    ),
    "CAAN": (REGIONS, FRAGMENTS | {"text": STATES}, [5, 2, 1, 6, 5, 3, 5]),
    "CAAN, fewer images than workers": (CNN, FRAGMENTS | {"text": STATES}, [5, 3, 2]),
    "DeViSE": (CNN, WORD_SPACE, [5, 2, 1, 6, 5, 3, 5]),
    "DeViSE, fewer images than workers": (REGIONS, WORD_SPACE, [5, 3, 2]),
    "VirTex": (CNN, CAPTIONER, [5, 2, 1, 6, 5, 3, 5]),
    "VirTex of regions, fewer images than workers": (
        REGIONS | {"head": {"projection": "linear"}},
        CAPTIONER,
        [5, 3, 2],
    ),
    "slot autoencoder": (CNN, SLOT_AUTOENCODER, [1] * 7),
    "slot autoencoder, fewer images than workers": (CNN, SLOT_AUTOENCODER, [1] * 3),
}


def recipe(case: str, micro_batch: int | None = None) -> Recipe:
    encoder, settings, _ = CASES[case]
    text = settings.get("text", {"kind": "bigru", "word_dim": 8, "dropout": 0.2})
    slots = {"slots": settings["slots"]} if "slots" in settings else {}
    if "model" in settings:
        of_pixels = settings["model"]["kind"] == "slot_autoencoder"
        model = settings["model"] if of_pixels else settings["model"] | {"image_encoder": encoder}
        return Recipe.model_validate({**settings, "model": model, "train": {"micro_batch": micro_batch}})
    return Recipe.model_validate(
        {
            "model": {
                "embed_size": 16,
                "image_encoder": encoder,
                "text_encoder": text,
                "set_prediction": settings.get(
                    "set_prediction", {"heads": 2, "head_dim": 8, "iterations": 2, "dropout": 0.2, **slots}
                ),
            },
            "train": {"micro_batch": micro_batch},
            **{name: value for name, value in settings.items() if name not in ("slots", "text", "set_prediction")},
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
    own_owners = [place for place, image in enumerate(parts[rank]) for _ in range(captions[image])]
    in_order = [image for part in parts for image in part]
    owners = torch.tensor([place for place, image in enumerate(in_order) for _ in range(captions[image])])
    return Share(
        Batch(images, tokens[mine, :width], lengths[mine], torch.tensor(own_owners, dtype=torch.int64)),
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
    system = trained_model.untrained(settings, VOCABULARY).to(dtype).train()
    encoder = workers.parallel(system.encoder, worker)
    parts = train.global_loss(encoder, system, share(case, worker.rank, worker.world, dtype), 0.0, worker)
    parts["total"].backward()  # type: ignore[no-untyped-call]
    found = {f"loss.{name}": value.detach() for name, value in parts.items()}
    for name, parameter in system.named_parameters():
        assert parameter.grad is not None, name
        found[f"gradient.{name}"] = parameter.grad
    return found | {f"buffer.{name}": buffer for name, buffer in system.named_buffers()}


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
