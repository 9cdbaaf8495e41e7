"""Where the map points: localisation of haemorrhage on PHE-SICH-CT-IDS, beside chance and the baselines.

    python benchmarks/phe_sich.py --data phe-sich --database healthy.lmdb --model models/head-128 --out runs/phe-sich

--data is a folder with scans/ (a folder of slices a scan) and masks/SCAN/NN.png, where NN is the slice from 0 upwards;
a slice without a mask holds no marking. Writes to --out metrics.json (every figure) and table.md. Every scan's result
is kept, so that the same command goes on where it was stopped.

The peak of a method is the brain pixel, among the slices that were projected, where |anomaly map| is highest after a
Gaussian of 5 mm in the slice's plane, the same for every method and divided by that of the brain mask, so that neither
one noisy pixel decides nor the brain's rim is disfavoured; among equals the first (from below, in front, from the
patient's right). Its distance is that to the nearest marked pixel, in three dimensions. A pixel spacing that the scan
does not tell is estimated from the skull, as everywhere.

  within 15 mm  share of scans whose peak is no further away, with Wilson's interval
  same side     share of scans whose peak lies on the side of the midline that most marked pixels lie on
  chance        what a random pixel among those that may be a peak would reach, mean over scans
  p             McNemar's exact test of 'within 15 mm' against ours, corrected by Holm for the number of methods

Exit codes: 0 done, 2 wrong usage, 3 some scans failed; they are named and left out of every row.
"""

from __future__ import annotations

import argparse
import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from scipy import ndimage, stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))                                      # run as a script from anywhere

from benchmarks import compare, new_file
from benchmarks.compare import OURS, Method, name_of, shown
from common.files import sha256
from common.wording import some
from config import RESUMES, exit_code
from ct.brain import estimate_pixel_mm
from ct.frame import PreprocessSettings
from ct.picture import grey, tile
from ct.read import ScanSource, find_scans, read_scan
from ct.scan import Scan
from ct.standardise import from_frame
from ct.whole_head import UPSIDE_DOWN
from dataset import SliceDataset
from detect.folder import make_writable
from evaluation import metrics
from evaluation.cohort import (
    InputError,
    marked_pixels,
    pictures_by_slice,
    read_table,
    read_truth,
    read_volume,
    seconds_by_scan,
)
from evaluation.metrics import Undefined, defined

SMOOTH_MM = 5.0                 # standard deviation
NEAR_MM = 15.0
TILE_PX, COLUMNS = 240, 8       # of the contact sheet


@dataclass(frozen=True)
class Place:
    """What a peak is held against, of one scan.

    allowed        bool [S, H, W]: where a peak may lie
    spacing_mm     between slices, rows and columns
    distance_mm    float [S, H, W] to the nearest marked pixel
    lateral        float [H, W]: to the left of the midline positive, to the right negative, as displayed
    marked_lateral median of that over the marked pixels
    """

    allowed: np.ndarray
    spacing_mm: tuple[float, float, float]
    distance_mm: np.ndarray
    lateral: np.ndarray
    marked_lateral: float

    @classmethod
    def of(cls, truth: np.ndarray, allowed: np.ndarray, spacing_mm: tuple[float, float, float],
           lateral: np.ndarray) -> Place:
        """truth bool [S, H, W], marked somewhere."""
        return cls(allowed, spacing_mm, ndimage.distance_transform_edt(~truth, spacing_mm), lateral,
                   float(np.median(np.broadcast_to(lateral, truth.shape)[truth])))

    def same_side(self) -> np.ndarray:
        """bool [H, W]."""
        return (self.lateral > 0) == (self.marked_lateral > 0)


def peak(values: np.ndarray, brain: np.ndarray, place: Place) -> tuple[int, int, int]:
    """Slice, row and column where |values| [S, H, W] is highest, smoothed within brain bool [S, H, W]."""
    sigma = (0.0, *(SMOOTH_MM / mm for mm in place.spacing_mm[1:]))
    high = ndimage.gaussian_filter(np.abs(values, dtype=np.float64) * brain, sigma, mode="constant")
    weight = ndimage.gaussian_filter(brain.astype(np.float64), sigma, mode="constant")
    smooth = np.full(brain.shape, -np.inf)
    smooth[place.allowed] = high[place.allowed] / weight[place.allowed]
    return tuple(int(i) for i in np.unravel_index(smooth.argmax(), smooth.shape))


def marked_as(shape: tuple[int, ...], masks: Path, scan: Scan, affine: np.ndarray) -> np.ndarray:
    """A scan's marked pixels, bool of the shape of its maps, where these lie as projector.py has written them."""
    return read_truth(masks, scan.scan_id, shape, affine, "empty", scan.position_mm, UPSIDE_DOWN in scan.notes)[0]


def measure(source: ScanSource, results: Path, masks: Path, preprocessing: PreprocessSettings,
            methods: dict[str, Method]) -> dict[str, np.ndarray]:
    """METHOD_peak [3], METHOD_mm and METHOD_side (bool) of ours and the others, METHOD_seconds of the others, chances.

    All are of the maps as projector.py writes them. results: the scan's folder among the projector's.
    """
    done = compare.run_methods(source, results, preprocessing, methods)
    ours, affine = read_volume(results / "anomaly.nii.gz")
    truth = marked_as(done.brain.shape, masks, done.scan, affine)
    frame = done.pre.standardised.frame
    allowed = done.pre.slabs.from_slabs(np.broadcast_to(done.pre.kept[:, None, None], done.pre.brain.shape))
    allowed = done.brain & compare.as_written(allowed, done.scan)
    columns = np.arange(frame.size, dtype=np.float32) - (frame.size - 1) / 2
    lateral = from_frame(np.tile(columns, (1, frame.size, 1)), frame)[0]
    pixel_mm = done.scan.pixel_spacing_mm or (estimate_pixel_mm(done.pre.slabs.scan),) * 2
    step_mm = np.ptp(done.scan.position_mm) / (len(ours) - 1) if len(ours) > 1 else done.scan.slice_spacing_mm
    place = Place.of(truth, allowed, (step_mm, *pixel_mm), lateral)
    maps = {OURS: ours} | {name: scored.anomaly for name, scored in done.scored.items()}
    near, side = place.distance_mm[place.allowed] <= NEAR_MM, np.broadcast_to(place.same_side(), ours.shape)
    figures = {"chance_near": near.mean(), "chance_side": side[place.allowed].mean()}
    for name, values in maps.items():
        at = peak(values, done.brain, place)
        figures |= {f"{name}_peak": np.array(at), f"{name}_mm": place.distance_mm[at], f"{name}_side": side[at]}
    return figures | {f"{name}_seconds": seconds for name, seconds in done.seconds.items()}


# ---------------------------------------------------------------------------------------------------------------
# Figures

def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided exact p of McNemar's test of paired outcomes, bool [n] both. Undefined where they never differ."""
    only = int((first & ~second).sum()), int((second & ~first).sum())
    if sum(only) == 0:
        raise Undefined("the two never differ")
    return float(stats.binomtest(only[0], sum(only)).pvalue)


def report(measures: dict[str, dict], methods: list[str]) -> dict:
    """The figures of metrics.json, from measure() by scan; methods begins with ours."""
    every = list(measures.values())
    near = {method: np.array([m[f"{method}_mm"] <= NEAR_MM for m in every]) for method in methods}
    found = {}
    tests = {method: defined(mcnemar, near[OURS], near[method]) for method in methods[1:]}
    corrected = metrics.holm(tests)
    for method in methods:
        side = np.array([m[f"{method}_side"] for m in every], bool)
        found[method] = {"near": metrics.proportion(int(near[method].sum()), len(every)),
                         "side": metrics.proportion(int(side.sum()), len(every)),
                         "median_mm": float(np.median([m[f"{method}_mm"] for m in every])),
                         "seconds_a_scan": float(np.mean([m[f"{method}_seconds"] for m in every]))}
        if method != OURS:
            found[method] |= {"p": tests[method], "p_holm": corrected[method]}
    return {"methods": found,
            "chance": {what: float(np.mean([m[f"chance_{what}"] for m in every])) for what in ("near", "side")},
            "scans": {scan_id: {method: {"mm": float(m[f"{method}_mm"]), "peak": m[f"{method}_peak"].tolist(),
                                         "same_side": bool(m[f"{method}_side"])} for method in methods}
                      for scan_id, m in measures.items()}}


def table(figures: dict) -> str:
    """Markdown: a row a method and one for chance; then what is to be known."""
    methods = figures["methods"]
    lines = [f"{len(figures['scans'])} scans, every one with a haemorrhage.", "",
             "| method | peak within 15 mm (95 %) | same side (95 %) | median distance, mm | seconds per scan | p |",
             "| --- " * 6 + "|"]
    for method, f in methods.items():
        shares = [f"{f[what][0]:.2f} ({shown(tuple(f[what][1:]))})" for what in ("near", "side")]
        p = shown(f["p_holm"], 3) if "p_holm" in f else ""
        lines.append(f"| {name_of(method)} | {' | '.join(shares)} | {f['median_mm']:.1f} | {f['seconds_a_scan']:.1f} | "
                     f"{p} |")
    chance = figures["chance"]
    lines.append(f"| chance, a random brain pixel | {chance['near']:.2f} | {chance['side']:.2f} | | | |")
    notes = [f"p: McNemar's exact test of 'within 15 mm' against ours, two-sided, Holm's correction for "
             f"{len(methods) - 1} methods."] if len(methods) > 1 else []
    if figures["trained_on"]:
        notes.append(f"Of {figures['trained_on']} of these scans the database holds slices; none of those is marked.")
    if figures["failed"]:
        notes.append("Failed and left out of every row: "
                     + "; ".join(f"{scan_id} ({why})" for scan_id, why in figures["failed"].items()) + ".")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]).rstrip() + "\n"


def contact_sheet(sources: list[ScanSource], results: Path, masks: Path, measures: dict[str, dict]) -> Image.Image:
    """Every scan's slice with the peak of ours: the peak as a red cross, the marking's edge in green."""
    tiles = []
    for source in sources:
        scan, m = read_scan(source), measures[source.scan_id]
        number, *at = (int(i) for i in m[f"{OURS}_peak"])
        brain, affine = read_volume(results / source.scan_id / "brain.nii.gz")
        marked = marked_as(brain.shape, masks, scan, affine)[number]
        picture = np.repeat(grey(compare.as_written(scan.hu, scan)[number])[..., None], 3, -1)
        picture[marked & ~ndimage.binary_erosion(marked)] = (60, 220, 60)
        one, (y, x), arm = Image.fromarray(picture), at, max(picture.shape) // 28
        draw = ImageDraw.Draw(one)
        for line in ((x - arm, y, x + arm, y), (x, y - arm, x, y + arm)):
            draw.line(line, fill=(255, 60, 40), width=max(1, arm // 6))
        one = ImageOps.pad(one, (TILE_PX, TILE_PX))
        text = f"{source.scan_id}, slice {number}: {m[f'{OURS}_mm']:.0f} mm"
        ImageDraw.Draw(one).text((4, 2), text, fill=(255, 255, 255))
        tiles.append(np.asarray(one))
    return Image.fromarray(tile(np.stack(tiles), COLUMNS))


# ---------------------------------------------------------------------------------------------------------------
# Command

def marked_slices(masks: Path, sources: list[ScanSource]) -> dict[str, set[int]]:
    """The slices of every scan in which a pixel is marked. InputError where a scan has none: before hours of work."""
    marked = {source.scan_id: {number for number, picture in pictures_by_slice(masks / source.scan_id).items()
                               if marked_pixels(picture).any()} for source in sources}
    if unmarked := [scan_id for scan_id, slices in marked.items() if not slices]:
        raise InputError(f"{masks}: expected for every scan a folder of masks, SCAN/NN.png, with a marked pixel; "
                         f"{len(unmarked)} have none: {some(unmarked, 5)}; add theirs, or leave these scans out")
    return marked


def trained_on(marked: dict[str, set[int]], data: SliceDataset) -> int:
    """How many of these scans the database holds slices of. ValueError where one of those slices is marked."""
    held = [scan for scan in data.manifest["scans"] if scan["scan_id"] in marked]
    for scan in held:
        if common := marked[scan["scan_id"]] & set(scan["slices"]):
            raise ValueError(f"--database {data.path}: holds marked slices of {scan['scan_id']} ({min(common)}, ...); "
                             "train without them")
    return len(held)


def mask_hashes(masks: Path, scan_id: str) -> dict[str, str]:
    """SHA-256 of a scan's masks by the file's name: a corrected mask makes other distances."""
    return {path.name: sha256(path) for path in sorted((masks / scan_id).glob("*.png"))}


def benchmark(args: argparse.Namespace) -> int:
    """Every stage, each going on from what it kept; returns the exit code. Raises ValueError."""
    make_writable(args.out)
    scans, masks, results = args.data / "scans", args.data / "masks", args.out / OURS
    for folder in (scans, masks):
        if not folder.is_dir():
            raise InputError(f"--data {args.data}: has no folder {folder.name}")
    sources = find_scans(scans)
    marked = marked_slices(masks, sources)
    data = compare.open_database(args.database, "--database", args)
    held = trained_on(marked, data)
    run = compare.project(scans, args.model, results, args.device, name=args.data.name)
    methods, key = compare.make_methods(args, data, run)
    preprocessing = PreprocessSettings.from_json(run["preprocessing"])
    rows = {row["scan_id"]: row for row in read_table(results / "scores.csv", ("scan_id", "status", "reason"))}
    failed = {scan_id: row["reason"] for scan_id, row in rows.items() if row["status"] != "ok"}
    seconds = seconds_by_scan(results / "seconds.csv")
    done, measures = [source for source in sources if source.scan_id not in failed], {}
    progress = compare.Progress("peaks", len(done))
    for source in done:
        kept, fresh = compare.remembered(
            args.out / "measures" / f"{source.scan_id}.npz",
            compare.key_of(key, sha256(results / source.scan_id / "anomaly.nii.gz"),
                           mask_hashes(masks, source.scan_id)),
            functools.partial(measure, source, results / source.scan_id, masks, preprocessing, methods))
        measures[source.scan_id] = kept | {f"{OURS}_seconds": seconds[source.scan_id]}
        progress.line(f"{source.scan_id}: ours {measures[source.scan_id][f'{OURS}_mm']:.0f} mm away", fresh)
    if not done:
        raise Undefined(f"--data {args.data}: no scan is left: {failed}")
    figures = report(measures, [OURS, *methods])
    figures |= {"failed": failed, "trained_on": held, **compare.facts(run, data)}
    compare.write_figures(args.out, figures, table(figures))
    if args.sheet:
        contact_sheet(done, results, masks, measures).save(args.sheet)
    return 3 if failed else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with scans/ and masks/")
    compare.add_arguments(parser, "--database")
    parser.add_argument("--sheet", type=new_file, metavar="PNG",
                        help="also write every scan's slice with the peak of ours")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return exit_code(benchmark, parse(argv), RESUMES)


if __name__ == "__main__":
    sys.exit(main())
