import json
import pickle
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mal import boxes as box_arithmetic
from mal import rows
from mal.data import intake
from mal.data.checks import IdBook, clipped_areas
from mal.data.coco import NO_ID
from mal.data.index import build_index, fingerprint, open_index
from mal.errors import InputError, StorageError

IMAGES = [
    {"id": 1, "file_name": "a.jpg", "width": 100, "height": 50},
    {"id": 2, "file_name": "b.jpg", "width": 9, "height": 9},
]
CATEGORIES = [{"id": 3, "name": "cat"}]


def box(number, bbox=(1, 1, 5, 5), image_id=1, **more):
    return {"id": number, "image_id": image_id, "category_id": 3, "bbox": list(bbox), **more}


def write(tmp_path, annotations, images=IMAGES, name="in.json", **more):
    path = tmp_path / name
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES} | more))
    return str(path)


def build(tmp_path, annotations, images=IMAGES, **options):
    return build_index(write(tmp_path, annotations, images), str(tmp_path / "index"), **options)


def all_boxes(index):
    """(image_id, box) of all shards in order."""
    return [
        (row["image_id"], item)
        for number in range(index.shards)
        for row in index.read_shard(number).to_pylist()
        for item in row["boxes"]
    ]


def rejected(index):
    """Position -> reason."""
    return {row["position"]: row["reason"] for row in index.rejected().to_pylist() if row["outcome"] == "rejected"}


def test_rows_of_a_small_file(tmp_path):
    annotations = [
        box(10, (1.5, 2.25, 5, 6), image_id=2, note="x"),
        box(11, (-1, 0, 5, 5), score=0.5),
        box(12, iscrowd=1, segmentation={"counts": [1], "size": [50, 100]}),
        box(13, (0, 0, 100, 50), category_id=77),
    ]
    index = build(tmp_path, annotations)
    table = index.read_shard(0)
    assert table.schema == rows.INDEX
    first, second = table.to_pylist()
    assert (first["image_id"], first["file_name"], first["width"], first["height"]) == (1, "a.jpg", 100, 50)
    assert [item["id"] for item in first["boxes"]] == [11, 13]
    assert [item["clipped"] for item in first["boxes"]] == [True, False]
    assert [item["score"] for item in first["boxes"]] == [0.5, None]
    assert second["boxes"] == [
        {
            "position": 0,
            "id": 10,
            "category_id": 3,
            "bbox": [1.5, 2.25, 5.0, 6.0],
            "score": None,
            "clipped": False,
            "segmentation": None,
            "carried": '{"note": "x"}',
        }
    ]
    (kept,) = index.kept().to_pylist()
    assert (kept["position"], json.loads(kept["text"])) == (2, annotations[2])
    assert index.rejected().to_pylist() == [
        {"position": 2, "id": 12, "image_id": 1, "outcome": "crowd", "reason": None}
    ]
    summary = index.summary
    assert (summary.annotations, summary.boxes, summary.crowd, summary.clipped) == (4, 3, 1, 1)
    assert (summary.images, summary.images_without_boxes, summary.unknown_category) == (2, 0, 1)
    assert summary.categories == {3: "cat"}
    assert summary.bands == {"small": 2, "medium": 1, "large": 0}
    assert summary.has_scores
    assert open_index(index.folder).summary == summary


@pytest.mark.parametrize(
    ("bbox", "reason"),
    [
        ((1, 1, 0, 5), "empty_box: [1, 1, 0, 5]"),
        ((1, 1, 5, -2), "empty_box: [1, 1, 5, -2]"),
        ((0, 0, 1e-200, 1e-200), "empty_box: [0, 0, 9.9999999999999998e-201, 9.9999999999999998e-201]"),  # no area
        ((-5, 0, 5 + 1e-15, 1e-315), "empty_box"),  # no area within the image
        ((100, 1, 5, 5), "outside: [100, 1, 5, 5] in an image of 100 x 50 pixels"),
        ((-5, 1, 5, 5), "outside"),
        ((1e6, 1e6, 5, 5), "outside"),
        ((1e308, 1, 1e308, 1), "not_finite"),
        ((float("nan"), 1, 1, 1), "not_finite"),
        ((1, 1, float("inf"), 1), "not_finite"),
        ((1, 2, 3), "bad_bbox: [1, 2, 3]"),
        (("1", "2", "3", "4"), "bad_bbox"),
    ],
)
def test_boxes_that_cannot_be_labelled_are_rejected_with_the_reason(tmp_path, bbox, reason):
    index = build(tmp_path, [box(1), box(2, bbox), box(3)])
    assert list(rejected(index)) == [1]
    assert rejected(index)[1].startswith(reason)
    assert [item["id"] for _, item in all_boxes(index)] == [1, 3]
    assert index.summary.rejected == {reason.partition(":")[0]: 1}


def test_boxes_at_the_border_and_beyond_are_labelled(tmp_path):
    index = build(tmp_path, [box(1, (99.9, 49.9, 9, 9)), box(2, (-1e5, -1e5, 1e6, 1e6)), box(3, (0, 0, 100.0001, 1))])
    assert [(item["id"], item["clipped"]) for _, item in all_boxes(index)] == [(1, True), (2, True), (3, True)]
    assert index.summary.bands == {"small": 2, "medium": 1, "large": 0}


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ({"width": 0}, "bad_image_record: width is 0"),
        ({"width": -3}, "bad_image_record: width is -3"),
        ({"height": None}, "bad_image_record: height is None"),
        ({"height": "50"}, "bad_image_record: height is '50'"),
        ({"height": 2**31}, "bad_image_record"),
        ({"file_name": None}, "bad_image_record: file_name is None"),
        ({"file_name": ""}, "bad_image_record: file_name is ''"),
        ({"file_name": "../a.jpg"}, "unsafe_path: ../a.jpg"),
        ({"file_name": "x/../../a.jpg"}, "unsafe_path"),
        ({"file_name": "/etc/passwd"}, "unsafe_path: /etc/passwd"),
        ({"file_name": "C:\\a.jpg"}, "unsafe_path"),
        ({"file_name": "..\\a.jpg"}, "unsafe_path"),
        ({"file_name": "\\\\host\\a.jpg"}, "unsafe_path"),
        ({"file_name": "http://host/a.jpg"}, "unsafe_path"),
        ({"file_name": "a\0.jpg"}, "unsafe_path"),
        ({"width": 20_000, "height": 20_000}, "too_large: 20000 x 20000 pixels, the limit is 200000000"),
    ],
)
def test_images_that_cannot_be_used_reject_their_boxes_only(tmp_path, image, reason):
    images = [{**IMAGES[0], **image}, IMAGES[1]]
    index = build(tmp_path, [box(1), box(2, image_id=2)], images)
    assert list(rejected(index)) == [0]
    assert rejected(index)[0].startswith(reason)
    assert [item["id"] for _, item in all_boxes(index)] == [2]


@pytest.mark.parametrize("name", ["é ü.jpg", "100%20.jpg", "a b/c.jpg", "x/../a.jpg", "a..b.jpg", "日本.png"])
def test_unusual_names_are_taken_as_they_are(tmp_path, name):
    index = build(tmp_path, [box(1)], [{**IMAGES[0], "file_name": name}])
    assert index.read_shard(0)["file_name"].to_pylist() == [name]


LONE = "\ud800"
"""Half a character, which JSON can spell and UTF-8 cannot."""


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        ({"id": LONE}, "bad_id: \\ud800"),
        ({"bbox": LONE}, "bad_bbox: \\ud800"),
        ({"bbox": [LONE, 1, 2, 3]}, 'bad_bbox: ["\\ud800", 1, 2, 3]'),
        ({"category_id": LONE}, "bad_category: \\ud800"),
        ({"image_id": LONE}, "bad_image_id: \\ud800"),
    ],
)
def test_half_a_character_costs_its_annotation_only(tmp_path, annotation, reason):
    index = build(tmp_path, [{**box(1), **annotation}, box(2), LONE])
    assert rejected(index) == {0: reason, 2: "not_an_object: \\ud800"}
    assert [item["id"] for _, item in all_boxes(index)] == [2]


def test_half_a_character_in_a_file_name_costs_its_image_only(tmp_path):
    index = build(tmp_path, [box(1), box(2, image_id=2)], [{**IMAGES[0], "file_name": f"../{LONE}.jpg"}, IMAGES[1]])
    assert rejected(index) == {0: "unsafe_path: ../\\ud800.jpg"}
    assert [item["id"] for _, item in all_boxes(index)] == [2]


def test_half_a_character_elsewhere_costs_nothing(tmp_path):
    more = {"info": {LONE: LONE}, "licenses": [{"name": LONE}], f"mine{LONE}": LONE}
    categories = [{"id": 3, "name": LONE, LONE: 1}, {"id": 4, "name": "cat"}]
    images = [{**IMAGES[0], "note": LONE}, IMAGES[1]]
    path = write(tmp_path, [box(1, note=LONE), box(2, **{LONE: 1})], images, categories=categories, **more)
    index = build_index(path, str(tmp_path / "index"))
    assert index.summary.categories == open_index(index.folder).summary.categories == {3: "\\ud800", 4: "cat"}
    assert [json.loads(item["carried"]) for _, item in all_boxes(index)] == [{"note": LONE}, {LONE: 1}]
    with open(index.rest_path) as file:
        assert json.load(file) == {"images": images, "categories": categories, **more}


def test_a_category_whose_id_is_beyond_all_bounds_counts_for_nothing(tmp_path):
    path = write(tmp_path, [box(1)], categories=[{"id": "#", "name": "x"}, *CATEGORIES])
    (tmp_path / "in.json").write_text((tmp_path / "in.json").read_text().replace('"#"', "1" * 5000))
    index = build_index(path, str(tmp_path / "index"))
    assert (index.summary.categories, index.summary.boxes) == ({3: "cat"}, 1)


def test_ids(tmp_path):
    largest = 2**63 - 1
    annotations = [
        box(5),
        box("6"),
        {key: value for key, value in box(7).items() if key != "id"},
        box(5),  # the id is taken
        box(largest),
        box(2**53 + 1),
        box(2**53),
        box(8, image_id=99),
        box(8),  # the one before was rejected and has no claim
        box(9, iscrowd=1),
        box(9),
        box(5, iscrowd=1),
        "text",
    ]
    index = build(tmp_path, annotations)
    assert rejected(index) == {
        1: "bad_id: 6",
        2: "bad_id: missing",
        3: "duplicate_id: 5",
        7: "unknown_image: 99",
        10: "duplicate_id: 9",
        11: "duplicate_id: 5",
        12: "not_an_object: text",
    }
    assert [item["id"] for _, item in all_boxes(index)] == [5, largest, 2**53 + 1, 2**53, 8]
    assert index.kept()["position"].to_pylist() == [9]
    by_position = {row["position"]: row for row in index.rejected().to_pylist()}
    assert (by_position[1]["id"], by_position[3]["id"], by_position[3]["image_id"]) == (None, 5, 1)
    assert index.summary.crowd == 1
    assert index.summary.rejected == {"bad_id": 2, "duplicate_id": 3, "not_an_object": 1, "unknown_image": 1}


def test_image_records_without_an_id_or_with_one_taken(tmp_path):
    images = [{**IMAGES[0], "id": None}, IMAGES[1], {**IMAGES[1], "width": 5000}, "text", IMAGES[0]]
    index = build(tmp_path, [box(1), box(2, (0, 0, 20, 5), image_id=2)], images)
    assert (index.summary.images, index.summary.images_left_out) == (2, {"duplicate_id": 1, "bad_id": 2})
    assert [item["clipped"] for _, item in all_boxes(index)] == [False, True]


@pytest.mark.parametrize("annotations", [[], [box(1, (0, 0, 0, 0))]])
def test_nothing_to_label(tmp_path, annotations):
    index = build(tmp_path, annotations)
    assert (index.shards, index.summary.boxes, index.summary.images_without_boxes) == (0, 0, 2)
    assert pq.read_table(index.folder + "/index.parquet").schema == rows.INDEX
    with pytest.raises(IndexError):
        index.read_shard(0)


def test_everything_but_the_annotations_is_left_as_it_was(tmp_path):
    more = {"info": {"é": 1.50}, "licenses": [], "my list": [1, {"a": 2}], "nothing": None}
    images = [{**IMAGES[0], "coco_url": "x", "lat": 1.25}, "odd"]
    path = write(tmp_path, [box(1)], images, **more)
    for chunk_bytes in (1, 50, 10**6):
        index = build_index(path, str(tmp_path / f"index{chunk_bytes}"), chunk_bytes=chunk_bytes)
        with open(index.rest_path) as file:
            assert json.load(file) == {"images": images, "categories": CATEGORIES, **more}


def test_annotations_may_come_first(tmp_path):
    path = tmp_path / "in.json"
    annotations = [box(n, image_id=1 + n % 2, note="},{") for n in range(30)]
    parts = {"annotations": annotations, "info": {}, "categories": CATEGORIES, "images": IMAGES}
    path.write_text(json.dumps(parts))
    late = build_index(str(path), str(tmp_path / "late"), chunk_bytes=100)
    early = build(tmp_path, annotations)
    assert all_boxes(late) == all_boxes(early)
    assert late.summary.boxes == 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": []}', "no member 'annotations'"),
        ('{"annotations": []}', "no member 'images'"),
        ('{"annotations": {}, "images": []}', "'annotations' is not a list"),
        ('{"annotations": [], "images": 3}', "'images' is not a list"),
        ('[{"image_id": 1}]', "a list of detections"),
        ("{}", "no member"),
        ('{"images": [], "annotations": [{"id": 1', "cut off"),
        ("3", "neither"),
        ("", "empty"),
    ],
)
def test_files_that_cannot_be_used_are_named_and_leave_no_index(tmp_path, text, message):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"broken\.json.*{message}"):
        build_index(str(path), str(tmp_path / "index"))
    assert not list((tmp_path / "index").iterdir())
    with pytest.raises(InputError, match="no complete index"):
        open_index(str(tmp_path / "index"))


def test_missing_input(tmp_path):
    with pytest.raises(StorageError, match="absent"):
        build_index(str(tmp_path / "absent.json"), str(tmp_path / "index"))


def test_detections_with_the_images_of_another_file(tmp_path):
    images = write(tmp_path, [box(99)], info={"year": 1})
    path = tmp_path / "results.json"
    results = [{"image_id": 2, "category_id": 3, "bbox": [1, 1, 2, 2], "score": n / 4} for n in range(3)]
    path.write_text(json.dumps(results))
    index = build_index(str(path), str(tmp_path / "index"), images_path=images)
    assert [(i, item["id"], item["score"]) for i, item in all_boxes(index)] == [(2, 1, 0.0), (2, 2, 0.25), (2, 3, 0.5)]
    with open(index.rest_path) as file:
        assert json.load(file) == {"images": IMAGES, "categories": CATEGORIES, "info": {"year": 1}}
    assert (index.summary.detections, index.summary.has_scores, index.summary.boxes) == (True, True, 3)
    assert index.summary.fingerprint == fingerprint(str(path), images)
    with pytest.raises(InputError, match="a list, not a COCO file"):
        build_index(str(path), str(tmp_path / "other"), images_path=str(path))


def test_an_index_of_the_same_content_is_used_again(tmp_path):
    index = build(tmp_path, [box(1)])
    stamp = (tmp_path / "index" / "index.parquet").stat().st_mtime_ns

    def unchanged(again):
        return (tmp_path / "index" / "index.parquet").stat().st_mtime_ns == stamp and again.summary == index.summary

    write(tmp_path, [box(1)], name="same.json")
    assert unchanged(build_index(str(tmp_path / "same.json"), index.folder))
    assert not unchanged(build(tmp_path, [box(1)], load_mask=True))
    index = build(tmp_path, [box(1)])
    other = build(tmp_path, [box(2)])  # of the same size
    assert other.summary.fingerprint != index.summary.fingerprint
    assert [item["id"] for _, item in all_boxes(other)] == [2]
    (tmp_path / "index" / "summary.json").write_text("{")
    with pytest.raises(InputError, match="not the summary"):
        open_index(index.folder)
    assert build(tmp_path, [box(2)]).summary == other.summary


def test_an_index_is_cheap_to_send(tmp_path):
    index = build(tmp_path, [box(n) for n in range(300)])
    index.read_shard(0)
    copy = pickle.loads(pickle.dumps(index))
    assert copy.read_shard(0) == index.read_shard(0)
    assert len(pickle.dumps(index)) < 2000


@settings(deadline=None, max_examples=40)
@given(
    image_ids=st.lists(st.integers(0, 8), max_size=80),
    shard_boxes=st.integers(1, 30),
    buckets=st.sampled_from([None, 1, 3, 50]),
    repeat=st.booleans(),
)
def test_every_box_is_in_one_shard_once(tmp_path_factory, image_ids, shard_boxes, buckets, repeat):
    tmp_path = tmp_path_factory.mktemp("index")
    images = [{**IMAGES[0], "id": number} for number in reversed(range(8))]
    ids = [n // 2 if repeat else n for n in range(len(image_ids))]
    annotations = [
        box(i, (n % 60, 1, 5, 5), image_id) for n, (i, image_id) in enumerate(zip(ids, image_ids, strict=True))
    ]
    with pytest.MonkeyPatch.context() as patch:
        if buckets is not None:  # as for a large file
            patch.setattr(intake, "_IN_MEMORY_BYTES", 0)
            patch.setattr(intake, "_BUCKET_BYTES", 1)
            patch.setattr(intake, "_MOST_BUCKETS", buckets)
        index = build(tmp_path, annotations, images, shard_boxes=shard_boxes, chunk_bytes=500)
    found = all_boxes(index)
    seen, expected = set(), []
    for position, annotation in enumerate(annotations):
        if annotation["image_id"] < 8 and annotation["id"] not in seen:
            seen.add(annotation["id"])
            expected.append((annotation["image_id"], position))
    assert [(image_id, item["position"]) for image_id, item in found] == sorted(expected)
    assert all(item["bbox"] == annotations[item["position"]]["bbox"] for _, item in found)
    assert index.summary.boxes + sum(index.summary.rejected.values()) == index.summary.annotations == len(annotations)
    sizes = index.summary.shards
    assert all(0 < size <= shard_boxes for size in sizes)
    assert [sum(len(row) for row in index.read_shard(k)["boxes"].to_pylist()) for k in range(index.shards)] == sizes
    per_image = Counter(image_id for image_id, _ in found)
    table_rows = sum(index.read_shard(k).num_rows for k in range(index.shards))
    assert table_rows == sum(-(-count // shard_boxes) for count in per_image.values())
    assert index.summary.images_without_boxes == 8 - len(per_image)


def test_automatic_shard_size(tmp_path):
    index = build(tmp_path, [box(n, image_id=1 + n % 2) for n in range(1000)])
    assert (index.summary.shard_boxes, index.summary.shards) == (128, [128] * 3 + [116] + [128] * 3 + [116])


side = st.floats(-200, 200) | st.integers(-200, 200)


@settings(deadline=None)
@given(bbox=st.tuples(side, side, side, side), width=st.integers(1, 150), height=st.integers(1, 150))
def test_clipping_agrees_with_the_plain_one(tmp_path_factory, bbox, width, height):
    tmp_path = tmp_path_factory.mktemp("index")
    index = build(tmp_path, [box(1, bbox)], [{"id": 1, "file_name": "a", "width": width, "height": height}])
    whole = box_arithmetic.from_xywh(bbox)
    part = box_arithmetic.clip(whole, width, height) if min(bbox[2:]) > 0 else None
    assert index.summary.boxes == (part is not None)
    if part is not None:
        assert index.summary.clipped == (part != whole)
        assert index.summary.bands[box_arithmetic.band(box_arithmetic.area(part))] == 1
        areas = clipped_areas(np.array([bbox], float), np.array([width]), np.array([height]))
        assert areas[0] == box_arithmetic.area(part)


@given(st.lists(st.lists(st.integers(0, 12) | st.just(NO_ID), max_size=8), max_size=5))
def test_duplicates_are_found_wherever_they_are(parts):
    book, seen, expected = IdBook(), set(), []
    for position, number in enumerate(number for part in parts for number in part):
        if number in seen:
            expected.append(position)
        elif number != NO_ID:
            seen.add(number)
    for part in parts:
        book.add(np.array(part, np.int64))
    assert book.duplicates().tolist() == expected


@pytest.mark.shared
@pytest.mark.parametrize(("part", "labelled", "crowds"), [("val", 1020, 11), ("train", 3641, 36)])
def test_real_coco(shared_dir, tmp_path, part, labelled, crowds):
    path = shared_dir / "coco" / part / "instances.json"
    index = build_index(str(path), str(tmp_path), load_mask=True, chunk_bytes=100_000)
    assert (index.summary.boxes, index.summary.crowd, index.summary.rejected) == (labelled, crowds, {})
    given_ = {a["id"]: a for a in json.loads(path.read_text())["annotations"]}
    for image_id, item in all_boxes(index):
        annotation = given_.pop(item["id"])
        assert (image_id, item["bbox"]) == (annotation["image_id"], annotation["bbox"])
        assert json.loads(item["segmentation"]) == annotation["segmentation"]
    assert [json.loads(text) for text in index.kept()["text"].to_pylist()] == list(given_.values())


@pytest.mark.slow
def test_a_hundred_megabytes_in_one_line(tmp_path):
    count = 750_000
    with open(tmp_path / "in.json", "w") as file:
        file.write('{"images": [{"id": 1, "file_name": "a", "width": 640, "height": 480}], "annotations": [')
        for first in range(0, count, 10_000):
            text = ', "image_id": 1, "category_id": 1, "bbox": [12.34, 56.78, 123.45, 234.56], "area": 28956.43'
            text += ', "iscrowd": 0, "note": "a line"}'
            file.write((", " if first else "") + ", ".join(f'{{"id": {first + k}{text}' for k in range(10_000)))
        file.write("]}")
    assert (tmp_path / "in.json").stat().st_size > 100_000_000
    index = build_index(str(tmp_path / "in.json"), str(tmp_path / "index"))
    assert (index.summary.boxes, index.summary.annotations) == (count, count)
