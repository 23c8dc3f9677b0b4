"""Quality: an estimate of a mask's IoU from what labelling knows anyway, and its calibration on boxes with masks.

    evidence of a box --ridge regression--> + its class's share = raw estimate --isotonic regression--> quality

Without a calibration the quality is a fixed formula, good for ranking alone (`default_quality`).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from mal.boxes import Box, Window, area
from mal.errors import InputError

Array = NDArray[np.float64]

FOLDS = 5
RIDGE = 0.1
"""Weight of the ridge, in units of the number of boxes."""
CLASS_PRIOR = 3.0
"""So many boxes of no deviation are added to those of a class before its mean deviation is taken."""
FARTHEST = 3.0
"""Evidence farther from the mean than so many deviations counts as if it were there."""
FEWEST_BOXES = 50
"""A calibration on fewer boxes says nothing."""
_VERSION = 2


class Evidence(NamedTuple):
    """What is known of a mask without its truth."""

    mean_probability: float
    """Of the mask's pixels, before cleaning."""
    stability: float
    """IoU of the masks at a stricter and at a laxer threshold, before cleaning."""
    tightness: float
    """Area of the mask's own box over that of the given box, 0..1: the mask of a tight box touches all four sides."""
    fill: float
    """Area of the mask over that of the box, 0..1."""
    size: float
    """Square root of the box's area, in pixels."""
    elongation: float
    """Binary logarithm of the box's longer side over its shorter one."""
    overlap: float
    """Largest part of the box that one other box of the image covers, 0..1 (`mal.boxes.overlaps`)."""
    agreement: float
    """Of student, teacher and mirrored views, 0..1 (`mal.predictor.agreement`); NaN if there was one opinion alone."""


def tightness(mask: Window | None, box: Box) -> float:
    """How tightly a mask with these bounds fills its box, 0..1."""
    return 0.0 if mask is None else _share(mask.width * mask.height, box)


def _share(pixels: int, box: Box) -> float:
    """``pixels`` over the area of the box, at most 1: that area may be 0 in double precision."""
    return pixels / area(box) if pixels < area(box) else float(pixels > 0)


def evidence(
    box: Box,
    mask_area: int,
    tightness: float,
    *,
    mean_probability: float,
    stability: float,
    overlap: float,
    agreement: float | None,
) -> Evidence:
    """The evidence of one mask; ``box`` is clipped to its image."""
    return Evidence(
        mean_probability=mean_probability,
        stability=stability,
        tightness=tightness,
        fill=_share(mask_area, box),
        size=area(box) ** 0.5,
        elongation=abs(math.log2(box.x1 - box.x0) - math.log2(box.y1 - box.y0)),
        overlap=overlap,
        agreement=math.nan if agreement is None else agreement,
    )


def default_quality(evidence: Array) -> Array:
    """A ranking without calibration, 0..1.

    Args:
        evidence: [N, len(Evidence._fields)], rows of `Evidence`.
    """
    return np.clip(evidence[:, 1] * np.sqrt(evidence[:, 2]), 0.0, 1.0)


@dataclass(frozen=True)
class Calibration:
    """How evidence becomes quality. Plain numbers: goes through JSON and to other processes."""

    centre: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    """Of the intercept, then of every feature (`_design`)."""
    raw: tuple[float, ...]
    """Knots of the isotonic regression: raw estimates, ascending ..."""
    quality: tuple[float, ...]
    """... and the quality at each; linear in between, constant outside."""
    classes: Mapping[str, float]
    """Class name (`class_key`) -> what it adds to the raw estimate; classes that are not here add nothing."""

    def __call__(self, evidence: Array, categories: Sequence[str] | None = None) -> Array:
        """Quality [N], 0..1, of evidence [N, len(Evidence._fields)] and the names of the boxes' classes."""
        raw = _design(evidence, np.array(self.centre), np.array(self.scale)) @ np.array(self.weights)
        if categories is not None:
            raw = raw + np.array([self.classes.get(class_key(name), 0.0) for name in categories])
        return np.interp(raw, self.raw, self.quality)

    def to_json(self) -> dict[str, Any]:
        """The inverse of `from_json`."""
        return {"version": _VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, values: Any, source: str) -> Calibration:
        """From what ``quality.json`` holds under ``calibration``. Raises InputError, naming ``source``."""
        try:
            version = values["version"]
            if version != _VERSION:
                raise InputError(
                    f"{source}: calibrations of version {version} are not known here; `mal evaluate` writes a new one"
                )
            lists = {name: tuple(map(float, values[name])) for name in cls.__dataclass_fields__ if name != "classes"}
            found = cls(**lists, classes={str(name): float(value) for name, value in values["classes"].items()})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{source}: this is no calibration of quality; `mal evaluate` writes them") from error
        fields = len(Evidence._fields)
        features = _design(np.ones((1, fields)), np.zeros(fields), np.ones(fields)).shape[1]
        complete = len(found.weights) == features and len(found.centre) == len(found.scale) == fields
        if not complete or len(found.raw) != len(found.quality) or not found.raw:
            raise InputError(f"{source}: the calibration is incomplete; `mal evaluate` writes a new one")
        return found


def class_key(name: str) -> str:
    """A class's name as calibrations know it: another file may spell it a little differently."""
    return " ".join(name.lower().replace("_", " ").split())


def load_calibration(text: bytes, source: str) -> Calibration:
    """The calibration in the content of a ``quality.json``. Raises InputError."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise InputError(f"{source}: this is not JSON") from error
    return Calibration.from_json(values.get("calibration") if isinstance(values, dict) else None, source)


def fit(evidence: Array, ious: Array, categories: Sequence[str] | None = None) -> Calibration:
    """The calibration that fits boxes of known IoU.

    The regression is on the ranks of the IoUs, as it is to rank; the isotonic one brings the estimate back to IoUs.

    Args:
        evidence: [N, len(Evidence._fields)].
        ious: [N], 0..1.
        categories: [N], names of the boxes' classes; None: not known.
    """
    features = _features(evidence)
    known = np.isfinite(features)
    counts = np.maximum(known.sum(0), 1)
    centre = np.where(known, features, 0.0).sum(0) / counts
    scale = np.maximum(np.sqrt(np.where(known, (features - centre) ** 2, 0.0).sum(0) / counts), 1e-6)
    design = _design(evidence, centre, scale)
    penalty = RIDGE * len(ious) * np.eye(design.shape[1])
    penalty[0, 0] = 0.0  # not the intercept
    ranks = _ranks(ious) / len(ious)
    weights = np.linalg.solve(design.T @ design + penalty, design.T @ ranks)
    estimate = design @ weights
    classes = {} if categories is None else _classes(ranks - estimate, categories)
    if categories is not None:
        estimate = estimate + np.array([classes[class_key(name)] for name in categories])
    raw, quality = isotonic(estimate, ious)
    lists = {"centre": centre, "scale": scale, "weights": weights, "raw": raw, "quality": quality}
    return Calibration(**{name: tuple(values.tolist()) for name, values in lists.items()}, classes=classes)


def _classes(deviations: Array, categories: Sequence[str]) -> dict[str, float]:
    """Mean deviation of every class from the estimate, drawn towards none where there are few boxes."""
    names, inverse = np.unique([class_key(name) for name in categories], return_inverse=True)
    means = np.bincount(inverse, deviations) / (np.bincount(inverse) + CLASS_PRIOR)
    return dict(zip(names.tolist(), means.tolist(), strict=True))


def isotonic(x: Array, y: Array) -> tuple[Array, Array]:
    """Knots of the non-decreasing function of ``x`` nearest to ``y`` (pool adjacent violators, Ayer et al. 1955).

    Returns:
        The mean x of every pool, strictly ascending, and its mean y.
    """
    pools: list[list[float]] = []  # sum of y, sum of x, count
    for i in np.argsort(x, kind="stable"):
        pools.append([float(y[i]), float(x[i]), 1.0])
        while len(pools) > 1 and pools[-2][0] / pools[-2][2] >= pools[-1][0] / pools[-1][2]:
            last = pools.pop()
            pools[-1] = [a + b for a, b in zip(pools[-1], last, strict=True)]
    sums = np.array(pools)
    knots, values = sums[:, 1] / sums[:, 2], sums[:, 0] / sums[:, 2]
    knots, first = np.unique(knots, return_index=True)
    return knots, np.clip(values[first], 0.0, 1.0)


def cross_validated(
    evidence: Array,
    ious: Array,
    groups: Sequence[int] | NDArray[np.int64],
    categories: Sequence[str] | None = None,
) -> Array:
    """Quality [N] of every box by a calibration that has seen no box of its group (its image)."""
    names = np.unique(np.asarray(groups))
    fold_of = dict(zip(names.tolist(), np.random.default_rng(0).permutation(len(names)) % FOLDS, strict=True))
    folds = np.array([fold_of[group] for group in np.asarray(groups).tolist()])
    classes = None if categories is None else np.array(categories, dtype=object)
    quality = np.empty(len(ious))
    for fold in np.unique(folds):
        held_out = folds == fold
        seen = ~held_out if not held_out.all() else held_out
        calibration = fit(evidence[seen], ious[seen], None if classes is None else classes[seen].tolist())
        quality[held_out] = calibration(evidence[held_out], None if classes is None else classes[held_out].tolist())
    return quality


class QualityReport(TypedDict):
    """How good an estimate is."""

    spearman: float
    """Rank correlation with the true IoU."""
    expected_calibration_error: float
    """Mean distance of estimate and IoU over ten equally full bins."""
    mean_iou: float
    mean_iou_kept: dict[str, float]
    """Mean IoU when the worst 10, 20, 50 % by the estimate are dropped."""


def judge(quality: Array, ious: Array) -> QualityReport:
    """Compare estimates [N] with true IoUs [N]."""
    order = np.argsort(quality, kind="stable")
    kept = {str(share): float(ious[order[round(len(order) * share / 100) :]].mean()) for share in (10, 20, 50)}
    bins = [part for part in np.array_split(order, 10) if len(part)]
    error = sum(len(part) * abs(float((quality[part] - ious[part]).mean())) for part in bins) / len(order)
    return {
        "spearman": spearman(quality, ious),
        "expected_calibration_error": error,
        "mean_iou": float(ious.mean()),
        "mean_iou_kept": kept,
    }


def spearman(a: Array, b: Array) -> float:
    """Spearman's rank correlation, ties at their mean rank; 0 if one of the two is constant."""
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (a, b)]
    deviations = [rank - rank.mean() for rank in ranks]
    norm = float(np.sqrt((deviations[0] ** 2).sum() * (deviations[1] ** 2).sum()))
    return float((deviations[0] * deviations[1]).sum()) / norm if norm else 0.0


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]


def _features(evidence: Array) -> Array:
    """Evidence [N, fields] on scales that are about linear."""
    features = evidence.astype(np.float64)
    size = Evidence._fields.index("size")
    features[:, size] = np.log2(np.maximum(features[:, size], 1.0))
    return features


def _design(evidence: Array, centre: Array, scale: Array) -> Array:
    """What the regression is linear in: one, the normalised features, their squares and their products.

    A feature that is not known counts as the mean.
    """
    x = np.nan_to_num(np.clip((_features(evidence) - centre) / scale, -FARTHEST, FARTHEST))
    pairs = [x[:, i] * x[:, j] for i, j in itertools.combinations_with_replacement(range(x.shape[1]), 2)]
    return np.stack([np.ones(len(x)), *x.T, *pairs], axis=1)
