"""A sheet of phantoms to look at: healthy heads, and every kind of emergency beside what it looks like in life.

    python demos/gallery.py PHANTOMS --out gallery.png

PHANTOMS is a folder made by demos/phantom.py. Brain window, 0 to 80 HU; the truth is outlined on the right.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from itertools import zip_longest
from pathlib import Path

import matplotlib

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))                                      # run as a script from anywhere
matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from ct.read import ScanSource, find_scans, read_scan
from ct.scan import ScanError
from evaluation.cohort import InputError, read_table, read_volume

HEADS = 16
IN_LIFE = {
    "epidural": "Dense lens between skull and dura, bulging inwards, ending at the sutures.",
    "subdural_acute": "Dense crescent along convexity, falx or tentorium; crosses sutures, shifts the midline.",
    "subdural_chronic": "Crescent of 15 to 30 HU, at times with fresh blood in layers; sulci beneath are gone.",
    "subarachnoid": "Blood in the basal cisterns and Sylvian fissures, or in a few sulci of the convexity.",
    "intraparenchymal": "Dense, irregular, in basal ganglia, thalamus, lobe, cerebellum or pons, a dark rim of oedema.",
    "intraventricular": "Dense in the ventricles, sinking to the back of the horns in a patient who lies.",
    "infarct_early": "Grey and white matter of one territory lose their contrast; at times a dense artery.",
    "infarct_late": "A dark wedge of 10 to 22 HU up to the cortex, swollen or, later, shrunken.",
    "hydrocephalus": "Wide, round ventricles, tight sulci, dark seams about the frontal horns.",
    "tumour": "A mass with fingers of oedema in the white matter, which spare the cortex.",
    "hypoxic": "Grey-white contrast lost on both sides, brain swollen, sulci and cisterns narrow.",
    "aneurysm": "A round dense spot of 6 to 20 mm at the circle of Willis, at times with blood about it.",
}


def show(axes: Axes, hu: np.ndarray, truth: np.ndarray | None = None) -> None:
    """A slice [H, W] in the brain window, cropped to the head, with the outline of its truth."""
    rows, columns = (np.flatnonzero((hu > -300).sum(axis) > 20) for axis in (1, 0))
    extent = np.s_[rows[0]:rows[-1], columns[0]:columns[-1]]
    axes.imshow(hu[extent], cmap="gray", vmin=0, vmax=80)
    if truth is not None and truth[extent].any():
        axes.contour(truth[extent], levels=[0.5], colors="red", linewidths=0.7)
    axes.set_axis_off()


def gallery(phantoms: Path) -> plt.Figure:
    """The sheet. Raises InputError, ScanError."""
    types = {row["scan_id"]: row["types"] for row in read_table(phantoms / "labels.csv", ("scan_id", "types"))}
    scans = {source.scan_id: source for source in find_scans(phantoms / "scans")}
    heads = [scan_id for scan_id, kind in types.items() if not kind][:HEADS]
    first = {kind: scan_id for scan_id, kind in reversed(types.items()) if kind}
    shown = [kind for kind in IN_LIFE if kind in first]
    rows, emergency_rows = -(-len(heads) // 8), -(-len(shown) // 3)
    heights = [height for height in (2.4 * rows, 2.6 * emergency_rows) if height]
    if not heights:
        raise InputError(f"{phantoms / 'labels.csv'}: has no healthy phantom and no emergency of a known type")
    figure = plt.figure(figsize=(16, sum(heights)), facecolor="white", layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if heads:
        show_heads(parts[0], [scans[scan_id] for scan_id in heads], rows)
    if shown:
        show_emergencies(parts[-1], {kind: scans[first[kind]] for kind in shown}, phantoms / "masks", emergency_rows)
    return figure


def show_heads(part: SubFigure, heads: list[ScanSource], rows: int) -> None:
    """A slice of each, eight in a row."""
    levels = np.linspace(0.30, 0.72, len(heads))                   # from the posterior fossa to the convexity
    for axes, source, level in zip_longest(part.subplots(rows, 8, squeeze=False).flat, heads, levels):
        axes.set_axis_off()
        if source is not None:
            hu = read_scan(source).hu
            show(axes, hu[round(level * len(hu))])


def show_emergencies(part: SubFigure, first: dict[str, ScanSource], masks: Path, rows: int) -> None:
    """By kind: the slice with the most truth, the same with its outline, and a text; three kinds in a row."""
    grid = part.subplots(rows, 9, squeeze=False, width_ratios=[1, 1, 1.1] * 3).reshape(-1, 3)
    for axes in grid.flat:
        axes.set_axis_off()
    for (plain, outlined, text), (kind, source) in zip(grid, first.items(), strict=False):
        hu, truth = read_scan(source).hu, read_volume(masks / f"{source.scan_id}.nii.gz")[0] > 0
        most = int(truth.sum((1, 2)).argmax())
        show(plain, hu[most])
        show(outlined, hu[most], truth[most])
        text.text(0, 0.95, kind.replace("_", " "), weight="bold", va="top", transform=text.transAxes)
        text.text(0, 0.80, "\n".join(textwrap.wrap(IN_LIFE[kind], 26)), va="top", size=9, transform=text.transAxes)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phantoms", type=Path, help="folder made by demos/phantom.py")
    parser.add_argument("--out", type=Path, required=True, help="the picture to write, .png")
    args = parser.parse_args(argv)
    try:
        gallery(args.phantoms).savefig(args.out, dpi=70)
    except (InputError, ScanError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
