"""The data of a page: scans of a folder of results, their run, and the healthy scans they are compared with."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path

import numpy as np

from common.files import read_object, read_table
from detect.calibration import healthy_scores, healthy_slices, threshold_of
from detect.outputs import SCORE_COLUMNS, split_notes
from detect.result import find_result_folder

RUN_KEYS = {"weights_sha256": str, "model": dict | None, "settings": dict, "device": str, "precision": str,
            "threads": int, "processes": int, "seconds": int | float, "seconds_per_scan_by_stage": dict,
            "versions": dict}
EVALUATION_KEYS = {"scan": dict, "labels": dict, "scores_sha256": str, "table": dict, "settings": dict,
                   "versions": dict}
SLICE_COLUMNS = ("scan_id", "slice", "below_vertex_mm", "projected", "score")
MOST_SCANS = 500                             # on a page; scores.csv has all
LEVEL_MM = 10.0                              # healthy slices this far apart are taken as one level


class ReportError(ValueError):
    """A results folder or an evaluation that does not fit; the message names the file and the mend."""


@dataclasses.dataclass
class Slice:
    number: int                              # from 0, inferior to superior
    below_vertex_mm: float
    projected: bool
    score: float


@dataclasses.dataclass
class Entry:
    """A row of the worklist, with its slices and pictures."""

    scan_id: str
    status: str                              # 'ok', 'unreliable' (a score not to be trusted) or 'failed'
    reason: str
    score: float | None
    percentile: float | None
    flagged: bool | None
    count: int | None                        # slices
    projected: int | None
    error_hu: float | None
    anomalous_ml: float | None
    notes: list[str]
    slices: list[Slice] = dataclasses.field(default_factory=list)
    overlays: dict[int, Path] = dataclasses.field(default_factory=dict)    # by slice number
    key: list[Slice] = dataclasses.field(default_factory=list)             # what stands out most, first
    pictures: list[tuple[int, str]] = dataclasses.field(default_factory=list)     # slice number, JPEG in base64
    aspect: float = 1.0                      # width by height of a panel
    label: str = ""                          # from an evaluation: 'normal', its types, or 'abnormal'

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def done(self) -> bool:
        """Whether there are slices to look at: also of unreliable scans, whose reason asks for a look."""
        return self.status != "failed"

    @property
    def complete(self) -> bool:
        return len(self.pictures) == len(self.overlays)


@dataclasses.dataclass(frozen=True)
class HealthyScores:
    """Held-out healthy scans that scores are compared with; empty where the run had no calibration for its settings."""

    scores: list[float]                      # one per scan, ascending
    threshold: float | None
    fpr: float | None
    reason: str | None                       # why there is no threshold
    levels: list[tuple[float, float, float]]       # mm below the vertex; 5th and 95th percentile of slice scores there

    def compares(self, entry: Entry) -> bool:
        """Whether the scan's score was held against these scans: it has a percentile, or a flag by their threshold."""
        by_threshold = entry.flagged is not None and self.fpr is not None
        return bool(self.scores) and (entry.percentile is not None or by_threshold)

    def above(self, below_vertex_mm: float) -> float:
        """The 95th percentile of healthy slices at this level; 0 without any."""
        if not self.levels:
            return 0.0
        mm, _, high = zip(*self.levels)
        return float(np.interp(below_vertex_mm, mm, high))


def read_results(results: Path, most: int = MOST_SCANS) -> tuple[list[Entry], dict, Counter]:
    """The first `most` scans of scores.csv in its order; run.json; counts of the others. Raises ReportError.

    The counts are 'total', 'flagged', and by status where that is not 'ok'.
    """
    path, ids, others = results / "scores.csv", set(), Counter()

    def is_shown(row: dict[str, str]) -> bool:
        if row["status"] not in ("ok", "unreliable", "failed"):
            raise ReportError(f"{path}: {row['scan_id']} has status {row['status']!r}; expected 'ok', 'unreliable' or "
                              "'failed'; run projector.py again")
        ids.add(row["scan_id"])
        if len(ids) > most:
            others.update(total=1, flagged=row["flagged"] == "1")
            if row["status"] != "ok":
                others[row["status"]] += 1
        return len(ids) <= most

    entries = [_entry(path, row) for row in read_table(path, SCORE_COLUMNS, ReportError, keep=is_shown)]
    if not entries:
        raise ReportError(f"{results / 'scores.csv'}: holds no scan; run projector.py first")
    by_id = {entry.scan_id: entry for entry in entries}
    path = results / "slices.csv"
    for row in read_table(path, SLICE_COLUMNS, ReportError,
                          keep=lambda row: row["scan_id"] in by_id or row["scan_id"] not in ids):
        if row["scan_id"] not in ids:
            raise ReportError(f"{path}: {row['scan_id']} is not in scores.csv; run projector.py again")
        number, mm, score = (_number(path, row, column) for column in ("slice", "below_vertex_mm", "score"))
        if None in (number, mm, score):
            raise ReportError(f"{path}: {row['scan_id']} has a slice without number, position or score; run "
                              "projector.py again")
        by_id[row["scan_id"]].slices.append(Slice(int(number), mm, row["projected"] == "1", score))
    for entry in (e for e in entries if e.done):
        try:
            _find_overlays(entry, find_result_folder(results, entry.scan_id) / "overlay")
        except ValueError as error:
            raise ReportError(f"{results / 'scores.csv'}: {error}") from error
    run = read_json(results / "run.json")
    if absent := _absent(run, RUN_KEYS):
        raise ReportError(f"{results / 'run.json'}: has no {absent}; run projector.py again")
    return entries, run, others


def _absent(content: dict, kinds: dict[str, type]) -> str:
    """Names of members that are absent or of another type."""
    return ", ".join(name for name, kind in kinds.items() if not isinstance(content.get(name, ...), kind))


def _number(path: Path, row: dict[str, str], column: str) -> float | None:
    """None where the cell is empty."""
    try:
        value = float(row[column]) if row[column] else None
    except ValueError:
        value = math.nan
    if value is not None and not math.isfinite(value):
        raise ReportError(f"{path}: {row['scan_id']}: {column} must be a number, found {row[column]!r}")
    return value


def _entry(path: Path, row: dict[str, str]) -> Entry:
    score, percentile, flagged, count, projected, error_hu, anomalous_ml = (_number(path, row, column) for column in (
        "score", "percentile", "flagged", "slices", "projected_slices", "error_hu", "anomalous_ml"))
    if row["status"] == "ok" and score is None:
        raise ReportError(f"{path}: {row['scan_id']} has status 'ok' and no score; run projector.py again")
    return Entry(row["scan_id"], row["status"], row["reason"], score, percentile,
                 None if flagged is None else bool(flagged), count and int(count), projected and int(projected),
                 error_hu, anomalous_ml, split_notes(row["notes"]))


def _find_overlays(entry: Entry, folder: Path) -> None:
    """Find overlays by the slice number in their names (of two digits or more); others are noted."""
    known = {s.number for s in entry.slices}
    for path in sorted(folder.glob("*.png")):
        if path.stem.isdecimal() and int(path.stem) in known:
            entry.overlays[int(path.stem)] = path
        else:
            entry.notes.append(f"overlay/{path.name} is left out: slices.csv has no such slice")
    if not entry.overlays:
        entry.notes.append("no pictures: its overlay folder is empty or missing")


def read_json(path: Path) -> dict:
    """Raises ReportError."""
    try:
        return read_object(path, ReportError)
    except FileNotFoundError as error:
        raise ReportError(f"{path}: no such file") from error


def read_calibration(run: dict) -> HealthyScores:
    """From run.json's `calibration`, null where the run's settings are others; empty if it lacks the run's scan score.

    A `threshold` given for the run replaces the model's, and has no false-positive rate.
    """
    found, given = run.get("calibration"), run.get("threshold")
    how = run["settings"].get("scan_score")
    if not found or how not in healthy_scores(found):
        return HealthyScores([], given, None, None, [])
    below_vertex_mm, scores = healthy_slices(found)
    level = np.round(below_vertex_mm / LEVEL_MM)
    levels = [(float(mm * LEVEL_MM), *map(float, np.quantile(scores[level == mm], (0.05, 0.95))))
              for mm in np.unique(level)]
    healthy, own = sorted(healthy_scores(found)[how]), threshold_of(found, how)
    if given is not None:
        return HealthyScores(healthy, given, None, None, levels)
    return HealthyScores(healthy, own.value, own.fpr, own.reason, levels)


def attach_labels(entries: list[Entry], evaluation: dict, scores_sha256: str) -> None:
    """Set the scans' labels from an evaluation. Raises ReportError if it was made from other scores."""
    if absent := _absent(evaluation, EVALUATION_KEYS):
        raise ReportError(f"the evaluation has no {absent}; expected metrics.json of evaluate.py of this version: run "
                          "it again")
    if evaluation["scores_sha256"] != scores_sha256:
        raise ReportError("the evaluation was made from another scores.csv; run evaluate.py again with this one")
    for entry in entries:
        found = evaluation["labels"].get(entry.scan_id)
        if found:
            entry.label = "normal" if found["label"] == 0 else ", ".join(found["types"]) or "abnormal"
