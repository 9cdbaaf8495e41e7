"""The whole way in a few minutes: phantoms, their projection with the shipped model, figures and a report.

    make demo                                  (or: python demos/demo.py)

Makes 3 healthy and 6 abnormal phantoms, projects them with models/head-128, which has seen real heads alone, evaluates
the scores against the truth, and writes report.html. Goes on where it was stopped. Exit codes: those of the step that
failed.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))                                      # run as a script from anywhere

from detect.scores import rounded_down

SEED = 2_000_000          # neither the training's nor the benchmark's
KINDS = ("epidural", "subdural_acute", "intraparenchymal", "infarct_late", "hydrocephalus", "tumour")


def run(title: str, *command: str | Path) -> None:
    """One step as its own program. Raises SystemExit with its code where it fails."""
    print(f"\n=== {title}\n$ python {' '.join(map(str, command))}", flush=True)
    code = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT).returncode
    if code:
        print(f"\nstopped: this step ended with {code}; run the same command again to go on", file=sys.stderr)
        raise SystemExit(code)


def summary(scores: Path, labels: Path) -> str:
    """The worklist with the truth beside it, highest score first."""
    with open(labels, newline="", encoding="utf-8") as file:
        truth = {row["scan_id"]: row["types"].replace("_", " ") or "healthy" for row in csv.DictReader(file)}
    lines = [f"{'scan':16} {'score':>9} {'percentile':>11} {'flagged':>8}   truth"]
    with open(scores, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            flagged = {"1": "yes", "0": "no"}.get(row["flagged"], "-")
            percentile = f"{rounded_down(float(row['percentile'])):.1f}" if row["percentile"] else "-"
            score = f"{float(row['score']):.6g}" if row["score"] else ""
            lines.append(f"{row['scan_id']:16} {score:>9} {percentile:>11} {flagged:>8}   "
                         f"{truth[row['scan_id']]}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "head-128", help="model bundle")
    parser.add_argument("--out", type=Path, default=ROOT / "demos" / "out", help="folder for everything it writes")
    args = parser.parse_args(argv)
    started, out = time.perf_counter(), args.out.resolve()
    cohort, results, figures = out / "phantoms", out / "results", out / "figures"
    run("1/4 phantoms: 3 healthy heads, 6 with an emergency", "demos/phantom.py", "--healthy", "3", "--emergency", "6",
        "--kinds", ",".join(KINDS), "--seed", str(SEED), "--out", cohort)
    run("2/4 projection: the closest normal image of every slice", "projector.py", cohort / "scans", "--model",
        args.model.resolve(), "--out", results)
    run("3/4 evaluation against the truth", "evaluate.py", results / "scores.csv", cohort / "labels.csv", "--out",
        figures, "--slices", results / "slices.csv", "--slice-labels", cohort / "slices.csv", "--masks",
        cohort / "masks", "--maps", results)
    run("4/4 report", "-m", "detect.report", results, "--evaluation", figures / "metrics.json", "--out",
        out / "report.html")
    print(f"\n{summary(results / 'scores.csv', cohort / 'labels.csv')}\n\nreport: {out / 'report.html'}\n"
          f"{time.perf_counter() - started:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
