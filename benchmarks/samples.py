"""What a generator draws from random codes: sheets to look at, how far it is from real slices, and no copies.

    python benchmarks/samples.py --run runs/heads --data heads.lmdb --out runs/samples
    python benchmarks/samples.py --model models/heads-128 --data heads.lmdb --out runs/samples

--run is a run of train.py, or one of train_encoder.py with --code-channels: its codes come from the prior over codes,
and psi draws them towards the middle of their component. A GAN is shown with its own noise maps. Writes:

samples-psi-0.7.png, samples-psi-1.png  64 samples each, at two strengths of truncation
nearest.png   the samples that come closest to a training slice, and beside each that slice: real data, not for showing
figures.json  swd      sliced Wasserstein distance of samples at psi 1 to held-out slices, HU (gan/quality.py)
              floor    the same of as many training slices, which are real, of other patients
              copies   root mean square distance of a slice to the nearest training slice or its mirror image, HU: of
                       samples and of held-out slices, percentiles, and the share of samples that lie closer than all
                       but NEAR of the held-out slices. A generator that repeats what it was trained on has samples
                       far below the held-out slices; one that has learnt has about NEAR of them there

--data is the database that the networks were trained on: copies are looked for among its training slices. Exit codes:
0 done, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))                                      # run as a script from anywhere

import distributed
from benchmarks import compare
from config import exit_code
from ct.picture import save_hu_grid
from ct.window import decode, encode
from dataset import SliceDataset
from detect.bundle import load_bundle
from detect.folder import make_writable
from gan.quality import sliced_wasserstein
from gan.snapshots import load_snapshot
from model import Generator, SpatialGenerator, build_generator
from op import memory

SHEET, SHEET_PSI = 64, (0.7, 1.0)
NEAREST = 16                 # pairs of nearest.png
PERCENTILES = (1, 5, 50)     # of the distances to the nearest training slice
NEAR = 0.01                  # share of held-out slices that lie closer to a training slice than what counts as near
BATCH = 32


@torch.no_grad()
def draw(generator: Generator, count: int, psi: float, seed: int, range_hu: tuple[float, float]) -> torch.Tensor:
    """`count` samples, HU [count, N, N] on the CPU, cut to the training slices' range; the same codes for every psi."""
    if isinstance(generator, SpatialGenerator):
        return decode(generator.sample(count, psi, seed)).clamp(*range_hu)
    rng = torch.Generator().manual_seed(seed)
    mean = generator.mean_latent(generator=rng)
    z = torch.randn(count, generator.config.style_dim, generator=rng).to(mean.device)
    parts = [mean + psi * (generator.mapping(part) - mean) for part in z.split(BATCH)]
    return torch.cat([decode(generator.synthesis(w, "const")).cpu() for w in parts]).clamp(*range_hu)


def nearest(queries: torch.Tensor, references: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Root mean square distance [M], HU, of queries [M, N, N] to the nearest of references [R, N, N], and which [M].

    A reference counts as it is and mirrored, because a generator learns from both.
    """
    distance, index = torch.full((len(queries),), torch.inf), torch.zeros(len(queries), dtype=torch.long)
    flat = queries.flatten(1).float()
    for first in range(0, len(references), 256):
        part = references[first:first + 256].float()
        both = torch.cat([part, part.flip(-1)]).flatten(1)
        found, which = torch.cdist(flat, both).min(1)
        better = found < distance
        distance, index = torch.where(better, found, distance), torch.where(better, first + which % len(part), index)
    return distance / flat.shape[1] ** 0.5, index


def copies(of_samples: torch.Tensor, of_held_out: torch.Tensor) -> dict:
    """Distances of nearest() [M] and [H] as figures: percentiles of both, and the share of near samples."""
    near = of_held_out.quantile(NEAR)
    named = {"samples": of_samples, "held_out": of_held_out}
    return {**{name: {f"p{p}": one.quantile(p / 100).item() for p in PERCENTILES} for name, one in named.items()},
            "near_hu": near.item(), "share_near": (of_samples < near).float().mean().item()}


def figures(samples: torch.Tensor, held_out: torch.Tensor, train: torch.Tensor, seed: int = 0) -> dict:
    """dict(slices, swd, floor, copies) of samples, held-out and training slices, HU [M], [H] and [R] of [N, N].

    The distances of both kinds are taken over equal numbers, `slices`, chosen at random where there are more.
    """
    count = min(len(samples), len(held_out), len(train))
    chosen = [part[torch.from_numpy(np.random.default_rng(seed).permutation(len(part))[:count])].float()
              for part in (held_out, samples, train)]
    swd, floor = (sliced_wasserstein(chosen[0], other, seed=seed) for other in chosen[1:])
    return {"slices": count, "swd": swd, "floor": floor,
            "copies": copies(nearest(samples, train)[0], nearest(held_out, train)[0])}


def slices_of(data: SliceDataset) -> torch.Tensor:
    """All slices of a split as the networks are shown them, HU float32 [M, N, N]."""
    return torch.stack([decode(encode(data[i]["hu"].float())) for i in range(len(data))])


def open_generator(args: argparse.Namespace, train: SliceDataset) -> Generator:
    """The generator of --run or --model. ValueError, CheckpointError where it was trained on other data."""
    device = distributed.pick_device(args.device)
    if args.model:
        bundle = load_bundle(args.model, device)
        compare.refuse_other_data(bundle.meta, args.model, train, "--data", ("data",))
        generator = getattr(bundle.reconstructor, "generator", None)
        if generator is None:
            raise ValueError(f"--model {args.model}: its method, {bundle.settings.method}, has no generator")
        if generator.style is None:
            raise ValueError(f"--model {args.model}: its generator draws from an encoder's maps, not from random "
                             "codes; give a model of method search")
    else:
        snapshot = load_snapshot(args.run)
        if (key := train.unlike(snapshot.meta)) is not None:
            raise ValueError(f"--data {args.data}: its {key} is not that of the database which --run {args.run} was "
                             "trained on; give that one")
        if "generator_ema" not in snapshot.weights:
            raise ValueError(f"--run {args.run}: its generator draws from an encoder's maps, not from random codes; "
                             "give a run of train.py, or one of train_encoder.py with --code-channels")
        generator = build_generator(snapshot.model())
        snapshot.restore({"generator_ema": generator})
        generator.eval().requires_grad_(False).to(device)
    generator.compute_dtype = distributed.pick_precision("auto", device)
    return generator


def benchmark(args: argparse.Namespace) -> int:
    make_writable(args.out)
    memory.keep_freed()
    train = SliceDataset(args.data, "train")
    generator = open_generator(args, train)
    train_hu, held_out_hu = slices_of(train), slices_of(SliceDataset(args.data, "val", check=False))
    cut = train.prepared.standardise.hu_clip
    for psi in SHEET_PSI:
        save_hu_grid(args.out / f"samples-psi-{psi:g}.png", draw(generator, SHEET, psi, args.seed, cut).numpy())
    samples = draw(generator, max(SHEET, len(held_out_hu)), 1.0, args.seed, cut)
    found = figures(samples, held_out_hu, train_hu, args.seed)
    distance, index = nearest(samples, train_hu)
    first = distance.argsort()[:NEAREST]
    pairs = torch.stack([samples[first], train_hu[index[first]]], 1).flatten(0, 1)
    save_hu_grid(args.out / "nearest.png", pairs.numpy())
    (args.out / "figures.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(summary(found), end="")
    return 0


def summary(found: dict) -> str:
    """Three lines for people."""
    of, held = found["copies"]["samples"], found["copies"]["held_out"]
    return (f"sliced Wasserstein distance to {found['slices']} held-out slices: {found['swd']:.2f} HU; of training "
            f"slices to them: {found['floor']:.2f} HU\n"
            f"distance to the nearest training slice, median: samples {of['p50']:.1f} HU, held-out slices "
            f"{held['p50']:.1f} HU\n"
            f"{found['copies']['share_near']:.1%} of the samples lie closer than {found['copies']['near_hu']:.1f} HU, "
            f"as {NEAR:.0%} of the held-out slices do\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path,
                       help="run folder of train.py, or of train_encoder.py --code-channels: its averaged generator")
    which.add_argument("--model", type=Path, help="model bundle")
    add("--data", type=Path, required=True, help="the database that it was trained on")
    add("--out", type=Path, default=Path("runs/samples"), help="folder for the sheets and figures.json")
    add("--seed", type=int, default=0, help="of codes and choices (default %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return exit_code(benchmark, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
