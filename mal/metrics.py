"""Mean IoU over classes, counted in a stream: the same numbers for any order and any split of the boxes.

METHOD section 5: the IoU of full-image masks, averaged per class, then over the classes present; and the same for
the boxes of each area band.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

from mal.boxes import BANDS, band_index

_UNIT = 1 << 60
"""IoUs are summed as whole numbers of 2**-60: exact for float64 from 2**-8 on, whatever the order."""


class ClassScore(TypedDict):
    """Mean IoU of one class."""

    iou: float
    count: int


class Scores(TypedDict):
    """What `MaskScores.result` returns. Means over nothing are None."""

    mIoU: float | None
    mIoU_small: float | None
    mIoU_medium: float | None
    mIoU_large: float | None
    box_mean_iou: float | None
    per_class: dict[int, ClassScore]
    counts: dict[str, int]


class MaskScores:
    """Sums of IoU per class and band. Picklable; the parts of several actors are joined by `merge`."""

    def __init__(self) -> None:
        self._sums: Counter[tuple[int, int]] = Counter()
        self._counts: Counter[tuple[int, int]] = Counter()

    def add(self, category_id: int, iou: float, area: float) -> None:
        """Count one box: its class, its mask's IoU (0..1) and the box's area in px^2."""
        self.add_all([category_id], [iou], [area])

    def add_all(self, category_ids: Iterable[int], ious: Iterable[float], areas: Sequence[float]) -> None:
        """Count many boxes at once; the three have the same length."""
        for category_id, iou, band in zip(category_ids, ious, band_index(areas).tolist(), strict=True):
            assert 0.0 <= iou <= 1.0, f"an IoU of {iou}"
            key = (int(category_id), band)
            self._sums[key] += round(float(iou) * _UNIT)
            self._counts[key] += 1

    def merge(self, other: MaskScores) -> None:
        """Add the boxes that ``other`` has counted."""
        self._sums.update(other._sums)  # a Counter's update adds; its `+=` would drop the sums that are 0
        self._counts.update(other._counts)

    def result(self) -> Scores:
        """The means so far. ``counts`` holds ``boxes`` and the boxes of each band."""
        everything = range(len(BANDS))
        per_class = self._per_class(everything)
        total = sum(self._counts.values())
        return {
            "mIoU": _mean(per_class),
            "mIoU_small": _mean(self._per_class([0])),
            "mIoU_medium": _mean(self._per_class([1])),
            "mIoU_large": _mean(self._per_class([2])),
            "box_mean_iou": sum(self._sums.values()) / (total * _UNIT) if total else None,
            "per_class": per_class,
            "counts": {"boxes": total}
            | {name: sum(n for (_, band), n in self._counts.items() if band == i) for i, name in enumerate(BANDS)},
        }

    def _per_class(self, bands: Iterable[int]) -> dict[int, ClassScore]:
        """Mean IoU per class over the boxes of ``bands``, classes in ascending order, absent ones left out."""
        scores: dict[int, ClassScore] = {}
        chosen = set(bands)
        for category_id in sorted({category_id for category_id, band in self._counts if band in chosen}):
            count = sum(self._counts[category_id, band] for band in chosen)
            total = sum(self._sums[category_id, band] for band in chosen)
            scores[category_id] = {"iou": total / (count * _UNIT), "count": count}
        return scores


def format_table(columns: Mapping[str, Scores], category_names: Mapping[int, str]) -> str:
    """Scores of the same boxes as aligned plain text: the means, then one line per class. Figures in per cent.

    Args:
        columns: heading -> scores, such as those of masks and of their boundaries.
    """
    results = list(columns.values())
    counts, per_class = results[0]["counts"], results[0]["per_class"]
    names = {category_id: category_names.get(category_id, str(category_id)) for category_id in per_class}
    means: list[tuple[str, list[float | None], int]] = [("mIoU", [r["mIoU"] for r in results], counts["boxes"])]
    means += [
        ("mIoU small", [r["mIoU_small"] for r in results], counts["small"]),
        ("mIoU medium", [r["mIoU_medium"] for r in results], counts["medium"]),
        ("mIoU large", [r["mIoU_large"] for r in results], counts["large"]),
        ("mean of boxes", [r["box_mean_iou"] for r in results], counts["boxes"]),
    ]
    classes: list[tuple[str, list[float | None], int]] = [
        (names[category], [r["per_class"][category]["iou"] for r in results], score["count"])
        for category, score in per_class.items()
    ]
    width = max(map(len, ["mean of boxes", *names.values()]))
    heads = "".join(f"  {head:>10}" for head in columns)
    rule = "-" * (width + len(heads) + 10)
    lines = [f"{'':{width}}{heads}  {'boxes':>8}", rule, *(_line(*row, width) for row in means)]
    lines += [rule, *(_line(*row, width) for row in classes)] if classes else []
    return "\n".join(lines)


def _line(name: str, ious: Sequence[float | None], count: int, width: int) -> str:
    figures = "".join(f"  {'-' if iou is None else f'{100 * iou:.2f}':>10}" for iou in ious)
    return f"{name:{width}}{figures}  {count:>8}"


def _mean(per_class: Mapping[int, ClassScore]) -> float | None:
    if not per_class:
        return None
    return sum(score["iou"] for score in per_class.values()) / len(per_class)
