"""Hardware presets: where a recipe runs, as data.

A preset is a YAML file: what a machine has, and the settings of `train` that suit it. Those are one layer of the
configuration, over the recipe's file and under the overrides of the command line, so that one recipe trains on a
desktop card and on a rack. A preset says how a recipe is computed and never what: the batch stays the recipe's. This
file imports no torch.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from setwise.pipelines import recipe
from setwise.pipelines.recipe import Recipe
from setwise.platform import config
from setwise.platform.config import Layer, Settings
from setwise.platform.errors import ConfigError

FOLDER = Path(__file__).parent / "presets"
LAYER = "settings"
"""The section of a preset that is laid over a recipe."""
HOW = ("workers", "micro_batch", "precision", "compile", "threads", "loader_threads", "eval_batch_size")
"""Settings of `train` that say how something is computed; all others would change what."""


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
        description="what Ray's label ray.io/accelerator-type says on such a node, one of these; none for processors",
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
    return preset, Layer(values, places)


def load_recipe(name: str, overrides: list[str] | None = None, on: str | None = None) -> Recipe:
    """A recipe by name or path, with the settings of preset `on` and then the overrides laid over it.

    Raises:
        ConfigError: with every mistake, each with its place.
    """
    layer = config.load_layers(recipe.find(name), recipe.find)
    if on is not None:
        layer = layer.merge(load(on)[1])
    return config.build(Recipe, layer, overrides or [])
