"""Maps, scores and positions of slabs brought back to a thin scan's own slices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ct.frame import Preprocessed, PreprocessSettings, preprocess_scan
from ct.settings import StandardiseSettings
from tests.helpers import synthetic_scan

N = 32


@pytest.fixture(scope="module")
def thin() -> Preprocessed:
    """A scan of 112 slices of 1.25 mm, four a slab; of 28 slabs the first three, the 15th and the last two are left."""
    scan = synthetic_scan(slices=112, size=48, spacing_mm=(1.25, 4.8, 4.8))[0]
    pre = preprocess_scan(scan, PreprocessSettings(StandardiseSettings(size=N)))
    kept = np.ones(28, bool)
    kept[[0, 1, 2, 14, 26, 27]] = False
    return replace(pre, kept=kept)


def middle(maps: np.ndarray) -> np.ndarray:
    """Of maps [S, H, W] the pixel in the middle, [S]."""
    return maps[:, 24, 24]


def test_what_is_not_kept_has_no_part_in_the_slices_beside_it(thin):
    """Border slices got a blend with fill, 11 of 30 HU and 1.25 of 2, and those beyond them what was left of it."""
    count, projected = thin.kept.sum(), thin.values_to_scan(thin.kept)
    assert projected.tolist() == np.repeat(thin.kept, 4).tolist()
    found = middle(thin.maps_to_scan(np.full((count, N, N), 30.0, np.float32), fill=-20.0))
    np.testing.assert_allclose(found[projected], 30, rtol=1e-6)
    assert (found[~projected] == -20).all()
    scores = thin.scores_to_scan(np.full(count, 2.0, np.float32))
    np.testing.assert_allclose(scores[projected], 2, rtol=1e-6)
    assert (scores[~projected] == 0).all()
    assert (middle(thin.maps_to_scan(np.ones((count, N, N), bool))) == projected).all()


def test_between_kept_slabs_maps_and_scores_are_interpolated(thin):
    """Slab k holds k: slices lie 3/8 and 1/8 below its centre and above it. Slab 14, amid others, takes that of 13."""
    values = np.flatnonzero(thin.kept).astype(np.float32)
    expected = (np.arange(112) - 1.5) / 4
    expected[12:14], expected[102:104], expected[54:56] = 3, 25, 13
    expected[60:62] = 15 - 2 * np.array([3, 1]) / 8           # 13 in place of 14
    projected = thin.values_to_scan(thin.kept)
    for found in (middle(thin.maps_to_scan(np.broadcast_to(values[:, None, None], (len(values), N, N)))),
                  thin.scores_to_scan(values)):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found[projected], expected[projected], rtol=1e-5)


def test_maps_of_other_slices_are_refused(thin):
    for count in (1, 21, 23, 28):
        with pytest.raises(ValueError, match=f"each of 22 kept slices, got {count}"):
            thin.maps_to_scan(np.zeros((count, N, N), np.float32))
        with pytest.raises(ValueError, match=f"each of 22 kept slices, got {count}"):
            thin.scores_to_scan(np.zeros(count, np.float32))


def test_every_slice_is_as_far_below_the_vertex_as_it_lies(thin):
    """The outermost slices had the distance of their slab's centre, 2 mm off."""
    vertex_mm = thin.slabs.scan.position_mm + thin.standardised.below_vertex_mm
    np.testing.assert_allclose(thin.below_vertex_mm(), vertex_mm[0] - np.arange(112) * 1.25)
    np.testing.assert_allclose(vertex_mm, vertex_mm[0])
