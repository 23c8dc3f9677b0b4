import contextlib
import errno
import io
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from mal import storage
from mal.data import images
from mal.data.images import ImageError, decode, leaves_folder, safe_join
from mal.errors import StorageError

LIMIT = 10_000
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def save(tmp_path, image, name="x.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return str(path)


def code(path, **options):
    with pytest.raises(ImageError) as error:
        decode(str(path), **{"max_pixels": LIMIT, **options})
    return error.value.code


def test_rgb_is_exact(tmp_path):
    pixels = decode(save(tmp_path, Image.fromarray(PIXELS)), expected=(30, 20), max_pixels=LIMIT)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    np.testing.assert_array_equal(pixels, PIXELS)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif", "gif", "ppm"])
def test_formats(tmp_path, suffix):
    pixels = decode(save(tmp_path, Image.fromarray(PIXELS), f"x.{suffix}"), expected=(30, 20), max_pixels=LIMIT)
    assert pixels.shape == (20, 30, 3)


def test_the_name_of_a_file_does_not_decide_its_format(tmp_path):
    path = save(tmp_path, Image.fromarray(PIXELS), "x.jpg", format="PNG")
    np.testing.assert_array_equal(decode(path, max_pixels=LIMIT), PIXELS)


def test_kinds_of_pixels(tmp_path):
    image = Image.fromarray(PIXELS)
    grey = np.asarray(image.convert("L"))
    np.testing.assert_array_equal(decode(save(tmp_path, image.convert("L")), max_pixels=LIMIT), np.dstack([grey] * 3))
    alpha = np.dstack([PIXELS, np.full((20, 30), 7, np.uint8)])
    np.testing.assert_array_equal(decode(save(tmp_path, Image.fromarray(alpha)), max_pixels=LIMIT), PIXELS)
    light = Image.merge("LA", [image.convert("L"), image.convert("L")])
    np.testing.assert_array_equal(decode(save(tmp_path, light), max_pixels=LIMIT), np.dstack([grey] * 3))
    palette = image.quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(decode(save(tmp_path, palette), max_pixels=LIMIT), expected)
    path = save(tmp_path, palette, transparency=bytes(range(16)))  # Pillow warns about such files
    np.testing.assert_array_equal(decode(path, max_pixels=LIMIT), expected)
    bits = image.convert("1")
    assert set(np.unique(decode(save(tmp_path, bits), max_pixels=LIMIT))) == {0, 255}
    cmyk = image.convert("CMYK")
    found = decode(save(tmp_path, cmyk, "x.tif"), max_pixels=LIMIT)
    np.testing.assert_array_equal(found, np.asarray(cmyk.convert("RGB")))
    assert decode(save(tmp_path, cmyk, "x.jpg"), max_pixels=LIMIT).shape == (20, 30, 3)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    pixels = decode(save(tmp_path, Image.fromarray(values)), max_pixels=LIMIT)
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]
    path = save(tmp_path, Image.fromarray(values.astype(np.int32)), "x.tif")
    assert decode(path, max_pixels=LIMIT)[0, :, 1].tolist() == [0, 0, 1, 1, 128, 255]


def test_floats_are_scaled(tmp_path):
    unit = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
    assert decode(save(tmp_path, unit, "x.tif"), max_pixels=LIMIT)[0, :, 2].tolist() == [0, 128, 255]
    wide = Image.fromarray(np.array([[-10.0, 0.0, 10.0, np.nan]], np.float32))
    assert decode(save(tmp_path, wide, "x.tif"), max_pixels=LIMIT)[0, :, 0].tolist() == [0, 128, 255, 128]


def test_of_an_animation_the_first_frame_counts(tmp_path):
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue")]
    path = save(tmp_path, frames[0], "x.gif", save_all=True, append_images=frames[1:])
    assert decode(path, expected=(5, 4), max_pixels=LIMIT)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_counts_only_where_the_record_asks_for_it(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path, Image.fromarray(PIXELS), exif=exif)
    np.testing.assert_array_equal(decode(path, expected=(30, 20), max_pixels=LIMIT), PIXELS)
    np.testing.assert_array_equal(decode(path, max_pixels=LIMIT), PIXELS)
    if orientation <= 4:
        assert code(path, expected=(20, 30)) == "size_differs"
        return
    upright = {
        5: PIXELS.transpose(1, 0, 2),
        6: np.rot90(PIXELS, -1),
        7: np.rot90(PIXELS, 2).transpose(1, 0, 2),
        8: np.rot90(PIXELS, 1),
    }[orientation]
    np.testing.assert_array_equal(decode(path, expected=(20, 30), max_pixels=LIMIT), upright)


def test_a_square_is_never_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    square = PIXELS[:, :20]
    path = save(tmp_path, Image.fromarray(square), exif=exif)
    np.testing.assert_array_equal(decode(path, expected=(20, 20), max_pixels=LIMIT), square)


@pytest.mark.parametrize("size", [(20, 30), (31, 20), (1, 1)])
def test_another_size_than_the_record(tmp_path, size):
    assert code(save(tmp_path, Image.fromarray(PIXELS)), expected=size) == "size_differs"


def test_one_pixel_and_a_very_wide_image(tmp_path):
    assert decode(save(tmp_path, Image.new("RGB", (1, 1))), expected=(1, 1), max_pixels=1).shape == (1, 1, 3)
    assert decode(save(tmp_path, Image.new("RGB", (20_000, 1))), max_pixels=20_000).shape == (1, 20_000, 3)


def test_damaged_files(tmp_path):
    for name, options in (("x.jpg", {}), ("x.png", {}), ("x.webp", {"lossless": True}), ("x.tif", {}), ("x.gif", {})):
        whole = io.BytesIO()
        Image.fromarray(PIXELS).save(whole, {"x.jpg": "JPEG", "x.tif": "TIFF"}.get(name, name[2:].upper()), **options)
        data = whole.getvalue()
        for length in (0, 3, 30, len(data) // 2):
            (tmp_path / name).write_bytes(data[:length])
            assert code(tmp_path / name) == "unreadable_image", (name, length)


def test_random_damage_raises_nothing_but_image_errors(tmp_path):
    rng = np.random.default_rng(1)
    path = tmp_path / "x"
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"):
        whole = io.BytesIO()
        Image.fromarray(PIXELS).save(whole, kind)
        for _ in range(60):
            data = bytearray(whole.getvalue())
            for place in rng.integers(0, len(data), 4):
                data[place] = rng.integers(256)
            path.write_bytes(data)
            with contextlib.suppress(ImageError):
                assert decode(str(path), max_pixels=LIMIT).shape[2] == 3


def test_no_images(tmp_path):
    (tmp_path / "x.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    assert code(tmp_path / "x.jpg") == "unreadable_image"
    (tmp_path / "folder.jpg").mkdir()
    assert code(tmp_path / "folder.jpg") == "unreadable_image"
    assert code(tmp_path / "absent.jpg") == "missing_image"
    assert code(tmp_path / "x.jpg" / "y.jpg") == "missing_image"
    assert code(tmp_path / ("n" * 300)) in ("missing_image", "unreadable_image")


def test_a_store_out_of_reach_is_not_the_images_fault():
    with pytest.raises(StorageError):
        decode("ftp://host/x.jpg", max_pixels=LIMIT)


def test_bombs_are_refused_by_their_header(tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (30_000, 30_000)).save(path)
    assert path.stat().st_size < 200_000
    assert code(path) == "too_large"


def test_the_limit_is_ours_not_pillows(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = save(tmp_path, Image.fromarray(PIXELS))
    assert decode(path, max_pixels=600).shape == (20, 30, 3)
    assert code(path, max_pixels=599) == "too_large"
    assert Image.MAX_IMAGE_PIXELS == 100


def test_threads_share_the_settings_of_the_process_and_leave_them_as_they_were(tmp_path):
    path = save(tmp_path, Image.fromarray(PIXELS).quantize(16), transparency=bytes(range(16)))
    before = (Image.MAX_IMAGE_PIXELS, list(warnings.filters))
    with ThreadPoolExecutor(4) as threads:
        decoded = list(threads.map(lambda _: decode(path, max_pixels=LIMIT), range(200)))
    assert len(decoded) == 200
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before


def test_errors_can_be_sent():
    error = pickle.loads(pickle.dumps(ImageError("too_large", "x.jpg: 3 x 4")))
    assert (error.code, error.reason) == ("too_large", "too_large: x.jpg: 3 x 4")
    assert "more pixels" in str(error)


UNSAFE = ["", "..", "../x.jpg", "a/../../x.jpg", "/x.jpg", "s3://b/x.jpg", "a\0b"]
UNSAFE += ["C:\\x.jpg", "c:x.jpg", "..\\x.jpg", "\\x.jpg", "a/..\\../x.jpg"]
SAFE = ["x.jpg", "a/b/x.jpg", "a/../x.jpg", "100%25 é.jpg", "日本 語.png", "a..b.jpg", "...jpg", "a#?.png", "~x.jpg"]


@pytest.mark.parametrize("name", UNSAFE)
def test_names_that_leave_the_folder(tmp_path, name):
    with pytest.raises(ImageError) as error:
        safe_join(str(tmp_path), name)
    assert error.value.code == "unsafe_path"


@pytest.mark.parametrize("name", SAFE)
def test_other_names_are_taken_as_they_are(tmp_path, name):
    assert not leaves_folder(name)
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "a").mkdir(exist_ok=True)
    save(path.parent, Image.fromarray(PIXELS), path.name, format="PNG")
    assert decode(safe_join(str(tmp_path), name), max_pixels=LIMIT).shape == (20, 30, 3)


def test_links_may_not_leave_the_folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    (folder / "inside.png").symlink_to(folder / "real.png")
    for name in ("link.png", "up/secret.png"):
        with pytest.raises(ImageError, match="leaves the image folder"):
            safe_join(str(folder), name)
    assert safe_join(str(folder), "inside.png").endswith("inside.png")
    (tmp_path / "other").symlink_to(folder)
    assert safe_join(str(tmp_path / "other"), "real.png")  # the folder itself may be a link


def test_a_folder_that_is_not_mounted_is_no_fault_of_its_images(tmp_path):
    """Else one node without the mount would reject its share of all boxes, and no later run would make up for it."""
    absent, empty, there = tmp_path / "absent", tmp_path / "empty", tmp_path / "there"
    empty.mkdir()
    there.mkdir()
    (there / "other.png").touch()
    for folder, reason in ((absent, "No such file or directory"), (empty, "it is empty")):
        with pytest.raises(StorageError, match=f"{folder}: images cannot be read .* on node .*: {reason}"):
            decode(str(folder / "x.png"), max_pixels=LIMIT, folder=str(folder))
    assert code(there / "x.png", folder=str(there)) == "missing_image"


@pytest.mark.parametrize(
    ("number", "lasts", "outcome"),
    [
        (errno.EIO, 2, "read"),  # it passes
        (errno.ESTALE, 99, "unreadable_image"),  # it stays, though the folder can be listed: the file's own
        (errno.EMFILE, 99, "stops"),
        (errno.ETIMEDOUT, 99, "stops"),
        (errno.EACCES, 99, "unreadable_image"),
    ],
)
def test_errors_of_the_machine_are_tried_again_and_reject_nothing(tmp_path, monkeypatch, number, lasts, outcome):
    path = save(tmp_path, Image.fromarray(PIXELS))
    read, tries, pauses = storage.read_bytes, [], []

    def fails(name):
        tries.append(name)
        if len(tries) <= lasts:
            raise StorageError(f"{name}: cannot read it") from OSError(number, "an error")
        return read(name)

    monkeypatch.setattr(storage, "read_bytes", fails)
    monkeypatch.setattr(images.time, "sleep", pauses.append)
    if outcome == "read":
        np.testing.assert_array_equal(decode(path, max_pixels=LIMIT, folder=str(tmp_path)), PIXELS)
        assert len(pauses) == lasts
    elif outcome == "stops":
        with pytest.raises(StorageError):
            decode(path, max_pixels=LIMIT, folder=str(tmp_path))
        assert len(pauses) == 3
    else:
        assert code(path, folder=str(tmp_path)) == outcome
        assert len(pauses) == (0 if number == errno.EACCES else 3)
