"""Weights of the authors' published code (github.com/kdwonn/DivE), by our names.

Only names and shapes are known of that code here, which are facts; method: what its options do to the state dict.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from torch import Tensor, nn

from setwise.models.config import ModelConfig, Positions

SIDES = ("img_enc.", "txt_enc.")
# Our beginnings of names, by theirs; the longest that fits is taken.
ENCODERS = {
    "img_enc.cnn.": "image_encoder.backbone.",
    "img_enc.fc.": "image_encoder.head.fc.",
    "img_enc.mlp.fc1.": "image_encoder.head.mlp.fc1.",
    "img_enc.mlp.bn.bn.": "image_encoder.head.mlp.norm.",
    "img_enc.mlp.fc2.": "image_encoder.head.mlp.fc2.",
    "img_enc.residual_last_fc.": "image_encoder.head.pooled_fc.",
    "txt_enc.embed.": "text_encoder.embedding.",
    "txt_enc.rnn.": "text_encoder.gru.",
    "txt_enc.bert.": "text_encoder.bert.",
    "txt_enc.linear.": "text_encoder.project.",
}
SET_PREDICTION = {
    "residual_norm.": "global_norm.",
    "agg_block.latents": "slots",
    "agg_block.slots_mu": "slots_mu",
    "agg_block.slots_log_sigma": "slots_log_sigma",
    "agg_block.layers.0.0.norm.": "block.slot_norm.",
    "agg_block.layers.0.0.norm_context.": "block.input_norm.",
    "agg_block.layers.0.0.fn.to_q.": "block.to_query.",
    "agg_block.layers.0.0.fn.to_k.": "block.to_key.",
    "agg_block.layers.0.0.fn.to_v.": "block.to_value.",
    "agg_block.layers.0.0.fn.to_out.0.": "block.to_update.",
    "agg_block.layers.0.2.norm.": "block.feed_forward.norm.",
    "agg_block.layers.0.2.fn.net.0.": "block.feed_forward.hidden.",
    "agg_block.layers.0.2.fn.net.3.": "block.feed_forward.output.",
    "agg_block.last_layer.0.": "slot_norm.",
}
NAMES = ENCODERS | {
    f"{side}spm.{theirs}": ours_side + ours
    for side, ours_side in (("img_enc.", "image_sets."), ("txt_enc.", "text_sets."))
    for theirs, ours in SET_PREDICTION.items()
}
NAMES |= {
    "img_enc.spm.agg_block.pos_enc.row_embed.weight": "image_sets.position_table.rows",
    "img_enc.spm.agg_block.pos_enc.col_embed.weight": "image_sets.position_table.columns",
    "txt_enc.spm.agg_block.pos_enc.row_embed.weight": "text_sets.position_table.table",
}
IGNORED = ("num_batches_tracked", "position_ids", ".pooler.")
LAYER = re.compile(r"(?P<before>.*agg_block\.layers\.)(?P<number>\d+)(?P<after>\..*)")


def two_sided(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with the names `img_enc...` and `txt_enc...`, whatever stood in front, each shared block once.

    Raises:
        ValueError: blocks of one side differ, so they share no weights, which is not available.
    """
    weights = {name.removeprefix("module.").replace(".module.", "."): tensor for name, tensor in state_dict.items()}
    if not any(name.startswith(SIDES) for name in weights):
        side = "img_enc." if "fc.weight" in weights else "txt_enc."
        weights = {side + name: tensor for name, tensor in weights.items()}
    for name in sorted(weights):
        match = LAYER.fullmatch(name)
        if match and match["number"] != "0":
            first = f"{match['before']}0{match['after']}"
            if first not in weights or not torch.equal(weights[name], weights[first]):
                raise ValueError(
                    f"{name} is not equal to {first}: the iterations of these weights share nothing "
                    "(trained without --spm_weight_sharing), which is not available"
                )
    return weights


def vocabulary_size(weights: dict[str, Tensor]) -> int:
    """Rows of the word embedding; 1 where the weights have none."""
    for name in ("txt_enc.embed.weight", "txt_enc.bert.embeddings.word_embeddings.weight"):
        if name in weights:
            return len(weights[name])
    return 1


def configuration(
    weights: dict[str, Tensor],
    *,
    padding: Literal["official", "exact"],
    heads: int,
    iterations: int | None,
    num_slots: int | None,
    image_positions: Positions,
    text_positions: Positions,
    text_pooling: Literal["last", "cls", "max"] | None,
) -> ModelConfig:
    """The model that `weights` (of `two_sided`) belong to.

    Raises:
        ValueError: they are not of this kind of model, or do not fit each other.
    """
    side = next((side for side in SIDES if f"{side}spm.agg_block.layers.0.0.fn.to_q.weight" in weights), None)
    if side is None:
        raise ValueError(
            "no set prediction among these weights: expected names such as img_enc.spm.agg_block.layers.0.0.fn.to_q."
            f"weight, found {', '.join(sorted(weights)[:3]) or 'nothing'}"
        )
    block = f"{side}spm.agg_block."
    inner, width = weights[f"{block}layers.0.0.fn.to_q.weight"].shape
    if inner % heads:
        raise ValueError(f"attention of width {inner} cannot be divided among {heads} heads")
    saved = {int(match["number"]) for name in weights if (match := LAYER.fullmatch(name))}
    sampled = f"{block}slots_mu" in weights
    if "img_enc.fc.weight" not in weights:
        image_positions = "none"  # of one side alone
    if "img_enc.spm.agg_block.pos_enc.row_embed.weight" in weights:
        image_positions = "learned"
    if "txt_enc.spm.agg_block.pos_enc.row_embed.weight" in weights:
        text_positions = "learned"
    return ModelConfig.model_validate(
        {
            "embed_size": width,
            "padding": padding,
            "image_encoder": _image_encoder(weights, image_positions),
            "text_encoder": _text_encoder(weights, width, text_pooling),
            "set_prediction": {
                "num_slots": num_slots or (4 if sampled else len(weights[f"{block}latents"])),
                "slots": "sampled" if sampled else "learned",
                "iterations": iterations or (max(saved) + 1 if max(saved) else 4),
                "heads": heads,
                "head_dim": inner // heads,
                "ff_mult": len(weights[f"{block}layers.0.2.fn.net.0.weight"]) // width,
                "image_positions": image_positions,
                "text_positions": text_positions,
            },
        }
    )


def _image_encoder(weights: dict[str, Tensor], positions: Positions) -> dict[str, Any]:
    fc = weights.get("img_enc.fc.weight")
    if fc is None:  # of one side alone; what is never called may be small
        return {"kind": "butd", "feature_dim": 1}
    width, feature_dim = fc.shape
    read = len(weights["img_enc.spm.agg_block.layers.0.0.norm_context.weight"])
    has_mlp = "img_enc.mlp.fc1.weight" in weights
    projection = "mlp" if has_mlp else "linear" if read == width else "none"
    last = weights.get("img_enc.residual_last_fc.weight")
    if last is not None and last.shape[1] != feature_dim:
        raise ValueError("img_enc.residual_last_fc reads projected features, which is not available")
    head = {"projection": projection, "global_feature": "projected" if last is None else "linear"}
    backbone = "img_enc.cnn.conv1.weight" in weights
    if not backbone and positions == "none":
        return {"kind": "butd", "feature_dim": feature_dim, "head": head}
    return {"kind": "grid", "architecture": _architecture(weights, feature_dim), "head": head}


def _architecture(weights: dict[str, Tensor], feature_dim: int) -> str:
    """torchvision's name of the backbone, by its blocks and groups; without a backbone, one of that width."""
    blocks = {int(name.split(".")[3]) for name in weights if name.startswith("img_enc.cnn.layer3.")}
    if not blocks:
        return "resnet18" if feature_dim == 512 else "resnet50"
    if feature_dim == 512:
        return "resnet18"
    grouped = weights["img_enc.cnn.layer1.0.conv2.weight"]
    name = {6: "resnet50", 23: "resnet101", 36: "resnet152"}[len(blocks)]
    if grouped.shape[0] == grouped.shape[1]:
        return name
    return {"resnet50": "resnext50_32x4d", "resnet101": "resnext101_32x8d"}[name]


def _text_encoder(
    weights: dict[str, Tensor], width: int, pooling: Literal["last", "cls", "max"] | None
) -> dict[str, Any]:
    for name, option in (("txt_pooling_fc", "txt_pooling_fc"), ("linear2", "sep_bert_fc")):
        if f"txt_enc.{name}.weight" in weights:
            raise ValueError(f"txt_enc.{name} belongs to the option --{option}, which is not available")
    if "txt_enc.linear.weight" in weights:
        hidden = weights["txt_enc.linear.weight"].shape[1]
        layers = {name.split(".")[4] for name in weights if name.startswith("txt_enc.bert.encoder.layer.")}
        encoder = {"kind": "bert", "width": hidden, "heads": max(hidden // 64, 1), "pooling": pooling or "max"}
        if not layers:  # the last hidden states are given
            return encoder | {"layers": 1, "ff_width": 1, "max_tokens": 64}
        intermediate = weights["txt_enc.bert.encoder.layer.0.intermediate.dense.weight"]
        positions = weights["txt_enc.bert.embeddings.position_embeddings.weight"]
        return encoder | {"layers": len(layers), "ff_width": len(intermediate), "max_tokens": len(positions)}
    embedding = weights.get("txt_enc.embed.weight")
    if embedding is None:
        return {"kind": "bigru", "word_dim": 2}
    word_dim, hidden = embedding.shape[1], weights["txt_enc.rnn.weight_hh_l0"].shape[1]
    read = len(weights["txt_enc.spm.agg_block.layers.0.0.norm_context.weight"])
    return {
        "kind": "bigru",
        "word_dim": word_dim,
        "directions": "mean" if hidden == width else "concatenated",
        "local_features": "words" if read == word_dim else "states",
        "pooling": pooling or "last",
    }


def load(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put `weights` into `model`, built from their `configuration`; a side without weights says so when it is called.

    Raises:
        ValueError: a weight has no place, another shape, or is missing.
    """
    present = {
        ours for side, ours in zip(SIDES, ("image", "text"), strict=True) if any(n.startswith(side) for n in weights)
    }
    for side in {"image", "text"} - present:
        setattr(model, f"{side}_encoder", _Absent(f"{side} side"))
        setattr(model, f"{side}_sets", _Absent(f"{side} side"))
    own = model.state_dict()
    named: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if any(part in name for part in IGNORED) or _repeats(name):
            continue
        begin = max((theirs for theirs in NAMES if name.startswith(theirs)), key=len, default=None)
        ours = None if begin is None else NAMES[begin] + name.removeprefix(begin)
        if name.startswith("img_enc.fc.") and "image_encoder.head.fc.weight" not in own:
            continue  # their encoder always makes this layer, also where nothing calls it
        if ours not in own:
            raise ValueError(f"{name} belongs to an option that is not available (no place for it as {ours})")
        if tensor.squeeze().shape != own[ours].squeeze().shape:  # theirs may have more axes of length 1
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(own[ours].shape)}")
        named[ours] = tensor.detach().reshape(own[ours].shape)
    given_apart = ("image_encoder.backbone.", "text_encoder.bert.")  # features may be given instead
    missing = [name for name in own if name not in named and not _made_by_us(name)]
    absent = [prefix for prefix in given_apart if not any(name.startswith(prefix) for name in named)]
    missing = [name for name in missing if not name.startswith(tuple(absent))]
    if missing:
        raise ValueError(f"weights are missing: {', '.join(missing)} (by our names)")
    if all(tensor.dtype == torch.float64 for tensor in named.values() if tensor.is_floating_point()):
        model.double()
    model.load_state_dict(own | named)  # what was not given, and may be missing, stays as it is
    for name, buffer in model.named_buffers():
        if name.endswith(".noise"):  # which theirs has not: sampled slots are drawn anew in each of its evaluations
            buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(0)))
    for prefix in absent:
        encoder, _, part = prefix.removesuffix(".").partition(".")
        if hasattr(model.get_submodule(encoder), part):
            stand_in = _Absent(f"{part}, only what comes behind it: give its output")
            stand_in.width = getattr(model.get_submodule(f"{encoder}.{part}"), "width", 0)
            setattr(model.get_submodule(encoder), part, stand_in)


def _repeats(name: str) -> bool:
    match = LAYER.fullmatch(name)
    return match is not None and match["number"] != "0"


def _made_by_us(name: str) -> bool:
    """Entries of our state dict that theirs has no counterpart of."""
    return name.endswith(("num_batches_tracked", "position_ids", ".noise"))


class _Absent(nn.Module):
    """Stands where no weights were given."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.width = 0

    def forward(self, *_: object, **__: object) -> None:
        raise ValueError(f"these weights have no {self.what}")
