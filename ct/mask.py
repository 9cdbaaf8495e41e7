"""The brain masks of head CTs, and nothing else: the intracranial space from HU and morphology (ct/brain.py).

    python -m ct.mask SCANS --out DIR [--dicom] [--no-phi]

SCANS is a folder that is searched for DICOM series, NIfTI files and folders of slices, or one such scan. Writes
DIR/SCAN.nii.gz in the scan's own geometry; with --dicom, for scans read from DICOM, DIR/SCAN.dcm instead: a binary
Segmentation on the source's frames. Needs no model. Exit codes: 0 done, 2 wrong usage, 3 some scans failed.
Not a medical device: for research only.
"""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
from highdicom import AlgorithmIdentificationSequence
from highdicom.seg import Segmentation, SegmentDescription
from pydicom.sr.codedict import codes

from common.files import replacing
from common.time_zone import check_time_zone
from common.version import VERSION
from ct.brain import brain_mask
from ct.derived import MANUFACTURER, Derived, Maker
from ct.dicom_pixels import quote_no_headers
from ct.read import find_scans, open_scan
from ct.scan import Scan, ScanError
from ct.write import write_nifti

NAME = "CN-StyleGAN brain mask"
SUFFIXES = (".nii.gz", ".dcm")            # of a mask; the second with --dicom
SERIES_NUMBER = 6                         # last digit; those of a projection's objects (detect/dicom_out) come before


def write_dicom_mask(path: Path, mask: np.ndarray, scan: Scan, *, phi: bool = True) -> None:
    """A brain mask, bool [S, H, W], as a DICOM Segmentation. Raises DerivedError where the scan allows none."""
    quote_no_headers()
    _build(mask, scan, phi).save_as(path, enforce_file_format=True)


def _build(mask: np.ndarray, scan: Scan, phi: bool) -> Segmentation:
    derived = Derived.open(scan, Maker(NAME, VERSION, "0"), ("brain mask",), phi, datetime.now())
    algorithm = AlgorithmIdentificationSequence(NAME, codes.DCM.MorphologicalOperations, VERSION, source=MANUFACTURER)
    segment = SegmentDescription(1, "Brain", codes.SCT.AnatomicalStructure, codes.SCT.Brain, "AUTOMATIC", algorithm,
                                 tracking_uid=derived.uid("tracking"), tracking_id="Brain")
    return derived.segmentation(mask, segment, **derived.header("brain", SERIES_NUMBER, "brain mask"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ct.mask", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", type=Path, help="folder that holds scans, or one scan")
    parser.add_argument("--out", type=Path, required=True, help="folder for the masks")
    parser.add_argument("--dicom", action="store_true", help="a DICOM Segmentation for each scan read from DICOM")
    parser.add_argument("--no-phi", action="store_true", help="copy no patient data to the DICOM Segmentation")
    args = parser.parse_args(argv)
    failed = 0
    try:
        if args.dicom:
            check_time_zone()
        sources = find_scans(args.scans)
        written = {args.out.resolve() / (source.scan_id + suffix) for source in sources for suffix in SUFFIXES}
        if scans := sorted(written & {path.resolve() for source in sources for path in source.files}):
            raise ValueError(f"--out {args.out}: {scans[0].name} there is a scan, and a mask would take its place; "
                             "choose another folder")
        args.out.mkdir(parents=True, exist_ok=True)
        for source in sources:
            try:
                with open_scan(source) as scan:
                    mask = brain_mask(scan)
                    dicom = args.dicom and scan.source == "dicom"
                    path = args.out / (source.scan_id + SUFFIXES[dicom])
                    with replacing(path) as writing:
                        if dicom:
                            write_dicom_mask(writing, mask, scan, phi=not args.no_phi)
                        else:
                            write_nifti(writing, mask, scan, packed=True)
            except ScanError as error:
                failed += 1
                print(f"{source.scan_id}: FAILED, {error}", file=sys.stderr)
            else:
                print(f"{path}: brain on {int(mask.any((1, 2)).sum())} of {len(mask)} slices", flush=True)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
