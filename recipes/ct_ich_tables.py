"""The slices and the split of head-128.sh: which slices train, and which scans are held out.

    python recipes/ct_ich_tables.py CT_ICH PHE_SICH OUT

CT_ICH holds scans.csv (scan_id, split, slices): its scans of split 'train' are healthy. PHE_SICH holds slices.csv
(scan_id, slice, label): label 1 where a bleed shows. Writes for prepare.py

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


def far_slices(rows: Sequence[dict[str, str]]) -> list[tuple[str, int]]:
    """(scan_id, slice) of what lies more than FAR slices from any with a bleed in the same scan, in the rows' order."""
    bleeds: dict[str, set[int]] = {}
    for row in rows:
        if row["label"] == "1":
            bleeds.setdefault(row["scan_id"], set()).add(int(row["slice"]))
    return [(row["scan_id"], int(row["slice"])) for row in rows
            if all(abs(int(row["slice"]) - bleed) > FAR for bleed in bleeds.get(row["scan_id"], ()))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ct_ich", type=Path)
    parser.add_argument("phe_sich", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args(argv)
    try:
        scans = read(args.ct_ich / "scans.csv", ("scan_id", "split", "slices"))
        healthy = {row["scan_id"]: int(row["slices"]) for row in scans if row["split"] == "train"}
        if not healthy:
            raise ValueError(f"{args.ct_ich / 'scans.csv'}: no scan of split 'train'; those are the healthy ones")
        far = far_slices(read(args.phe_sich / "slices.csv", ("scan_id", "slice", "label")))
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
