"""Whether what a spec asks for can be started on the cluster at hand, can come by its autoscaler, or never can."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mal.errors import ClusterError


@dataclass(frozen=True)
class Node:
    """A node's resources as Ray counts them, busy or not."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Need:
    """Processes that must run at the same time, each within one node."""

    what: str
    """What one of them is: ``training worker``, ``actor``."""
    count: int
    cpus: float
    gpus: float
    remedy: str
    """What the user can lower."""

    def __str__(self) -> str:
        each = f"{self.cpus:g} CPUs" + (f" and {self.gpus:g} GPU" if self.gpus else "")
        return f"{self.count} {self.what}{'s' if self.count > 1 else ''} with {each} each"


def places(nodes: Sequence[Node], need: Need) -> int:
    """How many of ``need``'s processes the nodes can carry at the same time."""
    wanted = ((need.cpus, "cpus"), (need.gpus, "gpus"))
    return sum(min(math.floor(getattr(node, name) / each + 1e-9) for each, name in wanted if each) for node in nodes)


def check_room(
    need: Need,
    nodes: Sequence[Node],
    *,
    coming_cpus: float = 0.0,
    coming_gpus: float = 0.0,
    kinds: Sequence[Node] = (),
    alone: bool = False,
) -> str | None:
    """Raise if the processes can never run; else a line for the log if they have to wait for nodes, else None.

    Args:
        nodes: those that are there.
        coming_cpus, coming_gpus: what the autoscaler can bring besides, in all.
        kinds: of the nodes that it can bring; empty if not known.
        alone: this machine alone is the cluster.

    Raises:
        ClusterError: naming what is missing and what to do.
    """
    here = places(nodes, need)
    if here >= need.count:
        return None
    cpus, gpus = sum(n.cpus for n in nodes), sum(n.gpus for n in nodes)
    missing = need.count - here
    short = [
        f"{missing * each - coming:g} {name}"
        for each, coming, name in ((need.cpus, coming_cpus, "CPUs"), (need.gpus, coming_gpus, "GPUs"))
        if missing * each > coming
    ]
    if kinds and not short and not places(kinds, need):
        largest = ", ".join(f"{kind.cpus:g} CPUs and {kind.gpus:g} GPUs" for kind in kinds)
        raise ClusterError(
            f"{need} can never run: none of the nodes that the autoscaler can bring is large enough ({largest}): "
            f"{need.remedy}"
        )
    if not short:
        return f"waiting for the autoscaler: {need}, and the nodes that are there carry {here}"
    has = f"{cpus:g} CPUs and {gpus:g} GPUs on {len(nodes)} node{'s' if len(nodes) != 1 else ''}"
    where = "this machine has" if alone else "the cluster has"
    coming = f", its autoscaler can bring {coming_cpus:g} CPUs and {coming_gpus:g} GPUs" if coming_cpus else ""
    wait = "" if alone or coming_cpus else "; if its autoscaler can bring more, say so in ray.autoscaled_cpus and _gpus"
    raise ClusterError(
        f"{need} can never run: {where} {has}, room for {here}{coming}. {' and '.join(short)} are missing: "
        f"{need.remedy}{wait}"
    )
