"""A head far too high or too low for its width gets a note."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ct.frame import preprocess_scan
from ct.proportions import check_proportions
from ct.scan import Scan
from ct.settings import PreprocessSettings, StandardiseSettings
from tests.helpers import synthetic_scan


def ellipsoid(height_mm, step_mm, pixel_mm=(4.0, 4.0), lowest_mm=-60.0):
    """A brain of 76 mm to each side and height_mm upwards, of slices from lowest_mm to 10 mm above it."""
    z = np.arange(lowest_mm, height_mm + 10, step_mm)
    row, column = (np.arange(-24, 25) * 4.0)[:, None], np.arange(-24, 25) * 4.0
    brain = (row**2 + column**2) / 76**2 + (z[:, None, None] / height_mm) ** 2 < 1
    return Scan("head", np.zeros(brain.shape, np.float32), z, pixel_mm), brain


@pytest.mark.parametrize("step_mm", [2.0, 5.0])
@pytest.mark.parametrize("height_mm, times", [(65, None), (82, None), (50, None), (33, "0.5"), (130, "2.0")])
def test_height_by_width(height_mm, times, step_mm):
    """Half of the largest section lies at 0.293 of the height below the vertex: of 65 mm 0.126 of a width of 152 mm."""
    scan, brain = ellipsoid(height_mm, step_mm)
    for one in (scan, replace(scan, pixel_spacing_mm=None)):
        notes = check_proportions(one, brain)
        assert [note.split(":")[0] for note in notes] == (
            [] if times is None else [f"by its shape the head is {times} times as high as others of this width"])


def test_pixels_of_half_their_size_are_noted():
    scan, brain = ellipsoid(65, 5.0)
    assert "2.0 times as high" in check_proportions(replace(scan, pixel_spacing_mm=(2.0, 2.0)), brain)[0]


@pytest.mark.parametrize("height_mm, noted", [(65, False), (33, True), (130, True)])
def test_a_part_without_the_base_shows_it_as_well(height_mm, noted):
    assert bool(check_proportions(*ellipsoid(height_mm, 2.0, lowest_mm=0.4 * height_mm))) == noted


@pytest.mark.parametrize("spacing_mm, count", [(5.0, 0), (1.5, 1)])
def test_a_scan_that_lost_its_slice_spacing_has_a_reservation(spacing_mm, count):
    """As NIfTI written without it, whose base is not in the scan: it had a percentile."""
    scan, brain = synthetic_scan()
    scan = replace(scan, brain=brain, position_mm=np.arange(len(brain)) * spacing_mm)
    prepared = preprocess_scan(scan, PreprocessSettings(StandardiseSettings(size=32)))
    assert len([note for note in prepared.reservations if note.startswith("by its shape")]) == count
