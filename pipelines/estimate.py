"""What a training will take of a machine, estimated before anything is started.

Parameters, operations and activations are counted on the model itself (footprint.py); the rest is arithmetic. From the
memory of a preset's device follows how many images a worker encodes at a time; the batch is never changed. It works
without the data, from published sizes.

Memory is what tensors take at the fullest moment of a step: the end of the forward pass, when the gradients of the
step before are still there, and twice the largest tensor beside it for what comes and goes. Time is operations over the
speed that a preset expects, or what it takes to start them if that is longer; reading data, evaluation and checkpoints
are left out.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from setwise.models.config import BertConfig, ConvNetConfig, GridConfig, ModelConfig, RegionsConfig
from setwise.models.loss_config import TripletConfig
from setwise.pipelines import batches, datasets, footprint, hardware, prepare, shards, vocabulary
from setwise.pipelines.footprint import Footprint, Inputs, Part
from setwise.pipelines.hardware import Preset
from setwise.pipelines.recipe import Recipe
from setwise.platform.errors import ConfigError, DataError

GIB = 2**30
MEAN_TOKENS = 15
"""Of a caption, where the data is not there to look: some 13 words between two marks."""
LONGEST_TOKENS = 32
"""Of a batch, to which all its captions are padded: about the longest of a thousand."""
WORD_PIECES = 30_522
"""Of `bert-base-uncased`."""
PROCESS_BYTES = 1.0 * GIB
"""What a process takes beside its tensors: an assumption for the GPU's context and the libraries' workspaces."""
REGIONS = 36
"""Of an image, where the data set does not say."""
MARGIN = 0.1
"""Share of a device's memory that is left free, since an allocator cannot use all of it."""


@dataclass(frozen=True)
class Sizes:
    """Of the data, as far as cost depends on them."""

    images: int
    """In training."""
    inputs: Inputs
    source: str
    """Where these numbers are from, for a reader."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker in a training step."""

    weights: float
    gradients: float
    """Twice, where several workers add them up in buffers of their own."""
    moments: float
    """That the optimizer remembers: two numbers a weight with AdamW."""
    activations: float
    """What the forward pass of encoders and set prediction leaves for the backward pass."""
    loss: float
    """Sets of the whole batch and their gradients, and all cosines, unless the hardest negatives alone count."""
    inputs: float
    working: float
    """Twice the largest tensor, for what comes and goes within an operation."""
    process: float = PROCESS_BYTES

    @property
    def total(self) -> float:
        return sum(float(getattr(self, field.name)) for field in fields(self))


@dataclass(frozen=True)
class Estimate:
    """A recipe's cost, on a preset or on no machine in particular."""

    recipe: Recipe
    preset: Preset | None
    sizes: Sizes
    footprint: Footprint
    memory: Memory
    embedding_bytes: float
    """Of one worker, while it embeds the validation split."""
    flops: dict[str, float]
    """Of one step over all workers, by part; while the backbone learns."""
    steps_per_epoch: int
    seconds: float | None
    """Of all steps together; None without a preset."""
    checkpoint_bytes: float

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.recipe.train.epochs

    @property
    def fits(self) -> bool:
        return self.preset is None or max(self.memory.total, self.embedding_bytes) <= usable(self.preset)

    def to_json(self) -> dict[str, Any]:
        train = self.recipe.train
        return {
            "preset": None if self.preset is None else self.preset.model_dump(mode="json"),
            "sizes": asdict(self.sizes),
            "train": train.model_dump(mode="json"),
            "parameters": {part.name: part.parameters for part in self.footprint.parts},
            "flops_per_step": self.flops,
            "memory_bytes": {**asdict(self.memory), "total": self.memory.total},
            "embedding_bytes": self.embedding_bytes,
            "fits": self.fits,
            "steps_per_epoch": self.steps_per_epoch,
            "steps": self.steps,
            "hours": None if self.seconds is None else self.seconds / 3600,
            "checkpoint_bytes": self.checkpoint_bytes,
        }


def sizes(recipe: Recipe, store: Path) -> Sizes:
    """Those of the prepared data set or, before it is prepared, of the published one.

    Raises:
        ConfigError, DataError: the recipe cannot read what was prepared; or the data set is neither prepared nor known.
    """
    name = recipe.data.name
    image, text = (getattr(recipe.model, part, None) for part in ("image_encoder", "text_encoder"))
    published = datasets.PUBLISHED.get(name)
    if published is not None and not prepare.is_there(name, store):
        images, captions, words = published.train, published.captions, published.vocabulary
        mean, longest, regions = MEAN_TOKENS, LONGEST_TOKENS, published.regions
        source = (
            f"published sizes, since '{name}' is not prepared, and captions assumed to have {mean} tokens, the longest "
            f"of a batch {longest}"
        )
    else:
        prepared = prepare.open_prepared(name, store)
        prepare.check_fits(prepared, recipe)
        split = prepared.manifest["splits"].get("train")
        if split is None:
            raise DataError(f"'{name}' has no split train, of which an estimate counts images and captions")
        images, captions = split["images"], round(split["captions"] / split["images"])
        read = vocabulary.read(prepared.folder / "vocabulary.json")
        sample = list(shards.captions(prepared.folder, split | {"shards": split["shards"][:1]}))
        lengths = [len(read.encode(text)) for text in sample]
        words, mean, longest = len(read), math.ceil(sum(lengths) / len(lengths)), max(lengths)
        source = f"as prepared; captions have {mean} tokens, {longest} in the longest of {len(sample):,}"
        described = prepared.manifest["features"].get("train")
        regions = None if described is None else described["regions"]
    inputs = Inputs(
        image_size=recipe.data.image_size,
        regions=(regions or REGIONS) if isinstance(image, RegionsConfig) else None,
        captions=captions,
        vocabulary=WORD_PIECES if isinstance(text, BertConfig) else words,
        mean_tokens=mean,
        longest_tokens=longest,
    )
    return Sizes(images, inputs, source)


def estimate(recipe: Recipe, of: Sizes, preset: Preset | None = None) -> Estimate:
    """What `recipe` takes, exactly as it stands."""
    train, inputs = recipe.train, of.inputs
    counted = footprint.count(recipe.retriever, inputs, train.precision != "fp32")
    steps_per_epoch = batches.batches_per_epoch(of.images, train.batch_size, train.drop_last)
    loss = loss_flops(recipe, train.batch_size, train.batch_size * inputs.captions, inputs)
    flops = {part.name: train.batch_size * passes_of(recipe, part) * part.flops for part in counted.parts}
    seconds = None
    if preset is not None:
        frozen = min(recipe.optimizer.frozen_backbone_epochs, train.epochs)
        step, frozen_step = (_step_seconds(recipe, counted, loss, preset, still) for still in (False, True))
        seconds = steps_per_epoch * (frozen * frozen_step + (train.epochs - frozen) * step)
    memory = _memory(recipe, counted, inputs)
    standing = memory.weights + memory.gradients + memory.moments + memory.process
    return Estimate(
        recipe=recipe,
        preset=preset,
        sizes=of,
        footprint=counted,
        memory=memory,
        embedding_bytes=standing + footprint.embedding(recipe.retriever, inputs).of(train.eval_batch_size),
        flops=flops | {"loss": loss},
        steps_per_epoch=steps_per_epoch,
        seconds=seconds,
        checkpoint_bytes=_checkpoint_bytes(recipe, counted, inputs),
    )


def fitted(recipe: Recipe, of: Sizes, preset: Preset) -> Recipe:
    """`recipe` with as many images at a time as fit a device, in training and in embedding.

    All of a worker's share if it fits, else the largest power of two, at least 1. What the recipe, a preset or an
    override sets stays, and so does a backbone that normalises by its batch, which cannot be cut into pieces.
    """
    train = recipe.train
    if "eval_batch_size" not in train.model_fields_set:
        sizes_down = [train.eval_batch_size, *_powers_below(train.eval_batch_size)]
        recipe = _first_that_fits(recipe, of, preset, "eval_batch_size", sizes_down)
    if train.micro_batch is None and not _is_whole(recipe):
        recipe = _first_that_fits(recipe, of, preset, "micro_batch", [None, *_powers_below(share_of(recipe))])
    return recipe


def _is_whole(recipe: Recipe) -> bool:
    """Whether the backbone normalises by its batch."""
    encoder = recipe.retriever.image_encoder
    return isinstance(encoder, GridConfig) and not encoder.frozen_batch_norm


def _powers_below(number: int) -> list[int]:
    return [2**exponent for exponent in range(number.bit_length(), -1, -1) if 2**exponent < number] or [1]


def _first_that_fits(recipe: Recipe, of: Sizes, preset: Preset, setting: str, candidates: list[Any]) -> Recipe:
    for candidate in candidates:
        train = recipe.train.model_copy(update={setting: candidate})
        tried = recipe.model_copy(update={"train": train})
        found = estimate(tried, of, preset)
        needed = found.embedding_bytes if setting == "eval_batch_size" else found.memory.total
        if needed <= usable(preset):
            break
    return tried


def usable(preset: Preset) -> float:
    """Bytes of one device that a plan may fill."""
    return (1 - MARGIN) * preset.memory_gib * GIB


def share_of(recipe: Recipe) -> int:
    """Images of the worker that has most of them."""
    return math.ceil(recipe.train.batch_size / recipe.train.workers)


def passes_of(recipe: Recipe, part: Part, backbone_still: bool = False) -> int:
    """Length of a step in forward passes: a backward pass takes two, and what is cut into pieces goes forward twice."""
    passes = 1 if backbone_still and part.name == "image backbone" else 3
    return passes + (recipe.train.micro_batch is not None and part.in_pieces)


def _step_seconds(recipe: Recipe, counted: Footprint, loss: float, preset: Preset, backbone_still: bool) -> float:
    """Of the slowest worker: for its share of the batch and the whole loss, or for starting all operations."""
    share, seconds, launched = share_of(recipe), loss / preset.speed("fp32"), 0
    pieces = math.ceil(share / (recipe.train.micro_batch or share))
    for part in counted.parts:
        passes = passes_of(recipe, part, backbone_still)
        speed = preset.speed(recipe.train.precision, convolutions=part.name == "image backbone")
        seconds += share * passes * part.flops / speed
        launched += passes * part.operations * (pieces if part.in_pieces else 1)
    return max(seconds, 1e-6 * preset.launch_us * launched)


def loss_flops(recipe: Recipe, images: int, captions: int, inputs: Inputs) -> float:
    """Of the loss of a batch and its gradient, which every worker computes whole: its matrix products.

    Cross-attention goes through every pair: forward, forward again for the gradient, and back.

    Cosines of images and captions, and the gradients to both; for the discrepancy, each side's cosines with itself, of
    which symmetry spares half, and their gradients.
    """
    slots = recipe.retriever.set_prediction.num_slots
    if recipe.similarity.kind == "cross_attention":
        cells, width = _cells(recipe, inputs), recipe.retriever.embed_size
        pairs = 4.0 * images * captions * _products_of_a_pair(cells, slots, width)
        once = 3.0 * width * (images * cells * width / 2 + captions * slots * 3 * width / 2)
        return 2 * (pairs + once)
    n, m = images * slots, captions * slots
    discrepancy = isinstance(recipe.loss, TripletConfig) and recipe.loss.mmd_weight > 0
    products = 3.0 * n * m + (1.5 * (n * n + m * m) if discrepancy else 0.0)
    return 2 * recipe.retriever.embed_size * products


def _products_of_a_pair(cells: int, words: int, width: int) -> float:
    """Multiplications of the scores of one image and one caption: see cross_attention.py."""
    hidden = width // 4
    affinities = cells * words * (width + cells + words)
    attended = hidden * (cells + words) ** 2
    return float(affinities + attended + width * (cells + words))


def _cells(recipe: Recipe, inputs: Inputs) -> int:
    """Fragments of an image."""
    encoder = recipe.retriever.image_encoder
    if isinstance(encoder, RegionsConfig):
        return inputs.regions or REGIONS
    pixels = 4 * encoder.cell if isinstance(encoder, ConvNetConfig) else 32
    return math.ceil(inputs.image_size / pixels) ** 2


def _loss_bytes(recipe: Recipe, images: int, captions: int) -> float:
    """Of the fullest moment of the loss, in fp32: see batch_loss.py."""
    slots = recipe.retriever.set_prediction.num_slots
    n, m = images * slots, captions * slots
    sets_and_slots = 2 * (n + m) * recipe.retriever.embed_size
    scores = 6 * images * captions  # with their gradient, who matches whom, and copies without the positives
    loss = recipe.loss
    hardest = isinstance(loss, TripletConfig) and loss.negatives == "hardest" and not loss.all_negatives_epochs
    keeps_cosines = not hardest
    return 4.0 * (keeps_cosines * n * m + 2 * sets_and_slots + scores)


def _memory(recipe: Recipe, counted: Footprint, inputs: Inputs) -> Memory:
    train, share = recipe.train, share_of(recipe)
    piece = share if train.micro_batch is None else min(train.micro_batch, share)
    at_once = {part.name: piece if part.in_pieces else share for part in counted.parts}
    kept = {part.name: part.kept.of(at_once[part.name]) for part in counted.parts}
    activations = sum(kept.values())
    if train.micro_batch is not None:  # those of one piece at a time, of images or of captions, beside what is not cut
        cut = [part.name for part in counted.parts if part.in_pieces]
        of_sides = (sum(kept[name] for name in cut if side in name) for side in ("image", "text"))
        activations += counted.joined.of(share) - min(of_sides)
    weights = 4.0 * counted.parameters
    image_bytes = 3 * inputs.image_size**2
    encoder = recipe.retriever.image_encoder
    if isinstance(encoder, RegionsConfig):
        image_bytes = 4 * (inputs.regions or 0) * encoder.feature_dim
    return Memory(
        weights=weights + counted.buffer_bytes,
        gradients=weights * (2 if train.workers > 1 else 1),
        moments=recipe.optimizer.numbers_per_weight * weights,
        activations=activations,
        loss=_loss_bytes(recipe, train.batch_size, train.batch_size * inputs.captions),
        inputs=float(share * (image_bytes + 8 * inputs.captions * inputs.longest_tokens)),
        working=2 * max(part.largest.of(at_once[part.name]) for part in counted.parts),
    )


def _checkpoint_bytes(recipe: Recipe, counted: Footprint, inputs: Inputs) -> float:
    """On disk: weights, the optimizer's moments, and as text the words and the history of the last epoch."""
    tensors = 4.0 * (1 + recipe.optimizer.numbers_per_weight) * counted.parameters + counted.buffer_bytes
    return tensors + 16 * inputs.vocabulary + 800 * recipe.train.epochs


def settled(recipe: Recipe, on: str, store: Path, sharing: int = 1) -> Recipe:
    """`recipe`, loaded on preset `on`, as it is to be trained there; unchanged if its parts cannot be counted, which
    those of a retriever alone can.

    Args:
        sharing: trainings of one worker that share a GPU.

    Raises:
        ConfigError: it does not fit, and the recipe does not insist on how many images are encoded at a time.
        DataError: the sizes of the data set are not known.
    """
    if not isinstance(recipe.model, ModelConfig):
        return recipe
    of, preset = sizes(recipe, store), hardware.load(on)[0]
    if sharing > 1 and preset.accelerators and recipe.train.workers == 1:
        preset = preset.model_copy(update={"memory_gib": preset.memory_gib / sharing})
    found = estimate(fitted(recipe, of, preset), of, preset)
    if not found.fits and recipe.train.micro_batch is None:
        needed = max(found.memory.total, found.embedding_bytes) / GIB
        shared = "" if sharing == 1 else f", where {sharing} trials share a GPU (trials_per_gpu)"
        pieces = ", set model.image_encoder.frozen_batch_norm so that it can run in pieces" if _is_whole(recipe) else ""
        raise ConfigError(
            f"this does not fit '{on}'{shared}: a worker needs {needed:.1f} GiB, and {usable(preset) / GIB:.1f} of "
            f"{preset.memory_gib:g} GiB may be used. Name another preset (setwise train ... --dry-run shows what each "
            f"takes){pieces}, or set train.micro_batch to try all the same."
        )
    return found.recipe
