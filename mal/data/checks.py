"""Which boxes can be labelled: every annotation of a chunk against its image, in arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mal.data.coco import NO_ID, Annotations, reason
from mal.data.image_table import ImageTable


@dataclass
class Checked:
    """What became of a chunk's annotations, as rows of the chunk."""

    good: NDArray[np.int64]
    """Rows whose boxes can be labelled."""
    rank: NDArray[np.int64]
    """Rank of the image of each good row."""
    clipped: NDArray[np.bool_]
    """For each good row: the box leaves its image."""
    rejected: dict[int, str]
    """Row -> reason."""


def check(chunk: Annotations, images: ImageTable) -> Checked:
    """Apply the checks in the order of `mal.rows.REASONS`; the first that fails gives the reason.

    Crowd annotations are not checked: they are neither good nor rejected.
    """
    rejected = dict(chunk.faults)
    open_: NDArray[np.bool_] = ~chunk.crowd
    open_[list(rejected)] = False
    rank = images.rank(chunk.image_id)

    def reject(wrong: Any, why: str) -> None:
        for row in np.flatnonzero(open_ & wrong).tolist():
            rejected[row] = reason(why, _detail(why, chunk, row, images, int(rank[row])))
        open_[wrong] = False

    reject(rank < 0, "unknown_image")
    for row in np.flatnonzero(open_ & np.isin(rank, images.problem_ranks)).tolist():
        rejected[row] = images.problems[int(rank[row])]
        open_[row] = False
    sizes = np.stack([images.width[rank], images.height[rank]], axis=1) if len(images) else np.zeros((len(chunk), 2))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        corners = np.concatenate([chunk.bbox[:, :2], chunk.bbox[:, :2] + chunk.bbox[:, 2:]], axis=1)
        inside = np.minimum(corners[:, 2:], sizes) - np.maximum(corners[:, :2], 0)
        # Sides so small that their product is 0 in double precision.
        no_area = (inside > 0).all(axis=1) & (inside[:, 0] * inside[:, 1] == 0)
    reject(np.logical_not(np.isfinite(corners)).any(axis=1), "not_finite")
    reject((chunk.bbox[:, 2:] <= 0).any(axis=1) | no_area, "empty_box")
    reject((inside <= 0).any(axis=1), "outside")
    good = np.flatnonzero(open_)
    leaves: Any = np.concatenate([corners[:, :2] < 0, corners[:, 2:] > sizes], axis=1).any(axis=1)
    return Checked(good, rank[good], leaves[good], rejected)


def _detail(why: str, chunk: Annotations, row: int, images: ImageTable, rank: int) -> str:
    box = ", ".join(f"{side:.17g}" for side in chunk.bbox[row])
    if why == "unknown_image":
        return str(chunk.image_id[row])
    if why == "outside":
        return f"[{box}] in an image of {images.width[rank]} x {images.height[rank]} pixels"
    return f"[{box}]"


def clipped_areas(
    bbox: NDArray[np.float64], width: NDArray[np.int64], height: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Areas in px^2 of boxes [n, 4] (x, y, w, h) within their images, as `mal.boxes.area` of `mal.boxes.clip`."""
    size = np.stack([width, height], axis=1)
    sides = np.minimum(bbox[:, :2] + bbox[:, 2:], size) - np.maximum(bbox[:, :2], 0)
    return sides[:, 0] * sides[:, 1]


class IdBook:
    """Finds ids that occur twice; 8 bytes per annotation while it fills, 16 while it looks."""

    def __init__(self) -> None:
        self._parts: list[NDArray[np.int64]] = []
        self._last = NO_ID
        self._ascending = True

    def add(self, ids: NDArray[np.int64]) -> None:
        """The next annotations' ids, in file order; NO_ID for those that claim no id."""
        self._parts.append(ids)
        claimed = ids[ids != NO_ID]
        if len(claimed):
            self._ascending &= bool(claimed[0] > self._last and (claimed[1:] > claimed[:-1]).all())
            self._last = int(claimed[-1])

    def duplicates(self) -> NDArray[np.int64]:
        """Positions, ascending, of all annotations whose id an earlier one has claimed. Forgets the ids."""
        parts, self._parts = self._parts, []
        if self._ascending:
            return np.empty(0, np.int64)
        ids = np.concatenate(parts)
        parts.clear()
        ordered = np.sort(ids)
        twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        del ordered
        positions = np.flatnonzero(np.isin(ids, twice[twice != NO_ID]))
        first = np.unique(ids[positions], return_index=True)[1]
        return np.delete(positions, first)
