"""Damaged files: whatever bytes a reader meets, it gives a scan or a ScanError, soon and in little memory.

Every mutant is a small scan of one format with a few bytes changed, cut out, put in or cut off, by its seed. The first
MUTANTS_IN_TEST run with the tests, all of them by `make fuzz`.
"""

import resource
import shutil
import signal
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.uid import RLELossless

from ct.read import find_scans, read_scan
from ct.scan import ScanError
from tests.helpers import synthetic_head
from tests.writers import make_uid, write_dicom_series, write_nifti_scan, write_slice_folder

MUTANTS, MUTANTS_IN_TEST, PER_TEST = 2000, 60, 20
SECONDS, GIGABYTES = 10, 2.0
HEADER = 2000                   # bytes at the beginning of a file, which most changes go to
FORMATS = ("dicom", "rle", "heads", "nifti", "nifti.gz", "slices", "zip")


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, Path]:
    """One folder per format, each with one scan."""
    top = tmp_path_factory.mktemp("originals")
    hu, _ = synthetic_head(slices=4, size=32, spacing_mm=(5.0, 7.0, 7.0))
    for name in ("dicom", "rle"):
        for k in range(4):
            ds = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
            ds.ImagePositionPatient[2] += 5 * k
            ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = make_uid("mutant", k)
            if name == "rle":
                ds.compress(RLELossless, generate_instance_uid=False)
            (top / name).mkdir(exist_ok=True)
            ds.save_as(top / name / f"{k}.dcm")
    write_dicom_series(top / "heads", hu, (5.0, 3.0, 3.0))
    for name in ("nifti", "nifti.gz"):
        (top / name).mkdir()
        write_nifti_scan(top / name / f"vol.{name.replace('nifti', 'nii')}", hu, (5.0, 3.0, 3.0))
    write_slice_folder(top / "slices", hu, pixel_spacing_mm=3.0)
    (top / "zip").mkdir()
    with zipfile.ZipFile(top / "zip" / "heads.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((top / "heads").iterdir()):
            archive.write(path, path.name)
    return {name: top / name for name in FORMATS}


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One to eight changes; most of them near the beginning, where headers are."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        end = len(changed) if rng.random() < 0.3 else min(len(changed), HEADER)
        at, length = int(rng.integers(0, max(end, 1))), int(rng.integers(1, 9))
        kind = rng.integers(0, 5)
        noise = rng.choice([b"\x00", b"\xff", b"\x7f"]) * length if rng.random() < 0.4 else rng.bytes(length)
        if kind <= 1:
            changed[at:at + length] = noise
        elif kind == 2:
            del changed[at:at + length]
        elif kind == 3:
            changed[at:at] = noise
        elif rng.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def check_mutant(seed: int, originals: dict[str, Path], folder: Path) -> bool:
    """Whether the mutant is still read; fails on anything but a Scan or a ScanError."""
    rng = np.random.default_rng([20261126, seed])
    shutil.copytree(originals[FORMATS[seed % len(FORMATS)]], folder)
    paths = sorted(folder.iterdir())
    for path in paths if rng.random() < 0.3 else [paths[rng.integers(len(paths))]]:
        path.write_bytes(mutate(path.read_bytes(), rng))

    def too_slow(*_):
        raise TimeoutError(f"mutant {seed} took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(SECONDS)
    read = False
    try:
        for source in find_scans(folder, log=lambda line: None):
            try:
                scan = read_scan(source)
            except ScanError as error:
                assert str(folder) not in str(error), f"mutant {seed}: a path in {error}"
            else:
                read |= bool(np.isfinite(scan.hu).all())
    except ScanError:
        pass
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        shutil.rmtree(folder)
    return read


def check_range(first: int, originals: dict[str, Path], folder: Path) -> None:
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(first, first + PER_TEST):
        check_mutant(seed, originals, folder / str(seed))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) * 1024 / 1e9
    assert grown < GIGABYTES, f"mutants {first} to {first + PER_TEST - 1} took {grown:.1f} GB"


def test_the_originals_are_read(originals):
    for name in FORMATS:
        source, = find_scans(originals[name])
        if name not in ("dicom", "rle"):                       # CT_small is a part of a trunk
            assert read_scan(source).hu.shape == (4, 32, 32)


@pytest.mark.parametrize("first", range(0, MUTANTS_IN_TEST, PER_TEST))
def test_mutants(originals, tmp_path, first):
    check_range(first, originals, tmp_path)


@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", range(MUTANTS_IN_TEST, MUTANTS, PER_TEST))
def test_all_mutants(originals, tmp_path, first):
    check_range(first, originals, tmp_path)
