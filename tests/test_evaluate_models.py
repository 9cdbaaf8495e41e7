"""evaluate.py: scores of one model are not mixed with another's, nor a scan with itself under another name."""

from __future__ import annotations

import json

import pytest

from evaluation.cohort import InputError
from evaluation.origin import refuse_other_model
from tests.evaluation_data import run, write_csv, write_results

CALIBRATION = {"scan_scores": {"mean": [0.1, 0.2]}, "threshold": {"fpr": 0.05, "mean": 0.65}}
RUN = {"weights_sha256": "aa", "calibration": CALIBRATION, "threshold": None, "seconds": 1.0,
       "settings": {"method": "inversion", "scoring": {"pool": "peak"}, "mask": {"extent_hu": 8.0},
                    "scan_score": "mean"},
       "preprocessing": {"slab_mm": 5.0}, "versions": {"program": "1", "preprocessing": 1, "measure": 1}}


@pytest.fixture
def results(tmp_path):
    folder = write_results(tmp_path / "results")
    (folder / "run.json").write_text(json.dumps(RUN))
    return folder


@pytest.fixture
def healthy(tmp_path):
    """Results of the same model: twenty healthy scans."""
    folder = tmp_path / "healthy"
    folder.mkdir()
    write_csv(folder / "scores.csv", "scan_id,score,status", [[f"h{i}", i / 20, "ok"] for i in range(20)])
    (folder / "run.json").write_text(json.dumps(RUN))
    return folder


def write_result(folder, scan_id, origin):
    (folder / scan_id).mkdir()
    content = {"key": {}, "origin": origin, "scan": {"scan_id": scan_id, "status": "failed"}, "slices": [],
               "seconds": {}}
    (folder / scan_id / "result.json").write_text(json.dumps(content))


@pytest.mark.parametrize("other, told", [
    ({"weights_sha256": "bb"}, 'weights_sha256 "aa", now "bb"'),
    ({"settings": RUN["settings"] | {"method": "search"}}, 'settings.method "inversion", now "search"'),
    ({"settings": RUN["settings"] | {"scoring": {"pool": "sum"}}}, 'settings.scoring.pool "peak", now "sum"'),
    ({"settings": RUN["settings"] | {"scan_score": "max"}}, 'settings.scan_score "mean", now "max"'),
    ({"calibration": CALIBRATION | {"scan_scores": {"mean": [0.1, 0.3]}}}, "calibration.scan_scores.mean"),
    ({"calibration": None}, "calibration {"),
    ({"preprocessing": {"slab_mm": 4.0}}, "preprocessing.slab_mm 5.0, now 4.0"),
    ({"versions": {"preprocessing": 2, "measure": 1}}, "versions.preprocessing 1, now 2"),
    ({"settings": None, "image_settings": {"size": 128}}, "image_settings null, now {")])
def test_a_threshold_of_another_model_is_refused_and_what_differs_named(results, healthy, other, told, capsys):
    """The inversion's scores were called by a threshold on the inpainting's."""
    (healthy / "run.json").write_text(json.dumps(RUN | other))
    assert run(results, "--threshold-from", healthy / "scores.csv") == (2, None)
    said = capsys.readouterr().err
    assert f"--threshold-from {healthy / 'scores.csv'}: made by another model or calibration" in said and told in said


@pytest.mark.parametrize("other", [
    {}, {"settings": RUN["settings"] | {"mask": {"extent_hu": 9.0}}}, {"threshold": 0.3, "seconds": 2.0},
    {"calibration": CALIBRATION | {"threshold": {"fpr": 0.1, "mean": 0.5}}},             # of --alarm-rate
    {"versions": {"program": "2", "preprocessing": 1, "measure": 1}}])
def test_what_scores_do_not_hang_on_may_differ(results, healthy, other):
    (healthy / "run.json").write_text(json.dumps(RUN | other))
    code, report = run(results, "--threshold-from", healthy / "scores.csv", "--fpr", 0.3)
    at = report["scan"]["at_threshold"]
    assert code == 0 and 0.65 <= at["threshold"] < 0.7                       # six of twenty lie above 0.65
    assert at["threshold_source"].endswith(f"20 normal scans of {healthy / 'scores.csv'}")


def test_a_model_that_is_not_known_is_told(results, healthy):
    (healthy / "run.json").unlink()
    at = run(results, "--threshold-from", healthy / "scores.csv")[1]["scan"]["at_threshold"]
    assert f"; not known whether by the same model: no run.json in {healthy}" in at["threshold_source"]


def test_tables_beside_a_run_that_has_not_ended_may_be_anothers(results, healthy):
    (healthy / "run.json").write_text(json.dumps(RUN | {"seconds": None}))
    with pytest.raises(InputError, match="^--threshold-from x: .*healthy/run.json is of a run that has not ended"):
        refuse_other_model(results, healthy, "--threshold-from x")
    assert refuse_other_model(healthy, healthy.parent / "healthy", "--slices x") == ""


@pytest.mark.parametrize("flag", ["--slices", "--maps"])
def test_slices_and_maps_of_another_model_are_refused(results, healthy, flag, capsys):
    (healthy / "run.json").write_text(json.dumps(RUN | {"weights_sha256": "bb"}))
    (results / "slices.csv").rename(healthy / "slices.csv")
    flags = {"--slices": ["--slices", healthy / "slices.csv", "--slice-labels", results.parent / "slice_labels.csv"],
             "--maps": ["--masks", results, "--maps", healthy]}[flag]
    assert run(results, *flags) == (2, None)
    said = capsys.readouterr().err
    assert f"{flag} {healthy}" in said and 'weights_sha256 "aa", now "bb"' in said


@pytest.mark.parametrize("here, there", [({"uid": "1"}, {"uid": "1"}), ({"place": "x", "content": "1"},
                                                                      {"place": "y", "content": "1"})])
def test_a_scan_under_another_id_is_no_other_data(results, healthy, here, there, capsys):
    """Searched for from another folder a scan has another id, and its own score set the threshold it was called by."""
    write_result(results, "d", here)
    write_result(healthy, "h3", there)
    assert run(results, "--threshold-from", healthy / "scores.csv") == (2, None)
    assert "1 of its scans are evaluated here too, under another id (h3, here d: their" in capsys.readouterr().err


def test_scans_of_one_place_are_not_yet_one(results, healthy):
    """Those of a zip file share it; and an id that can be no folder has no result."""
    write_result(results, "d", {"place": "x", "content": "1"})
    write_result(healthy, "h3", {"place": "x", "content": "2"})
    write_result(results, "e", {"place": "y", "content": None})
    write_result(healthy, "h4", {"place": "y", "content": None})
    with (healthy / "scores.csv").open("a") as file:
        file.write("up/../h5,0.1,ok\n")
    assert run(results, "--threshold-from", healthy / "scores.csv")[0] == 0


@pytest.mark.parametrize("here, there, patient, refused", [
    ({"content": "1"}, {"content": "2"}, "", False), ({"content": "1"}, {"content": "1"}, "", True),
    ({"uid": "1"}, {"content": "2"}, "", True), ({"uid": "1"}, None, "", True),
    ({"uid": "1"}, {"uid": "2"}, "p", True)])
def test_scans_of_the_same_name_may_be_others(results, healthy, here, there, patient, refused, capsys):
    """Two cohorts of phantoms count their scans alike: each was refused as evaluated here, too.

    Hashes of one kind tell, but not where a patient may have several scans.
    """
    with (healthy / "scores.csv").open("a") as file:
        file.write("a,0.1,ok\n")
    labels = write_csv(healthy / "labels.csv", "scan_id,label,patient", [["a", 0, patient], *(
        [f"h{i}", 0, ""] for i in range(20))])
    for folder, origin in ((results, here), (healthy, there)):
        if origin:
            write_result(folder, "a", origin)
    for flags in [["--threshold-from", healthy / "scores.csv", labels]] + [
            ["--threshold-from", healthy / "scores.csv"]] * (not patient):
        code, report = run(results, *flags)
        said = capsys.readouterr().err
        assert code == (2 if refused else 0)
        if refused:
            assert "1 of its scans are evaluated here too" in said and "(a); a threshold" in said
            assert said.endswith("or, where these are others of the same name, project with --ids uid\n")
        else:
            assert "on 21 normal scans" in report["scan"]["at_threshold"]["threshold_source"]
