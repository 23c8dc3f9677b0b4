"""Mean IoU: the values meant, in any order and any split."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mal.metrics import MaskScores, Scores, format_table

rows = st.lists(
    st.tuples(st.integers(1, 4), st.floats(0, 1), st.sampled_from([0.5, 1023.9, 1024.0, 5000.0, 9216.0, 1e6]))
)


def score(records: list[tuple[int, float, float]]) -> MaskScores:
    scores = MaskScores()
    for record in records:
        scores.add(*record)
    return scores


@given(rows, st.randoms(use_true_random=False), st.integers(1, 4))
def test_order_and_split_do_not_matter(records: list, random: Random, parts: int) -> None:
    whole = score(records).result()
    shuffled = list(records)
    random.shuffle(shuffled)
    joined = MaskScores()
    for part in range(parts):
        joined.merge(pickle.loads(pickle.dumps(score(shuffled[part::parts]))))
    assert joined.result() == whole


@given(rows)
def test_means_are_per_class_and_then_over_the_classes_present(records: list) -> None:
    result = score(records).result()
    bands = {"mIoU": (0, np.inf), "mIoU_small": (0, 1024), "mIoU_medium": (1024, 9216), "mIoU_large": (9216, np.inf)}
    for key, (low, high) in bands.items():
        chosen = [(label, iou) for label, iou, area in records if low < area <= high]
        means = [np.mean([iou for label, iou in chosen if label == c]) for c in {label for label, _ in chosen}]
        assert result[key] == (pytest.approx(np.mean(means), abs=1e-12) if means else None)
    ious = [iou for _, iou, _ in records]
    assert result["box_mean_iou"] == (pytest.approx(np.mean(ious), abs=1e-12) if ious else None)
    counts = result["counts"]
    assert counts["boxes"] == len(records) == counts["small"] + counts["medium"] + counts["large"]


@given(rows)
def test_many_at_once_are_the_same_as_one_by_one(records: list) -> None:
    scores = MaskScores()
    scores.add_all([r[0] for r in records], [r[1] for r in records], [r[2] for r in records])
    assert scores.result() == score(records).result()


def test_a_class_whose_ious_are_all_zero_counts_as_present() -> None:
    scores = score([(1, 1.0, 50.0)])
    scores.merge(score([(2, 0.0, 50.0)]))
    assert scores.result()["mIoU"] == 0.5


@pytest.mark.shared
def test_agrees_with_the_reference(shared_dir: Path) -> None:
    """The file's bands include their upper border, ours the lower (`mal.boxes`): areas on one are moved a little."""
    reference = json.loads((shared_dir / "reference" / "miou.json").read_text())
    expected = reference["expected"]
    scores = MaskScores()
    for record in reference["records"]:
        scores.add(record["label"], record["iou"], record["area"])
    result = scores.result()
    near = {"rel": 2e-6}  # the reference adds 1e-6 to every count, and sums in float32
    assert result["mIoU"] == pytest.approx(expected["mIoU"], **near)
    for band in ("small", "medium", "large"):
        assert result[f"mIoU_{band}"] == pytest.approx(expected[band], **near)
        assert result["counts"][band] == expected[f"{band}_cnt"]
    assert {str(c) for c in result["per_class"]} == set(expected["per_class"])
    for category_id, value in expected["per_class"].items():
        assert result["per_class"][int(category_id)]["iou"] == pytest.approx(value, **near)


def test_table_is_aligned_and_names_the_classes() -> None:
    result: Scores = score([(1, 0.5, 50.0), (18, 0.25, 5000.0)]).result()
    boundary = score([(1, 0.125, 50.0), (18, 0.0, 5000.0)]).result()
    table = format_table({"IoU %": result, "boundary %": boundary}, {18: "a very long class name"})
    lines = table.splitlines()
    assert {len(line) for line in lines} == {len(lines[0])}
    assert any(
        line.startswith("a very long class name") and line.split()[-3:] == ["25.00", "0.00", "1"] for line in lines
    )
    assert any(
        line.startswith("1 ") and line.split() == ["1", "50.00", "12.50", "1"] for line in lines
    )  # no name: its id
    assert any(line.startswith("mIoU large") and line.split()[-3:] == ["-", "-", "0"] for line in lines)


def test_table_of_nothing() -> None:
    assert "mIoU" in format_table({"IoU %": MaskScores().result()}, {})
