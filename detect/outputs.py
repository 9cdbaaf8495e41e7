"""What is written of a projected scan: maps as NIfTI, overlays, and the tables of all scans."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ct.frame import Preprocessed
from ct.picture import overlay_panels
from ct.scan import RESULT_MARK
from ct.write import write_nifti
from detect.search import FrameProjection

SCORE_COLUMNS = ("scan_id", "score", "percentile", "flagged", "status", "reason", "slices", "projected_slices",
                 "error_hu", "anomalous_ml", "seconds", "notes")
SLICE_COLUMNS = ("scan_id", "slice", "position_mm", "below_vertex_mm", "projected", "score")


@dataclass(frozen=True)
class Projection:
    """A projected scan in its own geometry: maps [S, H, W] of the original slices, inferior to superior.

    reconstruction, residual in HU; anomaly as measured (search.FrameProjection); mask bool; slice_scores [S] (0
    where not projected); projected bool [S]
    """

    reconstruction: np.ndarray
    residual: np.ndarray
    anomaly: np.ndarray
    mask: np.ndarray
    brain: np.ndarray
    slice_scores: np.ndarray
    below_vertex_mm: np.ndarray
    projected: np.ndarray
    scan_score: float


def to_native(pre: Preprocessed, result: FrameProjection, how: str) -> Projection:
    """Bring the maps of the kept slices back to the scan: frame to pixels, slabs to slices."""
    back = pre.maps_to_scan
    return Projection(
        reconstruction=back(result.reconstruction.numpy(), float(pre.standardised.hu.min())),
        residual=back(result.residual.numpy()), anomaly=back(result.anomaly.numpy()),
        mask=back(result.lesion.numpy()), brain=pre.slabs.from_slabs(pre.brain),
        slice_scores=pre.scores_to_scan(result.slice_scores.numpy()),
        below_vertex_mm=pre.values_to_scan(pre.standardised.below_vertex_mm), projected=pre.values_to_scan(pre.kept),
        scan_score=result.scan_score(how))


def volume_ml(mask: np.ndarray, scan) -> float | None:
    """Volume of a mask [S, H, W] in millilitres; None where the source does not tell its pixel spacing."""
    if scan.pixel_spacing_mm is None:
        return None
    thickness = np.gradient(scan.position_mm) if len(scan.position_mm) > 1 else np.array([scan.slice_spacing_mm])
    return float((mask.sum((1, 2)) * thickness).sum() * np.prod(scan.pixel_spacing_mm) / 1000)


def write_maps(folder: Path, scan, native: Projection) -> list[str]:
    """The maps as NIfTI in the scan's own geometry; returns the writer's notes."""
    maps = {"reconstruction": native.reconstruction, "residual": native.residual, "anomaly": native.anomaly,
            "mask": native.mask, "brain": native.brain}
    notes = [write_nifti(folder / f"{name}.nii.gz", volume, scan, description=f"{RESULT_MARK}: {name}")
             for name, volume in maps.items()]
    return [note for note in notes if note]


def write_overlays(folder: Path, pre: Preprocessed, native: Projection) -> None:
    """One PNG for each projected slab, named after the original slice nearest to it."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.png"):
        stale.unlink()
    originals = pre.slabs.position_mm
    for slab in np.flatnonzero(pre.kept):
        i = int(np.abs(originals - pre.slabs.scan.position_mm[slab]).argmin())
        picture = overlay_panels(pre.slabs.scan.hu[slab], native.reconstruction[i], native.residual[i], native.mask[i])
        picture.save(folder / f"{i:02d}.png")


def write_table(path: Path, columns: tuple[str, ...], rows: list[dict]) -> None:
    """CSV, replaced in one move so that a reader never sees half a table."""
    writing = path.with_suffix(".writing")
    with open(writing, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows({k: _cell(row.get(k)) for k in columns} for row in rows)
    writing.replace(path)


def replace_text(path: Path, text: str) -> None:
    """The whole text or, where the program is stopped, none of it."""
    writing = path.with_suffix(".writing")
    writing.write_text(text, encoding="utf-8")
    writing.replace(path)


def write_tables(out: Path, done: list[dict], failed: list[dict]) -> None:
    """scores.csv, highest score first and failed scans last; slices.csv."""
    ranked = sorted((d["scan"] for d in done), key=lambda row: -row["score"])
    write_table(out / "scores.csv", SCORE_COLUMNS, ranked + sorted(failed, key=lambda row: row["scan_id"]))
    slices = [row for d in sorted(done, key=lambda d: d["scan"]["scan_id"]) for row in d["slices"]]
    write_table(out / "slices.csv", SLICE_COLUMNS, slices)


def _cell(value):
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value
