"""Systems that learn without comparing images with captions: they write captions, or draw their images again.

Shape suffixes: B images, K slots, S side of an image.
"""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from setwise.models.batch_norm import has_batch_statistics
from setwise.models.captioning import Captioner, CaptionScores
from setwise.models.pretext_config import CaptionerConfig, SlotAutoencoderConfig
from setwise.models.slot_autoencoder import SlotAutoencoder
from setwise.pipelines import batches, digits, views
from setwise.pipelines.batches import Share, Split
from setwise.pipelines.digit_scenes import MAX_DIGITS
from setwise.pipelines.digits import DigitsConfig
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.segmentation import adjusted_rand_index
from setwise.pipelines.system import Rows, System
from setwise.platform.errors import ConfigError, DivergedError

PEAK = 2.0
"""Between the least and the greatest value of a pixel, as the slot autoencoder compares them."""


class Captioning(System):
    """An image encoder that learns by writing captions in both directions (VirTex).

    Raises ConfigError where `train.micro_batch` would change the result.
    """

    def __init__(self, recipe: Recipe, vocabulary_size: int) -> None:
        super().__init__(recipe)
        assert isinstance(recipe.model, CaptionerConfig)
        self.captioner = Captioner(recipe.model, vocabulary_size)
        if recipe.train.micro_batch is not None and has_batch_statistics(self.captioner.image_encoder):
            raise ConfigError(
                "train.micro_batch would change the result: the captioner's image encoder normalises by statistics of "
                "the whole batch. Set train.micro_batch=null, or take an encoder without batch normalisation"
            )

    @property
    def encoder(self) -> Captioner:
        return self.captioner

    def encode(self, encoder: nn.Module, share: Share) -> tuple[Rows, Rows]:
        batch = share.batch
        scores = encoder(
            batch.images,
            batch.tokens,
            batch.lengths,
            batch.owners,
            image_keys=share.image_keys,
            text_keys=share.text_keys,
            micro_batch=self.recipe.train.micro_batch,
        )
        return None, scores

    def loss(self, images: Any, texts: Any, owners: Tensor, epoch: float) -> dict[str, Tensor]:
        """`forward` and `backward`, mean nats of a token in each direction, and `total`, their sum (VirTex's loss)."""
        tokens = texts.tokens.sum().clamp(min=1)
        forward, backward = texts.forward.sum() / tokens, texts.backward.sum() / tokens
        return {"forward": forward, "backward": backward, "total": forward + backward}

    @torch.inference_mode()
    def validate(self, split: Split, batch_size: int, device: torch.device, threads: int = 0) -> dict[str, float]:
        """`val/log_likelihood` of a token in nats and `val/token_accuracy` in percent, means over the tokens of both
        directions, and `val/perplexity`."""
        was_training = self.training
        self.eval()
        sums = dict.fromkeys(CaptionScores._fields, 0.0)
        with closing(batches.in_order(split, batch_size, threads)) as whole:
            for batch in whole:
                there = batch.to(device)
                scores = self.captioner(there.images, there.tokens, there.lengths, there.owners)
                for name, values in scores._asdict().items():
                    sums[name] += float(values.double().sum())
        self.train(was_training)
        predicted = 2 * max(sums["tokens"], 1.0)
        nats = (sums["forward"] + sums["backward"]) / predicted
        _check_finite(nats, "log-likelihood")
        return {
            "val/log_likelihood": -nats,
            "val/token_accuracy": 100 * sums["hits"] / predicted,
            "val/perplexity": math.exp(min(nats, 700.0)),
        }


class ObjectDiscovery(System):
    """Slots that find the objects of an image by drawing it again (Slot Attention)."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        assert isinstance(recipe.model, SlotAutoencoderConfig)
        self.autoencoder = SlotAutoencoder(recipe.model, recipe.data.image_size)

    @property
    def encoder(self) -> SlotAutoencoder:
        return self.autoencoder

    def encode(self, encoder: nn.Module, share: Share) -> tuple[Rows, Rows]:
        return encoder(share.batch.images, share.image_keys, self.recipe.train.micro_batch), None

    def loss(self, images: Any, texts: Any, owners: Tensor, epoch: float) -> dict[str, Tensor]:
        """`total`, the mean squared error of pixels between -1 and 1."""
        return {"total": images.squared.mean()}

    @torch.inference_mode()
    def validate(self, split: Split, batch_size: int, device: torch.device, threads: int = 0) -> dict[str, float]:
        """`val/mse` as in the loss, `val/psnr` in dB, a mean over images, and, of a data set whose objects are known,
        `val/ari`: the adjusted Rand index in percent of the objects' pixels, divided by which slot claims most of each;
        a mean over images."""
        was_training = self.training
        self.eval()
        source = split.prepared.manifest["source"]["folder"]
        drawn_by = digits.generated(Path(source)) if source is not None else None
        errors: list[float] = []
        found: list[float] = []
        with closing(batches.in_order(split, batch_size, threads)) as whole:
            for batch in whole:
                images = batch.images.to(device)
                decomposition = self.autoencoder.decompose(images)
                difference = decomposition.drawn.double() - (images.double() / 127.5 - 1)
                if drawn_by is not None:
                    clusters_BSS = decomposition.masks.argmax(1).cpu().numpy()
                    found += [
                        self._agreement(split, len(errors) + b, one, drawn_by) for b, one in enumerate(clusters_BSS)
                    ]
                errors += difference.square().flatten(1).mean(1).tolist()
        self.train(was_training)
        mse = float(np.mean(errors))
        _check_finite(mse, "squared error")
        decibels = 10 * np.log10(PEAK**2 / np.maximum(errors, 1e-12))
        values = {"val/mse": mse, "val/psnr": float(decibels.mean())}
        return values | ({"val/ari": 100 * float(np.mean(found))} if found else {})

    def _agreement(self, split: Split, index: int, clusters_SS: NDArray[np.int64], config: DigitsConfig) -> float:
        labels_SS = seen_objects(int(split.image_ids[index]), config, self.recipe)
        is_object = labels_SS > 0
        return adjusted_rand_index(labels_SS[is_object], clusters_SS[is_object])


def seen_objects(image_id: int, config: DigitsConfig, recipe: Recipe) -> NDArray[np.int64]:
    """Which digit each pixel (S,S) shows of an image of `digits` as evaluation sees it; 0 for its ground."""
    mask = digits.object_mask(image_id, config)
    of_each = (mask[:, :, None] == np.arange(1, MAX_DIGITS + 1)).astype(np.uint8) * 255
    covered_KSS = views.evaluation_view(of_each, recipe.data).numpy()
    labels: NDArray[np.int64] = np.where(covered_KSS.max(0) >= 128, covered_KSS.argmax(0) + 1, 0)
    return labels


def _check_finite(value: float, what: str) -> None:
    if not math.isfinite(value):
        raise DivergedError(f"validation: the {what} is not a finite number: the training diverged")
