"""The arithmetic of the cost simulator, where it can be done by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "cost_simulator.py"
_found = importlib.util.spec_from_file_location("cost_simulator", PATH)
assert _found is not None
assert _found.loader is not None
simulator = importlib.util.module_from_spec(_found)
sys.modules["cost_simulator"] = simulator  # dataclasses look their module up
_found.loader.exec_module(simulator)

Costs, Fleet, simulate = simulator.Costs, simulator.Fleet, simulator.simulate
SPOT = {"interruptions": 6.0, "warning_s": 5.0, "replacement_s": 30.0, "boot_s": 20.0}


def test_without_interruptions_it_is_shards_over_actors():
    costs = Costs(network_ms=10, shard_s=0.5, start_s=7, driver_us=100)
    found = simulate(40_000, 1000, costs, Fleet(gpus=4, cpus=8, boot_s=60))
    assert found.labelling_s == pytest.approx(60 + 7 + 10 * (0.5 + 10))
    assert found.seconds == pytest.approx(found.labelling_s + 4.0)
    assert (found.interruptions, found.lost) == (0, 0.0)


def test_the_last_shard_is_smaller_and_one_actor_more_does_not_help_a_single_shard():
    costs = Costs(network_ms=10)
    assert simulate(2500, 1000, costs, Fleet(1, 1)).labelling_s == pytest.approx(25)
    assert simulate(2500, 1000, costs, Fleet(2, 2)).labelling_s == pytest.approx(15)
    assert simulate(900, 1000, costs, Fleet(2, 2)).labelling_s == pytest.approx(9)


def test_too_few_cpus_make_decoding_the_bound():
    costs = Costs(network_ms=10, decode_ms=30)
    assert simulate(8000, 1000, costs, Fleet(4, cpus=12)).labelling_s == pytest.approx(20)
    assert simulate(8000, 1000, costs, Fleet(4, cpus=4)).labelling_s == pytest.approx(60)


def test_actors_that_start_together_share_the_cpus():
    costs = Costs(network_ms=10, start_s=8, start_cpu_s=8)
    assert simulate(4000, 1000, costs, Fleet(1, cpus=2)).labelling_s == pytest.approx(8 + 40)
    assert simulate(4000, 1000, costs, Fleet(4, cpus=2)).labelling_s == pytest.approx(16 + 10)


def test_the_price_is_paid_time():
    fleet = Fleet(4, 8, gpus_per_node=2, gpu_price=2.0, cpu_price=0.1, head_price=0.5, boot_s=100, idle_s=300)
    found = simulate(4000, 1000, Costs(network_ms=500, driver_us=1000), fleet)
    assert found.labelling_s == pytest.approx(600)
    assert found.gpu_hours == pytest.approx(4 * 900 / 3600)
    assert found.price == pytest.approx(4 * 0.25 * 2 + 8 * 0.25 * 0.1 + (604 / 3600) * 0.5)


def test_an_interruption_costs_the_shard_at_hand_and_the_time_of_a_new_node():
    """One node, found by the seed to live between its second and third shard: everything can be added up by hand."""
    costs, fleet = Costs(network_ms=100, start_s=4), Fleet(1, 1, **SPOT)
    seed = next(s for s in range(1000) if 250 < simulator.random.Random(s).expovariate(6 / 3600) + 5 < 310)
    lives = simulator.random.Random(seed)
    life = lives.expovariate(6 / 3600) + 5
    assert lives.expovariate(6 / 3600) + 5 > 124, "the second node finishes"
    found = simulate(3000, 1000, costs, fleet, seed)
    assert found.interruptions == 1
    assert found.labelling_s == pytest.approx(life + 30 + 20 + 4 + 100)
    assert found.lost == pytest.approx((life - 224) / (life - 224 + 300))
    assert found.gpu_hours == pytest.approx((life + 124) / 3600)


def test_the_same_seed_gives_the_same_outcome_and_another_one_another():
    costs, fleet = Costs(network_ms=20, shard_s=0.1), Fleet(8, 8, **SPOT)
    first = simulate(400_000, 500, costs, fleet, seed=3)
    assert simulate(400_000, 500, costs, fleet, seed=3) == first
    assert simulate(400_000, 500, costs, fleet, seed=4) != first
    assert first.interruptions > 0
    assert 0 < first.lost < 0.2


def test_interruptions_come_as_often_as_they_were_asked_for():
    fleet = Fleet(16, 16, interruptions=2.0)
    runs = [simulate(1_000_000, 100, Costs(network_ms=50), fleet, seed) for seed in range(5)]
    rate = sum(run.interruptions for run in runs) / sum(run.gpu_hours for run in runs)
    assert rate == pytest.approx(2.0, rel=0.15)
    assert all(run.labelling_s > 1_000_000 * 0.05 / 16 for run in runs)


def test_shards_that_no_node_lives_to_finish_are_refused():
    with pytest.raises(ValueError, match="cut it up"):
        simulate(10**6, 10**6, Costs(network_ms=100), Fleet(1, 1, interruptions=60.0))


def test_the_table_has_a_line_a_fleet():
    outcome = simulate(10_000, 100, Costs(network_ms=10), Fleet(2, 2, gpu_price=1.0))
    lines = simulator.table(10_000, [("2 on demand", outcome)]).splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("2 on demand")
    assert f"{outcome.price:.2f}" in lines[1]
