"""The figures of a run that goes on, and that Ray shows them."""

from __future__ import annotations

import math
import time
import urllib.request

import pytest

from mal.labelling.figures import METRICS, LabellingFigures, RayMetrics, live_actors
from mal.labelling.waiting import Waiting


def _report(actor: str, boxes: int, rejected: int = 0, seconds: float = 1.0, waited: float = 0.25) -> dict[str, object]:
    return {"actor": actor, "boxes": boxes, "rejected": rejected, "seconds": seconds, "waited": waited}


def test_figures_count_what_earlier_attempts_did_but_not_in_the_rate():
    now = [0.0]
    figures = LabellingFigures(1000, 400, clock=lambda: now[0])
    assert math.isnan(figures.values()["seconds_left"])
    now[0] = 10.0
    figures.add(_report("a", 60, rejected=5))
    figures.add(_report("b", 40))
    assert figures.values() == {
        "boxes_total": 1000,
        "boxes_done": 500,
        "boxes_rejected": 5,
        "boxes_per_second": 10.0,
        "boxes_per_second_mean": 10.0,
        "seconds_left": 50.0,
        "actors": 2,
        "waiting_share": 0.25,
    }
    assert set(figures.values()) == set(METRICS)


def test_an_actor_that_is_not_heard_of_any_more_is_not_counted():
    now = [0.0]
    figures = LabellingFigures(1000, 0, clock=lambda: now[0])
    figures.add(_report("slow", 1, seconds=100.0))
    figures.add(_report("fast", 1, seconds=2.0))
    now[0] = 200.0
    assert figures.actors == 1


def test_actors_that_are_alive_are_counted_where_that_is_known():
    figures = LabellingFigures(1000, 0)
    figures.add(_report("a", 1))
    assert figures.actors == 1
    figures.alive = 5
    assert figures.values()["actors"] == 5


@pytest.mark.ray
def test_ray_tells_how_many_actors_are_alive(ray_here):
    import ray

    class Counted:
        def ready(self) -> bool:
            return True

    actors = [ray.remote(num_cpus=0)(Counted).remote() for _ in range(3)]
    ray.get([actor.ready.remote() for actor in actors])
    _wait_for(lambda: live_actors("Counted") == 3)
    ray.kill(actors.pop())
    _wait_for(lambda: live_actors("Counted") == 2)
    assert live_actors("Nobody") == 0


def _wait_for(what) -> None:
    deadline = time.monotonic() + 60
    while not what() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert what()


def test_the_share_of_waiting_is_that_of_the_last_minute():
    now = [0.0]
    figures = LabellingFigures(1000, 0, clock=lambda: now[0])
    assert math.isnan(figures.waiting_share)
    for seconds, waited in ((10.0, 10.0), (30.0, 3.0), (10.0, 1.0)):
        figures.add(_report("a", 1, seconds=seconds, waited=waited))
        now[0] += 50.0
    assert figures.waiting_share == pytest.approx(4.0 / 40.0)


def test_waiting_is_counted_and_work_is_not():
    now = [0.0]

    def slow():
        for item in range(3):
            now[0] += 2.0
            yield item

    waiting = Waiting(lambda: now[0])
    for _ in waiting.over(slow()):
        now[0] += 5.0
    assert waiting.seconds == 6.0


@pytest.mark.ray
@pytest.mark.slow
def test_ray_shows_the_figures(ray_here):
    import ray

    metrics = RayMetrics("/results/some run")
    figures = LabellingFigures(1000, 400)
    figures.add(_report("a", 60, rejected=5))
    node = ray.nodes()[0]
    page = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 90
    wanted = {f"ray_mal_{name}" for name in METRICS}
    shown: dict[str, str] = {}
    while set(shown) != wanted and time.monotonic() < deadline:
        metrics.show(figures.values())
        time.sleep(1.0)
        lines = urllib.request.urlopen(page, timeout=10).read().decode().splitlines()
        own = [line for line in lines if 'run="/results/some run"' in line]  # other runs of this session show theirs
        shown = {line.partition("{")[0]: line for line in own}
    assert set(shown) == wanted
    assert shown["ray_mal_boxes_done"].endswith(" 460.0")
