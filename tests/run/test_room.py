"""Whether processes fit on nodes, have to wait, or never can run."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mal.errors import ClusterError
from mal.run.cluster import Cluster
from mal.run.room import Need, Node, check_room, places

NODES = st.lists(st.builds(Node, st.integers(0, 16).map(float), st.integers(0, 4).map(float)), max_size=4)


def _need(count=1, cpus=1.0, gpus=0.0):
    return Need("training worker", count, cpus, gpus, "lower train.num_gpus")


def test_each_process_needs_one_node_that_has_all_of_it():
    nodes = [Node(8, 0), Node(2, 1)]
    assert places(nodes, _need(cpus=4)) == 2
    assert places(nodes, _need(cpus=4, gpus=1)) == 0
    assert places(nodes, _need(cpus=0.5, gpus=1)) == 1
    assert places([Node(1, 0)], _need(cpus=0.1)) == 10


@settings(deadline=None)
@given(NODES, st.integers(1, 6), st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([0.0, 1.0]))
def test_it_fits_as_often_as_taking_the_resources_away_one_by_one(nodes, count, cpus, gpus):
    left = [[node.cpus, node.gpus] for node in nodes]
    placed = 0
    for _ in range(200):
        for room in left:
            if room[0] >= cpus and room[1] >= gpus:
                room[0] -= cpus
                room[1] -= gpus
                placed += 1
                break
    need = _need(count, cpus, gpus)
    assert places(nodes, need) == placed
    if placed >= count:
        assert check_room(need, nodes) is None
    else:
        with pytest.raises(ClusterError, match="can never run"):
            check_room(need, nodes)


def test_what_is_missing_is_named():
    with pytest.raises(ClusterError) as caught:
        check_room(_need(3, 4, 1), [Node(8, 1)])
    text = str(caught.value)
    assert "3 training workers with 4 CPUs and 1 GPU each can never run" in text
    assert "8 CPUs and 1 GPUs on 1 node, room for 1" in text
    assert "8 CPUs and 2 GPUs are missing: lower train.num_gpus" in text
    assert "ray.autoscaled_cpus" in text


def test_what_the_autoscaler_can_bring_is_waited_for_and_no_more():
    need = _need(3, 4, 1)
    line = check_room(need, [Node(2, 0)], coming_cpus=16, coming_gpus=3)
    assert line is not None
    assert line.startswith("waiting for the autoscaler: 3 training workers")
    with pytest.raises(ClusterError, match="1 GPUs are missing"):
        check_room(need, [Node(2, 0)], coming_cpus=16, coming_gpus=2)


def test_a_cluster_says_that_it_waits(capsys):
    cluster = Cluster(1.0, 4.0, False, (Node(0, 0),), 4.0, 1.0)
    cluster.check_room(_need(1, 1, 1))
    assert "waiting for the autoscaler" in capsys.readouterr().out
    with pytest.raises(ClusterError, match="this machine has"):
        Cluster(0.0, 2.0, True, (Node(2, 0),)).check_room(_need(3))
