"""README's table of results from docs/results.json, and that file from what the benchmarks wrote.

    python benchmarks/tables.py                           # the table anew
    python benchmarks/tables.py --ct-ich runs/ct-ich --phe-sich runs/phe-sich --phantoms runs/phantom-benchmark

Each folder is the --out of benchmarks/ct_ich.py, benchmarks/phe_sich.py or demos/benchmark.py. The rows of the methods
in its metrics.json get these figures in its columns; --name gives the row of a further bundle, which the benchmarks
call by its folder, and of any method that ran beside another model than the figures in its row.
Exit codes: 0 done, 2 wrong usage.
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

    These are {'columns': {benchmark: [header]}, 'rows': {method: {benchmark: [cell]}}, 'models': {method: {benchmark:
    name}}}, the model whose run the cells are of. Ours goes by the name of its model. Other methods keep their cells
    unless the headers, with the numbers of scans, are others. Raises ValueError where cells of a method would take the
    place of those beside another model, and its row is not in names.
    """
    columns, model = BENCHMARKS[benchmark](figures), figures["model"]["name"]
    models, names = results.setdefault("models", {}), names or {}
    if results["columns"].get(benchmark) != list(columns):
        results["columns"][benchmark] = list(columns)
        for row in (*results["rows"].values(), *models.values()):
            row.pop(benchmark, None)
    for method in figures["methods"]:
        name = model if method == OURS else names.get(method) or name_of(method)
        earlier = models.get(name, {}).get(benchmark, model)
        if earlier != model and method != OURS and method not in names:
            raise ValueError(f"--{benchmark.replace('_', '-')}: {method} is of a run of {model}, the row {name!r} of "
                             f"one of {earlier}; give it a row of its own, --name {method}=ROW, or replace that one, "
                             f"--name '{method}={name}'")
        models.setdefault(name, {})[benchmark] = model
        results["rows"].setdefault(name, {})[benchmark] = [cells[method] for cells in columns.values()]
    for kept in ("rows", "models"):
        results[kept] = {name: row for name, row in results[kept].items() if row}


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
    found = {benchmark: json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
             for benchmark in BENCHMARKS if (folder := getattr(args, benchmark))}
    methods = {method for figures in found.values() for method in figures["methods"]} - {OURS}
    if unknown := sorted(names.keys() - methods):
        raise ValueError(f"--name {', '.join(unknown)}: no such method in what is given; expected one of "
                         f"{', '.join(sorted(methods)) or 'a folder (as --ct-ich)'}; ours has its model's name")
    for benchmark, figures in found.items():
        take(results, benchmark, figures, names)
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
