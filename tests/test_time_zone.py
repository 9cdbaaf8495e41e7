"""TZ, which DICOM objects are dated by: what is another zone than meant, or none, is refused before a scan is."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

import pacs.__main__
import projector
from common.time_zone import check_time_zone
from ct import mask
from tests.writers import write_dicom_series, write_nifti_scan

UTC_FILE = b"TZif" + bytes(16) + struct.pack(">6l", 0, 0, 0, 0, 1, 4) + struct.pack(">lbb", 0, 0, 0) + b"UTC\0"


@pytest.fixture
def zones(tmp_path, monkeypatch):
    """A machine that has one time zone, and a table beside it."""
    folder = tmp_path / "zoneinfo"
    (folder / "Here").mkdir(parents=True)
    (folder / "Here" / "Town").write_bytes(UTC_FILE)
    (folder / "zone.tab").write_text("# a table\n")
    (folder / "Here" / "Broken").write_bytes(UTC_FILE[:20])
    monkeypatch.setattr("common.time_zone.TZPATH", ("/nowhere", str(folder)))
    return folder


@pytest.mark.parametrize("zone", ["Here/Town", ":Here/Town", "", "UTC", "{}/Here/Town", "KST-9", "<+09>-9", "UTC0",
                                  "GMT+00:00", "GMT0BST,M3.5.0/1,M10.5.0"])
def test_a_time_zone_of_this_machine_or_in_hours_is_taken(zones, monkeypatch, zone):
    monkeypatch.setenv("TZ", zone.format(zones))
    check_time_zone()


def test_no_time_zone_at_all_is_the_machines(zones, monkeypatch):
    monkeypatch.delenv("TZ", raising=False)
    check_time_zone()


@pytest.mark.parametrize("zone", ["KST-9 of the dates", "KST", "Here/Town        of the dates", "Here", "Here/Village",
                                  "{}/Here/Village", "zone.tab", "Here/Broken", "Asia/Seoul"])
def test_a_time_zone_that_the_machine_does_not_know_is_refused(zones, monkeypatch, zone):
    """The C library takes UTC for it without a word. Of Asia/Seoul Python alone has a table here."""
    monkeypatch.setenv("TZ", zone.format(zones))
    with pytest.raises(ValueError, match="^TZ=.*: no time zone of this machine.* Asia/Seoul with nothing behind"):
        check_time_zone()


@pytest.mark.parametrize("zone", ["UTC+9", "GMT+9", "gmt-9", "<UTC>+09:00", "UTC9"])
def test_hours_from_greenwich_that_posix_counts_westward_are_refused(zones, monkeypatch, zone):
    """UTC+9 dated the results of Seoul 18 hours early."""
    monkeypatch.setenv("TZ", zone)
    with pytest.raises(ValueError) as error:
        check_time_zone()
    told = str(error.value)
    assert told.startswith(f"TZ={zone}: ") and "UTC+9 means nine hours west" in told and "Asia/Seoul" in told


def test_the_pacs_node_refuses_it(zones, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TZ", "Here/Village")
    asked = ["--model", str(tmp_path / "none"), "--orthanc", "http://fake", "--state", str(tmp_path / "s")]
    assert pacs.__main__.main(asked) == 2
    assert "error: TZ=Here/Village: no time zone" in capsys.readouterr().err


def test_the_mask_command_refuses_it_where_it_writes_dicom(zones, tmp_path, monkeypatch, capsys):
    """Only the node did."""
    monkeypatch.setenv("TZ", "Here/Village")
    for more, told in (["--dicom"], "error: TZ=Here/Village: no time zone"), ([], "no such file or folder"):
        assert mask.main([str(tmp_path / "none"), "--out", str(tmp_path / "out"), *more]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("of_dicom, more, refused", [(True, [], True), (True, ["--no-dicom-out"], False),
                                                     (False, [], False)])
def test_projector_refuses_it_where_it_writes_dicom(zones, tmp_path, monkeypatch, capsys, of_dicom, more, refused):
    """Only the node did; docs/DICOM.md tells to give a container its TZ."""
    hu = np.zeros((4, 8, 8))
    if of_dicom:
        write_dicom_series(tmp_path / "scans", hu)
    else:
        Path(tmp_path / "scans").mkdir()
        write_nifti_scan(tmp_path / "scans" / "head.nii.gz", hu)

    def begun(*_):
        raise ValueError("far enough")
    monkeypatch.setenv("TZ", "Here/Village")
    monkeypatch.setattr(projector, "load", lambda args: None)
    monkeypatch.setattr(projector, "make_run", begun)
    assert projector.main([str(tmp_path / "scans"), "--model", "m", "--out", str(tmp_path / "out"), *more]) == 2
    assert ("error: TZ=Here/Village: " if refused else "error: far enough") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
