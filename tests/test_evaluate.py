"""evaluate.py: scores against labels, thresholds, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import t

import evaluate
from detect.folder import write_tables
from detect.result import Result
from evaluation import cohort, metrics
from evaluation.figures import NO_THRESHOLD, at_threshold, level_figures, ranking, resampled
from evaluation.origin import UNENDED
from evaluation.settings import FigureSettings
from tests.evaluation_data import LABELS, SCORES, run, write_csv, write_results


@pytest.fixture
def results(tmp_path):
    return write_results(tmp_path / "results")


def test_intervals_at_a_threshold_know_what_slices_of_one_patient_are_worth():
    """Ten slices of each of four patients, alike: the interval was that of 40 patients."""
    labels, scores = np.ones(40, int), np.repeat([1.0, 1, 1, 0], 10)
    units = cohort.Units([(str(i),) for i in range(40)], scores, labels, [()] * 40, np.arange(4).repeat(10), {},
                         np.zeros(40, bool))
    settings = FigureSettings()
    found = at_threshold(units, labels == 1, 0.5, "", settings)["sensitivity"]
    assert (found["value"], found["hits"], found["of"]) == (0.75, 30, 40)
    worth = 40 / 13 * (t.ppf(0.975, 39) / t.ppf(0.975, 3)) ** 2
    assert found["interval"] == pytest.approx(metrics.proportion(30, 40, independent=worth)[1:])
    units = dataclasses.replace(units, clusters=np.arange(40))
    alone = at_threshold(units, labels == 1, 0.5, "", settings)["sensitivity"]
    assert alone["interval"] == pytest.approx(metrics.proportion(30, 40)[1:])


def test_figures_need_no_command_line():
    units = cohort.Units([(name,) for name in "abcdef"], SCORES, LABELS, [()] * 6, np.arange(6), {}, np.zeros(6, bool))
    found = level_figures(units, 0.69, "by hand", FigureSettings(level=0.9, bootstrap=100, prevalence=0.1))
    assert found["auc"] == pytest.approx(8 / 9)
    assert found["auc_delong"] == pytest.approx(metrics.delong_interval(SCORES, LABELS, level=0.9))
    assert found["at_threshold"]["sensitivity"]["interval"] == pytest.approx(metrics.proportion(2, 3, 0.9)[1:])
    assert found["at_threshold"]["ppv_at_prevalence"]["prevalence"] == 0.1


def test_who_leaves_early_gets_no_traceback_and_all_files(results):
    """`evaluate.py ... | head -1`: the pipe is closed before anything is written."""
    command = [sys.executable, evaluate.__file__, str(results / "scores.csv"), str(results.parent / "labels.csv"),
               "--out", str(results.parent / "m"), "--bootstrap", "100"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == -signal.SIGPIPE
    assert {"metrics.json", "metrics.md"} <= {path.name for path in (results.parent / "m").iterdir()}


def test_command_end_to_end(results, capsys):
    base = results.parent
    code, report = run(results, "--slices", results / "slices.csv", "--slice-labels", base / "slice_labels.csv",
                       "--threshold", 0.69, "--prevalence", 0.1)
    assert code == 0
    scan = report["scan"]
    assert scan["auc"] == pytest.approx(8 / 9) and (scan["abnormal"], scan["normal"]) == (3, 3)
    assert scan["roc"] == [list(point) for point in metrics.roc_points(SCORES, LABELS)]
    assert report["labels"]["b"] == {"label": 1, "types": ["Epidural", "Subdural"]}
    assert scan["at_threshold"]["sensitivity"]["value"] == pytest.approx(2 / 3)
    assert scan["at_threshold"]["ppv_at_prevalence"]["value"] == pytest.approx((2 / 30) / (2 / 30 + 0.9 / 3))
    # A scan of several types counts in each: a and b; b and c
    assert scan["categories"]["Epidural"]["auc"] == 1 and scan["categories"]["Epidural"]["abnormal"] == 2
    assert scan["categories"]["Subdural"]["auc"] == pytest.approx(5 / 6)
    assert scan["categories"]["Subdural"]["sensitivity"]["hits"] == 1
    assert (report["slice"]["n"], report["slice"]["clusters"]) == (18, 6)
    assert report["slice"]["at_threshold"]["sensitivity"] == NO_THRESHOLD
    assert {"numpy", "scipy"} <= set(report["versions"]) and report["settings"]["seed"] == 0
    table = (base / "metrics" / "metrics.md").read_text()
    assert table == capsys.readouterr().out and "| scan | AUC | 0.889 |" in table
    assert {"roc.png", "pr.png"} <= {p.name for p in (base / "metrics").iterdir()}


def test_one_class_gives_undefined_not_a_number(results):
    write_csv(results.parent / "labels.csv", "scan_id,label", [[n, 0] for n in "abcdef"])
    code, report = run(results)
    assert code == 0
    for figure in ("auc", "auc_delong", "auc_bootstrap", "average_precision", "average_precision_bootstrap"):
        assert report["scan"][figure] == "undefined: only one class (0 abnormal, 6 normal)"
    assert report["scan"]["at_threshold"]["sensitivity"] == NO_THRESHOLD


def test_missing_scan_is_exit_2_unless_allowed(results, capsys):
    rows = [[n, s, "failed" if n == "a" else "ok"] for n, s in zip("abcdef", SCORES)]
    write_csv(results / "scores.csv", "scan_id,score,status", rows)
    assert run(results) == (2, None)
    assert "1 scans failed (a)" in capsys.readouterr().err
    code, report = run(results, "--missing", "worst")
    assert code == 0 and report["scan"]["counted_worst"] == 1 and report["scan"]["auc"] == pytest.approx(5 / 9)
    code, report = run(results, "--missing", "exclude")
    assert code == 0 and report["scan"]["left_out"] == {"failed": 1}
    assert "scans left out: 1 (failed)" in (results.parent / "metrics" / "metrics.md").read_text()


def test_scans_not_to_be_trusted_count_by_name_and_take_their_slices_with_them(results, capsys):
    """b is unreliable, d failed and has no slices, f is not in scores.csv; slices of a, c and e remain."""
    status = {"b": "unreliable", "d": "failed"}
    write_csv(results / "scores.csv", "scan_id,score,status",
              [[n, "" if n == "d" else s, status.get(n, "ok")] for n, s in zip("abcde", SCORES)])
    write_csv(results / "slices.csv", "scan_id,slice,score",
              [[n, k, s * (k + 1)] for n, s in zip("abcdef", SCORES) for k in range(3) if n != "d"])
    flags = ["--slices", results / "slices.csv", "--slice-labels", results.parent / "slice_labels.csv"]
    assert run(results, *flags) == (2, None)
    assert "1 scans failed (d); 1 scans unreliable (b); 1 scans labelled without a score (f)" in capsys.readouterr().err
    code, report = run(results, *flags, "--missing", "exclude")
    assert code == 0 and (report["scan"]["n"], report["slice"]["n"]) == (3, 9)
    assert report["scan"]["left_out"] == {"failed": 1, "unreliable": 1, "labelled without a score": 1}
    assert report["slice"]["left_out"] == {"unreliable": 3, "labelled without a score": 6}
    # Abnormal a2 2.7 and c2 1.2; normal a0 0.9, a1 1.8, c0 0.4, c1 0.8, e0 0.3, e1 0.6, e2 0.9: 13 of 14 ranked right
    assert report["slice"]["auc"] == pytest.approx(13 / 14)
    table = (results.parent / "metrics" / "metrics.md").read_text()
    assert "scans left out: 1 (unreliable)" in table and "slices left out: 3 (unreliable)" in table
    report = run(results, *flags, "--missing", "worst")[1]
    assert (report["scan"]["counted_worst"], report["slice"]["counted_worst"]) == (3, 9)


def test_threshold_comes_from_other_data(results, capsys):
    other = write_csv(results.parent / "healthy.csv", "scan_id,score,status",
                      [[f"h{i}", i / 20, "ok"] for i in range(20)])          # 0 .. 0.95
    code, report = run(results, "--threshold-from", other, "--fpr", 0.3)
    at = report["scan"]["at_threshold"]
    assert code == 0 and 0.65 <= at["threshold"] < 0.7 and (at["tp"], at["fp"]) == (2, 1)
    assert "20 normal scans" in at["threshold_source"]
    assert run(results, "--threshold-from", results / "scores.csv", out="none") == (2, None)
    assert "other data" in capsys.readouterr().err


def test_a_threshold_comes_from_other_patients(results, capsys):
    """Scans of the patients evaluated here, under other names, set their threshold."""
    other = write_csv(results.parent / "other.csv", "scan_id,score,status", [[f"h{i}", i, "ok"] for i in range(4)])
    healthy = [[f"h{i}", 0, f"p{i}"] for i in range(4)]
    theirs = write_csv(results.parent / "theirs.csv", "scan_id,label,patient", healthy)
    here = [(scan, int(i < 3), f"p{3 + i}") for i, scan in enumerate("abcdef")]
    write_csv(results.parent / "labels.csv", "scan_id,label,patient", here)
    assert run(results, "--threshold-from", other, theirs) == (2, None)
    assert "1 of its scans are evaluated here too, or others of their patients (h3)" in capsys.readouterr().err


def test_a_patient_is_not_a_scan_of_that_name(results):
    """Scan a has no patient here: one that is called a there is another."""
    other = write_csv(results.parent / "other.csv", "scan_id,score,status", [[f"h{i}", i, "ok"] for i in range(4)])
    theirs = write_csv(results.parent / "theirs.csv", "scan_id,label,patient",
                       [[f"h{i}", 0, patient] for i, patient in enumerate("abcd")])
    assert "on 4 normal scans" in run(results, "--threshold-from", other, theirs)[1]["scan"]["at_threshold"][
        "threshold_source"]


def test_labels_of_all_splits_do_for_a_threshold(results, capsys):
    """Scans that are labelled there and not in SCORES counted as its own: those evaluated, as evaluated twice."""
    base = results.parent
    other = write_csv(base / "other.csv", "scan_id,score,status", [[f"h{i}", i, "ok"] for i in range(4)])
    healthy = [[f"h{i}", 0, f"p{i}"] for i in range(4)]
    here = [[scan, int(i < 3), f"here{i}"] for i, scan in enumerate("abcdef")]
    found = []
    for rows in (healthy, healthy + here):
        theirs = write_csv(base / "theirs.csv", "scan_id,label,patient", rows)
        at = run(results, "--threshold-from", other, theirs, "--fpr", 0.3, "--missing", "worst")[1]["scan"][
            "at_threshold"]
        found.append((at["threshold"], at["threshold_source"]))
    assert found[0] == found[1] and found[0][0] == 2 and "on 4 normal scans" in found[0][1]          # 3 lies above
    rows = [[*row, split] for rows, split in ((healthy, "val"), (here, "test"), ([["n", 0, "n"]], "train"))
            for row in rows]
    write_csv(base / "labels.csv", "scan_id,label,patient,split", rows)
    for missing in ("error", "exclude", "worst"):               # n, scored nowhere, was a fifth, above any threshold
        at = run(results, "--threshold-from", other, base / "labels.csv", "--fpr", 0.3, "--missing", missing, "--where",
                 "split=test", out=missing)[1]["scan"]["at_threshold"]
        assert (at["threshold"], at["threshold_source"]) == found[0]
    write_csv(base / "labels.csv", "scan_id,label,patient", here)
    for lacking in ("x", "here0"):                              # not evaluated here; one of a patient who is
        write_csv(theirs, "scan_id,label,patient", [*healthy, *here, ["lacking", 0, lacking]])
        assert run(results, "--threshold-from", other, theirs, out="none") == (2, None)
        said = capsys.readouterr().err
        assert (f"--threshold-from {other} {theirs}: 1 scans labelled without a score (lacking). Mend the files, keep "
                "in LABELS only scans of SCORES, or say --missing exclude") in said
    failed = write_csv(base / "failed.csv", "scan_id,score,status", [["h0", 0, "ok"], ["h1", "", "failed"]])
    assert run(results, "--threshold-from", failed, out="none") == (2, None)
    assert "1 scans failed (h1). Mend the files, or say --missing exclude" in capsys.readouterr().err
    for row, scan in ((["h0", 0, "here0"], "h0"), (["a", 1, "here0"], "a")):
        write_csv(other, "scan_id,score,status", [[name, 1, "ok"] for name in {"h0", "h1", scan}])
        write_csv(theirs, "scan_id,label,patient", [healthy[1], *here[1:], row])
        assert run(results, "--threshold-from", other, theirs, out="none") == (2, None)
        assert f"1 of its scans are evaluated here too, or others of their patients ({scan})" in capsys.readouterr().err


@pytest.mark.parametrize("failed, threshold", [("a", -5), ("d", 5)])
def test_failed_scans_are_called_wrongly_whatever_the_threshold(results, failed, threshold):
    """All that have a score lie above -5 and below 5: the other two of the class are called rightly."""
    write_csv(results / "scores.csv", "scan_id,score,status",
              [[n, s, "failed" if n == failed else "ok"] for n, s in zip("abcdef", SCORES)])
    figure = "sensitivity" if failed == "a" else "specificity"
    scan = run(results, "--missing", "worst", "--threshold", threshold)[1]["scan"]
    assert (scan["at_threshold"][figure]["hits"], scan["at_threshold"][figure]["of"]) == (2, 3)
    if failed == "a":                                                        # an Epidural, with b
        found = scan["categories"]["Epidural"]["sensitivity"]
        assert (found["hits"], found["of"]) == (1, 2)


def test_no_threshold_clears_healthy_scans_that_failed(results, capsys):
    other = write_csv(results.parent / "healthy.csv", "scan_id,score,status",
                      [[f"h{i}", i / 20, "failed" if i < 2 else "ok"] for i in range(20)])
    flags = ["--threshold-from", other, "--missing", "worst"]
    at = run(results, *flags, "--fpr", 0.2)[1]["scan"]["at_threshold"]
    assert at["threshold"] == 0.85                                           # above it 0.9, 0.95 and those that failed
    assert run(results, *flags, "--fpr", 0.09, out="none") == (2, None)
    assert "2 of 20 normal scans have no score" in capsys.readouterr().err


def test_who_is_left_out_of_a_thresholds_data_is_told(results):
    """Its source named as many normal scans as had a score, and not that others had none."""
    status = {0: "failed", 1: "unreliable", 2: "unreliable"}
    other = write_csv(results.parent / "healthy.csv", "scan_id,score,status",
                      [[f"h{i}", i / 20, status.get(i, "ok")] for i in range(20)])
    for missing, normal, told in (("exclude", 17, "left out there: 1 (failed), 2 (unreliable)"),
                                  ("worst", 20, "of these without a score that counts, and above any threshold: 3")):
        found = run(results, "--threshold-from", other, "--fpr", 0.2, "--missing", missing)[1]["scan"]["at_threshold"]
        assert found["threshold_source"].startswith(
            f"false-positive rate 0.2 on {normal} normal scans of {other}; {told}; not known")


def test_the_level_of_the_intervals_is_told_in_full(results):
    for level, told in ((0.999, "99.9%"), (0.57, "57%")):
        assert run(results, "--level", level)[1]["table"]["columns"][3] == f"{told} interval"


def test_comparison_of_two_methods(results):
    other = write_csv(results.parent / "other.csv", "scan_id,score,status",
                      [[n, s, "ok"] for n, s in zip("abcdef", [1, 5, 2, 4, 3, 0])])
    report = run(results, "--compare", other)[1]
    assert report["comparison"]["auc"] == pytest.approx(5 / 9)
    assert 0 < report["comparison"]["delong_p"] < 1


def test_a_comparison_tells_whom_it_counts_as_ranked_wrongly(results, capsys):
    """The other method's failures were counted as wrong without a word: three rows alone gave a p of 0.04.

    The same scores, but d, normal, failed: it is above all three abnormal, which leaves 6 of 9 pairs.
    """
    rows = [[n, s, "failed" if n == "d" else "ok"] for n, s in zip("abcdef", SCORES)]
    other = write_csv(results.parent / "other.csv", "scan_id,score,status", [*rows, ["stray", 1, "ok"]])
    write_csv(results / "scores.csv", "scan_id,score,status", [*([n, s, "ok"] for n, s, _ in rows), ["stray", 1, "ok"]])
    found = run(results, "--compare", other, "--missing", "worst")[1]["comparison"]
    assert (found["auc"], found["own_auc"]) == (pytest.approx(6 / 9), pytest.approx(8 / 9))
    assert (found["n"], found["counted_worst"], found["not_compared"]) == (6, 1, 0)
    assert found["left_out"] == {"scored without a label": 1}
    said = capsys.readouterr().out
    for told in ("that failed, are unreliable or have no score, counted as ranked wrongly: 1",
                 "left out: 1 (scored without a label)"):
        assert f"- scans of {other} {told}\n" in said
    assert "left out of the comparison" not in said


def test_a_comparison_is_of_the_scans_that_both_have(results, capsys):
    """One that failed in either table was a dead end, which named neither it nor a remedy.

    Here e fails, there b. Of the others ours ranks 3 of 4 pairs right (c below d), the other 2 (both below d).
    """
    def table(path, scores, failed):
        return write_csv(path, "scan_id,score,status",
                         [[n, s, "failed" if n == failed else "ok"] for n, s in zip("abcdef", scores)])

    table(results / "scores.csv", SCORES, "e")
    other = table(results.parent / "other.csv", [1, 5, 2, 4, 3, 0], "b")
    report = run(results, "--compare", other, "--missing", "exclude")[1]
    found = report["comparison"]
    assert report["scan"]["n"] == 5 and (found["n"], found["not_compared"]) == (4, 1)
    assert (found["own_auc"], found["auc"]) == (0.75, 0.5)
    assert found["left_out"] == {"failed": 1, f"without a score in {results / 'scores.csv'}": 1}
    said = capsys.readouterr().out
    assert (f"- scans left out of the comparison: 1 (without a score in {other}); on the 4 compared, AUC 0.750 here\n"
            in said) and f"- scans of {other} left out: 1 (failed)\n" in said
    write_csv(results / "scores.csv", "scan_id,score,status", [["a", 1, "ok"], ["d", 1, "ok"]])
    write_csv(other, "scan_id,score,status", [["b", 1, "ok"]])
    assert run(results, "--compare", other, "--missing", "exclude", out="none") == (2, None)
    assert (f"--compare {other}: none of its 1 labelled scans with a score (b) is among the 2 of "
            f"{results / 'scores.csv'} (a, d); expected the same scans by another method") in capsys.readouterr().err


def test_a_comparison_with_a_run_that_has_not_ended_is_refused(results, tmp_path, capsys):
    """Its tables may be an earlier run's: --slices, --maps and --threshold-from refused them already."""
    (tmp_path / "other").mkdir()
    other = write_results(tmp_path / "other" / "results")
    (other / "run.json").write_text(json.dumps({"seconds": None}))
    assert run(results, "--compare", other / "scores.csv") == (2, None)
    assert f"--compare {other / 'scores.csv'}: {other / 'run.json'} is {UNENDED}" in capsys.readouterr().err
    (other / "run.json").write_text(json.dumps({"seconds": 1.0}))
    assert run(results, "--compare", other / "scores.csv")[0] == 0


def test_a_scan_is_called_as_it_was_flagged(results, capsys):
    """Its score was cut to six digits in the table, the threshold was not: flagged there, and here a miss."""
    score = 3.398482163747152
    row = {"scan_id": "a", "status": "ok", "score": score, "flagged": 1, "seconds": 1.0}
    of_slice = {"scan_id": "a", "slice": 0, "score": score}
    (results / "a").mkdir()
    (results / "a" / "result.json").write_text(json.dumps({"key": {}, "origin": {}, "scan": row, "slices": [of_slice],
                                                           "seconds": {}}))
    write_tables(results, [Result(results / "a", row, {}, {})])
    for by_slice, key in ((False, ("a",)), (True, ("a", 0))):
        assert cohort.read_scores(results / ("slices.csv" if by_slice else "scores.csv"), by_slice) == {key: score}
    write_csv(results.parent / "labels.csv", "scan_id,label", [["a", 1]])
    for threshold, hits in ((3.39848, 1), (score, 0)):
        (results / "run.json").write_text(json.dumps({"settings": {"scan_score": "max"}, "calibration": None,
                                                      "threshold": threshold, "seconds": 1.0}))
        assert run(results)[1]["scan"]["at_threshold"]["sensitivity"]["hits"] == hits
        assert f"- scan threshold {threshold!r}: that of projector.py --threshold" in capsys.readouterr().out


def test_the_models_own_threshold_is_taken_from_run_json(results):
    run_json = results / "run.json"
    calibration = {"scans": 30, "threshold": {"fpr": 0.05, "max": 0.65, "mean": 0.1}}
    try:
        run_json.write_text(json.dumps({"calibration": calibration, "settings": {"scan_score": "max"}}))
        code, report = run(results)
        at = report["scan"]["at_threshold"]
        assert code == 0 and at["threshold"] == 0.65 and "model's own" in at["threshold_source"]
        assert "flagged" not in at["threshold_source"]                   # which these scores do not tell
        assert run(results, "--threshold", 0.7)[1]["scan"]["at_threshold"]["threshold"] == 0.7
        rows = [[n, s, "" if n in "bc" else int(s > 0.65), "ok"] for n, s in zip("abcdef", SCORES)]
        write_csv(results / "scores.csv", "scan_id,score,flagged,status", rows)
        assert "; 2 of these scans projector.py has not flagged or cleared by it" in (
            run(results)[1]["scan"]["at_threshold"]["threshold_source"])
        given = {"calibration": calibration, "settings": {"scan_score": "max"}, "threshold": 0.8}    # flagged by this
        for content in (given, given | {"calibration": None}):
            run_json.write_text(json.dumps(content))
            at = run(results)[1]["scan"]["at_threshold"]
            assert at["threshold"] == 0.8 and "that of projector.py --threshold; 2 of" in at["threshold_source"]
        began = {"calibration": calibration, "settings": {"scan_score": "max"}, "seconds": None}
        run_json.write_text(json.dumps(began))                           # its scores are not there yet
        note = f"no scan threshold: that of {run_json} is {UNENDED}, or give --threshold"
        for content in (began, given | {"calibration": None, "seconds": None}):
            run_json.write_text(json.dumps(content))
            report = run(results)[1]
            assert report["scan"]["at_threshold"]["sensitivity"] == NO_THRESHOLD
            assert note in report["table"]["notes"]                      # it was said that there is none
        assert f"- {note}\n" in (results.parent / "metrics" / "metrics.md").read_text()
        run_json.write_text(json.dumps({"calibration": None, "settings": {"scan_score": "max"}, "seconds": None}))
        report = run(results)[1]
        assert report["scan"]["at_threshold"]["sensitivity"] == NO_THRESHOLD
        assert not any("threshold" in note for note in report["table"]["notes"])
    finally:
        run_json.unlink(missing_ok=True)


def test_a_threshold_of_healthygan_is_told_as_such(results, capsys):
    """It was told as that of projector.py --threshold, a flag that nobody had given."""
    (results / "run.json").write_text(json.dumps({"threshold": 0.65, "image_settings": {}, "seconds": 1.0}))
    at = run(results)[1]["scan"]["at_threshold"]
    assert (at["threshold"], at["tp"], at["fp"]) == (0.65, 2, 1)
    assert "as healthygan.test has it" in at["threshold_source"]
    assert "scan threshold 0.65: the model's own, as healthygan.test has it in run.json" in capsys.readouterr().out


def test_labels_of_slices_do_not_contradict_those_of_scans(results, capsys):
    labels = results.parent / "slice_labels.csv"
    flags = ["--slices", results / "slices.csv", "--slice-labels", labels]
    report = run(results, *flags)[1]
    assert report["slice"]["abnormal_scans_without_abnormal_slice"] == 0
    assert "every slice is labelled" not in capsys.readouterr().out

    def write(abnormal, left_out=()):
        keys = [(name, k) for name in "abcdef" for k in range(3) if (name, k) not in left_out]
        write_csv(labels, "scan_id,slice,label", [[*key, int(key in abnormal)] for key in keys])

    write({("a", 2), ("b", 0)})                                              # c is abnormal, none of its slices is
    assert run(results, *flags)[1]["slice"]["abnormal_scans_without_abnormal_slice"] == 1
    assert "abnormal scans of which every slice is labelled, none of them abnormal: 1" in capsys.readouterr().out
    write({("a", 2), ("b", 0)}, left_out=[("c", 1)])                         # there it may be
    report = run(results, *flags, "--missing", "exclude")[1]
    assert report["slice"]["abnormal_scans_without_abnormal_slice"] == 0
    write({("a", 2), ("b", 0), ("e", 1)})
    assert run(results, *flags)[0] == 2
    said = capsys.readouterr().err
    assert "slice_labels.csv: 1 slices have label 1 though their scan has label 0 (e slice 1)" in said


def test_slices_of_scans_that_are_not_chosen_are_told_from_those_without_a_label(results):
    """They were said to have no scan label: --where had left their scans out."""
    base = results.parent
    write_csv(base / "labels.csv", "scan_id,split,label", [[n, "train" if n in "bf" else "test", y]
                                                           for n, y in zip("abcdef", LABELS)])
    rows = [[n, k, int(n in "abc" and k == 2)] for n in "abcdefg" for k in range(3 if n != "g" else 4)]
    write_csv(base / "slice_labels.csv", "scan_id,slice,label", rows)                   # g: in no other table
    flags = ["--slices", results / "slices.csv", "--slice-labels", base / "slice_labels.csv"]
    left_out = run(results, *flags, "--where", "split=test")[1]["slice"]["left_out"]
    assert left_out == {"not chosen": 6, "labelled, of scans not chosen": 6,
                        "labelled, of scans without a scan label": 4}
    assert "slices left out: 6 (labelled, of scans not chosen)" in (base / "metrics" / "metrics.md").read_text()
    assert run(results, *flags)[1]["slice"]["left_out"] == {"labelled, of scans without a scan label": 4}


def test_labels_of_slices_from_1_are_refused_whatever_is_missing(results, capsys):
    labels = results.parent / "slice_labels.csv"
    write_csv(labels, "scan_id,slice,label", [[name, k, int(name in "abc" and k == 2)] for name in "abcdef"
                                              for k in (1, 2, 3)])
    flags = ["--slices", results / "slices.csv", "--slice-labels", labels, "--missing", "exclude"]
    assert run(results, *flags) == (2, None)
    assert f"{labels}: counts slices from 1" in capsys.readouterr().err


@pytest.mark.parametrize("extra", [["--slices", "x.csv"], ["--threshold", "1", "--threshold-from", "x.csv"],
                                   ["--prevalence", "1.5"], ["--where", "split"], ["--level", "95"],
                                   ["--threshold", "nan"], ["--slice-threshold", "inf"], ["--masks", "nowhere"],
                                   ["--fpr", "0.1"], ["--slice-threshold", "1"], ["--maps", "."],
                                   ["--mask-gaps", "skip"]])
def test_wrong_usage_is_exit_2(results, extra):
    with pytest.raises(SystemExit) as stop:
        run(results, *extra)
    assert stop.value.code == 2


@pytest.mark.parametrize("content, message", [
    ("scan_id,label\na,0\n".encode("utf-16"), "UTF-8"), ("scan_id,label\nmü,1\n".encode("latin-1"), "UTF-8"),
    (b"scan_id;label\na;0\n", "found scan_id;label;"), (b"", "no header")])
def test_labels_that_are_no_csv_are_exit_2(results, capsys, content, message):
    (results.parent / "labels.csv").write_bytes(content)
    assert run(results)[0] == 2
    error = capsys.readouterr().err
    assert "labels.csv" in error and message in error


@pytest.mark.parametrize("command", [[], ["triage"]])
@pytest.mark.parametrize("out", ["taken", "taken/metrics"])
def test_a_file_in_place_of_the_out_folder_is_told_before_any_work(results, command, out, capsys, monkeypatch):
    """It was told by the system's words, after all figures."""
    taken = results.parent / "taken"
    taken.write_text("x")
    monkeypatch.setattr(cohort, "read_labels", None)
    wanted = [*command, str(results / "scores.csv"), str(results.parent / "labels.csv"), "--out"]
    assert evaluate.main([*wanted, str(results.parent / out)]) == 2
    assert (f"error: --out {results.parent / out}: {taken} is no folder that can be written to; choose another\n"
            in capsys.readouterr().err)


def test_a_report_that_cannot_be_is_told_before_any_work(results, capsys, monkeypatch):
    monkeypatch.setattr(cohort, "read_labels", None)
    (results / "run.json").write_text("{}")
    flags = [results / "scores.csv", results.parent / "labels.csv", "--out", results.parent / "m", "--report"]
    for report, told in ((results / "run.json" / "a.html", f"{results / 'run.json'} is no folder that can be written"),
                         (results / "a.html", f"expected {results / 'scores.csv'}, {results / 'slices.csv'}, "
                                              f"{results / 'run.json'}")):
        assert evaluate.main([*map(str, flags), str(report)]) == 2
        assert told in capsys.readouterr().err
        (results / "run.json").unlink(missing_ok=True)
    with pytest.raises(SystemExit):                                          # it would take the place of the scores
        evaluate.main([*map(str, flags), str(results / "scores.csv")])


@pytest.mark.parametrize("content", [
    {"calibration": 3}, {"settings": [1]}, {"threshold": "0.5"},
    {"calibration": {"threshold": {"mean": 0.5}}, "settings": {"scan_score": "mean"}}])
def test_a_run_json_of_another_program_is_exit_2(results, content, capsys):
    """Each was a traceback."""
    (results / "run.json").write_text(json.dumps(content))
    assert run(results) == (2, None)
    assert "run.json: settings, calibration or threshold are not as projector.py writes" in capsys.readouterr().err


def test_a_message_names_the_tables_it_is_about(results, capsys):
    """'scores against labels' was said of any two of four tables."""
    other = write_csv(results.parent / "other.csv", "scan_id,score,status", [["a", 1, "ok"]])
    assert run(results, "--compare", other) == (2, None)
    assert f"error: --compare {other} against {results.parent / 'labels.csv'}: 5 scans" in capsys.readouterr().err
    write_csv(other, "scan_id,score,status", [["h", "", "failed"]])
    assert run(results, "--threshold-from", other, "--missing", "exclude") == (2, None)
    assert f"--threshold-from {other}: none of the labelled scans has a score" in capsys.readouterr().err


def test_an_interval_of_few_patients_is_marked(results, capsys):
    """Average precision has no other interval than the bootstrap's, which is too narrow for few."""
    report = run(results)[1]
    rows = {(level, figure): interval for level, figure, _, interval, _ in report["table"]["rows"]}
    assert rows["scan", "average precision"].endswith(" (few patients)") and report["scan"]["few"]
    assert rows["scan", ""].endswith(" (bootstrap, few patients)") and rows["scan", "AUC"].endswith(" (DeLong)")
    assert "- few patients: fewer than 50 of a class" in capsys.readouterr().out
    for patients, few in ((49, True), (50, False)):                          # two scans of each, of either class
        labels = np.arange(4 * patients) // 2 % 2
        found = ranking(labels * 0.5 + np.arange(4 * patients) % 7 / 7, labels, np.arange(4 * patients) // 2,
                        FigureSettings(bootstrap=100))
        assert found["few"] is few
    assert resampled((0.5, 0.75), False) == "0.500 to 0.750" and resampled("undefined: x", True) == "undefined: x"


@pytest.mark.parametrize("command", [[], ["triage"]])
def test_a_seed_below_0_is_refused(results, command, capsys):
    """It was a traceback."""
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*command, "scores.csv", "labels.csv", "--out", str(results / "out"), "--seed", "-1"])
    assert stop.value.code == 2 and "argument --seed: must be at least 0, got -1" in capsys.readouterr().err
