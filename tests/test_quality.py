"""Quality of masks: what it is made of, its calibration, and the figures that judge it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mal.boxes import Box, Window
from mal.errors import InputError
from mal.quality import (
    Calibration,
    Evidence,
    cross_validated,
    default_quality,
    evidence,
    fit,
    isotonic,
    judge,
    load_calibration,
    spearman,
    tightness,
)

FIELDS = len(Evidence._fields)
numbers = st.floats(0, 1, width=32)


def simulated(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes whose IoU depends on their evidence, not evenly and with noise; and their images."""
    rng = np.random.default_rng(seed)
    known = rng.uniform(0.2, 1.0, (n, FIELDS))
    known[:, 4] = rng.uniform(5, 400, n)
    truth = known[:, 1] ** 2 * (1 - (known[:, 3] - 0.6) ** 2) * 0.9
    return known, np.clip(truth + rng.normal(0, 0.05, n), 0, 1), np.arange(n) // 3


def test_evidence_of_a_mask():
    box = Box(10, 10, 30, 50)
    assert tightness(Window(10, 10, 30, 50), box) == 1.0
    assert tightness(Window(10, 10, 20, 50), box) == 0.5
    assert tightness(None, box) == 0.0
    assert tightness(Window(9, 9, 31, 51), box) == 1.0  # the box rounded outwards
    known = {"mean_probability": 0.7, "stability": 0.8, "overlap": 0.3}
    found = evidence(box, 200, 0.5, **known, agreement=0.9)
    assert found == Evidence(0.7, 0.8, 0.5, 0.25, 800**0.5, 1.0, 0.3, 0.9)
    assert np.isnan(evidence(box, 200, 0.5, **known, agreement=None).agreement)


@pytest.mark.parametrize(
    "box", [Box(0, 0, 1e-200, 1e-200), Box(0, 0, 5.0, 1e-320), Box(0, 0, 1e-320, 5.0), Box(0, 0, 5e-324, 5e-324)]
)
def test_evidence_of_boxes_without_an_area_to_speak_of(box):
    tight = tightness(Window(0, 0, 1, 1), box)
    found = evidence(box, 1, tight, mean_probability=0.5, stability=0.5, overlap=0.0, agreement=0.5)
    assert (found.tightness, found.fill) == (1.0, 1.0)
    assert np.isfinite(found).all()
    assert evidence(box, 0, 0.0, mean_probability=0.0, stability=0.0, overlap=0.0, agreement=None).fill == 0.0


def test_calibration_beats_its_parts_on_boxes_it_has_not_seen():
    known, ious, images = simulated(600)
    found = judge(cross_validated(known, ious, images), ious)
    assert found["spearman"] > 0.9
    assert found["spearman"] > judge(known[:, 0], ious)["spearman"]
    assert found["expected_calibration_error"] < 0.04
    kept = found["mean_iou_kept"]
    assert found["mean_iou"] < kept["10"] < kept["20"] < kept["50"]


def test_a_class_counts_as_far_as_it_was_seen():
    """Two classes of other quality at the same evidence; one that the calibration never saw has no say."""
    known, ious, images = simulated(600)
    names = ["Dining table" if k % 2 else "cat" for k in range(600)]
    ious = np.clip(ious - 0.3 * (np.arange(600) % 2), 0, 1)
    told = judge(cross_validated(known, ious, images, names), ious)
    assert told["spearman"] > judge(cross_validated(known, ious, images), ious)["spearman"] + 0.1
    calibration = fit(known, ious, names)
    one = known[:1]
    table, cat, other = (float(calibration(one, [name])[0]) for name in ("dining_table", "cat", "zebra"))
    assert table < other < cat
    assert other == float(calibration(one)[0])
    assert load_calibration(json.dumps({"calibration": calibration.to_json()}).encode(), "x") == calibration


def test_a_class_of_few_boxes_says_little():
    known = np.full((601, FIELDS), 0.5)
    names = ["rare", *["often"] * 300, *["low"] * 300]
    found = fit(known, np.array([1.0] * 301 + [0.0] * 300), names).classes
    assert 0 < found["rare"] < found["often"] / 3
    assert found["low"] < 0


def test_evidence_that_is_not_known_counts_as_the_mean():
    known, ious, _ = simulated(200)
    blind = known.copy()
    blind[:, -1] = np.nan
    found = fit(blind, ious)
    assert np.isfinite(found(blind)).all()
    np.testing.assert_array_equal(found(known), found(blind))  # it never saw this evidence
    full = fit(known, ious)
    mean = known.copy()
    mean[:, -1] = known[:, -1].mean()
    np.testing.assert_allclose(full(blind), full(mean), atol=1e-9)


def test_what_is_held_out_is_not_seen():
    """With noise for IoUs, seen boxes are told to some degree, held-out ones are not."""
    rng = np.random.default_rng(1)
    known, _, images = simulated(90)
    ious = rng.uniform(0, 1, 90)
    assert spearman(fit(known, ious)(known), ious) > 0.3
    assert abs(spearman(cross_validated(known, ious, images), ious)) < 0.25


def test_calibration_comes_back_from_json():
    known, ious, _ = simulated(80)
    calibration = fit(known, ious)
    text = json.dumps({"boxes": 80, "calibration": calibration.to_json()}).encode()
    again = load_calibration(text, "quality.json")
    assert again == calibration
    np.testing.assert_array_equal(again(known), calibration(known))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{}",
        b'{"calibration": {}}',
        b'{"calibration": {"version": 99}}',
        b'{"calibration": {"version": 1}}',
        b'{"calibration": {"version": 2}}',
        b'{"calibration": {"version": 2, "classes": []}}',
    ],
)
def test_what_is_no_calibration_is_refused(text):
    with pytest.raises(InputError, match=r"quality\.json"):
        load_calibration(text, "quality.json")


def test_a_calibration_that_lacks_numbers_is_refused():
    known, ious, _ = simulated(80)
    values = fit(known, ious).to_json()
    with pytest.raises(InputError, match="incomplete"):
        Calibration.from_json({**values, "weights": values["weights"][:-1]}, "x")


@given(arrays(np.float64, st.tuples(st.integers(1, 30), st.just(FIELDS)), elements=numbers), st.data())
def test_quality_lies_between_0_and_1(known, data):
    assert ((default_quality(known) >= 0) & (default_quality(known) <= 1)).all()
    ious = data.draw(arrays(np.float64, len(known), elements=numbers))
    found = fit(known, ious)(known * 3 - 1)
    assert ((found >= 0) & (found <= 1)).all()


@given(st.lists(st.tuples(st.integers(0, 9), numbers), min_size=1, max_size=30))
def test_isotonic_regression_rises_and_keeps_the_mean(points):
    x, y = np.array([p[0] for p in points], float), np.array([p[1] for p in points], float)
    knots, values = isotonic(x, y)
    assert (np.diff(knots) > 0).all()
    assert (np.diff(values) >= 0).all()
    assert y.min() - 1e-9 <= values.min() <= values.max() <= y.max() + 1e-9


def test_isotonic_regression_of_known_values():
    knots, values = isotonic(np.array([1.0, 2, 3, 4]), np.array([0.1, 0.5, 0.3, 0.9]))
    np.testing.assert_allclose(knots, [1, 2.5, 4])
    np.testing.assert_allclose(values, [0.1, 0.4, 0.9])


def test_spearman_of_known_values():
    assert spearman(np.array([1.0, 2, 3]), np.array([10.0, 20, 90])) == pytest.approx(1)
    assert spearman(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4
    assert spearman(np.array([1.0, 2, 2, 3]), np.array([1.0, 3, 2, 4])) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert spearman(np.ones(4), np.arange(4.0)) == 0.0


def test_report_of_known_values():
    quality, ious = np.arange(10) / 10, np.arange(10) / 10 + 0.05
    found = judge(quality, ious)
    assert found["spearman"] == pytest.approx(1)
    assert found["expected_calibration_error"] == pytest.approx(0.05)
    assert found["mean_iou"] == pytest.approx(0.5)
    assert found["mean_iou_kept"] == {"10": pytest.approx(0.55), "20": pytest.approx(0.6), "50": pytest.approx(0.75)}
