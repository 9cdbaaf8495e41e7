"""Real bleeds to choose on, that no test holds: scans with haemorrhage against a model's own healthy calibration scans.

    python benchmarks/development.py --data ct-ich --split mixed --model models/head-128 runs/other --out runs/mixed

Pasted lesions (cross_validation.py) are many and crude; these are few and real. --data is as of ct_ich.py; a split with
haemorrhages is enough. The healthy scans are those that calibrated each model, by the scores that its model.json keeps
of them: each judged by the others, and by a reader that has not seen it. So models are comparable that the same scans
have calibrated, as those of one recipe. Writes table.md and metrics.json: AUC by scan and by slice, with DeLong's
interval, and every scan's percentile. Results are kept, so that the same command goes on where it was stopped.

Exit codes: 0 done, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))                                      # run as a script from anywhere

from benchmarks import compare
from benchmarks.compare import shown
from benchmarks.ct_ich import (
    Case,
    all_or_none,
    projected,
    ranking,
    read_slice_labels,
    read_split,
    scan_units,
    slice_units,
)
from common.files import read_object
from config import RESUMES, exit_code
from detect.calibration import healthy_scores
from detect.folder import make_writable
from detect.scores import percentile_of
from evaluation.cohort import Label


def healthy_cases(model: Path) -> list[Case]:
    """The scans of a model's calibration, by the scores kept of them. ValueError for a model without them."""
    if not (model / "model.json").is_file():
        raise ValueError(f"--model {model}: holds no model.json; give the folder of a bundle, such as models/head-128")
    meta = read_object(model / "model.json")
    calibration = meta.get("calibration")
    if not calibration:
        raise ValueError(f"--model {model}: is not calibrated; make it with latent_stats.py and held-out healthy scans")
    scores = healthy_scores(calibration)[meta["settings"]["scan_score"]]
    slices: list[list[float]] = [[] for _ in scores]
    for one in calibration["slice_scores"]:
        slices[one["scan"]].append(one["score"])
    labels = [Label(0, (), f"healthy {i}") for i in range(len(scores))]
    return [_case(label.patient, label, dict.fromkeys(range(len(own)), label), np.array(own), score,
                  np.ones(len(own), bool))              # a calibration holds slices that were projected alone
            for label, own, score in zip(labels, slices, scores)]


def ill_labels(data: Path, split: str) -> dict[str, Label]:
    """The labels of a split by scan. ValueError where one is healthy."""
    labels, _ = read_split(data, split)
    if healthy := [scan_id for scan_id, label in labels.items() if not label.label]:
        raise ValueError(f"--split {split}: {healthy[0]} has no haemorrhage; those of the calibration are the healthy "
                         "ones here. Give a split of scans with one (ct_ich.py takes both)")
    return labels


def ill_cases(scans: Path, labels: dict[str, Label], slice_labels: dict[str, dict[int, Label]], model: Path, out: Path,
              device: str) -> list[Case]:
    """The scans of a folder, projected. ValueError where one has failed, or some of its slices alone have labels."""
    compare.project(scans, model, out, device, name=f"{scans.name}, {model.name}")
    found = projected(out)
    if failed := {scan_id: one["reason"] for scan_id, one in found.items() if "reason" in one}:
        raise ValueError(f"--data {scans.parent}: not projected: {failed}")
    return [_case(scan_id, label, all_or_none(slice_labels, scan_id, len(found[scan_id]["slices"])),
                  *(found[scan_id][name] for name in ("slices", "score", "projected")))
            for scan_id, label in labels.items()]


def _case(scan_id: str, label: Label, slice_labels: dict[int, Label], slices: np.ndarray, score: float,
          seen: np.ndarray) -> Case:
    return Case(scan_id, "", label, slice_labels, {compare.OURS: slices}, {compare.OURS: score}, {}, seen)


def figures_of(ill: list[Case], healthy: list[Case]) -> dict:
    """AUC by scan and slice (ct_ich.ranking), and of each ill scan the percentile among the healthy."""
    cases, scores = [*ill, *healthy], [case.scores[compare.OURS] for case in healthy]
    slices = slice_units(cases, compare.OURS, all_normal=False)
    return {"scan": ranking(*scan_units(cases, compare.OURS)), "slice": ranking(*slices),
            "percentile": {case.scan_id: percentile_of(case.scores[compare.OURS], scores) for case in ill}}


def table(figures: dict[str, dict]) -> str:
    """Markdown: a row a model."""
    scans = list(next(iter(figures.values()))["percentile"])
    columns = ["model", "scan AUC", "DeLong 95 %", "slice AUC", "DeLong 95 %", *scans]
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for name, of in figures.items():
        cells = [shown(of[level][figure]) for level in ("scan", "slice") for figure in ("auc", "auc_delong")]
        lines.append(f"| {' | '.join([name, *cells, *(f'{p:.0f}' for p in of['percentile'].values())])} |")
    first = next(iter(figures.values()))
    of = (f"{first[level]['abnormal']} {level}s with haemorrhage against {first[level]['normal']}"
          for level in ("scan", "slice"))
    return "\n".join([*lines, "", f"{', '.join(of)}; of each scan its percentile among the healthy ones."]) + "\n"


def benchmark(args: argparse.Namespace) -> int:
    make_writable(args.out)
    names = [model.name for model in args.model]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"--model: {', '.join(sorted(twice))} given twice; models are told by their folders' names")
    healthy = [healthy_cases(model) for model in args.model]
    labels = ill_labels(args.data, args.split)
    slice_labels = read_slice_labels(args.data, labels)
    found = {model.name: figures_of(ill_cases(args.data / args.split, labels, slice_labels, model,
                                              args.out / model.name, args.device), cases)
             for model, cases in zip(args.model, healthy)}
    compare.write_figures(args.out, found, table(found))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with scans.csv, slices.csv and the split's folder")
    add("--split", required=True, help="of scans.csv: scans with haemorrhage that no test holds")
    add("--model", type=Path, nargs="+", required=True, metavar="BUNDLE", help="calibrated model bundles")
    add("--out", type=Path, required=True, metavar="FOLDER", help="results, table.md and metrics.json")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return exit_code(benchmark, parse(argv), RESUMES)


if __name__ == "__main__":
    sys.exit(main())
