"""Pixels of PNG and JPEG files in every mode, decoded in a process of their own."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ct import decoder_process
from ct.picture_pixels import read_pixels
from ct.scan import ScanError

RNG = np.random.default_rng(6)
GREY = RNG.integers(0, 256, (5, 7)).astype(np.uint8)
RGB = RNG.integers(0, 256, (5, 7, 3)).astype(np.uint8)
DEEP = RNG.integers(0, 65536, (5, 7)).astype(np.uint16)
PALETTE = RNG.integers(0, 256, (256, 3)).astype(np.uint8)
ALPHA = np.where(RNG.random((5, 7)) < 0.3, 0, RNG.integers(1, 256, (5, 7))).astype(np.uint8)
INDEXED = Image.fromarray(GREY)
INDEXED.putpalette(PALETTE.tobytes())
TURN_RIGHT = Image.Exif()
TURN_RIGHT[0x0112] = 6
CASES = {                                             # image, how it is saved, pixels, transparent, full scale
    "L": (Image.fromarray(GREY), {}, GREY, None, 255),
    "RGB": (Image.fromarray(RGB), {}, RGB, None, 255),
    "I;16": (Image.fromarray(DEEP), {}, DEEP, None, 65535),
    "P": (INDEXED, {}, PALETTE[GREY], None, 255),
    "LA": (Image.fromarray(np.dstack([GREY, ALPHA])), {}, GREY, ALPHA == 0, 255),
    "LA, opaque": (Image.fromarray(np.dstack([GREY, ALPHA | 1])), {}, GREY, None, 255),
    "RGBA": (Image.fromarray(np.dstack([RGB, ALPHA])), {}, RGB, ALPHA == 0, 255),
    "L, one value transparent": (Image.fromarray(GREY), {"transparency": int(GREY[2, 3])}, GREY, GREY == GREY[2, 3],
                                 255),
    "P, one value transparent": (INDEXED, {"transparency": int(GREY[2, 3])}, PALETTE[GREY], GREY == GREY[2, 3], 255),
    "RGB, one colour transparent": (Image.fromarray(RGB), {"transparency": tuple(map(int, RGB[2, 3]))}, RGB,
                                    (RGB == RGB[2, 3]).all(-1), 255),
    "turned by EXIF": (Image.fromarray(RGB), {"exif": TURN_RIGHT}, np.rot90(RGB, -1), None, 255),
}


@pytest.mark.parametrize("name", CASES)
def test_every_mode_of_png_to_the_bit(name, tmp_path):
    image, how, pixels, transparent, full = CASES[name]
    image.save(tmp_path / "a.png", **how)
    found, outside, scale = read_pixels(tmp_path / "a.png", 1)
    np.testing.assert_array_equal(found, pixels)
    assert found.dtype.itemsize == pixels.dtype.itemsize and scale == full
    assert outside is None if transparent is None else (outside == transparent).all()


@pytest.mark.parametrize("pixels", [GREY, RGB])
def test_jpeg_as_pillow_decodes_it(pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=90)
    found, outside, scale = read_pixels(tmp_path / "a.jpg", 1)
    with Image.open(tmp_path / "a.jpg") as opened:
        np.testing.assert_array_equal(found, np.asarray(opened))
    assert (outside, scale) == (None, 255)


@pytest.mark.parametrize("name, image, kind, words", [
    ("a.png", Image.fromarray(GREY > 100), "PNG", "picture mode 1 is neither grey"),
    ("a.jpg", Image.fromarray(RGB).convert("CMYK"), "JPEG", "picture mode CMYK is neither grey"),
    ("a.png", Image.fromarray(GREY), "WEBP", "neither PNG nor JPEG")])
def test_other_pictures_are_refused(name, image, kind, words, tmp_path):
    image.save(tmp_path / name, kind)
    with pytest.raises(ScanError, match=words):
        read_pixels(tmp_path / name, 1)


@pytest.mark.parametrize("number", decoder_process.SIGNALS)
def test_a_signal_for_the_program_leaves_the_process_as_it_is(number, tmp_path):
    """systemd sends SIGTERM to all processes of a service: the end of this one was taken for a damaged file."""
    Image.fromarray(GREY).save(tmp_path / "good.png")
    read_pixels(tmp_path / "good.png", 1)
    decoder_process._worker.send_signal(number)
    np.testing.assert_array_equal(read_pixels(tmp_path / "good.png", 1)[0], GREY)


def test_a_damaged_picture_leaves_the_process_as_it_is(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:50])       # within its pixels
    read_pixels(tmp_path / "good.png", 1)
    process = decoder_process._worker
    with pytest.raises(ScanError, match=r"cut.png: cannot be read as a picture \(\w+: damaged, truncated"):
        read_pixels(tmp_path / "cut.png", 1)
    np.testing.assert_array_equal(read_pixels(tmp_path / "good.png", 1)[0], GREY)
    assert decoder_process._worker is process and process.poll() is None
