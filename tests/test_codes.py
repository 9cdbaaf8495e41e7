"""Codes of training slices by position, plain and augmented, and what is fitted to them."""

import pytest
import torch

from bundling.build import augmented
from dataset import SliceDataset
from detect.codes import encode_slices, fit
from detect.options import StatsConfig
from model import Encoder
from tests.calibration_data import TINY, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def test_codes_and_positions_stay_together(inputs):
    dataset = SliceDataset(inputs[0])
    torch.manual_seed(0)
    encoder = Encoder(TINY)
    rng = torch.Generator().manual_seed(0)

    def augment(images):
        return augmented(images, rng)

    plain, mm = encode_slices(encoder, dataset, 1, 7, augment)
    again, mm3 = encode_slices(encoder, dataset, 3, 25, augment)
    assert plain.shape == (25, 8, 16) and again.shape == (75, 8, 16)
    assert mm.tolist() == [20, 15, 10, 5, 0] * 5 and mm3.tolist() == mm.tolist() * 3
    torch.testing.assert_close(again[:25], plain, rtol=1e-4, atol=1e-5)             # the first pass: as they are
    assert not torch.allclose(again[25:50], again[50:], atol=1e-3)                  # the others: drawn anew


def test_augmented_flips_and_turns_within_limits():
    # A bright spot on the x axis, 10 pixels right of the centre: where it goes tells flip and angle.
    images = torch.full((200, 3, 33, 33), -1.0)
    images[:, :, 15:18, 25:28] = 1
    moved = augmented(images, torch.Generator().manual_seed(0))
    assert moved.min() >= -1 and moved.max() <= 1
    weight = (moved[:, 0] + 1) / (moved[:, 0] + 1).sum((1, 2), keepdim=True)
    axis = torch.arange(33.0) - 16
    x, y = (weight.sum(1) * axis).sum(1), (weight.sum(2) * axis).sum(1)
    torch.testing.assert_close(torch.hypot(x, y), torch.full((200,), 10.0), atol=0.1, rtol=0)
    angle = torch.rad2deg(torch.atan2(y, x.abs())).abs()
    assert 20 < angle.max() <= 30.5
    assert 70 <= (x < 0).sum() <= 130 and 70 <= (angle < 1e-3).sum() <= 130         # about half of 200 each


def test_fit_needs_codes_within_reach():
    codes = torch.randn(40, 8, 16, generator=torch.Generator().manual_seed(0))
    config = StatsConfig(components=4, positions=4, spacing_mm=25)
    # All codes at 30 mm: 0 and 75 mm are too far, 25 and 50 mm (exactly 20 away) are not.
    assert fit(codes, torch.full((40,), 30.0), config).positions_mm.tolist() == [25, 50]
    with pytest.raises(ValueError, match="--components 4: needs 32 codes within 20 mm of a position, found 31"):
        fit(codes[:31], torch.full((31,), 30.0), config)
