"""A results folder of projector.py as one HTML file that opens offline: worklist, pictures, how sure, settings.

    python -m detect.report RESULTS [--out FILE] [--evaluation metrics.json] [--megabytes 40]

RESULTS holds scores.csv, slices.csv, run.json and <scan>/overlay/NN.png. Pictures are packed as WebP up to the limit:
first the key slices of every scan, reduced, then all slices of as many scans as fit, highest score first. The page
says what it lacks. Exit 0 done, 2 unfit input.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.files import read_object, read_table, replace_text, sha256
from ct.picture import PANELS, RESIDUAL_FULL_HU, pack_overlay
from detect.measure import MEASURES
from detect.result import find_result_folder
from detect.scores import SCAN_SCORES, rounded_up
from detect.settings import Settings

KEY_SLICES = 3
MEGABYTES = 40.0
FULL, REDUCED = (360, 75), (256, 60)         # a panel's longer side in pixels, WebP quality
SCAN_COLUMNS = ("scan_id", "score", "percentile", "flagged", "status", "reason", "slices", "projected_slices",
                "error_hu", "anomalous_ml", "notes")
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
    """A row of the worklist, and what its pictures show."""

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
    pictures: list[tuple[int, str]] = dataclasses.field(default_factory=list)     # slice number, WebP in base64
    aspect: float = 1.0                      # width by height of a panel
    label: str = ""                          # what the evaluation's labels say

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def done(self) -> bool:
        """Whether there is anything to look at, as there is of unreliable scans: their reason asks for a look."""
        return self.status != "failed"

    @property
    def complete(self) -> bool:
        return len(self.pictures) == len(self.overlays)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Held-out healthy scans that scores are compared with; empty where the run had none that fits its settings."""

    scores: list[float]                      # one a scan, ascending
    threshold: float | None
    fpr: float | None
    reason: str | None                       # why there is no threshold
    levels: list[tuple[float, float, float]]       # mm below the vertex; 5th and 95th percentile of slice scores there

    def above(self, below_vertex_mm: float) -> float:
        """The 95th percentile of healthy slices at this level; 0 without any."""
        if not self.levels:
            return 0.0
        mm, _, high = zip(*self.levels)
        return float(np.interp(below_vertex_mm, mm, high))


# ---------------------------------------------------------------------------------------------------------------
# Reading

def read_results(results: Path, most: int = MOST_SCANS) -> tuple[list[Entry], dict, Counter]:
    """The first `most` scans of scores.csv in its order; run.json; how many others there are: total, flagged, and by
    status where that is not 'ok'.

    Raises ReportError.
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

    entries = [_entry(path, row) for row in read_table(path, SCAN_COLUMNS, ReportError, keep=is_shown)]
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
    """Names of what is not there, or of another kind."""
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
                 error_hu, anomalous_ml, [note for note in row["notes"].split(" | ") if note])


def _find_overlays(entry: Entry, folder: Path) -> None:
    """Overlays by the slice number in their names (of two digits or more); what has none is noted."""
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


def read_calibration(run: dict) -> Calibration:
    """From run.json's `calibration`: the model's own, or null where the run's settings differ from it. One that lacks
    the run's scan score is none.

    A `threshold` that was given for the run stands in place of the model's, and then there is no rate for it.
    """
    found, given = run.get("calibration"), run.get("threshold")
    how = run["settings"].get("scan_score")
    if not found or how not in found["scan_scores"]:
        return Calibration([], given, None, None, [])
    level = np.round([s["below_vertex_mm"] / LEVEL_MM for s in found["slice_scores"]])
    scores = np.array([s["score"] for s in found["slice_scores"]])
    levels = [(float(mm * LEVEL_MM), *map(float, np.quantile(scores[level == mm], (0.05, 0.95))))
              for mm in np.unique(level)]
    threshold = found["threshold"]
    if given is not None:
        threshold = {how: given, "fpr": None, "reason": None}
    return Calibration(sorted(found["scan_scores"][how]), threshold[how], threshold["fpr"],
                       threshold["reason"], levels)


# ---------------------------------------------------------------------------------------------------------------
# Pictures

def choose_key_slices(entry: Entry, calibration: Calibration) -> None:
    """The slices with a picture that rise highest above healthy ones at their level (or score highest, without)."""
    pictured = [s for s in entry.slices if s.number in entry.overlays]
    entry.key = sorted(pictured, key=lambda s: calibration.above(s.below_vertex_mm) - s.score)[:KEY_SLICES]


def _pack_scan(entry: Entry, numbers: list[int], size: tuple[int, int], pool: ThreadPoolExecutor) -> list:
    """Pictures of these slices, inferior to superior; one that cannot be read is noted and forgotten."""
    def attempt(number: int):
        try:
            return pack_overlay(entry.overlays[number], *size)
        except OSError as error:
            return error

    pictures = []
    for number, result in zip(sorted(numbers), pool.map(attempt, sorted(numbers))):
        if isinstance(result, OSError):
            entry.notes.append(f"overlay/{entry.overlays.pop(number).name} cannot be read as a picture")
        else:
            pictures.append((number, result[0]))
            entry.aspect = result[1]
    return pictures


def add_pictures(entries: list[Entry], calibration: Calibration, room: int) -> None:
    """Give scans their pictures, highest score first, within `room` bytes.

    Half the room goes to all slices of the first scans, the rest to key slices of every further one; what is then left
    makes more scans complete.
    """
    def size(pictures) -> int:
        return sum(len(data) + 16 for _, data in pictures)

    def fill(entries: list[Entry], of: Callable, packing: tuple[int, int], room: int) -> int:
        """Stops at the first scan that does not fit; returns the room that is left."""
        for entry in entries:
            pictures = _pack_scan(entry, of(entry), packing, pool)
            left = room + size(entry.pictures) - size(pictures)
            if left < 0:
                break
            entry.pictures, room = pictures, left
        return room

    for entry in entries:
        choose_key_slices(entry, calibration)
    with ThreadPoolExecutor() as pool:
        room = room - room // 2 + fill(entries, lambda e: [*e.overlays], FULL, room // 2)
        lacking = [e for e in entries if not e.complete]
        room = fill(lacking, lambda e: [s.number for s in e.key if s.number in e.overlays], REDUCED, room)
        fill(lacking, lambda e: [*e.overlays], FULL, room)
    for entry in entries:
        entry.key = [s for s in entry.key if s.number in entry.overlays]


# ---------------------------------------------------------------------------------------------------------------
# What is said

def digits(value: float | None) -> str:
    """Three significant digits; a dash for None."""
    return "–" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def level_of(below_vertex_mm: float) -> str:
    """Of a slice, in words: the highest ones lie above the top of the brain."""
    mm = round(below_vertex_mm)
    return f"{abs(mm)} mm {'above' if mm < 0 else 'below'} the top"


def counted(n: int, what: str) -> str:
    return f"{n} {what}" + "s" * (n != 1)


def healthy_below(entry: Entry, calibration: Calibration) -> str:
    """'4 of 5' healthy scans score lower; empty where that is not known."""
    n = len(calibration.scores)
    return f"{round(entry.percentile * (n + 1) / 100)} of {n}" if n and entry.percentile is not None else ""


def found(entries: list[Entry], calibration: Calibration) -> list[str]:
    """Sentences, the most telling first."""
    done, n = [e for e in entries if e.ok], len(calibration.scores)
    flags = [e.flagged for e in done if e.flagged is not None]
    above = sum(healthy_below(e, calibration) == f"{n} of {n}" for e in done)
    sentences = []
    if flags:
        sentences.append(f"{sum(flags) or 'None'} of {counted(len(flags), 'scan')} flagged: the score is above the "
                         "threshold.")
    elif n and len(done) > 1:
        sentences.append(f"{above or 'None'} of {len(done)} scans scored above all {n} healthy scans.")
    if done:
        beats = healthy_below(done[0], calibration)
        sentences.append(f"{'Highest: ' if len(done) > 1 else ''}{done[0].scan_id}, score {digits(done[0].score)}"
                         f"{f', above {beats} healthy scans' if beats else ''}.")
    sentences.append(f"{counted(len(done), 'scan')} compared, slice by slice, with the closest normal head CT that the "
                     "model can draw.")
    for status, what, where in (("unreliable", "not to be trusted", "apart, below the others"),
                                ("failed", "failed", "last in the list")):
        if count := sum(e.status == status for e in entries):
            sentences.append(f"{counted(count, 'scan')} {what}: {'it stands' if count == 1 else 'they stand'} {where}.")
    return sentences


def unshown(entries: list[Entry], others: Counter) -> list[str]:
    """A sentence about the scans that are only in scores.csv."""
    if not others["total"]:
        return []
    return [f"This page shows the {len(entries)} scans with the highest scores of {len(entries) + others['total']}; of "
            f"the others {others['flagged'] or 'none'} are flagged, {others['unreliable'] or 'none'} unreliable and "
            f"{others['failed'] or 'none'} failed. scores.csv lists all of them."]


def where(entries: list[Entry], calibration: Calibration) -> list[str]:
    """Sentences, the most telling first."""
    first = next((e for e in entries if e.key), None)
    sentences = []
    if first:
        key = first.key[0]
        sentences.append(f"{first.scan_id}: slice {key.number}, {level_of(key.below_vertex_mm)}.")
    by = "rises highest above healthy slices at its level" if calibration.levels else "scores highest"
    return [*sentences, f"Each scan opens at the slice that {by}. Red outlines mark what differs from normal."]


def sure(entries: list[Entry], calibration: Calibration, evaluation: dict | None) -> list[str]:
    """Sentences, the most telling first."""
    n = len(calibration.scores)
    sentences = []
    if evaluation is not None:
        scan = evaluation["scan"]
        if isinstance(scan["auc"], str):
            sentences.append(f"AUC against the labels: {scan['auc']}.")
        else:
            interval, level = scan["auc_delong"], evaluation["settings"]["level"]
            said = interval if isinstance(interval, str) else f"{interval[0]:.2f} to {interval[1]:.2f}"
            sentences += [f"AUC against the labels: {scan['auc']:.2f}.",
                          f"{100 * level:g}% interval {said}, from {scan['abnormal']} abnormal "
                          f"and {scan['normal']} normal scans."]
    if n:
        sentences.append(f"Scores are compared with {counted(n, 'healthy scan')}: none can be called rarer than one in "
                         f"{n + 1}.")
        if calibration.threshold is None:
            sentences.append("That is too few for a threshold, so no scan is flagged or cleared.")
        elif calibration.fpr is None:
            passing = sum(score > calibration.threshold for score in calibration.scores)
            sentences.append(f"The threshold was given for this run; {passing} of these healthy scans pass it.")
        else:
            sentences.append(f"A healthy scan passes the threshold with a chance of at most "
                             f"{100 * rounded_up(calibration.fpr):.3g}%.")
    elif any(e.percentile is not None for e in entries):
        sentences.append("Percentiles are among the model's healthy scans; this run does not tell how many there are.")
    else:
        sentences.append("No percentiles: the model has no healthy scans scored with these settings. Only the order "
                         "of the scans means something.")
    if evaluation is None:
        sentences.append("Without labels it is not known how well these scores tell ill from healthy.")
    return sentences


def coverage(entries: list[Entry], megabytes: float) -> str:
    """Which pictures the page holds; nothing is left out without a word."""
    pictured = [e for e in entries if e.overlays]
    complete = sum(e.complete for e in pictured)
    if complete == len(pictured):
        return ""
    key = sum(bool(e.pictures) for e in pictured) - complete
    parts = [f"all slices of the {counted(complete, 'scan')} with the highest scores"] if complete else []
    parts += [f"the key slices of {counted(key, 'further scan' if complete else 'scan')}, reduced"] if key else []
    if complete + key < len(pictured):
        parts.append(f"none of the other {counted(len(pictured) - complete - key, 'scan')}")
    return (f"To stay within {megabytes:g} MB this page holds {'; '.join(parts)}. All pictures are in the results "
            "folder, <scan>/overlay.")


def attach_labels(entries: list[Entry], evaluation: dict, scores_sha256: str) -> None:
    """Labels of an evaluation beside the scans. Raises ReportError if it was made from other scores."""
    if absent := _absent(evaluation, EVALUATION_KEYS):
        raise ReportError(f"the evaluation has no {absent}; expected metrics.json of evaluate.py of this version: run "
                          "it again")
    if evaluation["scores_sha256"] != scores_sha256:
        raise ReportError("the evaluation was made from another scores.csv; run evaluate.py again with this one")
    for entry in entries:
        found = evaluation["labels"].get(entry.scan_id)
        if found:
            entry.label = "normal" if found["label"] == 0 else ", ".join(found["types"]) or "abnormal"


# ---------------------------------------------------------------------------------------------------------------
# The page

def facts(run: dict, hashes: dict[str, str]) -> list[tuple[str, str]]:
    """What the foot of the page lists: names and values."""
    rows = [("model", (run.get("model") or {}).get("name") or "unnamed"), ("weights, SHA-256", run["weights_sha256"])]
    rows += [(f"{name}, SHA-256", value) for name, value in hashes.items()]
    rows += [(name, str(run[name])) for name in ("device", "precision", "threads", "processes")]
    rows += [("seconds", f"{run['seconds']:.0f}")]
    rows += [(f"seconds per scan, {stage}", f"{value:.1f}")
             for stage, value in run["seconds_per_scan_by_stage"].items()]
    return rows + [(f"version of {name}", str(value)) for name, value in run["versions"].items()]


def _pretty(value) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _slices_json(entry: Entry) -> list:
    return [[s.number, round(s.below_vertex_mm, 1), float(f"{s.score:.3g}"), int(s.projected)] for s in entry.slices]


def write_report(results: Path, out: Path, evaluation: dict | None = None, megabytes: float = MEGABYTES) -> Path:
    """Write the page for a finished results folder of projector.py; returns `out`.

    evaluation: evaluate.py's metrics.json of these results; labels, ROC and figures are then shown. megabytes: of the
    whole page; pictures of lower scores give way first, the text never. Raises ReportError, OSError.
    """
    entries, run, others = read_results(results)
    try:
        chosen, calibration = Settings.from_json(run["settings"]), read_calibration(run)
    except (AttributeError, KeyError, TypeError, ValueError) as error:          # as changed by hand
        raise ReportError(f"{results / 'run.json'}: settings or calibration are not as projector.py writes them "
                          f"({error}); run it again") from error
    measure = MEASURES[chosen.measure](chosen.scoring, chosen.mask)
    hashes = {name: sha256(results / name) for name in ("scores.csv", "slices.csv")}
    if evaluation is not None:
        attach_labels(entries, evaluation, hashes["scores.csv"])
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"digits": digits, "slices": _slices_json, "pretty": _pretty,
                            "below": lambda entry: healthy_below(entry, calibration)}
    template = environment.get_template("report.html.jinja")
    end = max([*(e.score for e in entries if e.ok), *calibration.scores, calibration.threshold or 0, 1e-9])
    common = set.intersection(*(set(e.notes) for e in entries if e.ok)) if sum(e.ok for e in entries) > 1 else set()

    def render() -> str:
        return template.render(
            entries=entries, run=run, calibration=calibration, evaluation=evaluation, common=common, end=end,
            found=unshown(entries, others) + found(entries, calibration), where=where(entries, calibration),
            sure=sure(entries, calibration, evaluation), coverage=coverage(entries, megabytes),
            facts=facts(run, hashes), panels=PANELS, full_hu=RESIDUAL_FULL_HU,
            settings={k: v for k, v in run.items() if k != "calibration"},
            score_words=f"{measure.words}, {SCAN_SCORES[chosen.scan_score].words}",
            criterion=measure.criterion(), marked=measure.marked,
            read=getattr(chosen.scoring, "read", 0) if (run["model"] or {}).get("reader") else 0)

    # 2 kB for what is yet to be said about pictures that did not fit or could not be read.
    add_pictures(entries, calibration, int(megabytes * 1e6) - len(render().encode()) - 2000)
    replace_text(out, render())
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m detect.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results folder of projector.py")
    parser.add_argument("--out", type=Path, help="the page (default: RESULTS/report.html)")
    parser.add_argument("--evaluation", type=Path, help="metrics.json of evaluate.py for these results")
    parser.add_argument("--megabytes", type=float, default=MEGABYTES, help="limit of the page (default %(default)g)")
    args = parser.parse_args(argv)
    if not 0 < args.megabytes < math.inf:
        parser.error(f"--megabytes must be above 0, got {args.megabytes:g}")
    try:
        evaluation = read_json(args.evaluation) if args.evaluation else None
        page = write_report(args.results, args.out or args.results / "report.html", evaluation, args.megabytes)
    except (OSError, ReportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
