"""A head that lies nose down gets a note, and a head with only one sign of it does not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from ct.facing import NOSE_DOWN, check_facing
from ct.frame import preprocess_scan
from ct.settings import PreprocessSettings, StandardiseSettings
from ct.standardise import Frame, Standardised
from tests.helpers import synthetic_scan

FRACTION, LOW_HU = 0.66, -20.0


def head(size=96, wide_behind=True, hollows=True, air=LOW_HU):
    """Slices of a head upright: two of the base with hollows in front, and three of an egg-shaped brain."""
    rows, columns = (np.mgrid[:size, :size] - (size - 1) / 2) / size
    egg = 1 + (0.6 if wide_behind else -0.6) * rows
    brain = np.zeros((5, size, size), bool)
    brain[2:] = (rows / 0.36) ** 2 + (columns / 0.29 / egg) ** 2 < 1
    hu = np.where((rows / 0.42) ** 2 + (columns / 0.36) ** 2 < 1, np.float32(40), np.float32(LOW_HU))[None].repeat(5, 0)
    if hollows:
        hu[:2, (rows + 0.2) ** 2 + columns**2 < 0.08**2] = air
    return Standardised(hu, brain, np.arange(5)[::-1] * 5.0, Frame(size, (size, size), (1, 1), (0, 0), 0.0, 1.0))


def turned(standardised):
    return replace(standardised, hu=standardised.hu[:, ::-1, ::-1], brain=standardised.brain[:, ::-1, ::-1])


@pytest.mark.parametrize("size", [64, 96, 256])
def test_front_and_back_are_told_apart(size):
    assert check_facing(head(size), FRACTION, LOW_HU) == ()
    assert check_facing(turned(head(size)), FRACTION, LOW_HU) == (NOSE_DOWN,)


@pytest.mark.parametrize("one_sign", [
    head(wide_behind=False), turned(head(hollows=False)), turned(head(wide_behind=False)), turned(head(air=0.0))])
def test_one_sign_alone_tells_nothing(one_sign):
    """Soft tissue is no hollow; a round brain or a scan without the base could lie either way."""
    assert check_facing(one_sign, FRACTION, LOW_HU) == ()


def test_a_nose_down_scan_has_a_reservation():
    settings = PreprocessSettings(StandardiseSettings(size=64))
    scan, brain = synthetic_scan(slices=30)
    z, row, column = np.indices(scan.hu.shape)
    nose = (z < 12) & (row > 18) & (row < 30) & (abs(column - 47.5) < 6) & (scan.hu > -500)
    hu = np.where(nose & (scan.hu < 500), np.float32(-1000), scan.hu)
    upright = replace(scan, hu=hu, brain=brain & ~nose)
    down = replace(upright, hu=hu[:, ::-1, ::-1].copy(), brain=upright.brain[:, ::-1, ::-1].copy())
    assert preprocess_scan(upright, settings).reservations == ()
    assert preprocess_scan(down, settings).reservations == (NOSE_DOWN,)
    assert preprocess_scan(replace(down, source="dicom"), settings).reservations == ()      # its header says so
    for angle_deg, reservations in ((80, ()), (100, (NOSE_DOWN,)), (-100, (NOSE_DOWN,))):   # but not how the head was
        hu = ndimage.rotate(upright.hu, angle_deg, (1, 2), reshape=False, order=1, cval=-1000.0)
        brain = ndimage.rotate(upright.brain.astype(float), angle_deg, (1, 2), reshape=False, order=1) > 0.5
        sideways = replace(upright, hu=hu, brain=brain, source="dicom")
        assert preprocess_scan(sideways, settings).reservations == reservations
