"""DICOM files opened and their pixels decoded, within bounds: compressed ones by ct.decoder_process."""

from __future__ import annotations

import io
import logging
import re
import warnings
import zlib
from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from ct.decoder_process import DecodingError, decode_apart
from ct.limits import MAX_INFLATED
from ct.scan import ScanError

QUOTING = ("pydicom", "highdicom")                     # warn of odd values by quoting them; they may be a patient's
OF_GE = "1.2.840.113619.5.2"                           # GE's own transfer syntax: the bytes of its pixels are swapped
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE


def quote_no_headers() -> None:
    """Switch off the warnings of pydicom and highdicom. For good: what is switched off for the time of a call is so for
    all threads, and two of them can leave it off for everything.
    """
    ignored = ("ignore", None, UserWarning, re.compile("|".join(QUOTING)), 0)
    if warnings.filters[:1] != [ignored]:             # a filter that came later would be asked first
        warnings.filterwarnings("ignore", category=UserWarning, module="|".join(QUOTING))
    for name in QUOTING:
        logging.getLogger(name).setLevel(logging.CRITICAL)


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
    quote_no_headers()
    with _Bounded(io.FileIO(path)) as file:
        return pydicom.dcmread(file, force=True, **how)


# ---- pixels

def read_pixels(path: Path) -> tuple[np.ndarray, str]:
    """The stored values of a file, [H, W] or [frames, H, W], with the bits above them where it is not compressed; and
    what its transfer syntax says of them that is not so, if anything.

    Raises ScanError where they cannot be decoded, OSError where the file cannot be read.
    """
    wrong, known, syntax = "", False, None
    try:
        ds = open_dicom(path)
        syntax = ds.file_meta.get("TransferSyntaxUID") or None
        known = isinstance(syntax, UID) and syntax.is_transfer_syntax
        if syntax is None:                                          # a bare data set: as it could be parsed
            implicit, _ = ds.original_encoding
            ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        elif not known:                                             # some anonymisers replace every UID
            if syntax == OF_GE or not _is_native(ds):
                raise ScanError(f"{path.name}: its transfer syntax is none of DICOM's, so that its pixels cannot be "
                                "decoded; export it uncompressed (Explicit VR Little Endian)")
            ds.file_meta.TransferSyntaxUID, wrong = ExplicitVRLittleEndian, "is unknown, the pixels are not compressed"
        elif syntax.is_compressed and _is_native(ds):
            ds.file_meta.TransferSyntaxUID, wrong = ExplicitVRLittleEndian, "says compressed, the pixels are not"
        if ds.file_meta.TransferSyntaxUID.is_compressed:
            pixels, = decode_apart("dicom", path, _size(ds))
            return pixels, ""
        ds.pixel_array_options(correct_unused_bits=False)
        return ds.pixel_array, wrong
    except (ScanError, OSError):
        raise
    except Exception as error:                  # every decoder raises its own
        reason = str(error) if isinstance(error, DecodingError) else type(error).__name__
        told = f"{path.name}: its pixels cannot be decoded ({reason}): the file is damaged or truncated"
        if known and syntax.is_compressed:
            raise ScanError(f"{told}, or its transfer syntax is not supported ({syntax.name}); export it uncompressed "
                            "or in JPEG Lossless") from error
        raise ScanError(f"{told}; copy or export it again") from error


def _size(ds: pydicom.Dataset) -> int:
    """Bytes of the pixels, uncompressed, as the header tells."""
    return (int(ds.Rows) * int(ds.Columns) * int(ds.get("NumberOfFrames", 1) or 1) * int(ds.get("SamplesPerPixel", 1))
            * int(ds.BitsAllocated) // 8)


def _is_native(ds: pydicom.Dataset) -> bool:
    """Whether PixelData has the length of uncompressed pixels and does not begin as a compressed frame."""
    return len(ds.PixelData) - _size(ds) in (0, 1) and ds.PixelData[:4] != b"\xfe\xff\x00\xe0"


def decode(path: str) -> list[np.ndarray]:
    """The stored values; see ct.decoder_process."""
    return [pydicom.dcmread(path, force=True).pixel_array]
