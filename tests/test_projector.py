"""projector.py: where the settings of a projection come from. The whole command is in test_end_to_end.py."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import projector
from common.version import VERSION
from common.weights import CheckpointError
from ct.frame import PreprocessSettings
from ct.scan import Scan
from detect import calibration
from detect.bundle import Bundle, load_bundle, save_bundle
from detect.projection import Projector, volume_ml
from detect.reconstruct import Reconstruction
from detect.residual import MaskSettings
from detect.scores import percentile_of, threshold_at_fpr
from detect.search import SearchSettings
from detect.settings import Settings
from detect.surprise import SurpriseSettings
from tests.helpers import synthetic_scan

CALIBRATED = Settings("inversion", measure="surprise", scoring=SurpriseSettings(pool="peak"), scan_score="top3")
TRAINED = {"encoder": {"config": {"perceptual": "pixels", "pixels": 3.0, "knee": 0.2, "epochs": 20}}}


def resolved(*flags: str, calibrated: Settings = CALIBRATED) -> Settings:
    bundle = SimpleNamespace(settings=calibrated, preprocessing=PreprocessSettings(), meta={"provenance": TRAINED})
    bundle.published = lambda: Bundle.published(bundle)
    return projector.resolve(bundle, projector.parse(["scans", "--model", "model", *flags]))[0]


def test_the_bundles_settings_are_the_default_and_flags_go_before_them():
    assert resolved() == CALIBRATED
    assert resolved("--scan-score", "max").scan_score == "max"
    changed = resolved("--set", "surprise_above=1.5", "surprise_mask=2.5", "predicted_noise=false", "batch=8")
    assert changed.scoring == SurpriseSettings(pool="peak", surprise_above=1.5)
    assert changed.mask == MaskSettings(surprise_mask=2.5)
    assert not changed.reconstruction.predicted_noise and changed.reconstruction.batch == 8


def test_published_is_the_search_and_its_votes_with_the_bundles_distance():
    settings = resolved("--preset", "published")
    assert (settings.method, settings.measure, settings.scan_score) == ("search", "votes", "mean")
    assert settings.reconstruction == SearchSettings(predicted_noise=False, perceptual="pixels", pixels=3.0, knee=0.2)
    assert settings.reconstruction.steps_latent == settings.reconstruction.steps_noise == 100
    assert resolved("--preset", "published", "--set", "threshold_hu=7").scoring.threshold_hu == 7
    own = SearchSettings(steps_noise=0, perceptual="pixels", knee=0.1, lr_noise=0.02)         # of a search: its own
    settings = resolved("--preset", "published", calibrated=Settings("search", own, scan_score="max"))
    expected = SearchSettings(predicted_noise=False, perceptual="pixels", knee=0.1, lr_noise=0.02)
    assert settings == Settings("search", expected)


def test_another_method_or_measure_comes_with_its_own_settings():
    settings = resolved("--set", "method=search", "measure=votes", "steps_noise=0")
    assert settings.reconstruction == SearchSettings(steps_noise=0) and settings.scoring.threshold_hu == 5
    assert settings.mask == CALIBRATED.mask and settings.scan_score == "top3"


@pytest.mark.parametrize("change, message", [
    ("surprise_msk=3", "--set: no setting surprise_msk; there are method, measure, scan_score, predicted_noise"),
    ("threshold_hu=7", "--set: no setting threshold_hu"),                # of the other measure
    ("surprise_mask=high", "surprise_mask: expected float, got 'high'"),
    ("surprise_mask=inf", "surprise_mask: expected a finite number, got 'inf'"),
    ("predicted_noise=1", "predicted_noise: expected true or false"),
    ("surprise_mask", "--set surprise_mask: expected KEY=VALUE"),
    ("pool=middle", "pool must be one of area, peak, got 'middle'"),
    ("method=magic", "method must be one of .*inversion, search"),
])
def test_what_cannot_be_set_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        resolved("--set", change)


@pytest.mark.parametrize("changes, message", [
    ({"surprise_above": [1]}, r"surprise_above: expected float, got \[1\]"),
    ({"surprise_above": None}, "surprise_above: expected float, got None"),
    ({"surprise_above": True}, "surprise_above: expected float, got True"),
    ({"surprise_above": math.nan}, "surprise_above: expected a finite number, got nan"),
    ({"batch": 2.5}, "batch: expected int, got 2.5"),
    ({"batch": math.inf}, "batch: expected int, got inf"),
    ({"predicted_noise": 1}, "predicted_noise: expected true or false, got 1"),
    ({"pool": 3}, "pool: expected str, got 3"),
])
def test_what_a_notebook_cannot_set_is_named(changes, message):
    """It was a TypeError, or came to light where the setting was used."""
    with pytest.raises(ValueError, match=message):
        CALIBRATED.replace(**changes)


def test_numbers_of_other_kinds_are_taken():
    changed = CALIBRATED.replace(batch=np.int64(8), surprise_above=np.float32(1.5), predicted_noise=np.bool_(False))
    assert changed == CALIBRATED.replace(batch="8", surprise_above=1.5, predicted_noise=False)
    assert json.loads(json.dumps(changed.to_json())) == changed.to_json()
    assert CALIBRATED.replace(surprise_above=2).other_than(CALIBRATED.to_json()) == []


@pytest.mark.parametrize("method", ["pca", "autoencoder", "healthygan"])
def test_a_method_whose_files_a_model_lacks_is_refused(method, capsys, tmp_path):
    """--set method=pca was a traceback."""
    model = Path(__file__).resolve().parents[1] / "models" / "phantom-128"
    assert projector.main([str(tmp_path), "--model", str(model), "--set", f"method={method}", "--device", "cpu"]) == 2
    assert f"is a model of method inversion and does not hold what {method} needs" in capsys.readouterr().err


def test_the_mask_does_not_change_what_scores_are_compared_with():
    drawn = CALIBRATED.replace(surprise_mask=2.0, component_at_512=100, batch=4, scan_score="max")
    calibrated = CALIBRATED.to_json()
    assert drawn.other_than(calibrated) == CALIBRATED.other_than(calibrated) == []
    assert CALIBRATED.replace(surprise_above=1.5, predicted_noise=False).other_than(calibrated) == [
        "predicted_noise", "surprise_above"]
    assert CALIBRATED.replace(method="search", measure="votes").other_than(calibrated) == ["method", "measure"]


def test_settings_of_the_mask_change_no_percentile_flag_or_status():
    """What is not to be trusted was told by what these settings mark: a head was, or was not, by how it is drawn."""
    bundle = load_bundle(Path(__file__).resolve().parents[1] / "models" / "phantom-128")
    scan, _ = synthetic_scan(size=64, spacing_mm=(5.0, 3.6, 3.6))
    prepared = Projector(bundle).prepare(scan)

    def closest_normal(hu, brain, below_vertex_mm, watch):
        normal = hu - 4.0
        normal[:, 40:70, 40:90] -= 60.0                                  # a large bleed, as it were
        return Reconstruction(hu, normal, {"reconstruct": 2.0}, {})

    bundle.reconstructor.closest_normal = closest_normal
    found = [Projector(bundle, bundle.settings.replace(surprise_mask=mask))(scan, prepared)
             for mask in (bundle.settings.mask.surprise_mask, 0.0)]
    assert len({one.anomalous_ml for one in found}) == 2
    assert len({(one.percentile, one.threshold, one.flagged, one.unreliable, one.notes) for one in found}) == 1


def test_a_scan_that_is_compared_with_nothing_says_so_and_what_would_help():
    """Pictures of 0..80 HU had no percentile with a model of -20..180 HU, and no word that this was why."""
    bundle = load_bundle(Path(__file__).resolve().parents[1] / "models" / "phantom-128")
    bundle.reconstructor.closest_normal = lambda hu, *_: Reconstruction(hu, hu - 4.0, {"reconstruct": 2.0}, {})
    scan, _ = synthetic_scan(size=64, spacing_mm=(5.0, 3.6, 3.6))
    pictures = dataclasses.replace(scan, hu=np.clip(scan.hu, 0, 80), saturation_hu=(0.0, 80.0))
    whole, clipped = (Projector(bundle)(one) for one in (scan, pictures))
    assert whole.percentile is not None and not any("not compared" in note for note in whole.notes)
    assert clipped.percentile is None and clipped.flagged is None
    assert clipped.notes[-1] == (
        "not compared with healthy scans: no percentile, no flag; give the scan with all of its HU, or a model that "
        "looks at no more than 0..80 HU (hu_clip in its model.json)")


@pytest.mark.parametrize("position_mm, ml", [
    ([0, 5, 10, 15, 20], 0.05), ([0, 5, 10, 55, 60], 0.0625), ([0, 10, 20, 25, 30], 0.1), ([20], 0.05),
    ([0, 6, 10, 15, 20], 0.045),
    ([2, 6, 10, 11, 18, 25], 0.025), ([3, 4, 10, 20, 30], 0.08), ([10, 55], 0.45), ([10, 55, 60], 0.075)])
def test_a_volume_holds_nothing_of_a_gap(position_mm, ml):
    """Half of 45 mm counted for the slice below a gap: five times what it showed."""
    hu = np.zeros((len(position_mm), 4, 6), np.float32)
    scan = Scan("gap", hu, np.array(position_mm, float), (1.0, 0.5))
    mask = np.zeros(hu.shape, bool)
    mask[position_mm.index(min(position_mm, key=lambda mm: abs(mm - 10))), :4, :5] = True          # 10 square mm
    assert volume_ml(mask, scan) == pytest.approx(ml)


def test_changes_count_together_in_any_order():
    """grow_hu may be at most gate_hu, which was 8 before."""
    changes = {"gate_hu": "4", "grow_hu": "3"}
    settings = Settings("inpainting")
    for order in (changes, dict(reversed(changes.items()))):
        replaced = settings.replace(**order).reconstruction
        assert (replaced.gate_hu, replaced.grow_hu) == (4.0, 3.0)
    with pytest.raises(ValueError, match="grow_hu must be above 0 and at most gate_hu, 4, got 5"):
        settings.replace(gate_hu=4.0)


def test_files_that_scores_hang_on_are_known_by_content(tmp_path):
    """Other weights of the perceptual distance make other scores, wherever they lie."""
    for name, content in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        (tmp_path / name).write_bytes(content)

    def said(**files):
        return Settings("search", SearchSettings(perceptual="lpips", **files))

    one, other, same, weighted = (said(vgg16=str(tmp_path / "a")), said(vgg16=str(tmp_path / "b")),
                                  said(vgg16=str(tmp_path / "c")),
                                  said(vgg16=str(tmp_path / "a"), lpips=str(tmp_path / "b")))
    assert one.to_json() == same.to_json() and str(tmp_path) not in str(one.to_json())
    for changed in (other, weighted):
        assert changed.other_than(one.to_json()) and one.other_than(changed.to_json())
    assert one.other_than(same.to_json()) == [] and said().other_than(one.to_json()) == ["vgg16_sha256"]
    assert Settings.from_json(weighted.to_json()) == said()
    assert not [name for name in one.replace(perceptual="pixels").to_json()["reconstruction"] if "sha256" in name]
    (tmp_path / "a").write_bytes(b"12")                                  # under the same name
    assert one.to_json() != same.to_json()


def test_settings_survive_json():
    assert Settings.from_json(CALIBRATED.to_json()) == CALIBRATED
    search = Settings("search", SearchSettings(steps_latent=7, vgg16="here.pth"))
    assert Settings.from_json(search.to_json()) == search.replace(vgg16="")        # no paths in a bundle
    with pytest.raises(ValueError, match="unheard_of.*made by another version"):
        Settings.from_json({"scoring": {"unheard_of": 1}})


def test_a_percentile_is_among_scores_made_alike():
    """The shipped model: as it is calibrated, and where something that the score hangs on differs."""
    bundle = load_bundle(Path(__file__).resolve().parents[1] / "models" / "phantom-128")
    as_made = Projector(bundle)
    assert as_made.calibration["scan_scores"] and as_made.incomparable is None
    assert Projector(bundle, bundle.settings.replace(surprise_mask=2.0)).calibration == as_made.calibration
    slabs = dataclasses.replace(bundle.preprocessing, slab_mm=bundle.preprocessing.slab_mm + 1)
    older = {name: bundle.meta["versions"] | {name: 0} for name in ("preprocessing", "measure")}
    for why, other in (
            ("settings", Projector(bundle, bundle.settings.replace(surprise_above=0.7))),
            ("prepared", Projector(bundle, preprocessing=slabs)),
            *((f"version 0 of the {name}", Projector(dataclasses.replace(bundle, meta=bundle.meta | {"versions": old})))
              for name, old in older.items())):
        assert other.calibration is None and why in other.incomparable


def test_settings_that_a_bundle_was_given_later_are_not_those_of_its_calibration():
    """bundle.with_settings(), as a notebook has it, took the percentiles along."""
    bundle = load_bundle(Path(__file__).resolve().parents[1] / "models" / "phantom-128")
    for changes, names in (({"surprise_above": 0.7}, "(surprise_above)"), ({"measure": "votes"}, "(measure)")):
        changed = bundle.with_settings(bundle.settings.replace(**changes))
        for other in (Projector(changed), Projector(bundle, changed.settings)):
            assert other.calibration is None and names in other.incomparable
        assert Projector(changed, bundle.settings).incomparable is None
    drawn = bundle.with_settings(bundle.settings.replace(surprise_mask=0.0))
    assert Projector(drawn).calibrated_for.mask == bundle.settings.mask and Projector(drawn).calibration


def test_a_calibration_is_not_saved_beside_other_settings(tmp_path):
    """A bundle that was loaded, changed and saved again kept its percentiles."""
    bundle = load_bundle(Path(__file__).resolve().parents[1] / "models" / "phantom-128")
    other, normal = bundle.settings.replace(hypodense=0.3), bundle.measure.normal
    with pytest.raises(CheckpointError, match=r"calibration in meta is of other settings \(hypodense\)"):
        save_bundle(tmp_path / "other", bundle.reconstructor, other, bundle.meta, normal)
    for settings, meta in ((bundle.settings.replace(surprise_mask=2.0), bundle.meta),
                           (other, bundle.meta | {"calibration": None})):
        save_bundle(tmp_path / "saved", bundle.reconstructor, settings, meta, normal, overwrite=True)
        assert load_bundle(tmp_path / "saved").settings == settings
    path = tmp_path / "saved" / "model.json"
    path.write_text(path.read_text().replace('"hypodense": 0.3', '"hypodense": 1.0'))
    with pytest.raises(CheckpointError, match="altered since it was written"):                     # by hand
        load_bundle(tmp_path / "saved")


# ---- what is flagged

def alarmed(scores, error_of_rest=3.0, brain_hu=30.0, healthy=None, spacing_mm=5.0, depth_mm=10.0, depths=None,
            **alarm):
    """A projector's calibration and what it says of a score of 2.5."""
    calibrated = {"scans": len(scores), "scan_scores": {"mean": scores},
                  "threshold": {"fpr": 0.05, "mean": None, "reason": "too few"}, "error_hu": {"reconstruct": 3.0},
                  "healthy": healthy or {}}
    if "alarm_rate" in alarm:
        calibrated = calibration.at_rate(calibrated, alarm["alarm_rate"])
    self = SimpleNamespace(settings=Settings(scan_score="mean"), calibration=calibrated,
                           threshold=alarm.get("threshold"), spacing_mm=(5.0, 5.0), depth_mm=depths)
    return Projector._compare(self, 2.5, error_of_rest, brain_hu, depth_mm - spacing_mm * np.arange(3))[:2]


@pytest.mark.parametrize("spacing_mm, compared", [(3.98, False), (3.9999999, True), (4.0, True), (6.25, True),
                                                  (6.2500001, True), (6.27, False)])
def test_the_rounding_of_headers_costs_no_percentile(spacing_mm, compared):
    """A tilted series with 6.25 mm between its slices had none, or one, by its eighth digit."""
    assert alarmed([1.0, 2.0, 3.0], spacing_mm=spacing_mm)[0] == (50 if compared else None)


@pytest.mark.parametrize("thin, thick, healthy, compared", [
    (0, 20, None, True), (2, 26, None, True), (12, 14, None, False), (12, 14, (12, 14), True), (20, 12, None, False)])
def test_a_part_of_other_spacing_takes_the_percentile(thin, thick, healthy, compared):
    """Only the median counted: 30 mm in slices 2.5 mm apart below 70 mm in slices 5 mm apart were compared."""
    def below_mm(thin, thick):
        return np.append(0, np.cumsum([5.0] * thick + [2.5] * thin))[::-1]

    mm = [below_mm(*(healthy or (0, 20))).tolist()] * 20
    calibrated = calibration.summary(mm, [torch.ones(len(mm[0]))] * 20, [{"reconstruct": 3.0}] * 20, [30.0] * 20, 20)
    self = SimpleNamespace(settings=Settings(scan_score="mean"), calibration=calibrated, threshold=1.5,
                           spacing_mm=(5.0, 5.0), depth_mm=None)
    percentile, threshold, notes = Projector._compare(self, 2.5, 3.0, 30.0, below_mm(thin, thick))
    assert (percentile is not None) == compared and threshold == 1.5 and len(notes) == 1 - compared
    if (thin, healthy) == (12, None):
        assert notes == ["33% of what the scan shows has slices closer together or further apart than those of the "
                         "calibration, 5 mm: no percentile"]


def test_without_a_threshold_a_note_says_why():
    """The finding in DICOM is then undetermined, and the notes are where its reader learns of what."""
    def notes(error_of_rest=3.0, threshold=None, how="mean"):
        calibrated = calibration.summary([[5.0, 0.0]] * 4, [torch.ones(2)] * 4, [{"reconstruct": 3.0}] * 4, [30.0] * 4,
                                         patients=4)
        self = SimpleNamespace(settings=Settings(scan_score="mean"), calibration=calibrated, threshold=threshold,
                               spacing_mm=(5.0, 5.0), depth_mm=None)
        calibrated["scan_scores"] = {how: calibrated["scan_scores"]["mean"]}
        return Projector._compare(self, 2.5, error_of_rest, 30.0, np.array([10.0, 5.0, 0.0]))[2]

    why = ("no threshold: a false-positive rate of 0.05 needs 19 healthy scans, found 4; add scans or allow a higher "
           "rate")
    assert notes() == [why] and notes(threshold=1.0) == []
    assert [note[:22] for note in notes(error_of_rest=99.0)] == ["the closest normal is ", why[:22]]
    assert notes(how="max") == ["the calibration holds no scores by mean: no percentile"]


def test_another_calibration_of_the_same_weights_is_another_key(monkeypatch):
    """Results by votes kept percentiles and flags of the earlier one: no file of weights changes with it."""
    bundle = load_bundle(Path(__file__).resolve().parents[1] / "models" / "phantom-128")
    other = dict(bundle.meta["calibration"], threshold=dict(bundle.meta["calibration"]["threshold"], fpr=0.2))
    changed = dataclasses.replace(bundle, meta=bundle.meta | {"calibration": other})
    keys = [Projector(one).key() for one in (bundle, bundle, changed)]
    assert keys[0] == keys[1] != keys[2] and keys[0] | {"calibration": keys[2]["calibration"]} == keys[2]
    assert Projector(bundle, bundle.settings.replace(surprise_above=0.7)).key()["calibration"] is None


def test_what_a_model_marks_itself_is_part_of_the_key():
    """It tells what is not to be trusted, whatever mask is drawn."""
    bundle = load_bundle(Path(__file__).resolve().parents[1] / "models" / "phantom-128")
    known = bundle.meta["settings"]
    other = dataclasses.replace(bundle, meta=bundle.meta | {"settings": known | {"mask": {"surprise_mask": 1.0}}})
    drawn = bundle.settings.replace(surprise_mask=2.0)
    assert Projector(bundle, drawn).key() != Projector(other, drawn).key()
    assert "calibrated_mask" not in Projector(bundle).key()


def test_a_normal_that_does_not_come_close_costs_the_percentile_and_not_the_flag():
    """A head full of blood has a bad closest normal, too: it must not lose its flag for that."""
    scores = [1.0, 2.0, 3.0, 4.0]
    assert alarmed(scores, error_of_rest=6.0, threshold=0.5) == (pytest.approx(40), 0.5)        # twice 3.0 is no more
    assert alarmed(scores, error_of_rest=6.1, threshold=0.5) == (None, 0.5)
    assert alarmed(scores, error_of_rest=math.nan, threshold=0.5) == (None, 0.5)     # NaN is no more than anything


def test_what_is_usual_is_what_the_healthy_scans_of_the_calibration_have():
    """Medians of 28 to 34 HU: 22 to 40 are usual; errors of 2 to 3 HU, a range of less than 2: up to 5."""
    scores, known = [1.0, 2.0, 3.0, 4.0], pytest.approx(40)
    healthy = {"brain_hu": [28.0, 34.0] * 5, "error_hu": [2.0, 3.0] * 5}
    for brain_hu, percentile in ((21.9, None), (22.0, known), (40.0, known), (40.1, None)):
        assert alarmed(scores, brain_hu=brain_hu, healthy=healthy, threshold=0.5) == (percentile, 0.5)
    for error, percentile in ((5.0, known), (5.1, None)):
        assert alarmed(scores, error, healthy=healthy) == (percentile, None)
    few = {name: values[:9] for name, values in healthy.items()}
    assert alarmed(scores, brain_hu=99.0, healthy=few) == alarmed(scores, 5.9, healthy=few) == (known, None)


def test_a_head_without_its_lower_part_has_no_percentile_and_keeps_its_flag():
    """The vertex as a series of its own was compared with the highest slices of whole heads: healthy, it seemed."""
    scores, known = [1.0, 2.0, 3.0, 4.0], pytest.approx(40)
    for depth_mm, percentile in ((61.0, None), (79.9, None), (80.0, known), (150.0, known)):
        assert alarmed(scores, depth_mm=depth_mm, depths=(110.0, 140.0), threshold=0.5) == (percentile, 0.5)
    depths = [110.0 + 3 * k for k in range(10)] + [140.0]
    slices = [{"scan": k, "below_vertex_mm": mm - up} for k, mm in enumerate(depths) for up in (5, 0)]
    assert calibration.depth_range({"slice_scores": slices}) == (110.0, 140.0)
    assert calibration.depth_range({"slice_scores": slices[:18]}) is None                            # 9 scans


def test_a_threshold_and_an_alarm_rate_go_before_the_models():
    scores = [1.0, 2.0, 3.0, 4.0]                                    # 2.5 lies above two of four: 2 / 5
    assert alarmed(scores) == (pytest.approx(40), None)
    assert alarmed(scores, threshold=0.5) == (pytest.approx(40), 0.5)
    assert alarmed(scores, alarm_rate=0.2) == (pytest.approx(40), 4.0)        # of 5 scans, 1 may exceed it
    assert alarmed(scores, alarm_rate=0.4) == (pytest.approx(40), 3.0)


def test_a_rate_that_the_scans_cannot_tell_is_refused_with_the_lowest_they_can():
    with pytest.raises(ValueError, match="alarm rate 0.1: 4 healthy scans cannot tell it; the lowest rate .* is 0.2"):
        alarmed([1.0, 2.0, 3.0, 4.0], alarm_rate=0.1)
    with pytest.raises(ValueError, match="between 0 and 1"):
        alarmed([1.0], alarm_rate=5)


def test_percentile_and_flag_count_alike_at_a_healthy_score():
    """Percentiles were counted in single precision: a flagged scan stood no higher than the healthy one below it."""
    scores = [1 + i / 7 for i in range(19)]
    threshold = threshold_at_fpr(scores, 0.05)
    assert threshold == scores[-1]
    just_above = float(np.nextafter(threshold, np.inf))
    assert [percentile_of(score, scores) for score in (threshold, just_above)] == [90, 95]


def test_a_rate_needs_a_calibration_that_holds_the_scan_score():
    """One made before there was that score: only a note told that no scan would be flagged."""
    bundle = load_bundle(Path(__file__).resolve().parents[1] / "models" / "phantom-128")
    known = bundle.meta["calibration"]
    older = known | {"scan_scores": {"mean": known["scan_scores"]["mean"]}}
    bundle = dataclasses.replace(bundle, meta=bundle.meta | {"calibration": older})
    with pytest.raises(ValueError, match="alarm rate 0.2: the calibration holds no scores by max, only by mean"):
        Projector(bundle, bundle.settings.replace(scan_score="max"), alarm_rate=0.2)
    assert Projector(bundle, bundle.settings.replace(scan_score="mean"), alarm_rate=0.2).alarm_rate == 0.2


@pytest.mark.parametrize("scans", range(3, 120))
def test_the_lowest_rate_that_is_named_is_one_that_is_taken(scans):
    """Rounded to the nearest it was refused, too, for half of these numbers."""
    calibrated = {"scans": scans, "scan_scores": {"mean": [float(i) for i in range(scans)]}}
    with pytest.raises(ValueError) as refused:
        calibration.at_rate(calibrated, 1e-6)
    lowest = str(refused.value).split("allow is ")[1].split(",")[0]
    assert calibration.at_rate(calibrated, float(lowest))["threshold"]["mean"] == scans - 1
    assert float(lowest) < 1.01 / (scans + 1)


@pytest.mark.parametrize("flag, value", [
    ("--threshold", "nan"), ("--threshold", "inf"), ("--alarm-rate", "nan"), ("--alarm-rate", "1"),
    ("--slab-mm", "nan"), ("--slab-mm", "inf"), ("--slab-mm", "0"), ("--unknown-slice-spacing-mm", "nan"),
    ("--unknown-slice-spacing-mm", "inf"), ("--unknown-slice-spacing-mm", "-1")])
def test_what_is_no_number_of_its_kind_is_refused(capsys, flag, value):
    with pytest.raises(SystemExit) as end:
        projector.parse(["scans", "--model", "m", f"{flag}={value}"])
    assert end.value.code == 2 and f"{flag} must " in capsys.readouterr().err


def test_a_threshold_that_is_no_number_is_refused_by_the_api_too():
    bundle = load_bundle(Path(__file__).resolve().parents[1] / "models" / "phantom-128")
    with pytest.raises(ValueError, match="threshold: expected a finite score, got nan"):
        Projector(bundle, threshold=float("nan"))
    with pytest.raises(ValueError, match="threshold and alarm_rate: .* give one"):
        Projector(bundle, threshold=1.0, alarm_rate=0.1)


def test_ids_reach_the_search(monkeypatch, capsys):
    asked = []

    def find(scans, spacing, ids, log):
        asked.append((scans, spacing, ids))
        raise ValueError("far enough")
    monkeypatch.setattr("ct.read.find_all", find)
    monkeypatch.setattr("detect.bundle.load_bundle", lambda *args: None)
    monkeypatch.setattr("detect.projection.Projector", lambda *args: None)
    monkeypatch.setattr(projector, "resolve", lambda *args: ())
    flags = ["a", "--model", "m", "--device", "cpu", "--no-dicom-out", "--unknown-slice-spacing-mm", "4"]
    assert projector.main(flags) == projector.main([*flags, "--ids", "uid"]) == 2
    assert asked == [([Path("a")], 4, "path"), ([Path("a")], 4, "uid")]
    assert "far enough" in capsys.readouterr().err


def test_flags(capsys):
    args = projector.parse(["a", "b", "--model", "m", "--alarm-rate", "0.1", "--no-dicom-out"])
    assert [str(p) for p in args.scans] == ["a", "b"] and args.alarm_rate == 0.1
    assert (args.dicom_out, args.no_phi) == (False, False)
    assert [str(p) for p in projector.parse(["--query_save_path", "q", "--model", "m"]).scans] == ["q"]
    for wrong in (["--model", "m"], ["a", "--query_save_path", "q", "--model", "m"],
                  ["a", "--model", "m", "--alarm-rate", "0.1", "--threshold", "2"]):
        with pytest.raises(SystemExit):
            projector.parse(wrong)
    with pytest.raises(SystemExit):
        projector.parse(["--version"])
    assert capsys.readouterr().out == f"CN-StyleGAN {VERSION}\n"
