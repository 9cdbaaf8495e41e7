"""The worklist simulation."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

import evaluate
from evaluation import cohort, triage
from evaluation.metrics import Undefined
from tests.evaluation_data import SCORES, write_csv, write_results


def test_scans_may_come_at_once_and_a_spreadsheet_may_mark_its_text(tmp_path):
    (tmp_path / "seconds.txt").write_text("# s\r\n0\r\n2.5  # a pause\r\n", encoding="utf-8-sig")
    assert cohort.read_seconds(tmp_path / "seconds.txt", may_be_0=True).tolist() == [0, 2.5]
    starts = triage.read_worklist(np.zeros(3), np.full(3, 10.0), np.array([1.0, 3, 3]), np.zeros(3))
    assert starts.tolist() == [20, 0, 10]                                    # equal scores in order of arrival


def test_worklist_of_four_scans_by_hand():
    arrivals, reading = np.array([0.0, 1, 2, 3]), np.full(4, 10.0)
    assert triage.read_worklist(arrivals, reading).tolist() == [0, 10, 20, 30]
    # All scores at once: 0 is being read already, then 3 (highest), 2, 1
    scores, known = np.array([0.0, 1, 2, 3]), arrivals
    assert triage.read_worklist(arrivals, reading, scores, known).tolist() == [0, 30, 20, 10]
    # The score of 3 comes at 12: at 10 it stands behind the scored 2; at 20 it goes first
    known = np.array([0.0, 1, 2, 12])
    assert triage.read_worklist(arrivals, reading, scores, known).tolist() == [0, 30, 10, 20]
    # No score in time: in order of arrival
    assert triage.read_worklist(arrivals, reading, scores, np.full(4, 99.0)).tolist() == [0, 10, 20, 30]


def test_reader_comes_late_and_idles():
    arrivals, reading = np.array([0.0, 5, 100]), np.full(3, 10.0)
    assert triage.read_worklist(arrivals, reading, reader_start_s=50).tolist() == [50, 60, 100]
    by_score = triage.read_worklist(arrivals, reading, np.array([1.0, 2, 3]), arrivals + 1, reader_start_s=50)
    assert by_score.tolist() == [60, 50, 100]                                # 100 is read before it has a score


def test_scores_queue_for_the_machines():
    arrivals = np.array([0.0, 1, 2, 50])
    assert triage.scores_known_from(arrivals, 10, machines=1).tolist() == [10, 20, 30, 60]
    assert triage.scores_known_from(arrivals, 10, machines=2).tolist() == [10, 11, 20, 60]


@pytest.mark.parametrize("reader_start_s", [0.0, 50.0])
def test_a_session_by_hand(reader_start_s, monkeypatch):
    """Five scans from 0 on, 10 s apart, 30 s each, without scores in time: every wait is 20 s longer than the last."""
    labels, place = np.array([1, 0, 0, 1]), np.arange(5)
    settings = triage.TriageSettings(scans=5, latency_s=1e6, reader_start_s=reader_start_s, repeats=4)
    result = triage.simulate(np.arange(4), labels, settings, arrival_intervals=[10.0], reading_times=[30.0])
    for group, policy in itertools.product(("emergency", "other"), triage.POLICIES):
        wait, turnaround = (result[group][f"{policy}_{name}_s"] for name in ("wait", "turnaround"))
        assert turnaround == {"median": wait["median"] + 30, "iqr": wait["iqr"]}
    monkeypatch.setattr(triage, "_summary", lambda drawn, waits, *_: waits)
    waits = triage.simulate(np.arange(4), labels, settings, arrival_intervals=[10.0], reading_times=[30.0])["other"]
    for policy in triage.POLICIES:
        assert waits[policy].tolist() == [(reader_start_s + 20.0 * place).tolist()] * 4


def test_medians_and_quartiles_by_hand():
    waits = {"first_come": np.array([[0.0, 20, 40, 60, 80]]), "by_score": np.array([[80.0, 60, 40, 20, 0]])}
    readings = np.array([[10.0, 20, 30, 40, 50]])
    found = triage._summary(np.arange(5)[None], waits, readings, np.ones(5, int), np.arange(5), 1)
    assert found["first_come_wait_s"] == found["by_score_wait_s"] == {"median": 40, "iqr": 40}      # 20 to 60
    assert found["first_come_turnaround_s"] == {"median": 70, "iqr": 60}     # of 10, 40, 70, 100, 130
    assert found["by_score_turnaround_s"] == {"median": 70, "iqr": 20}       # of 90, 80, 70, 60, 50
    assert found["mean_wait_change_s"] == 0 and found["scans"] == found["cases"] == 5


def test_simulation_helps_with_good_scores_and_not_with_late_ones():
    labels = np.repeat([1, 0], [20, 80])
    scores = labels + np.linspace(0, 0.5, 100)
    settings = triage.TriageSettings(repeats=40, seed=1)
    result = triage.simulate(scores, labels, settings)
    assert result == triage.simulate(scores, labels, settings)
    emergency, other = result["emergency"], result["other"]
    assert emergency["by_score_wait_s"]["median"] < 0.4 * emergency["first_come_wait_s"]["median"]
    assert emergency["wilcoxon_p"] < 0.001
    assert other["mean_wait_change_s"] > 0                                   # the price
    assert emergency["cases"] + other["cases"] == 40 * 60
    late = triage.simulate(scores, labels, triage.TriageSettings(repeats=5, latency_s=1e5))["emergency"]
    assert late["by_score_wait_s"] == late["first_come_wait_s"]
    assert late["wilcoxon_p"].startswith("undefined")
    with pytest.raises(Undefined, match="only one class"):
        triage.simulate(scores, np.ones(100, int), settings)


@pytest.fixture
def results(tmp_path):
    return write_results(tmp_path / "results")


def test_triage_command(results):
    base = results.parent
    (base / "reading.txt").write_text("20\n25\n")
    command = ["triage", str(results / "scores.csv"), str(base / "labels.csv"), "--out", str(base / "triage")]
    assert evaluate.main([*command, "--repeats", "5", "--reading-times", str(base / "reading.txt")]) == 0
    report = json.loads((base / "triage" / "triage.json").read_text())
    assert report["load"]["latency_s"] == 10 and report["emergency"]["scans"] == 3
    assert "| emergency (3 scans) | by score |" in (base / "triage" / "triage.md").read_text()
    (base / "reading.txt").write_text("20\n-1\n")
    assert evaluate.main([*command, "--reading-times", str(base / "reading.txt")]) == 2


@pytest.mark.parametrize("missing, counted, told", [
    ("exclude", 5, ["scans left out: 1 (failed)", "scans left out: 1 (scored without a label)"]),
    ("worst", 6, ["scans left out: 1 (scored without a label)",
                  "scans that failed, are unreliable or have no score, counted as ranked wrongly: 1"])])
def test_the_table_tells_who_is_left_out(results, missing, counted, told, capsys):
    """triage.json alone did."""
    base = results.parent
    rows = [[name, score, "failed" if name == "d" else "ok"] for name, score in zip("abcdefg", [*SCORES, 0.1])]
    write_csv(results / "scores.csv", "scan_id,score,status", rows)
    command = ["triage", str(results / "scores.csv"), str(base / "labels.csv"), "--out", str(base / "triage"),
               "--repeats", "2", "--missing", missing]
    assert evaluate.main(command) == 0
    text = (base / "triage" / "triage.md").read_text()
    assert text == capsys.readouterr().out and f"| other ({counted - 3} scans) |" in text
    assert text.endswith("|\n\n" + "".join(f"- {line}\n" for line in told))
    write_csv(results / "scores.csv", "scan_id,score,status", [[*row[:2], "ok"] for row in rows[:6]])
    assert evaluate.main(command) == 0 and "- " not in (base / "triage" / "triage.md").read_text().split("---")[-1]


@pytest.mark.parametrize("modelled, observed", [
    ("--arrival-s", "--arrival-intervals"), ("--reading-median-s", "--reading-times"),
    ("--reading-sigma", "--reading-times")])
def test_a_model_and_observed_times_in_its_place_are_refused(modelled, observed, results, capsys):
    """The model's flag was passed over, and triage.json named its value. A default's own value is no exception."""
    base = results.parent
    (base / "seconds.txt").write_text("20\n25\n")
    command = ["triage", str(results / "scores.csv"), str(base / "labels.csv"), "--out", str(base / "triage"),
               "--repeats", "2", observed, str(base / "seconds.txt")]
    name = modelled[2:].replace("-", "_")
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([*command, modelled, str(getattr(triage.TriageSettings(), name))])
    assert stopped.value.code == 2 and f"give {modelled} or {observed}, not both" in capsys.readouterr().err
    assert evaluate.main(command) == 0
    assert json.loads((base / "triage" / "triage.json").read_text())["load"][name] is None


def test_scans_of_one_patient_are_no_further_evidence():
    """Five alike of each of eight patients gave the p of 40 patients; eight give 2 / 2^8 at the least."""
    labels = np.repeat([1, 0], [40, 160])
    scores, patients = labels + np.linspace(0, 0.5, 200), np.arange(200) // 5
    settings = triage.TriageSettings(repeats=30)
    by_patient, by_scan = (triage.simulate(scores, labels, settings, clusters=of)["emergency"]["wilcoxon_p"]
                           for of in (patients, None))
    assert by_patient == pytest.approx(2 / 2**8) and by_scan < 1e-6
