"""What is written of a projected scan: maps as NIfTI, overlays, and the tables of all scans."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ct.picture import overlay_panels
from ct.scan import RESULT_MARK
from ct.write import write_nifti
from detect.projection import Projection
from files import write_table

SCORE_COLUMNS = ("scan_id", "score", "percentile", "flagged", "status", "reason", "slices", "projected_slices",
                 "error_hu", "anomalous_ml", "seconds", "notes")
SLICE_COLUMNS = ("scan_id", "slice", "position_mm", "below_vertex_mm", "projected", "score")


def write_maps(folder: Path, projection: Projection) -> list[str]:
    """The maps as NIfTI in the scan's own geometry; returns the writer's notes."""
    maps = {"reconstruction": projection.reconstruction_hu, "residual": projection.residual_hu,
            "anomaly": projection.anomaly, "mask": projection.mask, "brain": projection.brain}
    notes = [write_nifti(folder / f"{name}.nii.gz", volume, projection.scan, description=f"{RESULT_MARK}: {name}")
             for name, volume in maps.items()]
    return [note for note in notes if note]


def write_overlays(folder: Path, projection: Projection) -> list[str]:
    """overlay/NN.png, one for each projected slab, named after the original slice nearest to it."""
    folder = folder / "overlay"
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.png"):
        stale.unlink()
    pre = projection.working
    for slab in np.flatnonzero(pre.kept):
        i = int(np.abs(pre.slabs.position_mm - pre.slabs.scan.position_mm[slab]).argmin())
        picture = overlay_panels(pre.slabs.scan.hu[slab], projection.reconstruction_hu[i], projection.residual_hu[i],
                                 projection.mask[i])
        picture.save(folder / f"{i:02d}.png")
    return []


# What is written into the folder of a scan: of each writer(folder, projection) -> notes for the reader
OUTPUTS = {"maps": write_maps, "overlays": write_overlays}


def scan_row(projection: Projection, seconds: float, notes: list[str]) -> dict:
    """A row of scores.csv; notes beyond those of the projection."""
    p = projection
    return dict(scan_id=p.scan.scan_id, score=p.score, percentile=p.percentile,
                flagged=None if p.flagged is None else int(p.flagged), status="ok", reason=None,
                slices=len(p.scan.hu), projected_slices=int(p.projected.sum()), error_hu=p.error_hu,
                anomalous_ml=p.anomalous_ml, seconds=seconds, notes=" | ".join(dict.fromkeys([*p.notes, *notes])))


def slice_rows(projection: Projection) -> list[dict]:
    """Rows of slices.csv."""
    p = projection
    return [dict(scan_id=p.scan.scan_id, slice=i, position_mm=float(p.scan.position_mm[i]),
                 below_vertex_mm=float(p.below_vertex_mm[i]), projected=int(p.projected[i]),
                 score=float(p.slice_scores[i])) for i in range(len(p.scan.hu))]


def write_tables(out: Path, done: list[dict], failed: list[dict]) -> None:
    """scores.csv, highest score first and failed scans last; slices.csv."""
    ranked = sorted((d["scan"] for d in done), key=lambda row: -row["score"])
    write_table(out / "scores.csv", SCORE_COLUMNS, ranked + sorted(failed, key=lambda row: row["scan_id"]))
    slices = [row for d in sorted(done, key=lambda d: d["scan"]["scan_id"]) for row in d["slices"]]
    write_table(out / "slices.csv", SLICE_COLUMNS, slices)
