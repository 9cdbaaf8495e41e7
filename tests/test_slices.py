"""Folders of pictures: their order, and pixels that are not what they look like."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ct.scan import ScanError
from ct.slices import in_order, load_spec, natural_key
from tests.helpers import read_all
from tests.writers import write_scan_json, write_slice_folder

RNG = np.random.default_rng(4)
HU = RNG.integers(-1000, 600, (6, 10, 8)).astype(np.float32)


def order(*names):
    return [path.name for _, path in in_order([Path(name) for name in names])]


def test_signs_and_decimals_belong_to_the_number():
    assert order("5.0.png", "-60.0.png", "0.0.png", "-5.0.png") == ["-60.0.png", "-5.0.png", "0.0.png", "5.0.png"]
    assert order("z5.png", "z-60.png", "z0.png") == ["z-60.png", "z0.png", "z5.png"]
    assert order("2.5.png", "10.0.png", "5.0.png") == ["2.5.png", "5.0.png", "10.0.png"]
    assert order("im-0010.png", "im-0002.png") == ["im-0002.png", "im-0010.png"]
    assert order("s-3.png", "s-1.png", "s-2.png") == ["s-1.png", "s-2.png", "s-3.png"]


@pytest.mark.parametrize("names", [("a.png", "b.png"), ("IM-1-2.png", "IM-2-1.png"), ("z-60.png", "z-55.png"),
                                   ("slice1.png", "Slice2.png"), ("z-60.0.png", "z-55.0.png"),
                                   ("slice-0.0.png", "slice-2.5.png", "slice-5.0.png"),
                                   ("head-0.0.png", "head-5.0.png", "head-10.0.png"),
                                   ("t-1.0.png", "t-2.0.png", "t-3.0.png"), ("p-12.5mm.png", "p-15.0mm.png"),
                                   ("h-05-z-60.png", "h-05-z-55.png"), ("-5.0-3.png", "-5.0-6.png"),
                                   ("z-5.0-001.png", "z-10.0-002.png"),
                                   ("z5.0-001.png", "z0.0-002.png", "z-5.0-003.png"), ("z-1.0.png", "z-1.5.png"),
                                   ("z-0.060.png", "z-0.055.png")])
def test_names_without_an_order_are_refused(names):
    with pytest.raises(ScanError, match="no order|sign"):
        order(*names)


@pytest.mark.parametrize("name", ["Head-5.0-H31s-{:03d}", "scan-3.0mm-{:02d}", "scan-3.0mm-{}", "-5.0mm-{:03d}",
                                  "s-{:03d}.5"])
def test_a_dash_before_a_counter_is_no_sign(name):
    """A decimal elsewhere in the name turned heads upside down."""
    names = [f"{name.format(k)}.png" for k in range(1, 12)]
    assert order(*names[::-1]) == names


@pytest.mark.parametrize("name", ["img-{}", "2024-03-05-{}", "patient-05_img-{}", "Image-{:04d}.00", "IM-0001-{}",
                                  "s-1.{}", "CT-1.2.840.113.{}", "s-{}."])
def test_a_counter_with_gaps_is_one(name):
    names = [f"{name.format(k)}.png" for k in range(1, 30) if k not in (7, 9)]
    assert order(*names[::-1]) == names


@pytest.mark.parametrize("name", ["z{:06.1f}", "z{:05.1f}", "z{:07.2f}"])
@pytest.mark.parametrize("step", [2.5, 5.0])
def test_padded_positions_with_a_dash_are_refused(name, step):
    """z-060.0 to z-012.5 were taken from the last to the first, as if padded numbers only counted."""
    with pytest.raises(ScanError, match="sign"):
        order(*(f"{name.format(-60 + step * k)}.png" for k in range(10)))


@pytest.mark.parametrize("name", ["img{0:03d}_z-{1}", "{0:03d}_z-{1:.1f}", "{0:03d}_-{1:.2f}", "img{0:03d}_z-{0:03d}"])
def test_a_number_without_a_dash_tells_the_order(name):
    names = [f"{name.format(k, 200 - 5 * k)}.png" for k in range(1, 31)]
    assert order(*names[::-1]) == names


@pytest.mark.parametrize("value", ["1" + 400 * "0", "-1" + 400 * "0", "NaN", "1e999"])
@pytest.mark.parametrize("key", ["windows_hu", "clipped_hu", "slice_spacing_mm", "pixel_spacing_mm"])
def test_numbers_that_no_float_holds_are_refused(tmp_path, key, value):
    """An integer of 400 digits in one scan.json ended the run for all scans."""
    texts = {"windows_hu": "[[-20, 100]]", "slice_spacing_mm": "5", "pixel_spacing_mm": "null",
             "order": '"inferior-to-superior"', key: {"windows_hu": f"[[-20, {value}]]",
                                                      "clipped_hu": f"[0, {value}]"}.get(key, value)}
    (tmp_path / "scan.json").write_text("{" + ", ".join(f'"{name}": {text}' for name, text in texts.items()) + "}")
    with pytest.raises(ScanError, match=f"scan.json: '{key}' must be"):
        load_spec(tmp_path / "scan.json")


def test_names_with_any_digits_have_a_key():
    """A superscript is a digit, but no number: int() ended the run."""
    assert sorted([Path("x²10.png"), Path("x²5.png"), Path("².png")], key=natural_key) == [
        Path("x²5.png"), Path("x²10.png"), Path("².png")]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-500, 500), min_size=2, max_size=30, unique=True), st.sampled_from(["", "z", "pos_"]))
def test_slices_come_in_the_order_of_their_positions(positions, prefix):
    names = [f"{prefix}{mm / 2:.1f}.png" for mm in positions]
    try:
        found = order(*names)
    except ScanError:
        return
    wanted = [f"{prefix}{mm / 2:.1f}.png" for mm in sorted(positions)]
    assert found == wanted


def test_pictures_are_turned_as_exif_says(tmp_path):
    grey = np.zeros((16, 24), np.uint8)
    grey[4:8, 2:9] = 200
    exif = Image.Exif()
    exif[0x0112] = 2                                              # mirrored left to right
    (tmp_path / "case").mkdir()
    Image.fromarray(grey[:, ::-1]).save(tmp_path / "case" / "0.jpg", quality=95, exif=exif)
    write_scan_json(tmp_path / "case", [[0, 100]])
    scan, = read_all(tmp_path)
    assert scan.hu[0, 5, 5] > 70 and scan.hu[0, 5, -6] < 5


def test_what_is_transparent_is_outside_and_inverted_is_refused(tmp_path):
    rgba = np.full((1, 8, 8, 4), 255, np.uint8)
    rgba[0, :, :, 3] = 0
    rgba[0, 2:6, 2:6] = (128, 128, 128, 255)
    (tmp_path / "case").mkdir()
    Image.fromarray(rgba[0]).save(tmp_path / "case" / "0.png")
    write_scan_json(tmp_path / "case", [[0, 255]])
    scan, = read_all(tmp_path)
    assert scan.hu[0, 0, 0] == 0 and scan.hu[0, 3, 3] == 128
    Image.fromarray(255 - scan.hu[0].astype(np.uint8)).save(tmp_path / "case" / "0.png")
    with pytest.raises(ScanError, match="white at their border"):
        read_all(tmp_path)


def test_twelve_bits_in_sixteen_are_refused_and_a_byte_order_mark_is_read(tmp_path):
    folder = write_slice_folder(tmp_path / "case", HU, (-1024, 3071), bits=16)
    path = folder / "scan.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    np.testing.assert_allclose(read_all(tmp_path)[0].hu, HU, atol=0.05)
    for k in range(6):
        twelve = (HU[k] + 1024).astype(np.uint16)
        Image.fromarray(twelve).save(folder / f"{k}.png")
    with pytest.raises(ScanError, match="12-bit values"):
        read_all(tmp_path)
