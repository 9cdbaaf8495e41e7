"""Loose slices: single axial slices of many people, without neighbours and positions, for training alone.

A folder of pictures whose scan.json says "loose": true. Every picture is a head of its own: its brain is found on the
one slice, the head is centred and turned upright by the symmetry of that slice, and scaled by the pixel size that
scan.json gives, an assumed one where it is unknown. The standard frame scales each scan by its own middle slices; a
loose slice shows only one level, so a small head and a high level look alike, and it stays as small as it is. But no
level of a head is much larger than its middle: what is larger belongs to a larger head, and is made smaller.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ct.brain import brain_mask
from ct.read import ScanSource
from ct.scan import Scan, ScanError, printable
from ct.slices import load_spec, natural_key, read_picture
from ct.standardise import HEAD_MM, Standardised, StandardiseSettings, find_frame, in_frame

KIND = "loose"                  # of the ScanSource of one picture
LARGEST = 1.03                  # diameter of a scan's largest section over that of its mean middle one, in 28 scans


def pictures(source: ScanSource) -> list[ScanSource] | None:
    """A folder of loose slices as one source a picture, in the order of their names; None for anything else.

    So it is for one in a zip file, and one whose scan.json is broken: ct.read.read_scan says what is wrong with them.
    """
    scan_json = source.options.get("scan_json")
    if source.kind != "slices" or scan_json is None or source.archive is not None:
        return None
    try:
        if not load_spec(scan_json).loose:
            return None
    except ScanError:
        return None
    return [ScanSource(f"{source.scan_id}-{printable(path.stem)}", KIND, (path,), {"scan_json": scan_json})
            for path in sorted(source.paths, key=natural_key)]


def read_loose(source: ScanSource) -> Scan:
    """One picture as a scan of one slice; its position means nothing. Raises ScanError naming the file."""
    spec = load_spec(source.options["scan_json"])
    hu = read_picture(source.paths[0], spec)[None]
    return Scan(source.scan_id, hu, np.zeros(1), spec.pixel_spacing_mm, spec.saturation_hu, source=KIND)


def standardise_loose(scan: Scan, settings: StandardiseSettings) -> Standardised:
    """A scan of one slice in the canonical frame; below_vertex_mm is NaN.

    Raises ScanError where no head is found, or one that the picture's edge cuts off.
    """
    brain = brain_mask(scan)
    if brain[0].any(0)[[0, -1]].any() or brain[0].any(1)[[0, -1]].any():
        raise ScanError(f"{scan.scan_id}: the brain reaches the edge of the picture; expected a whole head")
    widest = np.sqrt(brain.sum() * np.prod(scan.pixel_spacing_mm) * 4 / np.pi)
    head_mm = max(HEAD_MM, widest / LARGEST)
    frame = replace(find_frame(scan, brain, settings), step=float(head_mm / (settings.head_fraction * settings.size)))
    return replace(in_frame(scan, brain, frame, settings), below_vertex_mm=np.full(1, np.nan))
