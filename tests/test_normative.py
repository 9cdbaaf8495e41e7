"""Statistics of healthy residuals by position and place, z and surprise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detect import normative
from detect.normative import (
    LEVELS,
    Normal,
    ResidualStats,
    Tails,
    combine,
    fit_normal,
    gaussian_blur,
    histogram,
    moments,
)
from detect.surprise import SurpriseSettings

N = 16
BRAIN = torch.ones(3, N, N, dtype=torch.bool)
MM = [10.0, 5.0, 0.0]


def healthy(count: int, std: float = 2.0, mean: float = 0.0, seed: int = 0) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [mean + std * torch.randn(3, 2, N, N, generator=rng) for _ in range(count)]


def fitted(residuals) -> ResidualStats:
    places = normative.positions(10.0)
    return ResidualStats.fit([moments(r, BRAIN, MM, places) for r in residuals], places, N)


def test_a_scan_is_judged_by_other_patients_alone():
    """Of five scans the first and the last are one head's."""
    scans = healthy(5)
    scans[4] = scans[0] + 0.1
    brains, mm = [BRAIN] * 5, [MM] * 5
    _, others = normative.fit_leaving_out(scans, brains, mm, ["A", "B", "C", "D", "A"])
    assert all(torch.equal(others[i].stats.mean, fitted(scans[1:4]).mean) for i in (0, 4))
    torch.testing.assert_close(others[1].stats.mean, fitted([scans[i] for i in (0, 2, 3, 4)]).mean)
    apart, siblings = (fit_normal(scans, brains, mm, of)[1][0].abs().mean() for of in (["A", "B", "C", "D", "A"], None))
    assert apart > siblings                                      # the same head once more would hide what is odd
    with pytest.raises(ValueError, match="3 patients are needed, found 2"):
        fit_normal(scans, brains, mm, ["A", "B", "A", "B", "A"])


def assert_same(one: Normal, other: Normal) -> None:
    for ours, theirs in zip(one.to_tensors().values(), other.to_tensors().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_scan_has_no_say_in_the_tails_that_judge_it():
    """The others' z came from statistics that it widened: the odder it was, the shorter the tails it was judged by."""
    scans, brains, mm = healthy(5), [BRAIN] * 5, [MM] * 5
    normal, others = normative.fit_leaving_out(scans, brains, mm)
    odd_normal, odd = normative.fit_leaving_out([5 * scans[0], *scans[1:]], brains, mm)
    assert_same(odd[0], others[0])
    assert_same(others[0], normative.fit_leaving_out(scans[1:], brains[1:], mm[1:])[0])       # as a new scan is judged
    assert not torch.equal(odd[1].tails.z, others[1].tails.z) and not torch.equal(odd_normal.tails.z, normal.tails.z)


def test_a_patients_other_scans_have_no_say_in_the_tails_either():
    scans, brains, mm, patients = healthy(6), [BRAIN] * 6, [MM] * 6, ["A", "A", "B", "C", "D", "D"]
    _, others = normative.fit_leaving_out(scans, brains, mm, patients)
    assert others[0] is others[1] and others[4] is others[5]
    assert_same(others[1], normative.fit_leaving_out(scans[2:], brains[2:], mm[2:], patients[2:])[0])
    _, odd = normative.fit_leaving_out([*scans[:5], 5 * scans[5]], brains, mm, patients)
    assert_same(odd[4], others[4])


def test_many_patients_are_left_out_in_groups(monkeypatch):
    """Of seven patients in five groups the first and the sixth, and the second and the seventh, go together."""
    scans, brains, mm = healthy(7), [BRAIN] * 7, [MM] * 7
    fit, fits = ResidualStats.fit, []
    monkeypatch.setattr(ResidualStats, "fit", lambda *args: fits.append(1) or fit(*args))
    monkeypatch.setattr(normative, "GROUPS", 5)
    _, others = normative.fit_leaving_out(scans, brains, mm)
    assert len(fits) == 10 + 5 + 1                               # pairs of groups, groups, all
    assert others[0] is others[5] and others[1] is others[6] and len(set(map(id, others))) == 5
    rest = [scans[i] for i in (1, 2, 3, 4, 6)]
    torch.testing.assert_close(others[0].stats.mean, fitted(rest).mean)
    _, odd = normative.fit_leaving_out([*scans[:5], 5 * scans[5], scans[6]], brains, mm)
    assert_same(odd[0], others[0])


def test_a_scan_that_reaches_deeper_than_all_others_spoils_no_calibration():
    """Left out, it was judged below the others' reach by a mean of 0 and a spread of 0.5 HU: z of 10 in all tails."""
    brains, mm = [torch.ones(15, N, N, dtype=torch.bool), *[BRAIN] * 4], [np.arange(70.0, -5, -5), *[MM] * 4]
    rng = torch.Generator().manual_seed(5)
    scans = [5 + 5 * torch.randn(15, 2, N, N, generator=rng), *healthy(4, std=5.0, mean=5.0)]
    normal, surprises = fit_normal(scans, brains, mm)
    rest, _ = fit_normal(scans[1:], brains[1:], mm[1:])
    torch.testing.assert_close(surprises[0], rest.surprise(scans[0], brains[0], mm[0]), atol=1e-4, rtol=1e-4)
    assert surprises[0].abs().mean() < 1 and normal.tails.z[:, :, 8].max() < 4          # one place in 300


def test_a_position_that_no_slice_is_near_takes_the_nearest_ones_statistics():
    """Slices at 0 and 80 mm: 25 mm off 4e-6 of a slice says something; at 40 mm neither does."""
    places = normative.positions(80.0)
    residuals = torch.stack([torch.full((1, N, N), hu) for hu in (10.0, 20.0)])
    stats = ResidualStats.fit([moments(residuals, BRAIN[:2], [0.0, 80.0], places)], places, N)
    assert stats.mean[:, 0, 3, 3].tolist() == pytest.approx([10] * 9 + [20] * 8, abs=1e-3)
    new = torch.full((1, 1, N, N), 11.0)
    assert stats.z(new, BRAIN[:1], [40.0])[0, 0, 3, 3] == pytest.approx(2, abs=0.01)      # spread: FLOOR_HU


def test_positions_may_be_a_reversed_view():
    """'strides are negative' for [::-1] of positions, though they may run either way."""
    mm, r = np.array(MM), healthy(1)[0]
    places = normative.positions(10.0)
    torch.testing.assert_close(moments(r.flip(0), BRAIN, mm[::-1], places), moments(r, BRAIN, MM, places))
    stats = fitted(healthy(3))
    assert torch.equal(stats.z(r.flip(0), BRAIN, mm[::-1]), stats.z(r, BRAIN, MM).flip(0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_residuals_that_are_no_numbers_do_not_pass_for_healthy(value):
    """The surprise of NaN was 0. Outside the brain nothing is asked of them."""
    scans = healthy(4)
    normal, _ = fit_normal(scans[:3], [BRAIN] * 3, [MM] * 3)
    brain, odd = BRAIN.clone(), scans[3].clone()
    odd[1, 0, 4, 4], brain[1, 4, 4] = value, False
    assert torch.isfinite(normal.surprise(odd, brain, MM)[:, :, brain[1]]).all()
    with pytest.raises(ValueError, match="residuals: not finite in the brain"):
        normal.surprise(odd, BRAIN, MM)


def test_statistics_that_make_no_sense_are_refused():
    """Tails that do not increase divide 0 by 0, and the surprise is NaN."""
    normal, _ = fit_normal(healthy(3), [BRAIN] * 3, [MM] * 3)
    tensors = normal.to_tensors()
    level, flat, low = (tensors["tails"].clone() for _ in range(3))
    level[0, 0, 3], flat[1, 1, 5], low[0] = torch.nan, flat[1, 1, 4], low[0] - 99
    for tails, message in ((level, "finite"), (flat, "increase"), (low, "not negative"),
                           (tensors["tails"][..., :-1], r"expected tails \[K, 2, 17\], got \[2, 2, 16\]")):
        with pytest.raises(ValueError, match=f"residual statistics: .*{message}"):
            Normal.from_tensors(tensors | {"tails": tails})
    for positions in (tensors["positions_mm"].flip(0), tensors["positions_mm"] * torch.nan):
        with pytest.raises(ValueError, match="residual statistics: positions_mm must be finite and increase"):
            Normal.from_tensors(tensors | {"positions_mm": positions})


def test_blur_keeps_a_constant_inside_and_the_sum_of_a_point():
    point = torch.zeros(1, 15, 15)
    point[0, 7, 7] = 1
    blurred = gaussian_blur(point, 1.0)
    assert blurred.sum() == pytest.approx(1)
    assert blurred[0, 7, 8] / blurred[0, 7, 7] == pytest.approx(np.exp(-0.5), rel=1e-5)
    assert gaussian_blur(torch.ones(1, 15, 15), 1.0)[0, 7, 7] == pytest.approx(1)


def test_coarse_scale_averages_the_brain_alone():
    brain = torch.zeros(1, N, N, dtype=torch.bool)
    brain[0, 4:12, 4:12] = True
    difference = torch.where(brain, 3.0, 1000.0)
    fine, coarse = normative.scales(difference, torch.zeros(1, N, N), brain)[0]
    assert not fine.any()
    torch.testing.assert_close(coarse, torch.where(brain[0], 3.0, 0.0))


def test_the_coarse_gaussian_is_20_pixels_wide_at_512():
    brain, point = torch.ones(1, 512, 512, dtype=torch.bool), torch.zeros(1, 512, 512)
    point[0, 256, 256] = normative.CLIP_HU
    for coarse in (normative.scales(point, point, brain)[0, 1], normative.band_scales(point, brain)[0, 1]):
        for away in (coarse[256, 276], coarse[236, 256]):
            assert away / coarse[256, 256] == pytest.approx(np.exp(-0.5), rel=1e-4)


def test_moments_of_a_scan_count_once_however_thin_its_slices():
    places = torch.tensor([20.0])
    thick, thin = np.arange(0, 41, 5.0), np.arange(0, 41, 1.0)
    sums = [moments(torch.full((len(mm), 2, 4, 4), 7.0), torch.ones(len(mm), 4, 4, dtype=torch.bool), mm, places)
            for mm in (thick, thin)]
    torch.testing.assert_close(sums[0], sums[1])
    torch.testing.assert_close(sums[0][0, :, 0, 0, 0], torch.tensor([1.0, 7.0, 49.0]))


def test_spread_and_mean_are_those_of_the_healthy():
    stats = fitted(healthy(40, std=4.0, mean=3.0))
    assert stats.mean.mean() == pytest.approx(3, abs=0.1)
    assert stats.std.mean() == pytest.approx(4, abs=0.2)
    z = stats.z(torch.full((3, 2, N, N), 11.0), BRAIN, MM)
    assert z.mean() == pytest.approx(2, abs=0.1)


def test_a_place_that_is_always_drawn_badly_is_not_unusual():
    residuals = healthy(20, std=1.0)
    for r in residuals:
        r[:, :, :, :4] *= 6                                      # the rim of every healthy head
    z = fitted(residuals).z(torch.full((3, 2, N, N), 5.0), BRAIN, MM)
    assert z[..., 1].mean() < 0.4 * z[..., 8].mean()


def test_left_and_right_lend_each_other_their_statistics():
    residuals = healthy(10, std=1.0)
    for r in residuals:
        r[..., : N // 2] += 4                                    # patient's right alone
    mean = fitted(residuals).mean
    torch.testing.assert_close(mean, mean.flip(-1))
    assert mean.mean() == pytest.approx(2, abs=0.1)


def test_z_is_0_outside_the_brain_and_interpolates_between_positions():
    places = torch.tensor([0.0, 5.0])
    stats = ResidualStats(places, torch.zeros(2, 2, 8, 8), torch.stack([torch.full((2, 8, 8), s) for s in (1.0, 3.0)]))
    z = stats.z(torch.full((3, 2, N, N), 6.0), BRAIN, [0.0, 2.5, 99.0])
    assert [one[0, 0, 0].item() for one in z] == pytest.approx([6, 3, 2])
    assert not stats.z(torch.full((3, 2, N, N), 6.0), ~BRAIN, [0.0, 2.5, 99.0]).any()


def test_beyond_the_ends_of_the_healthy_the_nearest_position_judges():
    places, std = torch.tensor([0.0, 5.0, 10.0]), torch.tensor([1.0, 2.0, 4.0])
    stats = ResidualStats(places, torch.ones(3, 2, 8, 8), std[:, None, None, None].expand(3, 2, 8, 8).contiguous())
    z = stats.z(torch.full((5, 2, N, N), 9.0), torch.ones(5, N, N, dtype=torch.bool), [99.0, 10.0, 9.0, 0.0, -3.0])
    assert [one[0, 0, 0].item() for one in z] == pytest.approx([2, 2, 8 / 3.6, 8, 8])


@pytest.mark.parametrize("deepest, count", [(0.0, 2), (7.4, 2), (7.6, 3), (12.4, 3)])
def test_positions_reach_as_deep_as_a_healthy_slice_is_nearest(deepest, count):
    assert normative.positions(deepest).tolist() == [5.0 * i for i in range(count)]


def test_moments_by_hand():
    """Slices at 0 and 5 mm: weights of a Gaussian of 5 mm, made to sum to 1 where they sum to more."""
    residuals = torch.stack([torch.full((1, 2, 2), 3.0), torch.full((1, 2, 2), 6.0)])
    sums = moments(residuals, torch.ones(2, 2, 2, dtype=torch.bool), [0.0, 5.0], torch.tensor([0.0, 10.0]))
    near, far = 1 / (1 + np.exp(-0.5)), np.exp([-2.0, -0.5])
    assert sums[0, :, 0, 0, 0].tolist() == pytest.approx([1, 3 * near + 6 * (1 - near), 9 * near + 36 * (1 - near)])
    assert sums[1, :, 0, 0, 0].tolist() == pytest.approx([far.sum(), far @ [3, 6], far @ [9, 36]])


def test_what_is_no_brain_has_no_say():
    """Brain in the upper half of 4 x 4 pixels: z = 1.01 lies in bin 50 of 0.02, and to the other side in bin 0."""
    brain = torch.zeros(1, 4, 4, dtype=torch.bool)
    brain[:, :2] = True
    sums = moments(torch.full((1, 1, 4, 4), 7.0), brain, [0.0], torch.tensor([0.0]))
    assert sums[0, :, 0, 0, 0].tolist() == [1, 7, 49] and not sums[0, :, 0, 1].any()
    pixels, shares = histogram(torch.full((1, 1, 4, 4), 1.01), brain)[:, 0]
    assert pixels[0, 50] == pixels[1, 0] == 8 and pixels.sum(-1).tolist() == [8, 8]
    assert shares[0, 50] == shares[1, 0] == 1 and shares.sum(-1).tolist() == [1, 1]


def sums_of(count: float, first: float, second: float) -> torch.Tensor:
    """moments() that are the same everywhere, at one position and of one kind, of a frame of 128 pixels."""
    return torch.tensor([count, first, second]).reshape(1, 3, 1, 1, 1).repeat(1, 1, 1, 64, 64)


def test_mean_and_spread_of_a_place_by_hand():
    """One scan of 0 HU above and 8 HU below, and two scans' worth of all places: 4 HU on average, variance 16.

    (8 + 2 * 4) / 3 = 16 / 3, and ((8 - 16 / 3)^2 + 2 * 16) / 3 about it.
    """
    one = sums_of(1, 8, 64)
    one[:, 1:, :, :32] = 0
    stats = ResidualStats.fit([one], torch.zeros(1), 128)
    assert stats.mean[0, 0, 48, 32].item() == pytest.approx(16 / 3, rel=1e-4)
    assert stats.std[0, 0, 48, 32].item() == pytest.approx((((8 - 16 / 3) ** 2 + 32) / 3) ** 0.5, rel=1e-4)


def test_a_place_lends_its_statistics_by_a_gaussian_of_12_pixels_at_512():
    """1.5 of a grid of 64 across 128: exp(-(3 / 1.5)^2 / 2) three places off. A point and its mirror image."""
    one = sums_of(1, 0, 0)
    one[:, 1, :, 32, 31:33] = 1
    mean = ResidualStats.fit([one], torch.zeros(1), 128).mean[0, 0, :, 32]
    lent = mean - mean[16]                                           # far off: what all places lend
    assert (lent[35] / lent[32]).item() == pytest.approx(np.exp(-2), rel=1e-3)


def test_no_healthy_spread_is_under_half_a_hu():
    assert ResidualStats.fit([sums_of(10, 30, 90)], torch.zeros(1), 128).std.unique().tolist() == [0.5]


def test_scans_weigh_alike_in_the_tails_whatever_their_size():
    """100 pixels at z = 0 and 10 at 5: half of the brain, not a tenth, is at 5 or above. 10^-0.5 is the first level."""
    brain = torch.ones(1, 10, 10, dtype=torch.bool)
    low, high = histogram(torch.zeros(1, 1, 10, 10), brain), histogram(torch.full((1, 1, 1, 10), 5.01), brain[:, :1])
    for histograms in ([low, high], [low + high]):
        assert Tails.fit(histograms).z[0, :, 0].tolist() == pytest.approx([5.02, 0.02])


def test_each_kind_has_its_own_tails():
    """z = 2 is the last of the first kind's levels, 4.5, and the first of the second's, 0.5."""
    z = torch.stack([torch.linspace(1, 2, 17), torch.linspace(2, 4, 17)])[:, None].expand(2, 2, 17)
    told = Tails(z).surprise(torch.full((1, 2, 1, 1), 2.0))
    assert told.flatten().tolist() == pytest.approx([4.5, 0.5])


def test_surprise_is_the_share_of_healthy_brain_beyond():
    # |z| is uniform on 0..10 on the dense side: a tenth lies above 9, so z = 9 has surprise 1.
    z = torch.zeros(1, 2, 100, 200)
    z[0, :, :, :100] = torch.linspace(0, 10, 10000).reshape(100, 100)
    z[0, :, :, 100:] = -torch.linspace(0, 20, 10000).reshape(100, 100)
    tails = Tails.fit([histogram(z, torch.ones(1, 100, 200, dtype=torch.bool))])
    # 1/20 of the whole brain lies above z = 9, and 1/20 below z = -18
    told = tails.surprise(torch.tensor([9.0, -18.0, 0.0, 4.0]).reshape(1, 1, 2, 2).expand(1, 2, 2, 2))[0, 0]
    assert told.flatten().tolist() == pytest.approx([-np.log10(0.05), np.log10(0.05), 0, -np.log10(0.3)], abs=0.03)


def test_surprise_grows_beyond_what_was_seen_up_to_a_limit():
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(4, 2, 64, 64, generator=rng)
    tails = Tails.fit([histogram(z, torch.ones(4, 64, 64, dtype=torch.bool))])
    told = tails.surprise(torch.tensor([3.0, 4.0, 5.0, 6.0, 500.0, -500.0]).reshape(1, 1, 2, 3).expand(1, 2, 2, 3))
    steps = told[0, 0].flatten()
    assert (steps[:4].diff() > 0).all() and steps[3] > LEVELS[-1]
    assert steps[4] == normative.HIGHEST and steps[5] == -normative.HIGHEST


@pytest.mark.parametrize("seed", range(4))
def test_what_next_to_no_healthy_pixel_reaches_is_not_known(seed):
    """Just above the highest of 5,376 pixels the surprise was 4.5, which one in 31,623 reaches, at it 3.7."""
    z = torch.randn(2, 1, 84, 64, generator=torch.Generator().manual_seed(seed))
    inside = torch.ones(1, 84, 64, dtype=torch.bool)
    one, both = (Tails.fit([histogram(part, inside) for part in parts]) for parts in (z[:1, None], z[:, None]))
    highest = z[0].max().expand(1, 1, 1, 1)
    assert abs(one.surprise(highest) - both.surprise(highest)) < 0.3
    assert 0 < one.surprise(highest + 0.03) - one.surprise(highest) < 0.1


def test_levels_that_are_not_known_lie_on_the_line_before_them():
    """Of 100 pixels ten reach the level 1, so all of the first five are kept: a fifth at each of z = 0 to 4."""
    z = torch.arange(5.0).repeat_interleave(20).reshape(1, 1, 10, 10)
    at = Tails.fit([histogram(z, torch.ones(1, 10, 10, dtype=torch.bool))]).z[0, 0]
    assert at[:5].tolist() == pytest.approx([3.02, 4.021, 4.022, 4.023, 4.024])
    assert at[5:].tolist() == pytest.approx([4.024 + (4.024 - 3.02) / 4 * i for i in range(1, 13)])


def test_no_scan_is_told_by_its_own_statistics():
    residuals = healthy(6, std=1.0)
    residuals[2] = residuals[2] + 10.0                           # one odd scan
    _, surprises = fit_normal(residuals, [BRAIN] * 6, [MM] * 6)
    odd = surprises[2].mean()
    assert odd > 4 and all(one.abs().mean() < 2 for i, one in enumerate(surprises) if i != 2)
    normal, _ = fit_normal(residuals, [BRAIN] * 6, [MM] * 6)
    assert normal.surprise(residuals[2], BRAIN, MM).mean() < odd      # with itself among the healthy: less unusual


def test_too_few_scans_are_refused():
    with pytest.raises(ValueError, match="at least 3 patients.*found 2"):
        fit_normal(healthy(2), [BRAIN] * 2, [MM] * 2)


def test_combine_takes_the_larger_with_its_sign():
    surprise = torch.tensor([[[[1.0, -4.0]], [[-2.0, 3.0]]]])
    assert combine(surprise, "both").flatten().tolist() == [-2, -4]


def test_stored_and_read_back():
    normal, _ = fit_normal(healthy(4), [BRAIN] * 4, [MM] * 4)
    back = Normal.from_tensors(normal.to_tensors())
    x = healthy(1, seed=9)[0]
    torch.testing.assert_close(back.surprise(x, BRAIN, MM), normal.surprise(x, BRAIN, MM), atol=0.02, rtol=0.02)
    with pytest.raises(ValueError, match="no tails"):
        Normal.from_tensors({k: v for k, v in normal.to_tensors().items() if k != "tails"})


# ---- the band, away from bone

def test_a_shade_over_the_head_is_no_fine_residual_but_a_spot_is():
    inside = torch.ones(1, 128, 128, dtype=torch.bool)
    shade = torch.linspace(0, 10, 128).expand(1, 128, 128).clone()
    spot = shade.clone()
    spot[0, 60:66, 60:66] += 30
    fine, coarse = normative.band_scales(shade, inside)[0]
    assert fine[20:-20, 20:-20].abs().max() < 0.05 and coarse[64, 100] == pytest.approx(100 / 12.7, abs=0.1)
    assert normative.band_scales(spot, inside)[0, 0, 62, 62] > 20


def test_the_hyperdense_band_knows_no_hypodense_residual():
    inside, spots = torch.ones(1, 128, 128, dtype=torch.bool), torch.zeros(1, 128, 128)
    spots[0, 30:36, 30:36], spots[0, 90:96, 90:96] = 30, -30
    both, dense = (normative.band_scales(spots, inside, hyperdense)[0] for hyperdense in (False, True))
    assert both[0, 92, 92] < -20 and dense[0, 92, 92] == 0 and torch.equal(both[1], dense[1])
    assert dense[0, 32, 32] == both[0, 32, 32] > 20 and dense[0].min() == 0


def test_the_hyperdense_band_alone_tells_nothing_hypodense():
    with pytest.raises(ValueError, match="filter hyperdense: needs scale sides, got 'both'"):
        SurpriseSettings(filter="hyperdense", scale="both")


def test_residuals_are_clipped_in_the_band():
    inside = torch.ones(1, 64, 64, dtype=torch.bool)
    assert normative.band_scales(torch.full((1, 64, 64), 500.0), inside)[0, 1, 32, 32].item() == pytest.approx(40)


def test_the_band_lies_between_gaussians_of_6_and_40_pixels_at_512():
    """Of a point, clipped to 40 HU: 40 times the Gaussian of 6 less that of sqrt(6^2 + 40^2)."""
    inside, point = torch.ones(1, 512, 512, dtype=torch.bool), torch.zeros(1, 512, 512)
    point[0, 256, 256] = 500
    fine = normative.band_scales(point, inside)[0, 0]
    for away in (0, 6, 12, 40):
        high, low = (np.exp(-away**2 / (2 * v)) / (2 * np.pi * v) for v in (6**2, 6**2 + 40**2))
        assert fine[256, 256 + away].item() == pytest.approx(40 * (high - low), rel=0.01, abs=2e-4)


def test_soft_brain_leaves_out_bone_and_a_rim_of_it():
    hu, brain = torch.full((1, 128, 128), 35.0), torch.ones(1, 128, 128, dtype=torch.bool)
    hu[0, 50, 50], hu[0, 80, 80] = 100.0, 90.0                   # a calcification, and dense blood
    soft = normative.soft_brain(hu, brain)
    assert (~soft).sum() == 9 and not soft[0, 49:52, 49:52].any()
    assert not normative.soft_brain(hu, ~brain).any()


@pytest.mark.parametrize("size, rim", [(128, 1), (256, 1), (512, 2)])
def test_the_rim_is_a_pixel_and_wider_only_at_512(size, rim):
    hu, brain = torch.full((1, size, size), 30.0), torch.ones(1, size, size, dtype=torch.bool)
    hu[0, 50, 50] = 200.0
    left_out = ~normative.soft_brain(hu, brain)[0]
    assert left_out.sum() == (2 * rim + 1) ** 2 and left_out[50 - rim:51 + rim, 50 - rim:51 + rim].all()


def test_sides_take_what_is_dense_fine_and_what_is_thin_coarse():
    surprise = torch.tensor([[3.0, 1.0], [-5.0, 2.0], [1.0, -4.0], [-2.0, -2.0]]).reshape(1, 4, 2).permute(0, 2, 1)
    assert combine(surprise[..., None], "sides", hypodense=0.5).flatten().tolist() == [3, 0, -2, -1]
