"""A disk that fills up: what was there stays whole, and the error names the path and the space needed."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dataset
import train
from common.files import FullDiskError, replace_text
from ct import mask
from dataset import ScanRecord, SliceWriter
from demos import phantom
from detect.claims import Claims
from gan import snapshots
from gan.snapshots import load_snapshot, save_snapshot, snapshot_steps
from tests.helpers import synthetic_head
from tests.writers import complete, write_dicom_series

PYDICOMS = "With tag (7FE0,0010) got exception: [Errno 28] No space left on device\nTraceback (most recent call last):"


@pytest.fixture
def small_disk(tmp_path) -> Path:
    """A file system of 1 MB."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def networks(parameters: int, value: float) -> dict[str, torch.nn.Module]:
    net = torch.nn.Linear(parameters, 1, bias=False)
    torch.nn.init.constant_(net.weight, value)
    return {"net": net}


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_snapshot_that_does_not_fit(small_disk, foreseen, monkeypatch):
    """Foreseen, or with the disk filling up while torch or safetensors write (a quota, another program)."""
    save_snapshot(small_disk, 1, networks(1000, 1.0), {"rng": torch.zeros(10)}, {})
    if not foreseen:
        monkeypatch.setattr(snapshots, "require_space", lambda path, needed: None)
    for weights, state in ((300_000, 10), (10, 300_000)):
        expected = r"disk is full: 1.2 MB are needed, [01].\d MB are free.*snapshot-0+2"
        with pytest.raises(OSError, match=expected) as told:
            save_snapshot(small_disk, 2, networks(weights, 2.0), {"rng": torch.zeros(state)}, {})
        assert told.value.errno == errno.ENOSPC
        assert snapshot_steps(small_disk) == [1]
    shutil.rmtree(small_disk / ".snapshot-00000002.writing", ignore_errors=True)
    assert (load_snapshot(small_disk).weights["net"]["weight"] == 1).all()


def test_a_database_that_does_not_fit(small_disk):
    path, rng = small_disk / "slices.lmdb", np.random.default_rng(0)

    def record(name: str, slices: int) -> ScanRecord:
        hu = rng.integers(-1000, 1000, (slices, 64, 64))
        return ScanRecord.encode(name, hu, np.ones_like(hu, bool), np.arange(slices))

    with SliceWriter(path, {}) as writer:
        writer.add(record("old", 4), "train", "p")
    with pytest.raises(OSError, match=r"disk is full: .* MB are needed, .*slices.lmdb"):
        with SliceWriter(path, {}, overwrite=True) as writer:
            for number in range(20):
                writer.add(record(f"new{number}", 20), "train", "p")
    assert os.listdir(small_disk) == ["slices.lmdb"]
    assert [scan["scan_id"] for scan in dataset.verify(path)["scans"]] == ["old"]


def test_a_text_that_does_not_fit(small_disk):
    replace_text(small_disk / "scores.csv", "old")
    with pytest.raises(OSError, match=r"disk is full: 2.0 MB are needed.*scores.csv"):
        replace_text(small_disk / "scores.csv", 2_000_000 * "x")
    assert os.listdir(small_disk) == ["scores.csv"] and (small_disk / "scores.csv").read_text() == "old"


def test_a_claim_that_does_not_fit(small_disk):
    claims = Claims(small_disk / ".work")
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "ballast").write_bytes(bytes(2_000_000))
    with pytest.raises(OSError, match=f"disk is full.*{claims.path('scan')}"), claims.hold("scan"):
        pass
    (small_disk / "ballast").unlink()
    with claims.hold("scan") as mine:
        assert mine


def test_a_training_says_so_and_goes_on_when_there_is_space(small_disk, gan_flags, gan_run, capsys):
    run = small_disk / "run"
    (small_disk / "ballast").write_bytes(bytes(930_000))
    assert train.main([*gan_flags, "--out", str(run)]) == 2
    assert "the disk is full" in capsys.readouterr().err
    (small_disk / "ballast").unlink()
    assert train.main([*gan_flags, "--out", str(run)]) == 0
    assert load_snapshot(run).step == 32


def test_workers_hand_it_on(tmp_path):
    error = FullDiskError(tmp_path / "out", 5_000_000)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is FullDiskError and again.errno == errno.ENOSPC
    assert again.filename == error.filename and "5.0 MB are needed" in str(again)


def test_a_phantom_that_does_not_fit(tmp_path, monkeypatch):
    """pydicom's error has no errno, and quotes its traceback."""
    def fill(*_):
        raise OSError(PYDICOMS)

    monkeypatch.setattr(phantom, "make", lambda *_: SimpleNamespace(scan=None, truth=None))
    monkeypatch.setattr(phantom, "write_dicom", fill)
    with pytest.raises(FullDiskError, match="^.Errno 28. the disk is full: more is needed, .*healthy-0001'$"):
        phantom.write_phantom(phantom.Job("healthy-0001", None, 1, tmp_path, False))


def test_a_brain_mask_that_does_not_fit(tmp_path, small_disk, capsys):
    hu, _ = synthetic_head(slices=14, size=64, spacing_mm=(10.0, 3.6, 3.6))
    write_dicom_series(tmp_path / "head", hu, (10, 3.6, 3.6), edit=complete)
    (small_disk / "ballast").write_bytes(bytes(1_040_000))
    assert mask.main([str(tmp_path / "head"), "--out", str(small_disk), "--dicom"]) == 2
    said = capsys.readouterr().err
    assert "the disk is full" in said and f"{small_disk / 'head.dcm'}" in said and "Traceback" not in said
