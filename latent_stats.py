"""Latent statistics of healthy slices and the calibration on held-out healthy scans: writes the model bundle.

    python latent_stats.py --data healthy.lmdb --encoder runs/encoder --out models/mine --preset ct256

The encoder's codes of the training slices, plain and augmented, give mean and principal components by position below
the vertex (detect/latent.py). Every held-out scan is then projected just as projector.py will project, and its scores
are kept: they turn a new scan's score into a percentile and a threshold. Few scans give a poor calibration: with
--fold DATA RUN (several times) other runs of train_encoder.py, which held other scans out, add theirs, each projected
by the networks that have not seen them. One process; not for torchrun.
Exit codes: 0 done, 2 wrong usage.

The bundle's discriminator is that of the encoder run, as in the released checkpoint: the GAN's, trained on against the
encoder's reconstructions. Its features measure the projection's distance, so the calibration holds for this one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import distributed
from config import option, parse
from ct.window import encode
from dataset import SliceDataset
from detect import measure, normative
from detect.bundle import Bundle, load_bundle, save_bundle
from detect.latent import DEFAULT_CODES, LatentStats
from detect.search import ProjectionSettings, judge, perceptual_for, project
from gan.augment import random_flip, random_rotation
from gan.database import ensure_database
from gan.runlog import load_run
from gan.snapshots import Snapshot, load_snapshot
from model import Discriminator, Encoder, Generator, ModelConfig
from op import memory, set_impl
from weights import CheckpointError

ROTATE_P, ROTATE_DEG = 0.5, 30.0      # Lee et al. 2022: rotations of the statistics' augmented passes
MAX_REACH_MM = 20.0                   # a position with few codes borrows from no further
FPR = 0.05                            # of the stored thresholds
LARGE_MB = 25.0                       # beyond this a bundle is too large to be committed


@dataclass(frozen=True)
class StatsConfig(ProjectionSettings):
    """How the statistics are made, and the settings of the projection that the bundle is calibrated for."""

    components: int = option(16, "principal components kept a position and layer; the rest share one variance")
    passes: int = option(5, "codes of every slice: one as it is, the others augmented")
    positions: int = option(32, "positions, from the vertex down; those that no healthy slice reaches are left out")
    spacing_mm: float = option(5.0, "from position to position, mm")
    neighbour_mm: float = option(7.5, "a position uses the slices within this, mm")
    calibrate: str = option("val", "project the held-out scans, or leave the bundle without healthy scores",
                            ("val", "none"))
    seed: int = option(0, "seed of the augmentation")
    batch: int = option(32, "slices in the networks at a time: memory, not results")
    precision: str = option("auto", "bf16 where the device is good at it", ("auto", "bf16", "fp32"))

    def __post_init__(self):
        super().__post_init__()
        for name in ("components", "passes", "positions", "spacing_mm", "neighbour_mm", "batch"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')}: must be above 0, got {getattr(self, name)}")

    def projection(self) -> ProjectionSettings:
        return ProjectionSettings(**{f.name: getattr(self, f.name) for f in dataclasses.fields(ProjectionSettings)})


PRESETS = {
    "paper512": StatsConfig(components=512),
    "ct256": StatsConfig(),
    "ct128": StatsConfig(),
    "smoke32": StatsConfig(components=4, passes=3, steps_latent=3, steps_noise=3),
}


# ---------------------------------------------------------------------------------------------------------------
# Statistics

@torch.no_grad()
def encode_slices(encoder: Encoder, dataset: SliceDataset, passes: int, batch: int, rng: torch.Generator
                  ) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes w_plus float32 [passes * M, L, D] of M slices, and their mm below the vertex [passes * M]; on the CPU.

    Loose slices, whose position is unknown, are left out. The first pass takes the slices as they are, because so does
    a projection; the others are augmented.
    """
    device = next(encoder.parameters()).device
    codes, positions = [], []
    known = np.flatnonzero(~np.isnan(dataset.below_vertex_mm)).tolist()
    for number in range(passes):
        for first in range(0, len(known), batch):
            slices = [dataset[i] for i in known[first:first + batch]]
            images = encode(torch.stack([one["hu"] for one in slices]).to(device))
            codes.append(encoder(augmented(images, rng) if number else images).cpu())
            positions += [one["below_vertex_mm"] for one in slices]
    return torch.cat(codes), torch.tensor(positions)


def augmented(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Half of images [B, 3, N, N] mirrored, half turned by up to ROTATE_DEG either way."""
    return random_rotation(random_flip(images, rng), ROTATE_P, ROTATE_DEG, rng)


def fit(w_plus: torch.Tensor, below_vertex_mm: torch.Tensor, config: StatsConfig) -> LatentStats:
    """Statistics at every position that has enough codes within reach; says which have not, and leaves them out.

    Slices there use the nearest position. Raises ValueError naming the flag when no position is left.
    """
    if config.components > w_plus.shape[-1]:
        raise ValueError(f"--components {config.components}: the codes of this encoder have {w_plus.shape[-1]} numbers")
    needed = max(2 * config.components, DEFAULT_CODES)
    positions = [i * config.spacing_mm for i in range(config.positions)]
    found = [int(((below_vertex_mm - position).abs() <= MAX_REACH_MM).sum()) for position in positions]
    kept = [position for position, codes in zip(positions, found) if codes >= needed]
    for position, codes in zip(positions, found):
        if codes < needed:
            print(f"{position:g} mm below the vertex: left out, {codes} codes within {MAX_REACH_MM:g} mm, {needed} "
                  "needed; slices there use the nearest position")
    if not kept:
        raise ValueError(f"--components {config.components}: needs {needed} codes within {MAX_REACH_MM:g} mm of a "
                         f"position, found {max(found)} at most; lower it, raise --passes, or add healthy scans")
    return LatentStats.fit(w_plus, below_vertex_mm, kept, config.components, config.neighbour_mm, config.passes,
                           min_codes=needed, max_reach_mm=MAX_REACH_MM)


# ---------------------------------------------------------------------------------------------------------------
# Calibration

@dataclass(frozen=True)
class Fold:
    """Networks with their statistics, and the healthy scans that they have not seen."""

    bundle: Bundle
    held_out: SliceDataset


def calibrate(folds: list[Fold], settings: ProjectionSettings, batch: int, vgg16=None, lpips=None
              ) -> tuple[dict, normative.Normal | None]:
    """Project the held-out healthy scans, each by its own fold, and keep what a new scan is compared with. JSON-able:

    split, scans   'val', and the ids of its scans
    scan_scores    by each of measure.SCAN_SCORES, in the order of `scans`
    slice_scores   one dict a slice: scan (index into `scans`), below_vertex_mm, score
    threshold      by each of measure.SCAN_SCORES, exceeded by a healthy scan with probability `fpr` at most; None
                   where there are too few scans, with the `reason`
    error_hu       mean absolute error of the reconstruction in the brain after each stage, HU, mean over scans
    precision      of the networks

    and the statistics of the residuals. In --measure surprise a scan's scores are those that the other scans'
    statistics give it. With under 3 scans there are no statistics (None); --measure surprise then raises ValueError.
    """
    ids, positions, results = [], [], []
    for fold in folds:
        perceptual = perceptual_for(fold.bundle, settings, vgg16, lpips)
        for s, scan_id in enumerate(fold.held_out.scan_ids):
            scan = fold.held_out.scan(s)
            mm = scan["below_vertex_mm"].tolist()
            result = project(scan["hu"].float(), scan["brain"], mm, fold.bundle, perceptual, settings, batch,
                             tell=False)                         # no surprise before all are projected
            ids.append(scan_id)
            positions.append(mm)
            results.append(result)
            print(f"{scan_id}: {len(mm)} slices, {sum(result.seconds.values()):.0f} s, error in HU "
                  + ", ".join(f"{stage} {error:.2f}" for stage, error in result.error_hu.items()), flush=True)
    scores, normal = [result.slice_scores for result in results], None
    if len(ids) >= normative.MIN_SCANS or settings.measure == "surprise":
        judged = [result.judged for result in results]
        normal, surprises = normative.fit_normal([result.scales for result in results], judged, positions)
        if settings.measure == "surprise":
            scores = [judge(surprise, where, settings)[2] for surprise, where in zip(surprises, judged)]
    errors = [result.error_hu for result in results]
    return summary(ids, positions, scores, errors, folds[0].bundle.generator.compute_dtype), normal


def summary(scan_ids: list[str], positions: list[list[float]], scores: list[torch.Tensor],
            errors: list[dict[str, float]], dtype: torch.dtype) -> dict:
    """The calibration's JSON from the slice scores and errors of each scan."""
    scan_scores = {how: [measure.scan_score(one, how) for one in scores] for how in measure.SCAN_SCORES}
    slice_scores = [{"scan": s, "below_vertex_mm": round(mm, 3), "score": score}
                    for s, (one, places) in enumerate(zip(scores, positions))
                    for score, mm in zip(one.tolist(), places)]
    mean_error = {stage: sum(error[stage] for error in errors) / len(errors) for stage in errors[0]}
    for how, values in scan_scores.items():
        print(f"healthy scores, {how}: " + " ".join(f"{value:.3g}" for value in sorted(values)), flush=True)
    return {"split": "val", "scans": scan_ids, "scan_scores": scan_scores, "slice_scores": slice_scores,
            "threshold": thresholds(scan_scores, FPR), "error_hu": mean_error,
            "precision": str(dtype).removeprefix("torch.")}


def thresholds(scan_scores: dict[str, list[float]], fpr: float) -> dict:
    """{fpr, a threshold or None for each way of scoring, reason}: reason says why there is none, else None."""
    try:
        by_score = {how: measure.threshold_at_fpr(torch.tensor(scores, dtype=torch.float64), fpr)
                    for how, scores in scan_scores.items()}
    except ValueError as error:
        return {"fpr": fpr} | dict.fromkeys(scan_scores) | {"reason": str(error)}
    return {"fpr": fpr} | by_score | {"reason": None}


# ---------------------------------------------------------------------------------------------------------------
# The bundle

def build(config: StatsConfig, data: Path, run: Path, out: Path, device: torch.device, name: str | None = None,
          notes: str | dict | None = None, overwrite: bool = False, vgg16=None, lpips=None,
          further: list[tuple[Path, Path]] = ()) -> Path:
    """Write the bundle to `out`. Raises DatasetError, CheckpointError or ValueError, before any work where it can.

    further: (database, run) of each --fold. Their networks serve the calibration and are not kept.
    """
    # ---- Set up
    if (out / "model.json").exists() and not overwrite:
        raise CheckpointError(f"--out {out}: holds a model bundle; pass --overwrite, or another folder")
    if config.calibrate == "none" and (further or config.measure == "surprise"):
        raise ValueError(f"--calibrate none: {'--fold' if further else '--measure surprise'} is of no use without the "
                         "calibration; leave one of them out")
    sources = [(data, run), *further]
    loaded = [open_fold(*source, "--fold" if i else "--encoder") for i, source in enumerate(sources)]
    if config.calibrate == "val":
        check_held_out(config, loaded, [path for path, _ in sources])
    dtype = distributed.pick_precision(config.precision, device)
    snapshot = loaded[0][0]

    # ---- Fit, and calibrate on the weights as they will be read back, rounded to float16
    meta = {"preprocessing": loaded[0][1].manifest["settings"], "projection": dataclasses.asdict(config.projection()),
            "calibration": None, "provenance": provenance(snapshot, config, name or out.name, notes)}
    if further:
        meta["provenance"]["folds"] = [{"encoder": {"images_seen": other.step, "config": other.meta["config"]},
                                        "held_out": dataset.held_out_ids()} for other, dataset in loaded]
    with tempfile.TemporaryDirectory() as folder:
        folds = []
        for i, (fold_snapshot, dataset) in enumerate(loaded):
            networks = restore(fold_snapshot, device, dtype)
            latent = fit_fold(networks["encoder"], dataset, config)
            path = save_bundle(Path(folder) / str(i), **networks, latent=latent, meta=meta)
            if config.calibrate == "val":
                bundle = load_bundle(path, device)
                for net in (bundle.generator, bundle.discriminator, bundle.encoder):
                    net.compute_dtype = dtype
                folds.append(Fold(bundle, SliceDataset(sources[i][0], "val", check=False)))
            if not i:
                kept = {**networks, "latent": latent}
        normal = None
        if folds:
            meta["calibration"], normal = calibrate(folds, config.projection(), config.batch, vgg16, lpips)
            if meta["calibration"]["threshold"]["reason"]:
                print(f"no threshold: {meta['calibration']['threshold']['reason']}")
    return save_bundle(out, **kept, meta=meta, overwrite=overwrite, normal=normal)


def open_fold(data: Path, run: Path, flag: str) -> tuple[Snapshot, SliceDataset]:
    """An encoder run's last snapshot and the training part of its database. Raises unless they belong together."""
    snapshot = load_run(run, flag, "encoder", "train_encoder.py")
    dataset, named = SliceDataset(data, "train"), f"{'--data' if flag == '--encoder' else flag} {data}"
    if (key := dataset.unlike(snapshot.meta)) == "held_out":
        raise ValueError(f"{named}: holds other scans out than the database which the encoder in {run} was trained on: "
                         "they would be among its training scans")
    if key:
        raise ValueError(f"{named}: its {key} {dataset.manifest[key]} is not that of the database which the encoder in "
                         f"{run} was trained on, {snapshot.meta['data'][key]}; give that one: another's held-out scans "
                         "may be among the encoder's training scans")
    for first, what in (("gan", "GAN"), ("init", "run of --init")):
        earlier = snapshot.meta.get(first)
        if earlier and earlier["data"]["digest"] != snapshot.meta["data"]["digest"]:
            print(f"warning: {run}: its {what} was trained on another database: if held-out scans were among its "
                  "training scans, the healthy scores come out too low")
    return snapshot, dataset


def check_held_out(config: StatsConfig, loaded: list[tuple[Snapshot, SliceDataset]], paths: list[Path]
                   ) -> None:
    """ValueError unless every database holds scans out, none twice, and enough of them for --measure surprise."""
    seen = {}
    for (snapshot, dataset), path in zip(loaded, paths):
        held_out = dataset.held_out_ids()
        if not held_out:
            raise ValueError(f"--data {path}: no held-out scans to calibrate on; prepare it with a --val-fraction "
                             "above 0, or pass --calibrate none")
        if twice := [scan_id for scan_id in held_out if scan_id in seen]:
            raise ValueError(f"--fold {path}: {', '.join(twice)} held out in {seen[twice[0]]} already: folds hold "
                             "different scans out (prepare.py --split)")
        seen |= dict.fromkeys(held_out, path)
        if snapshot.meta["model"] != loaded[0][0].meta["model"] or (
                dataset.manifest["settings"] != loaded[0][1].manifest["settings"]):
            raise ValueError(f"--fold {path}: its networks or preprocessing are not those of --encoder: the residuals "
                             "would not be alike")
    if config.measure == "surprise" and len(seen) < normative.MIN_SCANS:
        raise ValueError(f"--measure surprise: needs {normative.MIN_SCANS} held-out healthy scans, {paths[0]} has "
                         f"{len(seen)}; prepare it with a larger --val-fraction, or use --measure votes")


def fit_fold(encoder: Encoder, dataset: SliceDataset, config: StatsConfig) -> LatentStats:
    """Latent statistics of the database's training slices."""
    rng = torch.Generator().manual_seed(config.seed)
    loose = int(np.isnan(dataset.below_vertex_mm).sum())
    if loose == len(dataset):
        raise ValueError(f"{dataset.path}: only loose slices to train on, none with a position: the statistics by "
                         "position need scans")
    if loose:
        print(f"{loose} loose slices without a position are left out of the statistics", flush=True)
    w_plus, below_vertex_mm = encode_slices(encoder, dataset, config.passes, config.batch, rng)
    latent = fit(w_plus, below_vertex_mm, config)
    scans = dataset.manifest["counts"]["train"]["scans"]
    print(f"{len(w_plus)} codes of {len(dataset) - loose} slices of {scans} scans; {len(latent.positions_mm)} "
          f"positions, {config.components} components hold {latent.explained().mean():.0%} of the variance", flush=True)
    return latent


def restore(snapshot: Snapshot, device: torch.device, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """The three networks of an encoder run, by their names, in eval mode and frozen."""
    model = ModelConfig(**snapshot.meta["model"])
    networks = {"generator": Generator(model), "discriminator": Discriminator(model), "encoder": Encoder(model)}
    snapshot.restore(networks)
    for net in networks.values():
        net.eval().requires_grad_(False).to(device).compute_dtype = dtype
    return networks


def provenance(snapshot: Snapshot, config: StatsConfig, name: str, notes: str | dict | None) -> dict:
    """Where the weights come from. JSON-able; no paths."""
    def run(step: int, meta: dict) -> dict:
        return {"images_seen": step, "config": meta["config"], "data_digest": meta["data"]["digest"]}

    gan = snapshot.meta["gan"]
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(StatsConfig)
           if f.name not in {inherited.name for inherited in dataclasses.fields(ProjectionSettings)}}
    return {"name": name, "data": {key: snapshot.meta["data"][key] for key in ("digest", "counts")},
            "gan": run(gan["step"], gan), "encoder": run(snapshot.step, snapshot.meta), "latent_stats": own,
            "versions": {"python": platform.python_version(), "torch": torch.__version__}, "notes": notes}


def report_size(folder: Path, components: int) -> str:
    """A line with the size of the bundle, and where to save when it is large."""
    sizes = {path.name: path.stat().st_size / 1e6 for path in sorted(folder.iterdir())
             if path.suffix in (".safetensors", ".json")}
    total = sum(sizes.values())
    line = f"{folder}: {total:.1f} MB (" + ", ".join(f"{name} {size:.1f}" for name, size in sizes.items()) + ")"
    if total > LARGE_MB:
        line += (f"\nwarning: over {LARGE_MB:g} MB, much for a git repository, and float16 already: keep fewer "
                 f"--components than {components}, or train with a smaller --channel-max and --channel-base")
    return line


def read_notes(value: str | None) -> str | dict | None:
    """--provenance: the content of a JSON file, or the text itself. Raises ValueError for a file that is not JSON."""
    if value is None or not (value.endswith(".json") or Path(value).is_file()):
        return value
    try:
        return json.loads(Path(value).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--provenance {value}: expected a text or a JSON file: {error}") from error


def main(argv: list[str] | None = None) -> int:
    def arguments(parser):
        parser.add_argument("--data", "--data_path", type=Path, required=True,
                            help="database made by prepare.py: the one the encoder was trained on (or the same folder "
                                 "of scans)")
        parser.add_argument("--encoder", type=Path, required=True, help="run folder of train_encoder.py")
        parser.add_argument("--fold", type=Path, nargs=2, metavar=("DATA", "RUN"), action="append", default=[],
                            help="a further encoder run and its database, with other scans held out: they join the "
                                 "calibration; may be given several times")
        parser.add_argument("--out", type=Path, required=True, help="folder of the bundle")
        parser.add_argument("--overwrite", action="store_true", help="replace the bundle in --out")
        parser.add_argument("--name", help="of the model, in its provenance (default: the folder's)")
        parser.add_argument("--provenance",
                            help="text or JSON file to keep in model.json: commands, machine, data source")
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        parser.add_argument("--ops", default="auto", choices=("auto", "ref"), help="ref: no CUDA kernels of our own")
        parser.add_argument("--vgg16", type=Path, help="torchvision's vgg16 state dict, for --perceptual lpips")
        parser.add_argument("--lpips", type=Path, help="the published linear weights of LPIPS-VGG")

    config, args = parse(__doc__, PRESETS, arguments, argv)
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("latent_stats.py runs as one process: start it with python, not torchrun")
        memory.keep_freed()
        set_impl(args.ops)
        notes, device = read_notes(args.provenance), distributed.pick_device(args.device)
        size = load_snapshot(args.encoder).meta["model"]["size"]
        data = ensure_database(args.data, args.encoder, size)       # the encoder's own, where it made one
        folder = build(config, data, args.encoder, args.out, device, args.name, notes, args.overwrite, args.vgg16,
                       args.lpips, args.fold)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report_size(folder, config.components))
    return 0


if __name__ == "__main__":
    sys.exit(main())
