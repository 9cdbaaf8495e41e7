"""Only a whole, upright head: upside-down stacks are put right, parts are noted, other things are refused."""

from dataclasses import replace

import numpy as np
import pytest

from ct.scan import Scan, ScanError
from ct.whole_head import check_head, ends, profile, upright
from tests.helpers import synthetic_scan

SPACING = (5.0, 2.4, 2.4)


def reverse(scan):
    return Scan(scan.scan_id, scan.hu[::-1].copy(), scan.position_mm, scan.pixel_spacing_mm)


def test_an_upside_down_stack_is_put_right():
    scan, _ = synthetic_scan(spacing_mm=SPACING)
    assert upright(scan) is scan
    turned = upright(reverse(scan))
    np.testing.assert_array_equal(turned.hu, scan.hu)
    assert "upside down" in turned.notes[0] and (np.diff(turned.position_mm) == 5).all()


def test_a_stack_without_a_clear_vertex_is_left_as_it_is():
    scan, _ = synthetic_scan(spacing_mm=SPACING)
    for part in (scan.hu[:-6], scan.hu[6:14]):                       # ends in the brain above, and at both ends
        cut = Scan("part", part[::-1].copy(), np.arange(len(part)) * 5.0, (2.4, 2.4))
        assert upright(cut) is cut


def test_the_outline_shrinks_towards_the_vertex():
    scan, _ = synthetic_scan(spacing_mm=SPACING)
    below, above = ends(profile(scan))
    assert below is None and 0 < above < 0.5                         # the scan starts within the brain


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
