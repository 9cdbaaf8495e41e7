"""ct/archive.py: what a zip was unpacked to does not outlive the run, however that ends."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from common.stopping import Terminated
from ct import archive
from ct.read import find_scans, read_scan
from ct.scan import ScanError
from tests.writers import write_dicom_series

ROOT = Path(__file__).parent.parent


@pytest.fixture
def packed(tmp_path, monkeypatch) -> Path:
    """A zip of one file; the temporary folder is tmp_path/tmp."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    with zipfile.ZipFile(tmp_path / "one.zip", "w") as file:
        file.writestr("folder/file.dcm", b"Secret^Name")
    return tmp_path / "one.zip"


def test_sigterm_removes_what_was_unpacked(packed):
    with pytest.raises(Terminated), archive.unpacked(packed) as folder:
        assert (folder / "folder" / "file.dcm").is_file()
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL        # or the tests would end here
        os.kill(os.getpid(), signal.SIGTERM)
    assert os.listdir(packed.parent / "tmp") == []


@pytest.mark.parametrize("prefix", ["./head/", "head//", "head/./", "head\\"])
def test_a_zip_whose_paths_are_written_otherwise_can_be_read(tmp_path, prefix):
    """With backslashes by some programs of Windows: it was said to lead out of the archive."""
    hu = np.random.default_rng(0).integers(-1000, 600, (6, 10, 8)).astype(np.float32)
    with zipfile.ZipFile(tmp_path / "one.zip", "w") as file:
        for path in write_dicom_series(tmp_path / "series", hu).iterdir():
            file.writestr(zipfile.ZipInfo(prefix + path.name), path.read_bytes())
    with zipfile.ZipFile(tmp_path / "one.zip") as file:
        assert all(name.startswith(prefix) for name in file.namelist())
    source, = find_scans(tmp_path / "one.zip")
    np.testing.assert_array_equal(read_scan(source).hu, hu)


def zipped(path, files):
    with zipfile.ZipFile(path, "w") as file:
        for one in files:
            file.write(one, one.name)
    return path


def test_a_series_in_two_archives_is_noted_by_their_names(tmp_path):
    """Each half was a scan that nothing was said of."""
    hu = np.random.default_rng(0).integers(-1000, 600, (12, 10, 8)).astype(np.float32)
    files = sorted(write_dicom_series(tmp_path / "files", hu).iterdir())
    other = sorted(write_dicom_series(tmp_path / "other", hu, series="other", study="other").iterdir())
    (tmp_path / "scans").mkdir()
    zipped(tmp_path / "scans" / "part1.zip", files[:7])
    zipped(tmp_path / "scans" / "part2.zip", files[6:])
    zipped(tmp_path / "scans" / "rest.zip", other)
    zipped(tmp_path / "scans" / "rest-again.zip", other)                  # a copy is no part
    found = {source.scan_id: read_scan(source).notes for source in find_scans(tmp_path / "scans")}
    words = "another part of this series lies in {}: unpack both into one folder"
    assert found == {"part1": (words.format("part2.zip"),), "part2": (words.format("part1.zip"),), "rest": (),
                     "rest-again": ()}


def test_archives_of_two_patients_under_one_series_uid_are_no_parts(tmp_path):
    hu = np.random.default_rng(0).integers(-1000, 600, (6, 10, 8)).astype(np.float32)
    (tmp_path / "scans").mkdir()
    for name in ("a", "b"):
        folder = write_dicom_series(tmp_path / name, hu + len(name), edit=lambda ds, k, name=name: setattr(
            ds, "PatientID", f"SECRET-{name}"))
        zipped(tmp_path / "scans" / f"{name}.zip", folder.iterdir())
    assert [read_scan(source).notes for source in find_scans(tmp_path / "scans")] == [(), ()]


@pytest.mark.parametrize("name", ["..\\out.dcm", "head\\..\\..\\out.dcm", "\\out.dcm"])
def test_backslashes_do_not_lead_out_of_the_archive(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "one.zip", "w") as file:
        file.writestr(name, b"x")
    source, = find_scans(tmp_path / "one.zip")
    with pytest.raises(ScanError, match="one.zip: holds a path that leads out of the archive"):
        read_scan(source)


def test_the_next_search_removes_what_a_killed_run_has_unpacked_and_nothing_of_a_living_one(packed):
    code = ("import os, signal, sys; from pathlib import Path; from ct import archive\n"
            "with archive.unpacked(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)")
    tmp = packed.parent / "tmp"
    subprocess.run([sys.executable, "-c", code, packed], cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp)})
    left, = tmp.iterdir()
    assert (left / "folder" / "file.dcm").is_file()
    (tmp / "scan-of-somebody").mkdir()
    with archive.unpacked(packed) as folder:
        with pytest.raises(ScanError):
            find_scans(packed.parent / "nothing")
        assert sorted(path.name for path in tmp.iterdir()) == sorted([folder.name, "scan-of-somebody"])
        assert (folder / "folder" / "file.dcm").is_file()
    assert os.listdir(tmp) == ["scan-of-somebody"]


def test_what_another_machine_has_unpacked_must_be_old_and_without_a_lock(packed):
    """Its locks may not be seen here."""
    folder = packed.parent / "tmp" / f"{archive.PREFIX}0123abcd-x"
    folder.mkdir()
    archive.remove_abandoned()
    assert folder.exists()
    os.utime(folder, (time.time() - 8 * 86400,) * 2)
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    archive.remove_abandoned()
    assert folder.exists()
    os.close(handle)
    archive.remove_abandoned()
    assert not folder.exists()


def test_what_another_user_has_unpacked_and_links_are_left_alone(packed, monkeypatch):
    tmp = packed.parent / "tmp"
    mine = f"{archive.PREFIX}{archive._machine()}-"
    (packed.parent / "elsewhere").mkdir()
    (tmp / f"{mine}link").symlink_to(packed.parent / "elsewhere")
    (tmp / f"{mine}folder").mkdir()
    user = os.geteuid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: user + 1)
        archive.remove_abandoned()
    assert len(os.listdir(tmp)) == 2
    archive.remove_abandoned()
    assert os.listdir(tmp) == [f"{mine}link"] and (packed.parent / "elsewhere").is_dir()


def test_a_folder_that_is_removed_before_it_is_locked_is_made_anew(packed, monkeypatch):
    make, made = tempfile.mkdtemp, []

    def removed_at_first(**how):
        made.append(make(**how))
        if len(made) == 1:
            archive.remove_abandoned()
        return made[-1]
    monkeypatch.setattr(tempfile, "mkdtemp", removed_at_first)
    with archive.unpacked(packed) as folder:
        assert str(folder) == made[1] and (folder / "folder" / "file.dcm").is_file()
    assert os.listdir(packed.parent / "tmp") == []
