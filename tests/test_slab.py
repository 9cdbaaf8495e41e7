from __future__ import annotations

import numpy as np
import pytest

from ct.scan import Scan, ScanError
from ct.slab import to_slabs


def _scan(values, positions, brain=None):
    hu = np.broadcast_to(np.asarray(values, np.float32)[:, None, None], (len(values), 2, 3)).copy()
    return Scan("s", hu, np.asarray(positions, np.float64), brain=brain)


def test_thick_scans_pass_unchanged():
    scan = _scan([1, 2, 3], [0, 4, 11])
    slabs = to_slabs(scan)
    maps = np.arange(18).reshape(3, 2, 3)
    assert slabs.scan is scan and slabs.from_slabs(maps) is maps


def test_single_slice_and_thin_slabs_pass_unchanged():
    single, fine = _scan([1], [0]), _scan([1, 2], [0, 3])
    assert to_slabs(single).scan is single
    assert to_slabs(fine, slab_mm=2.0).scan is fine                    # nothing to average


def test_overlap_weights_hand_computed():
    # slices reach -1..1, 1..3, 3..5, 5..7, 7..9; slabs from the top: 4..9, -1..4
    slabs = to_slabs(_scan([0, 10, 20, 30, 40], [0, 2, 4, 6, 8]))
    low = (2 * 0 + 2 * 10 + 1 * 20) / 5
    high = (1 * 20 + 2 * 30 + 2 * 40) / 5
    np.testing.assert_allclose(slabs.scan.hu[:, 0, 0], [low, high], rtol=1e-6)
    np.testing.assert_allclose(slabs.scan.position_mm, [low / 5, high / 5])   # here HU is 5 times the position
    assert slabs.scan.hu.dtype == np.float32 and slabs.scan.hu.shape == (2, 2, 3)


def test_uneven_spacing_weighs_by_millimetres():
    # slices reach -0.5..0.5, 0.5..1.5, 1.5..2.75 and 3.75..5.25: a gap counts as 1.5 times the median step at most
    slabs = to_slabs(_scan([0, 0, 0, 100], [0, 1, 2, 4.5]), slab_mm=6.0)
    np.testing.assert_allclose(slabs.scan.hu[:, 0, 0], [100 * 1.5 / (1.5 + 1.25 + 1 + 1)], rtol=1e-6)
    slabs = to_slabs(_scan([0, 0, 0, 100], [0, 1, 2, 4.5]), slab_mm=5.0)              # the lowest 0.75 mm fall off
    np.testing.assert_allclose(slabs.scan.hu[:, 0, 0], [100 * 1.5 / (1.5 + 1.25 + 1 + 0.25)], rtol=1e-6)


def test_gap_of_missing_slices_makes_no_slab():
    positions = np.concatenate([np.arange(0, 10), np.arange(40, 50)]).astype(float)
    slabs = to_slabs(_scan(np.where(positions < 20, 10, 50), positions))
    assert set(slabs.scan.hu[:, 0, 0].tolist()) == {10.0, 50.0} and len(slabs.scan.hu) == 4
    assert (np.diff(slabs.scan.position_mm) > 0).all()


def test_scattered_slices_still_give_slabs():
    assert len(to_slabs(_scan([1, 1, 1, 1], [0, 0.5, 1, 30])).scan.hu) >= 1


def test_maps_go_back_linearly_and_bool_to_the_nearest():
    slabs = to_slabs(_scan([0, 10, 20, 30, 40], [0, 2, 4, 6, 8]))             # slab centres 1.6 and 6.4
    maps = np.stack([np.zeros((2, 3), np.float32), np.full((2, 3), 4.8, np.float32)])
    np.testing.assert_allclose(slabs.from_slabs(maps)[:, 0, 0], [0, 0.4, 2.4, 4.4, 4.8], atol=1e-5)
    back = slabs.from_slabs(maps > 1)
    assert back.dtype == bool and back[:, 0, 0].tolist() in ([False, False, False, True, True],
                                                             [False, False, True, True, True])
    assert slabs.from_slabs(maps.astype(np.uint8)).dtype == np.float32
    with pytest.raises(ValueError, match="expected 2 maps, one a slab, got 5"):
        slabs.from_slabs(np.zeros((5, 2, 3)))


def test_linear_ramp_survives_there_and_back():
    z = np.arange(0, 100, 1.25)
    slabs = to_slabs(_scan(z, z))
    assert np.allclose(np.diff(slabs.scan.position_mm), 5)
    np.testing.assert_allclose(slabs.from_slabs(slabs.scan.hu)[4:-4, 0, 0], z[4:-4], atol=1e-4)


def test_given_brain_mask_is_averaged_too():
    brain = np.zeros((5, 2, 3), bool)
    brain[3:] = True                                                            # 4 of the 5 mm of the upper slab
    assert to_slabs(_scan([0] * 5, [0, 2, 4, 6, 8], brain)).scan.brain[:, 0, 0].tolist() == [False, True]


def test_slab_mm_must_be_positive():
    with pytest.raises(ScanError, match="--slab-mm must be above 0, got 0"):
        to_slabs(_scan([0, 1], [0, 1]), slab_mm=0)
