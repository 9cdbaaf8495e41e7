"""docs/API.md: its code runs as it stands, in order, on a scan of a known head."""

from __future__ import annotations

import re
from pathlib import Path

from ct.write import write_nifti
from tests.helpers import synthetic_scan

ROOT = Path(__file__).resolve().parents[1]


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "API.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == page.count("```python") >= 5
    scan, _ = synthetic_scan(slices=14, size=64, spacing_mm=(10.0, 3.6, 3.6), lesion=(5, 10, 25, 22, 75))
    (tmp_path / "scans").mkdir()
    write_nifti(tmp_path / "scans" / "head.nii.gz", scan.hu, scan)
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/API.md", "exec"), names)          # noqa: S102 - our own page
    assert "surprise_mask=" in capsys.readouterr().out and names["projection"].score > 0
