"""The Python of the pages runs as it stands: API.md's blocks in order, on a scan of a known head, and the others'."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest

from ct.read import find_scans
from ct.write import write_nifti
from detect import load_bundle
from tests.helpers import synthetic_head, synthetic_scan
from tests.writers import complete, write_dicom_series

ROOT = Path(__file__).resolve().parents[1]
HEAD = dict(slices=14, size=64, spacing_mm=(10.0, 3.6, 3.6), lesion=(5, 10, 25, 22, 75))


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """The current folder, with models/ in it."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(page: str) -> dict:
    """The names that the page's Python blocks, run in order, leave."""
    text, names = (ROOT / page).read_text(encoding="utf-8"), {}
    blocks = re.findall(r"^ *```python\n(.*?)^ *```", text, re.S | re.M)
    assert len(blocks) == text.count("```python") >= 1
    for block in blocks:
        exec(compile(dedent(block), page, "exec"), names)          # noqa: S102 - our own page
    return names


def test_every_page_with_python_is_run():
    with_python = {path.name for path in ROOT.glob("docs/*.md") if "```python" in path.read_text(encoding="utf-8")}
    assert with_python == {"API.md", "DICOM.md", "DATA.md"}


def test_the_code_of_the_page_runs(checkout, capsys):
    scan, _ = synthetic_scan(**HEAD)
    (checkout / "scans").mkdir()
    write_nifti(checkout / "scans" / "head.nii.gz", scan.hu, scan)
    names = run("docs/API.md")
    assert "surprise_mask=" in capsys.readouterr().out and names["projection"].score > 0


def test_a_precision_that_is_none_is_a_plain_value_error():
    """As the page says; of its other errors load_bundle's are CheckpointErrors."""
    with pytest.raises(ValueError, match="bfloat16: expected auto, bf16 or fp32") as raised:
        load_bundle(ROOT / "models" / "head-128", precision="bfloat16")
    assert raised.type is ValueError
    text = (ROOT / "docs/API.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| `load_bundle` |"))
    assert "Plain `ValueError`" in row and all(f'`"{one}"`' in row for one in ("auto", "bf16", "fp32"))


def test_the_objects_of_the_dicom_page_are_written(checkout):
    hu, _ = synthetic_head(**HEAD)
    write_dicom_series(checkout / "series", hu, HEAD["spacing_mm"], edit=complete)
    run("docs/DICOM.md")
    written = {path.name for path in (checkout / "out" / "dicom").iterdir()}
    assert {"sr.dcm", "map.dcm", "key-objects.dcm", "picture-1.dcm"} <= written


def test_single_images_are_sorted_into_series_as_the_data_page_says(checkout, monkeypatch):
    images = np.zeros((3, 8, 8), np.int16)
    for series in ("one", "two"):
        write_dicom_series(checkout / "images", images, series=series, study=series,
                           name=lambda k, series=series: f"ID_{series}{k}.dcm")
    monkeypatch.setattr(sys, "argv", ["sort.py", "images", "sorted"])
    run("docs/DATA.md")
    assert [len(source.paths) for source in find_scans(checkout / "sorted")] == [3, 3]
