"""Scores and labels to figures with intervals, and the worklist simulation.

    python evaluate.py results/scores.csv labels.csv --out results/metrics
    python evaluate.py triage results/scores.csv labels.csv --out results/triage

labels.csv has the columns scan_id, label (0 or 1) and, if there are any, types (separated by '|') and patient
(scans of one patient then count as one cluster). Writes metrics.json, metrics.md, roc.png and pr.png
(triage.json and triage.md), and with --report projector.py's report anew, with labels and ROC. A figure that the
data do not define reads 'undefined: <why>'. A threshold comes from other data or there is none. No scan is left
out silently: see --missing. Exit 0 done, 2 wrong usage or unfit input.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

import matplotlib
import numpy as np
import scipy
import sklearn
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve

import metrics
import triage
from cohort import (
    InputError,
    Key,
    Label,
    Units,
    join,
    read_labels,
    read_scores,
    read_seconds,
    read_truth,
    read_volume,
    threshold_from,
)
from ct.report import ReportError, read_json, write_report
from metrics import Undefined, defined
from triage import TriageSettings

NO_THRESHOLD = "undefined: no threshold set on other data"
CALLED = {"sensitivity": ("tp", "fn"), "specificity": ("tn", "fp"), "ppv": ("tp", "fp"), "npv": ("tn", "fn")}


# ----------------------------------------------------------------------------------------------------------
# Figures

def ranking(scores, labels, clusters, args) -> dict:
    """AUC and average precision of one set of units, with their intervals."""
    boot = {"clusters": clusters, "level": args.level, "repeats": args.bootstrap, "seed": args.seed}
    ap = metrics.average_precision
    return {"abnormal": int((labels == 1).sum()), "normal": int((labels == 0).sum()),
            "clusters": len(np.unique(clusters)),
            "auc": defined(metrics.auc, scores, labels),
            "auc_delong": defined(metrics.delong_interval, scores, labels, clusters, args.level),
            "auc_bootstrap": defined(metrics.bootstrap_interval, metrics.auc, scores, labels, **boot),
            "average_precision": defined(ap, scores, labels),
            "average_precision_bootstrap": defined(metrics.bootstrap_interval, ap, scores, labels, **boot)}


def at_threshold(scores, labels, threshold, source, args) -> dict:
    """Sensitivity and its kin as {value, interval, hits, of}; 'undefined' without a threshold."""
    names = [*CALLED, "ppv_at_prevalence"]
    if threshold is None:
        return {name: NO_THRESHOLD for name in names}
    counts = metrics.confusion(scores, labels, threshold)
    result = {"threshold": threshold, "threshold_source": source, **counts}
    for name, (right, wrong) in CALLED.items():
        total = counts[right] + counts[wrong]
        value = defined(metrics.proportion, counts[right], total, args.level)
        result[name] = value if isinstance(value, str) else {
            "value": value[0], "interval": value[1:], "hits": counts[right], "of": total}
    result["ppv_at_prevalence"] = _ppv(result["sensitivity"], result["specificity"], args.prevalence)
    return result


def _ppv(sensitivity, specificity, prevalence):
    """PPV at the prevalence; its interval puts both Wilson bounds at their low, then their high end:
    conservative."""
    if prevalence is None:
        return "undefined: no --prevalence given"
    if isinstance(sensitivity, str) or isinstance(specificity, str):
        return "undefined: needs abnormal and normal units"
    value = defined(metrics.ppv_at_prevalence, sensitivity["value"], specificity["value"], prevalence)
    if isinstance(value, str):
        return value
    ends = zip(sensitivity["interval"], specificity["interval"])
    return {"value": value, "interval": [metrics.ppv_at_prevalence(*end, prevalence) for end in ends],
            "prevalence": prevalence}


def level_figures(units: Units, threshold: float | None, source: str, args) -> dict:
    """Everything about scans, or about slices."""
    everything = np.ones(len(units.keys), bool)
    result = {"n": len(units.keys), "left_out": units.left_out, "counted_worst": units.counted_worst,
              **ranking(*units.where(everything), args), "roc": defined(metrics.roc_points, units.scores, units.labels),
              "at_threshold": at_threshold(units.scores, units.labels, threshold, source, args)}
    result["categories"] = {}
    for name in sorted({t for types in units.types for t in types}):
        chosen = np.array([name in types for types in units.types]) | (units.labels == 0)
        called = at_threshold(*units.where(chosen)[:2], threshold, source, args)
        result["categories"][name] = {**ranking(*units.where(chosen), args),
                                      "sensitivity": called["sensitivity"]}
    untyped = sum(not types for types, label in zip(units.types, units.labels) if label == 1)
    return {**result, "abnormal_without_category": untyped}


# ----------------------------------------------------------------------------------------------------------
# Masks

def pixel_figures(units: Units, args) -> dict:
    """Dice by scan (where the truth is not empty), pooled Dice and pixel AP. A scan labelled 0 has an empty
    truth."""
    tally, absent = metrics.PixelTally(), []
    for (scan_id,), label in zip(units.keys, units.labels):
        if not (args.maps / scan_id / "mask.nii.gz").is_file():
            absent.append(f"{scan_id} (no map)")
            continue
        predicted, affine = read_volume(args.maps / scan_id / "mask.nii.gz")
        anomaly, _ = read_volume(args.maps / scan_id / "anomaly.nii.gz")
        found = read_truth(args.masks, scan_id, predicted.shape, affine, args.mask_gaps)
        if found is None and label == 1:
            absent.append(f"{scan_id} (no truth)")
            continue
        truth, counted = found or (np.zeros(predicted.shape, bool), np.ones(len(predicted), bool))
        tally.add(scan_id, truth[counted], predicted[counted] > 0, anomaly[counted])
    if absent and args.missing == "error":
        raise InputError(f"--masks {args.masks} and --maps {args.maps}: nothing to compare for "
                         f"{', '.join(absent)}. Add the files, or leave these scans out of the pixel "
                         "figures with --missing exclude")
    each = np.array(list(tally.dice_by_scan.values()))
    result = {"scans": len(units.keys) - len(absent), "left_out": len(absent),
              "dice_pooled": defined(tally.pooled_dice),
              "pixel_average_precision": defined(tally.average_precision),
              "dice_by_scan": tally.dice_by_scan}
    if not len(each):
        return {**result, "dice_mean": "undefined: no truth mask with a pixel in it"}
    boot = defined(metrics.bootstrap_interval, lambda s, _: float(s.mean()), each, np.ones(len(each)),
                   level=args.level, repeats=args.bootstrap, seed=args.seed)
    return {**result, "dice_mean": float(each.mean()), "dice_mean_bootstrap": boot,
            "dice_median": float(np.median(each))}


# ----------------------------------------------------------------------------------------------------------
# Report

def shown(value) -> str:
    """A figure for the table: three digits, an interval, or why there is none."""
    if isinstance(value, str):
        return value
    if isinstance(value, (tuple, list)):
        return f"{value[0]:.3f} to {value[1]:.3f}"
    return f"{value:.3f}"


def level_rows(level: str, figures: dict) -> list[tuple]:
    """Table rows of one level: (what, figure, value, interval, n)."""
    def ranked(what, f):
        n = f"{f['abnormal']} abnormal, {f['normal']} normal"
        yield what, "AUC", f["auc"], f"{shown(f['auc_delong'])} (DeLong)", n
        yield what, "", "", f"{shown(f['auc_bootstrap'])} (bootstrap)", ""
        yield what, "average precision", f["average_precision"], f["average_precision_bootstrap"], n

    def called(what, figure, f):
        if isinstance(f, str):
            return what, figure, f, "", ""
        return what, figure, f["value"], f["interval"], f"{f['hits']} of {f['of']}" if "of" in f else ""

    rows = list(ranked(level, figures))
    for figure in CALLED:
        rows.append(called(level, figure.upper() if figure in ("ppv", "npv") else figure,
                           figures["at_threshold"][figure]))
    rows.append(called(level, "PPV at prevalence", figures["at_threshold"]["ppv_at_prevalence"]))
    for category, f in figures["categories"].items():
        rows += ranked(f"{level}, {category}", f)
        if not isinstance(f["sensitivity"], str):
            rows.append(called(f"{level}, {category}", "sensitivity", f["sensitivity"]))
    return rows


def table(report: dict) -> dict[str, list]:
    """What is shown of the report: columns, rows of text, and notes on what was left out."""
    rows, notes = [], []
    for level in ("scan", "slice"):
        if level in report:
            f = report[level]
            rows += level_rows(level, f)
            notes += [f"{level}s left out: {count} ({why})" for why, count in f["left_out"].items()]
            if f["counted_worst"]:
                notes.append(f"{level}s without a score, counted as ranked wrongly: {f['counted_worst']}")
            if f["abnormal_without_category"]:
                notes.append(f"abnormal {level}s without a category: {f['abnormal_without_category']}")
            if "threshold" in f["at_threshold"]:
                notes.append(f"{level} threshold {f['at_threshold']['threshold']:.6g}: "
                             f"{f['at_threshold']['threshold_source']}")
    if "pixel" in report:
        f = report["pixel"]
        rows += [("pixel", "Dice, mean over scans", f["dice_mean"], f.get("dice_mean_bootstrap", ""),
                  f"{len(f['dice_by_scan'])} scans with a lesion"),
                 ("pixel", "Dice, pooled", f["dice_pooled"], "", f"{f['scans']} scans"),
                 ("pixel", "average precision", f["pixel_average_precision"], "", f"{f['scans']} scans")]
        notes += [f"scans left out of the pixel figures: {f['left_out']}"] * bool(f["left_out"])
    if "comparison" in report:
        f = report["comparison"]
        p = f"p {shown(f['delong_p'])} (paired DeLong)"
        rows.append(("scan", f"AUC of {f['scores']}", f["auc"], p, ""))
    columns = ["level", "figure", "value", f"{report['settings']['level']:.0%} interval", "n"]
    return {"columns": columns, "rows": [[shown(cell) for cell in row] for row in rows], "notes": notes}


def markdown(columns: list[str], rows: list[list[str]], notes: list[str]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]).rstrip() + "\n"


def plot_curves(levels: dict[str, Units], report: dict, out: Path) -> None:
    """roc.png and pr.png, one curve a level; a level with one class only is said to be undefined in the
    legend."""
    for kind, axes in (("roc", ("1 - specificity", "sensitivity")), ("pr", ("recall", "precision"))):
        figure = Figure(figsize=(5, 5), dpi=120, layout="constrained")
        ax = figure.add_subplot(xlabel=axes[0], ylabel=axes[1], xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        for colour, (level, units) in zip(("C0", "C1"), levels.items()):
            label = f"{level}: {'AUC' if kind == 'roc' else 'AP'} "
            label += shown(report[level]["auc" if kind == "roc" else "average_precision"])
            if len(np.unique(units.labels)) < 2:
                ax.plot([], [], colour, label=label)
            elif kind == "roc":
                ax.plot(*zip(*report[level]["roc"]), colour, label=label)
            else:
                y, x, _ = precision_recall_curve(units.labels, units.scores)
                ax.step(x, y, colour, where="post", label=label)
                ax.axhline(units.labels.mean(), color=colour, lw=0.8, ls=":")
        if kind == "roc":
            ax.plot([0, 1], [0, 1], "k:", lw=0.8)
        ax.legend(loc="lower right" if kind == "roc" else "lower left", fontsize=8)
        figure.savefig(out / f"{kind}.png")


def write(out: Path, stem: str, report: dict, table: str) -> None:
    """<stem>.json and <stem>.md in the folder, and the table on the terminal."""
    (out / f"{stem}.json").write_text(json.dumps(report, indent=2, allow_nan=False, default=os.fspath)
                                     + "\n", encoding="utf-8")
    (out / f"{stem}.md").write_text(table, encoding="utf-8")
    print(table, end="")


def provenance(args) -> dict:
    modules = {"numpy": np, "scipy": scipy, "scikit-learn": sklearn, "matplotlib": matplotlib}
    versions = {module: loaded.__version__ for module, loaded in modules.items()}
    return {"settings": vars(args), "versions": {"python": platform.python_version(), **versions}}


# ----------------------------------------------------------------------------------------------------------
# Commands

def slice_units(args, scan_labels: dict[Key, Label], not_chosen: set[Key]) -> Units:
    """Slices of the labelled scans, clustered by patient; what belongs to other scans is left out and counted."""
    every_label, _ = read_labels(args.slice_labels, by_slice=True)
    labels = {k: replace(label, patient=scan_labels[k[:1]].patient) for k, label in every_label.items()
              if k[:1] in scan_labels}
    scores = read_scores(args.slices, by_slice=True)
    units = join(scores, labels, args.missing, {k for k in scores if k[:1] in not_chosen}, "slices")
    if len(labels) < len(every_label):
        others = {"labelled, of scans without a scan label": len(every_label) - len(labels)}
        units = replace(units, left_out=units.left_out | others)
    return units


def evaluate(args) -> None:
    scores = read_scores(args.scores)
    labels, not_chosen = read_labels(args.labels, args.where)
    units = {"scan": join(scores, labels, args.missing, not_chosen)}
    thresholds = {"scan": (args.threshold, "--threshold"),
                  "slice": (args.slice_threshold, "--slice-threshold")}
    if args.threshold_from:
        thresholds["scan"] = threshold_from(args.threshold_from, args.fpr, args.missing, units["scan"].keys)
    if args.slices:
        units["slice"] = slice_units(args, labels, not_chosen)
    report = {level: level_figures(u, *thresholds[level], args) for level, u in units.items()}
    if args.masks:
        report["pixel"] = pixel_figures(units["scan"], args)
    if args.compare:
        other = join(read_scores(args.compare), labels, args.missing, not_chosen)
        if other.keys != units["scan"].keys:
            raise InputError(f"--compare {args.compare}: has scores for other scans than {args.scores}")
        report["comparison"] = {
            "scores": str(args.compare), "auc": defined(metrics.auc, other.scores, other.labels),
            "delong_p": defined(metrics.delong_paired_test, units["scan"].scores, other.scores, other.labels,
                                other.clusters)}
    report["labels"] = {scan_id: {"label": int(label), "types": types} for (scan_id,), label, types in
                        zip(units["scan"].keys, units["scan"].labels, units["scan"].types)}
    report["scores_sha256"] = hashlib.sha256(args.scores.read_bytes()).hexdigest()
    report |= provenance(args)
    report["table"] = table(report)
    args.out.mkdir(parents=True, exist_ok=True)
    plot_curves(units, report, args.out)
    write(args.out, "metrics", report, markdown(**report["table"]))
    if args.report:
        write_report(args.scores.parent, args.report, read_json(args.out / "metrics.json"))


def simulate_worklist(args) -> None:
    labels, not_chosen = read_labels(args.labels, args.where)
    units = join(read_scores(args.scores), labels, args.missing, not_chosen)
    settings = TriageSettings(**{f.name: getattr(args, f.name) for f in fields(TriageSettings)})
    observed = [read_seconds(path) if path else None for path in (args.arrival_intervals, args.reading_times)]
    try:
        report = triage.simulate(units.scores, units.labels, settings, *observed)
    except Undefined as reason:
        raise InputError(f"{args.labels}: the simulation is undefined: {reason}") from None
    report |= {"load": asdict(settings), "left_out": units.left_out, "counted_worst": units.counted_worst,
               **provenance(args)}
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out, "triage", report, triage.markdown(report))


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {text}")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not np.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return value


def _at_least(kind: type, least: float) -> Callable:
    def parse(text: str):
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value
    return parse


def _condition(text: str) -> str:
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"expected COLUMN=VALUE, got {text}")
    return text


def _parser(prog: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("scores", type=Path, help="scores.csv of projector.py: scan_id, score, status")
    parser.add_argument("labels", type=Path, help="labels.csv: scan_id, label (0 or 1), [types], [patient]")
    parser.add_argument("--out", type=Path, required=True, help="folder for the figures")
    parser.add_argument("--where", type=_condition, action="append", default=[], metavar="COLUMN=VALUE",
                        help="use only these rows of the labels, e.g. split=test; may be repeated")
    parser.add_argument("--missing", choices=("error", "exclude", "worst"), default="error",
                        help="scans that failed, have no score or no label: refuse; leave out and count; or "
                             "count as ranked wrongly, the worst case (no label: left out) (default error)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def evaluate_parser() -> argparse.ArgumentParser:
    parser = _parser("evaluate.py", "AUC and its kin, with intervals (evaluate.py triage: the simulation)")
    add = parser.add_argument
    add("--slices", type=Path, help="slices.csv of projector.py: scan_id, slice, score")
    add("--slice-labels", type=Path, help="scan_id, slice (from 0, inferior to superior), label, [types]")
    add("--masks", type=Path, help="truth masks: <scan_id>.nii.gz or <scan_id>/NN.png (NN: slice from 0)")
    add("--maps", type=Path, help="<scan_id>/mask.nii.gz, anomaly.nii.gz (default: the folder of scores.csv)")
    add("--mask-gaps", choices=("error", "empty", "skip"), default="error",
        help="slices without a PNG in a truth folder: refuse, nothing there, or not counted (default error)")
    add("--threshold", type=_finite, help="a scan is called abnormal at this score or above; set on other data")
    add("--threshold-from", type=Path, nargs="+", metavar="CSV",
        help="SCORES [LABELS] of other scans (without labels all healthy): threshold at --fpr on the healthy")
    add("--fpr", type=_share, default=0.05, help="false-positive rate for --threshold-from (default 0.05)")
    add("--slice-threshold", type=_finite, help="the same for slices")
    add("--prevalence", type=_share, help="share of abnormal scans for 'PPV at prevalence'")
    add("--compare", type=Path, metavar="SCORES", help="another method's scores: paired DeLong test")
    add("--report", type=Path, metavar="HTML",
        help="write projector.py's report anew with labels and ROC; SCORES must lie in its results folder")
    add("--level", type=_share, default=0.95, help="of the intervals (default 0.95)")
    add("--bootstrap", type=_at_least(int, 100), default=2000, help="resamples (default 2000)")
    return parser


def triage_parser() -> argparse.ArgumentParser:
    parser = _parser("evaluate.py triage", "One reader's worklist, first come first served against by score")
    add, default = parser.add_argument, TriageSettings()
    add("--scans", type=_at_least(int, 2), default=default.scans, help="in a session (default %(default)s)")
    add("--arrival-s", type=_at_least(float, 1e-3), default=default.arrival_s,
        help="mean interval of Poisson arrivals (default %(default)s)")
    add("--arrival-intervals", type=Path, help="observed intervals to draw from instead, seconds, one a line")
    add("--reader-start-s", type=_at_least(float, 0), default=default.reader_start_s,
        help="the reader comes this long after the first scan (default %(default)s)")
    add("--reading-median-s", type=_at_least(float, 1e-3), default=default.reading_median_s,
        help="of log-normal reading times (default %(default)s)")
    add("--reading-sigma", type=_at_least(float, 0), default=default.reading_sigma,
        help="of their logarithm (default %(default)s)")
    add("--reading-times", type=Path, help="observed reading times to draw from instead, seconds, one a line")
    add("--latency-s", type=_at_least(float, 0), default=default.latency_s,
        help="seconds a scan takes to score; measure it, the default of %(default)s is an assumption")
    add("--machines", type=_at_least(int, 1), default=default.machines,
        help="scans scored at the same time (default %(default)s)")
    add("--prevalence", type=_share, help="share of emergencies among arrivals (default: as in the labels)")
    add("--repeats", type=_at_least(int, 1), default=default.repeats, help="sessions (default %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    command, parser, argv = ((simulate_worklist, triage_parser(), argv[1:]) if argv[:1] == ["triage"]
                             else (evaluate, evaluate_parser(), argv))
    args = parser.parse_args(argv)
    if command is evaluate:
        if bool(args.slices) != bool(args.slice_labels):
            parser.error("--slices and --slice-labels go together")
        if args.threshold is not None and args.threshold_from:
            parser.error("give --threshold or --threshold-from, not both")
        if args.threshold_from and len(args.threshold_from) > 2:
            parser.error("--threshold-from takes SCORES or SCORES LABELS")
        if args.masks and not args.masks.is_dir():
            parser.error(f"--masks {args.masks}: no such folder")
        args.maps = args.maps or args.scores.parent
    try:
        command(args)
    except (OSError, InputError, ReportError) as problem:
        print(f"{parser.prog}: error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
