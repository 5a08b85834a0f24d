"""A captioner as its steps read: one caption, one token, one head after another; padding is cut off beforehand."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from setwise.models.captioning import Attention, Captioner, DecoderLayer


def attend(attention: Attention, queries_QH: Tensor, sources_MH: Tensor, causal: bool) -> Tensor:
    """What each query gets from the sources, (Q,H); a causal one sees no source behind its own place."""
    query, key, value = (
        attention.to_query(queries_QH),
        attention.to_key(sources_MH),
        attention.to_value(sources_MH),
    )
    width = query.shape[1] // attention.heads
    rows = []
    for q in range(len(query)):
        seen = range(q + 1) if causal else range(len(key))
        heads = []
        for head in range(attention.heads):
            part = slice(head * width, (head + 1) * width)
            weights = [((query[q, part] * key[m, part]).sum() / math.sqrt(width)).exp() for m in seen]
            total = sum(weights)
            heads.append(sum(weight / total * value[m, part] for weight, m in zip(weights, seen, strict=True)))
        rows.append(torch.cat(heads))
    result: Tensor = attention.to_output(torch.stack(rows))
    return result


def decode(layer: DecoderLayer, x_QH: Tensor, memory_MH: Tensor) -> Tensor:
    x_QH = layer.token_norm(x_QH + attend(layer.to_tokens, x_QH, x_QH, causal=True))
    x_QH = layer.image_norm(x_QH + attend(layer.to_image, x_QH, memory_MH, causal=False))
    result: Tensor = layer.output_norm(x_QH + layer.output(F.gelu(layer.hidden(x_QH))))
    return result


def surprise(captioner: Captioner, local_MX: Tensor, tokens: list[int], backward: bool) -> tuple[Tensor, int]:
    """The sum of -log(probability) of a caption's tokens in one direction, and how many were the most probable word."""
    if len(tokens) > captioner.max_words:
        tokens = [*tokens[: captioner.max_words - 1], tokens[-1]]
    if backward:
        tokens = tokens[::-1]
    memory_MH = captioner.visual(local_MX)
    read = [captioner.words.weight[token] + captioner.positions.weight[n] for n, token in enumerate(tokens[:-1])]
    x_QH = captioner.embedding_norm(torch.stack(read))
    for layer in captioner.backward_layers if backward else captioner.forward_layers:
        assert isinstance(layer, DecoderLayer)
        x_QH = decode(layer, x_QH, memory_MH)
    total, hits = torch.zeros((), dtype=x_QH.dtype), 0
    for n, word in enumerate(tokens[1:]):
        logits = [
            (x_QH[n] * vector).sum() + bias
            for vector, bias in zip(captioner.words.weight, captioner.output_bias, strict=True)
        ]
        total = total + sum(logit.exp() for logit in logits).log() - logits[word]
        hits += max(range(len(logits)), key=lambda v: logits[v].item()) == word
    return total, hits
