"""From a training run, a method's own file or a model bundle to a calibrated bundle: the work of latent_stats.py."""

from __future__ import annotations

import dataclasses
import platform
import tempfile
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import distributed
from bundling.origins import (
    OF_ENCODER_RUNS,
    WITH_READER,
    digest_of,
    has_open_noise,
    learnt_by_networks,
    learnt_by_reader,
    learnt_by_run,
    open_encoder_run,
    open_reader,
    open_surroundings,
    provenance,
    reader_of,
    taught,
)
from common.files import no_folder
from common.weights import CheckpointError, read_json, refuse_healthygan
from common.wording import some
from dataset import SliceDataset
from detect.bundle import FORMAT_VERSION, Bundle, files_of_method, load_bundle, save_bundle
from detect.calibration import Fold, Trained, calibrate, check_held_out, open_file, threshold_of
from detect.codes import fit_codes
from detect.measure import MEASURES
from detect.normative import Normal
from detect.options import StatsConfig
from detect.reconstruct import Reconstructor
from detect.search import Search
from detect.settings import Settings
from gan.augment import random_flip, random_rotation
from gan.encoding import has_taught_discriminator, method_of, restore
from gan.lineage import lineage, not_held_out, tell_of_seen
from gan.run_folder import told_of
from gan.snapshots import snapshot_steps

ROTATE_P, ROTATE_DEG = 0.5, 30.0      # Lee et al. 2022: rotations of the statistics' augmented passes
OPEN_NOISE_RATE = 0.02                # the published rate of 2 on maps that hold their strength, about a hundredth


@dataclass(frozen=True)
class Target:
    """The bundle to write, and on what.

    out, overwrite    its folder, and whether one that is there may be replaced
    device            that computes; precision: as of distributed.pick_precision
    name, notes       of the model, in its provenance; None: the folder's name, and nothing
    """

    out: Path
    device: torch.device
    precision: str = "auto"
    name: str | None = None
    notes: str | dict | None = None
    overwrite: bool = False


def augmented(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Half of images [B, 3, N, N] mirrored, half turned by up to ROTATE_DEG either way."""
    return random_rotation(random_flip(images, rng), ROTATE_P, ROTATE_DEG, rng)


def build(config: StatsConfig, settings: Settings, data: Path, run: Path, target: Target, *,
          further: Sequence[tuple[Path, Path]] = (), held_out: Path | None = None, readers: Sequence[Path] = (),
          surroundings: Path | None = None) -> Path:
    """Write the bundle. Raises DatasetError, CheckpointError or ValueError, before any work where it can.

    further: (database, run) of each --fold. Their networks serve the calibration and are not kept.
    held_out: database that has the scans which `data` holds out, prepared as new scans will be.
    readers: runs of train_reader.py; each calibrates by the scans that it has not seen, and the first one is kept.
    surroundings: run of train_encoder.py --halved.
    """
    # ---- Set up
    sources = [("--encoder", data, run), *(("--fold", *fold) for fold in further)]
    refuse_bundle(target.out, target.overwrite, settings, [one for *_, one in sources])
    learns = MEASURES[settings.measure].least_patients > 0
    if config.calibrate == "none" and (further or learns):
        raise ValueError(f"--calibrate none: {'--fold' if further else f'measure={settings.measure}'} is of no use "
                         "without the calibration; leave one of them out")
    of_encoder = settings.method in OF_ENCODER_RUNS
    if surroundings and settings.method != "inpainting":
        raise ValueError(f"--surroundings: for method=inpainting, not {settings.method}; leave it out")
    trained = [open_encoder(database, one, flag, config, settings, target, surroundings) if of_encoder
               else open_file(database, one, flag, settings, target.device) for flag, database, one in sources]
    if held_out:
        trained = [dataclasses.replace(trained[0], dataset=other_range(trained[0], held_out), path=held_out)]
    if readers:
        trained = with_readers(trained[0], readers, settings, target.device)

    # ---- Fit and calibrate
    known = {"name": target.name or target.out.name, **trained[0].provenance,
             "latent_stats": dataclasses.asdict(config), "notes": target.notes,
             "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    if held_out:
        known["held_out"] = trained[0].dataset.facts()
    if further:
        known["folds"] = [{"encoder": one.provenance.get("encoder"), "held_out": len(one.held_out_ids())}
                          for one in trained]
    return write(trained, settings, known, target, config.calibrate == "val")


def build_anew(model: Path, data: Path, changes: Sequence[str], target: Target, *, readers: Sequence[Path] = (),
               batch: int | None = None) -> Path:
    """Write a model bundle that is `model` calibrated anew, by the scans that a database holds out.

    changes: KEY=VALUE over its settings. readers: runs of train_reader.py beside its networks, as of build(), in the
    place of its own one. batch: as of changed_settings(). New scans are then prepared as those of the database are.
    Raises as build(), and ValueError for scans that are known to be among those which its networks, or a reader that
    stays, have learnt from.
    """
    bundle = load_bundle(model, target.device, target.precision)
    settings = changed_settings(bundle.settings, changes, batch)
    refuse_bundle(target.out, target.overwrite, settings)
    trained = [open_model(data, with_method(bundle, settings), keep_reader=not readers)]
    if readers:
        trained = with_readers(trained[0], readers, settings, target.device)
    known = trained[0].provenance | {
        "name": target.name or target.out.name, "calibration_data": trained[0].dataset.facts(),
        "calibration_notes": target.notes or "anew: what other notes say of a calibration was before"}
    return write(trained, settings, known, target)


def with_method(bundle: Bundle, settings: Settings) -> Bundle:
    """A bundle with the settings of --set. Raises CheckpointError for a method whose parts it does not hold."""
    try:
        return bundle.with_settings(settings)
    except CheckpointError as error:
        absent = [name for name in files_of_method(settings) if name not in bundle.meta["files"]]
        raise CheckpointError(f"--set method={settings.method}: {bundle.folder} is a model of method "
                              f"{bundle.settings.method}, "
                              + (f"without {', '.join(absent)}" if absent else "made for that alone")
                              + "; leave the method as it is, or give what the training of the other has left as "
                                "--encoder") from error


def changed_settings(settings: Settings, changes: Sequence[str], batch: int | None = None) -> Settings:
    """Settings with the KEY=VALUE of --set. batch: slices at a time, by --batch; None, or batch=N of --set: theirs.

    A note is printed for a method that has no such setting. Raises ValueError as Settings.changed().
    """
    settings = settings.changed(changes)
    if batch is None or any(text.startswith("batch=") for text in changes):
        return settings
    if not hasattr(settings.reconstruction, "batch"):
        print(f"note: --batch: of no use to method={settings.method}", flush=True)
        return settings
    return settings.replace(batch=batch)


def noise_rate(settings: Settings, changes: Sequence[str], run: dict[str, Any]) -> Settings:
    """Settings of a search with the rate that suits the noise maps of an encoder's run, unless --set gives one.

    run: its meta. A note is printed where the rate is another than the published one.
    """
    if settings.method != "search" or not has_open_noise(run) or any(text.startswith("lr_noise=") for text in changes):
        return settings
    print(f"note: lr_noise={OPEN_NOISE_RATE:g}, the published rate of 2 for maps that hold their strength, as this "
          "encoder's training leaves them", flush=True)
    return settings.replace(lr_noise=OPEN_NOISE_RATE)


def write(trained: list[Trained], settings: Settings, known: dict[str, Any], target: Target,
          calibrated: bool = True) -> Path:
    """Write the bundle of what was trained, the first of several, with this provenance, and unless calibrated=False
    with the calibration by the scans of all. ValueError where these are too few, before any work."""
    if calibrated:
        check_held_out(settings, trained)
    meta = {"preprocessing": trained[0].dataset.manifest["settings"], "calibration": None, "provenance": known}
    with tempfile.TemporaryDirectory() as folder:          # for weights as they will be read back, rounded to float16
        folds, first = [], None
        for i, one in enumerate(trained):
            reconstructor = one.make()
            first = first or reconstructor
            if calibrated:
                path = save_bundle(Path(folder) / str(i), reconstructor, settings, meta)
                saved = load_bundle(path, target.device, target.precision)
                folds.append(Fold(saved.with_settings(settings).reconstructor,             # a bundle names no files
                                  SliceDataset(one.path, "val", check=False, scans=one.scans)))
        normal = None
        if folds:
            meta["calibration"], normal = calibration_of(folds, settings)
    return save_bundle(target.out, first, settings, meta, normal, overwrite=target.overwrite)


def refuse_bundle(out: Path, overwrite: bool, settings: Settings, sources: Sequence[Path] = ()) -> None:
    """CheckpointError, before any work, where --out holds a bundle that is to stay, a run, a model of HealthyGAN or, in
    the place of a file of the bundle to come, one that is no bundle's, or can be no folder.

    settings: of the bundle to come. sources: what it is made of, which no model.json makes a bundle's.
    """
    if there := no_folder(out):
        raise CheckpointError(f"--out {out}: {there} is no folder that can be written to; choose another --out")
    if snapshot_steps(out):                                    # beside it a bundle would be taken in its place
        raise CheckpointError(f"--out {out}: holds a training run; choose another --out")
    refuse_healthygan(out, f"--out {out}")
    files = files_of_method(settings) + ["normal.safetensors"] * (MEASURES[settings.measure].least_patients > 0)
    listed = listed_files(out, files)
    for path in (out / name for name in files):
        if path.exists() and (path.name not in listed or any(one.exists() and path.samefile(one) for one in sources)):
            raise CheckpointError(f"--out {out}: holds {path.name}, of no bundle there, which the new one "
                                  "would replace; choose another --out, or move that file")
    if (out / "model.json").exists() and not overwrite:
        raise CheckpointError(f"--out {out}: holds a model bundle; pass --overwrite, or another folder")


def listed_files(out: Path, files: Collection[str]) -> Collection[str]:
    """Names of the files of the bundle in a folder; where its model.json is damaged, `files`, none without one."""
    if not (out / "model.json").exists():
        return ()
    try:
        return read_json(out / "model.json", "", FORMAT_VERSION)["files"]
    except CheckpointError:
        return files


def calibration_of(folds: Sequence[Fold], settings: Settings) -> tuple[dict[str, Any], Normal | None]:
    """The calibration by folds, JSON-able, and the measure's statistics of healthy residuals, if it has any."""
    measure = MEASURES[settings.measure](settings.scoring, settings.mask)
    calibration, fitted = calibrate(folds, measure, lambda line: print(line, flush=True))
    if reason := threshold_of(calibration, settings.scan_score).reason:
        print(f"no threshold: {reason}")
    return calibration, fitted.normal


# ------------------------------------------------------------------------------------------------------------
# What is to be calibrated, and with what

def open_encoder(data: Path, run: Path, flag: str, config: StatsConfig, settings: Settings, target: Target,
                 surroundings: Path | None = None) -> Trained:
    """A run of train_encoder.py with its database, and one of its --halved.

    Raises unless they belong together, and ValueError where scans that are to calibrate are known to have taught what
    one of the two began with. Where that may be, a warning is printed.
    """
    snapshot = open_encoder_run(run, flag)
    halves = surroundings and open_surroundings(surroundings, snapshot)
    if snapshot.meta["model"].get("encoder_masks") and settings.method != "inpainting":
        raise ValueError(f"{flag} {run}: a run of train_encoder.py --hide, which is for method=inpainting; leave "
                         f"method={settings.method} out")
    dataset, named = SliceDataset(data, "train"), f"{'--data' if flag == '--encoder' else flag} {data}"
    if (key := dataset.unlike(snapshot.meta)) == "held_out":
        raise ValueError(f"{named}: holds other scans out than the database which the encoder in {run} was trained on: "
                         "they would be among its training scans")
    if key:
        raise ValueError(f"{named}: its {key} {dataset.manifest[key]} is not that of the database which the encoder in "
                         f"{run} was trained on, {snapshot.meta['data'][key]}; give that one: another's held-out scans "
                         "may be among the encoder's training scans")
    for of, folder, meta in ((flag, run, snapshot.meta),
                             *([("--surroundings", surroundings, halves.meta)] if halves else [])):
        if config.calibrate == "val" and (seen := learnt_by_run(dataset, meta)):
            raise ValueError(f"{of} {folder}: its GAN, or a run of --init, was trained on {data}, with other scans "
                             f"held out: {some(seen, 3)} may be among its training scans; give a run that began with "
                             "networks which have not seen them")
        if (any(one["data"]["digest"] != meta["data"]["digest"] for one in lineage(meta))
                or not_held_out(dataset.held_out_ids(), meta)):
            print(f"warning: {folder}: its GAN, or a run of --init, was trained on another database, or another part "
                  "of it: if held-out scans were among its training scans, the healthy scores come out too low")

    if getattr(settings.reconstruction, "perceptual", "") == "discriminator" and not has_taught_discriminator(snapshot):
        raise ValueError(f"--set perceptual=discriminator: {run} began with a new discriminator, which has learnt "
                         "nothing; use perceptual=pixels")

    def make() -> Reconstructor:
        device, dtype = target.device, distributed.pick_precision(target.precision, target.device)
        if settings.method in WITH_READER:
            return method_of(snapshot, settings.reconstruction, device, dtype, halves)
        networks = restore(snapshot, device, dtype)
        rng = torch.Generator().manual_seed(config.seed)
        latent = fit_codes(networks["encoder"], dataset, config, config.batch, lambda images: augmented(images, rng))
        return Search(settings.reconstruction, networks["generator"], networks["encoder"], latent.to(device),
                      networks["discriminator"])

    return Trained(dataset, data, told_of(snapshot.meta, "model"), provenance(snapshot.step, snapshot.meta, halves),
                   make)


def open_model(data: Path, bundle: Bundle, keep_reader: bool) -> Trained:
    """A bundle with another database than it was trained on, whose held-out scans are to calibrate it.

    Raises ValueError for slices that it does not take, and scans that are known to have taught it. Notes are printed.
    """
    dataset, model = SliceDataset(data, "val"), bundle.folder
    method, known = bundle.reconstructor.with_settings(bundle.settings.reconstruction), bundle.meta["provenance"] or {}
    method.check()
    if dataset.size != method.size:
        raise ValueError(f"--data {data}: slices of {dataset.size} pixels, --encoder {model} takes {method.size}; "
                         f"prepare them with --like {model}")
    if seen := learnt_by_networks(dataset, known):
        raise ValueError(f"--data {data}: is the database that --encoder {model}, or what it began with, was trained "
                         f"on, with other scans held out: {some(seen, 3)} may be among its training scans; give other "
                         "scans")
    if getattr(method, "reader", None) and not (keep_reader and getattr(bundle.settings.scoring, "read", 0)):
        method.reader = None
        known = {key: value for key, value in known.items() if key not in ("reader", "readers")}
    if learnt_by_reader(dataset, known):
        raise ValueError(f"--encoder {model}: its reader has learnt from some of the scans that --data {data} holds "
                         "out, and would find too little in them: leave it out with --set read=0, or give readers that "
                         "have not, each by the scans it has not seen (train_reader.py --fold, --reader)")
    print(f"note: healthy scores come out too low where {model} was trained on scans that {data} holds out: a bundle "
          "does not say on which", flush=True)
    if bundle.preprocessing and dataset.prepared != bundle.preprocessing:
        print(f"note: {data} was prepared in another way than for {model}, and so will new scans be: "
              f"{dataset.manifest['settings']}; for the same way prepare.py --like {model}", flush=True)
    return Trained(dataset, data, method.config(), known,
                   lambda: method.with_settings(bundle.settings.reconstruction))


def other_range(trained: Trained, path: Path) -> SliceDataset:
    """The database of --held-out. ValueError unless all scans that it holds out were held out of the training, and it
    says of the same ones that they are of one patient."""
    dataset = SliceDataset(path, "val")
    if unknown := sorted(set(dataset.held_out_ids()) - set(trained.dataset.held_out_ids())):
        raise ValueError(f"--held-out {path}: holds out {', '.join(unknown)}, which {trained.path} does not: they may "
                         "be among the encoder's training scans")
    here, there = (one.of_same_patient(dataset.held_out_ids()) for one in (dataset, trained.dataset))
    if other := [scan for scan in here if here[scan] != there[scan]]:
        raise ValueError(f"--held-out {path}: does not say as {trained.path} does whose scans are {some(other, 3)}: "
                         "prepare it with the same --patients")
    if dataset.size != trained.dataset.size:
        raise ValueError(f"--held-out {path}: slices of {dataset.size} pixels, the encoder was trained on "
                         f"{trained.dataset.size}; prepare it with that --size")
    return dataset


def with_readers(trained: Trained, runs: Sequence[Path], settings: Settings, device: torch.device) -> list[Trained]:
    """The same with each --reader, and the held-out scans that it has not seen: each scan with one. Else ValueError."""
    if settings.method not in WITH_READER:
        raise ValueError(f"--reader: for method={' or '.join(WITH_READER)}, not {settings.method}")
    if getattr(settings.scoring, "read", None) == 0:
        raise ValueError("--reader: read=0 gives a reader no weight; leave it out, or --set read=0.6, say")
    beside, named = digest_of(trained.make()), ", ".join(map(str, runs))
    every = [with_reader(trained, run, beside, device) for run in runs]
    if twice := sorted(scan for scan, times in Counter(s for one in every for s in one.scans).items() if times > 1):
        raise ValueError(f"--reader {named}: {', '.join(twice)} held out by more than one of them; give readers of "
                         "different folds (train_reader.py --fold)")
    if seen := sorted(set(trained.held_out_ids()).difference(*(one.scans for one in every))):
        raise ValueError(f"--reader {named}: may all have been trained on {', '.join(seen)}, which "
                         "are to calibrate; give the readers of all folds (train_reader.py --fold)")
    if idle := [str(run) for run, one in zip(runs, every) if not one.scans]:
        raise ValueError(f"--reader {', '.join(idle)}: may have been trained on all scans that are to calibrate: "
                         "leave it out")
    if len(every) > 1:
        readers = {"readers": [one.provenance["reader"] for one in every]}
        every = [dataclasses.replace(one, provenance=one.provenance | readers) for one in every]
    return every


def with_reader(trained: Trained, run: Path, beside: str, device: torch.device) -> Trained:
    snapshot = open_reader(run, beside)
    seen = not_held_out(trained.held_out_ids(), snapshot.meta, elsewhere=False)
    scans = [one for one in trained.held_out_ids() if one not in seen]
    tell_of_seen(scans, "--reader", run, snapshot.meta)

    def make() -> Reconstructor:
        method = trained.make()
        method.reader = reader_of(snapshot, device)
        return method

    return dataclasses.replace(trained, scans=scans, make=make,
                               provenance=trained.provenance | {"reader": taught(snapshot.step, snapshot.meta)})
