"""Protocols: what was decided before a value was measured, to be compared and told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from setwise.models.similarity import Similarity
from setwise.platform import config

TIES = {
    "pessimistic": "ties count against the model",
    "official": "of equal scores the later index is ahead, as in the authors' code",
}


def of_similarity(similarity: Similarity) -> dict[str, Any]:
    """The kind of a similarity with what decides its values: settings and, where it learns single numbers, these."""
    settings = similarity.config.model_dump(mode="json")
    if settings["kind"] != "smooth_chamfer":
        del settings["alpha"]
    return settings | {name: float(value) for name, value in similarity.state_dict().items() if value.numel() == 1}


def describe_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The fields in which two protocols differ, each as "field: one | other"; empty if values may be compared."""
    left, right = config.flatten(one), config.flatten(other)
    return [
        f"{name}: {left.get(name, '-')} | {right.get(name, '-')}"
        for name in sorted({*left, *right})
        if name not in left or name not in right or left[name] != right[name]
    ]


def in_words(protocol: Mapping[str, Any]) -> str:
    """A protocol as a person would say it."""
    said = [f"{protocol['images']:,} images, {protocol['captions']:,} captions"]
    if "images_per_fold" in protocol:
        said = [f"{protocol['folds']} folds of {protocol['images_per_fold']:,} images"]
    said.append(str(protocol["grouping"]))
    if "queries" in protocol:
        said.append(f"queries {_queries(protocol['queries'], protocol['queries_named'])}")
    if protocol["members"] > 1:
        said.append(f"scores of {protocol['members']} models averaged")
    said += [TIES[protocol["ties"]], _similarity(protocol["similarity"])]
    return "; ".join(said)


def _queries(measured: Mapping[str, int], named: Mapping[str, int]) -> str:
    def share(direction: str) -> str:
        all_of_them = named.get(direction, measured[direction])
        return f"{measured[direction]:,}" + (f" of {all_of_them:,}" if all_of_them != measured[direction] else "")

    return ", ".join(f"{direction} {share(direction)}" for direction in sorted(measured))


def _similarity(described: Mapping[str, Any] | list[Mapping[str, Any]]) -> str:
    if isinstance(described, list):
        return " and ".join(dict.fromkeys(_similarity(one) for one in described))
    more = [f"{name} {value:.6g}" for name, value in described.items() if name != "kind"]
    return " ".join([str(described["kind"]), *more])
