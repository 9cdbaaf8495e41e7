"""All six commands, one after the other, at 32x32 on tiny synthetic heads; then what a user can do wrong."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

import evaluate
import latent_stats
import prepare
import projector
import train
import train_encoder
from common.weights import write_json
from ct import frame
from detect import measure, projection
from detect.bundle import load_bundle
from detect.folder import write_tables
from detect.projection import Projector
from detect.result import Result
from tests.helpers import leaks, synthetic_head
from tests.writers import write_dicom_series, write_scan_json, write_slice_folder

HEAD = dict(slices=14, size=64, spacing_mm=(10.0, 3.6, 3.6))       # few thick slices: fast
# A model of seconds is off by 10 HU all over the brain: at the usual 5 HU no score of it would be trusted
SHORT = ["--set", "steps_latent=3", "steps_noise=3", "threshold_hu=15"]


def head(seed, **kwargs):
    return synthetic_head(**HEAD, seed=seed, angle_deg=4 * seed - 8, **kwargs)[0]


def rows(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """healthy/ (five slice folders), query/ (slice folder, DICOM with a bleed, a broken scan), and all runs."""
    base = tmp_path_factory.mktemp("end-to-end")
    for seed in range(5):
        write_slice_folder(base / "healthy" / f"healthy{seed}", head(seed), slice_spacing_mm=10.0)
    write_slice_folder(base / "query" / "normal", head(7), slice_spacing_mm=10.0)
    write_dicom_series(base / "query" / "bleed", head(3, lesion=(5, 10, 25, 22, 75)), spacing_mm=HEAD["spacing_mm"])
    write_slice_folder(base / "query" / "broken", head(1)[:4], slice_spacing_mm=10.0)
    (base / "query" / "broken" / "2.png").write_bytes(b"not a picture")

    data, gan, encoder, model, out = (str(base / n) for n in ("healthy.lmdb", "gan", "encoder", "model", "results"))
    assert prepare.main([str(base / "healthy"), "--out", data, "--size", "32", "--val-fraction", "0.4",
                         "--workers", "1", "--min-brain-fraction", "0.01"]) == 0
    assert train.main(["--data", data, "--out", gan, "--preset", "smoke32", "--device", "cpu"]) == 0
    assert train_encoder.main(["--data", data, "--gan", gan, "--out", encoder, "--preset", "smoke32", "--epochs", "3",
                               "--device", "cpu"]) == 0
    assert latent_stats.main(["--data", data, "--encoder", encoder, "--out", model, "--preset", "smoke32", *SHORT,
                              "--device", "cpu"]) == 0
    assert projector.main([str(base / "query"), "--model", model, "--out", out, "--device", "cpu"]) == 3
    return base


def test_scores_are_ranked_and_the_broken_scan_has_a_reason(work):
    table = rows(work / "results" / "scores.csv")
    assert [r["status"] for r in table] == ["ok", "ok", "failed"]
    assert float(table[0]["score"]) >= float(table[1]["score"])
    assert table[2]["scan_id"] == "broken" and "2.png" in table[2]["reason"]
    assert all(r["percentile"] != "" for r in table[:2])


def test_slices_have_a_row_each(work):
    table = rows(work / "results" / "slices.csv")
    assert sorted({r["scan_id"] for r in table}) == ["bleed", "normal"]
    assert [int(r["slice"]) for r in table if r["scan_id"] == "bleed"] == list(range(14))
    assert all(float(r["score"]) == 0 for r in table if r["projected"] == "0")


def test_maps_lie_in_the_scans_own_geometry(work):
    for scan in ("bleed", "normal"):
        for name in ("reconstruction", "residual", "anomaly", "mask", "brain"):
            image = nib.load(work / "results" / scan / f"{name}.nii.gz")
            assert sorted(image.shape) == [14, 64, 64]
    spacing = nib.load(work / "results" / "bleed" / "mask.nii.gz").header.get_zooms()
    assert np.allclose(sorted(spacing), [3.6, 3.6, 10.0], atol=1e-4)


def test_overlays_have_four_panels(work):
    pictures = sorted((work / "results" / "normal" / "overlay").glob("*.png"))
    kept = [r for r in rows(work / "results" / "slices.csv") if r["scan_id"] == "normal" and r["projected"] == "1"]
    assert [int(p.stem) for p in pictures] == [int(r["slice"]) for r in kept]
    assert Image.open(pictures[0]).size == (4 * 64, 64)


def test_run_report_names_weights_settings_and_stages(work):
    report = json.loads((work / "results" / "run.json").read_text())
    assert report["scans"] == 2 and report["failed"] == 1
    assert len(report["weights_sha256"]) == 64 and report["settings"]["reconstruction"]["steps_latent"] == 3
    assert set(report["seconds_per_scan_by_stage"]) >= {"encode", "latent", "noise", "write"}


def test_a_rerun_skips_finished_scans_and_gives_the_same_tables(work, capsys):
    before = (work / "results" / "scores.csv").read_text()
    args = [str(work / "query"), "--model", str(work / "model"), "--out", str(work / "results"), "--device", "cpu"]
    assert projector.main(args) == 3
    assert capsys.readouterr().out.count("finished before, skipped") == 2
    assert (work / "results" / "scores.csv").read_text() == before


def test_other_settings_do_not_mix_with_earlier_results(work, capsys):
    args = ["--query_save_path", str(work / "query"), "--model", str(work / "model"), "--out", str(work / "results"),
            "--device", "cpu", "--set", "steps_noise=0"]
    assert projector.main(args) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("change, known", [({}, True), ({"scan_score": "max"}, True), ({"threshold_hu": 4.0}, False)])
def test_healthy_scores_count_for_the_settings_they_were_made_with(work, change, known):
    bundle = load_bundle(work / "model")
    projecting = Projector(bundle, bundle.settings.replace(**change))
    assert projecting.calibration == (bundle.meta["calibration"] if known else None)
    assert projecting.settings.scan_score == change.get("scan_score", "mean")


@pytest.fixture
def one(work, tmp_path) -> list[str]:
    """Arguments that project a copy of one scan, its results from before copied, too."""
    shutil.copytree(work / "query" / "normal", tmp_path / "query" / "normal")
    shutil.copytree(work / "results" / "normal", tmp_path / "results" / "normal")
    args = [str(tmp_path / "query"), "--model", str(work / "model"), "--out", str(tmp_path / "results")]
    return [*args, "--device", "cpu"]


def test_a_scan_whose_files_changed_is_projected_again(one, tmp_path, capsys):
    assert projector.main(one) == 0
    assert "skipped" in capsys.readouterr().out                  # a copy with its times is the same scan
    write_scan_json(tmp_path / "query" / "normal", [[-20, 100]], slice_spacing_mm=5.0)
    assert projector.main(one) == 0
    assert "skipped" not in capsys.readouterr().out
    positions = [float(r["position_mm"]) for r in rows(tmp_path / "results" / "slices.csv")]
    assert positions == [5.0 * k for k in range(14)]
    (row,) = rows(tmp_path / "results" / "scores.csv")             # the healthy scans are 10 mm apart
    assert row["percentile"] == ""
    assert "slices 5 mm apart, those of the calibration 10 mm: no percentile" in row["notes"]


@pytest.mark.parametrize("module, what", [(frame, "preprocessing"), (measure, "measure")])
def test_a_bundle_of_another_version_gives_no_percentile_and_no_results_are_mixed(one, tmp_path, monkeypatch, capsys,
                                                                                   module, what):
    monkeypatch.setattr(module, "VERSION", 99)
    assert projector.main(one) == 2
    assert "another version of this program" in capsys.readouterr().err
    assert projector.main([*one, "--overwrite"]) == 0
    (row,) = rows(tmp_path / "results" / "scores.csv")
    assert row["percentile"] == "" and row["flagged"] == ""
    assert f"calibrated with version 1 of the {what}, this is version 99: no percentile" in row["notes"]
    assert json.loads((tmp_path / "results" / "run.json").read_text())["versions"][what] == 99


def test_a_score_whose_reconstruction_is_at_fault_is_not_to_be_trusted(one, tmp_path, monkeypatch):
    monkeypatch.setattr(projection, "TOO_MUCH", -1.0)                  # any share of the brain
    shutil.rmtree(tmp_path / "results")
    assert projector.main(one) == 0
    (row,) = rows(tmp_path / "results" / "scores.csv")
    assert row["status"] == "unreliable" and "of the brain differs from its reconstruction" in row["reason"]
    assert row["reason"] in row["notes"] and float(row["score"]) >= 0 and row["percentile"] == row["flagged"] == ""


def test_what_is_not_to_be_trusted_stands_below_whatever_its_score(tmp_path):
    results = []
    for name, status, score in (("a", "failed", None), ("b", "unreliable", 9.0), ("c", "ok", 1.0)):
        scan = {"scan_id": name, "status": status, "score": score, "seconds": 1.0}
        results.append(Result(tmp_path / name, scan, {}, {}))
        (tmp_path / name).mkdir()
        result = {"key": {}, "origin": {}, "scan": scan, "slices": [], "seconds": {}}
        (tmp_path / name / "result.json").write_text(json.dumps(result))
    write_tables(tmp_path, results)
    assert [row["scan_id"] for row in rows(tmp_path / "scores.csv")] == ["c", "b", "a"]

    before = (tmp_path / "slices.csv").read_bytes()                    # by another run, while tables are made
    (tmp_path / "b" / "result.json").write_text((tmp_path / "b" / "result.json").read_text().replace("9.0", "5.0"))
    with pytest.raises(ValueError, match="b: another run has replaced its results while tables were made of them"):
        write_tables(tmp_path, results)
    assert (tmp_path / "slices.csv").read_bytes() == before


def test_what_only_draws_the_mask_leaves_the_percentile(one, tmp_path):
    assert projector.main([*one, "--overwrite", "--set", "component_at_512=0"]) == 0
    (row,) = rows(tmp_path / "results" / "scores.csv")
    assert row["percentile"] != "" and "no percentile" not in row["notes"]


def test_an_assumed_spacing_is_part_of_what_was_done(one, tmp_path, capsys):
    write_scan_json(tmp_path / "query" / "normal", [[-20, 100]], slice_spacing_mm=None)
    for spacing, again in ((6, True), (6, False), (7, True)):
        assert projector.main([*one, "--unknown-slice-spacing-mm", str(spacing)]) == 0
        assert ("skipped" not in capsys.readouterr().out) == again


def test_half_a_result_is_no_result(one, tmp_path, capsys):
    marker = tmp_path / "results" / "normal" / "result.json"
    marker.write_text(marker.read_text()[:50])
    assert projector.main(one) == 0
    assert "skipped" not in capsys.readouterr().out and json.loads(marker.read_text())["scan"]["status"] == "ok"


def test_an_interrupted_run_keeps_what_is_done_and_goes_on(work, tmp_path, monkeypatch, capsys):
    args = [str(work / "healthy"), "--model", str(work / "model"), "--out", str(tmp_path), "--device", "cpu"]
    call, calls = Projector.__call__, []

    def interrupted(self, scan, prepared=None):
        calls.append(scan.scan_id)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return call(self, scan, prepared)
    with monkeypatch.context() as patched:
        patched.setattr(Projector, "__call__", interrupted)
        assert projector.main(args) == 130
    assert [r["scan_id"] for r in rows(tmp_path / "scores.csv")] == ["healthy0"]
    capsys.readouterr()
    assert projector.main(args) == 0
    assert capsys.readouterr().out.count("skipped") == 1 and len(rows(tmp_path / "scores.csv")) == 5


def test_results_that_cannot_be_written_are_refused_before_the_work(work, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    args = [str(work / "query"), "--model", str(work / "model"), "--device", "cpu", "--out"]
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert projector.main([*args, str(out)]) == 2
        assert f"--out {out}: cannot be written" in capsys.readouterr().err
    args = ["--data", str(work / "healthy.lmdb"), "--preset", "smoke32", "--device", "cpu", "--out"]
    assert train.main([*args, str(tmp_path / "file")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_a_bundle_with_settings_of_another_version_is_refused(work, tmp_path, capsys):
    model = shutil.copytree(work / "model", tmp_path / "model")
    content = json.loads((model / "model.json").read_text())
    content["settings"]["scoring"]["unheard_of"] = 1
    write_json(model / "model.json", content)
    assert projector.main([str(work / "query"), "--model", str(model), "--out", str(tmp_path / "out")]) == 2
    assert "unheard_of" in capsys.readouterr().err


def test_evaluate_reads_what_the_projector_wrote(work):
    labels = work / "labels.csv"
    labels.write_text("scan_id,label,types\nnormal,0,\nbleed,1,Intraparenchymal\n", encoding="utf-8")
    assert evaluate.main([str(work / "results" / "scores.csv"), str(labels), "--out", str(work / "metrics"),
                          "--missing", "exclude"]) == 0
    metrics = json.loads((work / "metrics" / "metrics.json").read_text())
    assert metrics["scan"]["n"] == 2 and metrics["scan"]["left_out"] == {"scored without a label": 1}
    assert metrics["scan"]["auc"] in (0.0, 1.0) and (work / "metrics" / "roc.png").exists()


def test_no_patient_data_in_what_is_written(work):
    """test_patient_data.py goes further for those commands that read scans; here are networks and bundles, too."""
    for name in ("gan", "encoder", "model", "results"):
        assert any((work / name).iterdir()) and leaks(work / name) == []


def test_a_folder_of_scans_is_prepared_on_the_fly(work):
    assert train.main(["--data_path", str(work / "healthy"), "--out", str(work / "gan2"), "--preset", "smoke32",
                       "--kimg", "0.008", "--device", "cpu"]) == 0
    assert (work / "gan2" / "data.lmdb").exists()


@pytest.mark.parametrize("args, message", [
    (["nowhere", "--model", "MODEL"], "nowhere"),
    (["QUERY", "--model", "nowhere"], "nowhere"),
    (["QUERY", "--model", "MODEL", "--set", "perceptual=lpips"], "vgg16"),
    (["QUERY", "--model", "MODEL", "--device", "cuda:99"], "--device"),
    (["QUERY", "--model", "MODEL", "--set", "steps_latent=0", "steps_noise=0"], "steps"),
    (["QUERY", "--model", "MODEL", "--set", "threshold_hu=-5"], "threshold_hu must be at least 0"),
    (["QUERY", "--model", "MODEL", "--set", "median_at_512=-3"], "median_at_512 must be at least 1"),
])
def test_wrong_usage_ends_with_2_and_names_what_is_wrong(work, capsys, args, message):
    names = {"MODEL": str(work / "model"), "QUERY": str(work / "query")}
    assert projector.main([names.get(a, a) for a in args] + ["--out", str(work / "other")]) == 2
    assert message in capsys.readouterr().err
