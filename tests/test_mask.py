"""python -m ct.mask: the mask in the scan's geometry as NIfTI and as DICOM Segmentation, failures as exit code 3."""

import logging
import pathlib
import threading
import warnings

import nibabel as nib
import numpy as np
import pydicom
import pytest

from ct import mask
from ct.brain import brain_mask
from ct.read import find_scans, read_scan
from tests.helpers import frames_by_source, synthetic_head
from tests.writers import complete, write_dicom_series, write_nifti_scan


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A head, and a series that is none."""
    folder = tmp_path_factory.mktemp("scans")
    hu, _ = synthetic_head(slices=14, size=64, spacing_mm=(10.0, 3.6, 3.6))
    write_dicom_series(folder / "head", hu, (10, 3.6, 3.6), flip_rows=True, edit=complete)
    write_dicom_series(folder / "air", np.full((4, 64, 64), -1000), study="air", series="air", edit=complete)
    return folder


def test_nifti_and_a_failed_scan(scans, tmp_path, capsys):
    assert mask.main([str(scans), "--out", str(tmp_path)]) == 3
    assert "air: FAILED, " in capsys.readouterr().err
    source = next(s for s in find_scans(scans) if s.scan_id == "head")
    expected = brain_mask(read_scan(source))
    assert 0.1 < expected.mean() < 0.5
    np.testing.assert_array_equal(nib.load(tmp_path / "head.nii.gz").get_fdata().transpose(2, 1, 0), expected)


@pytest.mark.parametrize("flags, patient", [([], "Secret^Name"), (["--no-phi"], "")])
def test_dicom_segmentation_on_the_source_frames(scans, tmp_path, flags, patient):
    assert mask.main([str(scans / "head"), "--out", str(tmp_path), "--dicom", *flags]) == 0
    seg = pydicom.dcmread(tmp_path / "head.dcm")
    expected = brain_mask(scan := read_scan(find_scans(scans / "head")[0]))
    found = frames_by_source(seg)
    for (path, _), image in zip(scan.geometry.frames, expected[:, ::-1]):                   # stored with flipped rows
        uid = pydicom.dcmread(path).SOPInstanceUID
        np.testing.assert_array_equal(found[uid, 1][0] if (uid, 1) in found else np.zeros(image.shape), image)
    assert len(found) == expected.any((1, 2)).sum() and str(seg.PatientName) == patient
    assert seg.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Brain"


def test_wrong_usage(tmp_path, capsys):
    assert mask.main([str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_a_mask_never_takes_the_place_of_its_scan(tmp_path, capsys):
    """--out with the folder of the scans: the scan was gone."""
    hu, _ = synthetic_head(slices=14, size=64, spacing_mm=(10.0, 3.6, 3.6))
    path = write_nifti_scan(tmp_path / "head.nii.gz", hu)
    before = path.read_bytes()
    assert mask.main([str(path), "--out", str(tmp_path)]) == 2
    assert "head.nii.gz there is a scan" in capsys.readouterr().err and path.read_bytes() == before
    assert mask.main([str(path), "--out", str(tmp_path / "masks")]) in (0, 3)


@pytest.mark.parametrize("flags, name", [([], "head.nii.gz"), (["--dicom"], "head.dcm")])
def test_a_mask_is_whole_or_the_one_before(scans, tmp_path, monkeypatch, flags, name):
    """Half a file stayed under the mask's name where a write was broken off."""
    def broken_off(path, content):
        with open(path, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    (tmp_path / name).write_bytes(b"before")
    monkeypatch.setattr(pathlib.Path, "write_bytes", broken_off)
    monkeypatch.setattr(mask, "write_dicom_mask", lambda path, *args, **how: broken_off(path, b""))
    with pytest.raises(KeyboardInterrupt):
        mask.main([str(scans / "head"), "--out", str(tmp_path), *flags])
    assert {path.name for path in tmp_path.iterdir()} == {name} and (tmp_path / name).read_text() == "before"


def test_a_write_hides_headers_and_no_other_threads_warnings(monkeypatch, tmp_path, caplog):
    """pydicom's and highdicom's warnings quote headers; while one thread writes, and after, all others are seen."""
    begun, go_on = threading.Event(), threading.Event()

    class Slow:
        def save_as(self, path, **how):
            begun.set()
            assert go_on.wait(60)

    def quote():
        warnings.warn_explicit('The string "Secret"', UserWarning, "base.py", 1, module="highdicom.base")
        logging.getLogger("pydicom").warning("Secret")

    monkeypatch.setattr(mask, "_build", lambda *args: Slow())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        writer = threading.Thread(target=mask.write_dicom_mask, args=(tmp_path, None, None))
        writer.start()
        assert begun.wait(60)
        warnings.warn("while it writes", stacklevel=1)
        quote()
        go_on.set()
        writer.join()
        warnings.warn("after", stacklevel=1)
        quote()
    assert [str(warning.message) for warning in seen] == ["while it writes", "after"] and caplog.text == ""
