"""What a query costs as the gallery grows: the argument for embeddings, measured.

Embeddings of a gallery are computed once, and a query is compared with them by dot products; cross-attention has to be
computed anew for every pair. Both grow with the gallery; how fast is what differs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from setwise.pipelines import index, prepare
from setwise.pipelines.trained_model import TrainedModel
from setwise.platform import storage
from setwise.sweeps import deck_measure

SIZES = (100, 200, 500, 1000, 2000, 5000)
"""Images of a gallery."""
REPETITIONS = 9
DISTINCT = 100
"""Images that are encoded; a gallery repeats them, since what they show makes no difference to the time."""
FILE = "speed.json"
WAY = 2
"""How times are taken, and how scores are computed: what was kept of another number is taken anew. 2: cross-attention
compares a caption with many images at once."""


@dataclass(frozen=True)
class Speed:
    """Milliseconds, one value a repetition.

    Repetitions are interleaved: in each, every system has its turn, so that what else the machine does meets all alike.
    caption, image: to encode one of them. search: to compare an encoded caption with a gallery, by its size.
    """

    threads: int
    device: str
    caption: dict[str, list[float]]
    image: dict[str, list[float]]
    search: dict[str, dict[int, list[float]]]

    @property
    def sizes(self) -> list[int]:
        return sorted({size for one in self.search.values() for size in one})

    @property
    def repetitions(self) -> int:
        return len(next(iter(self.caption.values())))

    def median(self, name: str, size: int) -> float:
        """Of the search."""
        return statistics.median(self.search[name][size])

    def per_thousand(self, name: str) -> float:
        """Milliseconds that 1,000 images more cost, between the smallest and the largest gallery."""
        low, high = self.sizes[0], self.sizes[-1]
        return 1000 * (self.median(name, high) - self.median(name, low)) / (high - low)

    def factor(self, slower: str, faster: str) -> tuple[float, float, float]:
        """How many times longer a search takes in the largest gallery: the median over repetitions, and its interval.

        Between the second of nine values and the last but one the median lies in 96 of 100 cases, whatever their
        distribution is (the interval of the sign test).
        """
        size = self.sizes[-1]
        ratios = sorted(a / b for a, b in zip(self.search[slower][size], self.search[faster][size], strict=True))
        return statistics.median(ratios), ratios[1], ratios[-2]

    def growth(self, name: str) -> str:
        """How the time of a search grows, in words."""
        low, high = self.sizes[0], self.sizes[-1]
        times = self.median(name, high) / max(self.median(name, low), 1e-9)
        return (
            f"{name}: {self.median(name, low):.3g} ms among {low:,} images, {self.median(name, high):.3g} ms among "
            f"{high:,} ({times:.1f} times as long for {high / low:.0f} times the images); 1,000 images more cost "
            f"{self.per_thousand(name):.3g} ms"
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "medians": {name: self._medians(name) for name in self.search}}

    def _medians(self, name: str) -> dict[str, Any]:
        return {
            "caption": statistics.median(self.caption[name]),
            "image": statistics.median(self.image[name]),
            "search": {size: self.median(name, size) for size in self.sizes},
            "per 1,000 images": self.per_thousand(name),
        }


def measured(models: Mapping[str, TrainedModel], store: Path, folder: Path, sizes: tuple[int, ...] = SIZES) -> Speed:
    """The times of these models, by the names of their variants; what `folder` keeps of the same models is read."""
    key = {"models": {name: model.digest for name, model in models.items()}, "sizes": list(sizes), "way": WAY}
    file = folder / FILE
    if file.is_file() and (kept := storage.read_json(file)).get("of") == key:
        found = kept["speed"]
        search = {name: {int(size): times for size, times in one.items()} for name, one in found["search"].items()}
        return Speed(**{**found, "search": search})
    speed = measure(models, store, sizes)
    storage.write_json(file, {"of": key, "speed": asdict(speed)})
    return speed


def measure(models: Mapping[str, TrainedModel], store: Path, sizes: tuple[int, ...] = SIZES) -> Speed:
    """Time them on images and captions of the test split, each by itself, as a user's query comes."""
    images, galleries, captions = {}, {}, {}
    for name, model in models.items():
        split = index.open_split(model, prepare.open_prepared(model.recipe.data.name, store), deck_measure.SPLIT)
        distinct = deck_measure.first(model, split, DISTINCT).image_sets
        times = -(-max(sizes) // len(distinct))
        galleries[name] = distinct.repeat(times, 1, 1)[: max(sizes)].to(model.device)
        images[name] = split.batch([0]).images
        captions[name] = [split.caption(place) for place in range(min(REPETITIONS + 1, len(split.owners)))]
    caption: dict[str, list[float]] = {name: [] for name in models}
    image: dict[str, list[float]] = {name: [] for name in models}
    search: dict[str, dict[int, list[float]]] = {name: {size: [] for size in sizes} for name in models}
    for repetition in range(REPETITIONS + 1):
        for name, model in models.items():
            text = captions[name][repetition % len(captions[name])]
            texts, spent = _timed(model.encode_captions, [text])
            caption[name].append(spent)
            image[name].append(_timed(model.encode_images, images[name])[1])
            for size in sizes:
                search[name][size].append(_timed(model.scores, galleries[name][:size], texts)[1])
    device = next(iter(models.values())).device
    return Speed(
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        caption={name: times[1:] for name, times in caption.items()},  # the first warms caches up
        image={name: times[1:] for name, times in image.items()},
        search={name: {size: times[1:] for size, times in one.items()} for name, one in search.items()},
    )


def _timed(work: Callable[..., torch.Tensor], *given: Any) -> tuple[torch.Tensor, float]:
    """The result, which lies on the CPU, and milliseconds."""
    started = time.perf_counter()
    result = work(*given)
    return result, 1000 * (time.perf_counter() - started)
