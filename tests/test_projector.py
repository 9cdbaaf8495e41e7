"""projector.py: where the settings of a projection come from. The whole command is in test_end_to_end.py."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import projector
from ct.frame import PreprocessSettings
from detect.search import FAITHFUL, ProjectionSettings

CALIBRATED = ProjectionSettings(measure="surprise", steps_latent=0, steps_noise=0, pool="peak", perceptual="pixels",
                                scan_score="top3")


def resolved(*flags: str) -> ProjectionSettings:
    meta = {"projection": dataclasses.asdict(CALIBRATED), "preprocessing": PreprocessSettings().to_json()}
    args = projector.parse(["scans", "--model", "model", *flags])
    return projector.resolve(SimpleNamespace(meta=meta), args)[0]


def test_the_bundles_settings_are_the_default_and_flags_go_before_them():
    assert resolved() == CALIBRATED
    assert resolved("--scan-score", "max") == dataclasses.replace(CALIBRATED, scan_score="max")


def test_faithful_is_the_published_algorithm_with_the_bundles_distance():
    settings = resolved("--preset", "faithful")
    assert (settings.measure, settings.steps_latent, settings.steps_noise) == ("votes", 100, 100)
    assert settings.perceptual == "pixels" and not settings.predicted_noise
    assert {name: getattr(settings, name) for name in FAITHFUL} == FAITHFUL
    assert resolved("--preset", "faithful", "--threshold-hu", "7").threshold_hu == 7
