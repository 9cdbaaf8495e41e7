"""Pictures of slices: an overlay's panels, each reduced by itself, and PNG without Pillow's slow packing."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ct.picture import FILTER, grey, mark, overlay_panels, residual_colours, save_png, square_shape


def whole(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((width, height), FILTER)).astype(int)


@pytest.mark.parametrize("shape, side, reduced", [((97, 130), 60, (45, 60)), ((40, 30), 360, (40, 30))])
def test_an_overlay_is_its_four_pictures_each_reduced_by_itself(shape, side, reduced):
    rng = np.random.default_rng(0)
    query, normal = rng.uniform(-10, 90, (2, *shape)).astype(np.float32)
    residual, lesion = np.zeros(shape, np.float32), np.zeros(shape, bool)
    residual[5:30, 3:28], lesion[12:25, 8:20] = rng.normal(0, 20, (25, 25)), True
    lesion[-1, -1] = residual[0, -1] = 1                               # up to the picture's edges
    found = np.asarray(overlay_panels(query, normal, residual, lesion, side)).astype(int)
    assert found.shape == (reduced[0], 4 * reduced[1], 3)
    pictures = [np.repeat(grey(query)[..., None], 3, -1), np.repeat(grey(normal)[..., None], 3, -1),
                residual_colours(residual), mark(query, lesion, side)]
    for panel, picture in zip(np.split(found, 4, axis=1), pictures):
        assert np.abs(panel - whole(picture, *reduced[::-1])).max() <= 1      # a part's filter rounds by itself
    assert (found[:, 3 * reduced[1]:] != found[:, :reduced[1]]).any()


@pytest.mark.parametrize("spacing_mm, shape", [
    (None, (40, 30)), ((0.5, 0.5), (40, 30)), ((0.504, 0.5), (40, 30)), ((1.0, 0.5), (80, 30)),
    ((0.5, 1.25), (40, 75))])
def test_square_pixels_are_as_fine_as_the_finer_side(spacing_mm, shape):
    assert square_shape((40, 30), spacing_mm) == shape


@pytest.mark.parametrize("spacing_mm, side, panel", [((1.0, 0.5), 360, (128, 128)), ((0.5, 1.0), 360, (64, 256)),
                                                     ((0.5, 1.0), 64, (16, 64)), ((1.0, 1.0), 360, (64, 128))])
def test_a_disc_is_as_wide_as_high_whatever_the_pixels(spacing_mm, side, panel):
    """Pixels of 2:1 were shown as square: a head was twice as long as wide."""
    row, column = np.mgrid[:64, :128]
    disc = ((row - 31.5) * spacing_mm[0]) ** 2 + ((column - 63.5) * spacing_mm[1]) ** 2 < 12.0 ** 2
    hu = np.where(disc, 80, 0).astype(np.float32)
    found = np.asarray(overlay_panels(hu, hu, hu, disc, side, spacing_mm)).astype(int)
    assert found.shape == (panel[0], 4 * panel[1], 3)
    scale = panel[0] / (64 * spacing_mm[0])                                    # pixels of the picture per mm
    for shown in np.split(found.max(-1), 4, axis=1):
        for axis in (0, 1):
            assert abs(np.ptp(np.flatnonzero((shown > 100).any(axis))) + 1 - 24 * scale) <= 2
    expected = whole(mark(hu, disc, side), *panel[::-1])
    assert np.abs(found[:, 3 * panel[1]:] - expected).max() <= 1               # a part reaches as far as its filter


def test_the_filter_of_an_enlarged_part_reaches_as_far_as_a_pixel_of_the_slice():
    """Eight pixels of the picture, of pixels of 8:1: the blend beside what is marked was cut off."""
    hu, lesion = np.full((9, 40), 40, np.float32), np.zeros((9, 40), bool)
    lesion[4, 20] = True
    found = np.asarray(overlay_panels(hu, hu, hu * 0, lesion, 360, (4.0, 0.5))).astype(int)
    assert np.abs(found[:, 3 * 40:] - whole(mark(hu, lesion), 40, 9 * 8)).max() <= 1


def test_what_is_unmarked_looks_like_the_query():
    query = np.random.default_rng(1).uniform(0, 80, (20, 20)).astype(np.float32)
    row = np.asarray(overlay_panels(query, query, np.zeros_like(query), np.zeros(query.shape, bool), 20))
    _, normal, residual, marked = np.split(row, 4, axis=1)
    assert (marked == normal).all() and not residual.any()


def test_grey_is_rounded_within_the_window():
    assert grey(np.array([-5.0, 0.0, 40.0, 80.0, 500.0])).tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("shape", [(1, 1, 3), (7, 5, 3)])
def test_a_png_opens_as_what_was_saved(shape, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    save_png(tmp_path / "a.png", picture)
    with Image.open(tmp_path / "a.png") as opened:
        assert (opened.format, opened.mode) == ("PNG", "RGB")
        np.testing.assert_array_equal(np.asarray(opened), picture)         # and its checksums hold
