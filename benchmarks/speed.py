"""Speed of every job beside the plain reference path, in one run: a table, and JSON.

    python -m benchmarks.speed                                   # all rows this machine can measure
    python -m benchmarks.speed --only generator,median --repeats 7
    python -m benchmarks.speed --only paper512,ct256 --out runs/bench/gpu.json

Figures of a row come from one run in which reference and ours take turns; each is the median of --repeats. Rows that
need a GPU are measured where there is one, and those in bf16 where the CPU computes in it (AMX). Elsewhere
they say 'not measured'.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import skimage.filters
import torch
from scipy import ndimage

import distributed
import train
import train_encoder
from benchmarks import cohort, gpu, new_file, timed
from benchmarks.measure import REFERENCE, Row, bandwidth, machine, medians, operations, rate, side_by_side, table
from benchmarks.reference import ReferenceGenerator
from gan.inpainting import InpaintingTrainer
from gan.snapshots import Snapshot
from model import Discriminator, Generator, ModelConfig
from op.median import median2d

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
MODELS = ROOT / "models"
# What the CPU computes in by itself: where bf16 is emulated, a call would take minutes and say nothing of our program
PRECISIONS = ("fp32", "bf16") if distributed.pick_precision("auto", CPU) == torch.bfloat16 else ("fp32",)
SLOWER = "bf16 is no faster than fp32 on this CPU"


# ---------------------------------------------------------------------------------------------------------------
# Rows of the CPU

def generator_rows(repeats: int, config: ModelConfig, batch: int = 4, precisions: tuple[str, ...] = PRECISIONS
                   ) -> list[Row]:
    """Synthesis and its gradient with respect to w+, weights frozen: what a step of the projection pays for."""
    torch.manual_seed(0)
    ours, plain = (net(config).requires_grad_(False) for net in (Generator, ReferenceGenerator))
    plain.load_state_dict(ours.state_dict())
    w_plus = torch.randn(batch, config.n_latent, config.style_dim)

    def run(net, dtype):
        net.compute_dtype = dtype
        code = w_plus.clone().requires_grad_()
        net.synthesis(code, "const").square().mean().backward()

    types = {name: distributed.pick_precision(name, CPU) for name in precisions}
    variants = {name: lambda dtype=dtype: run(ours, dtype) for name, dtype in types.items()}
    samples = side_by_side({REFERENCE: lambda: run(plain, torch.float32)} | variants, CPU, repeats)
    spent, count = medians(samples), operations(lambda: run(ours, torch.float32))
    rows = []
    for name, least in (("fp32", 4), ("bf16", 12)):
        what, goal = f"cpu generator, forward and gradient, {name}", f"{least}x"
        if name not in types:
            rows.append(Row(what, "s", goal, note=SLOWER))
            continue
        rows.append(Row(what, "s", goal, spent[REFERENCE], spent[name], count / rate(CPU, types[name]),
                        spent[REFERENCE] / spent[name] >= least,
                        f"{config.size} px, batch {batch}, up to {config.channels(4)} channels",
                        {who: samples[who] for who in (REFERENCE, name)}))
    return rows


def training_rows(repeats: int, preset: str = "noise128", precisions: tuple[str, ...] = PRECISIONS) -> list[Row]:
    config = dataclasses.replace(train.PRESETS[preset], batch=8)
    return timed.training_row(f"cpu training step, {preset}", config, CPU, repeats, "4x", least_ratio=4,
                            precisions=precisions)


def encoder_row(repeats: int, preset: str = "ct128", model: ModelConfig | None = None,
                precisions: tuple[str, ...] = PRECISIONS) -> Row:
    """A step of train_encoder.py of the recommended kind, in which what is hidden is drawn; with its adversary.

    The reference is ours in float32, if that is not what the CPU does by itself.
    """
    model, config = model or train.PRESETS[preset].model(), train_encoder.PRESETS[preset]
    torch.manual_seed(0)
    networks = {"generator_ema": Generator(model), "discriminator": Discriminator(model)}
    gan = Snapshot(0, Path(), {name: net.state_dict() for name, net in networks.items()}, {},
                   {"model": dataclasses.asdict(model)})
    brain = torch.zeros(config.batch, model.size, model.size, dtype=torch.bool)
    middle = slice(model.size // 8, -model.size // 8)
    brain[:, middle, middle] = True
    slices = {"hu": torch.where(brain, 30 + 5 * torch.randn(brain.shape), -20.0), "brain": brain}
    best = precisions[-1]
    whose = {best: best} if best == "fp32" else {REFERENCE: "fp32", best: best}
    trainers = {who: InpaintingTrainer(dataclasses.replace(config, precision=precision), gan, (-20.0, 100.0), CPU)
                for who, precision in whose.items()}
    examples = trainers[best].prepare(slices, torch.Generator().manual_seed(0))
    samples = side_by_side({name: (lambda one=one: one.learn(examples, 1, True)) for name, one in trainers.items()},
                           CPU, repeats)
    spent = medians(samples, 1000 / config.batch)
    note = f"batch {config.batch}, with the adversary, without R1 (1 step in {config.r1_every})"
    return Row(f"cpu encoder's training step, {preset}, {best}", "s/kimg", "measured", spent.get(REFERENCE),
               spent[best], note=note + ("; reference: ours in fp32" if REFERENCE in spent else ""), samples=samples)


def median_row(repeats: int, shape=(32, 256, 256), size: int = 19, planes: int = 2) -> Row:
    """Against the unfold path, and against the better of scipy and scikit-image. They filter plane by plane: timed
    on some planes and counted for all."""
    x = torch.randn(shape)
    few, share = x[:planes], shape[0] / planes
    samples = side_by_side({
        REFERENCE: lambda: median2d(few, size, impl="ref"),
        "scipy": lambda: [ndimage.median_filter(plane, size) for plane in few.numpy()],
        "scikit-image": lambda: [skimage.filters.median(plane, np.ones((size, size))) for plane in few.numpy()],
        "ours": lambda: median2d(x, size),
    }, CPU, repeats)
    spent = medians(samples)
    unfold, best = share * spent[REFERENCE], share * min(spent["scipy"], spent["scikit-image"])
    return Row(f"cpu median {size}x{size}, {' x '.join(map(str, shape))}", "s", "20x; 1.5 of scipy's", unfold,
               spent["ours"], 2 * x.numel() * 4 / bandwidth(CPU), unfold / spent["ours"] >= 20
               and spent["ours"] <= 1.5 * best, f"the better of scipy and scikit-image {best:.3g} s "
               f"({best / spent['ours']:.1f}x); they and the unfold path timed on {planes} planes", samples)


def scan_rows(repeats: int, model: Path = MODELS / "head-128", slices: int = 24, flags: tuple[str, ...] = (),
              precisions: tuple[str, ...] = PRECISIONS) -> list[Row]:
    """projector.py on one scan as a process of its own, in fp32 (the reference) and bf16 by turns: time, memory, maps.

    On a CPU that does not compute in bf16, time and memory alone.
    """
    samples: dict[str, dict[str, list[float]]] = {p: {} for p in precisions}
    with tempfile.TemporaryDirectory() as folder:
        scan, residuals = Path(folder) / "head.nii.gz", {}
        write_head(scan, slices)
        for turn in range(repeats):
            for precision, measured in samples.items():
                out = Path(folder) / f"{precision}-{turn}"
                for key, value in project_scan(scan, model, out, precision, flags).items():
                    measured.setdefault(key, []).append(value)
                if turn == 0:
                    residuals[precision] = load_maps(out)
    middle, best = {p: medians(measured) for p, measured in samples.items()}, precisions[-1]
    ours, plain = middle[best], middle["fp32"] if best != "fp32" else {}
    what = " ".join((model.name, *flags))
    note = f"{slices} slices of an ellipsoid head, {what}, a process of its own, start to end"
    reference = "reference: ours in fp32" if plain else ""
    rows = [
        Row(f"cpu projector.py, {what}", "s", "under 60 s", plain.get("seconds"), ours["seconds"], None,
            ours["seconds"] < 60, f"{note}; {reference}" if plain else note,
            {p: s["seconds"] for p, s in samples.items()}),
        Row(f"cpu projector.py, {what}, memory", "GB", "under 3 GB", plain.get("peak_gb"), ours["peak_gb"], None,
            ours["peak_gb"] < 3, reference, {p: s["peak_gb"] for p, s in samples.items()}),
    ]
    error, score = (f"bf16 against fp32, {what}: {of}" for of in ("error", "score"))
    if not plain:
        return [*rows, Row(error, "HU", "measured", note=SLOWER), Row(score, "", "measured", note=SLOWER)]
    brain = residuals["fp32"]["brain"] > 0
    apart = np.abs(residuals["fp32"]["reconstruction"] - residuals[best]["reconstruction"])[brain].mean()
    return [
        *rows,
        Row(error, "HU", "measured", plain["error_hu"], ours["error_hu"], None, None,
            f"mean over the brain after the search of the code; the two reconstructions differ by {apart:.2g} HU there",
            {p: s["error_hu"] for p, s in samples.items()}),
        Row(score, "", "measured", plain["score"], ours["score"], None, None, "reference: fp32",
            {p: s["score"] for p, s in samples.items()}),
    ]


def project_scan(scan: Path, model: Path, out: Path, precision: str, flags: tuple[str, ...] = ()) -> dict[str, float]:
    """Seconds and peak memory (GB) of a run of projector.py, and the scan's score and reconstruction error (HU).

    Raises RuntimeError with its output when it fails.
    """
    run = cohort.watched(cohort.projector(scan, model, out, ("--precision", precision, *flags)))
    with open(out / "scores.csv", newline="", encoding="utf-8") as f:
        (row,) = csv.DictReader(f)
    return {"seconds": run.seconds, "cpu_seconds": run.cpu_seconds, "peak_gb": run.peak_gb,
            "score": float(row["score"]), "error_hu": float(row["error_hu"])}


def cohort_rows(repeats: int, model: Path = MODELS / "head-128", scans: int = 12, size: int = 512, slices: int = 30
                ) -> list[Row]:
    """projector.py over a folder of scans, in one process: reading, networks and writing of successive scans overlap.

    The reference is a scan alone in a process of its own.
    """
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        one, many = Path(folder) / "one", Path(folder) / "many"
        for place in (one, many):
            place.mkdir()
        for number in range(scans):
            write_head(many / f"head{number:03d}.nii.gz", slices, size, seed=number)
        write_head(one / "head.nii.gz", slices, size)
        for turn in range(repeats):
            for who, place, count in ((REFERENCE, one, 1), ("cohort", many, scans)):
                run = cohort.watched(cohort.projector(place, model, Path(folder) / f"{who}-{turn}"))
                for key, value in (("", run.seconds / count), (" CPU", run.cpu_seconds / count),
                                   (" first tenth GB", run.held_gb(0)), (" last tenth GB", run.held_gb(9)),
                                   (" GB", run.peak_gb)):
                    samples.setdefault(who + key, []).append(value)
    middle = medians(samples)
    what = f"{model.name}, {scans} scans"
    note = f"{slices} slices of {size} x {size}; reference: one scan in a process of its own, start to end"
    return [
        Row(f"cpu cohort, {what}: time per scan", "s", "1.4 s on two cores", middle[REFERENCE], middle["cohort"], None,
            middle["cohort"] <= 1.4, f"{note}; {3600 / middle['cohort']:.0f} scans an hour", samples),
        Row(f"cpu cohort, {what}: CPU time per scan", "s", "2.8 s", middle[f"{REFERENCE} CPU"], middle["cohort CPU"],
            None, middle["cohort CPU"] <= 2.8, note),
        Row(f"cpu cohort, {what}: memory", "GB", "under 3 GB", middle[f"{REFERENCE} GB"], middle["cohort GB"], None,
            middle["cohort GB"] < 3, f"{middle['cohort first tenth GB']:.2f} GB in the first tenth of the scans, "
            f"{middle['cohort last tenth GB']:.2f} GB in the last"),
        Row(f"cpu one scan alone, {model.name}", "s", "3 s", None, middle[REFERENCE], None, middle[REFERENCE] <= 3,
            note),
    ]


def load_maps(out: Path) -> dict[str, np.ndarray]:
    """The maps of the one scan in a results folder, by name."""
    return {path.name.split(".")[0]: np.asarray(nib.load(path).dataobj) for path in out.glob("*/*.nii.gz")}


def write_head(path: Path, slices: int, size: int = 192, seed: int = 0) -> None:
    """A head of ellipsoids as NIfTI, 5 mm slices: skin, skull, brain, ventricles, a bleed of 65 HU; noise of 3 HU."""
    step = np.array([230 / size, 230 / size, 5.0])
    x, y, z = np.meshgrid(*((np.arange(n) - (n - 1) / 2) * s for n, s in zip((size, size, slices), step)),
                          indexing="ij")
    hu = np.full(x.shape, -1000.0)
    for radii, centre, value in (
        ((74, 90, 79), (0, 0, -8), 40), ((68, 84, 73), (0, 0, -8), 1000), ((62, 78, 67), (0, 0, -8), 34),
        ((6, 25, 14), (9, 5, 0), 8), ((6, 25, 14), (-9, 5, 0), 8), ((14, 14, 14), (35, 10, 5), 65),
    ):
        hu[sum(((a - c) / r) ** 2 for a, c, r in zip((x, y, z), centre, radii)) <= 1] = value
    hu += np.random.default_rng(seed).normal(0, 3, hu.shape)
    nib.save(nib.Nifti1Image(hu.astype(np.int16), np.diag([*step, 1])), path)


CPU_ROWS: dict[str, Callable[[int], list[Row]]] = {
    "generator": lambda repeats: generator_rows(repeats, ModelConfig(size=128)),
    "training": training_rows,
    "training-ct128": lambda repeats: training_rows(repeats, "ct128", PRECISIONS[-1:]),
    "encoder": lambda repeats: [encoder_row(repeats)],
    "median": lambda repeats: [median_row(repeats)],
    "scan": lambda repeats: scan_rows(repeats) + scan_rows(repeats, MODELS / "head-256"),
    "cohort": cohort_rows,
    # The published search, 100 + 100 steps with votes: minutes a run in fp32, so it is run once
    "scan-published": lambda repeats: scan_rows(1, MODELS / "heads-128", flags=("--preset", "published")),
}

# ---------------------------------------------------------------------------------------------------------------
# Command

def measure(names: list[str], device: torch.device, repeats: int) -> list[Row]:
    rows = []
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        if name in CPU_ROWS:
            rows += CPU_ROWS[name](repeats)
        elif device.type == "cuda":
            rows += gpu.GPU_ROWS[name](device, repeats, True)
            torch.cuda.empty_cache()
        else:
            rows.append(Row(f"gpu {name}", "", "-", note="no GPU on this machine"))
    return rows


def main(argv: list[str] | None = None) -> int:
    known = [*CPU_ROWS, *gpu.GPU_ROWS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"rows to measure, comma-separated: {', '.join(known)}")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of a figure; their median counts")
    parser.add_argument("--out", type=new_file, help="JSON file for the rows, every sample and the machine")
    args = parser.parse_args(argv)
    names = args.only.split(",") if args.only else known
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"--only: no row {', '.join(unknown)}; there are {', '.join(known)}")
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    device = distributed.pick_device("auto")
    rows, facts = measure(names, device, args.repeats), machine(device)
    print(f"{facts['date']}, {facts['cpu']} ({facts['bf16']}), {facts['threads']} threads, GPU: {facts['gpu']}, "
          f"torch {facts['torch']}")
    print(table(rows))
    if args.out:
        found = [dataclasses.asdict(row) | {"ratio": row.ratio} for row in rows]
        args.out.write_text(json.dumps({"machine": facts, "rows": found}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
