"""Names made to harm: 500 of them as ids of scans. Results stay in their folder, tables and the page stay text."""

from __future__ import annotations

import csv
import html
import json
import random
from pathlib import Path

import pytest

from common.files import FORMULA, from_cell, to_cell
from ct.read import RESERVED
from ct.scan import ScanSource
from detect.bundle import load_bundle
from detect.folder import collect, write_tables
from detect.jobs import WORK
from detect.outputs import OUTPUTS
from detect.projection import Projector
from detect.result import made_with, read_result, result_folder
from detect.run import run_report, write_all
from tests.helpers import project_one, tiny_bundle

PIECES = ("..", "../", "/", "\\", "\0", "=", "+1", "-1", "@SUM(A1)", "=cmd|' /C calc'!A0", "\t", "\r", "\n", "\x1b[31m",
          "\u202e", "\u2066", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "&lt;", '"', "'", ",", ";",
          "$(touch x)", "`x`", "%2e%2e%2f", "{{ 7 * 7 }}", "{% raw %}", "scores.csv", "CON", "a" * 255, "é" * 120,
          "\N{GRINNING FACE}" * 40, "\udcff\udcfe", " ", ".", "scans", ".work", "C:", "//host/share", "~", "*", "?")


def names() -> list[str]:
    rng = random.Random(0)
    found = set(PIECES) | {"", "case 7"}
    while len(found) < 500:
        found.add("".join(rng.choices(PIECES, k=rng.randint(2, 4))))
    return sorted(found)


def test_no_name_leads_out_of_the_results(tmp_path):
    inside = refused = 0
    for name in names():
        for by_hash in (False, True):
            try:
                place = result_folder(tmp_path, name, by_hash)
            except ValueError:
                refused += 1
                assert "/" in name or "\0" in name or name in ("", ".", "..", *RESERVED)
            else:
                inside += 1
                parents = [tmp_path, *([tmp_path / "scans", place.parent] if by_hash else [])]
                assert place.parent == parents[-1] and place.name == name
    assert inside > 200 and refused > 200


def test_no_cell_is_a_formula_and_every_name_comes_back():
    for name in names():
        cell = to_cell(name)
        assert from_cell(cell) == name and (cell in ("+1", "-1") or not cell.startswith(FORMULA[:-1]))
    cells = {"=1": "'=1", "a=1": "a=1", "'=1": "''=1", "'": "''", "-": "'-", "-1.5": "-1.5"}
    assert {text: to_cell(text) for text in cells} == cells


def test_tables_and_page_show_names_as_text(tmp_path):
    """Of scans that fail, so that the name is all there is to see."""
    possible = [name for name in names() if not {"/", "\0", "\udcff"} & set(name)
                and name not in ("", ".", "..", *RESERVED) and len(name.encode()) < 256]
    possible = sorted(possible, key=lambda name: name not in PIECES)[:120]
    out = tmp_path / "out"
    sources = [ScanSource(name, "nifti", (Path("scan.nii"),), error="no scan") for name in possible]
    for source in sources:
        made = made_with({}, source, OUTPUTS)
        said = project_one(None, source, result_folder(out, source.scan_id), out / WORK, made)
        assert said == "FAILED, no scan" and read_result(out / source.scan_id)["scan"]["scan_id"] == source.scan_id
    results, missing = collect(out, sources, {})
    assert len(results) == len(possible) and missing == []

    report = run_report(Projector(load_bundle(tiny_bundle(tmp_path / "model"))), 1)
    write_all(out, results, report, 1.0)
    with open(out / "scores.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert sorted(from_cell(row["scan_id"]) for row in rows) == sorted(possible)
    assert not any(cell.startswith(FORMULA[:-1]) for row in rows for cell in row.values() if cell not in ("+1", "-1"))
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page and html.escape("<img src=x onerror=alert(1)>") in page
    assert html.escape("{{ 7 * 7 }}") in page
    assert json.loads((out / "run.json").read_text())["failed"] == len(possible)


def test_tables_are_read_back_as_they_were_written(tmp_path):
    write_tables(tmp_path, [])
    assert (tmp_path / "scores.csv").read_text().startswith("scan_id,score,percentile")
    with pytest.raises(ValueError, match="name of a folder"):
        result_folder(tmp_path, "../x")
