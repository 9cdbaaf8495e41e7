"""Scores and labels to figures with intervals, and the worklist simulation.

    python evaluate.py results/scores.csv labels.csv --out results/metrics
    python evaluate.py triage results/scores.csv labels.csv --out results/triage

labels.csv has the columns scan_id, label (0 or 1) and, if there are any, types (separated by '|') and patient
(scans of one patient then count as one cluster, in every interval and test). Writes metrics.json, metrics.md, roc.png
and pr.png (triage.json and triage.md), and with --report projector.py's report again, with labels and ROC. A figure
that the data do not define reads 'undefined: <why>'. A threshold comes from other data, by the same model, or there is
none. An interval by bootstrap is too narrow with fewer than 50 patients of a class, and marked. No scan is left out
silently: see --missing. Exit 0 done, 2 wrong usage or unfit input.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from common.files import no_folder, replace_text, sha256
from evaluation.settings import FigureSettings, TriageSettings

if TYPE_CHECKING:                         # what takes seconds to import, functions import: --help needs none of it
    from evaluation.cohort import Key, Label, Score, Units

# Of triage: what a model draws, and what is observed and drawn from instead
OBSERVED = {"arrival_s": "arrival_intervals", "reading_median_s": "reading_times", "reading_sigma": "reading_times"}
LIBRARIES = ("numpy", "scipy", "scikit-learn", "matplotlib")             # that figures hang on


def write(out: Path, stem: str, report: dict, table: str) -> None:
    """<stem>.json and <stem>.md in the folder."""
    replace_text(out / f"{stem}.json", json.dumps(report, indent=2, allow_nan=False, default=os.fspath) + "\n")
    replace_text(out / f"{stem}.md", table)


def refuse_folder(flag: str, folder: Path) -> None:
    """InputError, before any work, where a folder can be none that is written to."""
    from evaluation.cohort import InputError

    if there := no_folder(folder):
        raise InputError(f"{flag}: {there} is no folder that can be written to; choose another")


def provenance(args) -> dict:
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"settings": vars(args), "versions": {"python": platform.python_version(), **versions}}


# ----------------------------------------------------------------------------------------------------------
# Commands

def slice_units(args, scan_scores: dict[Key, Score], scan_labels: dict[Key, Label],
                not_chosen: set[Key]) -> tuple[Units, int]:
    """Slices of the labelled scans, clustered by patient; those of other scans are left out and counted.

    And the number of scans labelled 1 of which every slice is labelled 0: the finding may lie in no slice, or a label
    is wrong. Raises InputError for a slice labelled 1 of a scan labelled 0.
    Slices of a scan that failed, is unreliable or absent have no score either.
    """
    from evaluation.cohort import UNSCORED, join, read_labels, read_scores, refuse_contradiction, refuse_counted_from_1

    every_label, _ = read_labels(args.slice_labels, by_slice=True)
    refuse_contradiction(scan_labels, every_label, args.slice_labels)
    labels = {k: replace(label, patient=scan_labels[k[:1]].patient) for k, label in every_label.items()
              if k[:1] in scan_labels}
    own = read_scores(args.slices, by_slice=True)
    refuse_counted_from_1(labels, own, args.slice_labels)
    scores = {k: scan_scores[k[:1]] if scan_scores.get(k[:1]) in UNSCORED else score for k, score in own.items()
              if k[:1] in scan_scores or k not in labels}
    units = join(scores, labels, args.missing, {k for k in scores if k[:1] in not_chosen}, "slices",
                 f"{args.slices} against {args.slice_labels}")
    unchosen = sum(k[:1] in not_chosen for k in every_label)
    others = {"labelled, of scans not chosen": unchosen,
              "labelled, of scans without a scan label": len(every_label) - len(labels) - unchosen}
    units = replace(units, left_out=units.left_out | {why: count for why, count in others.items() if count})
    abnormal = {k[:1] for k, label in labels.items() if label.label}
    unlabelled = {k[:1] for k in own if k not in labels}
    return units, sum(scan_labels[k].label for k in {k[:1] for k in labels} - abnormal - unlabelled)


def own_threshold(scores: Path, evaluated: list[Key]) -> tuple[float | None, str]:
    """The threshold that a run flagged by, from the run.json beside the scores, and its source.

    It is of projector.py or of healthygan.test.

    None without one, and for an unfinished run, since the scores may be an earlier run's, by other settings: the source
    then says why. Else it says how many of the evaluated scans have no flag: their scores cannot be compared with the
    calibration's.
    """
    from detect.report import read_json
    from evaluation.cohort import InputError, read_table
    from evaluation.origin import UNENDED

    path = scores.parent / "run.json"
    run = read_json(path) if path.is_file() else {}
    try:
        calibration, how = run.get("calibration"), run.get("settings", {}).get("scan_score")
        own, given = calibration["threshold"].get(how) if calibration else None, run.get("threshold")
        own, given = (None if one is None else one + 0.0 for one in (own, given))
        rate = None if own is None else f"{calibration['threshold']['fpr']:g}"
    except (AttributeError, KeyError, TypeError, ValueError) as error:          # another program's, or changed by hand
        raise InputError(f"{path}: settings, calibration or threshold are not as projector.py writes them ({error}); "
                         "run it again, or evaluate a copy of the scores elsewhere") from error
    if own is None and given is None:
        return None, ""
    if run.get("seconds", 0) is None:
        return None, f"that of {path} is {UNENDED}, or give --threshold"
    if "settings" not in run:                             # healthygan.test writes none
        source = "the model's own, as healthygan.test has it in run.json: of healthy images kept aside in its training"
    elif given is not None:
        source = "that of projector.py --threshold"
    else:
        source = (f"the model's own, at a false-positive rate of {rate} on the healthy scans of its calibration, none "
                  "of which may be among these")
    without = {(row["scan_id"],) for row in read_table(scores, ("scan_id", "status"))
               if row["status"] == "ok" and row.get("flagged") == ""}
    if count := len(without & set(evaluated)):
        source += f"; {count} of these scans projector.py has not flagged or cleared by it: their notes say why"
    return own if given is None else given, source


def scan_origin(folder: Path, key: Key) -> tuple[str, str] | None:
    """The hash by which the result.json of a scan in a folder of results says which scan it is, after its kind.

    Of its series ('uid') or, without one, of its pictures ('content'). Not of its place, which the scans of a zip file
    share. None for a scan without a result there.
    """
    from detect.result import find_result_folder, read_result, result_folder
    from evaluation.cohort import InputError

    try:
        result_folder(folder, key[0])
    except ValueError:                                            # not an id that projector.py gives
        return None
    try:
        result = read_result(find_result_folder(folder, key[0]))
    except ValueError as error:
        raise InputError(str(error)) from error
    found = result["origin"] if result else {}
    return next(((kind, found[kind]) for kind in ("uid", "content") if found.get(kind)), None)


def find_maps(args, scan_id: str) -> tuple[Path, bool]:
    """The folder of a scan's maps, with or without --part, and whether the stack was put upright (ct.read).

    If so, its slices count from the head's lower end while its maps lie the other way round, as the input did; a note
    in result.json says so. Raises InputError for an id that cannot be a folder's name.
    """
    from ct.whole_head import UPSIDE_DOWN
    from detect.outputs import split_notes
    from detect.result import find_result_folder, read_result, result_folder
    from evaluation.cohort import InputError

    try:
        folder = find_result_folder(args.maps, scan_id)
        if not folder.is_dir():                                   # without a result.json nothing else tells where
            folder = result_folder(args.maps, scan_id, by_hash=True)
        result = read_result(folder)
    except ValueError as error:
        raise InputError(f"{args.labels} and --maps {args.maps}: {error}; correct the id, or leave the scan out with "
                         "--where") from error
    if result is None and (folder / "result.json").exists():
        raise InputError(f"{folder / 'result.json'}: cannot be read as JSON; project the scan again")
    return folder, result is not None and UPSIDE_DOWN in split_notes(result["scan"].get("notes", ""))


def compare(args, labels: dict[Key, Label], not_chosen: set[Key], own: Units) -> dict:
    """The comparison with another method's scores, which are not those of a run that has not ended."""
    from evaluation.cohort import join, read_scores
    from evaluation.figures import comparison
    from evaluation.origin import read_run

    flag, beside = f"--compare {args.compare}", args.compare.parent / "run.json"
    if beside.is_file() and beside.parent.resolve() != args.scores.parent.resolve():
        read_run(beside, flag)
    other = join(read_scores(args.compare), labels, args.missing, not_chosen, tables=f"{flag} against {args.labels}")
    return comparison(own, other, args.scores, args.compare)


def evaluate(args) -> None:
    from detect.report import read_json, write_report
    from detect.report.tables import read_results
    from evaluation.cohort import InputError, join, read_labels, read_scores, threshold_from
    from evaluation.figures import level_figures, markdown, pixel_figures, plot_curves, table
    from evaluation.origin import read_run, refuse_other_model

    folder = args.scores.parent
    if args.report:
        refuse_folder(f"--report {args.report}", args.report.parent)
        needed = [folder / name for name in ("scores.csv", "slices.csv", "run.json")]
        if args.scores.name != "scores.csv" or not all(path.is_file() for path in needed):
            raise InputError(f"--report: {args.scores} must be the scores.csv of a folder of results of projector.py; "
                             f"expected {', '.join(map(str, needed))}")
        read_run(folder / "run.json", "--report")
        read_results(folder)                  # what no page can be made of is told before any work
    scores = read_scores(args.scores)
    labels, not_chosen = read_labels(args.labels, args.where)
    units = {"scan": join(scores, labels, args.missing, not_chosen, tables=f"{args.scores} against {args.labels}")}
    thresholds = {"scan": (args.threshold, "--threshold"),
                  "slice": (args.slice_threshold, "--slice-threshold")}
    if args.threshold is None and not args.threshold_from:
        thresholds["scan"] = own_threshold(args.scores, units["scan"].keys)
    if args.threshold_from:
        others = args.threshold_from[0]
        unknown = refuse_other_model(folder, others.parent, f"--threshold-from {others}")
        threshold, source = threshold_from(args.threshold_from, args.fpr, args.missing, units["scan"], scan_origin,
                                           folder)
        thresholds["scan"] = threshold, "; ".join(filter(None, (source, unknown)))
    if args.slices:
        refuse_other_model(folder, args.slices.parent, f"--slices {args.slices}")
        units["slice"], contrary = slice_units(args, scores, labels, not_chosen)
    if args.masks:
        refuse_other_model(folder, args.maps, f"--maps {args.maps}")
    compared = {"comparison": compare(args, labels, not_chosen, units["scan"])} if args.compare else {}
    settings = FigureSettings(**{f.name: getattr(args, f.name) for f in fields(FigureSettings)})
    report = {level: level_figures(u, *thresholds[level], settings) for level, u in units.items()}
    if args.slices:
        report["slice"]["abnormal_scans_without_abnormal_slice"] = contrary
    if args.masks:
        report["pixel"] = pixel_figures(units["scan"], args.masks, args.maps, args.mask_gaps, settings,
                                        partial(find_maps, args))
    report |= compared
    report["labels"] = {scan_id: {"label": int(label), "types": types} for (scan_id,), label, types in
                        zip(units["scan"].keys, units["scan"].labels, units["scan"].types)}
    report["scores_sha256"] = sha256(args.scores)
    report |= provenance(args)
    report["table"] = table(report)
    if thresholds["scan"][0] is None and thresholds["scan"][1]:
        report["table"]["notes"].append(f"no scan threshold: {thresholds['scan'][1]}")
    args.out.mkdir(parents=True, exist_ok=True)
    plot_curves(units, report, args.out)
    text = markdown(**report["table"])
    write(args.out, "metrics", report, text)
    if args.report:
        write_report(args.scores.parent, args.report, read_json(args.out / "metrics.json"))
    print(text, end="")                                   # last: a pipe may be closed by now


def simulate_worklist(args) -> None:
    from evaluation import triage
    from evaluation.cohort import InputError, join, read_labels, read_scores, read_seconds
    from evaluation.metrics import Undefined

    labels, not_chosen = read_labels(args.labels, args.where)
    units = join(read_scores(args.scores), labels, args.missing, not_chosen,
                 tables=f"{args.scores} against {args.labels}")
    given = {f.name: getattr(args, f.name) for f in fields(TriageSettings)}
    settings = TriageSettings(**{name: value for name, value in given.items() if value is not None})
    intervals = read_seconds(args.arrival_intervals, may_be_0=True) if args.arrival_intervals else None
    reading = read_seconds(args.reading_times) if args.reading_times else None
    try:
        report = triage.simulate(units.scores, units.labels, settings, intervals, reading, units.clusters)
    except Undefined as reason:
        raise InputError(f"{args.labels}: the simulation is undefined: {reason}") from None
    load = asdict(settings) | {name: None for name, observed in OBSERVED.items() if getattr(args, observed)}
    report |= {"load": load, "left_out": units.left_out, "counted_worst": units.counted_worst,
               **provenance(args)}
    args.out.mkdir(parents=True, exist_ok=True)
    text = triage.markdown(report)
    write(args.out, "triage", report, text)
    print(text, end="")


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {text}")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
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
                        help="use only these rows of the labels, e.g. split=test; may be repeated: of one column any "
                             "of the values will do, of several columns each must hold")
    parser.add_argument("--missing", choices=("error", "exclude", "worst"), default="error",
                        help="scans that failed, are unreliable, have no score or no label: refuse; leave out and "
                             "count; or count as ranked wrongly, the worst case (no label: left out) (default error)")
    parser.add_argument("--seed", type=_at_least(int, 0), default=0)
    return parser


def evaluate_parser() -> argparse.ArgumentParser:
    parser = _parser("evaluate.py", "AUC and its kin, with intervals (evaluate.py triage: the simulation)")
    add, default = parser.add_argument, FigureSettings()
    add("--slices", type=Path, help="slices.csv of projector.py: scan_id, slice, score")
    add("--slice-labels", type=Path, help="scan_id, slice (from 0, inferior to superior), label, [types]")
    add("--masks", type=Path, help="truth masks: <scan_id>.nii.gz or <scan_id>/NN.png (NN: slice as in "
        "slices.csv, from 0)")
    add("--maps", type=Path, help="<scan_id>/mask.nii.gz, anomaly.nii.gz, by whose distance from 0 pixels rank "
        "(default: the folder of scores.csv)")
    add("--mask-gaps", choices=("error", "empty", "skip"),
        help="slices without a PNG in a truth folder: refuse, nothing there, or not counted (default error)")
    add("--threshold", type=_finite,
        help="a scan is called abnormal above this score; set on other data (default: the model's own, from the "
             "run.json beside SCORES; right only where SCORES has no scan of its calibration)")
    add("--threshold-from", type=Path, nargs="+", metavar="CSV",
        help="SCORES [LABELS] of other scans by the same model (without labels all healthy): threshold at --fpr on the "
             "healthy")
    add("--fpr", type=_share, help="false-positive rate for --threshold-from (default 0.05)")
    add("--slice-threshold", type=_finite, help="the same for slices")
    add("--prevalence", type=_share, help="share of abnormal scans for 'PPV at prevalence'")
    add("--compare", type=Path, metavar="SCORES", help="another method's scores: paired DeLong test")
    add("--report", type=Path, metavar="HTML",
        help="write projector.py's report anew with labels and ROC; SCORES must lie in its results folder")
    add("--level", type=_share, default=default.level, help="of the intervals (default %(default)s)")
    add("--bootstrap", type=_at_least(int, 100), default=default.bootstrap, help="resamples for intervals, which are "
        "too narrow with fewer than 50 patients of a class (default %(default)s)")
    return parser


def triage_parser() -> argparse.ArgumentParser:
    parser = _parser("evaluate.py triage", "One reader's worklist, first come first served against by score")
    add, default = parser.add_argument, TriageSettings()
    add("--scans", type=_at_least(int, 2), default=default.scans, help="in a session (default %(default)s)")
    add("--arrival-s", type=_at_least(float, 1e-3),
        help=f"mean interval of Poisson arrivals (default {default.arrival_s})")
    add("--arrival-intervals", type=Path, help="observed intervals to draw from instead, seconds, one a line")
    add("--reader-start-s", type=_at_least(float, 0), default=default.reader_start_s,
        help="the reader comes this long after the first scan (default %(default)s)")
    add("--reading-median-s", type=_at_least(float, 1e-3),
        help=f"of log-normal reading times (default {default.reading_median_s})")
    add("--reading-sigma", type=_at_least(float, 0),
        help=f"of their logarithm (default {default.reading_sigma})")
    add("--reading-times", type=Path, help="observed reading times to draw from instead, seconds, one a line")
    add("--latency-s", type=_at_least(float, 0), default=default.latency_s,
        help="seconds a scan takes to score; measure it, the default of %(default)s is an assumption")
    add("--machines", type=_at_least(int, 1), default=default.machines,
        help="scans scored at the same time (default %(default)s)")
    add("--prevalence", type=_share, help="share of emergencies among arrivals (default: as in the labels)")
    add("--repeats", type=_at_least(int, 1), default=default.repeats, help="sessions (default %(default)s)")
    return parser


def check_load(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags of a model together with observed times, which are drawn from in its place."""
    for modelled, observed in OBSERVED.items():
        if getattr(args, modelled) is not None and getattr(args, observed):
            parser.error(f"give --{modelled} or --{observed}, not both".replace("_", "-"))


def complete(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that do not go together, and set the defaults of those that need another."""
    if bool(args.slices) != bool(args.slice_labels):
        parser.error("--slices and --slice-labels go together")
    for flag, needed in (("slice_threshold", "slices"), ("maps", "masks"), ("mask_gaps", "masks"),
                         ("fpr", "threshold_from")):
        if getattr(args, flag) is not None and not getattr(args, needed):
            parser.error(f"--{flag} needs --{needed}".replace("_", "-"))
    if args.threshold is not None and args.threshold_from:
        parser.error("give --threshold or --threshold-from, not both")
    if args.threshold_from and len(args.threshold_from) > 2:
        parser.error("--threshold-from takes SCORES or SCORES LABELS")
    if args.report and args.report.suffix != ".html":             # a table would be lost
        parser.error(f"--report {args.report}: expected a file named .html")
    if args.masks and not args.masks.is_dir():
        parser.error(f"--masks {args.masks}: no such folder")
    args.maps, args.mask_gaps = args.maps or args.scores.parent, args.mask_gaps or "error"
    args.fpr = args.fpr or 0.05


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    command, check, parser, argv = ((simulate_worklist, check_load, triage_parser(), argv[1:])
                                    if argv[:1] == ["triage"] else (evaluate, complete, evaluate_parser(), argv))
    args = parser.parse_args(argv)
    check(parser, args)

    from detect.report import ReportError
    from evaluation.cohort import InputError

    try:
        refuse_folder(f"--out {args.out}", args.out)
        command(args)
    except (OSError, InputError, ReportError) as problem:
        print(f"{parser.prog}: error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)         # `evaluate.py ... | head` ends as any such pipe does
    sys.exit(main())
