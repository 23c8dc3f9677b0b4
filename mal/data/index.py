"""Builds the index of a COCO file or of a detector's results, of any size, in bounded memory.

`mal.data.index_folder` says what is in it. The file is read once. Annotations are decoded chunk by chunk, checked
against the images, and put into buckets by ranges of image ids (on the local disk if the input is large); then each
bucket is sorted and written as shards of work. What grows with the input in memory: the table of images (some 50 bytes
each and their file names) and the annotations' ids (16 bytes each). Only if ``annotations`` come before ``images`` in
the file is that part of it read twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

import msgspec

from mal import boxes, storage
from mal.data.coco import AnnotationDecoder, as_integer
from mal.data.image_table import ImageDecoder, ImageTable
from mal.data.index_folder import FORMAT, REST_FILE, SUMMARY_FILE, Index, Options, Summary, open_index
from mal.data.intake import Counts, Intake
from mal.data.json_buffer import CHUNK_BYTES, dump, parse, strict, whole_characters
from mal.data.json_stream import Element, JsonFile, Member, TextDecoder
from mal.errors import InputError

__all__ = ["MAX_IMAGE_PIXELS", "Index", "Options", "Summary", "build_index", "fingerprint", "open_index"]

MAX_IMAGE_PIXELS = 200_000_000
"""Default limit on the pixels of an image, by its record and again when it is read."""


def build_index(
    ann_path: str,
    folder: str,
    *,
    images_path: str | None = None,
    load_mask: bool = False,
    shard_boxes: int = 0,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    progress: Callable[[str], None] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Index:
    """Build the index of an input in ``folder``, or return the one that is there if it is of the same content.

    Args:
        ann_path: a COCO file, or a detector's list of results ``[{image_id, category_id, bbox, score}]``.
        folder: where the index goes; local or remote.
        images_path: a COCO file with the images (and categories); needed for a detector's results.
        load_mask: keep the input's masks.
        shard_boxes: most boxes of a shard; 0: a 256th of all boxes, at least 128 and at most 4096.
        max_image_pixels: boxes of images whose record says more are rejected.
        progress: called with a line of text from time to time.
        chunk_bytes: how much of the input is decoded at a time.

    Raises:
        InputError: a file as a whole cannot be used. Single bad annotations are rejected with a reason instead.
        StorageError: a path cannot be read or written.
    """
    options = Options(load_mask, shard_boxes, max_image_pixels)
    found = _existing(ann_path, images_path, folder, options)
    if found is not None:
        return found
    storage.delete(storage.join(folder, SUMMARY_FILE))
    storage.make_folder(folder)
    with Intake(folder, storage.size(ann_path), progress) as intake:
        source = _Input(intake, ImageDecoder(max_pixels=max_image_pixels), load_mask, chunk_bytes)
        with storage.open_write(storage.join(folder, REST_FILE)) as file:
            rest = _Rest(file)
            content = source.read_all(ann_path, images_path, rest)
            rest.close()
        assert source.images is not None
        counts = intake.write_shards(source.images, shard_boxes)
    summary = _summary(content, options, source, source.images, counts)
    storage.write_bytes(storage.join(folder, SUMMARY_FILE), msgspec.json.format(msgspec.json.encode(summary)))
    return Index(folder, summary)


def _summary(content: str, options: Options, source: _Input, images: ImageTable, counts: Counts) -> Summary:
    left_out = {"duplicate_id": images.duplicates, "bad_id": images.unusable}
    return Summary(
        format=FORMAT,
        fingerprint=content,
        options=options,
        annotations=counts.annotations,
        boxes=counts.boxes,
        clipped=counts.clipped,
        crowd=counts.crowd,
        rejected=dict(sorted(counts.rejected.items())),
        images=len(images),
        images_without_boxes=len(images) - counts.images,
        images_left_out={why: number for why, number in left_out.items() if number},
        bands=dict(zip(boxes.BANDS, counts.bands.tolist(), strict=True)),
        categories=source.categories,
        unknown_category=sum(n for number, n in counts.by_category.items() if number not in source.categories),
        has_scores=counts.has_scores,
        detections=source.detections,
        shard_boxes=counts.shard_boxes,
        shards=counts.shards,
    )


def fingerprint(ann_path: str, images_path: str | None = None) -> str:
    """The fingerprint that an index of these files has: of their bytes alone, not of their names or times."""
    digests = []
    for path in filter(None, (ann_path, images_path)):
        digest = hashlib.sha256()
        with storage.open_read(path) as file:
            while block := file.read(CHUNK_BYTES):
                digest.update(block)
        digests.append(digest.hexdigest())
    return _join_digests(digests)


def _existing(ann_path: str, images_path: str | None, folder: str, options: Options) -> Index | None:
    try:
        index = open_index(folder)
    except InputError:
        return None
    same = index.summary.options == options and index.summary.fingerprint == fingerprint(ann_path, images_path)
    return index if same else None


def _join_digests(digests: list[str]) -> str:
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:32]


class _ImagesAsText:
    """Decodes images into an `ImageDecoder` and hands on their text."""

    def __init__(self, images: ImageDecoder) -> None:
        self._images = images

    def whole(self, text: bytes) -> bytes | None:
        return None if self._images.whole(text) is None else text[1:-1]

    def each(self, elements: list[Element]) -> bytes:
        self._images.each(elements)
        return b",".join(strict(element.text, element.position) for element in elements)


class _Rest:
    """Writes ``rest.json`` member by member."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._members = 0

    def write(self, key: str, text: bytes) -> None:
        """A member with the JSON text of its value."""
        self._file.write((b",\n" if self._members else b"{") + dump(key) + b": " + text)
        self._members += 1

    def write_list(self, key: str, texts: Iterator[bytes]) -> None:
        """A list as a member, in texts of elements separated by commas."""
        self.write(key, b"[")
        for number, text in enumerate(texts):
            self._file.write(b"," + text if number else text)
        self._file.write(b"]")

    def close(self) -> None:
        """End the object."""
        self._file.write(b"}\n" if self._members else b"{}\n")


class _Input:
    """Reads the input files: images, categories and the rest aside, annotations into an `Intake`."""

    def __init__(self, intake: Intake, images: ImageDecoder, load_mask: bool, chunk_bytes: int) -> None:
        self._intake = intake
        self._image_decoder = images
        self._load_mask = load_mask
        self._chunk_bytes = chunk_bytes
        self.images: ImageTable | None = None
        self.categories: dict[int, str] = {}
        self.detections = False

    def read_all(self, ann_path: str, images_path: str | None, rest: _Rest) -> str:
        """Read everything. Returns the fingerprint of the content."""
        digests = []
        if images_path is not None:
            digests.append(self._read_file(images_path, rest, annotations=False))
            if self.images is None:
                raise InputError(f"{images_path}: has no member 'images'; name a COCO file with the images")
            digests.insert(0, self._read_file(ann_path, None, annotations=True))
        else:
            digests.append(self._read_file(ann_path, rest, annotations=True))
        return _join_digests(digests)

    def _read_file(self, path: str, rest: _Rest | None, *, annotations: bool) -> str:
        """Read one file. ``rest`` is None where only the annotations of it count. Returns its digest."""
        later: int | None = None
        found = False
        digest = hashlib.sha256()
        with JsonFile(path, chunk_bytes=self._chunk_bytes, on_block=digest.update) as file:
            for member in file.members():
                if member.key is None and not annotations:
                    raise InputError(f"{path}: a list, not a COCO file; name one with 'images' and 'categories'")
                if member.key in (None, "annotations"):
                    found = True
                    self._check_list(path, member)
                    if annotations and self.images is not None:
                        self._read_annotations(file)
                    elif annotations:
                        later = member.position
                elif rest is not None:
                    self._read_rest(path, member, rest)
        if annotations and not found:
            raise InputError(f"{path}: has no member 'annotations'; is it a COCO file of boxes?")
        if annotations and self.images is None:
            raise InputError(f"{path}: has no member 'images'; a COCO file lists its images")
        if later is not None:
            with JsonFile(path, chunk_bytes=self._chunk_bytes, start=later) as file:
                self._read_annotations(file)
        return digest.hexdigest()

    def _check_list(self, path: str, member: Member) -> None:
        if not member.is_list:
            raise InputError(f"{path}: 'annotations' is not a list (byte {member.position:,})")
        if member.key is None:
            self.detections = True
            if self.images is None:
                raise InputError(f"{path}: a list of detections; name the COCO file with their images as well")

    def _read_annotations(self, file: JsonFile) -> None:
        assert self.images is not None
        for chunk in file.chunks(AnnotationDecoder(load_mask=self._load_mask, ids_optional=self.detections)):
            self._intake.add(chunk, self.images, file.position)

    def _read_rest(self, path: str, member: Member, rest: _Rest) -> None:
        assert member.key is not None
        if member.key == "images":
            if not member.is_list:
                raise InputError(f"{path}: 'images' is not a list (byte {member.position:,})")
            rest.write_list("images", member.chunks(_ImagesAsText(self._image_decoder)))
            self.images = self._image_decoder.table()
        elif member.is_list and member.key != "categories":
            rest.write_list(member.key, member.chunks(TextDecoder()))
        else:
            text = member.value()
            rest.write(member.key, text)
            if member.key == "categories":
                self.categories = _categories(text)


def _categories(text: bytes) -> dict[int, str]:
    """Names by id; records that are not usable count for nothing (their boxes are labelled all the same)."""
    try:
        records = msgspec.json.decode(text)
    except msgspec.DecodeError:  # half a character, or an integer beyond all bounds: costs no more than its category
        records = parse(text, 0)
    usable = [r for r in records if isinstance(r, dict)] if isinstance(records, list) else []
    pairs = [(as_integer(record.get("id")), record.get("name")) for record in usable]
    names = [(number, whole_characters(name) if isinstance(name, str) else "") for number, name in pairs]
    return {number: name for number, name in names if number is not None}
