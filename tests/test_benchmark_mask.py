"""The mask benchmark: leak and loss on points of a synthetic head, and errors that name the point or the flag."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import synthetic_scan
from PIL import Image

import benchmarks
from benchmarks.mask import Point, Verdict, judge, main, read_points, report

HEADER = "dataset,scan_id,slice,row,column,inside,structure\n"


@pytest.fixture(scope="module")
def scan_and_truth():
    return synthetic_scan(slices=14, spacing_mm=(8.0, 2.4, 2.4))


def point(s, row, column, inside, structure="brain"):
    return Point("set", "head", (s, row, column), inside, structure)


@pytest.fixture
def data(tmp_path, scan_and_truth):
    """The synthetic head as a folder of brain-window pictures, and a writer of points."""
    scan, _ = scan_and_truth
    folder = tmp_path / "scans" / "head"
    folder.mkdir(parents=True)
    for s, image in enumerate(scan.hu):
        grey = np.clip((image + 20) / 120 * 255, 0, 255).round().astype(np.uint8)
        Image.fromarray(grey).save(folder / f"{s:03}.png")
    settings = {"windows_hu": [[-20, 100]], "slice_spacing_mm": 8.0, "pixel_spacing_mm": 2.4,
                "order": "inferior-to-superior"}
    (folder / "scan.json").write_text(json.dumps(settings))
    points = tmp_path / "points.csv"

    def write(rows):
        points.write_text(HEADER + rows)
        return ["--points", str(points), "--data", f"set={tmp_path / 'scans'}"]

    return write


def test_points_of_a_synthetic_head(scan_and_truth):
    scan, truth = scan_and_truth
    s = 6
    columns = np.flatnonzero(truth[s, 48])
    first = int(columns[0])
    verdicts = judge([point(s, 48, 48, True), point(s, 48, 48, False), point(s, 48, first - 4, False),
                      point(s, 48, first - 4, True)], scan)
    assert [v.wrong for v in verdicts] == [False, True, False, True]
    assert verdicts[0].depth_mm == pytest.approx((columns[-1] - first) / 2 * 2.4, abs=8)
    assert verdicts[3].depth_mm == pytest.approx(-4 * 2.4, abs=2.5)


def test_given_mask_and_exact_distances(scan_and_truth):
    """Rows 40..49 and columns 30..59 held, pixels of 2 mm by 3 mm; nothing on the other slices."""
    scan, _ = scan_and_truth
    mask = np.zeros(scan.hu.shape, bool)
    mask[5, 40:50, 30:60] = True
    scan = dataclasses.replace(scan, brain=mask, pixel_spacing_mm=(2.0, 3.0))
    found = judge([point(5, 41, 45, True), point(5, 45, 65, False), point(6, 45, 45, True)], scan)
    assert [v.depth_mm for v in found] == [4.0, -18.0, -np.inf]
    mask[5] = True
    assert judge([point(5, 0, 2, True)], scan)[0].depth_mm == 2.0             # the mask ends where the picture does


def test_shares_by_structure_and_failures_by_name():
    verdicts = [Verdict(point(1, 2, 3, False, "orbit"), 5.0), Verdict(point(1, 2, 4, False, "orbit"), -1.0),
                Verdict(point(1, 2, 5, False, "sinus"), -9.0), Verdict(point(1, 2, 6, True, "csf"), -np.inf)]
    lines = report(verdicts).splitlines()
    shares = [" ".join(line.split()) for line in lines]
    assert "leak orbit 50.0% 1 of 2" in shares and "leak sinus 0.0% 0 of 1" in shares
    assert "leak all 33.3% 1 of 3" in shares and "loss all 100.0% 1 of 1" in shares
    assert lines[-2].startswith("set head slice 1 row 2 column 3  orbit: leak") and lines[-2].endswith("5.0 mm away")
    assert lines[-1].startswith("set head slice 1 row 2 column 6  csf: lost") and "not on the slice" in lines[-1]


def test_the_command_prints_leak_and_loss(data, capsys):
    assert main(data("set,head,6,48,48,1,brain\nset,head,6,2,2,0,air\nset,head,6,48,47,0,orbit\n")) == 0
    shares = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "leak all 50.0% 1 of 2" in shares and "loss all 0.0% 0 of 1" in shares


@pytest.mark.parametrize("rows, message", [
    ("set,head,6,48,x,1,brain\n", "line 2: expected"),
    ("set,head,6,48,48,1,brain\nset,head,6,48,48,2,brain\n", "line 3: expected"),
    ("\nset,head,6,48,²,1,brain\n", "line 3: expected"),
    ("", "no points"),
    ("set,other,6,48,48,1,brain\n", "no scan other"),
    ("else,head,6,48,48,1,brain\n", "add --data else=FOLDER"),
    ("set,head,6,48,96,1,brain\n", "outside the scan"),
    ("set,head,14,48,48,1,brain\n", "outside the scan"),
])
def test_wrong_points_are_named(data, rows, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(data(rows))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_name_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--points", "p.csv", "--data", str(tmp_path)])
    assert "NAME=FOLDER" in capsys.readouterr().err


def test_the_points_kept_in_the_repository_can_be_read():
    points = read_points(Path(benchmarks.__file__).with_name("mask_points.csv"))
    assert len({(p.dataset, p.scan_id, p.pixel) for p in points}) == len(points) >= 150
    assert {p.inside for p in points} == {True, False}
