"""What is written of a projected scan: maps as NIfTI, overlays, and its rows of the tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ct.picture import overlay_panels, save_png
from ct.scan import RESULT_MARK
from ct.write import write_nifti
from detect.projection import Projection

SCORE_COLUMNS = ("scan_id", "score", "percentile", "flagged", "status", "reason", "slices", "projected_slices",
                 "error_hu", "anomalous_ml", "notes")
# The unit of the whole numbers in a map's file: 0.1 HU, far below a scanner's noise; a surprise of 0.01
STEPS = {"reconstruction": 0.1, "residual": 0.1, "anomaly": 0.01}
# What lies in a scan's folder of results
WRITTEN = {"result.json", "overlay", "dicom", *(f"{name}.nii.gz" for name in (*STEPS, "mask", "brain"))}
# The outputs that are DICOM objects, written of scans read from DICOM: as they are, and without patient data
DICOM, DICOM_NO_PHI = "dicom", "dicom without patient"
DICOM_ONLY = frozenset({DICOM, DICOM_NO_PHI})
BETWEEN_NOTES = " | "   # of a row
WRITERS = 4             # threads that write a scan's files: packing leaves the interpreter's lock
SLICE_COLUMNS = ("scan_id", "slice", "position_mm", "below_vertex_mm", "projected", "score")


def write_maps(folder: Path, projection: Projection) -> list[str]:
    """The maps as NIfTI in the scan's own geometry, in whole STEPS; returns the writer's notes."""
    maps = {"reconstruction": projection.reconstruction_hu, "residual": projection.residual_hu,
            "anomaly": projection.anomaly, "mask": projection.mask, "brain": projection.brain}

    def write(name: str) -> str | None:
        return write_nifti(folder / f"{name}.nii.gz", maps[name], projection.scan, step=STEPS.get(name),
                           description=f"{RESULT_MARK}: {name}")

    with ThreadPoolExecutor(WRITERS) as pool:
        notes = list(pool.map(write, maps))
    return [note for note in notes if note]


def write_overlays(folder: Path, projection: Projection) -> list[str]:
    """overlay/NN.png for each projected slab, named after the original slice nearest to it.

    Of two slabs nearest to one slice, as with uneven spacing, the upper is drawn.
    """
    folder = folder / "overlay"
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.png"):
        stale.unlink()
    pre = projection.working
    nearest = {int(np.abs(pre.slabs.position_mm - pre.slabs.scan.position_mm[slab]).argmin()): slab
               for slab in np.flatnonzero(pre.kept)}

    def write(i: int, slab: int) -> None:
        picture = overlay_panels(pre.slabs.scan.hu[slab], projection.reconstruction_hu[i], projection.residual_hu[i],
                                 projection.mask[i], pixel_spacing_mm=pre.slabs.scan.pixel_spacing_mm)
        save_png(folder / f"{i:02d}.png", np.asarray(picture))

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write, nearest.keys(), nearest.values()))
    return []


# Each writes into a scan's folder of results: writer(folder, projection) -> notes for the reader
Writer = Callable[[Path, Projection], list[str]]
OUTPUTS: dict[str, Writer] = {"maps": write_maps, "overlays": write_overlays}


def join_notes(notes: Iterable[str]) -> str:
    """A row's notes, each once."""
    return BETWEEN_NOTES.join(dict.fromkeys(notes))


def split_notes(notes: str) -> list[str]:
    """The inverse of join_notes; [] of ''."""
    return notes.split(BETWEEN_NOTES) if notes else []


def scan_row(projection: Projection, seconds: float, notes: list[str]) -> dict:
    """A row of scores.csv; notes: further ones than the projection's."""
    p = projection
    return dict(scan_id=p.scan.scan_id, score=p.score, percentile=p.percentile,
                flagged=None if p.flagged is None else int(p.flagged), status="unreliable" if p.unreliable else "ok",
                reason=p.unreliable, slices=len(p.scan.hu), projected_slices=int(p.projected.sum()),
                error_hu=p.error_hu, anomalous_ml=p.anomalous_ml, seconds=seconds,
                notes=join_notes([*p.notes, *notes]))


def slice_rows(projection: Projection) -> list[dict]:
    """Rows of slices.csv."""
    p = projection
    return [dict(scan_id=p.scan.scan_id, slice=i, position_mm=float(p.scan.position_mm[i]),
                 below_vertex_mm=float(p.below_vertex_mm[i]), projected=int(p.projected[i]),
                 score=float(p.slice_scores[i])) for i in range(len(p.scan.hu))]
