"""The loop of the encoder's training: steps, and after every epoch how well it does; of the reader's, too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import distributed
from common.weights import CheckpointError, digest
from dataset import DatasetError, SliceDataset
from gan.batches import slice_batches
from gan.coding import CodeTrainer
from gan.encoding import EncoderTrainer, FirstNetworks
from gan.inpainting import InpaintingTrainer
from gan.reading import ReadingTrainer
from gan.runlog import Run, load_run, tell_of_seen
from gan.settings import EncoderConfig, ReaderConfig
from model import ModelConfig


def train(config: EncoderConfig, data: Path, gan: Path, out: Path, device: torch.device, vgg16=None,
          lpips=None, first: FirstNetworks | None = None, rollback: bool = False) -> None:
    """Train for config.epochs. Raises DatasetError, CheckpointError; FloatingPointError when a loss is not finite.

    rollback: the run diverged; go on from its last snapshot with other random numbers.
    """
    # ---- Set up
    snapshot = load_run(gan, "--gan", "gan", "train.py")
    if first:
        check_first(first, config.networks(snapshot.meta["model"]), gan)
    dataset, held_out = SliceDataset(data, "train"), SliceDataset(data, "val", check=False)
    if dataset.size != snapshot.meta["model"]["size"]:
        raise DatasetError(f"{data} holds {dataset.size}x{dataset.size} slices, the GAN in {gan} draws "
                           f"{snapshot.meta['model']['size']}: prepare it with that --size")
    known = dataset.facts() | {"settings": dataset.manifest["settings"]}
    tell_of_seen(dataset.held_out_ids(), "--gan", gan, snapshot.meta)
    if first:
        tell_of_seen(dataset.held_out_ids(), "--init", first.folder, {"data": known, "init": first.known})
    objective = CodeTrainer if config.code_channels else InpaintingTrainer if config.hide else EncoderTrainer
    range_hu = dataset.manifest["settings"]["standardise"]["hu_clip"]
    trainer = objective(config, snapshot, range_hu, device, vgg16, lpips)
    if first:
        trainer.start_from(first)
    meta = {"kind": "encoder", "config": dataclasses.asdict(config), "model": dataclasses.asdict(trainer.model),
            "data": known, "held_out": dataset.held_out_ids(),         # neither digest nor counts tell which
            "gan": {"step": snapshot.step, **snapshot.meta},
            "init": first.known if first else None,
            "began_with": {"gan": snapshot.digest(), "init": digest(first.weights) if first else None}}
    with Run(out, meta, trainer, config.seed, rollback) as run:
        distributed.check_same_state(trainer.e)
        batches = slice_batches(dataset, config.batch, run.seed, config.workers, trainer.images_seen,
                                prepare=trainer.prepare)
        distributed.print0(f"{len(dataset)} slices of {len(dataset.scan_ids)} scans, {len(held_out)} held out; GAN at "
                           f"{snapshot.step / 1000:g} kimg; {trainer.e.compute_dtype} on {device}")

        if config.perceptual_epochs >= config.epochs:
            distributed.print0(f"No adversary in this run: --epochs {config.epochs:g} end before or with its "
                               f"--perceptual-epochs {config.perceptual_epochs:g}, in which there is none")

        # ---- Train
        def learn(examples, index, done):
            return trainer.learn(examples, index, done * config.epochs >= config.perceptual_epochs)

        go_through(config, run, trainer, learn, batches, held_out, len(dataset), out, device)


def check_first(first: FirstNetworks, model: ModelConfig, gan: Path) -> None:
    """CheckpointError unless the first weights fit networks that are to be these."""
    if dataclasses.replace(first.model, encoder_noise=model.encoder_noise) != model:
        raise CheckpointError(f"--init {first.folder}: its networks are {dataclasses.asdict(first.model)}, those on "
                              f"--gan {gan} are to be {dataclasses.asdict(model)}; they must be the same")
    if first.model.encoder_noise and not model.encoder_noise:
        raise CheckpointError(f"--init {first.folder}: its encoder predicts noise maps; pass --noise")


def go_through(config: EncoderConfig | ReaderConfig, run: Run, trainer: EncoderTrainer | ReadingTrainer,
               learn: Callable, batches: Iterator, held_out: SliceDataset, epoch_of: int, out: Path,
               device: torch.device) -> None:
    """Steps, learn(batch, index, part of the training that is done), until config.epochs or config.hours are over.

    epoch_of: slices of an epoch. At every snapshot held-out scans are looked at.
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
            quality = trainer.validate(held_out, out, int(epochs)) if distributed.is_main() else {}
            run.tick(trainer.images_seen, device, epoch=int(epochs), **distributed.gather(quality)[0])
        run.end_step(trainer.images_seen, snapshot=due)


def _done(config: EncoderConfig | ReaderConfig, epochs: float, run: Run) -> float:
    """Collective. The part of a training that is done, 0 to 1, by epochs or by time, whichever is further."""
    return max(epochs / config.epochs, run.seconds() / (3600 * config.hours) if config.hours else 0.0)
