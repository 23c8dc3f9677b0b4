import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mal.data.coco import NO_ID, AnnotationDecoder, reason
from mal.data.json_stream import JsonFile
from mal.rows import REASONS

GOOD = {"id": 5, "image_id": 7, "category_id": 3, "bbox": [1, 2.5, 3, 4]}


def decode(tmp_path, annotations, *, load_mask=False, ids_optional=False, chunk_bytes=10**6):
    """All chunks of a list of annotations, given as Python values or as JSON text."""
    text = annotations if isinstance(annotations, str) else json.dumps(annotations)
    path = tmp_path / "annotations.json"
    path.write_text(text)
    decoder = AnnotationDecoder(load_mask=load_mask, ids_optional=ids_optional)
    with JsonFile(str(path), chunk_bytes=chunk_bytes) as file:
        return [chunk for member in file.members() for chunk in member.chunks(decoder)]


def decode_one(tmp_path, annotation, **options):
    """The chunk of a single annotation, as a text or a value."""
    text = annotation if isinstance(annotation, str) else json.dumps(annotation)
    (chunk,) = decode(tmp_path, f"[{text}]", **options)
    return chunk


def test_columns_of_a_plain_annotation(tmp_path):
    chunk = decode_one(tmp_path, {**GOOD, "area": 12.5, "iscrowd": 0, "segmentation": [[1, 2, 3]]})
    assert (chunk.first, len(chunk), chunk.faults, chunk.crowd_text) == (0, 1, {}, {})
    assert (chunk.id[0], chunk.image_id[0], chunk.category_id[0]) == (5, 7, 3)
    assert chunk.bbox.tolist() == [[1, 2.5, 3, 4]]
    assert np.isnan(chunk.score[0])
    assert chunk.segmentation is None
    assert chunk.carried is None


def test_masks_are_kept_as_their_text_when_asked_for(tmp_path):
    annotations = [{**GOOD, "segmentation": [[1, 2.50]]}, GOOD, {**GOOD, "segmentation": None}]
    text = json.dumps(annotations).replace("2.5]]", "2.50]]")
    (chunk,) = decode(tmp_path, text, load_mask=True)
    assert chunk.segmentation.to_pylist() == ["[[1, 2.50]]", None, None]


def test_fields_not_understood_are_carried_with_their_text(tmp_path):
    plain = '"image_id": 1, "category_id": 1, "bbox": [1,1,1,1]'
    annotations = (
        f'[{{"id": 1, {plain}, "is fake": 1.50, "a-b": {{"c": [null]}}}}, {{"id": 2, {plain}}}, '
        f'{{"id": 3, {plain}, "new \\" `x`": null}}]'
    )
    (chunk,) = decode(tmp_path, annotations)
    first, second, third = chunk.carried.to_pylist()
    assert first == '{"is fake": 1.50, "a-b": {"c": [null]}}'
    assert second is None
    assert json.loads(third) == {'new " `x`': None}
    assert chunk.faults == {}


def test_more_unknown_fields_than_a_type_may_have_are_carried_as_well(tmp_path):
    annotations = [{**GOOD, "id": n, f"field {n}": n} for n in range(200)]
    (chunk,) = decode(tmp_path, annotations)
    assert [json.loads(text) for text in chunk.carried.to_pylist()] == [{f"field {n}": n} for n in range(200)]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"id": "12"}, "bad_id: 12"),
        ({"id": None}, "bad_id"),
        ({"id": True}, "bad_id: true"),
        ({"id": 1.5}, "bad_id: 1.5"),
        ({"id": 2**63}, f"bad_id: {2**63}"),
        ({"id": ...}, "bad_id: missing"),
        ({"image_id": "7"}, "bad_image_id: 7"),
        ({"image_id": ...}, "bad_image_id: missing"),
        ({"category_id": "cat"}, "bad_category: cat"),
        ({"category_id": ...}, "bad_category: missing"),
        ({"category_id": [1]}, "bad_category: [1]"),
        ({"bbox": ...}, "bad_bbox: missing"),
        ({"bbox": None}, "bad_bbox: missing"),
        ({"bbox": [1, 2, 3]}, "bad_bbox: [1, 2, 3]"),
        ({"bbox": [1, 2, 3, 4, 5]}, "bad_bbox: [1, 2, 3, 4, 5]"),
        ({"bbox": ["1", "2", "3", "4"]}, 'bad_bbox: ["1", "2", "3", "4"]'),
        ({"bbox": [1, 2, 3, None]}, "bad_bbox: [1, 2, 3, null]"),
        ({"bbox": [1, 2, 3, True]}, "bad_bbox: [1, 2, 3, true]"),
        ({"bbox": {"x": 1}}, 'bad_bbox: {"x": 1}'),
        ({"bbox": [1, 2, 3, float("nan")]}, "not_finite: 1, 2, 3, nan"),
        ({"bbox": [1, float("inf"), 3, 4]}, "not_finite: 1, inf, 3, 4"),
        ({"bbox": [1, 10**400, 3, 4]}, None),
    ],
)
def test_a_bad_annotation_costs_only_itself(tmp_path, change, expected):
    bad = {key: value for key, value in {**GOOD, **change}.items() if value is not ...}
    (chunk,) = decode(tmp_path, [{**GOOD, "id": 1, "extra": 1}, bad, {**GOOD, "id": 3}])
    assert list(chunk.faults) == [1]
    code = chunk.faults[1].partition(":")[0]
    assert code in REASONS
    assert chunk.faults[1] == expected or (expected is None and code == "not_finite")
    assert chunk.id[[0, 2]].tolist() == [1, 3]
    assert chunk.carried is None or json.loads(chunk.carried[0].as_py()) == {"extra": 1}
    assert (chunk.id[1] == NO_ID) == ("id" in change)


@pytest.mark.parametrize("value", ["null", "1", '"text"', "[]", "[[1], {}]", "true", "NaN"])
def test_elements_that_are_no_objects(tmp_path, value):
    (chunk,) = decode(tmp_path, f"[{json.dumps(GOOD)}, {value}]")
    assert chunk.faults[1].startswith("not_an_object")
    assert chunk.id.tolist() == [5, NO_ID]


def test_integral_floats_are_ids_and_large_ids_are_exact(tmp_path):
    largest = 2**63 - 1
    (chunk,) = decode(tmp_path, [{**GOOD, "id": 12.0}, {**GOOD, "id": largest}, {**GOOD, "id": -(2**63) + 1}])
    assert chunk.faults == {}
    assert chunk.id.tolist() == [12, largest, -(2**63) + 1]
    (chunk,) = decode(tmp_path, [{**GOOD, "id": largest, "image_id": 2**53 + 1}])
    assert (chunk.id[0], chunk.image_id[0]) == (largest, 2**53 + 1)


@pytest.mark.parametrize("flag", [1, True, "1", 2])
@pytest.mark.parametrize("rest", [{}, {"area": 3.0}, {"segmentation": {"counts": 'a}{"', "size": [2, 3]}}])
def test_crowds_keep_their_text(tmp_path, flag, rest):
    crowd = {**rest, **GOOD, "iscrowd": flag, "more": {"x": 1}}
    annotations = [{**GOOD, "more": 1}, crowd, {**GOOD, "id": 9, "iscrowd": 0}]
    (chunk,) = decode(tmp_path, json.dumps(annotations, indent=1))
    assert chunk.crowd.tolist() == [False, True, False]
    assert {row: json.loads(text) for row, text in chunk.crowd_text.items()} == {1: crowd}
    assert chunk.crowd_text[1].decode() in json.dumps(annotations, indent=1)


def test_a_crowd_with_nan_is_kept_as_json_that_everyone_reads(tmp_path):
    chunk = decode_one(tmp_path, {**GOOD, "iscrowd": 1, "area": float("nan"), "bbox": None, "id": None})
    assert chunk.faults == {}
    assert json.loads(chunk.crowd_text[0]) == {**GOOD, "iscrowd": 1, "area": None, "bbox": None, "id": None}
    assert chunk.id[0] == NO_ID


@pytest.mark.parametrize("flag", [0, False, None, 0.0, "0", "no", []])
def test_other_flags_mean_no_crowd(tmp_path, flag):
    chunk = decode_one(tmp_path, {**GOOD, "iscrowd": flag})
    assert not chunk.crowd[0]
    assert chunk.faults == {}


def test_scores(tmp_path):
    (chunk,) = decode(tmp_path, [{**GOOD, "score": 0.25}, GOOD, {**GOOD, "score": None}, {**GOOD, "score": 1}])
    assert chunk.score[[0, 3]].tolist() == [0.25, 1.0]
    assert np.isnan(chunk.score[[1, 2]]).all()
    chunk = decode_one(tmp_path, {**GOOD, "score": "high"})
    assert (np.isnan(chunk.score[0]), chunk.carried.to_pylist(), chunk.faults) == (True, ['{"score": "high"}'], {})


def test_detections_without_ids_are_numbered_by_position(tmp_path):
    results = [{key: value for key, value in GOOD.items() if key != "id"} for _ in range(50)]
    results[20]["id"] = 700
    chunks = decode(tmp_path, results, ids_optional=True, chunk_bytes=100)
    assert len(chunks) > 5
    expected = [*range(1, 21), 700, *range(22, 51)]
    assert [number for chunk in chunks for number in chunk.id.tolist()] == expected
    (chunk,) = decode(tmp_path, [{**GOOD, "id": "x"}], ids_optional=True)
    assert (chunk.faults, chunk.id[0]) == ({0: "bad_id: x"}, NO_ID)


ids = st.integers(-(2**63) + 1, 2**63 - 1)
number = st.floats(allow_nan=False, allow_infinity=False)
annotation = st.fixed_dictionaries(
    {"id": ids, "image_id": ids, "category_id": ids, "bbox": st.lists(number, min_size=4, max_size=4)},
    optional={"note": st.text('a"}{', max_size=5), "iscrowd": st.sampled_from([0, 1]), "area": number, "score": number},
)


@settings(deadline=None)
@given(st.lists(annotation, max_size=12), st.sampled_from([1, 50, 300, 10**6]), st.booleans())
def test_what_is_written_is_what_is_read_by_every_layer(tmp_path_factory, annotations, chunk_bytes, spoil):
    written = [{**a, "area": float("nan")} if spoil else a for a in annotations]
    chunks = decode(tmp_path_factory.mktemp("coco"), written, chunk_bytes=chunk_bytes)
    read = []
    for chunk in chunks:
        assert chunk.faults == {}
        assert chunk.first == len(read)
        for row in range(len(chunk)):
            carried = chunk.carried[row].as_py() if chunk.carried is not None else None
            read.append(
                {
                    "id": int(chunk.id[row]),
                    "image_id": int(chunk.image_id[row]),
                    "category_id": int(chunk.category_id[row]),
                    "bbox": chunk.bbox[row].tolist(),
                    "iscrowd": int(chunk.crowd[row]),
                    "score": None if np.isnan(chunk.score[row]) else chunk.score[row],
                    "note": json.loads(carried)["note"] if carried else None,
                }
            )
    expected = [{"iscrowd": 0, "score": None, "note": None, **a} for a in annotations]
    assert read == [{key: item for key, item in a.items() if key != "area"} for a in expected]


def test_details_of_reasons_are_short():
    assert len(reason("bad_bbox", list(range(1000)))) < 250
