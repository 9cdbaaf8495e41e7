import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from detect.latent import LatentStats


def make_stats(positions=(0.0, 5.0, 10.0), layers=2, dim=6, kept=3, seed=0) -> LatentStats:
    rng = torch.Generator().manual_seed(seed)
    P = len(positions)
    basis = torch.linalg.qr(torch.randn(P, layers, dim, dim, generator=rng)).Q[..., :kept].contiguous()
    return LatentStats(
        torch.tensor(positions), torch.randn(P, layers, dim, generator=rng), basis,
        torch.rand(P, layers, kept, generator=rng) + 0.5,
        (torch.rand(P, layers, generator=rng) + 0.1) * (kept < dim),
        torch.full((P,), 40), torch.full((P,), 7.5), torch.zeros(P, layers))


def single(components, variance, mean, remainder=0.0) -> LatentStats:
    """One position, one layer."""
    return LatentStats(torch.zeros(1), torch.tensor([[mean]]), torch.tensor([[components]]),
                       torch.tensor([[variance]]), torch.tensor([[remainder]]), torch.tensor([9]),
                       torch.zeros(1), torch.zeros(1, 1))


def gaussian_codes(n, deviations, seed=0):
    """Codes [n, 1, D] whose values before the last activation are independent with these deviations."""
    x = torch.randn(n, 1, len(deviations), generator=torch.Generator().manual_seed(seed))
    return F.leaky_relu(x * torch.tensor(deviations), 0.2)


# ---- p and w

def test_full_set_by_hand():
    # Columns are the directions: a quarter turn tells components from their transpose.
    stats = single([[0.0, -1.0], [1.0, 0.0]], variance=[4.0, 9.0], mean=[1.0, 2.0])
    w = torch.tensor([[[3.0, -1.0]]])                              # leaky_5: (3, -5); minus the mean: (2, -7)
    p = stats.at([0.0]).to_p(w)
    torch.testing.assert_close(p, torch.tensor([[[-7 / 2, -2 / 3]]]))
    torch.testing.assert_close(stats.at([0.0]).to_w(p), w)


def test_remainder_by_hand():
    stats = single([[1.0], [0.0], [0.0]], variance=[4.0], mean=[0.0, 0.0, 0.0], remainder=0.25)
    w = torch.tensor([[[6.0, 1.0, -0.2]]])                         # leaky_5: (6, 1, -1)
    p = stats.at([0.0]).to_p(w)
    torch.testing.assert_close(p, torch.tensor([[[3.0, 0.0, 2.0, -2.0]]]))     # c, then r in all 3 directions
    p[..., 1] = 50.0                                               # r along the kept component has no meaning
    torch.testing.assert_close(stats.at([0.0]).to_w(p), w)


@pytest.mark.parametrize("kept", [1, 3, 6])
def test_inverse(kept):
    stats = make_stats(kept=kept)
    w, mm = torch.randn(5, 2, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([0.0, 4, 6, 9, 30])
    at = stats.at(mm)
    p = at.to_p(w)
    assert p.shape == (5, 2, at.p_dim) and at.p_dim == (6 if kept == 6 else 6 + kept)
    torch.testing.assert_close(stats.at(mm).to_w(p), w, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.at(mm).to_p(at.to_w(p)), p, atol=1e-5, rtol=1e-5)


def test_nearest_position_clamped_at_both_ends():
    stats = make_stats()
    at = stats.at(np.array([-40.0, 2.4, 2.6, 8.0, 200.0]))
    expected = stats.mean[[0, 0, 1, 2, 2]]
    torch.testing.assert_close(at.mean, expected)
    with pytest.raises(ValueError, match="finite millimetres"):
        stats.at([float("nan")])


def test_differentiable_and_never_in_reduced_precision():
    at = make_stats().at([0.0, 5.0])
    p = torch.randn(2, 2, 9, dtype=torch.float32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    w = at.to_w(p)
    w.sum().backward()
    assert p.grad.abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(at.to_w(p), w, atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"p: these statistics expect \[2, 2, 9\], got \[2, 2, 6\]"):
        at.to_w(p[..., :6])


def test_shapes_and_variances_are_checked():
    stats = make_stats()
    fields = stats.to_tensors(torch.float32)
    with pytest.raises(ValueError, match=r"variance: expected \[3, 2, 3\]"):
        LatentStats(**fields | {"variance": fields["variance"][..., :2]})
    with pytest.raises(ValueError, match="every variance must be finite and above 0"):
        LatentStats(**fields | {"variance": fields["variance"] * 0})
    with pytest.raises(ValueError, match="must increase"):
        LatentStats(**fields | {"positions_mm": torch.tensor([0.0, 10.0, 5.0])})


def released_arrays(rng, dim=4):
    return {"mean": rng.normal(size=(3, 2, dim)), "std": rng.random((3, 2, dim)),
            "pca_components": np.linalg.qr(rng.normal(size=(3, 2, dim, dim)))[0],
            "pca_explained_variance": rng.random((3, 2, dim)) + 0.1}


@pytest.mark.parametrize(("name", "place", "factor", "message"), [
    ("mean", (1, 0, 2), np.nan, "^mean: every number must be finite; fetch the file again, or fit"),
    ("pca_components", (2, 1, 0, 0), np.inf, "^components: every number must be finite"),
    ("pca_components", (2, 1, slice(None), 3), 0.0, "orthonormal columns, but at position 2, layer 1 .* up to 1 away"),
    ("pca_components", (2, 1, slice(None), 3), 2.0, "orthonormal columns, but at position 2, layer 1 .* up to 3 away"),
    ("pca_components", (2, 1, slice(None), 3), 1.01, "orthonormal columns"),
])
def test_statistics_that_are_no_numbers_or_no_basis_are_refused(name, place, factor, message):
    """They were imported, and drew NaN, or another code than the one that went in."""
    arrays = released_arrays(np.random.default_rng(0))
    LatentStats.from_released(arrays)
    arrays[name][place] *= factor
    with pytest.raises(ValueError, match=message):
        LatentStats.from_released(arrays)


@pytest.mark.parametrize("kept", [3, 6])
def test_a_stored_basis_is_one_by_as_much_as_its_precision_leaves(kept):
    for dtype in (torch.float16, torch.bfloat16):
        tensors = make_stats(kept=kept).to_tensors(dtype)
        LatentStats.from_tensors(tensors)
        tensors["components"][1, 0, :, 2] *= 2                # of 3 in 6 the step to the nearest basis made -1
        with pytest.raises(ValueError, match="orthonormal columns, but at position 1, layer 0"):
            LatentStats.from_tensors(tensors)


# ---- fit

CROSS = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])       # variances 6 and 2/3, average 10/3


def fit(w, positions=(0.0,), mm=None, components=1, min_codes=4, max_reach_mm=20.0, **options) -> LatentStats:
    """Of codes that all lie at the vertex, unless mm says where."""
    mm = torch.zeros(len(w)) if mm is None else mm
    return LatentStats.fit(w, mm, positions, components, min_codes=min_codes, max_reach_mm=max_reach_mm, **options)


# OAS of n codes, D = 2: share = (0 tr(S^2) + tr(S)^2) / (n (tr(S^2) - tr(S)^2 / 2)), 400 / 9 / (n 128 / 9), at most 1
@pytest.mark.parametrize("passes, share, leading, remainder", [(1, 25 / 32, 47 / 12, 2.75), (2, 1.0, 10 / 3, 10 / 3)])
def test_fit_by_hand(passes, share, leading, remainder):
    # Two points on each axis, mean 0 after leaky_5: variances (n - 1 = 3) 2*9/3 = 6 and 2*1/3, drawn to their average.
    stats = fit(F.leaky_relu(CROSS, 0.2)[:, None], passes=passes)
    torch.testing.assert_close(stats.mean, torch.zeros(1, 1, 2))
    torch.testing.assert_close(stats.shrinkage.flatten(), torch.tensor([share]))
    torch.testing.assert_close(stats.variance.flatten(), torch.tensor([leading]))
    torch.testing.assert_close(stats.remainder_variance.flatten(), torch.tensor([remainder]))
    torch.testing.assert_close(stats.components.abs().flatten(), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(stats.explained().flatten(), torch.tensor([leading * 3 / 20]))        # 6 + 2/3 in all
    assert stats.n_codes.tolist() == [4]


def test_copies_count_once():
    w = F.leaky_relu(CROSS, 0.2)[:, None]
    stats, twice = fit(w), fit(w.repeat(2, 1, 1), passes=2)
    assert twice.shrinkage.item() == pytest.approx(stats.shrinkage.item(), rel=0.02)      # copies count once


def test_healthy_codes_become_standard_normal():
    deviations = [4.0, 2.0] + [0.5] * 10
    stats = fit(gaussian_codes(4000, deviations), components=2)
    torch.testing.assert_close(stats.variance.flatten(), torch.tensor([16.0, 4.0]), rtol=0.1, atol=0)
    torch.testing.assert_close(stats.remainder_variance.item(), 0.25, rtol=0.1, atol=0)
    p = stats.at(torch.zeros(4000)).to_p(gaussian_codes(4000, deviations, seed=1))
    torch.testing.assert_close(p[..., :2].std(dim=0).flatten(), torch.ones(2), atol=0.05, rtol=0)
    assert (p[..., 2:] ** 2).sum(dim=-1).mean().item() == pytest.approx(10, rel=0.05)      # D - K directions


def test_codes_that_have_gone_through_no_activation_are_taken_as_they_are():
    """A step of p moved the positive numbers of a code in space five times as far, and p = 0 was not its mean."""
    w = torch.tensor([[[3.0, 0.5]], [[-1.0, -0.5]], [[2.0, 0.0]], [[-2.0, 0.0]]])        # mean (0.5, 0)
    stats = fit(w, slope=1.0)
    torch.testing.assert_close(stats.mean, torch.tensor([[[0.5, 0.0]]]))
    at = stats.at([0.0])
    torch.testing.assert_close(at.to_w(torch.zeros(1, 1, at.p_dim)), torch.tensor([[[0.5, 0.0]]]))
    torch.testing.assert_close(at.to_w(at.to_p(w[:1])), w[:1])
    up, down = (at.to_w(sign * torch.tensor([[[3.0, 0.0, 0.0]]]))[0, 0] - stats.mean[0, 0] for sign in (1, -1))
    torch.testing.assert_close(up, -down)
    with pytest.raises(ValueError, match="slope: expected one above 0, at most 1, got 0"):
        dataclasses.replace(stats, slope=torch.tensor(0.0))


def test_neighbours_are_used_and_too_few_codes_are_borrowed():
    mm = torch.tensor([0.0] * 10 + [5.0] * 10 + [10.0] * 10 + [25.0] * 2)
    w = torch.randn(32, 1, 4, generator=torch.Generator().manual_seed(0))
    stats = fit(w, [0.0, 5.0, 10.0, 25.0], mm, min_codes=12)
    assert stats.n_codes.tolist() == [20, 30, 20, 12]                   # the last takes the ten 15 mm away
    assert stats.reach_mm.tolist() == [7.5, 7.5, 7.5, 15.0]
    with pytest.raises(ValueError, match="position 25 mm below the vertex: 2 codes within 14 mm, 12 needed"):
        fit(w, [25.0], mm, min_codes=12, max_reach_mm=14.0)


def test_fewer_codes_than_dimensions_and_constant_codes():
    w = torch.randn(40, 2, 64, generator=torch.Generator().manual_seed(0))
    stats = fit(w, components=8, min_codes=32)
    overlap = stats.components.transpose(-1, -2) @ stats.components
    torch.testing.assert_close(overlap, torch.eye(8).expand(1, 2, 8, 8), atol=1e-5, rtol=0)
    w[:, 1] = 0.3                                                       # a layer that never changes
    stats = fit(w, components=8, min_codes=32)
    at = stats.at(torch.zeros(40))
    torch.testing.assert_close(at.to_w(at.to_p(w)), w, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("change, message", [
    (dict(components=5), "components: expected 1 to 4"),
    (dict(min_codes=2, components=2), "min_codes: 2 components need more"),
])
def test_fit_refuses(change, message):
    arguments = dict(components=2) | change
    with pytest.raises(ValueError, match=message):
        fit(torch.ones(40, 1, 4), **arguments)
    with pytest.raises(ValueError, match="codes must be finite"):
        fit(torch.full((40, 1, 4), torch.nan), components=2)


# ---- stored and released

def test_store_keeps_components_orthonormal_in_half_precision():
    stats = make_stats(dim=32, kept=8)
    tensors = stats.to_tensors()
    assert tensors["components"].dtype == torch.float16 and tensors["mean"].dtype == torch.float32
    back = LatentStats.from_tensors(tensors)
    overlap = back.components.transpose(-1, -2) @ back.components
    torch.testing.assert_close(overlap, torch.eye(8).expand(3, 2, 8, 8), atol=2e-6, rtol=0)
    torch.testing.assert_close(back.components, stats.components, atol=1e-3, rtol=0)
    torch.testing.assert_close(back.variance, stats.variance, atol=0, rtol=0)
    assert stats.slope == back.slope == torch.tensor(0.2)
    straight = dataclasses.replace(stats, slope=torch.tensor(1.0))
    assert LatentStats.from_tensors(straight.to_tensors()).at([0.0]).slope == straight.to("cpu").slope == 1
    del tensors["slope"]                                                # as files were before there was one
    assert LatentStats.from_tensors(tensors).slope == torch.tensor(0.2)
    del tensors["variance"]
    with pytest.raises(ValueError, match="latent statistics: no variance"):
        LatentStats.from_tensors(tensors)


def test_released_statistics_follow_the_papers_formula():
    rng = np.random.default_rng(0)
    arrays = released_arrays(rng)
    stats = LatentStats.from_released(arrays)
    assert stats.positions_mm.tolist() == [0.0, 5.0, 10.0]
    w = rng.normal(size=(2, 4))
    before = np.where(w > 0, w, 5 * w)
    expected = [(before[l] - arrays["mean"][1, l]) @ arrays["pca_components"][1, l]
                / np.sqrt(arrays["pca_explained_variance"][1, l]) for l in range(2)]
    p = stats.at([6.0]).to_p(torch.tensor(w[None]))
    np.testing.assert_allclose(p[0], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats.at([6.0]).to_w(p)[0], w, rtol=1e-4, atol=1e-5)
    del arrays["mean"]
    with pytest.raises(ValueError, match="no mean; the file holds"):
        LatentStats.from_released(arrays)
