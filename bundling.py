"""From a training run, a method's own file or a model bundle to a calibrated bundle: the work of latent_stats.py."""

from __future__ import annotations

import dataclasses
import platform
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import distributed
from common.weights import CheckpointError
from ct.settings import PreprocessSettings
from dataset import SliceDataset
from detect.bundle import load_bundle, save_bundle
from detect.calibration import Fold, Trained, calibrate, check_held_out, open_file
from detect.codes import fit_codes
from detect.measure import MEASURES
from detect.normative import Normal
from detect.options import StatsConfig
from detect.reader import Reader
from detect.reconstruct import Reconstructor
from detect.search import Search
from detect.settings import Settings
from gan.augment import random_flip, random_rotation
from gan.encoding import method_of, restore
from gan.runlog import lineage, load_run, not_held_out, tell_of_seen
from gan.snapshots import Snapshot

ROTATE_P, ROTATE_DEG = 0.5, 30.0      # Lee et al. 2022: rotations of the statistics' augmented passes
WITH_READER = ("inpainting", "inversion")                  # methods that a reader can read beside
OF_ENCODER_RUNS = (*WITH_READER, "search")                 # made of a run of train_encoder.py; others bring a file


def augmented(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Half of images [B, 3, N, N] mirrored, half turned by up to ROTATE_DEG either way."""
    return random_rotation(random_flip(images, rng), ROTATE_P, ROTATE_DEG, rng)


def build(config: StatsConfig, settings: Settings, data: Path, run: Path, out: Path, device: torch.device,
          name: str | None = None, notes: str | dict | None = None, overwrite: bool = False,
          further: list[tuple[Path, Path]] = (), held_out: Path | None = None,
          readers: list[Path] = ()) -> Path:
    """Write the bundle to `out`. Raises DatasetError, CheckpointError or ValueError, before any work where it can.

    further: (database, run) of each --fold. Their networks serve the calibration and are not kept.
    held_out: database that has the scans which `data` holds out, prepared as new scans will be.
    readers: runs of train_reader.py; each calibrates by the scans that it has not seen, and the first one is kept.
    """
    # ---- Set up
    refuse_bundle(out, overwrite)
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
        trained = with_readers(trained[0], readers, device)
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
                                        "held_out": len(one.held_out_ids())} for one in trained]
    if len(readers) > 1:
        meta["provenance"]["readers"] = [one.provenance["reader"] for one in trained]
    with tempfile.TemporaryDirectory() as folder:
        folds, first = [], None
        for i, one in enumerate(trained):
            reconstructor = one.make()
            first = first or reconstructor
            if config.calibrate == "val":
                path = save_bundle(Path(folder) / str(i), reconstructor, settings, meta)
                saved = load_bundle(path, device, config.precision)
                folds.append(Fold(saved.with_settings(settings).reconstructor,             # a bundle names no files
                                  SliceDataset(one.path, "val", check=False, scans=one.scans)))
        normal = None
        if folds:
            meta["calibration"], normal = calibration_of(folds, settings)
    return save_bundle(out, first, settings, meta, normal, overwrite=overwrite)


def refuse_bundle(out: Path, overwrite: bool) -> None:
    """CheckpointError, before any work, where --out holds a bundle that is to stay."""
    if (out / "model.json").exists() and not overwrite:
        raise CheckpointError(f"--out {out}: holds a model bundle; pass --overwrite, or another folder")


def calibration_of(folds: Sequence[Fold], settings: Settings) -> tuple[dict[str, Any], Normal | None]:
    """The calibration by folds, JSON-able, and the measure's statistics of healthy residuals, if it has any."""
    measure = MEASURES[settings.measure](settings.scoring, settings.mask)
    calibration, fitted = calibrate(folds, measure, lambda line: print(line, flush=True))
    if calibration["threshold"]["reason"]:
        print(f"no threshold: {calibration['threshold']['reason']}")
    return calibration, fitted.normal


def is_bundle(folder: Path) -> bool:
    """Whether it is a model bundle, whole or not: HealthyGAN's runs have a model.json of their own."""
    path = folder / "model.json"
    return path.is_file() and b'"format_version"' in path.read_bytes()


def build_anew(model: Path, data: Path, changes: Sequence[str], out: Path, device: torch.device,
               precision: str = "auto", name: str | None = None, notes: str | dict | None = None,
               overwrite: bool = False) -> Path:
    """Write a model bundle to `out` that is `model` calibrated anew, by the scans that a database holds out.

    changes: KEY=VALUE over its settings. New scans are then prepared as those of the database are. Raises as build(),
    and ValueError for scans that are known to be among those it was calibrated on, and its reader trained.
    """
    refuse_bundle(out, overwrite)
    bundle, dataset = load_bundle(model, device, precision), SliceDataset(data, "val")
    settings = bundle.settings.changed(changes)
    bundle, known = bundle.with_settings(settings), bundle.meta["provenance"] or {}
    reconstructor = bundle.reconstructor
    reconstructor.check()
    if dataset.size != reconstructor.size:
        raise ValueError(f"--data {data}: slices of {dataset.size} pixels, --encoder {model} takes "
                         f"{reconstructor.size}; prepare them with --like {model}")
    if getattr(reconstructor, "reader", None) and not getattr(settings.scoring, "read", 0):
        reconstructor.reader = None
        known = {key: value for key, value in known.items() if key not in ("reader", "readers")}
    if "readers" in known and any(is_of(dataset, known.get(part)) for part in ("data", "held_out")):
        raise ValueError(f"--encoder {model}: its reader has learnt from some of the scans that --data {data} holds "
                         "out, and would find too little in them: leave it out with --set read=0, or make the model "
                         "from its runs, with all --reader")
    print(f"note: healthy scores come out too low where {model} was trained on scans that {data} holds out: a bundle "
          "does not say on which", flush=True)
    stored = dataset.manifest["settings"]
    if bundle.preprocessing and PreprocessSettings.from_json(stored) != bundle.preprocessing:
        print(f"note: {data} was prepared in another way than for {model}, and so will new scans be: {stored}; for the "
              f"same way prepare.py --like {model}", flush=True)
    check_held_out(settings, [Trained(dataset, data, reconstructor.config(), known, lambda: reconstructor)])

    calibration, normal = calibration_of([Fold(reconstructor, dataset)], settings)
    known = known | {"name": name or out.name,
                     "held_out": {key: dataset.manifest[key] for key in ("digest", "counts")},
                     "calibration_notes": notes or "anew: what other notes say of a calibration was before"}
    meta = {"preprocessing": stored, "calibration": calibration, "provenance": known}
    return save_bundle(out, reconstructor, settings, meta, normal, overwrite=overwrite)


def is_of(dataset: SliceDataset, known: dict[str, Any] | None) -> bool:
    """Whether the scans that a database holds out are those of a bundle's provenance, by all that this tells.

    Prepared again by a later version they have another digest, and hardly ever other numbers.
    """
    return bool(known) and (known["digest"] == dataset.manifest["digest"]
                            or known["counts"].get("val") == dataset.manifest["counts"].get("val"))


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


def with_readers(trained: Trained, runs: list[Path], device: torch.device) -> list[Trained]:
    """The same with each --reader, and the held-out scans that it has not seen: each scan with one. Else ValueError."""
    every, named = [with_reader(trained, run, device) for run in runs], ", ".join(map(str, runs))
    if twice := sorted(scan for scan, times in Counter(s for one in every for s in one.scans).items() if times > 1):
        raise ValueError(f"--reader {named}: {', '.join(twice)} held out by more than one of them; give readers of "
                         "different folds (train_reader.py --fold)")
    if seen := sorted(set(trained.held_out_ids()).difference(*(one.scans for one in every))):
        raise ValueError(f"--reader {named}: may all have been trained on {', '.join(seen)}, which "
                         "are to calibrate; give the readers of all folds (train_reader.py --fold)")
    return every


def with_reader(trained: Trained, run: Path, device: torch.device) -> Trained:
    snapshot = load_reader(run, trained.provenance)
    seen = not_held_out(trained.held_out_ids(), snapshot.meta, elsewhere=False)
    scans = [one for one in trained.held_out_ids() if one not in seen]
    tell_of_seen(scans, "--reader", run, snapshot)

    def make() -> Reconstructor:
        method = trained.make()
        method.reader = reader_of(snapshot, device)
        return method

    facts = {"images_seen": snapshot.step, "config": snapshot.meta["config"], "held_out": len(scans),
             "data": {key: snapshot.meta["data"][key] for key in ("digest", "counts")}}
    return dataclasses.replace(trained, scans=scans, make=make, provenance=trained.provenance | {"reader": facts})


def load_reader(run: Path, known: dict[str, Any]) -> Snapshot:
    """A run of --reader. ValueError unless it was trained beside the encoder that a bundle's provenance knows."""
    snapshot = load_run(run, "--reader", "reader", "train_reader.py")
    its = provenance(snapshot.meta["encoder"]["step"], snapshot.meta["encoder"])
    if not all(same_run(its[part], known[part]) for part in ("encoder", "gan")):
        raise ValueError(f"--reader {run}: was trained on another run of train_encoder.py than the encoder that "
                         "it is to read beside")
    return snapshot


def same_run(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two of provenance()'s are one run, by all that these tell: settings that only one has are of a later
    version."""
    shared = one["config"].keys() & other["config"].keys()
    return (one["images_seen"], one["data_digest"]) == (other["images_seen"], other["data_digest"]) and all(
        one["config"][key] == other["config"][key] for key in shared)


def reader_of(snapshot: Snapshot, device: torch.device) -> Reader:
    """The averaged reader of a run of train_reader.py."""
    reader = Reader(snapshot.meta["model"]["widths"])
    snapshot.restore({"reader_ema": reader})
    return reader.eval().requires_grad_(False).to(device)


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
    if (any(one["data"]["digest"] != snapshot.meta["data"]["digest"] for one in lineage(snapshot.meta))
            or not_held_out(dataset.held_out_ids(), snapshot.meta)):
        print(f"warning: {run}: its GAN, or a run of --init, was trained on another database, or another part of it: "
              "if held-out scans were among its training scans, the healthy scores come out too low")

    def make() -> Reconstructor:
        dtype = distributed.pick_precision(config.precision, device)
        if settings.method in WITH_READER:
            return method_of(snapshot, settings.reconstruction, device, dtype)
        networks = restore(snapshot, device, dtype)
        rng = torch.Generator().manual_seed(config.seed)
        latent = fit_codes(networks["encoder"], dataset, config, config.batch, lambda images: augmented(images, rng))
        return Search(settings.reconstruction, networks["generator"], networks["encoder"], latent.to(device),
                      networks["discriminator"])

    return Trained(dataset, data, snapshot.meta["model"], provenance(snapshot.step, snapshot.meta), make)


def provenance(step: int, meta: dict[str, Any]) -> dict[str, Any]:
    """Where the weights of an encoder's run come from, at a step. JSON-able; no paths."""
    def run(step: int, meta: dict) -> dict:
        return {"images_seen": step, "config": meta["config"], "data_digest": meta["data"]["digest"]}

    return {"data": {key: meta["data"][key] for key in ("digest", "counts")},
            "gan": run(meta["gan"]["step"], meta["gan"]), "encoder": run(step, meta)}
