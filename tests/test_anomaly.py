"""Residual, votes, maps, scores and calibration on arrays small enough to work out by hand."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from detect.reconstruct import Reconstruction
from detect.residual import (
    Evidence,
    MaskSettings,
    components_touching,
    lesion_mask,
    residual,
    scale_median_size,
    slice_medians,
    to_half_contrast,
)
from detect.scores import SCAN_SCORES, percentile_of, scan_score, thickness_mm, threshold_at_fpr
from detect.surprise import (
    SLICE_SCORES,
    Surprise,
    SurpriseSettings,
    peak_scores,
    pool_along_axis,
    surprise_scores,
)
from detect.votes import VoteCounter, anomaly_map, frame_votes, slice_scores


def column(*values: float) -> torch.Tensor:
    """A scan of one pixel a slice, float [S, 1, 1]."""
    return torch.tensor(values, dtype=torch.float32)[:, None, None]


# --- residual ---


@pytest.mark.parametrize(("frame_size", "expected"), ((1024, 39), (512, 19), (256, 9), (128, 5), (64, 3), (32, 3)))
def test_median_size_scales_with_the_frame(frame_size, expected):
    assert scale_median_size(frame_size) == expected


def test_median_size_is_the_nearest_odd_number():
    assert scale_median_size(256, size_at_512=11) == 5   # 5.5
    assert scale_median_size(256, size_at_512=13) == 7   # 6.5


def test_residual_is_signed_masked_and_filtered():
    query, recon = torch.full((2, 5, 5), 40.0), torch.full((2, 5, 5), 30.0)
    query[1] = 10.0
    query[0, 2, 2] = 1000.0                                # a single pixel: the median takes it away
    brain = torch.ones(2, 5, 5, dtype=torch.bool)
    brain[:, :, 4] = False
    result = residual(query, recon, brain, 3)
    # windows of 3 x 3 on a 5 x 4 brain, zeros around: only in its four corners the zeros win
    expected = torch.ones(5, 5)
    expected[:, 4] = 0
    expected[[0, 0, 4, 4], [0, 3, 0, 3]] = 0
    assert torch.equal(result, torch.stack([10 * expected, -20 * expected]))


def test_residual_ignores_what_lies_outside_the_brain():
    query, recon = torch.zeros(1, 5, 5), torch.zeros(1, 5, 5)
    brain = torch.zeros(1, 5, 5, dtype=torch.bool)
    brain[0, 1:4, 1:4] = True
    outside = torch.where(brain, query, 3000.0)            # bone all around
    assert residual(outside, recon, brain, 3).abs().max() == 0


def test_residual_does_not_depend_on_the_chunks():
    gen = torch.Generator().manual_seed(0)
    query, recon = torch.randn(2, 7, 20, 20, generator=gen) * 20
    brain = torch.rand(7, 20, 20, generator=gen) > 0.2
    whole = residual(query, recon, brain, 5)
    chunks = [residual(query[i:i + 3], recon[i:i + 3], brain[i:i + 3], 5) for i in (0, 3, 6)]
    assert torch.equal(torch.cat(chunks), whole)


@pytest.mark.parametrize("part", ("normal_hu", "expected_hu", "read"))
def test_a_drawing_that_is_not_finite_is_refused(part):
    """By surprise the scan had a score of 0, below all healthy ones."""
    hu = torch.zeros(1, 2, 2)
    with pytest.raises(ValueError, match=f"{part} is not finite"):
        Reconstruction(**{"query_hu": hu, "normal_hu": hu, "error_hu": {}, "seconds": {}, part: hu / 0})
    with pytest.raises(ValueError, match="the slices hold values that are no numbers; give HU"):
        Reconstruction(hu / 0, hu, {}, {})


def test_medians_are_over_a_part_of_each_slice():
    values = torch.tensor([[[[1.0, 2.0], [3.0, 9.0]], [[5.0, 5.0], [5.0, 0.0]]]]).repeat(2, 1, 1, 1)     # [2, 2, 2, 2]
    where = torch.tensor([[[True, True], [True, False]], [[False, False], [False, False]]])
    assert slice_medians(values, where).tolist() == [[2.0, 5.0], [0.0, 0.0]]


def test_residual_names_the_shape_that_differs():
    with pytest.raises(ValueError, match=r"query_hu \(2, 4, 4\), recon_hu \(2, 4, 4\), brain \(1, 4, 4\)"):
        residual(torch.zeros(2, 4, 4), torch.zeros(2, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool), 3)


# --- votes ---


@pytest.mark.parametrize(("residuals", "votes"), (
    ((0, 0, 9, 0, 0), (0, 0, 1, 0, 0)),        # alone
    ((0, 9, 9, 0, 0), (0, 2, 2, 0, 0)),        # each has itself and a neighbour
    ((0, 9, 0, 9, 0), (0, 1, 1, 1, 0)),        # the middle one has both neighbours, but not itself
    ((0, 9, 9, 9, 0), (0, 2, 2, 2, 0)),
    ((9, 9, 0, 0, 9), (2, 2, 0, 0, 1)),        # beyond the ends nobody votes, and the ends aren't neighbours
    ((9, 0, 0, 9, 9), (1, 0, 0, 2, 2)),
    ((9,), (1,)),                              # a scan of one slice
))
def test_frame_votes(residuals, votes):
    result = frame_votes(column(*residuals))
    assert result.dtype == torch.uint8
    assert result.flatten().tolist() == list(votes)


def test_the_threshold_must_be_exceeded():
    assert frame_votes(column(5.0, 5.001, 4.999)).flatten().tolist() == [0, 1, 0]
    assert frame_votes(column(5.0, 5.001, 4.999), threshold_hu=4.0).flatten().tolist() == [2, 2, 2]


def test_votes_are_counted_pixel_by_pixel():
    residuals = torch.tensor([[[9.0, 9.0, 0.0]], [[9.0, 0.0, 0.0]]])
    assert frame_votes(residuals).tolist() == [[[2, 1, 0]], [[2, 0, 0]]]


@pytest.mark.parametrize("sign", (1, -1))
def test_slices_across_a_gap_are_no_neighbours(sign):
    residuals = column(9, 9, 9, 0, 9)
    positions = [0.0, sign * 5.0, sign * 15.0, sign * 20.0, sign * 25.0]
    assert frame_votes(residuals).flatten().tolist() == [2, 2, 2, 1, 1]
    assert frame_votes(residuals, positions_mm=positions).flatten().tolist() == [2, 2, 1, 1, 1]
    assert frame_votes(residuals, positions_mm=positions, max_gap_mm=10).flatten().tolist() == [2, 2, 2, 1, 1]


def test_positions_may_be_uneven_and_the_gap_is_inclusive():
    # 4 mm, then 7 mm: everyday in head CT, and still neighbours
    assert frame_votes(column(9, 9, 9), positions_mm=[0, 4, 11]).flatten().tolist() == [2, 2, 2]
    assert frame_votes(column(9, 9), positions_mm=[0, 7.5]).flatten().tolist() == [2, 2]
    assert frame_votes(column(9, 9), positions_mm=[0, 7.6]).flatten().tolist() == [1, 1]


def test_frame_votes_refuses_what_is_no_sorted_scan():
    with pytest.raises(ValueError, match=r"whole scan \[S, H, W\], got \(4, 4\)"):
        frame_votes(torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"3 slices but positions_mm of shape \(2,\)"):
        frame_votes(column(0, 0, 0), positions_mm=[0, 5])
    with pytest.raises(ValueError, match="sort the slices"):
        frame_votes(column(0, 0, 0), positions_mm=[0, 10, 5])


def test_predicted_takes_more_votes_than_steps():
    counter = VoteCounter((3, 1, 1))
    assert not counter.predicted.any()
    history = []
    for residuals in ((9, 9, 0), (9, 0, 0), (9, 9, 0)):
        counter.add(frame_votes(column(*residuals)))
        history.append(counter.predicted.flatten().tolist())
    # votes 2 2 0, then 1 0 0, then 2 2 0; in sum 2 2 0, 3 2 0, 5 4 0
    assert counter.steps == 3
    assert counter.votes.flatten().tolist() == [5, 4, 0]
    assert history == [[True, True, False], [True, False, False], [True, True, False]]


def test_a_thousand_steps_do_not_overflow():
    counter = VoteCounter((1, 1, 1))
    for _ in range(1000):
        counter.add(torch.full((1, 1, 1), 2, dtype=torch.uint8))
    assert counter.votes.item() == 2000


def test_votes_of_a_part_of_the_scan_are_refused():
    with pytest.raises(ValueError, match=r"counter \(3, 1, 1\), votes \(1, 1, 1\)"):
        VoteCounter((3, 1, 1)).add(torch.ones(1, 1, 1, dtype=torch.uint8))


# --- maps ---


def test_anomaly_map_weighs_the_signed_residual():
    result = anomaly_map(torch.tensor([[[0, 2, 4]]]), torch.tensor([[[8.0, -8.0, 8.0]]]), steps=2)
    assert torch.equal(result, torch.tensor([[[0.0, -4.0, 8.0]]]))
    with pytest.raises(ValueError, match="steps=0"):
        anomaly_map(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), steps=0)


def blocks(size: int, *pixels: int) -> torch.Tensor:
    """One slice for each count: a compact component of so many pixels."""
    predicted = torch.zeros(len(pixels), size, size, dtype=torch.bool)
    for plane, count in zip(predicted, pixels):
        for i in range(count):
            plane[1 + i // 25, 1 + i % 25] = True
    return predicted


@pytest.mark.parametrize(("frame_size", "kept", "removed"), (
    (512, 600, 599),
    (256, 150, 149),
    (128, 38, 37),    # the limit is 37.5
))
def test_component_limit_scales_with_area(frame_size, kept, removed):
    predicted = blocks(frame_size, kept, removed)
    result = lesion_mask(predicted, 600)
    assert torch.equal(result[0], predicted[0])
    assert not result[1].any()


def test_components_are_taken_slice_by_slice():
    predicted = blocks(256, 100, 100, 100)                  # one on top of the other: not 300 pixels, but 3 x 100
    assert not lesion_mask(predicted, 600).any()


def test_components_touch_at_corners():
    predicted = torch.zeros(1, 8, 8, dtype=torch.bool)
    predicted[0, 0:2, 0:2] = predicted[0, 2:4, 2:4] = True
    predicted[0, 6, 6] = True
    result = lesion_mask(predicted, 8 * 64**2)             # 8 pixels of 8 x 8
    assert result.sum() == 8 and not result[0, 6, 6]


def test_what_touches_a_seed_is_whole_and_the_rest_is_not_there():
    """Two places that touch at a corner are one; neither a place without a seed nor the next slice belongs to it."""
    mask, seed = torch.zeros(2, 2, 8, 8, dtype=torch.bool)
    mask[0, 1:3, 1:3] = mask[0, 3, 3] = mask[0, 6, 6] = mask[1, 1:3, 1:3] = True
    seed[0, 1, 1] = seed[1, 6, 6] = True
    expected = mask.clone()
    expected[0, 6, 6] = expected[1] = False
    assert torch.equal(components_touching(seed, mask), expected)
    assert not components_touching(seed, torch.zeros_like(mask)).any()


def test_lesion_mask_of_nothing_and_of_everything():
    empty = torch.zeros(2, 40, 40, dtype=torch.bool)
    assert torch.equal(lesion_mask(empty, 600), empty)
    assert torch.equal(lesion_mask(~empty, 600), ~empty)
    with pytest.raises(ValueError, match=r"expected bool \[S, H, W\], got torch.float32"):
        lesion_mask(empty.float(), 600)


def test_the_mask_goes_on_to_half_of_its_contrast():
    """30 HU with 16 around and 10 beside it: what has half of 30 belongs to it, to the same side and in its plane."""
    residual = torch.zeros(2, 128, 128)
    residual[:, 4:10, 4:10], residual[:, 5:9, 5:9] = 16, 30
    residual[:, 4:10, 10:12], residual[:, 11:13, 4:10] = 10, 16
    mask = torch.zeros(2, 128, 128, dtype=torch.bool)
    mask[0, 6:8, 6:8] = True
    expected = mask.clone()
    expected[0, 4:10, 4:10] = True
    for side in (1, -1):
        assert torch.equal(to_half_contrast(mask, side * residual, 8.0), expected)
    assert torch.equal(to_half_contrast(mask, residual, 20.0)[0], residual[0] == 30)
    shine = torch.zeros_like(mask)
    shine[0, 2:11, 2:10] = True                                  # what is around it is anomalous, and hardly differs
    for side in (1, -1):
        assert torch.equal(to_half_contrast(shine, side * residual, 8.0), expected)
    assert torch.equal(to_half_contrast(shine, 0 * residual, 8.0), shine)               # without any contrast it stays
    residual[:, 4:10, 10:14] = -16
    assert not to_half_contrast(mask, residual, 8.0)[:, :, 10:].any()


@pytest.mark.parametrize("size, reach", [(128, 6), (512, 24)])
def test_the_mask_goes_on_for_10_mm_at_most(size, reach):
    residual, mask = torch.full((1, size, size), 20.0), torch.zeros(1, size, size, dtype=torch.bool)
    mask[0, 50:60, 50:60] = True
    expected = torch.zeros_like(mask)
    expected[0, 50 - reach:60 + reach, 50 - reach:60 + reach] = True
    assert torch.equal(to_half_contrast(mask, residual, 8.0), expected)


def test_a_mask_by_surprise_goes_on_unless_told_not_to():
    surprise, residual = torch.zeros(1, 2, 128, 128), torch.zeros(1, 128, 128)
    surprise[:, :, 8:16, 8:16], residual[:, 6:18, 6:18] = 4, 20
    brain = torch.ones(1, 128, 128, dtype=torch.bool)
    seen = Evidence(residual, brain, np.zeros(1), brain)
    masks = [Surprise(mask=MaskSettings(extent_hu=hu)).findings(surprise, seen) for hu in (0, 8)]
    assert torch.equal(masks[0].mask, surprise[:, 0] > 0) and torch.equal(masks[1].mask, residual > 0)
    assert torch.equal(masks[0].slice_scores, masks[1].slice_scores)
    assert torch.equal(masks[0].predicted, masks[1].predicted)


# --- scores ---


def test_slice_scores():
    votes = torch.tensor([[[4, 2], [0, 4]], [[4, 4], [4, 4]], [[4, 4], [4, 4]]])
    residuals = torch.tensor([[[10.0, 6.0], [50.0, 8.0]]] * 3)
    brain = torch.tensor([[[True, True], [True, False]], [[True, True], [True, True]], [[False] * 2] * 2])
    # (2 * 10 + 1 * 6 + 0 * 50) / 3; 2 * (10 + 6 + 50 + 8) / 4; no brain
    assert torch.allclose(slice_scores(votes, 2, residuals, brain), torch.tensor([26 / 3, 37.0, 0.0]))


def test_slice_scores_do_not_depend_on_the_number_of_steps():
    votes, residuals = torch.tensor([[[2, 1, 0]]]), torch.tensor([[[10.0, 7.0, 3.0]]])
    brain = torch.ones(1, 1, 3, dtype=torch.bool)
    assert torch.allclose(slice_scores(votes, 1, residuals, brain), slice_scores(votes * 200, 200, residuals, brain))
    with pytest.raises(ValueError, match="steps=0"):
        slice_scores(votes, 0, residuals, brain)


@pytest.mark.parametrize(("how", "expected"), (("max", 9.0), ("top3", 6.0), ("mean", 4.0)))
def test_scan_score(how, expected):
    assert scan_score(torch.tensor([1.0, 9.0, 4.0, 1.0, 5.0]), how) == expected


def test_scan_score_of_fewer_than_three_slices():
    assert [scan_score(torch.tensor([1.0, 4.0]), how) for how in SCAN_SCORES] == [4.0, 2.5, 2.5]


def test_scan_score_refusals():
    scores = torch.tensor([1.0, torch.nan])
    with pytest.raises(ValueError, match="how must be one of max, top3, mean, got 'median'"):
        scan_score(scores, "median")
    with pytest.raises(ValueError, match="no slices"):
        scan_score(scores[:0], "max")
    with pytest.raises(ValueError, match="must be finite"):
        scan_score(scores, "max")


# --- slices that are not 5 mm apart ---


def pooled(values, positions):
    return pool_along_axis(column(*values), positions).flatten().tolist()


def test_slices_of_5_mm_are_pooled_with_their_neighbours():
    # The ends stand for what lies beyond them, too: (3 + 3 + 3) / 3 and (12 + 27 + 27) / 3.
    assert pooled([3, 3, 12, 27], [0, 5, 10, 15]) == pytest.approx([3, 6, 14, 22])
    assert pooled([3, 3, 12, 27], None) == pytest.approx([3, 6, 14, 22])
    assert pooled([27, 12, 3, 3], [15, 10, 5, 0]) == pytest.approx([22, 14, 6, 3])


def test_pooling_goes_by_millimetres_over_gaps_too():
    # Within 7.5 mm of a slice lie 10 mm of its own and 2.5 mm of either neighbour.
    assert pooled([0, 15, 0], [0, 10, 20]) == pytest.approx([2.5, 10, 2.5])
    # The slice at 5 stands for 2.5 to 15: 10 of its 15 mm, and 5 mm are the first one's; beyond the gap nothing counts.
    assert pooled([3, 6, 100, 100], [0, 5, 25, 30])[1] == pytest.approx(5)
    # Slices of 2.5 mm: three to either side, the outermost by half.
    assert pooled([0, 0, 0, 12, 0, 0, 0], [2.5 * i for i in range(7)]) == pytest.approx([1, 2, 2, 2, 2, 2, 1])
    assert pooled([7], [3.0]) == [7]
    with pytest.raises(ValueError, match="sort the slices"):
        pool_along_axis(column(1, 2, 3), [0, 10, 5])


def test_scan_scores_weigh_slices_by_what_they_stand_for():
    scores = torch.tensor([4.0, 9.0, 1.0, 7.0])
    assert scan_score(scores, "top3", [10, 10, 10, 10]) == pytest.approx((9 * 10 + 7 * 5) / 15)
    assert scan_score(scores, "top3", [2.5] * 4) == pytest.approx(21 / 4)        # 10 mm: all there is
    assert scan_score(scores, "top3", [5, 5, 5, 5]) == pytest.approx(20 / 3)
    assert scan_score(scores, "mean", [5, 10, 5, 5]) == pytest.approx((4 * 5 + 9 * 10 + 5 + 35) / 25)
    assert scan_score(scores, "max", [5, 10, 5, 5]) == 9
    assert thickness_mm([20, 15, 5]).tolist() == [5, 7.5, 10] and thickness_mm([3]).tolist() == [5]


# --- calibration ---


def test_percentile_of():
    healthy = [3.0, 1.0, 2.0, 2.0]
    # healthy scores below: 0, 0, 1, 3, 4 of 4; never 100
    assert [percentile_of(score, healthy) for score in (0.5, 1.0, 2.0, 2.5, 99.0)] == [0, 0, 20, 60, 80]
    assert percentile_of(30.0, range(30)) == 100 * 30 / 31                   # not rounded to single precision


def test_threshold_at_fpr():
    healthy = torch.arange(19, 0, -1.0)
    assert threshold_at_fpr(healthy, 0.05) == 19      # ceil(20 * 0.95) = 19th smallest
    assert threshold_at_fpr(healthy, 0.09) == 19      # ceil(18.2)
    assert threshold_at_fpr(healthy, 0.1) == 18
    assert threshold_at_fpr(healthy, 0.5) == 10
    assert threshold_at_fpr(healthy, 1 - 1e-12) == 1  # all 20 of 20: an IndexError


@pytest.mark.parametrize("fpr", (0.05, 0.1, 0.3, 0.7))
def test_threshold_keeps_its_promise_when_one_scan_of_all_is_left_out(fpr):
    scores = torch.randn(40, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # with ties
    flagged = sum(scores[i].item() > threshold_at_fpr(torch.cat([scores[:i], scores[i + 1:]]), fpr)
                  for i in range(40))
    assert flagged <= 40 * fpr


def test_threshold_and_percentile_agree():
    healthy = torch.randn(30, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    scores = torch.arange(-3, 3, 0.05)
    over = scores > threshold_at_fpr(healthy, 0.1)
    assert over.tolist() == [percentile_of(score, healthy) >= 90 - 1e-3 for score in scores.tolist()]


def test_too_few_healthy_scans():
    with pytest.raises(ValueError, match="^a false-positive rate of 0.05 needs 19 healthy scans, found 18"):
        threshold_at_fpr(torch.arange(18.0), 0.05)
    with pytest.raises(ValueError, match="between 0 and 1, got 5"):
        threshold_at_fpr(torch.arange(18.0), 5)
    with pytest.raises(ValueError, match="finite scores of healthy scans"):
        percentile_of(1.0, [])


def test_surprise_scores_count_what_lies_beyond():
    surprise = torch.tensor([[[3.0, -4.0], [1.0, 9.0]], [[2.0, 2.0], [2.0, 2.0]]])
    brain = torch.tensor([[[True, True], [True, False]], [[True, True], [True, True]]])
    scores = surprise_scores(surprise, brain, above=2.0)
    assert scores.tolist() == pytest.approx([(1 + 2) / 3, 0])
    assert surprise_scores(surprise, ~brain & False, above=2.0).tolist() == [0, 0]


def test_peak_scores_prefer_one_place_to_many():
    brain = torch.ones(3, 40, 40, dtype=torch.bool)
    focal, scattered = torch.zeros(3, 40, 40), torch.zeros(3, 40, 40)
    focal[:, 18:22, 18:22] = 6.0                                             # 16 pixels, together
    scattered.view(3, -1)[:, ::100] = 6.0                                    # 16 pixels, apart
    one, other = (peak_scores(x, brain, above=2.0, sigma=2.0) for x in (focal, scattered))
    assert (one > 4 * other).all() and (one < 4).all()
    assert torch.allclose(one, peak_scores(-focal, brain, above=2.0, sigma=2.0))       # to either side
    assert not peak_scores(focal, ~brain, above=2.0, sigma=2.0).any()


def test_peak_scores_want_the_neighbours_support():
    brain = torch.ones(5, 40, 40, dtype=torch.bool)
    alone, column = torch.zeros(5, 40, 40), torch.zeros(5, 40, 40)
    alone[2, 18:22, 18:22] = 6.0
    column[1:4, 18:22, 18:22] = 6.0
    single, three = (peak_scores(x, brain, above=2.0, sigma=2.0) for x in (alone, column))
    assert single[2] == pytest.approx(three[2].item() / 3)
    assert single.tolist() == pytest.approx([0, single[2].item(), single[2].item(), single[2].item(), 0])


def test_the_sides_of_a_peak_do_not_add_up():
    """Columns of 4 and -4: of what lies beyond 2, half to either side, a mean of 1, not 2."""
    surprise = torch.full((3, 40, 40), 4.0)
    surprise[:, :, ::2] = -4
    scores = peak_scores(surprise, torch.ones(3, 40, 40, dtype=torch.bool), above=2.0, sigma=2.0)
    assert scores.tolist() == pytest.approx([1, 1, 1], abs=0.01)


def test_a_peak_is_12_pixels_wide_at_512():
    """3 of 128: a point that lies 2 * pi * 3^2 beyond the limit is 1 in the middle of the Gaussian."""
    surprise, brain = torch.zeros(1, 128, 128), torch.ones(1, 128, 128, dtype=torch.bool)
    surprise[0, 64, 64] = 2 + 18 * np.pi
    assert SLICE_SCORES["peak"].of(surprise, brain, 2.0, np.zeros(1)).item() == pytest.approx(1, rel=0.02)


def test_a_slice_scores_over_what_was_searched_with_what_is_hypodense_at_its_weight():
    """-5 in the searched half of the brain, at a weight of 0.6: it goes 1 beyond the limit of 2."""
    surprise, brain = torch.zeros(1, 2, 16, 16), torch.ones(1, 16, 16, dtype=torch.bool)
    surprise[:, :, :8] = -5
    seen = Evidence(torch.zeros(1, 16, 16), brain, np.zeros(1), surprise[:, 0] < 0)
    found = Surprise(SurpriseSettings(pool="area", hypodense=0.6, surprise_above=2.0)).findings(surprise, seen)
    assert found.slice_scores.tolist() == pytest.approx([1])


@pytest.mark.parametrize(("scoring", "sentence"), [
    (SurpriseSettings(hypodense=1.0),
     "what differs by more than 315 of 316 places of healthy brain at that position, and what"),
    (SurpriseSettings(scale="both", filter="band", hypodense=0.65),
     "what differs by more than 315 of 316 places of healthy brain at that position, and what"),
    (SurpriseSettings(hypodense=0.65),                           # 10^(2.5 / 0.65): it said 1 in 316 of these, too
     "what differs by more than 315 of 316 places of healthy brain at that position if denser, more than 7,016 of "
     "7,017 if less dense, and what"),
    (SurpriseSettings(hypodense=0.3),                            # 0.3 * 8 is the highest there is
     "what is denser by more than 315 of 316 places of healthy brain at that position, and what"),
])
def test_the_sentence_says_what_is_marked_on_either_side(scoring, sentence):
    """One place in the first number printed is the limit where denser, in the last one where less dense."""
    measure = Surprise(scoring, MaskSettings(surprise_mask=2.5))
    assert measure.criterion() == f"Marked is {sentence} adjoins it with at least half of that difference."
    limits = [float(np.log10(int(n.replace(",", "")))) for n in re.findall(r"of ([\d,]+)", sentence)]
    brain = torch.ones(1, 1, 1, dtype=torch.bool)
    seen = Evidence(torch.zeros(1, 1, 1), brain, np.zeros(1), brain)
    for side, limit in ((1, limits[0]), (-1, 8.1 if "is denser" in sentence else limits[-1])):
        for rarer in (-0.01, 0.01):
            surprise = torch.full((1, 2, 1, 1), side * min(limit + rarer, 8.0))
            assert measure.findings(surprise, seen).predicted.item() == (rarer > 0 and limit < 8)


def test_what_is_predicted_is_rarer_than_the_limit_to_either_side():
    surprise = torch.zeros(1, 2, 16, 16)
    surprise[:, :, :8, :8], surprise[:, :, 8:, 8:], surprise[:, :, :8, 8:] = 4, -4, 2
    brain = torch.ones(1, 16, 16, dtype=torch.bool)
    seen = Evidence(torch.zeros(1, 16, 16), brain, np.zeros(1), brain)
    found = Surprise(SurpriseSettings(hypodense=1.0), MaskSettings(surprise_mask=3.0)).findings(surprise, seen)
    assert torch.equal(found.predicted, (surprise[:, 0].abs() == 4))
