"""Rendered scenes: the same bytes from a seed, exact masks, and objects that no simple rule gets right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rlemasklib
from numpy.typing import NDArray
from PIL import Image

from mal.data import scenes, shapes
from mal.data.scenes import render_scene, write_scenes
from mal.errors import InputError


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("scenes")
    paths = write_scenes(str(folder), images=30, seed=5)
    assert paths.annotations == str(folder / "annotations.json")
    return folder, json.loads((folder / "annotations.json").read_text())


def _mask(annotation: dict[str, Any]) -> NDArray[np.bool_]:
    return rlemasklib.decode(annotation["segmentation"]).astype(bool)


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_scenes(str(tmp_path / name), images=3, seed=8, size=(160, 120))
    write_scenes(str(tmp_path / "c"), images=3, seed=9, size=(160, 120))
    files = [p.relative_to(tmp_path / "a") for p in sorted((tmp_path / "a").rglob("*.*")) if p.is_file()]
    assert len(files) == 4
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert (tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes()


def test_a_larger_set_begins_with_the_smaller(written: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, document = written
    write_scenes(str(tmp_path), images=2, seed=5)
    small = json.loads((tmp_path / "annotations.json").read_text())
    assert small["annotations"] == document["annotations"][: len(small["annotations"])]
    assert (tmp_path / "images/000002.jpg").read_bytes() == (folder / "images/000002.jpg").read_bytes()


def test_is_coco(written: tuple[Path, dict[str, Any]]) -> None:
    folder, document = written
    assert len(document["categories"]) == len(shapes.SHAPES) == 8
    assert {a["category_id"] for a in document["annotations"]} == {c["id"] for c in document["categories"]}
    assert len({a["id"] for a in document["annotations"]}) == len(document["annotations"]) > 90
    for record in document["images"]:
        with Image.open(folder / "images" / record["file_name"]) as image:
            assert image.size == (record["width"], record["height"]) == (320, 240)
    licences = {item["id"] for item in document["licenses"]}
    assert all(record["license"] in licences for record in document["images"])


def test_box_and_area_are_those_of_the_mask(written: tuple[Path, dict[str, Any]]) -> None:
    for annotation in written[1]["annotations"]:
        rows, columns = np.nonzero(_mask(annotation))
        x, y, w, h = annotation["bbox"]
        assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x, y, x + w, y + h)
        assert annotation["area"] == len(rows) > 100
        assert annotation["iscrowd"] == 0


def test_masks_of_an_image_are_disjoint_and_some_touch_the_border(written: tuple[Path, dict[str, Any]]) -> None:
    document = written[1]
    cut = 0
    for record in document["images"]:
        own = [_mask(a) for a in document["annotations"] if a["image_id"] == record["id"]]
        assert np.sum(own, axis=0).max() == 1
        cut += sum(bool(m[0].any() or m[-1].any() or m[:, 0].any() or m[:, -1].any()) for m in own)
    assert 10 < cut < len(document["annotations"]) / 2


def test_neither_the_box_nor_its_ellipse_will_do(written: tuple[Path, dict[str, Any]]) -> None:
    box, ellipse, areas = [], [], []
    for annotation in written[1]["annotations"]:
        x, y, w, h = (int(v) for v in annotation["bbox"])
        inside = _mask(annotation)[y : y + h, x : x + w]
        across, down = (np.arange(w) + 0.5) / w * 2 - 1, (np.arange(h) + 0.5) / h * 2 - 1
        oval = across[None, :] ** 2 + down[:, None] ** 2 <= 1
        box.append(inside.mean())
        ellipse.append((inside & oval).sum() / (inside | oval).sum())
        areas.append(w * h)
    assert np.mean(box) < 0.5
    assert np.mean(ellipse) < 0.55
    assert np.mean(np.array(areas) > 2048) > 0.8  # what training looks at by default


def test_objects_differ_from_their_surroundings_by_colour() -> None:
    differences = []
    for k in range(10):
        pixels, objects = render_scene(np.random.default_rng([3, k]), 320, 240)
        ground = pixels[~np.any([o.mask for o in objects], axis=0)].mean(axis=0)
        differences += [float(np.abs(pixels[o.mask].mean(axis=0) - ground).max()) for o in objects]
    assert np.quantile(differences, 0.05) > 20
    assert np.mean(differences) > 60


@pytest.mark.parametrize("name", list(shapes.SHAPES))
def test_coverage_is_the_area_of_the_outline(name: str) -> None:
    rng = np.random.default_rng(1)
    points = shapes.place(shapes.SHAPES[name](rng), side=90.0, angle=0.7, flip=True, centre=(60.3, 59.8))
    assert np.ptp(points, axis=0).max() == pytest.approx(90.0)
    cover = shapes.coverage(points, (4, 4), 112, 112)
    x, y = points.T
    shoelace = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    # Pillow draws the pixels that an edge runs through, so an outline grows by about 1/8 of a pixel.
    perimeter = np.hypot(*np.diff(np.vstack([points, points[:1]]), axis=0).T).sum()
    assert shoelace - 0.02 * perimeter < cover.sum() < shoelace + 0.2 * perimeter
    rows, columns = np.nonzero(cover >= 0.5)
    middle = (columns.min() + columns.max() + 1) / 2 + 4, (rows.min() + rows.max() + 1) / 2 + 4
    assert middle == pytest.approx((60.3, 59.8), abs=0.9)


def test_other_sizes() -> None:
    for width, height in ((64, 64), (500, 96)):
        pixels, objects = render_scene(np.random.default_rng(2), width, height)
        assert pixels.shape == (height, width, 3)
        assert pixels.dtype == np.uint8
        assert objects


@pytest.mark.parametrize(
    "wrong", [{"images": 0, "seed": 1}, {"images": 1, "seed": -1}, {"images": 1, "seed": 1, "size": (63, 100)}]
)
def test_what_cannot_be_rendered_is_said(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ask for at least"):
        write_scenes(str(tmp_path), **wrong)


def test_categories_are_numbered_from_one() -> None:
    assert [c["id"] for c in scenes.CATEGORIES] == list(range(1, 9))
