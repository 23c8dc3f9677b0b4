"""What an existing cluster has once its autoscaler has brought all it may, as far as a driver on it can know.

Ray does not tell drivers. In this order: the spec (``ray.autoscaled_*``), the environment (the Kubernetes files of
``cluster/`` set it on the head), the cluster launcher's file on the head, and what some platforms publish in Ray.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mal.errors import ClusterError
from mal.run.room import Node
from mal.spec.schema import RaySpec

CPUS_VARIABLE, GPUS_VARIABLE = "MAL_AUTOSCALED_CPUS", "MAL_AUTOSCALED_GPUS"
LAUNCHER_FILE = "~/ray_bootstrap_config.yaml"
"""Where Ray's cluster launcher puts its configuration on the head."""


@dataclass(frozen=True)
class Reach:
    """Most that there can be, nodes that are there included."""

    cpus: float = 0.0
    gpus: float = 0.0
    kinds: tuple[Node, ...] = ()
    """Of the nodes that may come; empty if not known."""


def reach(spec: RaySpec) -> Reach:
    """How far the cluster at hand can grow; zeros if nothing says that it can.

    Raises:
        ClusterError: the environment says something that is no number.
    """
    if spec.autoscaled_cpus or spec.autoscaled_gpus:
        return Reach(spec.autoscaled_cpus, spec.autoscaled_gpus)
    given = [os.environ.get(name) for name in (CPUS_VARIABLE, GPUS_VARIABLE)]
    if any(given):
        try:
            cpus, gpus = (float(value or 0) for value in given)
        except ValueError as error:
            raise ClusterError(f"{CPUS_VARIABLE} and {GPUS_VARIABLE} must be numbers: {given}") from error
        return Reach(cpus, gpus)
    launcher = Path(LAUNCHER_FILE).expanduser()
    if launcher.is_file():
        return of_launcher(yaml.safe_load(launcher.read_text()))
    return _published()


def of_launcher(config: Mapping[str, Any]) -> Reach:
    """By the node types of a cluster launcher's configuration, at most ``max_workers`` of them beside the head."""
    types = config.get("available_node_types") or {}
    head = config.get("head_node_type")
    kinds, counts = [], []
    for name, kind in types.items():
        resources = kind.get("resources") or {}
        most = kind.get("max_workers", config.get("max_workers", 0))
        if most and name != head:
            kinds.append(Node(float(resources.get("CPU", 0)), float(resources.get("GPU", 0))))
            counts.append(most)
    all_workers = config.get("max_workers", sum(counts))
    return Reach(
        _most([kind.cpus for kind in kinds], counts, all_workers),
        _most([kind.gpus for kind in kinds], counts, all_workers),
        tuple(kinds),
    )


def _most(each: list[float], counts: list[int], nodes: int) -> float:
    """The largest sum over at most ``nodes`` nodes, ``counts`` of every kind."""
    total = 0.0
    for value, count in sorted(zip(each, counts, strict=True), reverse=True):
        taken = min(count, nodes)
        total, nodes = total + value * taken, nodes - taken
    return total


def _published() -> Reach:
    """What the platform has written into Ray, if it does."""
    from ray._private.state import state

    ask = getattr(state, "get_max_resources_from_cluster_config", None)
    found = (ask() if ask else None) or {}
    return Reach(float(found.get("CPU", 0)), float(found.get("GPU", 0)))
