"""How far a cluster can grow: who says so, and what it means for a task."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mal.errors import ClusterError
from mal.run import autoscaler
from mal.run.autoscaler import Reach, of_launcher, reach
from mal.run.cluster import connected
from mal.run.room import Need, Node, check_room
from mal.spec.schema import RaySpec

AWS = yaml.safe_load((Path(__file__).parents[2] / "cluster" / "aws.yaml").read_text())
GPU_NODE = Node(16, 1)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch, tmp_path):
    for name in (autoscaler.CPUS_VARIABLE, autoscaler.GPUS_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(autoscaler, "LAUNCHER_FILE", str(tmp_path / "ray_bootstrap_config.yaml"))
    monkeypatch.setattr(autoscaler, "_published", Reach)
    return tmp_path


def test_nothing_says_that_it_grows():
    assert reach(RaySpec()) == Reach()


def test_the_spec_goes_before_the_environment_and_that_before_the_launchers_file(nothing_known, monkeypatch):
    (nothing_known / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(AWS))
    assert reach(RaySpec()) == of_launcher(AWS) != Reach()
    monkeypatch.setenv(autoscaler.GPUS_VARIABLE, "3")
    assert reach(RaySpec()) == Reach(0.0, 3.0)
    assert reach(RaySpec(autoscaled_cpus=5)) == Reach(5, 0)
    monkeypatch.setenv(autoscaler.CPUS_VARIABLE, "many")
    with pytest.raises(ClusterError, match="must be numbers"):
        reach(RaySpec())


def test_the_launchers_file_bounds_the_sum_by_the_workers_of_all_kinds():
    assert of_launcher(AWS) == Reach(12 * 16, 8, (Node(16, 0), GPU_NODE))
    assert of_launcher(AWS | {"max_workers": 5}) == Reach(5 * 16, 5, (Node(16, 0), GPU_NODE))
    assert of_launcher({"provider": {"worker_ips": ["a"]}}) == Reach()


def test_on_the_head_of_a_cluster_that_was_just_launched_tasks_wait_for_what_can_come():
    most = of_launcher(AWS)
    head = [Node(0, 0)]

    def check(count, cpus, gpus):
        need = Need("actor", count, cpus, gpus, "lower cpus_per_actor")
        return check_room(need, head, coming_cpus=most.cpus, coming_gpus=most.gpus, kinds=most.kinds)

    line = check(8, 4, 1)
    assert line is not None
    assert line.startswith("waiting for the autoscaler: 8 actors")
    with pytest.raises(ClusterError, match="1 GPUs are missing"):
        check(9, 4, 1)
    with pytest.raises(
        ClusterError, match=r"none of the nodes that the autoscaler can bring is large enough \(16 CPUs"
    ):
        check(1, 17, 0)


@pytest.mark.ray
def test_what_a_platform_publishes_in_ray_is_found(ray_here, monkeypatch):
    import ray
    from ray.core.generated.autoscaler_pb2 import ClusterConfig
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_put

    monkeypatch.undo()
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    config = ClusterConfig()
    group = config.node_group_configs.add(name="gpu", max_count=3)
    group.resources["CPU"], group.resources["GPU"] = 8, 2
    key = ray._raylet.GCS_AUTOSCALER_CLUSTER_CONFIG_KEY.encode()
    namespace = ray._raylet.GCS_AUTOSCALER_STATE_NAMESPACE.encode()
    _internal_kv_put(key, config.SerializeToString(), overwrite=True, namespace=namespace)
    try:
        assert autoscaler._published() == Reach(24, 6)
        with connected(RaySpec()) as cluster:
            assert (cluster.cpus, cluster.coming_cpus, cluster.coming_gpus) == (24, 20, 6)
    finally:
        _internal_kv_del(key, namespace=namespace)
