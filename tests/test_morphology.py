"""Discs by shifted rows and hulls by rows: equal, pixel by pixel, to what scipy and scikit-image find the long way."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from skimage.morphology import convex_hull_image

from ct.morphology import box, closed, dilate, erode, filled, hull, opened

RADII = (0.5, 1.0, 1.5, 2.0, 4.0, 6.14, 6.5, 9.0)


def blobs(seed: int, slices: int = 3) -> np.ndarray:
    """Masks of several parts with holes, bool [slices, 41, 33]; some touch the edge."""
    noise = np.random.default_rng(seed).normal(size=(slices, 41, 33))
    return ndimage.gaussian_filter(noise, (0, 2, 2)) > 0.02


def picture(*rows: str) -> np.ndarray:
    return np.array([[c == "#" for c in row] for row in rows])


def test_a_disc_of_radius_two_hand_drawn():
    point = np.zeros((7, 7), bool)
    point[3, 3] = True
    disc = picture(".......", "...#...", "..###..", ".#####.", "..###..", "...#...", ".......")
    np.testing.assert_array_equal(dilate(point, 2.0), disc)
    np.testing.assert_array_equal(dilate(point, 1.99), picture(
        ".......", ".......", "..###..", "..###..", "..###..", ".......", "......."))
    np.testing.assert_array_equal(erode(disc, 2.2), point)                # its nearest unset pixels are sqrt(5) away
    assert not erode(disc, 2.24).any()
    np.testing.assert_array_equal(erode(dilate(point, 1.0), 1.0), point)
    assert not erode(np.pad(np.ones((1, 1), bool), 3), 1.0).any()         # further than the radius, not as far


@pytest.mark.parametrize("radius", RADII)
def test_dilation_and_erosion_equal_the_distance_transform(radius):
    masks = blobs(0)
    for image, wide, narrow in zip(masks, dilate(masks, radius), erode(masks, radius)):
        np.testing.assert_array_equal(wide, ndimage.distance_transform_edt(~image) <= radius)
        np.testing.assert_array_equal(narrow, ndimage.distance_transform_edt(image) > radius)


def test_slices_and_rows_do_not_run_into_each_other():
    masks = np.zeros((2, 5, 6), bool)
    masks[0, -1, -1] = masks[1, 2, 0] = True
    wide = dilate(masks, 3.0)
    assert not wide[1, :, 4:].any() and not wide[0, :1].any() and not wide[0, :, :2].any()
    assert wide[0, -1, 2:].all() and wide[1, 2, :4].all()


def test_nothing_set_and_nothing_unset():
    empty, full = np.zeros((4, 5), bool), np.ones((4, 5), bool)
    assert not dilate(empty, 3.0).any() and erode(full, 3.0).all()
    assert not hull(empty).any() and filled(full).all() and not filled(empty).any()
    assert full[box(empty)].shape == (4, 5)


def test_closing_bridges_a_gap_and_opening_cuts_a_neck():
    bars = picture("###..###", "###..###", "###..###")
    assert closed(bars, 2.0)[1].all()
    rooms = picture("#####.....#####", "#####.....#####", "###############", "#####.....#####", "#####.....#####")
    neck = opened(np.pad(rooms, 2), 1.0)[4, 2:-2]                         # a disc of five pixels reaches one into it
    np.testing.assert_array_equal(neck, [True] * 6 + [False] * 3 + [True] * 6)


def test_holes_are_what_no_path_joins_to_the_edge():
    ring = picture(".####", ".#..#", ".#..#", ".####", ".....")
    np.testing.assert_array_equal(filled(ring), picture(".####", ".####", ".####", ".####", "....."))
    diagonal = picture("..#..", ".#.#.", "#...#", ".#.#.", "..#..")                 # corners close it
    assert filled(diagonal)[1:4, 2].all()
    for image in blobs(1):
        np.testing.assert_array_equal(filled(image), ndimage.binary_fill_holes(image))


@pytest.mark.parametrize("seed", range(8))
def test_hull_equals_scikit_image(seed):
    for image in blobs(seed, slices=4) & (np.random.default_rng(seed).random((4, 41, 33)) < 0.02):
        np.testing.assert_array_equal(hull(image), convex_hull_image(image))


def test_hull_of_one_pixel_one_row_and_one_column():
    for where in ((slice(3, 4), slice(2, 3)), (slice(3, 4), slice(1, 6)), (slice(1, 6), slice(4, 5))):
        mask = np.zeros((8, 8), bool)
        mask[where] = True
        np.testing.assert_array_equal(hull(mask), mask)


def test_box_holds_the_mask_and_its_margin_within_the_picture():
    mask = np.zeros((9, 9), bool)
    mask[4:6, 7] = True
    assert box(mask) == (slice(4, 6), slice(7, 8))
    assert mask[box(mask, margin=3)].shape == (8, 5)
