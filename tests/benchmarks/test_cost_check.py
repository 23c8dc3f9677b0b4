"""What the simulator's check stands on: actors that really take their time."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mal.boxes import Box
from mal.labelling.pipeline import predict_all
from mal.predictor import BoxItem

FOLDER = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture
def cost_check(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    before = set(sys.modules)
    import cost_check

    yield cost_check
    for name in {"cost_check", "index_speed", "labelling_overhead"} - before:
        sys.modules.pop(name, None)


def test_the_actors_sleep_as_long_as_a_network_takes(cost_check):
    """By the way that labelling takes today: they once slept in a method that nobody called any more."""
    items = [BoxItem(np.zeros((40, 40, 3), np.uint8), Box(2, 2, 30, 30))] * 5
    begun = time.perf_counter()
    made = predict_all(cost_check.Sleeping(), iter([(0, items)]), overlap=False)
    results = [result for _, found in made for result in found]
    assert len(results) == 5
    assert time.perf_counter() - begun >= 5 * cost_check.BOX_SECONDS


def test_a_run_in_which_nobody_slept_calibrates_nothing(cost_check):
    with pytest.raises(AssertionError, match="the actors do not sleep"):
        cost_check.calibrated(cost_check.Measured(1.0, [0.1 * k for k in range(5)], 0.0, 5 * 70))
