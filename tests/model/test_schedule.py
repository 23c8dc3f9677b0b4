"""The learning rate."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mal.model.schedule import floor_lr, learning_rate, peak_lr


def test_peak_counts_all_boxes_of_a_step() -> None:
    assert peak_lr(1e-6, workers=16, batch_per_worker=4) == 1e-6 * 16 * 4
    assert floor_lr(1e-4, 0.2) == 1e-4 * 0.2


def test_ends() -> None:
    options = {"peak": 1.0, "floor": 0.2, "warmup_epochs": 1, "num_epochs": 10}
    assert learning_rate(0.0, **options) == 0.0
    assert learning_rate(1.0, **options) == 1.0
    assert learning_rate(10.0, **options) == pytest.approx(0.2)
    assert learning_rate(10.0, **options, num_wave=2) == pytest.approx(1.0)


@given(st.floats(0, 10), st.integers(0, 12), st.sampled_from([1.0, 2.0, 3.0]))
def test_stays_within_its_bounds(epoch: float, warmup: int, num_wave: float) -> None:
    rate = learning_rate(epoch, peak=1.0, floor=0.1, warmup_epochs=warmup, num_epochs=10, num_wave=num_wave)
    assert math.isfinite(rate)
    assert (0.0 if epoch < warmup else 0.1 - 1e-12) <= rate <= 1.0


@pytest.mark.shared
@pytest.mark.parametrize("case", [0, 1, 2])
def test_is_exactly_the_peers_formula(reference, case: int) -> None:
    expected = json.loads((reference.folder / "schedule.json").read_text())["cases"][case]
    per_epoch = expected["iters_per_epoch"]
    rates = [
        learning_rate(
            step // per_epoch + (step % per_epoch) / per_epoch,
            peak=expected["lr"],
            floor=expected["min_lr"],
            warmup_epochs=expected["warmup_epochs"],
            num_epochs=expected["num_epochs"],
            num_wave=expected["num_wave"],
        )
        for step in range(expected["num_epochs"] * per_epoch)
    ]
    assert rates == expected["lr_formula_at_step"]
