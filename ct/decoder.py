"""DICOM files opened and their pixels decoded, within bounds.

Compressed pixels are decoded in a process of its own, with a limit of memory and of time. The decoders are C and C++
that parse what anybody has sent: one that crashes, hangs, or allocates what a false header says costs its scan alone,
and the next file gets a new process.
"""

from __future__ import annotations

import io
import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from ct.limits import MAX_INFLATED
from ct.scan import ScanError

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-W", "ignore", "-c", "from ct.decoder import serve; serve()"]
MEMORY = 2**29                  # bytes of a decoder's process beside the pixels; Python and the libraries take a third
COPIES = 4                      # of the pixels, while they are decoded
SECONDS = 300.0                 # for one file
# pydicom warns of odd values by quoting them, and they may be a patient's. Set once and for all: a change for the time
# of a call would be seen by the other threads.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE


class _DecoderError(Exception):
    """Why a decoder's process gave no pixels."""


# ---- opening

class _Bounded(io.BufferedReader):
    """A file that cannot be read to its end in one go where that would unpack to more than a scan holds.

    pydicom reads without a length only where a data set is deflated, and then unpacks all of it at once.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            place = self.tell()
            self._check_inflated()
            self.seek(place)
        return super().read(size)

    def _check_inflated(self) -> None:
        inflate, count = zlib.decompressobj(-zlib.MAX_WBITS), 0
        try:
            for packed in iter(lambda: super(_Bounded, self).read(2**16), b""):
                count += len(inflate.decompress(packed))
                if count > MAX_INFLATED:
                    raise ScanError(f"{Path(self.name).name}: its data set is deflated and unpacks to more than "
                                    f"{MAX_INFLATED / 1e6:.0f} MB; export it without deflation")
        except zlib.error:                            # pydicom will say so
            pass


def open_dicom(path: Path, **how) -> pydicom.Dataset:
    """pydicom.dcmread of a file, with or without a preamble. ScanError for a deflated one that unpacks to too much."""
    with _Bounded(io.FileIO(path)) as file:
        return pydicom.dcmread(file, force=True, **how)


# ---- pixels

def read_pixels(path: Path) -> tuple[np.ndarray, bool]:
    """The stored values of a file, [H, W] or [frames, H, W], and whether its transfer syntax says compressed where they
    are not. Raises ScanError where they cannot be decoded.
    """
    relabelled, name = False, "not given"
    try:
        ds = open_dicom(path)
        syntax = ds.file_meta.get("TransferSyntaxUID")
        if syntax is None:                                          # a bare data set: as it could be parsed
            implicit, _ = ds.original_encoding
            ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        elif syntax.is_compressed and _is_native(ds):
            ds.file_meta.TransferSyntaxUID, relabelled = ExplicitVRLittleEndian, True
        name = ds.file_meta.TransferSyntaxUID.name
        if ds.file_meta.TransferSyntaxUID.is_compressed:
            return _decode_apart(path, _size(ds)), False
        return ds.pixel_array, relabelled
    except ScanError:
        raise
    except Exception as error:                  # every decoder raises its own
        reason = str(error) if isinstance(error, _DecoderError) else type(error).__name__
        raise ScanError(f"{path.name}: its pixels cannot be decoded ({reason}): the file is damaged or truncated, or "
                        f"its transfer syntax is not supported ({name}); export it uncompressed or in JPEG Lossless"
                        ) from error


def _size(ds: pydicom.Dataset) -> int:
    """Bytes of the pixels, uncompressed, as the header tells."""
    return (int(ds.Rows) * int(ds.Columns) * int(ds.get("NumberOfFrames", 1) or 1) * int(ds.get("SamplesPerPixel", 1))
            * int(ds.BitsAllocated) // 8)


def _is_native(ds: pydicom.Dataset) -> bool:
    """Whether PixelData has the length of uncompressed pixels and does not begin as a compressed frame."""
    return len(ds.PixelData) - _size(ds) in (0, 1) and ds.PixelData[:4] != b"\xfe\xff\x00\xe0"


_lock = threading.Lock()
_worker: subprocess.Popen | None = None
_owner = 0                                            # the process that started it: a fork must not speak to it, too


def _decode_apart(path: Path, size: int) -> np.ndarray:
    """The pixels of a compressed file, decoded by the process for it; started at the first call, again if it died."""
    global _worker, _owner
    with _lock:
        if _worker is None or _owner != os.getpid():
            _worker = subprocess.Popen(COMMAND, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            _owner = os.getpid()
        try:
            return _ask(_worker, path, size)
        except BaseException as error:
            if not isinstance(error, _DecoderError) or _worker.poll() is not None:
                _worker.kill()
                _worker.communicate()
                _worker = None
            raise


def _ask(worker: subprocess.Popen, path: Path, size: int) -> np.ndarray:
    try:
        worker.stdin.write(json.dumps([os.path.abspath(path), size]).encode() + b"\n")
        worker.stdin.flush()
        answer = select.poll()
        answer.register(worker.stdout, select.POLLIN)
        if not answer.poll(1000 * SECONDS):
            raise TimeoutError
        head = worker.stdout.readline()
    except BrokenPipeError:
        head = b""
    if not head:
        code = worker.wait()
        raise _DecoderError(f"the decoder crashed, {signal.Signals(-code).name}" if code < 0 else "the decoder ended")
    head = json.loads(head)
    if "error" in head:
        raise _DecoderError(head["error"])
    pixels = np.empty(head["shape"], head["dtype"])
    if worker.stdout.readinto(memoryview(pixels).cast("B")) != pixels.nbytes:
        raise EOFError
    return pixels


def serve() -> None:
    """The decoder's process: for every line [path, bytes] of the standard input a line of JSON, and the pixels.

    bytes: of the pixels, as the header tells.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)      # Ctrl-C is for the program, which then closes the input
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)         # warnings quote headers
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)                                     # what a library prints is no reply
    for line in sys.stdin.buffer:
        path, size = json.loads(line)
        try:
            _limit_memory(MEMORY + COPIES * size)
            pixels = np.ascontiguousarray(pydicom.dcmread(path, force=True).pixel_array)
            head = {"shape": pixels.shape, "dtype": pixels.dtype.str}
        except Exception as error:                    # every decoder raises its own; its message may quote the header
            pixels, head = np.empty(0), {"error": type(error).__name__}
        replies.write(json.dumps(head).encode() + b"\n")
        replies.write(memoryview(pixels).cast("B"))
        replies.flush()


def _limit_memory(size: int) -> None:
    """Of this process; less where it has a lower limit already."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (size if hard == resource.RLIM_INFINITY else min(size, hard), hard))
