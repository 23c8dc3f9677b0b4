"""The samples of training: a box's crop in two views and its box mask, made from the index and the image folder.

`TrainingBoxes` holds what is needed of every box in a few flat arrays (some 24 bytes a box); pixels are read when asked
for. A sample is a function of (seed, epoch, index) and the files alone.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mal import boxes, crops
from mal.data import augment, images
from mal.data.index_folder import open_index
from mal.errors import InputError, StorageError
from mal.resizing import resize

_LOG = logging.getLogger(__name__)

_THINNEST = 2.0
"""Sides of this many pixels or fewer are not trained on (METHOD section 2)."""
_CHECKED = range(100, 1000)
"""Samples of a process after which it gives up if most of its images could not be read."""


class Sample(TypedDict):
    """One box, small enough to travel between processes; the loader stacks them, `augment.views` makes the views."""

    crop: Tensor  # [3, S, S] uint8, clean
    change: Tensor  # [augment.CHANGE] float32: what the student's view has changed
    box_mask: Tensor  # [S, S] uint8, 1 inside the box
    area: Tensor  # [] float64, of the clipped box in px^2
    id: Tensor  # [] int64, of the annotation


@dataclass(frozen=True)
class TrainingBoxes:
    """The boxes that are trained on, and how many are not. Flat arrays: processes that load data share them."""

    file_names: pa.LargeStringArray  # per image, relative to the image folder
    sizes: NDArray[np.int32]  # [images, 2]: width, height
    corners: NDArray[np.float32]  # [boxes, 4]: x0, y0, x1, y1, clipped to the image
    image: NDArray[np.int32]  # [boxes]: place of the box's image in file_names
    ids: NDArray[np.int64]  # [boxes]: annotation ids
    left_out: dict[str, int]
    """Boxes not trained on, by why: a band's name if the area is not within the limits, or ``thin``."""

    def __len__(self) -> int:
        return len(self.ids)

    def __str__(self) -> str:
        """A line for the log."""
        left = ", ".join(f"{count:,} {name}" for name, count in self.left_out.items() if count) or "none"
        return f"{len(self):,} boxes of {len(np.unique(self.image)):,} images to train on; left out by size: {left}"


def load_training_boxes(index_folder: str, min_obj_size: float, max_obj_size: float) -> TrainingBoxes:
    """Collect the boxes of an index on disk (`mal.data.index`). Raises as `collect_boxes` does, and StorageError."""
    index = open_index(index_folder)
    return collect_boxes((index.read_shard(k) for k in range(index.shards)), min_obj_size, max_obj_size)


def collect_boxes(tables: Iterable[pa.Table], min_obj_size: float, max_obj_size: float) -> TrainingBoxes:
    """Keep the boxes with an area strictly between the limits (px^2) and both sides above 2 px, after clipping.

    Args:
        tables: rows.INDEX; read one at a time.

    Raises:
        InputError: no box is left to train on.
    """
    left_out = dict.fromkeys((*boxes.BANDS, "thin"), 0)
    names: list[pa.Array] = [pa.array([], pa.large_string())]
    sizes: list[NDArray[np.int32]] = [np.empty((0, 2), np.int32)]
    corners: list[NDArray[np.float32]] = [np.empty((0, 4), np.float32)]
    owners: list[NDArray[np.int32]] = [np.empty(0, np.int32)]
    ids: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    images_so_far = 0
    for table in tables:
        size, corner, owner, box_ids = _flat(table)
        sides = corner[:, 2:] - corner[:, :2]
        areas = sides[:, 0] * sides[:, 1]
        thin = (sides <= _THINNEST).any(axis=1)
        beyond = ~thin & ~((areas > min_obj_size) & (areas < max_obj_size))
        left_out["thin"] += int(thin.sum())
        for name, count in zip(boxes.BANDS, np.bincount(boxes.band_index(areas[beyond]), minlength=3), strict=True):
            left_out[name] += int(count)
        kept = ~(thin | beyond)
        names += table["file_name"].cast(pa.large_string()).chunks
        sizes.append(size)
        corners.append(corner[kept].astype(np.float32))
        owners.append((owner[kept] + images_so_far).astype(np.int32))
        ids.append(box_ids[kept])
        images_so_far += table.num_rows
    found = TrainingBoxes(
        pa.concat_arrays(names),
        np.concatenate(sizes),
        np.concatenate(corners),
        np.concatenate(owners),
        np.concatenate(ids),
        left_out,
    )
    if not len(found):
        raise InputError(
            f"There are {found}. dataset.min_obj_size is {min_obj_size:g} px^2 and dataset.max_obj_size "
            f"{max_obj_size:g}: lower the first or check dataset.train_ann_path."
        )
    return found


def _flat(
    table: pa.Table,
) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Of index rows: image sizes ``[rows, 2]``; per box its clipped corners ``[n, 4]``, its row and its id."""
    size = np.column_stack([table["width"].to_numpy(), table["height"].to_numpy()]).astype(np.int32)
    lists = table["boxes"].combine_chunks()
    owner = np.repeat(np.arange(table.num_rows), lists.value_lengths().to_numpy())
    box = lists.flatten()
    xywh = box.field("bbox").flatten().to_numpy().reshape(-1, 4)
    # The same arithmetic as `boxes.from_xywh` and `boxes.clip`, for all boxes at once.
    limits = size[owner].astype(np.float64)
    low = np.maximum(xywh[:, :2], 0.0)
    high = np.minimum(xywh[:, :2] + xywh[:, 2:], limits)
    return size, np.concatenate([low, np.maximum(high, low)], axis=1), owner, box.field("id").to_numpy()


class TrainingSet(Dataset[Sample]):
    """Samples by key ``(epoch, index)``, as `mal.data.sampler.OffsetSampler` yields them.

    An image that cannot be read does not end training: the next box in order whose image can be read takes the place of
    its boxes, the log says so once per image and process.
    """

    def __init__(
        self,
        training_boxes: TrainingBoxes,
        *,
        image_folder: str,
        crop_size: int,
        margin_rate: Sequence[float],
        seed: int,
        max_image_pixels: int,
        augmentation: float = 1.0,
        margin_gate: bool = True,
    ) -> None:
        """``seed``: from 0 on. ``margin_rate``, ``margin_gate``: of `boxes.train_window`. ``max_image_pixels``: of
        `images.decode`. ``augmentation``: strength of `augment.student_view`.
        """
        self._boxes = training_boxes
        self._image_folder = image_folder
        self._crop_size = crop_size
        self._margin_rate = tuple(margin_rate)
        self._seed = seed
        self._max_image_pixels = max_image_pixels
        self._augmentation = augmentation
        self._margin_gate = margin_gate
        self._asked = 0
        self._replaced = 0
        self._unreadable: set[int] = set()

    def __len__(self) -> int:
        return len(self._boxes)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Raises InputError if most images cannot be read."""
        epoch, asked = key
        index, image = self._readable(asked)
        rng = augment.sample_generator(self._seed, epoch, asked)
        height, width = image.shape[:2]
        box = boxes.Box(*(float(v) for v in self._boxes.corners[index]))
        window = boxes.train_window(box, self._margin_rate, rng, self._margin_gate)
        pixels = resize(crops.cut(image, window), self._crop_size)
        box_mask = crops.box_mask(window, box, width, height, self._crop_size)
        pixels, box_mask = augment.flip(pixels, box_mask, rng)
        return {
            "crop": torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))),
            "change": torch.from_numpy(augment.draw_change(rng, self._augmentation)),
            "box_mask": torch.from_numpy(np.ascontiguousarray(box_mask)),
            "area": torch.tensor(boxes.area(box), dtype=torch.float64),
            "id": torch.tensor(int(self._boxes.ids[index])),
        }

    def _readable(self, asked: int) -> tuple[int, NDArray[np.uint8]]:
        """The first box from ``asked`` on, wrapping round, whose image can be read, and that image."""
        self._asked += 1
        failures = 0
        for index in itertools.chain(range(asked, len(self)), range(asked)):
            place = int(self._boxes.image[index])
            if place in self._unreadable:
                continue
            try:
                image = self._decoded(place)
            except (images.ImageError, StorageError) as error:
                self._unreadable.add(place)
                failures += 1
                _LOG.warning("image %s is left out of training: %s", self._boxes.file_names[place], error)
                if failures >= _CHECKED.start:
                    break
                continue
            if index != asked:
                self._replaced += 1
                if self._asked in _CHECKED and 2 * self._replaced > self._asked:
                    break
            return index, image
        raise InputError(
            f"Most training images cannot be read: {len(self._unreadable):,} images of {self._asked:,} samples so far. "
            f"Check dataset.train_img_dir ({self._image_folder}) against the file names of dataset.train_ann_path; "
            "the log names the images."
        )

    def _decoded(self, place: int) -> NDArray[np.uint8]:
        """The image as RGB ``[H, W, 3]``. Raises images.ImageError and StorageError."""
        path = images.safe_join(self._image_folder, self._boxes.file_names[place].as_py())
        width, height = (int(n) for n in self._boxes.sizes[place])
        expected, folder = (width, height), self._image_folder
        return images.decode(path, expected=expected, max_pixels=self._max_image_pixels, folder=folder)
