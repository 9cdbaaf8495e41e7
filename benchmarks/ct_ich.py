"""How well haemorrhage is detected on CT-ICH: ours, other model bundles, and simple baselines, by one calibration.

    python benchmarks/ct_ich.py --data ct-ich --database healthy.lmdb --model models/head-128 --out runs/ct-ich

--data is a folder with the scans in folders named after their split, and two tables: scans.csv (scan_id, split, label,
and if there are any types, separated by '|', and patient) and slices.csv (scan_id, slice from 0 upwards, label, types).
Writes to --out metrics.json (every figure) and table.md. Every scan's result is kept, so that the same command goes on
where it was stopped.

Nothing is chosen on the scans that are reported on:
  ours        projector.py with the settings of the bundle, and its own scan score
  published   with --rows published: projector.py --preset published, minutes per scan on a CPU; its own score, by
              votes; for bundles that hold a search (heads-128, phantom-128)
  baselines   fitted to the training split of --database, calibrated on the scans it holds out, scored as ours
  --beside    further bundles, with their own calibration, scored as ours
All get the same brain masks. Intervals and tests go by patient (the scan where no patient is given): DeLong's, for
slices with Obuchowski's variance and Student's t, and a bootstrap of patients. p are of paired DeLong tests against
ours, corrected by Holm for the number of methods, and in the table by type for that of methods and types. A slice that
was not projected, as one below the brain, has the score 0 by every method, which mostly is right and no method's merit:
so there is an AUC besides without the normal ones of these. A scan without slice labels counts among scans alone.
Seconds are from the file to the scores; ours include writing its maps.

Exit codes: 0 done, 2 wrong usage, 3 some scans failed; they are named and left out of every row.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))                                      # run as a script from anywhere

from benchmarks import compare
from benchmarks.compare import OURS, SIGNIFICANT, Method, differs, name_of, shown
from common.files import sha256
from common.wording import some
from config import RESUMES, exit_code
from ct.frame import PreprocessSettings
from ct.read import ScanSource, find_scans
from dataset import SliceDataset
from detect.folder import make_writable
from evaluation import metrics
from evaluation.cohort import (
    InputError,
    Label,
    finite,
    read_labels,
    read_table,
    refuse_contradiction,
    rows_by_key,
    seconds_by_scan,
)
from evaluation.metrics import Undefined, defined

ROWS = {OURS: (), "published": ("--preset", "published")}            # further flags of projector.py


@dataclass(frozen=True)
class Case:
    """A scan with its labels, and the scores of every method.

    split, label   where it lies, and its label
    slice_labels   by slice; empty where the slices have none
    slices         by method, float [S]
    scores         by method
    seconds        by method, from the file to the scores
    projected      bool [S]: the slices that any method has seen
    """

    scan_id: str
    split: str
    label: Label
    slice_labels: dict[int, Label]
    slices: dict[str, np.ndarray]
    scores: dict[str, float]
    seconds: dict[str, float]
    projected: np.ndarray


# ---------------------------------------------------------------------------------------------------------------
# Input

def read_split(data: Path, split: str) -> tuple[dict[str, Label], list[ScanSource]]:
    """The labels of a split by scan, and its scans. InputError where the two do not match."""
    by_key, _ = read_labels(data / "scans.csv", [f"split={split}"])
    labels = {scan_id: label for (scan_id,), label in by_key.items()}
    if not (data / split).is_dir():
        raise InputError(f"--data {data}: has no folder {split}, which --split {split} asks for")
    sources = find_scans(data / split)
    found = {source.scan_id for source in sources}
    for name, missing, where in (("scans.csv", found - labels.keys(), "a row of split"),
                                 (split, labels.keys() - found, "a scan for every row of split")):
        if missing:
            raise InputError(f"{data / name}: expected {where} {split}; {len(missing)} are missing: "
                             f"{', '.join(sorted(missing)[:5])}")
    return labels, sources


def read_slice_labels(data: Path, labels: dict[str, Label]) -> dict[str, dict[int, Label]]:
    """Labels by scan and slice. labels: of the scans. InputError where the two contradict each other."""
    found: dict[str, dict[int, Label]] = {}
    by_key, _ = read_labels(data / "slices.csv", by_slice=True)
    refuse_contradiction({(scan_id,): label for scan_id, label in labels.items()}, by_key, data / "slices.csv")
    for (scan_id, number), label in by_key.items():
        found.setdefault(scan_id, {})[number] = label
    return found


def all_or_none(slice_labels: dict[str, dict[int, Label]], scan_id: str, count: int) -> dict[int, Label]:
    """A scan's labels by slice. InputError unless all of its `count` slices have one, and no other, or none has."""
    own, numbers = slice_labels.get(scan_id, {}), set(range(count))
    for wrong, what in ((own.keys() - numbers, "labels slices"), (numbers - own.keys(), "lacks slices")):
        if own and wrong:
            raise InputError(f"slices.csv: {what} {some([*map(str, sorted(wrong))])} of {scan_id}, which has {count} "
                             "slices (0 is the most inferior); label every slice of a scan, or none")
    return own


def refuse_seen(labels: Mapping[str, Label], data: SliceDataset) -> None:
    """ValueError where a scan to be reported on, or another of its patient, is in the database, held out there or not.
    """
    held = data.manifest["scans"]
    scan_ids, patients = {scan["scan_id"] for scan in held}, {scan["patient"] for scan in held}
    seen = sorted(scan_id for scan_id, label in labels.items() if scan_id in scan_ids or label.patient in patients)
    if seen:
        raise ValueError(f"--database {data.path}: holds {len(seen)} of the scans to be reported on, or others of "
                         f"their patients ({some(seen, 5)}); choose another --split")


# ---------------------------------------------------------------------------------------------------------------
# Scores

def measure(source: ScanSource, results: Path, preprocessing: PreprocessSettings, methods: dict[str, Method],
            own: str) -> dict[str, np.ndarray]:
    """METHOD_slices [S], METHOD_score and METHOD_seconds of the methods beside ours. results: the scan's folder.

    own: how ours makes a scan's score, and so the others.
    """
    done = compare.run_methods(source, results, preprocessing, methods)
    found = {}
    for name, scored in done.scored.items():
        found |= {f"{name}_slices": scored.slice_scores, f"{name}_score": scored.scan_score(own),
                  f"{name}_seconds": done.seconds[name]}
    return found


def measured(folder: Path, sources: list[ScanSource], preprocessing: PreprocessSettings, methods: dict[str, Method],
             key: str, own: str) -> dict[str, dict[str, np.ndarray]]:
    """measure() by scan, read from folder/measures where it was made with the same key and the same projection."""
    found, progress = {}, compare.Progress(f"baselines on {folder.name}", len(sources))
    for source in sources:
        results = folder / OURS / source.scan_id
        found[source.scan_id], fresh = compare.remembered(
            folder / "measures" / f"{source.scan_id}.npz",
            compare.key_of(key, sha256(results / "anomaly.nii.gz")),
            functools.partial(measure, source, results, preprocessing, methods, own))
        progress.line(source.scan_id, fresh)
    return found


def projected(folder: Path) -> dict[str, dict]:
    """What projector.py wrote, by scan: slices [S], projected bool [S], score and seconds; or reason, where it failed.
    """
    by_slice: dict[str, dict[int, tuple[float, bool]]] = {}
    for (scan_id, number), row in rows_by_key(folder / "slices.csv", ("score", "projected"), by_slice=True):
        by_slice.setdefault(scan_id, {})[number] = finite(folder / "slices.csv", row, "score"), row["projected"] == "1"
    seconds, found = seconds_by_scan(folder / "seconds.csv"), {}
    for row in read_table(folder / "scores.csv", ("scan_id", "score", "status", "reason")):
        scan_id = row["scan_id"]
        if row["status"] != "ok":
            found[scan_id] = {"reason": row["reason"]}
            continue
        slices, seen = zip(*(one for _, one in sorted(by_slice[scan_id].items())))
        found[scan_id] = {"slices": np.array(slices), "projected": np.array(seen), "score": float(row["score"]),
                          "seconds": seconds[scan_id]}
    return found


def collect(split: str, labels: dict[str, Label], slice_labels: dict[str, dict[int, Label]],
            ours: dict[str, dict[str, dict]], beside: dict[str, dict], methods: list[str]) -> list[Case]:
    """The cases of a split. ours: projected() by row; beside: measure() by scan. InputError of all_or_none."""
    cases = []
    for scan_id, kept in beside.items():
        slices = {row: scans[scan_id]["slices"] for row, scans in ours.items()}
        scores = {row: scans[scan_id]["score"] for row, scans in ours.items()}
        seconds = {row: scans[scan_id]["seconds"] for row, scans in ours.items()}
        for name in methods:
            slices[name] = kept[f"{name}_slices"]
            scores[name], seconds[name] = float(kept[f"{name}_score"]), float(kept[f"{name}_seconds"])
        cases.append(Case(scan_id, split, labels[scan_id], all_or_none(slice_labels, scan_id, len(slices[OURS])),
                          slices, scores, seconds, ours[OURS][scan_id]["projected"]))
    return cases


# ---------------------------------------------------------------------------------------------------------------
# Figures

Units = tuple[np.ndarray, np.ndarray, np.ndarray]      # scores, labels, patients, [n] each


def scan_units(cases: list[Case], method: str, kind: str | None = None) -> Units:
    """Of all scans; with a kind, of the normal ones and those with this type of haemorrhage."""
    cases = [case for case in cases if kind is None or not case.label.label or kind in case.label.types]
    return (np.array([case.scores[method] for case in cases]), np.array([case.label.label for case in cases]),
            np.array([case.label.patient for case in cases]))


def slice_units(cases: list[Case], method: str, kind: str | None = None, all_normal: bool = True) -> Units:
    """Of all labelled slices; with a kind, of the normal ones and those with this type of haemorrhage.

    all_normal: also those that were not projected.
    """
    units = [(case.slices[method][number], label.label, case.label.patient)
             for case in cases for number, label in case.slice_labels.items()
             if (kind is None or not label.label or kind in label.types)
             and (all_normal or label.label or case.projected[number])]
    return tuple(np.array(column) for column in zip(*units)) or (np.zeros(0), np.zeros(0, int), np.zeros(0, str))


def ranking(scores: np.ndarray, labels: np.ndarray, patients: np.ndarray) -> dict:
    """AUC with DeLong's interval; a figure that these units do not define is 'undefined: <why>'."""
    return {"abnormal": int((labels == 1).sum()), "normal": int((labels == 0).sum()),
            "auc": defined(metrics.auc, scores, labels),
            "auc_delong": defined(metrics.delong_interval, scores, labels, patients)}


def bootstrap(scores: np.ndarray, labels: np.ndarray, patients: np.ndarray) -> tuple[float, float] | str:
    return defined(metrics.bootstrap_interval, metrics.auc, scores, labels, patients)


def against_ours(ours: Units, other: Units) -> float | str:
    """Two-sided p of equal AUCs, paired."""
    return defined(metrics.delong_paired_test, ours[0], other[0], ours[1], ours[2])


def report(cases: list[Case], methods: list[str]) -> dict:
    """The figures of metrics.json; methods begins with ours."""
    found = {method: {"seconds_a_scan": float(np.mean([case.seconds[method] for case in cases]))} for method in methods}
    types = sorted({kind for case in cases for kind in case.label.types})
    by_type: dict[str, dict] = {kind: {method: {} for method in methods} for kind in types}
    for level, units in (("scan", scan_units), ("slice", slice_units)):
        all_units = {method: units(cases, method) for method in methods}
        tests = {method: against_ours(all_units[OURS], all_units[method]) for method in methods[1:]}
        corrected = metrics.holm(tests)
        for method in methods:
            found[method][level] = ranking(*all_units[method]) | {"auc_bootstrap": bootstrap(*all_units[method])}
            if method != OURS:
                found[method][level] |= {"p": tests[method], "p_holm": corrected[method]}
        tests = {}
        for kind in types:
            of_kind = {method: units(cases, method, kind) for method in methods}
            tests |= {(kind, method): against_ours(of_kind[OURS], of_kind[method]) for method in methods[1:]}
            for method in methods:
                by_type[kind][method][level] = ranking(*of_kind[method])
        corrected = metrics.holm(tests)
        for kind, method in tests:
            by_type[kind][method][level] |= {"p": tests[kind, method], "p_holm": corrected[kind, method]}
    for method in methods:
        found[method]["projected"] = ranking(*slice_units(cases, method, all_normal=False))
    return {"methods": found, "types": by_type,
            "without_slice_labels": [case.scan_id for case in cases if not case.slice_labels],
            "no_slice_abnormal": [case.scan_id for case in cases if case.label.label and case.slice_labels
                                  and not any(one.label for one in case.slice_labels.values())],
            "scans": {case.scan_id: {"split": case.split, "label": case.label.label, "types": list(case.label.types),
                                     **case.scores} for case in cases}}


def table(figures: dict) -> str:
    """Markdown: a row a method; then a row a type of haemorrhage, methods side by side; then what is to be known."""
    methods, splits = figures["methods"], figures["splits"]
    of = {level: methods[OURS][level] for level in ("scan", "slice")}
    lines = [f"{of['scan']['abnormal']} scans with haemorrhage and {of['scan']['normal']} without, "
             f"{of['slice']['abnormal']} slices with and {of['slice']['normal']} without ({', '.join(splits)}).", "",
             "| method | scan AUC | DeLong 95 % | bootstrap 95 % | slice AUC | DeLong 95 % | bootstrap 95 % | "
             "of projected slices | DeLong 95 % | seconds per scan | p, scan | p, slice |", "| --- " * 12 + "|"]
    for method, f in methods.items():
        cells = [shown(f[level][figure]) for level in of for figure in ("auc", "auc_delong", "auc_bootstrap")]
        cells += [shown(f["projected"][figure]) for figure in ("auc", "auc_delong")]
        tests = [shown(f[level]["p_holm"], 3) if method != OURS else "" for level in of]
        lines.append(f"| {' | '.join([name_of(method), *cells, format(f['seconds_a_scan'], '.1f'), *tests])} |")
    if figures["types"]:
        columns = ["type", "scans", "slices", *map(name_of, methods)]
        lines += ["", "Scan AUC / slice AUC by type:", "", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for kind, by_method in figures["types"].items():
        counts = [str(by_method[OURS][level]["abnormal"]) for level in of]
        cells = [" / ".join(shown(f[level]["auc"]) + differs(f[level]) for level in of) for f in by_method.values()]
        lines.append(f"| {' | '.join([kind, *counts, *cells])} |")
    notes = [f"p: paired DeLong test against ours, two-sided, Holm's correction for {len(methods) - 1} methods; by "
             f"type, *: p < {SIGNIFICANT} after the correction for all methods and types."] if len(methods) > 1 else []
    unseen = of["slice"]["normal"] - methods[OURS]["projected"]["normal"]
    notes += [f"Scan score from slice scores: {figures['settings']['scan_score']}.",
              f"Of projected slices: without {unseen} normal ones that were not, and have the score 0 by every method."]
    if figures["without_slice_labels"]:
        notes.append(f"Without slice labels, so among scans alone: {', '.join(figures['without_slice_labels'])}.")
    if figures["no_slice_abnormal"]:
        notes.append("Abnormal scans of which every slice is labelled, none of them abnormal: "
                     f"{', '.join(figures['no_slice_abnormal'])}.")
    if figures["failed"]:
        notes.append("Failed and left out of every row: "
                     + "; ".join(f"{scan_id} ({why})" for scan_id, why in figures["failed"].items()) + ".")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


# ---------------------------------------------------------------------------------------------------------------
# Command

def benchmark(args: argparse.Namespace) -> int:
    """Every stage, each going on from what it kept; returns the exit code. Raises ValueError."""
    make_writable(args.out)
    splits = {split: read_split(args.data, split) for split in args.split}
    every_label = {scan_id: label for labels, _ in splits.values() for scan_id, label in labels.items()}
    slice_labels = read_slice_labels(args.data, every_label)
    data = compare.open_database(args.database, "--database", args)
    refuse_seen(every_label, data)
    rows, runs = [OURS, *args.rows], {}
    for split in splits:
        for row in rows:
            runs[split, row] = compare.project(args.data / split, args.model, args.out / split / row, args.device,
                                               ROWS[row], f"{split}, {row}")
    run = runs[args.split[0], OURS]
    methods, key = compare.make_methods(args, data, run)
    preprocessing, cases, failed = PreprocessSettings.from_json(run["preprocessing"]), [], {}
    for split, (labels, sources) in splits.items():
        folder = args.out / split
        ours = {row: projected(folder / row) for row in rows}
        failed |= {scan_id: scans[scan_id]["reason"] for scans in ours.values() for scan_id in labels
                   if "reason" in scans[scan_id]}
        done = [source for source in sources if source.scan_id not in failed]
        beside = measured(folder, done, preprocessing, methods, key, run["settings"]["scan_score"])
        cases += collect(split, labels, slice_labels, ours, beside, list(methods))
    if not cases:
        raise Undefined(f"--data {args.data}: no scan is left: {failed}")
    figures = report(cases, [*rows, *methods])
    figures |= {"splits": args.split, "failed": failed, **compare.facts(run, data),
                "rows": {row: runs[args.split[0], row]["settings"] for row in rows}}
    compare.write_figures(args.out, figures, table(figures))
    return 3 if failed else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True,
                        help="folder with scans.csv, slices.csv and a folder of scans for each split")
    compare.add_arguments(parser, "--database")
    parser.add_argument("--split", nargs="+", default=["test"], metavar="SPLIT",
                        help="of scans.csv, one or more, reported on together (default test)")
    others = [row for row in ROWS if row != OURS]
    parser.add_argument("--rows", nargs="*", choices=others, default=[], metavar="ROW",
                        help=f"of ours besides the bundle's own settings: {', '.join(others)}, for bundles that hold "
                             "a search: heads-128, phantom-128 (default none)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return exit_code(benchmark, parse(argv), RESUMES)


if __name__ == "__main__":
    sys.exit(main())
