"""Only a whole, upright head: upside-down stacks are put right, parts are noted, other things are refused."""

from dataclasses import replace

import numpy as np
import pytest

from ct.scan import Scan, ScanError
from ct.whole_head import NEGATED, UPSIDE_DOWN, _thickness_mm, check_head, ends, profile, upright
from tests.helpers import synthetic_head, synthetic_scan

SPACING = (5.0, 2.4, 2.4)


def reverse(scan):
    return Scan(scan.scan_id, scan.hu[::-1].copy(), scan.position_mm, scan.pixel_spacing_mm)


def test_an_upside_down_stack_is_put_right():
    scan, _ = synthetic_scan(spacing_mm=SPACING)
    assert upright(scan) is scan
    turned = upright(reverse(scan))
    np.testing.assert_array_equal(turned.hu, scan.hu)
    assert turned.notes == (UPSIDE_DOWN, NEGATED) and (np.diff(turned.position_mm) == 5).all()
    np.testing.assert_array_equal(-turned.position_mm, scan.position_mm[::-1])


def test_a_stack_without_a_clear_vertex_is_left_as_it_is():
    scan, _ = synthetic_scan(spacing_mm=SPACING)
    for part in (scan.hu[:-6], scan.hu[6:14]):                       # ends in the brain above, and at both ends
        cut = Scan("part", part[::-1].copy(), np.arange(len(part)) * 5.0, (2.4, 2.4))
        assert upright(cut) is cut


def test_air_that_pads_a_head_cut_off_at_its_base_is_no_vertex():
    """A head that begins within the brain, in a volume that was padded, was put upside down."""
    scan, _ = synthetic_scan(spacing_mm=SPACING)
    hu = np.concatenate([np.full((4, *scan.hu.shape[1:]), -1000, np.float32), scan.hu[8:]])
    padded = replace(scan, hu=hu, position_mm=5.0 * np.arange(len(hu)))
    assert ends(profile(padded))[0] is None and upright(padded) is padded
    np.testing.assert_array_equal(upright(reverse(padded)).hu, padded.hu)


def test_the_outline_shrinks_towards_the_vertex():
    scan, _ = synthetic_scan(spacing_mm=SPACING)
    below, above = ends(profile(scan))
    assert below is None and 0 < above < 0.5                         # the scan starts within the brain


def with_shoulders(scan):
    """The scan, its lowest 60 mm in a neck, above 100 mm more of it and 50 mm of shoulders, three times the head."""
    rows, columns = ((np.arange(n) - (n - 1) / 2) * 2.4 for n in scan.hu.shape[1:])
    neck, shoulders = (np.hypot(rows[:, None] / high, columns / wide) <= 1 for high, wide in ((65, 65), (110, 185)))
    below = np.where([shoulders] * 10 + [neck] * 20, np.float32(40), np.float32(-1000))
    hu = np.concatenate([below, scan.hu])
    hu[30:42][neck & (hu[30:42] < -500)] = 40
    return replace(scan, hu=hu, position_mm=5.0 * np.arange(len(hu)))


@pytest.mark.parametrize("cut", [0, 6, 10])
def test_shoulders_do_not_turn_a_head(cut):
    """A neck scan that ended within the brain was turned: its neck is small beside the shoulders."""
    whole = with_shoulders(synthetic_scan(spacing_mm=SPACING, slices=30, size=160)[0])
    count = len(whole.hu) - cut
    scan = replace(whole, hu=whole.hu[:count], position_mm=whole.position_mm[:count])
    below, above = ends(profile(scan))
    assert below > 0.6 and (above is None if cut else above < 0.5)
    assert upright(scan) is scan
    turned = upright(reverse(scan))
    if cut:                                                          # reversed it begins within the brain: no telling
        assert turned.notes == ()
    else:
        np.testing.assert_array_equal(turned.hu, scan.hu)


def unevenly(low_mm, high_mm, slices):
    """A head of slices 5 mm apart and, between these heights above the middle of the brain, 1.25 mm; and its brain."""
    hu, brain = synthetic_head(slices=slices, spacing_mm=(1.25, 2.4, 2.4))
    z = 75.0 - 1.25 * np.arange(slices)[::-1]
    kept = ((z >= low_mm) & (z <= high_mm)) | (np.arange(slices)[::-1] % 4 == 0)
    scan = Scan("uneven", hu[kept], z[kept], (2.4, 2.4))
    assert scan.slice_spacing_mm == 5.0
    return scan, brain[kept]


def test_a_stack_is_put_right_whatever_its_slices_distances():
    """Where they are closer at the vertex than elsewhere, 15 mm are more slices there."""
    scan, _ = unevenly(50.0, 62.0, slices=96)
    assert upright(scan) is scan
    turned = upright(Scan("uneven", scan.hu[::-1].copy(), -scan.position_mm[::-1], (2.4, 2.4)))
    np.testing.assert_array_equal(turned.hu, scan.hu)
    np.testing.assert_array_equal(turned.position_mm, scan.position_mm)


@pytest.mark.parametrize("step_mm, position_mm, nearest", [
    (5.0, [0, 5, 10, 20, 30, 35, 40, 45], [0, 1, 2, 2, 3, 3, 4, 5, 6, 7]),         # half way: the lower
    (3.0, [0, 1, 2, 3, 4, 5, 6, 10, 14, 18], [0, 3, 6, 7, 7, 8, 9]),               # at 0, 3, 6, 9, 12, 15 and 18 mm
    (6.0, np.arange(8) * 6.0, [0, 1, 2, 3, 4, 5, 6, 7]),
    (3.0, np.arange(8) * 1.5 - 7.7, [0, 2, 4, 6]),
    (5.0, [0, 5, 10, 15, 20, 25, 30, 1e12], [0, 1, 2, 3, 4, 5, 6, 6, 6, 6, 7, 7, 7]),      # a gap counts as 30 mm
])
def test_a_profile_has_even_steps(step_mm, position_mm, nearest):
    scan, _ = synthetic_scan(spacing_mm=SPACING, slices=30)
    hu = scan.hu[12:12 + len(position_mm)]
    found = profile(replace(scan, hu=hu, position_mm=np.array(position_mm, float)))
    expected = profile(replace(scan, hu=hu[nearest], position_mm=5.0 * np.arange(len(nearest))))
    assert found.step_mm == step_mm and expected.inside.all()
    np.testing.assert_array_equal(found.inside, expected.inside)
    np.testing.assert_array_equal(found.outline, expected.outline)


def test_each_slice_counts_with_its_own_thickness():
    def thickness(*position_mm):
        return _thickness_mm(Scan("a", np.zeros((len(position_mm), 2, 2), np.float32), np.array(position_mm))).tolist()

    assert thickness(0.0, 5.0, 10.0, 20.0, 30.0) == [5, 5, 7.5, 10, 10]
    assert thickness(0.0, 5.0, 1e12) == [5, 17.5, 30] and thickness(7.0) == [5]
    scan, brain = unevenly(-17.5, 17.5, slices=165)
    assert brain.sum() * 2.4 * 2.4 * 5.0 / 1000 > 2300               # ml, were all of them 5 mm apart: no head's
    assert check_head(scan, brain) == ()
    with pytest.raises(ScanError, match="the inside of the skull is 257. ml"):       # 1143 ml, pixels 2.25 as large
        check_head(replace(scan, pixel_spacing_mm=(3.6, 3.6)), brain)


def test_a_whole_head_has_no_reservations():
    scan, brain = synthetic_scan(spacing_mm=SPACING, slices=30)
    assert check_head(scan, brain) == ()


def test_parts_of_a_head_are_noted():
    scan, brain = synthetic_scan(spacing_mm=SPACING, slices=30)
    part = replace(scan, hu=scan.hu[:-9], position_mm=scan.position_mm[:-9])
    assert check_head(part, brain[:-9]) == ("partial head: ends below the vertex; positions unknown",)
    slab = replace(scan, hu=scan.hu[12:18], position_mm=scan.position_mm[12:18])
    assert len(check_head(slab, brain[12:18])) == 1
    top = replace(scan, hu=scan.hu[14:], position_mm=scan.position_mm[14:])
    assert check_head(top, brain[14:]) == ()                         # measured from the vertex, which is there


CUT_OFF = "partial head: the picture's edge cuts off the brain; sizes and places unknown"


@pytest.mark.parametrize("spacing_mm", [(2.4, 2.4), None])
def test_a_brain_that_the_pictures_edge_cuts_off_is_noted(spacing_mm):
    """By the picture's edge or, padded again, by a field of view within it; not one that only touches the edge."""
    scan, brain = synthetic_scan(spacing_mm=SPACING, slices=30)
    scan = replace(scan, hu=np.maximum(scan.hu, -1000), pixel_spacing_mm=spacing_mm)

    def notes(rows, columns, padded=False):
        part = (slice(None), slice(*rows), slice(*columns))
        hu = scan.hu[part]
        if padded:
            hu = np.full_like(scan.hu, -1000)
            hu[part] = scan.hu[part]
        return check_head(replace(scan, hu=hu), brain & (hu > -500) if padded else brain[part])

    rows, columns = (np.flatnonzero(brain.any((0, axis)))[[0, -1]] + (0, 1) for axis in (2, 1))
    assert notes((0, 96), (0, 96)) == notes((0, 96), (0, 96), padded=True) == ()
    assert notes(rows, columns) == ()
    for cut in ((rows[0] + 8, 96), (0, 96)), ((0, rows[1] - 8), (0, 96)), ((0, 96), (columns[0] + 8, 96)):
        assert notes(*cut) == notes(*cut, padded=True) == (CUT_OFF,)


@pytest.mark.parametrize("window", [None, (-20.0, 100.0)])
def test_a_brain_cut_off_at_padding_that_is_noisy_or_moves_is_noted(window):
    """Only padding of one value at one place counted: half heads that were resampled, or JPEGs, had percentiles."""
    scan, brain = synthetic_scan(spacing_mm=SPACING, slices=30)
    noise = np.random.default_rng(0).uniform(0, 2.9, scan.hu.shape).astype(np.float32)
    columns, first = np.arange(scan.hu.shape[2]), np.flatnonzero(brain.any((0, 1)))[0] + 8
    moving = first + np.arange(30)[::-1, None] // 2
    for outside in np.broadcast_to(columns < first, scan.hu.shape), (columns < moving)[:, None] & np.ones_like(brain):
        hu = np.where(outside, -1000 + noise, scan.hu)
        cut = replace(scan, hu=hu)
        if window:
            cut = replace(scan, hu=np.where(outside, window[0] + noise * (columns < first), np.clip(hu, *window)),
                          saturation_hu=window)
        assert check_head(cut, brain & ~outside) == (CUT_OFF,)


def test_a_brain_that_ends_where_the_head_goes_on_is_noted():
    """Where a round field of view opens the skull, the brain is lost from there on: half of one had a percentile."""
    lost = ("partial head: the brain that was found ends at once where the head goes on; sizes and places unknown",)
    scan, brain = synthetic_scan(spacing_mm=SPACING, slices=30)
    slices = np.arange(30)[:, None, None]
    assert check_head(scan, brain & (slices < 20)) == check_head(scan, brain & (slices >= 12)) == lost


def test_air_above_a_head_that_ends_in_the_brain_does_not_hide_that():
    scan, brain = synthetic_scan(spacing_mm=SPACING, slices=30)
    slices = np.arange(30)[:, None, None]
    ends = replace(scan, hu=np.where(slices < 20, scan.hu, np.float32(-1000)))
    assert check_head(ends, brain & (slices < 20)) == ("partial head: ends below the vertex; positions unknown",)
    begins = replace(scan, hu=np.where(slices >= 12, scan.hu, np.float32(-1000)))
    assert check_head(begins, brain & (slices >= 12)) == ()


def test_a_skull_with_a_part_taken_out_stays_in():
    scan, brain = synthetic_scan(spacing_mm=SPACING, slices=30)
    hu = scan.hu.copy()
    hu[15:, :, 60:][hu[15:, :, 60:] > 300] = 40                      # a third of the vault, and more above
    assert check_head(replace(scan, hu=hu), brain) == ()


@pytest.mark.parametrize("change, words", [
    (lambda hu: np.where(hu > 300, 40, hu), "no head: 0% of the border"),
    (lambda hu: hu + np.float32(60), "no head in HU: the median inside the skull is 9"),
    (lambda hu: hu - np.float32(40), "no head in HU"),
])
def test_what_is_no_head_is_refused(change, words):
    scan, brain = synthetic_scan(spacing_mm=SPACING, slices=30)
    with pytest.raises(ScanError, match=words):
        check_head(replace(scan, hu=change(scan.hu).astype(np.float32)), brain)


def test_sizes_that_no_head_has_are_refused():
    scan, brain = synthetic_scan(spacing_mm=SPACING, slices=30)
    large = replace(scan, pixel_spacing_mm=(3.6, 3.6))               # twice the volume: as in a template's space
    with pytest.raises(ScanError, match="no head of this size: the inside of the skull is 2"):
        check_head(large, brain)
    flat = np.zeros_like(brain)
    flat[14:19] = brain[14:19]                                       # 20 mm high, with slices beyond both ends
    with pytest.raises(ScanError, match="20 mm high, expected at least 55 mm"):
        check_head(scan, flat)
    with pytest.raises(ScanError, match="empty"):
        check_head(scan, brain & False)
