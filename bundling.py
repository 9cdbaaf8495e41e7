"""From a training run, or a method's own file, to a model bundle: the work of latent_stats.py."""

from __future__ import annotations

import dataclasses
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

import distributed
from common.weights import CheckpointError
from dataset import SliceDataset
from detect.bundle import load_bundle, save_bundle
from detect.calibration import Fold, Trained, calibrate, check_held_out, open_file
from detect.codes import fit_codes
from detect.inpainting import Inpainting
from detect.inversion import Inversion
from detect.measure import MEASURES
from detect.options import StatsConfig
from detect.reader import Reader
from detect.reconstruct import Reconstructor
from detect.search import Search
from detect.settings import Settings
from gan.augment import random_flip, random_rotation
from gan.encoding import restore
from gan.runlog import load_run
from gan.snapshots import Snapshot

ROTATE_P, ROTATE_DEG = 0.5, 30.0      # Lee et al. 2022: rotations of the statistics' augmented passes
OF_ENCODER_RUNS = ("inpainting", "inversion", "search")    # made of a run of train_encoder.py; others bring a file


def augmented(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Half of images [B, 3, N, N] mirrored, half turned by up to ROTATE_DEG either way."""
    return random_rotation(random_flip(images, rng), ROTATE_P, ROTATE_DEG, rng)


def build(config: StatsConfig, settings: Settings, data: Path, run: Path, out: Path, device: torch.device,
          name: str | None = None, notes: str | dict | None = None, overwrite: bool = False,
          further: list[tuple[Path, Path]] = (), held_out: Path | None = None,
          readers: list[tuple[Path, Path]] = ()) -> Path:
    """Write the bundle to `out`. Raises DatasetError, CheckpointError or ValueError, before any work where it can.

    further: (database, run) of each --fold. Their networks serve the calibration and are not kept.
    held_out: database that has the scans which `data` holds out, prepared as new scans will be.
    readers: (database, run of train_reader.py) of each --reader; the first one is kept.
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
    if readers:
        trained = [with_reader(trained[0], *one, device) for one in readers]
    if config.calibrate == "val":
        check_held_out(settings, trained, "--reader" if readers else "--fold")

    # ---- Fit, and calibrate on the weights as they will be read back, rounded to float16
    meta = {"preprocessing": trained[0].dataset.manifest["settings"], "calibration": None,
            "provenance": {"name": name or out.name, **trained[0].provenance,
                           "latent_stats": dataclasses.asdict(config), "notes": notes,
                           "versions": {"python": platform.python_version(), "torch": torch.__version__}}}
    if held_out or readers:
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


def other_range(trained: Trained, path: Path, flag: str = "--held-out") -> SliceDataset:
    """The database of a flag. ValueError unless all scans that it holds out were held out of the training."""
    dataset = SliceDataset(path, "train")
    if unknown := sorted(set(dataset.held_out_ids()) - set(trained.dataset.held_out_ids())):
        raise ValueError(f"{flag} {path}: holds out {', '.join(unknown)}, which {trained.path} does not: they may "
                         "be among the encoder's training scans")
    if dataset.size != trained.dataset.size:
        raise ValueError(f"{flag} {path}: slices of {dataset.size} pixels, the encoder was trained on "
                         f"{trained.dataset.size}; prepare it with that --size")
    return dataset


def with_reader(trained: Trained, data: Path, run: Path, device: torch.device) -> Trained:
    """The same with a --reader, and its database. Raises unless all scans that this holds out are new to both.

    The reader may have been trained on scans that the encoder's database holds out, so its own are what counts.
    """
    snapshot = load_run(run, "--reader", "reader", "train_reader.py")
    dataset = other_range(trained, data, "--reader")
    encoder = trained.provenance["encoder"]
    if (snapshot.meta["encoder"]["step"], snapshot.meta["encoder"]["data"]["digest"]) != (
            encoder["images_seen"], encoder["data_digest"]):
        raise ValueError(f"--reader {run}: was trained on another run of train_encoder.py than --encoder")
    if unknown := sorted(set(dataset.held_out_ids()) - set(snapshot.meta["held_out"])):
        raise ValueError(f"--reader {data} {run}: the database holds out {', '.join(unknown)}, which the reader may "
                         "have been trained on")

    def make() -> Reconstructor:
        method, reader = trained.make(), Reader(snapshot.meta["model"]["widths"])
        snapshot.restore({"reader_ema": reader})
        method.reader = reader.eval().requires_grad_(False).to(device)
        return method

    facts = {"images_seen": snapshot.step, "config": snapshot.meta["config"],
             "data": {key: snapshot.meta["data"][key] for key in ("digest", "counts")}}
    return dataclasses.replace(trained, dataset=dataset, path=data, make=make,
                               provenance=trained.provenance | {"reader": facts})


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
        earlier, held_out = snapshot.meta.get(first), set(dataset.held_out_ids())
        if earlier and (earlier["data"]["digest"] != snapshot.meta["data"]["digest"]
                        or held_out - set(earlier.get("held_out", held_out))):
            print(f"warning: {run}: its {what} was trained on another database, or another part of it: if held-out "
                  "scans were among its training scans, the healthy scores come out too low")

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


def provenance(snapshot: Snapshot) -> dict[str, Any]:
    """Where an encoder's weights come from. JSON-able; no paths."""
    def run(step: int, meta: dict) -> dict:
        return {"images_seen": step, "config": meta["config"], "data_digest": meta["data"]["digest"]}

    gan = snapshot.meta["gan"]
    return {"data": {key: snapshot.meta["data"][key] for key in ("digest", "counts")}, "gan": run(gan["step"], gan),
            "encoder": run(snapshot.step, snapshot.meta)}
