"""A trained model for others to run: its two encoders as programs of torch.export or as ONNX files, or its weights.

FOLDER/
  image_encoder.pt2 | .onnx   images to sets: any number of images
  text_encoder.pt2 | .onnx    tokens and lengths to sets: any number of captions of any length
  model.safetensors           instead of these two, with the format safetensors
  config.json                 the recipe: model, similarity, how images are cut
  vocabulary.json             token ids: the place of each word or word piece
  MANIFEST.json               inputs and outputs, where the model comes from, SHA-256 of each file, measured difference

What was written is read again and run beside the model; an export that differs is not published.

Shape suffixes: B images, T captions, N regions or tokens, K slots, D width of an embedding.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from setwise.models.config import BertConfig, RegionsConfig, SetPredictionConfig
from setwise.models.retriever import SetRetriever
from setwise.models.set_prediction import MAX_SEQUENCE
from setwise.pipelines import lineage, prepare, trained_model
from setwise.pipelines.batches import Split
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.references import Reference
from setwise.pipelines.retrieval import Retrieval
from setwise.pipelines.trained_model import TrainedModel
from setwise.pipelines.vocabulary import MAX_TOKENS
from setwise.platform import checkpoint, storage
from setwise.platform.errors import ConfigError, DataError, SetwiseError

FORMATS = ("torch", "onnx", "safetensors")
Encoder = Callable[..., Tensor]
TOLERANCE = 1e-5
"""Largest difference of an element of an embedding, a unit vector, that an export may have."""
BATCHES = (1, 2, 5, 8)
"""Images of the test split, with all their captions, that are compared at a time."""
MADE_UP = ((1, 1), (3, 2), (2, 40), (5, 9))
"""Sizes of made-up batches: images or captions, and tokens of the longest caption."""
REGIONS = 36
"""Of a made-up image, as published features have them."""
INPUTS = {
    "image_encoder": {
        "images": "uint8 (images,3,H,W), cut as config.json says, or float32 region features (images,regions,F)",
    },
    "text_encoder": {
        "tokens": "int64 (captions,tokens): places in vocabulary.json, 0 after a caption's end",
        "lengths": "int64 (captions,): tokens of each caption, at least 1",
    },
}
SETS = {
    "gaussian": "draws of a distribution, or mean and deviation in one vector, of any length",
    "fragments": "unit vectors, and zeros where there is padding",
}
SIMILARITY = "similarity.safetensors"
"""What a similarity learned, beside programs that hold the encoders alone."""
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


class Inputs(NamedTuple):
    """Some images and some captions; they need not belong together."""

    images: Tensor
    """(B,3,H,W) uint8, or (B,N,F) float32."""
    tokens: Tensor
    """(T,N) int64."""
    lengths: Tensor
    """(T,) int64."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how far it is from the model: the largest difference of an element of an embedding."""

    folder: Path
    form: str
    image_difference: float
    text_difference: float
    compared: str
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder), "tolerance": TOLERANCE}

    def describe(self) -> str:
        return (
            f"{self.folder}: {self.bytes / 1e6:.1f} MB. Largest difference of an embedding's element to the model: "
            f"images {self.image_difference:.1e}, captions {self.text_difference:.1e} (allowed {TOLERANCE:.0e}), over "
            f"{self.compared}"
        )


class ImageSets(nn.Module):
    """Images, or region features, to sets (B,K,D)."""

    def __init__(self, retriever: SetRetriever) -> None:
        super().__init__()
        self.encoder, self.prediction = retriever.image_encoder, retriever.image_sets

    def forward(self, images: Tensor) -> Tensor:
        sets: Tensor = self.prediction(self.encoder(images)).sets
        return sets


class TextSets(nn.Module):
    """Tokens (T,N), padded with 0, and lengths (T,), both int64, to sets (T,K,D)."""

    def __init__(self, retriever: SetRetriever) -> None:
        super().__init__()
        self.encoder, self.prediction = retriever.text_encoder, retriever.text_sets

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        sets: Tensor = self.prediction(self.encoder(tokens, lengths)).sets
        return sets


def export(reference: Reference, target: Path, form: str, store: Path) -> Exported:
    """Write the model of a checkpoint to the new folder `target`.

    Args:
        form: one of FORMATS.
        store: where its data set is, if it is prepared here; the test split is then compared.

    Raises:
        ConfigError: `target` exists, packages are missing, or the model cannot be written in this form.
        DataError: the checkpoint is damaged.
        SetwiseError: what was written gives other embeddings than the model. Nothing is left of it.
    """
    if form not in FORMATS:
        raise ConfigError(f"--format is '{form}'; it can be {', '.join(FORMATS)}")
    if target.exists():
        raise ConfigError(f"--to {target}: it exists already. Name a new folder, or remove it first.")
    if form == "onnx" and (missing := [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]):
        raise ConfigError(f"ONNX needs {', '.join(missing)}, which come with the extra: pip install 'setwise[export]'")
    model = trained_model.load(reference.checkpoint, torch.device("cpu"))
    made_up = _made_up(model)
    real, source = _of_test_split(model, store)
    with storage.publish_folder(target) as building:
        recipe = model.recipe.model_dump(mode="json")
        (building / "config.json").write_text(json.dumps(recipe, indent=1) + "\n")
        words = {"kind": type(model.vocabulary).__name__, "max_tokens": MAX_TOKENS, "words": model.vocabulary.words}
        (building / "vocabulary.json").write_text(json.dumps(words, indent=1, ensure_ascii=False) + "\n")
        encoders = _write(model, reference.checkpoint, building, form, made_up[-1])
        images, texts = _differences(model, *encoders, [*made_up, *real])
        done = Exported(target, form, images, texts, f"{source}made-up batches", lineage.size(building))
        if not (images <= TOLERANCE and texts <= TOLERANCE):  # nor is NaN
            raise SetwiseError(f"the export differs from the model, and nothing of it is kept. {done.describe()}")
        origin = lineage.describe(reference.checkpoint, reference.run)
        told = {name: value for name, value in origin.items() if name != "recipe"}
        _write_manifest(building, done, told, model.recipe)
    return done


def _write(model: TrainedModel, source: Path, building: Path, form: str, example: Inputs) -> tuple[Encoder, Encoder]:
    """The files of the model, and its two encoders as they were read from them again."""
    if form == "safetensors":
        shutil.copyfile(source / checkpoint.WEIGHTS, building / checkpoint.WEIGHTS)
        return _read_weights(building)
    if learned := model.retrieval.similarity.state_dict():
        save_file(learned, building / SIMILARITY)
    retriever, images = model.retrieval.retriever, example.images
    batch, captions = torch.export.Dim("images", min=1), torch.export.Dim("captions", min=1)
    image_shape = {0: batch} | ({1: torch.export.Dim("regions", min=1)} if images.ndim == 3 else {})
    longest = torch.export.Dim("tokens", min=1, max=_longest(model))
    text = {"tokens": example.tokens, "lengths": example.lengths}
    text_shapes = {"tokens": {0: captions, 1: longest}, "lengths": {0: captions}}
    return (
        _program(building / "image_encoder", form, ImageSets(retriever), {"images": images}, {"images": image_shape}),
        _program(building / "text_encoder", form, TextSets(retriever), text, text_shapes),
    )


def _program(path: Path, form: str, module: nn.Module, given: dict[str, Tensor], shapes: dict[str, Any]) -> Encoder:
    """One side written as a program, and read again; `path` is without its ending."""
    try:
        with torch.no_grad(), _quietly():
            if form == "torch":
                return _torch_program(path.with_suffix(".pt2"), module, given, shapes)
            return _onnx_program(path.with_suffix(".onnx"), module, given, shapes)
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        raise ConfigError(
            f"this model's {path.name.replace('_', ' ')} cannot be written as a program of format '{form}' "
            f"({type(error).__name__}: {first[:300]}). Its weights can: --format safetensors"
        ) from error


def _torch_program(path: Path, module: nn.Module, given: dict[str, Tensor], shapes: dict[str, Any]) -> Encoder:
    # torch would unroll a GRU to the length of the example; it has this way round it for its own export to ONNX.
    from torch.export._patches import register_gru_while_loop_decomposition

    with register_gru_while_loop_decomposition():
        program = torch.export.export(module, (), kwargs=given, dynamic_shapes=shapes)
    for graph in [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]:
        for node in graph.nodes:  # the lines of source that made it, with the paths of this machine
            node.meta.pop("stack_trace", None)
    torch.export.save(program, path)
    read: nn.Module = torch.export.load(path).module()
    return lambda **inputs: read(**inputs)


def _onnx_program(path: Path, module: nn.Module, given: dict[str, Tensor], shapes: dict[str, Any]) -> Encoder:
    import onnxruntime

    program = torch.onnx.export(
        module,
        (),
        kwargs=given,
        dynamic_shapes=shapes,
        dynamo=True,
        verbose=False,
        input_names=list(given),
        output_names=["sets"],
    )
    assert program is not None, "it is None only for the older exporter"
    for graph in [program.model.graph, *(function.graph for function in program.model.functions.values())]:
        for node in graph.all_nodes():
            node.metadata_props.clear()
    program.save(path, external_data=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(**inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])

    return run


def _read_weights(folder: Path) -> tuple[Encoder, Encoder]:
    """A model built from the exported files alone."""
    recipe = Recipe.model_validate(storage.read_json(folder / "config.json"))
    retrieval = Retrieval(recipe, len(storage.read_json(folder / "vocabulary.json")["words"])).eval()
    retrieval.load_state_dict(load_file(folder / checkpoint.WEIGHTS))
    return ImageSets(retrieval.retriever), TextSets(retrieval.retriever)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep torch's remarks about its own export from the user."""
    loud = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    before = [one.level for one in loud]
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        for one in loud:
            one.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for one, level in zip(loud, before, strict=True):
                one.setLevel(level)


def _longest(model: TrainedModel) -> int | None:
    """Tokens of the longest caption that the text encoder reads, None where there is no limit."""
    config = model.recipe.retriever
    limits = [config.text_encoder.max_tokens] if isinstance(config.text_encoder, BertConfig) else []
    sets = config.set_prediction
    limits += [MAX_SEQUENCE] if isinstance(sets, SetPredictionConfig) and sets.text_positions == "learned" else []
    return min(limits, default=None)


def _made_up(model: TrainedModel) -> list[Inputs]:
    """Batches of noise."""
    recipe, generator = model.recipe, torch.Generator().manual_seed(0)
    encoder, side = recipe.retriever.image_encoder, recipe.data.image_size
    made = []
    for number, longest in MADE_UP:
        if isinstance(encoder, RegionsConfig):
            images = torch.randn(number, REGIONS, encoder.feature_dim, generator=generator)
        else:
            images = torch.randint(0, 256, (number, 3, side, side), generator=generator, dtype=torch.uint8)
        lengths = torch.randint(1, longest + 1, (number,), generator=generator)
        lengths[0] = longest
        tokens = torch.randint(1, len(model.vocabulary), (number, longest), generator=generator)
        made.append(Inputs(images, tokens.masked_fill(torch.arange(longest) >= lengths[:, None], 0), lengths))
    return made


def _of_test_split(model: TrainedModel, store: Path) -> tuple[list[Inputs], str]:
    """Batches of the test split, and what they are in words; none where the data set is not here."""
    try:
        split = Split(prepare.open_prepared(model.recipe.data.name, store), "test", model.recipe.data, model.vocabulary)
    except DataError:
        return [], ""
    ends = list(itertools.accumulate(BATCHES, initial=0))
    found = [split.batch(list(range(*ends))) for ends in itertools.pairwise(ends) if ends[1] <= len(split)]
    images, captions = sum(len(one.images) for one in found), sum(len(one.tokens) for one in found)
    said = f"{images} images and {captions} captions of the test split of {model.recipe.data.name}, and "
    return [Inputs(one.images, one.tokens, one.lengths) for one in found], said


@torch.inference_mode()
def _differences(model: TrainedModel, images: Encoder, texts: Encoder, inputs: list[Inputs]) -> tuple[float, float]:
    """Largest difference of an element of an embedding to the model's, of images and of captions."""
    retriever = model.retrieval.retriever
    of_images, of_texts = [], []
    for one in inputs:
        try:
            made, read = images(images=one.images), texts(tokens=one.tokens, lengths=one.lengths)
        except Exception as error:
            sizes = f"{tuple(one.images.shape)} images and {tuple(one.tokens.shape)} tokens"
            raise SetwiseError(f"the export does not run on {sizes}, and nothing of it is kept: {error}") from error
        of_images.append((made - retriever.encode_images(one.images).sets).abs().max())
        of_texts.append((read - retriever.encode_texts(one.tokens, one.lengths).sets).abs().max())
    return float(torch.stack(of_images).max()), float(torch.stack(of_texts).max())


def _interface(recipe: Recipe) -> dict[str, dict[str, str]]:
    vectors = SETS.get(recipe.retriever.set_prediction.kind, "unit vectors")
    sides = {"image_encoder": "images", "text_encoder": "captions"}
    return {name: given | {"sets": f"float32 ({sides[name]},K,D), {vectors}"} for name, given in INPUTS.items()}


def _write_manifest(building: Path, done: Exported, origin: dict[str, Any], recipe: Recipe) -> None:
    files = {
        path.name: {"size": path.stat().st_size, "sha256": storage.sha256(path)} for path in sorted(building.iterdir())
    }
    names = ("torch", "onnx", "onnxruntime", "onnxscript") if done.form == "onnx" else ("torch",)
    manifest = {
        "schema": 1,
        "format": done.form,
        "files": files,
        "inputs": _interface(recipe),
        "compared": done.compared,
        "largest_difference": {"images": done.image_difference, "captions": done.text_difference},
        "tolerance": TOLERANCE,
        "versions": {name: importlib.metadata.version(name) for name in names},
        "origin": origin,
    }
    storage.write_json(building / checkpoint.MANIFEST, manifest)
