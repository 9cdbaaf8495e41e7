"""Calibration of a method on held-out healthy scans: writes the model bundle.

    python latent_stats.py --data healthy.lmdb --encoder runs/encoder --out models/mine --preset ct256
    python latent_stats.py --data healthy.lmdb --encoder pca.safetensors --set method=pca measure=surprise --out pca

For the published search, the encoder's codes of the training slices, plain and augmented, give mean and principal
components by position below the vertex (detect/latent.py). Every held-out scan is then projected just as projector.py
will project, and its scores are kept: they turn a new scan's score into a percentile and a threshold. Few scans give a
poor calibration: with --fold DATA RUN (several times) other runs of the training, which held other scans out, add
theirs, each projected by the networks that have not seen them. One process; not for torchrun.
Exit codes: 0 done, 2 wrong usage.

A discriminator in the bundle is that of the encoder run, as in the released checkpoint: the GAN's, trained on against
the encoder's reconstructions. Its features measure the search's distance, so the calibration holds for this one.
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
from typing import Any

import torch

import distributed
from config import check_range, option, parse
from dataset import SliceDataset
from detect.bundle import load_bundle, save_bundle
from detect.calibration import Fold, Trained, calibrate, check_held_out, open_file
from detect.codes import CodesConfig, fit_codes
from detect.inpainting import Inpainting
from detect.inversion import NETWORKS, Inversion
from detect.measure import MEASURES
from detect.reconstruct import Reconstructor
from detect.search import Search, SearchSettings
from detect.settings import Settings
from gan.augment import random_flip, random_rotation
from gan.database import ensure_database
from gan.runlog import load_run
from gan.snapshots import Snapshot, load_snapshot
from model import ModelConfig
from op import memory, set_impl
from weights import CheckpointError

ROTATE_P, ROTATE_DEG = 0.5, 30.0      # Lee et al. 2022: rotations of the statistics' augmented passes
LARGE_MB = 25.0                       # beyond this a bundle is too large to be committed
OF_ENCODER_RUNS = ("inpainting", "inversion", "search")    # made of a run of train_encoder.py; others bring a file


@dataclass(frozen=True)
class StatsConfig(CodesConfig):
    """How the statistics of codes are made, and how the held-out scans are projected."""

    calibrate: str = option("val", "project the held-out scans, or leave the bundle without healthy scores",
                            ("val", "none"))
    seed: int = option(0, "seed of the augmentation")
    batch: int = option(32, "slices in the networks at a time: memory, not results")
    precision: str = option("auto", "bf16 where the device is good at it", ("auto", "bf16", "fp32"))

    def __post_init__(self):
        super().__post_init__()
        check_range(self, ("batch",), 1)


PRESETS = {
    "paper512": StatsConfig(components=512),
    "ct256": StatsConfig(passes=2),
    "ct128": StatsConfig(passes=2),
    "noise128": StatsConfig(passes=2),
    "smoke32": StatsConfig(components=4, passes=3),
}
# What each preset calibrates for, before --set; the recommended settings are those of the shipped bundles
RECOMMENDED = Settings("inpainting", measure="surprise", scan_score="top3")
SETTINGS = {
    "paper512": Settings("search"),
    "ct256": RECOMMENDED,
    "ct128": RECOMMENDED,
    "noise128": Settings("inversion", measure="surprise", scan_score="top3"),
    "smoke32": Settings("search", SearchSettings(steps_latent=3, steps_noise=3)),
}


def augmented(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Half of images [B, 3, N, N] mirrored, half turned by up to ROTATE_DEG either way."""
    return random_rotation(random_flip(images, rng), ROTATE_P, ROTATE_DEG, rng)


def build(config: StatsConfig, settings: Settings, data: Path, run: Path, out: Path, device: torch.device,
          name: str | None = None, notes: str | dict | None = None, overwrite: bool = False,
          further: list[tuple[Path, Path]] = (), held_out: Path | None = None) -> Path:
    """Write the bundle to `out`. Raises DatasetError, CheckpointError or ValueError, before any work where it can.

    further: (database, run) of each --fold. Their networks serve the calibration and are not kept.
    held_out: database that has the scans which `data` holds out, prepared as new scans will be.
    """
    # ---- Set up
    if (out / "model.json").exists() and not overwrite:
        raise CheckpointError(f"--out {out}: holds a model bundle; pass --overwrite, or another folder")
    by_surprise = settings.measure == "surprise"
    if config.calibrate == "none" and (further or by_surprise):
        raise ValueError(f"--calibrate none: {'--fold' if further else 'measure=surprise'} is of no use without the "
                         "calibration; leave one of them out")
    of_encoder = settings.method in OF_ENCODER_RUNS
    sources = [(data, run), *further]
    flags = ["--encoder", *["--fold"] * len(further)]
    trained = [open_encoder(*source, flag, config, settings, device) if of_encoder
               else open_file(*source, flag, settings, device) for source, flag in zip(sources, flags)]
    if held_out:
        trained = [dataclasses.replace(trained[0], dataset=other_range(trained[0], held_out), path=held_out)]
    if config.calibrate == "val":
        check_held_out(settings, trained)

    # ---- Fit, and calibrate on the weights as they will be read back, rounded to float16
    meta = {"preprocessing": trained[0].dataset.manifest["settings"], "calibration": None,
            "provenance": {"name": name or out.name, **trained[0].provenance,
                           "latent_stats": dataclasses.asdict(config), "notes": notes,
                           "versions": {"python": platform.python_version(), "torch": torch.__version__}}}
    if held_out:
        meta["provenance"]["held_out"] = {key: trained[0].dataset.manifest[key] for key in ("digest", "counts")}
    if further:
        meta["provenance"]["folds"] = [{"encoder": one.provenance.get("encoder"),
                                        "held_out": len(one.dataset.held_out_ids())} for one in trained]
    with tempfile.TemporaryDirectory() as folder:
        folds, first = [], None
        for i, one in enumerate(trained):
            reconstructor = one.make()
            first = first or reconstructor
            if config.calibrate == "val":
                path = save_bundle(Path(folder) / str(i), reconstructor, settings, meta)
                folds.append(Fold(load_bundle(path, device, config.precision).reconstructor,
                                  SliceDataset(one.path, "val", check=False)))
        normal = None
        if folds:
            measure = MEASURES[settings.measure](settings.scoring, settings.mask)
            meta["calibration"], fitted = calibrate(folds, measure, lambda line: print(line, flush=True))
            normal = fitted.normal
            if meta["calibration"]["threshold"]["reason"]:
                print(f"no threshold: {meta['calibration']['threshold']['reason']}")
    return save_bundle(out, first, settings, meta, normal, overwrite=overwrite)


def other_range(trained: Trained, path: Path) -> SliceDataset:
    """The database of --held-out. ValueError unless all scans that it holds out were held out of the training."""
    dataset = SliceDataset(path, "train")
    if unknown := sorted(set(dataset.held_out_ids()) - set(trained.dataset.held_out_ids())):
        raise ValueError(f"--held-out {path}: holds out {', '.join(unknown)}, which {trained.path} does not: they may "
                         "be among the encoder's training scans")
    if dataset.size != trained.dataset.size:
        raise ValueError(f"--held-out {path}: slices of {dataset.size} pixels, the encoder was trained on "
                         f"{trained.dataset.size}; prepare it with that --size")
    return dataset


def open_encoder(data: Path, run: Path, flag: str, config: StatsConfig, settings: Settings,
                 device: torch.device) -> Trained:
    """A run of train_encoder.py with its database. Raises unless they belong together."""
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

    def make() -> Reconstructor:
        networks = restore(snapshot, device, distributed.pick_precision(config.precision, device))
        if settings.method == "inpainting":
            range_hu = snapshot.meta["data"]["settings"]["standardise"]["hu_clip"]
            return Inpainting(settings.reconstruction, networks["generator"], networks["encoder"], range_hu)
        if settings.method == "inversion":
            return Inversion(settings.reconstruction, networks["generator"], networks["encoder"])
        rng = torch.Generator().manual_seed(config.seed)
        latent = fit_codes(networks["encoder"], dataset, config, config.batch, lambda images: augmented(images, rng))
        return Search(settings.reconstruction, networks["generator"], networks["encoder"], latent.to(device),
                      networks["discriminator"])

    return Trained(dataset, data, snapshot.meta["model"], provenance(snapshot), make)


def restore(snapshot: Snapshot, device: torch.device, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """The three networks of an encoder run, by their names, in eval mode and frozen."""
    model = ModelConfig(**snapshot.meta["model"])
    networks = {name: build(model) for name, build in NETWORKS.items()}
    snapshot.restore(networks)
    for net in networks.values():
        net.eval().requires_grad_(False).to(device).compute_dtype = dtype
    return networks


def provenance(snapshot: Snapshot) -> dict[str, Any]:
    """Where an encoder's weights come from. JSON-able; no paths."""
    def run(step: int, meta: dict) -> dict:
        return {"images_seen": step, "config": meta["config"], "data_digest": meta["data"]["digest"]}

    gan = snapshot.meta["gan"]
    return {"data": {key: snapshot.meta["data"][key] for key in ("digest", "counts")}, "gan": run(gan["step"], gan),
            "encoder": run(snapshot.step, snapshot.meta)}


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
        add = parser.add_argument
        add("--data", "--data_path", type=Path, required=True,
            help="database made by prepare.py: the one that was trained on (or the same folder of scans)")
        add("--encoder", type=Path, required=True, metavar="RUN",
            help="run folder of train_encoder.py; for another method what its training has left")
        add("--fold", type=Path, nargs=2, metavar=("DATA", "RUN"), action="append", default=[],
            help="a further run and its database, with other scans held out: they join the calibration; may be given "
                 "several times")
        add("--held-out", type=Path, metavar="DATA",
            help="a database with the same scans held out and prepared as new scans are to be: with all HU, say, where "
                 "training slices were cut to a range")
        add("--out", type=Path, required=True, help="folder of the bundle")
        add("--overwrite", action="store_true", help="replace the bundle in --out")
        add("--name", help="of the model, in its provenance (default: the folder's)")
        add("--provenance", help="text or JSON file to keep in model.json: commands, machine, data source")
        add("--set", dest="changes", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
            help="settings to calibrate for, such as method=inversion measure=surprise; over those of the preset. "
                 "checkpoint.py show MODEL lists them")
        add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        add("--ops", default="auto", choices=("auto", "ref"), help="ref: no CUDA kernels of our own")

    config, args = parse(__doc__, PRESETS, arguments, argv)
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("latent_stats.py runs as one process: start it with python, not torchrun")
        memory.keep_freed()
        set_impl(args.ops)
        settings = SETTINGS[args.preset].changed(args.changes)
        notes, device, data = read_notes(args.provenance), distributed.pick_device(args.device), args.data
        if settings.method in OF_ENCODER_RUNS:                      # the encoder's own database, where it made one
            data = ensure_database(data, args.encoder, load_snapshot(args.encoder).meta["model"]["size"])
        if args.held_out and args.fold:
            raise ValueError("--held-out and --fold: give one of them")
        folder = build(config, settings, data, args.encoder, args.out, device, args.name, notes, args.overwrite,
                       args.fold, args.held_out)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report_size(folder, config.components))
    return 0


if __name__ == "__main__":
    sys.exit(main())
