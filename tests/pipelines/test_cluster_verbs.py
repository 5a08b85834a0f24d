"""What the cluster has, held against a preset."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
from typer.testing import CliRunner

from setwise.pipelines import cluster_verbs, hardware
from setwise.platform import cluster
from setwise.platform.cluster import Node
from setwise.platform.errors import UnreachableError


def node(gpus: float, accelerator: str | None, number: int = 1, cpus: float = 16) -> Node:
    return Node(f"10.0.0.{number}", cpus, gpus, 64.0, accelerator)


@pytest.mark.parametrize(
    ("preset", "nodes", "has", "said"),
    [
        ("rtx3090x4", [node(4, "RTX3090")], True, "has 4 on 1 of 1 nodes"),
        ("rtx3090x4", [node(4, "GeForce-RTX-3090")], True, "has 4 on 1 of 1 nodes"),
        ("rtx3090x4", [node(2, "RTX3090", 1), node(2, "RTX3090", 2)], True, "at most 2 together"),
        ("rtx3090x4", [node(2, "RTX3090"), node(8, "A100", 2)], False, "has 2 on 1 of 2 nodes"),
        ("a100x8", [node(8, "A100-80G")], True, "has 8 on 1 of 1 nodes"),
        ("a100x8", [node(4, "RTX3090")], False, "another label: 4 x RTX3090"),
        ("h200x1", [node(1, None)], False, "ray start --labels=ray.io/accelerator-type=H200"),
        ("h200x1", [], False, "has 0 on 0 of 0 nodes"),
        ("cpu", [node(0, None, cpus=2)], True, "the cluster has 2 CPUs"),
    ],
)
def test_a_preset_is_there_or_what_is_instead_is_said(preset: str, nodes: list[Node], has: bool, said: str) -> None:
    found, words = cluster_verbs.judge(hardware.load(preset)[0], nodes)
    assert found == has and said in words


def test_every_preset_of_gpus_says_by_which_label_it_is_known() -> None:
    for name in hardware.names():
        preset = hardware.load(name)[0]
        assert bool(preset.accelerators) == (name != "cpu"), name


def test_the_verb_prints_one_object_and_ends_with_6_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "connect", nullcontext)
    monkeypatch.setattr(cluster, "nodes", lambda: [node(4, "RTX3090")])
    run = CliRunner().invoke
    there = run(cluster_verbs.app, ["check", "rtx3090x4", "--json"])
    assert there.exit_code == 0 and json.loads(there.stdout)["has"] is True
    missing = run(cluster_verbs.app, ["check", "h200x1", "--json"])
    assert json.loads(missing.stdout)["has"] is False
    assert isinstance(missing.exception, UnreachableError)
    listed = run(cluster_verbs.app, ["ls", "--json"])
    assert json.loads(listed.stdout)["nodes"][0]["accelerator"] == "RTX3090"


def test_the_labels_of_ray_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    alive = {"Alive": True, "NodeManagerAddress": "b", "Resources": {"CPU": 8.0, "GPU": 2.0, "memory": 2.0**33}}
    labelled = {**alive, "NodeManagerAddress": "a", "Labels": {"ray.io/accelerator-type": "A100"}}
    monkeypatch.setattr(ray, "nodes", lambda: [alive, {**alive, "Alive": False}, labelled])
    assert cluster.nodes() == [Node("a", 8.0, 2.0, 8.0, "A100"), Node("b", 8.0, 2.0, 8.0, None)]
