"""How long labelling takes on a cluster of spot GPUs and what it costs: a simulation of shards, actors and lost nodes.

    python benchmarks/cost_simulator.py --boxes 25e6 --gpus 1 8 64 --network-ms 12 --decode-ms 6 --cpus 64
    python benchmarks/cost_simulator.py --check      real runs with 1, 2 and 4 local actors against the simulation

Give it what was measured on your own images: `mal inference --dry-run` and `labelling_overhead.py` print the costs per
box. The defaults for decoding, shards and driver are measured (`README.md` here, images of COCO's size); those for the
network, starts, prices and interruptions are placeholders. `--check` needs no GPU: its actors sleep instead.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

HOUR = 3600.0


@dataclass(frozen=True)
class Costs:
    """What the work costs, measured."""

    network_ms: float
    """Of the network, a box; the actor is busy with it."""
    decode_ms: float = 0.0
    """Of reading, decoding and cropping, a box, on one CPU; beside the network, on the CPUs that all actors share."""
    shard_s: float = 0.0
    """Besides, a shard: dispatch, index, parquet file."""
    start_s: float = 0.0
    """From the start of an actor's process to its first shard."""
    start_cpu_s: float = 0.0
    """Of that, what keeps a CPU busy: actors that start together share the CPUs."""
    driver_us: float = 0.0
    """Of the driver alone, a box: index and merge."""


@dataclass(frozen=True)
class Fleet:
    """What is rented. Prices are an hour."""

    gpus: int
    """One actor each."""
    cpus: float
    """For decoding, all together."""
    gpus_per_node: int = 1
    gpu_price: float = 0.0
    cpu_price: float = 0.0
    head_price: float = 0.0
    boot_s: float = 0.0
    """From the request of a node to its Ray; paid."""
    interruptions: float = 0.0
    """Of a GPU node, an hour; 0: never (on demand)."""
    warning_s: float = 0.0
    """From the notice to the end; the node works on meanwhile."""
    replacement_s: float = 0.0
    """Until a node takes the place of a lost one; not paid, its boot follows."""
    idle_s: float = 0.0
    """Paid after the end, until the autoscaler lets the nodes go."""


@dataclass(frozen=True)
class Outcome:
    """What came of a run."""

    seconds: float
    """From the start of the driver to the merged file."""
    labelling_s: float
    """Of that, without index and merge."""
    gpu_hours: float
    """Paid."""
    price: float
    interruptions: int
    lost: float
    """Seconds of actors' work that went with their nodes, as a part of all their work."""


@dataclass
class _Node:
    begun: float
    ends: float
    hands: dict[int, float] = field(default_factory=dict)
    """Actor -> when it began with the shard at hand."""


class _Run:
    """Shards in a queue, actors on nodes that come and go."""

    def __init__(self, boxes: int, shard_boxes: int, costs: Costs, fleet: Fleet, seed: int) -> None:
        self.costs, self.fleet = costs, fleet
        self.random = random.Random(seed)
        whole, rest = divmod(boxes, shard_boxes)
        self.queue = [rest] * bool(rest) + [shard_boxes] * whole  # taken from the end
        self.left = len(self.queue)
        self.events: list[tuple[float, int, str, Any]] = []
        self.order = itertools.count()
        self.nodes: list[_Node] = []
        self.idle: list[tuple[_Node, int]] = []
        self.worked = self.lost = 0.0
        self.interrupted = 0
        longest = self.shard_seconds(min(boxes, shard_boxes))
        if fleet.interruptions and longest > 10 * HOUR / fleet.interruptions:
            raise ValueError(f"a shard takes {longest:.0f} s, nodes live {HOUR / fleet.interruptions:.0f} s: cut it up")

    def shard_seconds(self, boxes: int) -> float:
        """Of one actor while all are at work: the network, or its share of the CPUs, whichever is slower."""
        costs, fleet = self.costs, self.fleet
        decode_ms = costs.decode_ms * fleet.gpus / fleet.cpus if costs.decode_ms else 0.0
        return costs.shard_s + boxes * max(costs.network_ms, decode_ms) / 1000

    def at(self, moment: float, what: str, about: Any = None) -> None:
        heapq.heappush(self.events, (moment, next(self.order), what, about))

    def run(self) -> float:
        """Seconds until the last shard is written."""
        for _ in range(math.ceil(self.fleet.gpus / self.fleet.gpus_per_node)):
            self.at(0.0, "node")
        now = 0.0
        while self.left:
            now, _, what, about = heapq.heappop(self.events)
            getattr(self, f"_{what}")(now, about)
        return now

    def _node(self, now: float, _: None) -> None:
        """A node is asked for."""
        rate = self.fleet.interruptions / HOUR
        life = self.random.expovariate(rate) + self.fleet.warning_s if rate else math.inf
        node = _Node(now, now + life)
        self.nodes.append(node)
        if life < math.inf:
            self.at(node.ends, "end", node)
        running = sum(other.ends > now for other in self.nodes[:-1]) * self.fleet.gpus_per_node
        actors = min(self.fleet.gpus_per_node, self.fleet.gpus - running)
        together = self.fleet.gpus if now == 0.0 else actors
        waits = self.costs.start_cpu_s * max(0.0, together / self.fleet.cpus - 1)
        for actor in range(actors):
            self.at(now + self.fleet.boot_s + self.costs.start_s + waits, "free", (node, actor))

    def _free(self, now: float, who: tuple[_Node, int]) -> None:
        """An actor can take a shard."""
        node, actor = who
        if now >= node.ends:
            return
        if not self.queue:
            self.idle.append(who)
            return
        boxes = self.queue.pop()
        node.hands[actor] = now
        seconds = self.shard_seconds(boxes)
        if now + seconds < node.ends:
            self.at(now + seconds, "done", (node, actor, seconds))
        else:
            self.at(node.ends, "back", boxes)

    def _done(self, now: float, about: tuple[_Node, int, float]) -> None:
        """A shard is written."""
        node, actor, seconds = about
        del node.hands[actor]
        self.worked += seconds
        self.left -= 1
        self._free(now, (node, actor))

    def _back(self, now: float, boxes: int) -> None:
        """A shard was lost with its node: an actor that has nothing to do takes it, or the next one that is free."""
        self.queue.append(boxes)
        while self.idle and self.queue:
            self._free(now, self.idle.pop())

    def _end(self, now: float, node: _Node) -> None:
        """A node is taken away."""
        self.interrupted += 1
        self.lost += sum(now - begun for begun in node.hands.values())
        self.idle = [who for who in self.idle if who[0] is not node]
        self.at(now + self.fleet.replacement_s, "node")


def simulate(boxes: int, shard_boxes: int, costs: Costs, fleet: Fleet, seed: int = 0) -> Outcome:
    """One labelling run of ``boxes`` boxes in shards of ``shard_boxes``. The same seed gives the same outcome.

    Raises:
        ValueError: nodes do not live long enough to finish a shard.
    """
    run = _Run(boxes, shard_boxes, costs, fleet, seed)
    labelling = run.run()
    driver = boxes * costs.driver_us / 1e6
    until = labelling + fleet.idle_s
    paid = sum(min(node.ends, until) - node.begun for node in run.nodes if node.begun < labelling)
    gpu_hours = paid * fleet.gpus_per_node / HOUR
    price = gpu_hours * fleet.gpu_price
    price += until / HOUR * fleet.cpus * fleet.cpu_price + (driver + labelling) / HOUR * fleet.head_price
    lost = run.lost / (run.lost + run.worked)
    return Outcome(driver + labelling, labelling, gpu_hours, price, run.interrupted, lost)


def mean_outcome(outcomes: Sequence[Outcome]) -> Outcome:
    """The means of several runs; interruptions rounded."""
    mean = {name: statistics.fmean(getattr(o, name) for o in outcomes) for name in Outcome.__dataclass_fields__}
    return Outcome(**{**mean, "interruptions": round(mean["interruptions"])})  # type: ignore[arg-type]


def table(boxes: int, outcomes: Sequence[tuple[str, Outcome]]) -> str:
    """A line per fleet."""
    lines = ["fleet                 hours  boxes/s  GPU-hours  interrupted   lost      price  a million boxes"]
    for name, o in outcomes:
        lines.append(
            f"{name:<20}{o.seconds / HOUR:>7.2f}{boxes / o.seconds:>9,.0f}{o.gpu_hours:>11.1f}{o.interruptions:>13}"
            f"{o.lost:>7.1%}{o.price:>11.2f}{o.price / boxes * 1e6:>17.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--boxes", type=float, default=25e6, help="boxes to label (%(default)g)")
    add("--shard-boxes", type=int, default=2000, help="boxes a shard (%(default)s)")
    add("--gpus", type=int, nargs="+", default=[1, 4, 16, 64], help="fleets to compare (%(default)s)")
    add("--gpus-per-node", type=int, default=1)
    add("--cpus", type=float, default=8, help="CPUs for decoding, for every GPU (%(default)g)")
    add("--network-ms", type=float, default=15, help="a box (%(default)g)")
    add("--decode-ms", type=float, default=0.6, help="of a CPU, a box (%(default)g)")
    add("--shard-s", type=float, default=0.05, help="overhead of a shard (%(default)g)")
    add("--start-s", type=float, default=20, help="start of an actor (%(default)g)")
    add("--driver-us", type=float, default=10, help="index and merge, a box (%(default)g)")
    add("--gpu-price", type=float, default=1.0, help="a GPU with its CPUs, on demand, an hour (%(default)g)")
    add("--spot-price", type=float, default=0.4, help="the same on spot (%(default)g)")
    add("--head-price", type=float, default=0.2, help="an hour (%(default)g)")
    add("--interruptions", type=float, default=0.1, help="of a spot node, an hour (%(default)g)")
    add("--warning-s", type=float, default=120, help="notice before a node goes (%(default)g)")
    add("--replacement-s", type=float, default=120, help="until another one is found (%(default)g)")
    add("--boot-s", type=float, default=180, help="of a node (%(default)g)")
    add("--idle-s", type=float, default=300, help="paid after the end (%(default)g)")
    add("--runs", type=int, default=5, help="simulated runs a fleet, with seeds of their own (%(default)s)")
    add("--check", action="store_true", help="real runs with local actors against the simulation")
    add("--check-seconds", type=float, default=120, help="work of the real runs, for one actor (%(default)g)")
    options = parser.parse_args()
    if options.check:
        from cost_check import check

        sys.exit(check(options.check_seconds))
    costs = Costs(options.network_ms, options.decode_ms, options.shard_s, options.start_s, driver_us=options.driver_us)
    boxes, outcomes = int(options.boxes), []
    for gpus in options.gpus:
        fleet = Fleet(
            gpus, gpus * options.cpus, options.gpus_per_node, options.gpu_price,
            head_price=options.head_price, boot_s=options.boot_s, idle_s=options.idle_s,
        )  # fmt: skip
        outcomes.append((f"{gpus} on demand", simulate(boxes, options.shard_boxes, costs, fleet)))
        spot = replace(
            fleet, gpu_price=options.spot_price, interruptions=options.interruptions,
            warning_s=options.warning_s, replacement_s=options.replacement_s,
        )  # fmt: skip
        runs = [simulate(boxes, options.shard_boxes, costs, spot, seed) for seed in range(options.runs)]
        outcomes.append((f"{gpus} on spot", mean_outcome(runs)))
    print(f"{boxes:,} boxes in shards of {options.shard_boxes:,}; mean of {options.runs} runs on spot")
    print(table(boxes, outcomes))


if __name__ == "__main__":
    main()
