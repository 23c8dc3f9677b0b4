import json

import msgspec
import pyarrow.fs as pafs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mal import storage
from mal.data.json_buffer import NotJsonError, dump, parse, strict
from mal.data.json_stream import Element, JsonFile, TextDecoder
from mal.errors import InputError, StorageError

CHUNKS = (1, 7, 64, 1000)

texts = st.text(st.sampled_from('a{}[],":\\é \n'), max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
records = st.dictionaries(texts, values, max_size=4)


class Watching(TextDecoder):
    """Counts which road the chunks take."""

    def __init__(self):
        super().__init__()
        self.wholes = self.eaches = 0

    def whole(self, text):
        result = super().whole(text)
        self.wholes += 1
        return result

    def each(self, elements: list[Element]):
        self.eaches += 1
        return super().each(elements)


def read(path, chunk_bytes, decoder=None):
    """The file's members as Python values, lists read by chunks."""
    result = {}
    with JsonFile(str(path), chunk_bytes=chunk_bytes) as file:
        for member in file.members():
            if member.is_list:
                parts = member.chunks(decoder or TextDecoder())
                result[member.key] = [item for part in parts for item in json.loads(b"[" + part + b"]")]
            else:
                result[member.key] = json.loads(member.value())
    return result


@settings(deadline=None)
@given(
    data=st.dictionaries(texts, st.lists(records, max_size=6) | values, max_size=4),
    chunk_bytes=st.sampled_from(CHUNKS),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
)
def test_any_object_read_in_chunks_is_the_same(tmp_path_factory, data, chunk_bytes, indent, ascii_only):
    path = tmp_path_factory.mktemp("json") / "x.json"
    path.write_text(json.dumps(data, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    assert read(path, chunk_bytes) == data


@settings(deadline=None)
@given(data=st.lists(values, max_size=8), chunk_bytes=st.sampled_from(CHUNKS))
def test_any_top_level_list_is_the_same(tmp_path_factory, data, chunk_bytes):
    path = tmp_path_factory.mktemp("json") / "x.json"
    path.write_text(json.dumps(data))
    assert read(path, chunk_bytes) == {None: data}


@pytest.mark.parametrize("chunk_bytes", [*range(1, 40), 200])
def test_boundaries_inside_strings_and_nested_objects_are_not_taken(tmp_path, chunk_bytes):
    data = {
        "annotations": [
            {"id": 1, "note": '}, {"id": 2},{"id": 3}'},
            {"id": 2, "parts": [{"id": 7}, {"id": 8, "parts": [{"id": 9}, {"id": 10}]}], "q": '\\"},{'},
            {"id": 3},
        ],
        "categories": [{"id": 1, "name": "]}"}],
    }
    path = tmp_path / "x.json"
    path.write_text(json.dumps(data))
    assert read(path, chunk_bytes) == data


@pytest.mark.parametrize("indent", [None, 2])
def test_plain_files_take_the_fast_road_only(tmp_path, indent):
    data = {"images": [{"id": n, "w": 1.5} for n in range(50)], "annotations": [{"id": n} for n in range(3000)], "z": 1}
    path = tmp_path / "x.json"
    path.write_text(json.dumps(data, indent=indent))
    decoder = Watching()
    assert read(path, 2000, decoder) == data
    assert decoder.eaches == 0
    assert decoder.wholes >= 15


def test_nan_of_pythons_json_becomes_null_and_costs_no_other_element(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": [{"v": NaN}, {"v": -Infinity, "w": 1}, {"v": 2}], "b": {"c": Infinity}}')
    assert read(path, 10) == {"a": [{"v": None}, {"v": None, "w": 1}, {"v": 2}], "b": {"c": None}}


def test_byte_order_mark_is_accepted(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": [1]}')
    for chunk_bytes in CHUNKS:
        assert read(path, chunk_bytes) == {"a": [1]}


def test_skipped_members_are_passed_over(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": [{"x": [1, {}]}, {"x": 2}], "b": {"y": "}"}, "c": 3}')
    with JsonFile(str(path), chunk_bytes=5) as file:
        keys = [(member.key, member.is_list) for member in file.members()]
    assert keys == [("a", True), ("b", False), ("c", False)]


def test_a_member_can_be_read_later_from_its_position(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": [1, 2], "b": 0}')
    with JsonFile(str(path), chunk_bytes=4) as file:
        position = next(member.position for member in file.members() if member.key == "a")
    with JsonFile(str(path), start=position) as file:
        assert list(file.chunks(TextDecoder())) == [b"1, 2"]


def test_blocks_are_handed_on_in_order_and_complete(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"a": list(range(1000)), "b": "x" * 500}))
    blocks = []
    with JsonFile(str(path), chunk_bytes=100, on_block=blocks.append) as file:
        for _ in file.members():
            pass
    assert b"".join(blocks) == path.read_bytes()


def test_every_truncation_is_an_input_error_that_names_the_file(tmp_path):
    whole = b'{"info": {"y": 1}, "images": [{"id": 1, "n": "a\\"b"}, {"id": 2}], "n": 12.5}'
    path = tmp_path / "cut.json"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        for chunk_bytes in (3, 1000):
            with pytest.raises(InputError, match=r"cut\.json.*at byte \d+"):
                read(path, chunk_bytes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"   ", "empty"),
        (b'"text"', "neither a JSON object nor a list"),
        (b"12", "neither"),
        (b'{"a": 1} {"a": 2}', "after the end.* at byte 9"),
        (b'{"a": 1, "a": 2}', "appears twice.*byte 9"),
        (b'{"a": [1, 2,]}', "expected an element"),
        (b'{"a": [1 2]}', "not JSON"),
        (b'{"a": [,1]}', "not JSON"),
        (b'{"a": [{"b" 1}]}', "not JSON.*at byte 12"),
        (b'{"a": [{"b": 1}}', "not JSON"),
        (b'{"a" 1}', "expected ':'"),
        (b'{"a": }', "not JSON"),
        (b"{1: 2}", "expected the name"),
        (b'{"a": 1 "b": 2}', "expected ','"),
        (b'{"a": [{"b": "\xff"}]}', "not UTF-8.* at byte 14"),
        (b'{"a": {"b": "\xc3"}}', "not UTF-8.* at byte 13"),
        (b'{"a": [' + b"[" * 100_000 + b"]" * 100_000 + b"]}", "nested too deeply"),
    ],
)
def test_files_that_are_not_json_say_where(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    for chunk_bytes in (3, 100, 10**6):
        if len(content) > 1000 and chunk_bytes < 100:
            continue
        with pytest.raises(InputError, match=message):
            read(path, chunk_bytes)


def test_a_missing_file_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="no such file"):
        JsonFile(str(tmp_path / "absent.json"))


def test_strict_text_is_json_for_everyone():
    assert strict(b'{"a":  1.50}', 0) == b'{"a":  1.50}'
    assert msgspec.json.decode(strict(b'{"a": [NaN, 1e999], "b": -Infinity}', 0)) == {"a": [None, None], "b": None}
    assert json.loads(strict(b'{"a": "\\ud800", "b": NaN}', 0)) == {"a": "\ud800", "b": None}


def test_integers_of_thousands_of_digits_are_infinite():
    assert parse(b"-" + b"9" * 10_000, 0) == float("-inf")
    assert parse(b"12345678901234567890", 0) == 12345678901234567890


def test_a_mistake_is_placed_in_bytes():
    with pytest.raises(NotJsonError) as error:
        parse('{"é": x}'.encode(), 100)
    assert error.value.position == 107


@settings(deadline=None)
@given(values)
def test_dump_and_parse_are_inverse(value):
    assert parse(dump(value), 0) == value


def test_a_connection_that_breaks_is_gone_on_with_at_its_place(tmp_path, monkeypatch):
    path = tmp_path / "in.json"
    path.write_text(json.dumps({"list": list(range(2000))}))
    monkeypatch.setattr(storage, "is_remote", lambda _: True)
    monkeypatch.setattr(storage, "_READ_PAUSES", (0.0, 0.0))
    opened = []

    class Breaking:
        def __init__(self, file):
            self._file, self._left = file, 3

        def __getattr__(self, name):
            return getattr(self._file, name)

        def read(self, size):
            if self._left == 0:
                raise OSError("broken pipe")
            self._left -= 1
            return self._file.read(size)

    open_read = storage.open_read
    monkeypatch.setattr(storage, "resolve", lambda p: (pafs.LocalFileSystem(), str(p)))
    monkeypatch.setattr(storage, "open_read", lambda p: opened.append(p) or Breaking(open_read(p)))
    with JsonFile(str(path), chunk_bytes=500) as file:
        texts = [text for member in file.members() for text in member.chunks(TextDecoder())]
    assert json.loads(b"[" + b",".join(texts) + b"]") == list(range(2000))
    assert len(opened) > 4
