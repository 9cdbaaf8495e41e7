"""How well emergencies are found in phantoms never seen: the shipped model, other bundles, and simple baselines.

    python demos/benchmark.py --model models/phantom-128 --data healthy.lmdb --out runs/phantom-benchmark

Makes phantoms with seeds of their own, projects them, fits the baselines to the database the model was trained on,
calibrates them on the scans it holds out, measures all on the same brain masks, and writes to --out

    metrics.json, table.md   every figure; the table, which is printed as well
    examples.png             one scan of each kind: query, closest normal, anomaly, query with the truth in red

Every scan's result is kept, so the same command goes on where it was stopped. It takes an hour or two on a CPU.

What the figures are. All of them are taken in the scan's own geometry and in the brain mask of the pipeline.
  scan AUC    emergencies (of one kind) against all healthy scans; DeLong's interval
  slice AUC   slices with at least 25 mm2 of truth against slices without any, intervals by scan (Obuchowski)
  pixel AP    average precision of |anomaly map| against the truth, over all brain pixels of the emergencies (of one
              kind) together; a random map would have the share of the truth
  Dice        mean over scans of |anomaly map| above the model's surprise_mask against the whole truth, inside the mask
              or not. A surprise means the same for every method, so one threshold serves all
  p           paired DeLong test of the scan AUC against ours, corrected by Holm for the number of methods, and by kind
              for that of methods and kinds
Nothing is chosen on these phantoms. 'Shipped mask' is the Dice of our mask.nii.gz.

Exit codes: 0 done, 2 wrong usage, 3 some phantoms failed; they are named and left out of every row.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))                                      # run as a script from anywhere

from benchmarks import compare
from benchmarks.compare import Method, Progress, say
from common.files import sha256
from config import RESUMES, exit_code
from ct.frame import PreprocessSettings
from ct.picture import RESIDUAL_FULL_HU, overlay_panels
from ct.read import ScanSource, find_scans
from ct.whole_head import UPSIDE_DOWN
from dataset import SliceDataset
from demos.figures import OURS, Case, Cohort, count_levels, example_sheet, report, table, typical
from demos.phantom import Job, make_cohort, plan
from detect import normative
from detect.measure import MEASURES
from evaluation.cohort import Key, read_scores, read_table, read_truth, read_volume, seconds_by_scan

FIRST_SEED = 1_000_000          # cohorts to learn from have smaller seeds
LARGEST = 10_000                # scans of a group
MARGIN_PX = 24                  # around the brain, in the pictures


def refuse_seen(jobs: list[Job], labels: Path, data: SliceDataset) -> None:
    """ValueError where a phantom is made with the seed of one in the training cohort's labels.csv.

    Or where the labels are not those of the database: then they would prove nothing.
    """
    training = {row["scan_id"]: int(row["seed"]) for row in read_table(labels, ("scan_id", "seed"))}
    unknown = [scan["scan_id"] for scan in data.manifest["scans"] if scan["scan_id"] not in training]
    if unknown:
        raise ValueError(f"--training-labels {labels}: has no row for {len(unknown)} scans of --data {data.path} "
                         f"({unknown[0]}, ...); give the labels.csv of the cohort that it was prepared from")
    seen = {job.seed for job in jobs} & set(training.values())
    if seen:
        raise ValueError(f"--training-labels {labels}: {len(seen)} of its phantoms are in this benchmark, too; choose "
                         "another --seed")
    say(f"no seed of the {len(training)} training phantoms is among the {len(jobs)} of the benchmark")


# ---------------------------------------------------------------------------------------------------------------
# Projection

def project(folder: Path, model: Path, device: str) -> dict:
    """Runs projector.py over folder/scans; returns its run.json. It skips what it has finished before."""
    return compare.project(folder / "scans", model, folder / "results", device, name=folder.name)


# ---------------------------------------------------------------------------------------------------------------
# One scan: everything the figures need, in a few numbers

def measure(source: ScanSource, folder: Path, preprocessing: PreprocessSettings, methods: dict[str, Method],
            ours: dict[Key, float], own: str) -> dict[str, np.ndarray]:
    """One scan's counts and scores: truth_mm2 [S], shown [S], and for each method levels, slices [S] and seconds.

    ours: the projector's slice scores; own: how it makes a scan's of them, and so the others. Raises ValueError where
    the brain masks of methods differ.
    """
    scan_id, results = source.scan_id, folder / "results" / source.scan_id
    done = compare.run_methods(source, results, preprocessing, methods)
    scan, pre, brain = done.scan, done.pre, done.brain
    weighted, affine = read_volume(results / "anomaly.nii.gz")
    lesion = read_volume(results / "mask.nii.gz")[0] > 0
    truth, _ = read_truth(folder / "masks", scan_id, brain.shape, affine, "error")
    pixel_mm2, areas = float(np.prod(scan.pixel_spacing_mm)), truth.sum((1, 2))
    if UPSIDE_DOWN in scan.notes:                     # maps and truth lie as it came, slices count from its lower end
        areas = areas[::-1]
    found = {"truth_mm2": areas * pixel_mm2, "voxel_ml": pixel_mm2 * scan.slice_spacing_mm / 1000,
             "shown": pre.slabs.from_slabs(pre.kept[:, None, None])[:, 0, 0],
             "truth_pixels": truth.sum(), "mask_pixels": lesion.sum(), "mask_hits": (lesion & truth).sum(),
             f"{OURS}_levels": count_levels(weighted, truth, brain),
             f"{OURS}_slices": np.array([ours[scan_id, i] for i in range(len(brain))])}
    for name, scored in done.scored.items():
        found |= {f"{name}_levels": count_levels(scored.anomaly, truth, brain), f"{name}_slices": scored.slice_scores,
                  f"{name}_score": scored.scan_score(own), f"{name}_seconds": done.seconds[name]}
    return found


def measure_all(folder: Path, chosen: list[Case], run: dict, methods: dict[str, Method],
                key: str) -> tuple[Cohort, dict[str, str]]:
    """measure() of every scan, read from measures/ID.npz where it was made with the same key, projection and truth.

    Also returns why scans are left out: id -> the projector's reason.
    """
    preprocessing, own = PreprocessSettings.from_json(run["preprocessing"]), run["settings"]["scan_score"]
    projected = {row["scan_id"]: row for row in read_table(folder / "results" / "scores.csv", ("scan_id", "status"))}
    failed = {c.scan_id: projected[c.scan_id]["reason"] for c in chosen if projected[c.scan_id]["status"] != "ok"}
    ours = read_scores(folder / "results" / "slices.csv", by_slice=True)
    seconds = seconds_by_scan(folder / "results" / "seconds.csv")
    sources = {source.scan_id: source for source in find_scans(folder / "scans")}
    done = [case for case in chosen if case.scan_id not in failed]
    measures, progress = [], Progress("measures", len(done))
    for case in done:
        maps = [folder / "results" / case.scan_id / f"{name}.nii.gz" for name in ("anomaly", "mask")]
        maps.append(folder / "masks" / f"{case.scan_id}.nii.gz")
        kept, fresh = compare.remembered(
            folder / "measures" / f"{case.scan_id}.npz", compare.key_of(key, own, *map(sha256, maps)),
            lambda: measure(sources[case.scan_id], folder, preprocessing, methods, ours, own))  # noqa: B023 - at once
        score = float(projected[case.scan_id]["score"])
        measures.append(kept | {f"{OURS}_score": score, f"{OURS}_seconds": seconds[case.scan_id]})
        progress.line(case.scan_id, fresh)
    return Cohort(done, measures), failed


# ---------------------------------------------------------------------------------------------------------------
# Pictures

def example(scan_id: str, folder: Path, full: float) -> Image.Image:
    """Query, closest normal, anomaly and truth of the slice with the most truth, cut to the brain.

    full: the value of the anomaly map that is shown in the last colour.
    """
    query, truth = (read_volume(folder / kind / f"{scan_id}.nii.gz")[0] for kind in ("scans", "masks"))
    normal, weighted, brain = (read_volume(folder / "results" / scan_id / f"{name}.nii.gz")[0]
                               for name in ("reconstruction", "anomaly", "brain"))
    rows, columns = (np.flatnonzero(brain.any(axis)) for axis in ((0, 2), (0, 1)))
    cut = tuple(slice(max(0, i[0] - MARGIN_PX), i[-1] + 1 + MARGIN_PX) for i in (rows, columns))
    most = int(truth.sum((1, 2)).argmax())
    coloured = weighted * (RESIDUAL_FULL_HU / full)
    return overlay_panels(*(volume[most][cut] for volume in (query, normal, coloured, truth > 0)))


# ---------------------------------------------------------------------------------------------------------------
# Command

def benchmark(args: argparse.Namespace) -> int:
    """Every stage, each going on from what it kept; returns the exit code. Raises ValueError."""
    data = compare.open_database(args.data, "--data", args)
    folder, seed = args.out / "test", FIRST_SEED + 2 * args.seed
    jobs = plan(args.healthy, args.emergency, seed, folder)
    print(f"a cohort of the seed {seed}; those below {FIRST_SEED} are to learn from")
    if args.training_labels:
        refuse_seen(jobs, args.training_labels, data)
    make_cohort(args.healthy, args.emergency, seed, folder, nifti=True, workers=args.workers, log=say)
    run = project(folder, args.model, args.device)
    methods, key = compare.make_methods(args, data, run)
    cohort, failed = measure_all(folder, [Case(job.scan_id, job.kind) for job in jobs], run, methods, key)
    figures = report(cohort, [OURS, *methods], run["settings"]["scan_score"], run["settings"]["mask"]["surprise_mask"])
    figures |= {"failed": failed, "model": run["model"], "weights_sha256": run["weights_sha256"],
                "database": data.manifest["digest"], "settings": run["settings"], "seed": seed,
                "versions": run["versions"], "checked_against_training_seeds": args.training_labels is not None}
    shown = typical(cohort)
    full = RESIDUAL_FULL_HU if MEASURES[run["settings"]["measure"]].in_hu else normative.HIGHEST
    sheet = example_sheet({kind: example(scan_id, folder, full) for kind, scan_id in shown.items()})
    sheet.savefig(args.out / "examples.png", facecolor=sheet.get_facecolor())
    compare.write_figures(args.out, figures, table(figures))
    return 3 if failed else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    compare.add_arguments(parser, "--data")
    add("--training-labels", type=Path, metavar="CSV",
        help="labels.csv of the cohort the model was trained on: refuse to go on if a phantom is in both")
    add("--healthy", type=int, default=100, help="healthy phantoms (default %(default)s)")
    add("--emergency", type=int, default=200, help="emergencies, kinds in turn (default %(default)s)")
    add("--seed", type=int, default=0, help="another one makes other phantoms (default %(default)s)")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)),
        help="phantoms made at a time (default: one a CPU core)")
    args = parser.parse_args(argv)
    for flag in ("healthy", "emergency"):
        if not 2 <= getattr(args, flag) <= LARGEST:
            parser.error(f"--{flag} must be from 2 to {LARGEST}, got {getattr(args, flag)}")
    if args.seed < 0 or args.workers < 1:
        parser.error(f"--seed must be at least 0 and --workers at least 1, got {args.seed} and {args.workers}")
    return args


def main(argv: list[str] | None = None) -> int:
    return exit_code(benchmark, parse(argv), RESUMES)


if __name__ == "__main__":
    sys.exit(main())
