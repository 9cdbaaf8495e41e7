"""The loop of the encoder's training: steps, and after every epoch how well it does; of the reader's, too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import distributed
from common.weights import CheckpointError, digest
from config import flag
from dataset import DatasetError, SliceDataset
from gan.batches import slice_batches
from gan.coding import CodeTrainer
from gan.encoding import EncoderTrainer, FirstNetworks
from gan.inpainting import InpaintingTrainer
from gan.lineage import tell_of_seen
from gan.reading import ReadingTrainer
from gan.run import Run
from gan.run_folder import load_run
from gan.settings import EncoderConfig, ReaderConfig
from gan.snapshots import Snapshot

# Settings that shape the networks
OF_NETWORKS = ("noise", "hide", "halved", "encoder_width", "encoder_code", "code_channels")


def train(config: EncoderConfig, data: Path, gan: Path | None, out: Path, device: torch.device, vgg16=None,
          lpips=None, first: FirstNetworks | None = None, rollback: bool = False) -> None:
    """Train for config.epochs. Raises DatasetError, CheckpointError; FloatingPointError when a loss is not finite.

    gan: a run of train.py; None: all networks are those of `first`, with a new discriminator where that holds none.
    rollback: the run diverged; go on from its last snapshot with other random numbers.
    """
    # ---- Set up
    snapshot = load_run(gan, "--gan", "gan", "train.py") if gan else None
    dataset, held_out = SliceDataset(data, "train"), SliceDataset(data, "val", check=False)
    if snapshot and dataset.size != snapshot.meta["model"]["size"]:
        raise DatasetError(f"{data} holds {dataset.size}x{dataset.size} slices, the GAN in {gan} draws "
                           f"{snapshot.meta['model']['size']}: prepare it with that --size")
    known = dataset.known()
    if first:
        check_first(first, config, snapshot)
        if not snapshot:
            check_alone(first, config, dataset)
    scans = dataset.held_out_ids()
    if snapshot and not config.halved:                             # of whose GAN nothing but the shape goes on
        tell_of_seen(scans, "--gan", gan, snapshot.meta)
    if first:
        tell_of_seen(scans, "--init", first.folder, {"data": known, "held_out": scans, "init": first.known})
    objective = CodeTrainer if config.code_channels else InpaintingTrainer if config.hide else EncoderTrainer
    trainer = objective(config, snapshot, dataset.prepared.standardise.hu_clip, device, vgg16, lpips, first)
    if first:
        trainer.start_from(first)
    new = (not snapshot or config.halved) and "discriminator" not in (first.weights if first else ())
    meta = {"kind": "encoder", "config": dataclasses.asdict(config), "model": dataclasses.asdict(trainer.model),
            "data": known, "held_out": scans,                          # neither digest nor counts tell which
            "gan": snapshot.known() if snapshot else None,
            "init": first.known if first else None, "new_discriminator": new,
            "began_with": {"gan": snapshot.digest() if snapshot else None,
                           "init": digest(first.weights) if first else None}}
    with Run(out, meta, trainer, config.seed, rollback) as run:
        distributed.check_same_state(trainer.e)
        batches = slice_batches(dataset, config.batch, run.seed, config.workers, trainer.images_seen,
                                prepare=trainer.prepare, device=device)
        begun = f"GAN at {snapshot.step / 1000:g} kimg" if snapshot else "no GAN"
        if snapshot and config.halved:
            begun = "shape of the GAN"
        if new:
            begun += ", new discriminator" if first else ", new networks"
        distributed.print0(f"{dataset.told()}, {len(held_out)} held out; "
                           f"{begun}; {trainer.e.compute_dtype} on {device}")

        if config.perceptual_epochs >= config.epochs:
            distributed.print0(f"No adversary in this run: --epochs {config.epochs:g} end before or with its "
                               f"--perceptual-epochs {config.perceptual_epochs:g}, in which there is none")
        elif not config.has_adversary(1):
            distributed.print0("No adversary in this run: --adversarial 0")

        # ---- Train
        def learn(examples, index, done):
            return trainer.learn(examples, index, config.has_adversary(done))

        go_through(config, run, trainer, learn, batches, held_out, len(dataset), out, device)


def check_first(first: FirstNetworks, config: EncoderConfig, gan: Snapshot | None) -> None:
    """CheckpointError unless the first weights fit the networks that config makes of the GAN's, or of their own."""
    theirs, alone = dataclasses.asdict(first.model), config.networks(dataclasses.asdict(first.model), of_gan=False)
    ours = config.networks(gan.meta["model"]) if gan else alone
    theirs["encoder_noise"] = theirs["encoder_noise"] or ours.encoder_noise        # the noise head alone may be new
    if theirs == dataclasses.asdict(ours):
        return
    told = "; ".join(f"{key} {theirs[key]}, here {now}" for key, now in dataclasses.asdict(ours).items()
                     if theirs[key] != now)
    mend = ["leave --gan out, or give one of the same networks"] if ours != alone else []
    taught = dataclasses.asdict(EncoderConfig()) | first.known["config"]
    other = [name for name in OF_NETWORKS if taught[name] != getattr(config, name)
             and not (name == "hide" and taught[name] and config.hide)]    # any of it makes the same networks
    if flags := [flag(name, taught[name]) for name in other]:
        mend.append(f"give {' '.join(flags)}, or the --preset that has these")
    raise CheckpointError(f"--init {first.folder}: its networks are not those of this run ({told}); "
                          + "; ".join(mend))


def check_alone(first: FirstNetworks, config: EncoderConfig, dataset: SliceDataset) -> None:
    """CheckpointError or DatasetError unless a run can begin with first networks alone, without a GAN."""
    if other := dataset.prepared.other_than(first.prepared):
        raise DatasetError(f"--data {dataset.path}: its slices were prepared in another way than those that the "
                           f"networks of --init {first.folder} have learnt from ({other}); prepare it with "
                           f"{first.prepared.flags()}, or give --gan, a run of train.py on slices like these")
    features = config.perceptual == "discriminator" and not (config.hide or config.code_channels)
    if features and "discriminator" not in first.weights:
        raise CheckpointError(f"--init {first.folder}: holds no discriminator, whose features are the distance of "
                              "--perceptual discriminator; give --gan, a run of train.py, or --perceptual pixels")


def go_through(config: EncoderConfig | ReaderConfig, run: Run, trainer: EncoderTrainer | ReadingTrainer,
               learn: Callable, batches: Iterator, held_out: SliceDataset, epoch_of: int, out: Path,
               device: torch.device) -> None:
    """Steps, learn(batch, index, part of the training that is done), until config.epochs or config.hours are over.

    epoch_of: slices of an epoch. At every snapshot held-out scans are looked at: a row of statistics, and a picture
    with the number of the row, so that none replaces another, however often a run goes on.
    """
    done = _done(config, trainer.images_seen / epoch_of, run)
    if run.resumed:
        distributed.print0(f"Resuming at {trainer.images_seen} images, after {run.seconds() / 3600:.2f} hours"
                           + (": the training is over" if done >= 1 else ""))
    while done < 1:
        before = trainer.images_seen
        trainer.set_rates(done)
        run.log.add(trainer.global_batch, **learn(next(batches), before // trainer.global_batch, done))
        epochs = trainer.images_seen / epoch_of
        done = _done(config, epochs, run)
        due = done >= 1 or before / epoch_of // config.snapshot_epochs < epochs // config.snapshot_epochs
        if due:
            quality = trainer.validate(held_out, out, run.log.rows + 1) if distributed.is_main() else {}
            run.tick(trainer.images_seen, device, epoch=round(epochs, 3), **distributed.gather(quality)[0])
        run.end_step(trainer.images_seen, snapshot=due)


def _done(config: EncoderConfig | ReaderConfig, epochs: float, run: Run) -> float:
    """Collective. The part of a training that is done, 0 to 1, by epochs or by time, whichever is further."""
    return max(epochs / config.epochs, run.seconds() / (3600 * config.hours) if config.hours else 0.0)
