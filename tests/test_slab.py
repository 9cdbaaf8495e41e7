from __future__ import annotations

import numpy as np
import pytest

from ct.scan import Scan, ScanError
from ct.slab import _thick, slice_thickness_mm, to_slabs
from ct.whole_head import _thickness_mm
from detect.calibration import share_outside
from detect.scores import thickness_mm


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
    # slices reach -0.5..0.5, 0.5..1.5, 1.5..2.75 and 3.25..5.75: no farther than as if the one neighbour were 1.5 times
    # as far as the other
    slabs = to_slabs(_scan([0, 0, 0, 100], [0, 1, 2, 4.5]), slab_mm=6.0)              # the lowest 0.25 mm fall off
    np.testing.assert_allclose(slabs.scan.hu[:, 0, 0], [100 * 2.5 / (2.5 + 1.25 + 1 + 0.75)], rtol=1e-6)
    slabs = to_slabs(_scan([0, 0, 0, 100], [0, 1, 2, 4.5]), slab_mm=5.0)              # and 1.25 mm
    np.testing.assert_allclose(slabs.scan.hu[:, 0, 0], [100 * 2.5 / (2.5 + 1.25 + 0.75)], rtol=1e-6)
    assert slabs.covered.tolist() == [False, True, True, True]


def test_gap_of_missing_slices_makes_no_slab():
    positions = np.concatenate([np.arange(0, 10), np.arange(40, 50)]).astype(float)
    slabs = to_slabs(_scan(np.where(positions < 20, 10, 50), positions))
    assert set(slabs.scan.hu[:, 0, 0].tolist()) == {10.0, 50.0} and len(slabs.scan.hu) == 4
    assert (np.diff(slabs.scan.position_mm) > 0).all()


def test_a_slice_far_from_all_others_is_a_slab_of_its_own():
    slabs = to_slabs(_scan([1, 1, 1, 7], [0, 0.5, 1, 30]))
    np.testing.assert_allclose(slabs.scan.hu[:, 0, 0], [1, 7], rtol=1e-6)
    np.testing.assert_allclose(slabs.scan.position_mm, [(0.5 * 0.5 + 0.625 * 1) / 1.625, 30])


@pytest.mark.parametrize("touching", [True, False])
@pytest.mark.parametrize("fine, coarse", [(1.25, 5.0), (0.625, 5.0), (2.0, 6.0), (2.5, 7.5), (3.75, 8.0), (3.75, 10.0),
                                          (2.5, 5.0), (2.5, 4.5)])
def test_thick_slices_above_thin_ones_stay_as_they_are(fine, coarse, touching):
    """As many old protocols have them: a thin base and thick slices above. Each shows its own number.

    The first thick slice, where it touches the last thin one, was averaged with it: it is less than 4 mm away.
    """
    base = np.arange(0, 40, fine)
    first = base[-1] + ((fine + coarse) / 2 if touching else coarse)
    positions = np.concatenate([base, first + coarse * np.arange(9)])
    values = np.where(np.arange(len(positions)) < len(base), 1.0, 100.0 + np.arange(len(positions)))
    assert _thick(positions, 4.0).tolist() == [False] * len(base) + [True] * 9
    slabs = to_slabs(_scan(values, positions))
    shown = slabs.scan.hu[:, 0, 0]
    assert shown[-9:].tolist() == values[-9:].tolist()
    np.testing.assert_allclose(shown[:-9], 1.0, rtol=1e-6)
    np.testing.assert_array_equal(slabs.scan.position_mm[-9:], positions[-9:])
    assert 7 <= len(shown) - 9 <= 9 and (np.diff(slabs.scan.position_mm) > 0).all()
    np.testing.assert_allclose(slabs.from_slabs(slabs.scan.hu)[-9:, 0, 0], values[-9:])


def test_thick_slices_below_and_around_thin_ones_stay_as_they_are():
    def shown(steps):
        positions = np.concatenate([[0.0], np.cumsum(steps)])
        return to_slabs(_scan(np.arange(len(positions)), positions)).scan.hu[:, 0, 0].tolist()

    thin, thick = [2.5] * 9, [5.0] * 5
    assert shown([*thick, 3.75, *thin])[:6] == [0, 1, 2, 3, 4, 5] and len(shown([*thick, 3.75, *thin])) == 11
    both = shown([*thick, 3.75, *thin, 3.75, *thick])
    assert both[:6] == [0, 1, 2, 3, 4, 5] and both[-6:] == [16, 17, 18, 19, 20, 21] and len(both) == 17
    assert shown([*thin, 3.75, 5.0, 3.75, *thin])[5:7] == [10, 11]
    single = np.cumsum([0, *thin, 3.75, 3.75, *thin])                    # stands for 3.75 mm, as far as steps tell
    assert not _thick(single, 4.0).any()


@pytest.mark.parametrize("steps", [[2.5, 5.0], [2.5, 7.5], [1.0, 3.0, 5.0], [1.25, 2.5, 2.5], [3.0, 3.0, 6.0]])
def test_thin_slices_beside_missing_ones_stay_thin(steps):
    fine = steps[0]
    positions = np.concatenate([[0.0], np.cumsum([*[fine] * 10, *steps[1:], *[fine] * 10])])
    assert not _thick(positions, 4.0).any() and not _thick(-positions[::-1], 4.0).any()


@pytest.mark.parametrize("count", [18, 19, 20, 21])
def test_one_slice_more_or_less_does_not_decide_on_thin_slices(count):
    """With 17 of 2.5 mm the median spacing of 20 or more of 5 mm was 5, and nothing was averaged."""
    positions = np.concatenate([2.5 * np.arange(17), 43.75 + 5.0 * np.arange(count)])
    slabs = to_slabs(_scan(np.arange(17 + count), positions))
    assert slabs.scan.hu[-count:, 0, 0].tolist() == [*range(17, 17 + count)] and len(slabs.scan.hu) == 9 + count
    np.testing.assert_array_equal(slabs.from_slabs(slabs.scan.hu)[-count:], slabs.scan.hu[-count:])
    assert share_outside(-slabs.scan.position_mm, 4.0, 6.25) < 0.1


@pytest.mark.parametrize("step_mm", [0.4, 0.625, 1.0, 1.25, 2.0, 2.4, 2.5, 3.0, 3.2, 3.75, 3.9, 4.0, 5.0, 6.25])
@pytest.mark.parametrize("height_mm", [130.0, 137.0])
def test_a_scan_of_one_spacing_has_one(step_mm, height_mm):
    """Slabs of slices that do not divide them lie unevenly, by their means."""
    positions = np.arange(0, height_mm, step_mm)
    below_mm = -to_slabs(_scan(np.zeros(len(positions)), positions)).scan.position_mm
    for missing in (0, 1, 2):
        assert share_outside(np.delete(below_mm, slice(9, 9 + missing)), 3.99, 6.26) < 0.1


def test_fine_and_finer_slices_keep_their_millimetres():
    """Ten slices 0.5 mm apart below eight 3 mm apart, which reach up to 30 mm."""
    positions = np.concatenate([0.5 * np.arange(10), 4.5 + 3.0 * np.arange(1, 9)])
    slabs = to_slabs(_scan(np.where(positions < 5, 0, positions), positions))
    np.testing.assert_allclose(slabs.scan.hu[-2:, 0, 0], [(1 * 25.5 + 3 * 22.5 + 1 * 19.5) / 5,
                                                          (3 * 28.5 + 2 * 25.5) / 5], rtol=1e-6)
    assert len(slabs.scan.hu) == 6 and slabs.covered.all()


def test_every_slice_is_in_a_slab_but_for_less_than_half_a_slab_at_the_bottom():
    rng = np.random.default_rng(0)
    for _ in range(300):
        steps = np.concatenate([np.full(rng.integers(1, 30), rng.choice([0.6, 1, 1.25, 2.5, 3.75, 5, 7, 10]))
                                for _ in range(3)])
        steps[rng.integers(len(steps))] *= rng.integers(1, 8)                          # or slices are missing
        positions = np.concatenate([[0], np.cumsum(steps)])
        slabs = to_slabs(_scan(np.zeros(len(positions)), positions))
        assert (np.diff(slabs.scan.position_mm) > 0).all()
        lost = np.flatnonzero(~slabs.covered)
        assert lost.tolist() == list(range(len(lost))) and (not len(lost) or positions[lost[-1]] < 2.5)


def test_a_slice_in_no_slab_is_not_said_to_be_seen():
    slabs = to_slabs(_scan(np.zeros(52), np.arange(52.0)))                             # two of 52 mm are left over
    assert slabs.covered.tolist() == [False] * 2 + [True] * 50 and len(slabs.scan.hu) == 10
    back = slabs.from_slabs(np.ones((10, 2, 3), bool))
    assert not back[:2].any() and back[2:].all()


def test_a_slice_of_which_a_slab_holds_a_rest_is_not_said_to_be_seen():
    """One of 2.4 mm, of which 0.4 were in the lowest slab, was 'projected'."""
    slabs = to_slabs(_scan([100, 0, 0, 0, 0], 2.4 * np.arange(5)))                     # 12 mm: 2 are left over
    assert slabs.made_of[0].tolist() == [True, True, True, False, False]
    assert slabs.covered.tolist() == [False, True, True, True, True]
    back = slabs.from_slabs(np.ones((2, 2, 3), bool))
    assert not back[0].any() and back[1:].all()


def test_a_slice_above_a_gap_is_not_lost_for_its_edge_in_another_slab():
    """A slab that slices cover by less than half was dropped, though all but an edge of one lay there."""
    slabs = to_slabs(_scan([0, 0, 100, 0, 0], [0.0, 3.0, 10.0, 12.0, 14.5]))
    np.testing.assert_allclose(slabs.scan.hu[:, 0, 0], [0, 100, 100 * 0.25 / 5], rtol=1e-6)
    assert slabs.covered[1:].all()


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


def test_what_a_slice_beside_a_gap_stands_for():
    """The gap from 10 to 30 mm counts whole for a score and the brain's volume, 20 / 2 + 5 / 2, and for what is marked
    as 1.5 times the steps beside it, 7.5 / 2 + 5 / 2."""
    position = np.array([0.0, 5, 10, 30, 35, 40])
    across, short = [5, 5, 12.5, 12.5, 5, 5], [5, 5, 6.25, 6.25, 5, 5]
    assert slice_thickness_mm(position).tolist() == slice_thickness_mm(-position).tolist() == short
    assert slice_thickness_mm(position, across_gaps=True).tolist() == across
    assert thickness_mm(position).tolist() == thickness_mm((50 - position).tolist()).tolist() == across
    assert _thickness_mm(_scan([0] * 6, position)).tolist() == across


def test_linear_ramp_survives_there_and_back():
    z = np.arange(0, 100, 1.25)
    slabs = to_slabs(_scan(z, z))
    assert np.allclose(np.diff(slabs.scan.position_mm), 5)
    np.testing.assert_allclose(slabs.from_slabs(slabs.scan.hu)[4:-4, 0, 0], z[4:-4], atol=1e-4)


@pytest.mark.parametrize("step_mm, count, made, averaged", [
    (4.0, 36, 36, False), (2.5, 61, 31, True), (1.25, 118, 30, True), (0.625, 236, 30, True)])
def test_tilt_and_offset_do_not_change_the_slabs(step_mm, count, made, averaged):
    """At borders the last digits of floats decided: whether 4 mm are thick, and half a slab at the bottom one."""
    rng = np.random.default_rng(0)
    for digits in (1, 3, 6):
        tilts = np.zeros(10) if digits == 1 else np.deg2rad(rng.uniform(0, 25, 10))
        for tilt, offset in zip(tilts, rng.uniform(-900, 100, 10)):
            normal = np.array([0, np.sin(tilt), np.cos(tilt)])
            first, along = np.array([-115, -115, np.round(offset, 1)]), step_mm * np.arange(count)[:, None]
            origins = np.round(first + along * normal, max(digits, 3))     # as the header of a DICOM file has them
            slabs = to_slabs(_scan(np.zeros(count), origins @ np.round(normal, 6)))
            exact = to_slabs(_scan(np.zeros(count), step_mm * np.arange(count)))
            assert (slabs.averaged, len(slabs.scan.hu)) == (averaged, made)
            np.testing.assert_array_equal(slabs.made_of, exact.made_of)
            np.testing.assert_array_equal(slabs.covered, exact.covered)


@pytest.mark.parametrize("noise", [0, 1e-4, -1e-4])
def test_thick_slices_at_the_border_stay_as_they_are(noise):
    """A thin base, and above it slices 4 mm apart."""
    positions = np.concatenate([np.arange(20) * 1.25, 19 * 1.25 + (4 + noise) * np.arange(1, 9)])
    slabs = to_slabs(_scan(np.arange(28), positions))
    assert slabs.scan.hu[-8:, 0, 0].tolist() == list(range(20, 28))


def test_given_brain_mask_is_averaged_too():
    brain = np.zeros((5, 2, 3), bool)
    brain[3:] = True                                                            # 4 of the 5 mm of the upper slab
    assert to_slabs(_scan([0] * 5, [0, 2, 4, 6, 8], brain)).scan.brain[:, 0, 0].tolist() == [False, True]


def test_slab_mm_must_be_positive():
    with pytest.raises(ScanError, match="--slab-mm must be above 0, got 0"):
        to_slabs(_scan([0, 1], [0, 1]), slab_mm=0)
