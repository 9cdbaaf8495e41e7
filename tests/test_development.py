"""The benchmark to choose on: its figures by hand, what it refuses, and all of it with a stand-in for the projector."""

from __future__ import annotations

import json

import pytest

from benchmarks import compare, development
from tests.benchmark_data import FAILS, MM, head, project, write_rows
from tests.writers import write_slice_folder


def write_model(folder, scores, slices):
    """A bundle's model.json, as far as this benchmark reads it."""
    folder.mkdir()
    calibration = {"scan_scores": {"top3": scores, "max": [9.0] * len(scores)},
                   "slice_scores": [{"scan": scan, "below_vertex_mm": 5.0, "score": score} for scan, score in slices]}
    (folder / "model.json").write_text(json.dumps({"settings": {"scan_score": "top3"}, "calibration": calibration}))
    return folder


@pytest.fixture
def data(tmp_path):
    """Two scans with a bleed, whose slices are labelled in one of them."""
    folder, scans, slices = tmp_path / "ct-ich", [], []
    for seed, name in enumerate(("ill1", "ill2")):
        scan, truth = head(seed, True)
        write_slice_folder(folder / "mixed" / name, scan.hu, slice_spacing_mm=MM[0], pixel_spacing_mm=MM[1])
        scans.append({"scan_id": name, "split": "mixed", "label": 1})
        slices += [{"scan_id": name, "slice": i, "label": int(marked)} for i, marked in enumerate(truth.any((1, 2)))
                   if name == "ill1"]
    write_rows(folder / "scans.csv", scans)
    write_rows(folder / "slices.csv", slices)
    return folder


def test_the_calibration_scans_are_the_healthy_ones_by_their_own_score(tmp_path):
    model = write_model(tmp_path / "model", [0.1, 0.4], [(0, 0.1), (1, 0.5), (0, 0.0), (1, 0.3)])
    cases = development.healthy_cases(model)
    assert [case.scores["ours"] for case in cases] == [0.1, 0.4]                 # by top3, as the model's settings say
    assert [case.slices["ours"].tolist() for case in cases] == [[0.1, 0.0], [0.5, 0.3]]
    assert not any(label.label for case in cases for label in case.slice_labels.values())
    assert len({case.label.patient for case in cases}) == 2


def test_every_model_has_a_row_by_its_own_healthy_scans(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "project", project)
    low = write_model(tmp_path / "low", [0.0] * 4, [(scan, 0.0) for scan in range(4)])
    high = write_model(tmp_path / "high", [0.0, 99.0, 99.0, 99.0], [(scan, 99.0) for scan in range(4)])
    command = ["--data", str(data), "--split", "mixed", "--model", str(low), str(high), "--out", str(tmp_path / "out")]
    assert development.main(command) == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["low"]["scan"]["auc"] == 1 and found["low"]["percentile"] == {"ill1": 80.0, "ill2": 80.0}
    assert found["high"]["scan"]["auc"] == 0.25 and found["high"]["percentile"] == {"ill1": 20.0, "ill2": 20.0}
    assert found["low"]["slice"]["normal"] > 4 and found["low"]["slice"]["auc"] > 0.9 > found["high"]["slice"]["auc"]
    printed = capsys.readouterr().out
    assert "2 scans with haemorrhage against 4" in printed and "| low | 1.00 |" in printed
    assert (tmp_path / "out" / "table.md").read_text() in printed


def test_what_cannot_be_compared_is_refused(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "project", project)
    model = write_model(tmp_path / "model", [0.0] * 4, [(0, 0.0)])

    def refused(*models):
        assert development.main(["--data", str(data), "--split", "mixed", "--out", str(tmp_path / "out"), "--model",
                                 *map(str, models)]) == 2
        return capsys.readouterr().err

    (tmp_path / "other").mkdir()
    assert "model given twice; models are told by their folders' names" in refused(
        model, write_model(tmp_path / "other" / "model", [0.0], []))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "model.json").write_text('{"settings": {}, "calibration": null}')
    assert "is not calibrated; make it with latent_stats.py" in refused(tmp_path / "bare")
    assert "holds no model.json; give the folder of a bundle" in refused(tmp_path / "nowhere")
    write_rows(data / "scans.csv", [{"scan_id": name, "split": "mixed", "label": int(name == "ill1")}
                                    for name in ("ill1", "ill2")])
    assert "--split mixed: ill2 has no haemorrhage" in refused(model)
    write_slice_folder(data / "mixed" / FAILS, head(2, True)[0].hu, slice_spacing_mm=MM[0], pixel_spacing_mm=MM[1])
    write_rows(data / "scans.csv", [{"scan_id": name, "split": "mixed", "label": 1}
                                    for name in ("ill1", "ill2", FAILS)])
    assert f"not projected: {{'{FAILS}': 'no head'}}" in refused(model)
