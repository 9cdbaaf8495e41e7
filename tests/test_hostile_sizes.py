"""Bombs: files that unpack to far more than they are, with sizes that are true and with sizes that lie; deep nesting.

Promise 16 of docs/RELIABILITY.md. All are read in one process that may take a gigabyte beside the libraries.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import jpeg_ls
import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless

from ct import decoder_process, limits
from ct.dicom_header import read_header
from ct.read import find_scans, read_scan
from ct.scan import ScanError
from tests.writers import write_dicom_series, write_scan_json, write_slice_folder

HU = np.random.default_rng(5).integers(-1000, 600, (4, 64, 64)).astype(np.float32)
BLOCK, TIMES = 2**24, 128                             # 2 GiB of zeros
READER = """
import json, resource, sys
from pathlib import Path
from ct.read import find_scans, read_scan
from ct.scan import ScanError
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, 2 * (taken + 2**30,))
reasons = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    reasons[folder.name] = []
    try:
        for source in find_scans(folder, log=lambda line: None):
            try:
                read_scan(source)
                reasons[folder.name].append("read")
            except ScanError as error:
                reasons[folder.name].append(str(error))
    except ScanError as error:
        reasons[folder.name].append(str(error))
print(json.dumps(reasons))
"""


def zeros(begin: bytes = b"", wbits: int = -15) -> bytes:
    """`begin` and 2 GiB of zeros, deflated into 2 MB."""
    pack = zlib.compressobj(1, zlib.DEFLATED, wbits)
    start = pack.compress(begin) + pack.flush(zlib.Z_FULL_FLUSH)
    block = zlib.compressobj(9, zlib.DEFLATED, -15)
    repeated = block.compress(bytes(BLOCK)) + block.flush(zlib.Z_FULL_FLUSH)
    last = zlib.compressobj(9, zlib.DEFLATED, -15)
    return start + TIMES * repeated + last.flush() + bytes(4)


def dicom(folder: Path, change) -> None:
    """A series whose every file is written anew by change(ds, the bytes up to its pixels)."""
    def edit(ds, k):
        ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    write_dicom_series(folder, HU, edit=edit)
    for path in folder.iterdir():
        change(path, pydicom.dcmread(path))


def end_of_meta(file: bytes) -> int:
    """After the preamble and the group length, which is the first element."""
    return 144 + struct.unpack("<I", file[140:144])[0]


def deflated(frames: int):
    def change(path, ds):
        """The pixels, of the size that the header tells or not, are zeros without end."""
        ds.NumberOfFrames, ds.PixelData = frames, b""
        ds.Rows = ds.Columns = 64 if frames == 1 else 4096
        ds.save_as(path)
        plain = path.read_bytes()
        ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        ds.save_as(path)
        packed = path.read_bytes()
        meta, body = packed[:end_of_meta(packed)], plain[end_of_meta(plain):]
        element = b"\xe0\x7f\x10\x00OW\0\0"
        body = body[:body.index(element)] + element + struct.pack("<I", BLOCK * TIMES)
        path.write_bytes(meta + zeros(body))
    return change


def jpeg2000(path, ds):
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(path.with_suffix(".j2k"), "JPEG2000", no_jp2=True)
    stream = bytearray(path.with_suffix(".j2k").read_bytes())
    path.with_suffix(".j2k").unlink()
    assert stream[2:4] == b"\xff\x51" and struct.unpack(">II", stream[8:16]) == (64, 64)
    struct.pack_into(">IIIIII", stream, 8, 60000, 60000, 0, 0, 60000, 60000)             # image and tile
    ds.file_meta.TransferSyntaxUID, ds.PixelData = JPEG2000Lossless, encapsulate([bytes(stream)])
    ds["PixelData"].is_undefined_length = True
    ds.save_as(path)


def jpeg_ls_lying(path, ds):
    stream = bytearray(jpeg_ls.encode(np.zeros((64, 64), np.uint16)).tobytes())
    frame = stream.index(b"\xff\xf7")
    assert struct.unpack(">HH", stream[frame + 5:frame + 9]) == (64, 64)
    struct.pack_into(">HH", stream, frame + 5, 65535, 65535)
    ds.file_meta.TransferSyntaxUID, ds.PixelData = JPEGLSLossless, encapsulate([bytes(stream)])
    ds["PixelData"].is_undefined_length = True
    ds.save_as(path)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(folder: Path, side: int, *more: bytes) -> None:
    folder.mkdir()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    pixels = zeros(wbits=15)
    for k in range(3):
        (folder / f"{k}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", pixels)
                                          + chunk(b"IEND", b""))
    write_scan_json(folder, [[0, 80]], pixel_spacing_mm=0.5)


def nifti(folder: Path, shape: tuple[int, int, int], offset: float = 352) -> None:
    folder.mkdir()
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape(shape)
    header.set_sform(np.diag([0.3, 0.3, 1, 1]), 1)
    header["vox_offset"], header["magic"] = offset, b"n+1"
    body = zeros(header.binaryblock + bytes(4))
    (folder / "scan.nii.gz").write_bytes(b"\x1f\x8b\x08" + bytes(7) + body + bytes(8))


def archive(folder: Path, size: int) -> None:
    """One member that says it is `size` bytes."""
    folder.mkdir()
    packed = zeros()
    with zipfile.ZipFile(folder / "scans.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("scan.nii", b"")
    name = b"scan.nii"
    local = struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 20, 0, 8, 0, 33, 0, len(packed), size, len(name), 0) + name
    central = struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", 20, 20, 0, 8, 0, 33, 0, len(packed), size, len(name), 0,
                          0, 0, 0, 0, 0) + name
    place = len(local) + len(packed)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1, 1, len(central), place, 0)
    (folder / "scans.zip").write_bytes(local + packed + central + end)


def masked(folder: Path) -> None:
    write_slice_folder(folder / "png", HU)
    (folder / "BrainExtraction").mkdir()
    header = {"descr": "|b1", "fortran_order": False, "shape": (2**20, 2**12, 2**10)}
    with open(folder / "BrainExtraction" / "bet.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)


BOMBS = {                                             # how it is made, and what is said of it
    "dicom, deflated, true": (lambda folder: dicom(folder, deflated(64)), "deflated and unpacks to more than 268 MB"),
    "dicom, deflated, lying": (lambda folder: dicom(folder, deflated(1)), "deflated and unpacks to more than 268 MB"),
    "dicom, jpeg 2000, lying": (lambda folder: dicom(folder, jpeg2000), "pixels cannot be decoded"),
    "dicom, jpeg-ls, lying": (lambda folder: dicom(folder, jpeg_ls_lying), "pixels cannot be decoded"),
    "png, true": (lambda folder: png(folder, 46340), "more pixels than any slice has"),
    "png, true, ours": (lambda folder: png(folder, 8000), "of at most 4096 x 4096"),
    "png, lying": (lambda folder: png(folder, 64), None),                # only what the header says is unpacked
    "png, text": (lambda folder: png(folder, 64, chunk(b"zTXt", b"a\0\0" + zeros(wbits=15))), "0.png"),
    "nifti, true": (lambda folder: nifti(folder, (4096, 4096, 64)), "no scan packs to less than a 250th"),
    "nifti, lying": (lambda folder: nifti(folder, (64, 64, 64)), "doesn't look like HU"),
    "nifti, far": (lambda folder: nifti(folder, (64, 64, 64), 2.0**40), "no scan packs to less than a 250th"),
    "nifti, nothing so large": (lambda folder: nifti(folder, (4096, 4096, 5000)), "GB of memory are free"),
    "zip, true": (lambda folder: archive(folder, BLOCK * TIMES), "no scan packs to less than a 250th"),
    "zip, lying": (lambda folder: archive(folder, 1000), "cannot be unpacked"),
    "zip, lying large": (lambda folder: archive(folder, 2**32 - 2), "no scan packs to less than a 250th"),
    "mask": (masked, "bet.npy"),
}


@pytest.fixture(scope="module")
def reasons(tmp_path_factory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("bombs")
    for name, (make, _) in BOMBS.items():
        make(folder / name)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 100e6
    said = subprocess.run([sys.executable, "-c", READER, folder], capture_output=True, text=True, check=False,
                          cwd=Path(__file__).parent.parent, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_a_gigabyte(name, reasons, tmp_path):
    words = BOMBS[name][1]
    reason, = reasons[name]
    if "the disk has room for" in reason and shutil.disk_usage(tmp_path).free < 6e9:
        pytest.skip(f"the disk is nearly full, and that is what is said first: {reason}")
    assert words in reason if words else "MemoryError" not in reason


def test_the_bombs_would_fill_a_gigabyte():
    """Or the test above would prove nothing."""
    body = zeros()
    inflate = zlib.decompressobj(-15)
    assert sum(len(inflate.decompress(body[k:k + 2**16])) for k in range(0, len(body), 2**16)) == BLOCK * TIMES
    assert len(body) < 2.5e6


# ---- nesting

def nested(depth: int, undefined: bool) -> bytes:
    """A Content Sequence in a Content Sequence, and so on."""
    body = b""
    for _ in range(depth):
        length = b"\xff" * 4 if undefined else struct.pack("<I", len(body))
        item = b"\xfe\xff\x00\xe0" + length + body + (b"\xfe\xff\x0d\xe0" + bytes(4) if undefined else b"")
        length = b"\xff" * 4 if undefined else struct.pack("<I", len(item))
        body = b"\x40\x00\x30\xa7SQ\0\0" + length + item + (b"\xfe\xff\xdd\xe0" + bytes(4) if undefined else b"")
    return body


@pytest.mark.parametrize("depth", [250, 5000])
def test_sequences_nested_deep_are_refused_by_name(depth, tmp_path):
    folder = write_dicom_series(tmp_path / "series", HU)
    for path in folder.iterdir():
        before, pixels, after = path.read_bytes().partition(b"\xe0\x7f\x10\x00OW")
        path.write_bytes(before + nested(depth, undefined=True) + pixels + after)
    with pytest.raises(ScanError, match=r"^00\d.dcm: its header nests sequences deeper"):
        read_header(path)
    source, = find_scans(tmp_path)
    with pytest.raises(ScanError, match="nests sequences deeper"):
        read_scan(source)


def test_nested_sequences_of_known_length_are_stepped_over(tmp_path):
    folder = write_dicom_series(tmp_path / "series", HU)
    for path in folder.iterdir():
        before, pixels, after = path.read_bytes().partition(b"\xe0\x7f\x10\x00OW")
        path.write_bytes(before + nested(5000, undefined=False) + pixels + after)
    source, = find_scans(tmp_path)
    np.testing.assert_array_equal(read_scan(source).hu, HU)


# ---- decoders

@pytest.fixture
def fresh_decoder(monkeypatch):
    """A decoder's process of its own, and none left over."""
    monkeypatch.setattr(decoder_process, "_worker", None)
    yield
    if decoder_process._worker is not None:
        decoder_process._worker.kill()
        decoder_process._worker.communicate()


BREAKING = """
import os, signal, time
from importlib import import_module
from ct import decoder_process, limits
module = import_module(decoder_process.TASKS["{task}"])
decode = module.decode
def breaking(path):
    if "broken" in path:
        {act}
    return decode(path)
module.decode = breaking
decoder_process.serve()
"""


def write_compressed(folder: Path) -> None:
    write_dicom_series(folder, HU, series=folder.name, study=folder.name, edit=lambda ds, k: ds.compress(RLELossless))


def write_pictures(folder: Path) -> None:
    write_slice_folder(folder, HU, (-1000, 600), bits=16)


@pytest.mark.parametrize("task, write, rounding", [("dicom", write_compressed, 0), ("picture", write_pictures, 0.02)])
@pytest.mark.parametrize("act, words", [
    ("os.kill(os.getpid(), signal.SIGSEGV)", "the decoder crashed, SIGSEGV"), ("os._exit(1)", "the decoder ended"),
    ("time.sleep(600)", "the decoder took more than 3 s"), ("bytes(2**40)", "MemoryError")])
def test_a_decoder_that_crashes_costs_its_scan_alone(task, write, rounding, act, words, fresh_decoder, monkeypatch,
                                                     tmp_path):
    monkeypatch.setattr(decoder_process, "COMMAND", [sys.executable, "-c", BREAKING.format(task=task, act=act)])
    for name in ("a", "broken", "c"):
        write(tmp_path / name)
    first, broken, last = find_scans(tmp_path)
    np.testing.assert_allclose(read_scan(first).hu, HU, atol=rounding)
    with monkeypatch.context() as patch, pytest.raises(ScanError, match=rf": [a-z ]+ \({words}"):
        if "sleep" in act:                          # of a process that runs: a new one takes longer to start
            patch.setattr(decoder_process, "SECONDS", 3.0)
        read_scan(broken)
    np.testing.assert_allclose(read_scan(last).hu, HU, atol=rounding)


def test_plain_pixels_need_no_process(fresh_decoder, tmp_path):
    write_dicom_series(tmp_path / "case", HU)
    source, = find_scans(tmp_path)
    np.testing.assert_array_equal(read_scan(source).hu, HU)
    assert decoder_process._worker is None


def test_a_deflated_scan_is_read(tmp_path):
    folder = write_dicom_series(tmp_path / "case", HU)
    for path in folder.iterdir():
        ds = pydicom.dcmread(path)
        ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        ds.save_as(path)
    source, = find_scans(tmp_path)
    np.testing.assert_array_equal(read_scan(source).hu, HU)
    packed = gzip.compress(bytes(10))                 # damaged: pydicom's own words
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-200] + packed)
    source, = find_scans(tmp_path)
    with pytest.raises(ScanError, match="cannot be read as DICOM"):
        read_scan(source)


def test_what_another_hour_may_have_memory_for_is_told_from_what_is_wrong(monkeypatch):
    """A node tries the first again (pacs.node.machine_failure)."""
    monkeypatch.setattr(limits, "free_memory", lambda: 10**6)
    with pytest.raises(ScanError, match="0.0 GB of memory are free") as caught:
        limits.check_size("a.dcm", 30, 512, 512)
    assert isinstance(caught.value.__cause__, MemoryError)
    with pytest.raises(ScanError) as caught:
        limits.check_size("a.dcm", 30, 5000, 512)
    assert caught.value.__cause__ is None
