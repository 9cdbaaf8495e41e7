"""The slices and the split of head-128.sh: which slices train, and which scans are held out.

    python recipes/ct_ich_tables.py CT_ICH PHE_SICH OUT

CT_ICH holds scans.csv (scan_id, split, slices, label): its scans of split 'train' are healthy, label 0. PHE_SICH holds
slices.csv (scan_id, slice, label): label 1 where a bleed shows. Writes for prepare.py

    OUT/keep.csv            scan_id, slice: every slice of the healthy scans, and of the others those more than FAR
                            slices from any with a bleed
    OUT/all.csv             scan_id, split: every healthy scan val, everything else train

Exit codes: 0 done, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

FAR = 3


def read(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file. ValueError names a missing column."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        if missing := [name for name in columns if name not in (rows.fieldnames or ())]:
            raise ValueError(f"{path}: expected the columns {', '.join(columns)}; {', '.join(missing)} missing")
        return list(rows)


def write(path: Path, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])


def whole_number(path: Path, line: int, row: dict[str, str], column: str) -> int:
    """ValueError names what is none."""
    if not (row[column] or "").isdecimal():
        raise ValueError(f"{path}, line {line}: {column} {row[column]!r} of {row['scan_id']}; expected a whole number")
    return int(row[column])


def healthy_scans(path: Path) -> dict[str, int]:
    """The number of slices of every scan of split 'train'. path: scans.csv. ValueError names one not labelled 0."""
    healthy = {}
    for line, row in enumerate(read(path, ("scan_id", "split", "slices", "label")), 2):
        if row["split"] != "train":
            continue
        if row["label"] != "0":                      # it would calibrate, and a bleed be as usual as healthy brain
            raise ValueError(f"{path}, line {line}: label {row['label']!r} of {row['scan_id']}, which is of split "
                             "'train'; expected 0: those are the healthy ones. Give it another split")
        healthy[row["scan_id"]] = whole_number(path, line, row, "slices")
    if not healthy:
        raise ValueError(f"{path}: no scan of split 'train'; those are the healthy ones")
    return healthy


def far_slices(path: Path) -> list[tuple[str, int]]:
    """(scan_id, slice) of what lies more than FAR slices from any with a bleed in the same scan, in the rows' order.

    path: slices.csv. ValueError names a row whose label is neither 0 nor 1, or whose slice is no number.
    """
    bleeds: dict[str, set[int]] = {}
    every = []
    for line, row in enumerate(read(path, ("scan_id", "slice", "label")), 2):
        every.append((row["scan_id"], whole_number(path, line, row, "slice")))
        if row["label"] not in ("0", "1"):           # such as 1.0: taken for 0, a bleed would train as healthy
            raise ValueError(f"{path}, line {line}: label {row['label']!r} of {row['scan_id']}, slice {row['slice']}; "
                             "expected 1 where a bleed shows, else 0, written so")
        if row["label"] == "1":
            bleeds.setdefault(row["scan_id"], set()).add(every[-1][1])
    return [(scan_id, number) for scan_id, number in every
            if all(abs(number - bleed) > FAR for bleed in bleeds.get(scan_id, ()))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ct_ich", type=Path)
    parser.add_argument("phe_sich", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args(argv)
    try:
        healthy = healthy_scans(args.ct_ich / "scans.csv")
        far = far_slices(args.phe_sich / "slices.csv")
        args.out.mkdir(parents=True, exist_ok=True)
        whole = [(scan_id, number) for scan_id, slices in healthy.items() for number in range(slices)]
        write(args.out / "keep.csv", ("scan_id", "slice"), whole + far)
        splits = dict.fromkeys(dict(far), "train") | dict.fromkeys(healthy, "val")
        write(args.out / "all.csv", ("scan_id", "split"), splits.items())
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
