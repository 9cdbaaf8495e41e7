"""The demo's own parts: its table, and that a failing step stops it with that step's code."""

from __future__ import annotations

import pytest

from demos import demo


def test_summary_puts_the_truth_beside_the_worklist(tmp_path):
    scores, labels = tmp_path / "scores.csv", tmp_path / "labels.csv"
    scores.write_text("scan_id,score,percentile,flagged,status\nb,2.5,96.7742,1,ok\na,0.1,12.0,0,ok\nc,,,,failed\n")
    labels.write_text("scan_id,label,types\na,0,\nb,1,subdural_acute\nc,1,tumour\n")
    lines = demo.summary(scores, labels).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["b", "2.5", "96.7", "yes", "subdural", "acute"], ["a", "0.1", "12.0", "no", "healthy"],
        ["c", "-", "-", "tumour"]]


def test_a_failing_step_stops_with_its_code(capfd):
    with pytest.raises(SystemExit) as stopped:
        demo.run("a step", "-c", "raise SystemExit(3)")
    assert stopped.value.code == 3
    assert "run the same command again" in capfd.readouterr().err


def test_its_phantoms_are_nobody_elses():
    from demos import benchmark
    assert demo.SEED >= benchmark.FIRST_SEED + benchmark.LARGEST
