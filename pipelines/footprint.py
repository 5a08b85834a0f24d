"""What a model takes, counted without computing it: parameters, operations and memory, by part.

The model itself runs, on tensors that have a shape and a device but no memory (torch's fake and meta tensors), so what
is counted is what its code does; no weight is allocated. Two batches of different size tell what each image costs from
what is there once. A GRU over packed captions needs real lengths, which fake tensors do not have, so it runs on meta
tensors; those know no automatic precision, and its states are counted in fp32.

An "image" is one image with its captions. Operations are floating-point operations, two a multiplication and addition.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from setwise.models.batch_norm import has_batch_statistics
from setwise.models.config import BiGRUConfig, ModelConfig, RegionsConfig
from setwise.models.image_encoders import ConvNet, Grid
from setwise.models.retriever import SetRetriever
from setwise.models.set_prediction import Features
from setwise.models.text_encoders import text_encoder

PARTS = ("image backbone", "image head", "image sets", "text encoder", "text sets")
COUNTED = (32, 64)
"""Images in the two batches that are counted: so many that activations are larger than weights."""
GRU_OPERATIONS = 20
"""That reading packed captions takes on a GPU, where one operation goes through all words."""


@dataclass(frozen=True)
class Inputs:
    """What a model reads, as far as its cost depends on it."""

    image_size: int
    """Side in pixels."""
    regions: int | None
    """Region features an image has, for an encoder that reads those."""
    captions: int
    """Of one image."""
    vocabulary: int
    mean_tokens: int
    longest_tokens: int
    """To which the captions of a batch are padded."""


@dataclass(frozen=True)
class Amount:
    """Bytes that grow with the batch."""

    fixed: float = 0.0
    each: float = 0.0

    def of(self, images: int) -> float:
        return self.fixed + self.each * images


@dataclass(frozen=True)
class Part:
    """One part of the model."""

    name: str
    parameters: int
    flops: float
    """Of the forward pass of one image."""
    kept: Amount
    """Bytes that the forward pass leaves for the backward pass: what it computed and still needs."""
    largest: Amount
    """Bytes of the largest tensor of the forward pass."""
    operations: int
    """That the forward pass starts, however many images there are; views are none."""
    in_pieces: bool
    """Whether it may run on a piece of the batch at a time (train.micro_batch)."""


@dataclass(frozen=True)
class Footprint:
    """A model's cost, by part."""

    parts: tuple[Part, ...]
    buffer_bytes: int
    joined: Amount
    """Bytes that are left of pieces, once they are put together for the parts behind them."""

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)


@lru_cache(maxsize=64)
def count(config: ModelConfig, inputs: Inputs, half: bool) -> Footprint:
    """The footprint of a model in training, in fp32 or (`half`) under autocast to a type of 16 bits."""
    small, large = (_run(config, inputs, images, half, training=True) for images in COUNTED)
    _, model = _model(config, inputs.vocabulary)
    parameters, cut = _parameters(model), _in_pieces(model)
    parts = tuple(
        Part(
            name=name,
            parameters=parameters[name],
            flops=_amount(small.flops[name], large.flops[name]).each,
            kept=_amount(small.kept[name], large.kept[name]),
            largest=_amount(small.largest[name], large.largest[name]),
            operations=small.operations[name],
            in_pieces=name in cut,
        )
        for name in PARTS
    )
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    return Footprint(parts, buffers, _amount(small.joined, large.joined))


@lru_cache(maxsize=64)
def embedding(config: ModelConfig, inputs: Inputs) -> Amount:
    """Bytes at the fullest moment of embedding images and captions for evaluation, in fp32, beside the weights."""
    return _amount(*(_run(config, inputs, images, half=False, training=False).peak for images in COUNTED))


def _amount(small: float, large: float) -> Amount:
    each = (large - small) / (COUNTED[1] - COUNTED[0])
    return Amount(small - COUNTED[0] * each, each)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Looks at every operation: how many additions and multiplications it takes, by torch's own register, and how many
    bytes of all that was computed are still referred to, by a variable or by the graph of gradients.

    `given` was there before and is not counted.
    """

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._given = {_reference(tensor).cdata for tensor in given}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.flops = 0.0
        self.peak = 0
        self.largest = 0
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            # pad_packed_sequence looks up in which order captions were; any order has the same shapes.
            return torch.zeros(args[0].shape, dtype=args[0].dtype, device="cpu")
        result = func(*args, **kwargs)
        self.operations += func.namespace == "aten" and not func.is_view
        if (flops := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += flops(*args, **kwargs, out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                reference, size = _reference(leaf), leaf.untyped_storage().nbytes()
                if reference.cdata not in self._given:
                    self._alive[reference.cdata] = (reference, size)
                    self.largest = max(self.largest, size)
        if not torch.is_grad_enabled():  # while a graph keeps nearly all, the peak is the end
            self.peak = max(self.peak, self.bytes())
        return result

    def bytes(self) -> int:
        """That are still referred to, now."""
        self._alive = {key: entry for key, entry in self._alive.items() if not _is_gone(entry[0])}
        return sum(size for _, size in self._alive.values())


def _reference(tensor: Tensor) -> StorageWeakRef:
    """To the memory that a tensor would have, and would share with its views."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _is_gone(reference: StorageWeakRef) -> bool:
    return bool(reference.expired())  # type: ignore[no-untyped-call]


@dataclass
class _Counts:
    """What one forward pass showed, by part."""

    flops: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    kept: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    largest: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    operations: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    joined: float = 0.0
    peak: float = 0.0

    @contextmanager
    def part(self, name: str, watch: _Watch) -> Iterator[None]:
        """What happens inside belongs to part `name`."""
        before = watch.bytes()
        watch.flops, watch.largest, watch.operations = 0.0, 0, 0
        yield
        self.flops[name] += watch.flops
        self.kept[name] += watch.bytes() - before
        self.largest[name] = max(self.largest[name], watch.largest)
        self.operations[name] += watch.operations
        self.peak = max(self.peak, watch.peak)


def _run(config: ModelConfig, inputs: Inputs, images: int, half: bool, training: bool) -> _Counts:
    """One forward pass over `images` images and their captions."""
    counts = _Counts()
    mode, model = _model(config, inputs.vocabulary)
    model.train(training)
    packed = isinstance(config.text_encoder, BiGRUConfig)
    with torch.set_grad_enabled(training):
        read = _read_packed(counts, config, inputs, images, training) if packed else None
        # cuDNN would look for a GPU; without it a GRU is counted as the operations that it is made of.
        with mode, torch.device("cuda"), torch.backends.cudnn.flags(enabled=False), _autocast(half):
            captions = images * inputs.captions
            keys, text_keys = _keys(images), _keys(captions)
            seen = _images(config, inputs, images)
            tokens, lengths = _tokens(inputs, captions), torch.full((captions,), inputs.mean_tokens)
            read = None if read is None else _alike(read, training)
            given = [*model.parameters(), *model.buffers(), keys, text_keys, seen, tokens, lengths]
            with _Watch([*given, *(read or ())[:3]]) as watch:
                encoder = model.image_encoder
                if isinstance(encoder, Grid):
                    with counts.part("image backbone", watch):
                        seen = encoder.backbone(seen)
                with counts.part("image backbone" if isinstance(encoder, ConvNet) else "image head", watch):
                    features = encoder(seen, None, keys)
                with counts.part("image sets", watch):
                    image_sets = model.image_sets(features, keys)
                if read is None:
                    with counts.part("text encoder", watch):
                        read = model.text_encoder(tokens, lengths, text_keys)
                with counts.part("text sets", watch):
                    text_sets = model.text_sets(read, text_keys)

            cut = _in_pieces(model)
            joined = [*text_sets[:2]]
            if "image sets" in cut:
                joined += image_sets[:2]
            elif "image backbone" in cut:
                joined.append(seen)
            counts.joined = sum(tensor.nbytes for tensor in joined)
    return counts


def _read_packed(counts: _Counts, config: ModelConfig, inputs: Inputs, images: int, training: bool) -> Features:
    """What a text encoder that packs its captions makes of them, on meta tensors."""
    captions = images * inputs.captions
    lengths = torch.full((captions,), inputs.mean_tokens)
    lengths[0] = inputs.longest_tokens
    with torch.device("meta"):
        encoder = text_encoder(config.text_encoder, inputs.vocabulary, config.embed_size).train(training)
        tokens, keys = _tokens(inputs, captions), _keys(captions)
    with _Watch([*encoder.parameters(), tokens, keys]) as watch, counts.part("text encoder", watch):
        features: Features = encoder(tokens, lengths, keys)
    counts.operations["text encoder"] = GRU_OPERATIONS
    return features


@lru_cache(maxsize=8)
def _model(config: ModelConfig, vocabulary: int) -> tuple[FakeTensorMode, SetRetriever]:
    """A model of fake tensors that are on a GPU in name, and the mode that they belong to."""
    mode = FakeTensorMode()
    with mode, torch.device("cuda"), warnings.catch_warnings():
        # nn.GRU asks where its weights lie, to lay them side by side on a GPU; these lie nowhere.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        return mode, SetRetriever(config, vocabulary)


def _tokens(inputs: Inputs, captions: int) -> Tensor:
    return torch.ones(captions, inputs.longest_tokens, dtype=torch.int64)


def _keys(samples: int) -> Tensor:
    return torch.zeros(samples, dtype=torch.int64)


def _images(config: ModelConfig, inputs: Inputs, images: int) -> Tensor:
    """What the image encoder reads, as it arrives on a device."""
    if isinstance(config.image_encoder, RegionsConfig):
        return torch.empty(images, inputs.regions or 1, config.image_encoder.feature_dim)
    return torch.empty(images, 3, inputs.image_size, inputs.image_size, dtype=torch.uint8)


def _alike(features: Features, learns: bool) -> Features:
    """Features of the same shapes and types, in the present kind of tensors."""

    def empty(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=learns and tensor.is_floating_point())

    is_padding = None if features.is_padding is None else empty(features.is_padding)
    return Features(empty(features.local), empty(features.pooled), is_padding)


def _in_pieces(model: SetRetriever) -> frozenset[str]:
    """The parts that `train.micro_batch` cuts into pieces; see SetRetriever.forward."""
    encoder = model.image_encoder
    if not has_batch_statistics(encoder):
        return frozenset(PARTS)
    text = {"text encoder", "text sets"}
    return frozenset(text | {"image backbone"} if isinstance(encoder, Grid) else text)


def _parameters(model: SetRetriever) -> dict[str, int]:
    def number(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    encoder = model.image_encoder
    backbone = number(encoder.backbone) if isinstance(encoder, Grid) else 0
    if isinstance(encoder, ConvNet):
        backbone = number(encoder)
    others = map(number, (model.image_sets, model.text_encoder, model.text_sets))
    return dict(zip(PARTS, (backbone, number(encoder) - backbone, *others), strict=True))


@contextmanager
def _autocast(half: bool) -> Iterator[None]:
    """CUDA's automatic precision, for tensors that are on a GPU in name only: torch.autocast would look for one."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", half)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
