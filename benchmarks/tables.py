"""README's table of results from docs/results.json, and that file from what the benchmarks wrote.

    python benchmarks/tables.py                           # the table anew
    python benchmarks/tables.py --ct-ich runs/ct-ich --phe-sich runs/phe-sich --phantoms runs/phantom-benchmark

Each folder is the --out of benchmarks/ct_ich.py, benchmarks/phe_sich.py or demos/benchmark.py. The rows of the methods
in its metrics.json get these figures in its columns; --name gives the row of a further bundle, which the benchmarks
call by its folder. Exit codes: 0 done, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))                                      # run as a script from anywhere

from benchmarks.compare import OURS, name_of, shown
from config import exit_code

RESULTS, README = ROOT / "docs" / "results.json", ROOT / "README.md"
MARK = "<!-- by benchmarks/tables.py -->\n"


def cell(value: float | str, interval: Sequence[float] | str) -> tuple | None:
    """(value, low, high), or None where the data do not define one of them: 'undefined: <why>'."""
    return None if isinstance(value, str) or isinstance(interval, str) else (value, *interval)


def ct_ich(figures: dict) -> dict[str, dict]:
    """By column: a cell for every method."""
    first = figures["methods"][OURS]["scan"]
    headers = {"scan": f"CT-ICH, {first['abnormal']} + {first['normal']}: scan AUC", "slice": "slice AUC"}
    return {header: {method: cell(f[level]["auc"], f[level]["auc_delong"]) for method, f in figures["methods"].items()}
            for level, header in headers.items()}


def phe_sich(figures: dict) -> dict[str, dict]:
    return {f"PHE-SICH, {len(figures['scans'])}: peak within 15 mm":
            {method: tuple(f["near"]) for method, f in figures["methods"].items()}}


def phantoms(figures: dict) -> dict[str, dict]:
    first = figures["methods"][OURS]["all"]
    return {f"phantoms, {first['emergencies']} + {first['healthy']}, calibrated by others: scan AUC":
            {method: cell(f["all"]["scan_auc"], f["all"]["scan_auc_delong"])
             for method, f in figures["methods"].items()}}


BENCHMARKS = {"ct_ich": ct_ich, "phe_sich": phe_sich, "phantoms": phantoms}


def take(results: dict, benchmark: str, figures: dict, names: Mapping[str, str] | None = None) -> None:
    """Puts a benchmark's figures into results. names: of rows, where they are not name_of() a method.

    These are {'columns': {benchmark: [header]}, 'rows': {method: {benchmark: [cell]}}}. Ours goes by the name of its
    model. Other methods keep their cells unless the headers, with the numbers of scans, are others.
    """
    columns = BENCHMARKS[benchmark](figures)
    if results["columns"].get(benchmark) != list(columns):
        results["columns"][benchmark] = list(columns)
        for row in results["rows"].values():
            row.pop(benchmark, None)
    for method in figures["methods"]:
        name = figures["model"]["name"] if method == OURS else (names or {}).get(method) or name_of(method)
        results["rows"].setdefault(name, {})[benchmark] = [cells[method] for cells in columns.values()]
    results["rows"] = {name: row for name, row in results["rows"].items() if row}


def table(results: dict) -> str:
    """Markdown: a row a method."""
    columns = [(benchmark, i, header) for benchmark in BENCHMARKS
               for i, header in enumerate(results["columns"].get(benchmark, ()))]
    lines = ["| " + " | ".join(["method", *(header for _, _, header in columns)]) + " |",
             "| --- " * (len(columns) + 1) + "|"]
    for name, row in results["rows"].items():
        cells = [row[benchmark][i] if benchmark in row else None for benchmark, i, _ in columns]
        shares = ["" if cell is None else f"{shown(cell[0])} ({shown(tuple(cell[1:]))})" for cell in cells]
        lines.append(f"| {' | '.join([name, *shares])} |")
    return "\n".join(lines) + "\n"


def placed(text: str, new: str) -> str:
    """The text of README with the table after MARK replaced. ValueError without the mark."""
    before, mark, after = text.partition(MARK)
    if not mark:
        raise ValueError(f"{README}: expected the line {MARK.strip()} before the table of results")
    rest = after.lstrip("\n").split("\n\n", 1)[1]
    return before + MARK + "\n" + new + "\n" + rest


def make(args: argparse.Namespace) -> int:
    """Returns the exit code. Raises OSError and ValueError."""
    results, names = json.loads(RESULTS.read_text(encoding="utf-8")), dict(args.name)
    for benchmark in BENCHMARKS:
        if folder := getattr(args, benchmark):
            take(results, benchmark, json.loads((folder / "metrics.json").read_text(encoding="utf-8")), names)
    readme = placed(README.read_text(encoding="utf-8"), table(results))      # before either is written: it may fail
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    README.write_text(readme, encoding="utf-8")
    return 0


def named(text: str) -> tuple[str, str]:
    """A method and its row, for --name."""
    method, equals, row = text.partition("=")
    if not (method and equals and row):
        raise argparse.ArgumentTypeError(f"expected METHOD=ROW, got {text!r}")
    return method, row


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for benchmark in BENCHMARKS:
        parser.add_argument(f"--{benchmark.replace('_', '-')}", type=Path, metavar="FOLDER",
                            help="--out of that benchmark")
    parser.add_argument("--name", type=named, action="append", default=[], metavar="METHOD=ROW",
                        help="the row of a bundle that was given by --beside; its method is its folder's name")
    return exit_code(make, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
