"""What the cluster has, held against a preset."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext

import pytest
from typer.testing import CliRunner

from setwise.pipelines import cluster_verbs, hardware
from setwise.platform import cluster
from setwise.platform.cluster import Capacity, Node
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
        ("h200x1", [], False, "has 0 on 0 of 0 nodes with the label H200, and none of another label"),
        ("cpu", [node(0, None, cpus=2)], True, "the cluster has 2 CPUs"),
    ],
)
def test_a_preset_is_there_or_what_is_instead_is_said(preset: str, nodes: list[Node], has: bool, said: str) -> None:
    asked = hardware.load(preset)[0]
    there = cluster.fitting(asked.accelerators, nodes)
    found = Capacity(int(sum(one.gpus for one in there)), int(sum(one.cpus for one in there)), grows=False)
    judged, words = hardware.judge(asked, nodes, found)
    assert judged == has and said in words


@pytest.mark.parametrize(
    ("preset", "found", "has", "said"),
    [
        ("a100x8", Capacity(32, 256, False), True, "has 0 on 0 of 1 nodes .*; its autoscaler goes up to 32"),
        ("a100x8", Capacity(4, 256, False), False, "; its autoscaler goes up to 4"),
        ("a100x8", Capacity(0, 0, True), False, "; an autoscaler may start more, and does not say how many"),
        ("cpu", Capacity(0, 64, False), True, "has 16 CPUs; its autoscaler goes up to 64"),
    ],
)
def test_what_an_autoscaler_may_start_counts_where_it_says_so(
    preset: str, found: Capacity, has: bool, said: str
) -> None:
    judged, words = hardware.judge(hardware.load(preset)[0], [node(4, "RTX3090")], found)
    assert judged == has and re.search(said, words)


def test_every_preset_of_gpus_says_by_which_label_it_is_known() -> None:
    for name in hardware.names():
        preset = hardware.load(name)[0]
        assert bool(preset.accelerators) == (name != "cpu"), name


def test_the_verb_prints_one_object_and_ends_with_6_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "connect", nullcontext)
    monkeypatch.setattr(cluster, "nodes", lambda: [node(4, "RTX3090")])
    monkeypatch.setattr(cluster, "capacity", lambda kinds: Capacity(4 if "RTX3090" in kinds else 0, 16, False))
    run = CliRunner().invoke
    there = run(cluster_verbs.app, ["check", "rtx3090x4", "--json"])
    assert there.exit_code == 0 and json.loads(there.stdout)["has"] is True
    missing = run(cluster_verbs.app, ["check", "h200x1", "--json"])
    assert json.loads(missing.stdout)["has"] is False
    assert isinstance(missing.exception, UnreachableError)
    listed = run(cluster_verbs.app, ["ls", "--json"])
    assert json.loads(listed.stdout)["nodes"][0]["accelerator"] == "RTX3090"
