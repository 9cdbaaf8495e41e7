from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage as ndi

from demos.anatomy import Head, Tissue, _draw_facts, build_head
from demos.canvas import SHAPE, STEP, Canvas, capsule, cover, ellipsoid, mirrored, refine, resize

YOUNG, OLD = 29, 4      # seeds of heads of 23 and 86 years
BRAIN = (Tissue.GREY, Tissue.WHITE, Tissue.DEEP_GREY, Tissue.CEREBELLUM)


@pytest.fixture(scope="module")
def young() -> Head:
    return build_head(np.random.default_rng(YOUNG))


@pytest.fixture(scope="module")
def old() -> Head:
    return build_head(np.random.default_rng(OLD))


def point(z: float, y: float, x: float) -> torch.Tensor:
    return torch.tensor((z, y, x), dtype=torch.float32).view(3, 1, 1, 1)


def test_the_seed_fixes_every_byte(young):
    again = build_head(np.random.default_rng(YOUNG))
    for name in ("tissue", "hu", "depth_mm", "midline_mm", "mni_mm"):
        assert getattr(again, name).tobytes() == getattr(young, name).tobytes(), name
    assert again.facts == young.facts


def test_arrays_share_one_grid_and_hold_every_tissue(young):
    for name, dtype in (("tissue", np.uint8), ("hu", np.float32), ("depth_mm", np.float32), ("midline_mm", np.float32)):
        array = getattr(young, name)
        assert array.shape == SHAPE and array.dtype == dtype, name
    assert young.mni_mm.shape == (3, *SHAPE) and young.mni_mm.dtype == np.float16
    assert set(np.unique(young.tissue)) == {int(tissue) for tissue in Tissue}
    assert np.isfinite(young.hu).all() and young.hu.min() >= -1000


@pytest.mark.parametrize("tissue, low, high", [
    (Tissue.AIR, -1000, -1000), (Tissue.SINUS, -1000, -950), (Tissue.FAT, -105, -80), (Tissue.MUSCLE, 50, 60),
    (Tissue.BONE, 900, 1700), (Tissue.DIPLOE, 300, 700), (Tissue.CSF, 4, 12), (Tissue.VENTRICLE, 4, 12),
    (Tissue.GREY, 37, 41), (Tissue.WHITE, 28, 33), (Tissue.DEEP_GREY, 35, 41), (Tissue.CEREBELLUM, 35, 41),
    (Tissue.FALX, 40, 56), (Tissue.TENTORIUM, 40, 55), (Tissue.VESSEL, 44, 60)])
def test_median_hu_is_as_in_life(young, old, tissue, low, high):
    for head in (young, old):
        assert low <= np.median(head.hu[head.tissue == tissue]) <= high


def test_tissues_meet_in_partial_volume_and_are_not_flat(young):
    grey = young.hu[young.tissue == Tissue.GREY]
    assert grey.std() > 0.3
    inside = young.depth_mm > 3
    between = inside & (young.hu > 14) & (young.hu < 24)     # neither CSF nor white matter
    assert between.sum() > 0.01 * inside.sum(), between.sum() / inside.sum()


def test_no_brain_outside_the_skull(young, old):
    for head in (young, old):
        assert head.depth_mm[np.isin(head.tissue, BRAIN)].min() > 0
        assert head.depth_mm[head.tissue == Tissue.VENTRICLE].min() > 0
        assert not np.isin(head.tissue[head.depth_mm > 1], (Tissue.AIR, Tissue.FAT, Tissue.BONE, Tissue.SINUS)).any()


def test_the_skull_is_closed_over_the_vault(young, old):
    for head in (young, old):
        upper = head.mni_mm[2].max((1, 2)) > 0
        parts, _ = ndi.label(head.hu[upper] < 200)
        outside = parts[-1, 0, 0]
        assert not (parts[head.depth_mm[upper] > 1] == outside).any()


def test_the_cavity_volume_is_an_adults(young, old):
    sizes = [np.prod([facts[f"scale_{axis}"] for axis in "zyx"])
             for facts in (_draw_facts(np.random.default_rng(seed)) for seed in range(300))]
    for head in (young, old):
        assert 1150 < head.facts["cavity_ml"] < 1750
        assert head.facts["cavity_ml"] == pytest.approx((head.depth_mm > 0).sum() / 1000, rel=1e-4)
        per_size = head.facts["cavity_ml"] / np.prod([head.facts[f"scale_{axis}"] for axis in "zyx"])
        assert per_size * min(sizes) > 1100 and per_size * max(sizes) < 1800
        assert per_size * np.std(sizes) > 60


def test_heads_differ_in_folds_and_skull(young, old):
    for tissue in (Tissue.GREY, Tissue.DIPLOE):
        a, b = young.tissue == tissue, old.tissue == tissue
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) < 0.75


def test_age_widens_ventricles_and_sulci_and_fades_contrast(young, old):
    def share(head: Head, tissue: Tissue) -> float:
        return (head.tissue == tissue).sum() / (head.depth_mm > 0).sum()

    def contrast(head: Head) -> float:
        return np.median(head.hu[head.tissue == Tissue.GREY]) - np.median(head.hu[head.tissue == Tissue.WHITE])

    assert share(old, Tissue.VENTRICLE) > 2 * share(young, Tissue.VENTRICLE)
    assert share(old, Tissue.CSF) > 1.4 * share(young, Tissue.CSF)
    assert contrast(old) < contrast(young)


def test_axes_point_up_back_and_left(young):
    centre = {tissue: ndi.center_of_mass(young.tissue == tissue)
              for tissue in (Tissue.CEREBELLUM, Tissue.VENTRICLE, Tissue.ORBIT)}
    assert centre[Tissue.CEREBELLUM][0] < centre[Tissue.VENTRICLE][0]      # z grows upwards
    assert centre[Tissue.ORBIT][1] < centre[Tissue.CEREBELLUM][1]          # row 0 is anterior
    assert (young.mni_mm[0, :, :, 0] > 0).all() and (young.mni_mm[0, :, :, -1] < 0).all()    # column 0 is the right
    assert (np.diff(young.midline_mm[100, 120]) > 0).all()                 # and the distance grows to the left
    assert np.abs(young.midline_mm[young.tissue == Tissue.FALX]).max() < 8


def test_mni_coordinates_find_the_pineal_gland_and_the_eyes(young):
    pineal = young.mni_mm[:, young.tissue == Tissue.PINEAL].astype(float).mean(1)
    assert np.allclose(pineal, (0, -31, 1), atol=8)
    right = (young.tissue == Tissue.ORBIT) & (young.midline_mm < 0)
    assert np.allclose(young.mni_mm[:, right].astype(float).mean(1), (34, 60, -41), atol=6)


def test_shapes_measure_signed_distance():
    assert ellipsoid(point(0, 0, 3), (0, 0, 0), (5, 5, 5)).item() == pytest.approx(2.0)
    assert ellipsoid(point(0, 7, 0), (0, 0, 0), (5, 5, 5)).item() == pytest.approx(-2.0)
    assert ellipsoid(point(0, 0, 4), (0, 0, 0), (4, 4, 4), 3.0).item() == pytest.approx(0.0, abs=1e-6)
    rod = ((0, 0, 0), (10, 0, 0), (2, 4))
    assert capsule(point(5, 1, 0), *rod).item() == pytest.approx(2.0)      # radius 3 halfway
    assert capsule(point(15, 0, 0), *rod).item() == pytest.approx(-1.0)    # past the thick end
    assert mirrored((1, 2, 3), -1) == (1, 2, -3)


def test_cover_mixes_neighbours_by_volume():
    assert cover(torch.tensor([-1.0, 0.0, 0.25, 2.0])).tolist() == [0, 0.5, 0.75, 1]
    canvas = Canvas(torch.zeros(3, 1, 1, 1), (1, 1, 1))
    at = (slice(0, 1), slice(0, 1), slice(0, 2))
    canvas.paint(torch.tensor([[[0.25, 0.75]]]), 0.0, Tissue.CSF, at)
    assert canvas.hu[0, 0, :3].tolist() == [-750, -250, -1000]
    assert canvas.tissue[0, 0, :3].tolist() == [Tissue.AIR, Tissue.CSF, Tissue.AIR]


def test_refine_is_the_part_of_the_whole_resized_field():
    coarse = torch.arange(51 * 61 * 51, dtype=torch.float32).sqrt().view(1, 51, 61, 51)
    at = (slice(40, 61), slice(100, 141), slice(0, 41))
    assert all((a.stop - 1) % STEP == 0 for a in at)
    assert torch.allclose(refine(coarse, at), resize(coarse, SHAPE)[(slice(None), *at)], atol=1e-3)
