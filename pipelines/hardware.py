"""Hardware presets: where a recipe runs, as data.

A preset is a YAML file: what a machine has, and the settings of `train` that suit it. Those are one layer of the
configuration, over the recipe's file and under the overrides of the command line, so that one recipe trains on a
desktop card and on a rack. A preset says how a recipe is computed and never what: the batch stays the recipe's. This
file imports no torch.

It also holds a cluster against them: by Ray's labels of accelerators, which a preset lays over a recipe too, so that in
a mixed cluster a training runs on the kind of machine that it was planned for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from setwise.pipelines import recipe
from setwise.pipelines.recipe import Recipe, TrainConfig
from setwise.platform import cluster, config
from setwise.platform.cluster import Capacity, Node
from setwise.platform.config import Layer, Settings
from setwise.platform.errors import ConfigError, UnreachableError

FOLDER = Path(__file__).parent / "presets"
LAYER = "settings"
"""The section of a preset that is laid over a recipe."""
HOW = (
    *("workers", "min_workers", "micro_batch", "precision", "compile"),
    *("threads", "loader_threads", "eval_batch_size"),
)
"""Settings of `train` that say how something is computed, and that a preset may set; others would change what."""


class Tflops(Settings):
    """Peak speed of one device in 10^12 floating-point operations a second, dense, sums in fp32."""

    fp32: float = Field(gt=0)
    tf32: float | None = Field(None, gt=0, description="what torch computes fp32 convolutions in, where there is it")
    fp16: float | None = Field(None, gt=0)
    bf16: float | None = Field(None, gt=0)


class Utilisation(Settings):
    """Share of the peak that a training is expected to reach: an assumption, for an estimate of hours."""

    convolutions: float = Field(gt=0, le=1)
    products: float = Field(gt=0, le=1, description="of matrices: everything that is no convolution")


class Preset(Settings):
    """One kind of machine."""

    device: str = Field(description="what one worker runs on")
    count: int = Field(ge=1, description="how many of them the machine has")
    accelerators: tuple[str, ...] = Field(
        (),
        description="what Ray's label ray.io/accelerator-type says on such a node, one of these; none for processors. "
        "They become train.accelerators",
    )
    memory_gib: float = Field(gt=0, description="of one device, in GiB")
    tflops: Tflops
    utilisation: Utilisation
    launch_us: float = Field(
        5, ge=0, description="microseconds to start one operation, which small ones do not end before: an assumption"
    )

    def speed(self, precision: str, convolutions: bool = False) -> float:
        """Operations a second that are expected of one device, in a training of that precision."""
        peaks = self.tflops
        if precision == "fp32" and convolutions:
            peak = peaks.tf32 or peaks.fp32
        else:
            peak = getattr(peaks, precision) or peaks.fp32
        return 1e12 * peak * (self.utilisation.convolutions if convolutions else self.utilisation.products)


def names() -> list[str]:
    """Presets that come with the package."""
    return config.names_in(FOLDER)


def load(name: str) -> tuple[Preset, Layer]:
    """A preset, by name or path, and the layer that it lays over a recipe.

    Raises:
        ConfigError: there is none of that name, or it has a mistake; with the place.
    """
    whole = config.load_layers(config.find_file("preset", name, FOLDER))
    machine = Layer(
        {key: value for key, value in whole.values.items() if key != LAYER},
        {keys: place for keys, place in whole.places.items() if keys[0] != LAYER},
    )
    preset = config.build(Preset, machine)
    values = whole.values.get(LAYER, {})
    if not isinstance(values, dict):
        raise ConfigError(f"{whole.places[LAYER,]}: '{LAYER}': expected settings of train, found {values!r}.")
    places = {keys[1:]: place for keys, place in whole.places.items() if keys[0] == LAYER and len(keys) > 1}
    for keys, place in places.items():
        if keys[0] != "train" or (keys[1:2] and keys[1] not in HOW):
            raise ConfigError(
                f"{place}: '{'.'.join(map(str, keys))}': a preset says how a recipe is computed, not what. It may set "
                f"{', '.join('train.' + name for name in HOW)}."
            )
    kinds = {("train", *keys): place for keys, place in whole.places.items() if keys[0] == "accelerators"}
    labels = Layer({"train": {"accelerators": list(preset.accelerators)}}, kinds)
    return preset, labels.merge(Layer(values, places))


def load_recipe(name: str, overrides: list[str] | None = None, on: str | None = None) -> Recipe:
    """A recipe by name or path, with the settings of preset `on` and then the overrides laid over it.

    Raises:
        ConfigError: with every mistake, each with its place.
    """
    layer = config.load_layers(recipe.find(name), recipe.find)
    if on is not None:
        layer = layer.merge(load(on)[1])
    return config.build(Recipe, layer, overrides or [])


def on_gpus(train: TrainConfig, found: Capacity) -> bool:
    """Whether a training runs on GPUs, or else on processors, where `found` is what machines of its kinds have.

    Raises:
        UnreachableError: the cluster has no GPU of a kind that `train.accelerators` asks for.
        ConfigError: it has too little of what there is.
    """
    least = train.min_workers or train.workers
    if found.gpus >= least or (found.grows and found.gpus):
        return True
    if found.grows and train.accelerators and cluster.can_start(train.accelerators):
        return True
    if train.accelerators and not found.gpus:
        raise UnreachableError(f"there is no GPU to train on {_labelled(train.accelerators, cluster.nodes())}")
    if not found.gpus and (found.cpus >= least or (found.grows and found.cpus)):
        return False
    if found.grows:
        raise ConfigError(
            "the cluster has no machine yet, and starts the kind that is asked for: name it with --on PRESET, or with "
            "train.accelerators=[LABEL]"
        )
    # Ray would wait for ever, or train on CPUs beside idle GPUs.
    setting = f"train.workers={train.workers}" if train.min_workers is None else f"train.min_workers={least}"
    label = f" with the label {' or '.join(train.accelerators)}" if train.accelerators else ""
    raise ConfigError(
        f"{setting}, but the cluster has {found.gpus} GPUs{label} and {found.cpus} CPUs: set it to what there is"
    )


def judge(preset: Preset, nodes: Sequence[Node], found: Capacity) -> tuple[bool, str]:
    """Whether a cluster has what a preset speaks of, and what was counted.

    Args:
        nodes: all its machines.
        found: what those of the preset's kinds have, or can have.
    """
    asked = f"{preset.count} x {preset.device}"
    if not preset.accelerators:
        said = f"asks for {asked}; the cluster has {sum(node.cpus for node in nodes):g} CPUs"
        return found.cpus >= preset.count, said + _growth(sum(node.cpus for node in nodes), found.cpus, found.grows)
    there = cluster.fitting(preset.accelerators, nodes)
    gpus = sum(node.gpus for node in there)
    most = max((node.gpus for node in there), default=0)
    said = f"asks for {asked}; the cluster has {gpus:g} on {len(there)} of {len(nodes)} nodes"
    if gpus >= preset.count > most:
        said += f", at most {most:g} together: the gradients of one training would go over the network"
    if not gpus:
        said += f" {_labelled(preset.accelerators, nodes)}"
    return found.gpus >= preset.count, said + _growth(gpus, found.gpus, found.grows)


def _growth(now: float, most: int, grows: bool) -> str:
    if grows:
        return "; an autoscaler may start more, and does not say how many"
    return f"; its autoscaler goes up to {most}" if most > now else ""


def _labelled(accelerators: Sequence[str], nodes: Sequence[Node]) -> str:
    """Which labels were asked for, which GPUs there are instead, and what to do."""
    said = f"with the label {' or '.join(accelerators)}"
    others = sorted({node.accelerator or "" for node in nodes if node.gpus})
    if not others:
        return f"{said}, and none of another label. See: setwise cluster ls"
    counted = (
        f"{sum(node.gpus for node in nodes if (node.accelerator or '') == label):g} x {label or 'no label'}"
        for label in others
    )
    return (
        f"{said}. It has GPUs of another label: {', '.join(counted)}. Where that is the same card, say so: "
        f"ray start --labels={cluster.ACCELERATOR}={accelerators[0]}, or train.accelerators=[{others[-1]}] for what "
        "there is"
    )
