"""Does the brain mask keep what is inside the skull and leave out what is not? Counted on points placed by eye.

    python -m benchmarks.mask --points benchmarks/mask_points.csv --data ct-ich/train=FOLDER --data dicom-ge=FOLDER

mask_points.csv has one point a row: dataset, scan_id, slice (0 is the lowest), row, column in the source's pixels,
inside (1: brain, CSF or blood, which the mask must hold; 0: orbit, sinus, mastoid, face, bone, scalp, which it must
not) and structure. The points were placed by anatomy, most of them where a mask is likely to fail, so the shares say
how hard cases fare and which change helps, not what share of all voxels is wrong. The mask is ct/frame.py's: of
the slabs, brought back to the slices.

leak  share of the 0 points that are inside the mask
loss  share of the 1 points that are outside it
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage as ndi

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # run as a script from anywhere

from common.files import read_table
from ct.brain import brain_mask, estimate_pixel_mm
from ct.frame import PreprocessSettings
from ct.read import ScanSource, find_scans, read_scan
from ct.scan import Scan
from ct.slab import to_slabs

COLUMNS = ("dataset", "scan_id", "slice", "row", "column", "inside", "structure")


@dataclass(frozen=True)
class Point:
    """A hand-placed point: pixel (slice, row, column) of a scan of a dataset, and whether it is intracranial."""

    dataset: str
    scan_id: str
    pixel: tuple[int, int, int]
    inside: bool
    structure: str


@dataclass(frozen=True)
class Verdict:
    """A point, and how far the mask's border is from it in its slice, mm: positive inside the mask, infinite if none.

    wrong: the mask holds a point that it must not hold, or does not hold one that it must.
    """

    point: Point
    depth_mm: float

    @property
    def wrong(self) -> bool:
        return (self.depth_mm > 0) != self.point.inside


def read_points(path: Path) -> list[Point]:
    """The points of a CSV file. ValueError names the line that is not one, or the file if it is none."""
    points = []
    for row in read_table(path, COLUMNS, flag="--points"):
        dataset, scan_id, *pixel, inside, structure = cells = [row[column].strip() for column in COLUMNS]
        if not (dataset and scan_id and structure and inside in ("0", "1") and all(n.isdecimal() for n in pixel)):
            raise ValueError(f"--points {path}, line {row.line}: expected names, whole numbers for slice, row and "
                             f"column, and 0 or 1 for inside; found {','.join(cells)}")
        points.append(Point(dataset, scan_id, tuple(map(int, pixel)), inside == "1", structure))
    if not points:
        raise ValueError(f"--points {path}: no points in it")
    return points


def sources(points: list[Point], folders: dict[str, Path]) -> dict[tuple[str, str], ScanSource]:
    """The scans that the points lie in, by (dataset, scan_id). ValueError where a dataset or a scan is missing."""
    wanted = {(p.dataset, p.scan_id) for p in points}
    missing = sorted({dataset for dataset, _ in wanted} - folders.keys())
    if missing:
        raise ValueError(f"no folder for {', '.join(missing)}: add --data {missing[0]}=FOLDER, or take its points out")
    found = {(name, source.scan_id): source for name, folder in folders.items() for source in find_scans(folder)}
    absent = sorted(wanted - found.keys())
    if absent:
        dataset, scan_id = absent[0]
        raise ValueError(f"--data {dataset}={folders[dataset]}: no scan {scan_id} there, and {len(absent) - 1} more "
                         "that the points lie in are missing")
    return {key: found[key] for key in sorted(wanted)}


def judge(points: list[Point], scan: Scan) -> list[Verdict]:
    """The verdicts on the points of one scan. ValueError for a point outside the scan."""
    slabs = to_slabs(scan, PreprocessSettings.slab_mm, PreprocessSettings.thin_mm)
    mask = slabs.from_slabs(brain_mask(slabs.scan))
    spacing_mm = scan.pixel_spacing_mm or (estimate_pixel_mm(scan),) * 2
    verdicts = []
    for point in points:
        if any(n >= size for n, size in zip(point.pixel, mask.shape)):
            raise ValueError(f"{point.scan_id}: the point at slice, row, column {point.pixel} is outside the scan, "
                             f"{mask.shape}: check that the points belong to this data")
        verdicts.append(Verdict(point, _depth_mm(mask[point.pixel[0]], point.pixel[1:], spacing_mm)))
    return verdicts


def _depth_mm(mask: np.ndarray, pixel: tuple[int, int], spacing_mm: tuple[float, float]) -> float:
    held = bool(mask[pixel])
    same = np.pad(mask == held, 1, constant_values=not held)   # beyond the picture nothing is held
    distance = np.inf if same.all() else ndi.distance_transform_edt(same, sampling=spacing_mm)[1:-1, 1:-1][pixel]
    return float(distance if held else -distance)


def report(verdicts: list[Verdict]) -> str:
    """Leak and loss by structure, and every point that the mask has wrong."""
    lines = []
    for inside, measure in ((False, "leak"), (True, "loss")):
        groups: dict[str, list[Verdict]] = defaultdict(list)
        for verdict in verdicts:
            if verdict.point.inside is inside:
                groups[verdict.point.structure].append(verdict)
        everything = [v for group in groups.values() for v in group]
        for name, group in [*sorted(groups.items()), ("all", everything)]:
            wrong = sum(v.wrong for v in group)
            share = f"{wrong / len(group):6.1%}" if group else "     -"
            lines.append(f"{measure}  {name:<16} {share}  {wrong:>3} of {len(group)}")
        lines.append("")
    for v in verdicts:
        if v.wrong:
            p = v.point
            kind = "lost, the mask is" if p.inside else "leak, the mask's outside is"
            away = "not on the slice" if np.isinf(v.depth_mm) else f"{abs(v.depth_mm):.1f} mm away"
            lines.append(f"{p.dataset} {p.scan_id} slice {p.pixel[0]} row {p.pixel[1]} column {p.pixel[2]}  "
                         f"{p.structure}: {kind} {away}")
    return "\n".join(lines)


def _named_folder(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise argparse.ArgumentTypeError(f"expected NAME=FOLDER, NAME as in the column 'dataset', found {text!r}")
    return name, Path(folder)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--points", type=Path, required=True, help="CSV file of points")
    p.add_argument("--data", type=_named_folder, action="append", required=True, metavar="NAME=FOLDER",
                   help="where a dataset of the points lies; once for each")
    args = p.parse_args(argv)
    try:
        points = read_points(args.points)
        verdicts = []
        for key, source in sources(points, dict(args.data)).items():
            verdicts += judge([point for point in points if (point.dataset, point.scan_id) == key], read_scan(source))
    except ValueError as error:
        p.error(str(error))
    print(report(verdicts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
