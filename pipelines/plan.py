"""The plan of a training, as `setwise train --dry-run` shows it: its parts, its memory, and every preset beside it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setwise.models.config import BertConfig, BiGRUConfig, GridConfig, ModelConfig
from setwise.pipelines import batches, hardware, resume
from setwise.pipelines.estimate import (
    GIB,
    MARGIN,
    PROCESS_BYTES,
    Estimate,
    Memory,
    Sizes,
    estimate,
    fitted,
    passes_of,
    share_of,
    sizes,
)
from setwise.pipelines.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

GLOVE_DIM = 300
"""Width of the word vectors that the paper starts from."""


@dataclass(frozen=True)
class Plan:
    """The plan of a recipe: on the preset that was asked for, if any, and beside it on every preset."""

    name: str
    on: str | None
    chosen: Estimate
    presets: dict[str, Estimate]

    def notes(self) -> list[str]:
        """What a reader has to know of these numbers."""
        chosen, recipe = self.chosen, self.chosen.recipe
        train, text, image = recipe.train, recipe.retriever.text_encoder, recipe.retriever.image_encoder
        found = [
            f"data: {chosen.sizes.images:,} training images with {chosen.sizes.inputs.captions} captions each; "
            + chosen.sizes.source,
            "time: counted operations over the speed that a preset expects, or the time to start them if that is "
            "longer, both of which are assumptions; without reading and decoding data, communication between workers, "
            "evaluation and checkpoints",
            f"memory: counted, and {PROCESS_BYTES / GIB:g} GiB assumed for the process itself; {MARGIN:.0%} of a "
            "device has to stay free",
        ]
        if frozen := min(recipe.optimizer.frozen_backbone_epochs, train.epochs):
            parts = chosen.footprint.parts
            flops = train.batch_size * sum(passes_of(recipe, part, backbone_still=True) * part.flops for part in parts)
            tera = (flops + chosen.flops["loss"]) / 1e12
            found.append(f"the backbone stands still for {_epochs(frozen)}; a step takes {tera:.3g} TFLOP then")
        if train.micro_batch is not None:
            found.append(
                f"train.micro_batch={train.micro_batch}: the batch stays {train.batch_size} images, and each worker "
                "encodes so many at a time, which takes one forward pass more and gives the same numbers"
            )
        if recipe.similarity.kind == "cross_attention":
            found.append(
                "the loss of cross-attention is counted by its multiplications, not by the operations it starts"
            )
        if isinstance(text, BiGRUConfig) and text.word_dim == GLOVE_DIM and text.word_vectors is None:
            found.append("word embeddings start at random: GloVe's are given with model.text_encoder.word_vectors=FILE")
        if recipe.pretraining is not None:
            found.append(
                f"the image encoder is trained before that by the recipe {recipe.pretraining.recipe}, unless it has "
                "been already; these numbers do not count it"
            )
        elif isinstance(image, GridConfig) and image.weights is None:
            found.append("the image backbone starts at random: see model.image_encoder.weights")
        if isinstance(text, BertConfig) and text.weights is None:
            found.append("training needs BERT's weights, if only for its word pieces: model.text_encoder.weights")
        if not chosen.fits:
            found.append("does not fit: name another preset")
        return found

    def to_json(self) -> dict[str, Any]:
        presets = {name: estimate.to_json() for name, estimate in self.presets.items()}
        head = {"recipe": self.name, "on": self.on}
        return head | self.chosen.to_json() | {"presets": presets, "notes": self.notes()}

    def table(self) -> RenderableType:
        """For a terminal."""
        from rich.console import Group
        from rich.text import Text

        chosen, train = self.chosen, self.chosen.recipe.train
        machine = f" on {self.on} ({chosen.preset.count} x {chosen.preset.device})" if chosen.preset is not None else ""
        time = f", about {duration(chosen.seconds)}" if chosen.seconds is not None else ""
        kept, disk = train.keep_checkpoints + 1, chosen.checkpoint_bytes / GIB
        if train.checkpoint_steps is not None and train.checkpoint_steps < chosen.steps_per_epoch:
            kept += resume.KEEP_STEPS
        lines = [
            f"{self.name}{machine}: {_epochs(train.epochs)} of {chosen.steps_per_epoch:,} steps of {train.batch_size} "
            f"images, {chosen.steps:,} steps{time}",
            f"checkpoint: {disk:.2f} GiB on disk, {kept * disk:.2f} GiB for the {kept} that are kept",
        ]
        notes = [f"- {note}" for note in self.notes()]
        return Group(*map(Text, lines), self._parts(), self._memory(), self._all_presets(), *map(Text, notes))

    def _parts(self) -> RenderableType:
        table = _table("the model", "part", "parameters", "TFLOP a step", "share")
        chosen = self.chosen
        parameters = {part.name: part.parameters for part in chosen.footprint.parts}
        total = sum(chosen.flops.values())
        for name, flops in chosen.flops.items():
            if flops:
                number = f"{parameters[name]:,}" if name in parameters else ""
                table.add_row(name, number, f"{flops / 1e12:.3f}", f"{flops / total:.0%}")
        table.add_row("total", f"{chosen.footprint.parameters:,}", f"{total / 1e12:.3f}", "")
        return table

    def _memory(self) -> RenderableType:
        values = {field.name: float(getattr(self.chosen.memory, field.name)) for field in fields(Memory)}
        values |= {"total": self.chosen.memory.total, "when embedding": self.chosen.embedding_bytes}
        table = _table("memory of a worker at the fullest moment of a step, in GiB", *values)
        table.columns[0].justify = "right"
        table.add_row(*(f"{value / GIB:.2f}" for value in values.values()))
        return table

    def _all_presets(self) -> RenderableType:
        table = _table(
            "on every preset, memory of one device in GiB",
            *("preset", "devices", "has", "needs", "when embedding", "fits"),
            *("precision", "images a worker", "at a time", "time"),
        )
        for name, found in self.presets.items():
            train, preset = found.recipe.train, found.preset
            assert preset is not None and found.seconds is not None
            table.add_row(
                name,
                str(preset.count),
                f"{preset.memory_gib:g}",
                f"{found.memory.total / GIB:.1f}",
                f"{found.embedding_bytes / GIB:.1f}",
                "yes" if found.fits else "no",
                train.precision,
                str(share_of(found.recipe)),
                "all" if train.micro_batch is None else str(train.micro_batch),
                duration(found.seconds),
            )
        return table


@dataclass(frozen=True)
class Outline:
    """The length of a training whose parts are not counted: of a model that is no retriever."""

    name: str
    on: str | None
    recipe: Recipe
    sizes: Sizes

    @property
    def steps_per_epoch(self) -> int:
        train = self.recipe.train
        return batches.batches_per_epoch(self.sizes.images, train.batch_size, train.drop_last)

    def notes(self) -> list[str]:
        return [
            f"data: {self.sizes.images:,} training images; {self.sizes.source}",
            f"parts, memory and time of a model of kind '{self.recipe.model.kind}' are not estimated, nor is how many "
            "images fit a device at a time: set train.micro_batch where they do not",
        ]

    def to_json(self) -> dict[str, Any]:
        length = {"steps_per_epoch": self.steps_per_epoch, "steps": self.steps_per_epoch * self.recipe.train.epochs}
        return {
            "recipe": self.name,
            "on": self.on,
            "sizes": asdict(self.sizes),
            "train": self.recipe.train.model_dump(mode="json"),
            **length,
            "notes": self.notes(),
        }

    def table(self) -> RenderableType:
        """For a terminal."""
        from rich.console import Group
        from rich.text import Text

        train, steps = self.recipe.train, self.steps_per_epoch
        said = (
            f"{self.name}: {_epochs(train.epochs)} of {steps:,} steps of {train.batch_size} images, "
            f"{steps * train.epochs:,} steps"
        )
        return Group(Text(said), *(Text(f"- {note}") for note in self.notes()))


def _table(title: str, first: str, *numbers: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _epochs(number: int) -> str:
    return f"{number} epoch{'s' if number > 1 else ''}"


def duration(seconds: float) -> str:
    """Roughly, in the unit that a person would take: '3 s', '15 min', '4.8 h', '12 days'."""
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}" if seconds < 10 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def make(name: str, overrides: list[str] | None, on: str | None, store: Path) -> Plan | Outline:
    """The plan of a recipe, by name or path, on preset `on` if one is named; of a model that is no retriever only how
    long it is.

    Raises:
        ConfigError: the recipe, an override or the preset has a mistake.
        DataError: the sizes of the data set are not known.
    """
    recipe = hardware.load_recipe(name, overrides, on)
    of = sizes(recipe, store)
    if not isinstance(recipe.model, ModelConfig):
        return Outline(Path(name).stem, on, recipe, of)
    presets = {}
    for preset_name in dict.fromkeys([*hardware.names(), *([on] if on is not None else [])]):
        preset = hardware.load(preset_name)[0]
        there = fitted(hardware.load_recipe(name, overrides, preset_name), of, preset)
        presets[preset_name] = estimate(there, of, preset)
    return Plan(Path(name).stem, on, presets[on] if on is not None else estimate(recipe, of), presets)
