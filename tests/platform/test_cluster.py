"""Which Ray cluster a command works on, and what it has."""

from __future__ import annotations

import socket
import tempfile

import pytest
import ray
from ray._private.label_utils import validate_label_selector
from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig

from setwise.platform import cluster
from setwise.platform.cluster import Capacity, Node
from setwise.platform.errors import UnreachableError

GROUPS = ClusterConfig(
    node_group_configs=[
        NodeGroupConfig(name="rtx3090", resources={"CPU": 16, "GPU": 4}, max_count=8),
        NodeGroupConfig(name="a100", resources={"CPU": 64, "GPU": 8}, max_count=4),
    ]
)
RTX3090 = Node("a", 16, 4, 64, "RTX3090", "rtx3090")
A100 = Node("b", 64, 8, 384, "A100", "a100")


def test_a_cluster_that_is_not_there_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(UnreachableError, match=f"no Ray cluster at 127.0.0.1:{port}: "), cluster.connect():
        pass


def test_a_cluster_that_wants_a_token_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise ray.exceptions.AuthenticationError("a long text of Ray's")

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(cluster, "_check_answers", lambda address: None)
    monkeypatch.setattr(ray, "init", refuse)
    with (
        pytest.raises(UnreachableError, match=r"10\.0\.0\.1:6379 asks for a token that is not here"),
        cluster.connect(),
    ):
        pass


def test_the_labels_of_ray_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    alive = {"Alive": True, "NodeManagerAddress": "b", "Resources": {"CPU": 8.0, "GPU": 2.0, "memory": 2.0**33}}
    labels = {"ray.io/accelerator-type": "A100", "ray.io/node-group": "big"}
    labelled = {**alive, "NodeManagerAddress": "a", "Labels": labels}
    monkeypatch.setattr(ray, "nodes", lambda: [alive, {**alive, "Alive": False}, labelled])
    assert cluster.nodes() == [Node("a", 8.0, 2.0, 8.0, "A100", "big"), Node("b", 8.0, 2.0, 8.0, None)]


def test_a_selector_is_one_that_ray_takes() -> None:
    assert cluster.selector(()) == {}
    made = cluster.selector(("RTX3090", "GeForce-RTX-3090"))
    assert made == {"ray.io/accelerator-type": "in(RTX3090,GeForce-RTX-3090)"}
    assert validate_label_selector(made) is None and validate_label_selector(cluster.selector(("A100",))) is None


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What the cluster says of itself: its machines, its autoscaler's groups, whether it has an autoscaler."""
    said: list[object] = [[], None, False]
    monkeypatch.setattr(cluster, "nodes", lambda: said[0])
    monkeypatch.setattr(ray._private.state.state, "get_cluster_config", lambda: said[1])
    monkeypatch.setattr(cluster, "_has_autoscaler", lambda: said[2])
    return said


def test_only_machines_with_the_label_count(told: list[object]) -> None:
    told[0] = [RTX3090, A100, Node("c", 8, 0, 16, None)]
    assert cluster.capacity() == Capacity(12, 88, False)
    assert cluster.capacity(("A100", "A100-80G")) == Capacity(8, 64, False)
    assert cluster.capacity(("H200",)) == Capacity(0, 0, False)


def test_groups_of_an_autoscaler_count_with_all_their_machines_unless_they_are_of_another_kind(
    told: list[object],
) -> None:
    told[1] = GROUPS
    assert cluster.capacity() == Capacity(64, 384, False)
    told[0] = [RTX3090]
    assert cluster.capacity(("RTX3090",)) == Capacity(64, 384, False), "nobody knows yet what a100 is"
    assert cluster.capacity(("A100",)) == Capacity(32, 256, False)
    told[0] = [RTX3090, A100]
    assert cluster.capacity(("RTX3090",)) == Capacity(32, 128, False)
    assert cluster.capacity(("H200",)) == Capacity(0, 0, False)


def test_what_all_machines_together_may_have_is_kept_to(told: list[object]) -> None:
    limited = ClusterConfig()
    limited.CopyFrom(GROUPS)
    limited.max_resources["GPU"] = 10
    told[1] = limited
    assert cluster.capacity() == Capacity(10, 384, False)


def test_an_autoscaler_without_a_limit_or_that_says_nothing_grows(told: list[object]) -> None:
    told[0], told[2] = [A100], True
    assert cluster.capacity(("A100",)) == Capacity(8, 64, True)
    told[1] = ClusterConfig(node_group_configs=[NodeGroupConfig(name="a100", resources={"GPU": 8}, max_count=-1)])
    assert cluster.capacity(("A100",)) == Capacity(8, 64, True)


def test_an_elastic_training_has_no_more_workers_than_fit_where_ray_would_count_other_machines(
    told: list[object],
) -> None:
    told[0] = [RTX3090, A100]
    assert cluster.most_workers(("A100",), 16) == 8
    assert cluster.most_workers(("A100",), 4) == 4
    assert cluster.most_workers((), 16) == 16
    assert cluster.most_workers(("H200",), 16) == 1
    told[0] = [A100, Node("c", 8, 0, 16, None)]
    assert cluster.most_workers(("A100",), 16) == 16, "the others have no GPU that Ray could count"


@pytest.mark.ray
@pytest.mark.driver
def test_what_an_autoscaler_told_ray_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        monkeypatch.setenv("SETWISE_RAY_TEMP", folder)
        with cluster.connect(cpus=2, object_store_bytes=80 * 2**20):
            assert cluster.capacity() == Capacity(0, 2, False)
            client = ray.experimental.internal_kv.internal_kv_get_gcs_client()
            client.report_cluster_config(GROUPS.SerializeToString())
            assert cluster.capacity(("A100",)) == Capacity(64, 384, False)
