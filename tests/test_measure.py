"""What every measure fulfils: the members that calibration, projection, bundles and the page ask of it."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch

from detect.measure import MEASURES
from detect.normative import MIN_SCANS
from detect.reconstruct import Reconstruction
from detect.residual import Evidence, Findings, MaskSettings, Measure
from detect.surprise import Surprise, SurpriseSettings

S, N = 3, 32
MM = np.array([10.0, 5.0, 0.0])
BRAIN = torch.ones(S, N, N, dtype=torch.bool)
EVERY = pytest.mark.parametrize("cls", MEASURES.values(), ids=MEASURES)


def evidence_of(measure: Measure, seed: int) -> Evidence:
    """Of a scan that differs from its closest normal by grain of 3 HU."""
    grain = torch.randn(S, N, N, generator=torch.Generator().manual_seed(seed))
    found = Reconstruction(30 + 3 * grain, torch.full((S, N, N), 30.0), {"reconstruct": 3.0}, {"reconstruct": 0.1})
    watch = measure.watch(BRAIN, MM)
    if watch is not None:
        assert watch(found.query_hu, found.normal_hu).dtype == torch.bool          # what is predicted anomalous so far
    return measure.evidence(found, BRAIN, MM, watch)


@EVERY
def test_every_measure_has_what_the_contract_names(cls):
    assert issubclass(cls, Measure) and MEASURES[cls.name] is cls
    assert cls.marked and isinstance(cls.in_hu, bool) and cls.least_patients in (0, MIN_SCANS)
    assert is_dataclass(cls.Settings) and all("help" in one.metadata for one in fields(cls.Settings))
    measure = cls()
    assert measure.settings == cls.Settings() and measure.mask == MaskSettings() and measure.normal is None
    assert measure.words and measure.criterion().endswith(".")
    for name, member in vars(Measure).items():                  # assess(seen) beside assess(evidence)
        if inspect.isfunction(member) and name != "__init__":
            assert [*inspect.signature(getattr(cls, name)).parameters] == [*inspect.signature(member).parameters], name


@EVERY
def test_every_measure_goes_from_healthy_scans_to_findings(cls):
    bare, count = cls(), max(cls.least_patients, 1)
    healthy = [evidence_of(bare, seed) for seed in range(count)]
    fitted, own = bare.fit(healthy, [f"patient {i}" for i in range(count)])
    assert isinstance(fitted, cls) and (fitted.normal is None) == (cls.least_patients == 0)
    fitted.check()
    again = cls(fitted.settings, fitted.mask, fitted.normal)                       # as a bundle makes it
    found = again.assess(evidence_of(again, 9))
    for one in (*own, found):
        assert isinstance(one, Findings) and one.slice_scores.shape == (S,) and torch.isfinite(one.slice_scores).all()
        assert one.anomaly.shape == one.predicted.shape == one.mask.shape == (S, N, N)
        assert one.anomaly.dtype == torch.float32 and one.predicted.dtype == one.mask.dtype == torch.bool
    assert len(own) == count and torch.equal(again.predicted(found, again.mask), found.predicted)


@EVERY
def test_slices_may_come_from_either_end(cls):
    """Positions as a reversed view, which torch takes none of, made an error about strides."""
    bare, count = cls(), max(cls.least_patients, 1)
    healthy = [evidence_of(bare, seed) for seed in range(count)]
    fitted, _ = bare.fit(healthy, [f"patient {i}" for i in range(count)])
    away = 6 * torch.randn(S, N, N, generator=torch.Generator().manual_seed(9))
    away[0] *= 2                                                 # no slice scores as another
    scores = []
    for mm, query in ((MM, 30 + away), (MM[::-1], (30 + away).flip(0))):
        found = Reconstruction(query, torch.full((S, N, N), 30.0), {"reconstruct": 6.0}, {})
        if (watch := fitted.watch(BRAIN, mm)) is not None:
            watch(found.query_hu, found.normal_hu)
        scores.append(fitted.assess(fitted.evidence(found, BRAIN, mm, watch)).slice_scores)
    assert scores[0][0] > scores[0][2] and scores[0].min() > 0
    torch.testing.assert_close(scores[1].flip(0), scores[0])


@EVERY
def test_a_measure_that_learns_needs_its_patients(cls):
    """calibration.py and latent_stats.py asked for three of them by the measure's name."""
    bare = cls()
    if not cls.least_patients:
        return bare.check()
    with pytest.raises(ValueError, match=f"measure {cls.name}: .* at least {cls.least_patients} patients,"):
        bare.check()
    with pytest.raises(ValueError, match=f"measure {cls.name}"):
        bare.assess(evidence_of(bare, 0))
    few = [f"patient {i % (cls.least_patients - 1)}" for i in range(cls.least_patients)]
    with pytest.raises(ValueError, match=f"found {cls.least_patients - 1}"):
        bare.fit([evidence_of(bare, seed) for seed in range(cls.least_patients)], few)


def test_a_surprise_is_not_judged_by_healthy_residuals_of_other_settings():
    """Map, mask and score were made all the same."""
    def fitted(**settings):
        bare = Surprise(SurpriseSettings(**settings))
        return bare.fit([evidence_of(bare, seed) for seed in range(MIN_SCANS)])[0].normal

    band, median = fitted(filter="band"), fitted(filter="median", median_at_512=19)
    for normal, told, changes in (
            (band, "filter=band, not of filter=hyperdense;", {}),
            (band, "filter=band, not of filter=median median_at_512=19;", {"filter": "median"}),
            (median, "median_at_512=19, not of filter=median median_at_512=99;",
             {"filter": "median", "median_at_512": 99}),
            (dataclasses.replace(band, of=None), "settings that it does not tell, not of filter=band;",
             {"filter": "band"})):
        other = Surprise(SurpriseSettings(**changes), None, normal)
        for refused in (other.check, lambda other=other: other.assess(evidence_of(other, 9))):
            with pytest.raises(ValueError, match=f"measure surprise: .* are of .*{told} .*latent_stats.py"):
                refused()
    Surprise(SurpriseSettings(filter="band", median_at_512=99, pool="area", hypodense=0.1), None, band).check()


def test_a_newcomer_is_told_what_it_lacks():
    class Half(Measure):
        name, Settings, marked, in_hu, words = "half", MaskSettings, "half", False, "half"

    with pytest.raises(TypeError, match="assess.*criterion.*evidence.*fit.*predicted"):
        Half()


def test_votes_cannot_be_had_afterwards():
    """It was an AttributeError of None."""
    found = Reconstruction(torch.zeros(S, N, N), torch.zeros(S, N, N), {"reconstruct": 0.0}, {})
    votes = MEASURES["votes"]()
    for watch in (None, votes.watch(BRAIN, MM)):                # none, and one that has seen no step
        with pytest.raises(ValueError, match="needs the watch of watch"):
            votes.evidence(found, BRAIN, MM, watch)
