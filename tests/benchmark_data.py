"""What the tests of the benchmarks on real scans need: synthetic heads, a database, a stand-in for the projector."""

from __future__ import annotations

import csv
import json
import zlib
from pathlib import Path

import numpy as np

from benchmarks import baselines, compare
from ct.frame import PreprocessSettings, preprocess_scan
from ct.read import find_scans, read_scan
from ct.standardise import StandardiseSettings
from ct.write import write_nifti
from dataset import ScanRecord, SliceDataset, SliceWriter
from detect.bundle import files_of_method
from detect.pca import PcaFit
from detect.settings import Settings
from tests.helpers import synthetic_scan
from tests.writers import write_dicom_series, write_slice_folder

SETTINGS = PreprocessSettings(StandardiseSettings(size=32, hu_clip=(-20.0, 100.0)), min_brain_fraction=0.01)
OURS = Settings("search", measure="surprise")                     # of the stand-in's model
FAILS = "broken"                # a scan of this name cannot be projected by the stand-in
MM = (10.0, 3.6, 3.6)


def head(seed: int, ill: bool):
    """A scan of 14 slices, 64 x 64, and the truth, bool: a dense ball on the patient's left, or nothing."""
    kwargs = dict(slices=14, size=64, spacing_mm=MM, seed=seed)
    healthy, brain = synthetic_scan(**kwargs)
    if not ill:
        return healthy, np.zeros(brain.shape, bool)
    scan, _ = synthetic_scan(**kwargs, lesion=(5, 10, 25, 22, 75))
    return scan, np.abs(scan.hu - healthy.hu) > 20


def write_otherwise(scans: Path) -> dict[str, np.ndarray]:
    """Two ill scans whose maps lie otherwise than their slices; by scan the truth of the slices, bool.

    The ball's middle is 4 slices above the lowest of 12. 'gap' lacks the second, and is resampled to 12 again;
    'reversed' came with its vertex first, and its maps lie so.
    """
    (gap, of_gap), (reversed_, of_reversed) = ((scan.hu[2:], truth[2:]) for scan, truth in (head(8, True),
                                                                                            head(9, True)))
    left = np.delete(np.arange(12), 1)
    write_dicom_series(scans / "gap", gap[left], MM, position_mm=MM[0] * left)
    write_slice_folder(scans / "reversed", reversed_[::-1], slice_spacing_mm=MM[0], pixel_spacing_mm=MM[1])
    return {"gap": of_gap[left], "reversed": of_reversed}


def write_rows(path: Path, rows: list[dict]) -> None:
    """A table of these rows, whose columns are those of the first."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


_PREPARED: dict = {}


def prepared(scan, settings: PreprocessSettings):
    """preprocess_scan, once a scan: most of these tests' time."""
    key = zlib.crc32(scan.hu.tobytes()), scan.pixel_spacing_mm, settings
    if key not in _PREPARED:
        _PREPARED[key] = preprocess_scan(scan, settings)
    return _PREPARED[key]


def write_database(path: Path) -> Path:
    """Two healthy heads to train on and three held out."""
    with SliceWriter(path, SETTINGS.to_json()) as writer:
        for seed, split in enumerate(("train", "train", "val", "val", "val")):
            pre = prepared(head(900 + seed, False)[0], SETTINGS)
            hu, brain, mm = baselines.kept_slices(pre)
            writer.add(ScanRecord.encode(f"h{seed}", hu.numpy(), brain.numpy(), mm, np.flatnonzero(pre.kept)), split,
                       f"h{seed}")
    return path


def write_fits(folder: Path, database: Path) -> Path:
    """A small PCA and HU thresholds, fitted."""
    folder.mkdir()
    for kind, baseline in (("pca", baselines.PositionPca(PcaFit(components=2, step_mm=20.0))),
                           ("hu", baselines.HuThresholds())):
        baseline.fit(SliceDataset(database, "train"))
        baseline.save(folder / f"{kind}.safetensors")
    return folder


def bundle_meta(database: Path):
    """A stand-in for read_bundle_meta: project()'s model, of a search, trained on this database."""
    meta = {"provenance": {"data": SliceDataset(database).facts()}, "settings": OURS.to_json(),
            "preprocessing": SETTINGS.to_json(), "files": dict.fromkeys(files_of_method(OURS))}
    return lambda folder: (meta, "0")


def project(scans: Path, model: Path, out: Path, device: str, flags=(), name: str = "") -> dict:
    """What projector.py writes, with HU thresholds in its place."""
    ours, rows, slices = baselines.HuThresholds(), [], []
    out.mkdir(parents=True, exist_ok=True)
    for source in find_scans(scans):
        if source.scan_id == FAILS:
            rows.append({"scan_id": source.scan_id, "status": "failed", "reason": "no head"})
            continue
        scan = read_scan(source)
        pre = prepared(scan, SETTINGS)
        scored = baselines.score_scan(ours, pre)
        for kind, volume in (("anomaly", scored.anomaly), ("brain", pre.slabs.from_slabs(pre.brain))):
            (out / source.scan_id).mkdir(exist_ok=True)
            write_nifti(out / source.scan_id / f"{kind}.nii.gz", volume, scan)
        rows.append({"scan_id": source.scan_id, "score": scored.scan_score("mean"), "status": "ok"})
        slices += [{"scan_id": source.scan_id, "slice": i, "score": s, "projected": 1}
                   for i, s in enumerate(scored.slice_scores)]
    timed = [{"scan_id": row["scan_id"], "seconds": 3} for row in rows if row["status"] == "ok"]
    for table, found in (("scores", rows), ("slices", slices), ("seconds", timed)):
        with open(out / f"{table}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["scan_id", "slice", "score", "projected", "status", "reason", "seconds"])
            writer.writeheader()
            writer.writerows(found)
    run = {"weights_sha256": "0", "model": {}, "versions": {}, "device": "cpu", "threads": 1,
           "settings": OURS.to_json(), "preprocessing": SETTINGS.to_json()}
    return json.loads(json.dumps(run))


def stand_in(monkeypatch, database: Path) -> None:
    """project() in the projector's place, and a model that was trained on the database."""
    monkeypatch.setattr(compare, "project", project)
    monkeypatch.setattr(compare, "read_bundle_meta", bundle_meta(database))
    monkeypatch.setattr(compare, "preprocess_scan", prepared)
