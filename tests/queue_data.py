"""What the tests of runs into a folder of results need: small scans, the command, its tables."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np

import projector
from tests.helpers import synthetic_head

TABLES = ("scores.csv", "slices.csv")
BROKEN = "scan-003"


def make_scans(folder: Path, count: int) -> Path:
    """Heads of 6 slices of 48 x 48 pixels as NIfTI; one cannot be read."""
    folder.mkdir()
    for i in range(count):
        hu, _ = synthetic_head(slices=6, size=48, spacing_mm=(20.0, 4.8, 4.8), seed=i)
        image = nib.Nifti1Image(hu.transpose(2, 1, 0).astype(np.int16), np.diag([4.8, 4.8, 20.0, 1]))
        nib.save(image, folder / f"scan-{i:03d}.nii")
    (folder / f"{BROKEN}.nii").write_bytes((folder / f"{BROKEN}.nii").read_bytes()[:400])
    return folder


def flags(scans: Path, model: Path, out: Path, *more: object) -> list[str]:
    return [str(a) for a in (scans, "--model", model, "--out", out, "--device", "cpu", "--precision", "fp32", *more)]


def run_whole(scans: Path, model: Path, out: Path, *more: object) -> Path:
    """Results of a run that nothing has disturbed."""
    assert projector.main(flags(scans, model, out, *more)) == 3          # one scan is broken
    return out


def tables(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in TABLES}


def link_two(scans: Path, folder: Path) -> Path:
    """Two of the scans, which can be read, in a folder of their own."""
    folder.mkdir()
    for name in ("scan-000.nii", "scan-001.nii"):
        os.link(scans / name, folder / name)
    return folder


def made(capsys) -> int:
    """How many scans have been projected since it was asked."""
    return capsys.readouterr().out.count(": score")
