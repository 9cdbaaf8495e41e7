from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest
from scipy import ndimage

from demos.anatomy import Head, Tissue
from demos.lesions import KINDS, add_emergency
from demos.shapes import BRAIN, between, blob, paint, soft, volume_ml
from demos.warps import blocks, displacement, enter, leave, move, smooth_noise, voxels

SCALE = 0.6                        # a head of 0.6 times an adult's size has a fifth of its voxels
HU = {Tissue.BONE: 900, Tissue.CSF: 8, Tissue.VENTRICLE: 6, Tissue.GREY: 38, Tissue.WHITE: 30, Tissue.DEEP_GREY: 37,
      Tissue.BRAINSTEM: 31, Tissue.CEREBELLUM: 35, Tissue.FALX: 48, Tissue.TENTORIUM: 46}
ARRAYS = ("tissue", "hu", "depth_mm", "midline_mm", "mni_mm")
BRIGHTER = ("epidural", "subdural_acute", "subarachnoid", "intraparenchymal", "intraventricular", "aneurysm")
DARKER = {"infarct_early": 1.0, "infarct_late": 8.0, "hydrocephalus": 2.0, "hypoxic": 2.0}     # by at least, HU


@pytest.fixture(scope="module")
def head():
    """An ellipsoid with sulci, ventricles, basal cistern, falx and tentorium; its arrays cannot be written to."""
    shape = (98, 118, 96)
    z, y, x = (np.arange(n).reshape([-1 if i == a else 1 for i in range(3)]) - (n - 1) / 2 for a, n in enumerate(shape))
    x, y, z = (axis / SCALE + np.zeros(shape) for axis in (-x, -y, z))
    y -= 16
    z += 2
    depth = (1 - np.sqrt(((z - 2) / 71) ** 2 + ((y + 16) / 88) ** 2 + (x / 69) ** 2)) * 75
    waves = np.sin(x / 6 + y / 9) * np.sin(y / 6 - z / 8) * np.sin(z / 7 + x / 9)
    ridge = z + 4 + 0.36 * abs(x)
    below = (ridge < 0) & (y < -16)
    layers = [
        (depth > 0, Tissue.CSF), (depth > 3, Tissue.GREY), (depth > 8 + 4 * waves, Tissue.WHITE),
        ((depth > 3) & (depth < 14) & (waves > 0.45), Tissue.CSF),
        (((abs(x) - 24) / 8) ** 2 + ((y - 2) / 18) ** 2 + ((z - 4) / 10) ** 2 < 1, Tissue.DEEP_GREY),
        (below & (depth > 3), Tissue.CEREBELLUM),
        (below & (depth > 3) & (abs(x) < 13) & (y > -40), Tissue.BRAINSTEM),
        ((abs(ridge) < 1) & (y < -40) & (depth > 0), Tissue.TENTORIUM),
        ((abs(x) < 1.5) & (depth > 0) & ((z > 32) | ((z > -4) & (abs(y + 13) > 47))), Tissue.FALX),
        (((abs(x) - 11) / 6) ** 2 + ((y + 8) / 38) ** 2 + ((z - 18) / 10) ** 2 < 1, Tissue.VENTRICLE),
        ((abs(x) < 2.5) & (abs(y + 10) < 12) & (abs(z - 2) < 9), Tissue.VENTRICLE),
        ((abs(x) < 7) & (abs(y + 46) < 6) & (abs(z + 30) < 8), Tissue.VENTRICLE),
        ((x / 13) ** 2 + ((y + 4) / 12) ** 2 + ((z + 16) / 6) ** 2 < 1, Tissue.CSF),
    ]
    tissue = np.full(shape, Tissue.BONE, np.uint8)
    for where, label in layers:
        tissue[where] = label
    table = np.zeros(len(Tissue), np.float32)
    table[list(HU)] = list(HU.values())
    made = Head(tissue, table[tissue], np.float32(depth * SCALE), np.float32(-x * SCALE),
                np.stack([x, y, z]).astype(np.float16), {"age": 50.0})
    for name in ARRAYS:
        getattr(made, name).setflags(write=False)
    return made


def made(head, kind, seed=0, severity=0.5):
    return add_emergency(head, kind, np.random.default_rng(seed), severity)


def with_fact(head, kind, severity=0.5, **wanted):
    """The first seed's emergency whose facts are as wanted."""
    for seed in range(40):
        found = made(head, kind, seed, severity)
        if all(found[2][key] == value for key, value in wanted.items()):
            return found
    raise AssertionError(f"no {kind} with {wanted} in 40 seeds")


# ---- every kind


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_marks_what_it_changes_inside_the_skull(head, kind):
    new, truth, facts = made(head, kind)
    assert truth.dtype == bool and truth.shape == head.hu.shape and truth.any()
    assert (head.depth_mm[truth] > 0).all()
    outside = head.depth_mm <= 0
    for name in ARRAYS:
        assert getattr(new, name).dtype == getattr(head, name).dtype
    np.testing.assert_array_equal(new.hu[outside], head.hu[outside])
    np.testing.assert_array_equal(new.tissue[outside], head.tissue[outside])
    assert np.isfinite(new.hu).all()
    assert facts["kind"] == kind and facts["severity"] == 0.5 and json.dumps(facts)
    assert facts["volume_ml"] == round(truth.sum() / 1000, 2)
    change = float(new.hu[truth].mean() - head.hu[truth].mean())
    if kind in BRIGHTER:
        assert change > 12 and new.hu[truth].mean() == pytest.approx(facts["hu"], abs=12)
    elif kind in DARKER:
        assert change < -DARKER[kind]
    elif kind == "subdural_chronic":
        assert 12 < new.hu[truth].mean() < 60
    else:
        assert kind == "tumour" and abs(new.hu - head.hu)[truth].mean() > 4


def test_same_seed_same_bytes_and_another_seed_another_lesion(head):
    first, truth, facts = made(head, "intraparenchymal", 3)
    again, truth_again, facts_again = made(head, "intraparenchymal", 3)
    other, truth_other, _ = made(head, "intraparenchymal", 4)
    assert facts == facts_again and truth.tobytes() == truth_again.tobytes()
    for name in ARRAYS:
        assert getattr(first, name).tobytes() == getattr(again, name).tobytes()
    assert truth_other.tobytes() != truth.tobytes()


def test_severity_is_drawn_when_not_given(head):
    drawn = [add_emergency(head, "aneurysm", np.random.default_rng(seed))[2]["severity"] for seed in range(3)]
    assert len(set(drawn)) == 3 and all(0 <= severity <= 1 for severity in drawn)


@pytest.mark.parametrize("kind, smallest_ml", [
    ("intraparenchymal", 1.2), ("epidural", 3), ("subdural_chronic", 14), ("aneurysm", 0.15), ("infarct_late", 15),
])
def test_from_what_a_resident_misses_to_what_nobody_misses(head, kind, smallest_ml):
    volumes = [made(head, kind, 0, severity)[2]["volume_ml"] for severity in (0.0, 0.35, 0.7)]
    assert volumes == sorted(volumes) and volumes[0] < smallest_ml and volumes[-1] > 3 * volumes[0]


def test_wrong_requests_are_refused(head):
    with pytest.raises(ValueError, match="kind must be one of epidural, .*; got 'stroke'"):
        made(head, "stroke")
    with pytest.raises(ValueError, match="severity must lie in 0..1; got 1.5"):
        made(head, "epidural", severity=1.5)


# ---- what goes with each


def test_epidural_stays_between_the_sutures_and_subdural_on_its_side(head):
    for seed in range(3):
        _, truth, facts = made(head, "epidural", seed, 0.7)
        x, y, _ = head.mni_mm[:, truth].astype(np.float32)
        for suture in (y - 14, y + 98 - 0.48 * abs(x), x):
            assert np.mean(suture > 0) < 0.02 or np.mean(suture > 0) > 0.98
        assert np.median(x) > 0 if facts["side"] == "right" else np.median(x) < 0
    _, truth, facts = with_fact(head, "subdural_acute", place="convexity", side="left")
    assert (head.midline_mm[truth] > 0).all()
    assert np.median(head.depth_mm[truth]) < facts["thickness_mm"]


def test_subdural_blood_pushes_the_cortex_inwards_instead_of_covering_it(head):
    new, truth, _ = with_fact(head, "subdural_acute", 0.7, place="convexity")
    under = ndimage.binary_dilation(truth, iterations=3) & ~truth & (head.depth_mm > 0)
    cortex, cortex_before = (np.mean(np.isin(h.tissue[under], (Tissue.GREY, Tissue.CSF))) for h in (new, head))
    assert cortex > cortex_before + 0.1
    csf, csf_before = (np.isin(h.tissue, (Tissue.CSF, Tissue.VENTRICLE)) & ~truth for h in (new, head))
    assert csf.sum() < csf_before.sum()


def test_blood_in_the_ventricles_lies_at_the_back_under_a_level(head):
    new, truth, _ = made(head, "intraventricular", 1, 0.6)
    lateral = (new.tissue == Tissue.VENTRICLE) & (new.mni_mm[2] > 12) & (new.mni_mm[0] > 3)
    filled, empty = (np.nonzero(lateral & part)[1] for part in (truth, ~truth & (new.hu < 15)))
    assert len(filled) > 50 and len(empty) > 50
    assert empty.max() <= filled.min() + 2


def test_subarachnoid_blood_fills_csf(head):
    new, truth, _ = with_fact(head, "subarachnoid", 0.6, pattern="basal")
    assert np.mean(np.isin(new.tissue[truth], (Tissue.CSF, Tissue.VENTRICLE))) > 0.9


def test_early_infarct_loses_a_few_hu_of_grey_and_most_of_its_contrast(head):
    new, truth, facts = with_fact(head, "infarct_early", 0.6, dense_artery=False, place="MCA")
    grey, white = (new.hu[truth & (new.tissue == tissue)].mean() for tissue in (Tissue.GREY, Tissue.WHITE))
    assert -8 <= facts["hu"] <= -3
    assert 0 < grey - white < 0.75 * (HU[Tissue.GREY] - HU[Tissue.WHITE])
    assert HU[Tissue.GREY] - grey < 8.5


def test_hydrocephalus_widens_ventricles_and_keeps_the_brain(head):
    before = (head.tissue == Tissue.VENTRICLE).sum()
    factors = [made(head, "hydrocephalus", 0, severity)[1].sum() / before for severity in (0.0, 0.5, 1.0)]
    assert factors == sorted(factors) and factors[0] > 1.2 and factors[-1] > 2.5
    new, _, _ = made(head, "hydrocephalus", 0, 0.3)
    assert np.isin(new.tissue, BRAIN).sum() == pytest.approx(np.isin(head.tissue, BRAIN).sum(), rel=0.03)


def test_hypoxic_brain_swells_into_csf_and_loses_contrast(head):
    new, truth, _ = made(head, "hypoxic", 0, 1.0)
    csf, csf_before = (np.isin(h.tissue, (Tissue.CSF, Tissue.VENTRICLE)).sum() for h in (new, head))
    assert csf < 0.9 * csf_before
    assert np.isin(new.tissue[truth], (Tissue.GREY, Tissue.DEEP_GREY)).all()
    contrast = new.hu[new.tissue == Tissue.GREY].mean() - new.hu[new.tissue == Tissue.WHITE].mean()
    assert contrast < 0.3 * (HU[Tissue.GREY] - HU[Tissue.WHITE])


# ---- mass effect


def mass(cavity, share):
    """A source in the right hemisphere, on blocks."""
    x, y, z = cavity.mni()
    return share * ((x - 35) ** 2 + (y + 10) ** 2 + (z - 15) ** 2 < 22**2)


def test_midline_shifts_away_from_a_mass_and_more_from_a_larger_one(head):
    shifts = []
    for share in (0.25, 0.5, 1.0):
        cavity = enter(head)
        septum = (abs(cavity.mni_mm[0]) < 3) & (abs(cavity.mni_mm[1]) < 15) & (abs(cavity.mni_mm[2] - 12) < 8)
        shifts.append(move(cavity, displacement(cavity, mass(cavity, share))))
        assert (cavity.midline_mm - head.midline_mm[cavity.box])[septum].max() < 0     # now to the right of the midline
    assert shifts == sorted(shifts) and shifts[0] > 0.2
    assert shifts[2] == pytest.approx(4 * shifts[0], rel=0.15)  # the equation is linear


def test_displacement_takes_from_csf_what_the_source_gains(head):
    cavity = enter(head)
    source = mass(cavity, 0.5)
    come_from = displacement(cavity, source)
    divergence = -sum(np.gradient(come_from[axis], 4.0, axis=axis) for axis in range(3))
    inside = source > 0
    assert divergence[inside].mean() == pytest.approx(0.5, rel=0.25)
    solid = (blocks(cavity.of(*BRAIN)) > 0.999) & (blocks(cavity.depth_mm) > 12) & ~inside
    assert abs(divergence[solid].mean()) < 0.02                 # brain keeps its volume
    assert not come_from[:, blocks(cavity.depth_mm > 0) == 0].any()


def test_no_source_moves_nothing_and_leave_puts_everything_back(head):
    cavity = enter(head)
    assert move(cavity, displacement(cavity, np.zeros(blocks(cavity.hu).shape))) == 0
    back = leave(head, cavity)
    np.testing.assert_allclose(back.hu, head.hu, atol=0.05)
    for name in ("tissue", "midline_mm", "mni_mm"):
        np.testing.assert_array_equal(getattr(back, name), getattr(head, name))
    assert {field.name for field in fields(Head)} == {*ARRAYS, "facts"}


# ---- tools


def test_blocks_and_voxels_hand_computed():
    ramp = np.broadcast_to(np.arange(8, dtype=np.float32), (8, 8, 8))
    np.testing.assert_allclose(blocks(ramp), np.broadcast_to([1.5, 5.5], (2, 2, 2)))
    np.testing.assert_allclose(voxels(blocks(ramp))[0, 0], [1.5, 1.5, 2, 3, 4, 5, 5.5, 5.5])


def test_smooth_noise_is_centred_and_smooth():
    noise = smooth_noise((60, 60, 60), 6, np.random.default_rng(0))
    assert noise.shape == (60, 60, 60) and abs(noise.mean()) < 0.15 and noise.std() == pytest.approx(1, abs=0.25)
    assert np.abs(np.diff(noise, axis=0)).mean() < 0.3 * noise.std()


def test_blob_has_the_volume_asked_for_and_paint_its_hu(head):
    cavity = enter(head)
    centre = tuple(n // 2 for n in cavity.hu.shape)
    shape = blob(cavity, centre, 5.0, cavity.depth_mm > 3, np.random.default_rng(0))
    assert volume_ml(shape > 0) == pytest.approx(5.0, rel=0.02)
    assert shape[centre] > 5 and shape.min() == -99
    paint(cavity, soft(shape), 70.0, np.random.default_rng(0), 0.0)
    np.testing.assert_allclose(cavity.hu[shape > 1], 70)
    np.testing.assert_array_equal(cavity.hu[shape < -1], head.hu[cavity.box][shape < -1])


def test_between_runs_by_equal_factors():
    assert [between(1, 100, severity) for severity in (0, 0.5, 1)] == pytest.approx([1, 10, 100])
