"""projector.py: where the settings of a projection come from. The whole command is in test_end_to_end.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import projector
from ct.frame import PreprocessSettings
from detect.bundle import Bundle
from detect.measure import MaskSettings, SurpriseSettings
from detect.search import SearchSettings
from detect.settings import Settings

CALIBRATED = Settings("inversion", measure="surprise", scoring=SurpriseSettings(pool="peak"), scan_score="top3")
TRAINED = {"encoder": {"config": {"perceptual": "pixels", "pixels": 3.0, "knee": 0.2, "epochs": 20}}}


def resolved(*flags: str) -> Settings:
    bundle = SimpleNamespace(settings=CALIBRATED, preprocessing=PreprocessSettings(), meta={"provenance": TRAINED})
    bundle.published = lambda: Bundle.published(bundle)
    return projector.resolve(bundle, projector.parse(["scans", "--model", "model", *flags]))[0]


def test_the_bundles_settings_are_the_default_and_flags_go_before_them():
    assert resolved() == CALIBRATED
    assert resolved("--scan-score", "max").scan_score == "max"
    changed = resolved("--set", "surprise_above=2", "surprise_mask=2.5", "predicted_noise=false", "batch=8")
    assert changed.scoring == SurpriseSettings(pool="peak", surprise_above=2.0)
    assert changed.mask == MaskSettings(surprise_mask=2.5)
    assert not changed.reconstruction.predicted_noise and changed.reconstruction.batch == 8


def test_published_is_the_search_and_its_votes_with_the_bundles_distance():
    settings = resolved("--preset", "published")
    assert (settings.method, settings.measure, settings.scan_score) == ("search", "votes", "mean")
    assert settings.reconstruction == SearchSettings(predicted_noise=False, perceptual="pixels", pixels=3.0, knee=0.2)
    assert settings.reconstruction.steps_latent == settings.reconstruction.steps_noise == 100
    assert resolved("--preset", "published", "--set", "threshold_hu=7").scoring.threshold_hu == 7


def test_another_method_or_measure_comes_with_its_own_settings():
    settings = resolved("--set", "method=search", "measure=votes", "steps_noise=0")
    assert settings.reconstruction == SearchSettings(steps_noise=0) and settings.scoring.threshold_hu == 5
    assert settings.mask == CALIBRATED.mask and settings.scan_score == "top3"


@pytest.mark.parametrize("change, message", [
    ("surprise_msk=3", "--set: no setting surprise_msk; there are method, measure, scan_score, predicted_noise"),
    ("threshold_hu=7", "--set: no setting threshold_hu"),                # of the other measure
    ("surprise_mask=high", "surprise_mask: expected float, got 'high'"),
    ("predicted_noise=1", "predicted_noise: expected true or false"),
    ("surprise_mask", "--set surprise_mask: expected KEY=VALUE"),
    ("pool=middle", "pool must be one of area, peak, got 'middle'"),
    ("method=magic", "method must be one of inversion, search"),
])
def test_what_cannot_be_set_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        resolved("--set", change)


def test_the_mask_does_not_change_what_scores_are_compared_with():
    drawn = CALIBRATED.replace(surprise_mask=2.0, component_at_512=100, batch=4, scan_score="max")
    assert drawn.comparable() == CALIBRATED.comparable()
    assert CALIBRATED.replace(surprise_above=2.0).comparable() != CALIBRATED.comparable()


def test_settings_survive_json():
    assert Settings.from_json(CALIBRATED.to_json()) == CALIBRATED
    search = Settings("search", SearchSettings(steps_latent=7, vgg16="here.pth"))
    assert Settings.from_json(search.to_json()) == search.replace(vgg16="")        # no paths in a bundle
    with pytest.raises(ValueError, match="unheard_of.*made by another version"):
        Settings.from_json({"scoring": {"unheard_of": 1}})
