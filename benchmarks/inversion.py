"""How close, how sharp and how free of lesions a closest normal is, on held-out healthy scans and pasted lesions.

    python benchmarks/inversion.py --data heads.lmdb --model models/head-128 --baseline dae.safetensors \\
        --baseline pca.safetensors --out runs/inversion

A method is a function from the slices of a scan to their closest normals, reconstruct(hu, brain, below_vertex_mm).
What is measured of it, means over scans or lesions:

error      mean |query - reconstruction| of healthy scans in the brain, HU
sharpness  mean gradient magnitude of the reconstruction over that of the query, in the brain eroded by 3 pixels
erasure    1 - sum((R(lesion) - R(healthy)) * sign(c)) / sum(|c|) over a pasted lesion, where c is the change that the
           lesion makes to the query, clipped to 60 HU, and R the reconstruction: 1 where nothing of the lesion shows
           in the closest normal, 0 where it is drawn as it is

The lesions are those of pasted.py, clipped to the HU range of the database as a scan that holds them would be. Every
choice about the inversion is made on this table, with scans that the networks have not seen. A bundle is run with its
own settings and, in a second row, without what draws detail: inversion with its code alone (the generator's own noise
maps, and no steps on them), inpainting with every place drawn from its surroundings. Writes
table.md and figures.json. Exit codes: 0 done, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))                                      # run as a script from anywhere

import distributed
from benchmarks import baselines, compare, pasted
from config import exit_code
from ct.frame import PreprocessSettings
from dataset import SliceDataset
from detect.bundle import load_bundle
from detect.folder import make_writable
from detect.inpainting import Inpainting
from detect.inversion import bone_mask
from detect.reconstruct import Reconstructor, error_hu
from op import memory

MOST_CONTRAST_HU = 60.0      # of a lesion: what counts is that it is gone, not how bright it was
ERODED = 3                   # pixels at the rim of the brain where sharpness is not measured: the skull's edge is there
GOAL = {"error": "at most 3.4", "sharpness": "0.85 to 1.1", "erasure": "at least 0.90"}
GOAL_OF_A_KIND = "0.80"

# reconstruct(hu float32 [S, N, N], brain bool [S, N, N], below_vertex_mm float64 [S]) -> normal HU float32 [S, N, N]
Reconstruct = Callable[[torch.Tensor, torch.Tensor, np.ndarray], torch.Tensor]


@dataclass(frozen=True)
class HeldOut:
    """A healthy scan in the standard frame: hu float32 [S, N, N], brain bool [S, N, N], below_vertex_mm [S]."""

    scan_id: str
    hu: torch.Tensor
    brain: torch.Tensor
    below_vertex_mm: np.ndarray


def held_out_scans(data: SliceDataset, count: int | None = None) -> list[HeldOut]:
    """The first `count` scans of a split, or all."""
    scans = []
    for index, scan_id in enumerate(data.scan_ids[:count]):
        scan = data.scan(index)
        scans.append(HeldOut(scan_id, scan["hu"].float(), scan["brain"], scan["below_vertex_mm"].numpy()))
    return scans


# ---------------------------------------------------------------------------------------------------------------
# The figures

def sharpness(query: torch.Tensor, normal: torch.Tensor, brain: torch.Tensor) -> float:
    """Mean gradient magnitude of normal over that of query in the eroded brain. All [S, N, N].

    Central differences within the slice. Raises ValueError where the erosion leaves nothing, or a flat query.
    """
    inner = np.stack([ndimage.binary_erosion(one, iterations=ERODED) for one in brain.numpy()])
    if not inner.any():
        raise ValueError(f"sharpness: no brain is left after an erosion by {ERODED} pixels")
    drawn, shown = (np.hypot(*np.gradient(image.numpy(), axis=(1, 2)))[inner].mean() for image in (normal, query))
    if shown == 0:
        raise ValueError("sharpness: the query is the same everywhere in the brain")
    return float(drawn / shown)


def erasure(change: torch.Tensor, drawn: torch.Tensor, truth: torch.Tensor) -> float:
    """1 minus the part of a lesion's contrast that shows up in the closest normal.

    change [S, N, N], HU: query with the lesion minus query without; drawn [S, N, N]: the same of their closest
    normals; truth bool [S, N, N]: the lesion. Raises ValueError for a lesion that changes nothing.
    """
    contrast = change.clamp(-MOST_CONTRAST_HU, MOST_CONTRAST_HU)[truth]
    if not contrast.any():
        raise ValueError("erasure: the lesion does not change the query")
    return 1 - ((drawn[truth] * contrast.sign()).sum() / contrast.abs().sum()).item()


def evaluate(reconstruct: Reconstruct, scans: Sequence[HeldOut], side_mm: float, hu_clip: tuple[float, float],
             lesions: int = 1, say: Callable[[str], None] | None = None) -> dict:
    """The figures of a method on healthy scans and the lesions pasted into them.

    side_mm of a pixel (pasted.pixel_mm); hu_clip: the range that the scans are clipped to; lesions of each kind in
    each scan; say is told of every scan. Returns dict(error, sharpness, erasure, erasure_by_kind, lesions: their
    number by kind, scans: their number, left_out: lesions that found no room and why, seconds_per_slice).
    """
    if not scans:
        raise ValueError("evaluate: expected one scan at least")
    errors, sharp, left_out, seconds, slices = [], [], [], 0.0, 0
    erased: dict[str, list[float]] = {kind: [] for kind in pasted.KINDS}

    def drawn_for(hu: torch.Tensor, scan: HeldOut) -> torch.Tensor:
        nonlocal seconds, slices
        started = time.perf_counter()
        normal = reconstruct(hu, scan.brain, scan.below_vertex_mm).float().cpu()
        seconds, slices = seconds + time.perf_counter() - started, slices + len(hu)
        return normal

    for number, scan in enumerate(scans, 1):
        query = scan.hu.clamp(*hu_clip)
        healthy = drawn_for(query, scan)
        errors.append(error_hu(query, healthy, scan.brain))
        sharp.append(sharpness(query, healthy, scan.brain))
        found, reasons = pasted.paste_each(scan.scan_id, query.numpy(), scan.brain.numpy(), scan.below_vertex_mm,
                                           side_mm, lesions)
        left_out += reasons
        for lesion in found:
            ill = torch.from_numpy(lesion.hu).clamp(*hu_clip)
            erased[lesion.kind].append(erasure(ill - query, drawn_for(ill, scan) - healthy,
                                               torch.from_numpy(lesion.truth)))
        if say:
            say(f"{number}/{len(scans)}: error {errors[-1]:.2f} HU, sharpness {sharp[-1]:.2f}, erasure so far "
                f"{mean(sum(erased.values(), [])):.2f}")
    return {"error": mean(errors), "sharpness": mean(sharp), "erasure": mean(sum(erased.values(), [])),
            "erasure_by_kind": {kind: mean(values) for kind, values in erased.items()},
            "lesions": {kind: len(values) for kind, values in erased.items()}, "scans": len(scans),
            "left_out": left_out, "seconds_per_slice": seconds / slices}


def mean(values: Sequence[float]) -> float | None:
    """None of none: no lesion has found room."""
    return float(np.mean(values)) if len(values) else None


# ---------------------------------------------------------------------------------------------------------------
# Methods

def of(reconstructor: Reconstructor) -> Reconstruct:
    """What a method reconstructs, without the rest of a Reconstruction."""
    return lambda hu, brain, below_vertex_mm: reconstructor.closest_normal(hu, brain, below_vertex_mm).normal_hu


def from_surroundings(inpainting: Inpainting) -> Reconstruct:
    """The first stage of inpainting alone."""
    return lambda hu, brain, below_vertex_mm: inpainting.from_surroundings(
        *(part.to(inpainting.device) for part in (hu, bone_mask(hu))))


def methods(args: argparse.Namespace, data: SliceDataset) -> dict[str, Reconstruct]:
    """The rows of the table, by name. ValueError for two of one name, and where a method expects slices that were
    prepared in another way, or is known to have learnt from held-out ones."""
    device, preprocessing, found = distributed.pick_device(args.device), data.manifest["settings"], {}

    def add(flag: str, name: str, reconstruct: Reconstruct) -> None:
        if name in found:
            raise ValueError(f"{flag}: a second row with the name {name!r}; leave one out, or rename its folder")
        found[name] = reconstruct

    for folder in args.model:
        bundle, flag, name = load_bundle(folder, device), f"--model {folder}", folder.resolve().name
        check_preprocessing(bundle.meta["preprocessing"], preprocessing, flag)
        compare.refuse_learnt(bundle.meta, data, f"{flag} --data {args.data}")
        add(flag, name, of(bundle.reconstructor))
        if bundle.settings.method == "inversion":
            alone = bundle.with_settings(bundle.settings.replace(predicted_noise=False))
            add(flag, f"{name}, code alone", of(alone.reconstructor))
        if bundle.settings.method == "inpainting":
            add(flag, f"{name}, from surroundings alone", from_surroundings(bundle.reconstructor))
    for path in args.baseline:
        baseline, flag = baselines.load(path, device), f"--baseline {path}"
        if isinstance(baseline, baselines.Unlearnt):
            raise ValueError(f"{flag}: {baseline.name} draws no closest normal; expected pca or dae")
        check_preprocessing(baseline.trained_on["data"]["settings"], preprocessing, flag)
        kind = next(kind for kind, cls in baselines.KINDS.items() if type(baseline) is cls)
        add(flag, compare.NAMES[kind], of(baseline))
    return found


def check_preprocessing(own: dict | None, database: dict, what: str) -> None:
    """ValueError unless a method's slices were prepared as the database's: settings of both, and the method's flag."""
    if own is None or PreprocessSettings.from_json(own) != PreprocessSettings.from_json(database):
        raise ValueError(f"{what}: made for slices prepared in another way than those of --data; give a database with "
                         "the same size, HU range and slab thickness")


# ---------------------------------------------------------------------------------------------------------------
# Command

def table(rows: dict[str, dict]) -> str:
    """Markdown; the last line holds the goals."""
    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    columns = ["method", "error, HU", "sharpness", "erasure", *pasted.KINDS]
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for name, row in rows.items():
        values = [*(row[key] for key in GOAL), *(row["erasure_by_kind"][kind] for kind in pasted.KINDS)]
        lines.append("| " + " | ".join([name, *map(cell, values)]) + " |")
    lines.append("| " + " | ".join(["goal", *GOAL.values(), *[GOAL_OF_A_KIND] * len(pasted.KINDS)]) + " |")
    return "\n".join(lines) + "\n"


def benchmark(args: argparse.Namespace) -> int:
    if not (args.model or args.baseline):
        raise ValueError("nothing to measure: give --model or --baseline")
    for flag, value in (("--scans", args.scans), ("--lesions", args.lesions)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} must be at least 1, got {value}")
    make_writable(args.out)
    memory.keep_freed()
    data = SliceDataset(args.data, "val")
    settings = data.prepared.standardise
    side_mm = pasted.pixel_mm(data.size, settings.head_fraction)
    scans, rows = held_out_scans(data, args.scans), {}
    for name, reconstruct in methods(args, data).items():
        rows[name] = evaluate(reconstruct, scans, side_mm, settings.hu_clip, args.lesions,
                              lambda line, name=name: compare.say(f"{name} {line}"))
    for reason in next(iter(rows.values()))["left_out"]:            # the same lesions for every method
        compare.say(reason)
    (args.out / "figures.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (args.out / "table.md").write_text(table(rows), encoding="utf-8")
    print(table(rows), end="")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="database made by prepare.py; its validation scans are used")
    add("--model", type=Path, action="append", default=[], metavar="BUNDLE", help="may be given several times")
    add("--baseline", type=Path, action="append", default=[], metavar="FILE",
        help="pca or dae of baselines.py fit; may be given several times")
    add("--scans", type=int, help="use the first so many held-out scans (default all)")
    add("--lesions", type=int, default=1, help="of each kind in each scan (default %(default)s)")
    add("--out", type=Path, default=Path("runs/inversion"), help="folder for table.md and figures.json")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return exit_code(benchmark, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
