"""Pictures of slices: an overlay's panels, each reduced by itself, and PNG without Pillow's slow packing."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ct.picture import FILTER, grey, mark, overlay_panels, residual_colours, save_png


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
