"""The sheet of phantoms, from a tiny cohort on disk."""

from __future__ import annotations

import numpy as np
import pytest

from ct.scan import Scan
from ct.write import write_nifti
from demos import gallery


@pytest.fixture
def cohort(tmp_path):
    head = np.full((4, 40, 40), -1000, np.float32)
    head[:, 5:35, 5:35] = 40
    head[:, 5, 5:35] = 1000                            # some skull: HU that end at 40 would look clipped there
    truth = np.zeros(head.shape, np.float32)
    truth[2, 10:20, 10:20] = 1
    for name, mask in (("healthy-0001", 0 * truth), ("emergency-0001", truth)):
        scan = Scan(name, head, np.arange(4) * 5.0, (5.0, 5.0))
        for folder, values in (("scans", head), ("masks", mask)):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_nifti(tmp_path / folder / f"{name}.nii.gz", values, scan)
    (tmp_path / "labels.csv").write_text("scan_id,label,types\nhealthy-0001,0,\nemergency-0001,1,tumour\n")
    return tmp_path


def test_every_kind_has_its_description():
    from demos.lesions import KINDS
    assert set(gallery.IN_LIFE) == set(KINDS)


def test_the_slice_with_most_truth_is_shown(cohort, monkeypatch):
    shown = []
    monkeypatch.setattr(gallery, "show", lambda axes, hu, truth=None: shown.append(truth))
    figure = gallery.gallery(cohort)
    assert [None if t is None else int(t.sum()) for t in shown] == [None, None, 100]
    texts = [text.get_text() for sub in figure.subfigs for axes in sub.axes for text in axes.texts]
    assert texts[0] == "tumour" and "fingers of oedema" in " ".join(texts[1].split())


@pytest.mark.parametrize("kept, drawn", [("healthy", 1), ("emergency", 2)])
def test_a_cohort_of_one_sort_alone(cohort, monkeypatch, kept, drawn):
    """It was a traceback: no part of a figure has the height 0."""
    lines = (cohort / "labels.csv").read_text().splitlines()
    (cohort / "labels.csv").write_text("\n".join([lines[0], *(line for line in lines if line.startswith(kept))]))
    shown, show = [], gallery.show
    monkeypatch.setattr(gallery, "show", lambda *args: shown.append(args) or show(*args))
    assert gallery.main([str(cohort), "--out", str(cohort / "sheet.png")]) == 0 and len(shown) == drawn


def test_an_empty_cohort_is_refused(cohort, capsys):
    (cohort / "labels.csv").write_text("scan_id,label,types\n")
    assert gallery.main([str(cohort), "--out", str(cohort / "sheet.png")]) == 2
    assert "labels.csv: has no healthy phantom and no emergency" in capsys.readouterr().err


def test_command(cohort, tmp_path, capsys):
    assert gallery.main([str(cohort), "--out", str(tmp_path / "sheet.png")]) == 0
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    (cohort / "labels.csv").unlink()
    assert gallery.main([str(cohort), "--out", str(tmp_path / "sheet.png")]) == 2
    assert "labels.csv" in capsys.readouterr().err
