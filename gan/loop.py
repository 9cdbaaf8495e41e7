"""The loop of the GAN's training: steps, statistics, snapshots, and what is measured on samples now and then."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

import distributed
from ct.picture import save_hu_grid
from ct.window import decode, encode
from dataset import DatasetError, SliceDataset
from gan.batches import image_batches
from gan.quality import MOST_HELD_OUT, InceptionFeatures, evenly, frechet_distance, sliced_wasserstein
from gan.run import Run
from gan.settings import TrainConfig
from gan.training import Trainer

MOST_REAL = 2048                         # training slices whose features the Frechet distance is to


def train(config: TrainConfig, data: Path, out: Path, device: torch.device, inception: Path | None = None,
          rollback: bool = False) -> None:
    """Train until config.kimg. Raises DatasetError, CheckpointError; FloatingPointError when a loss is not finite.

    inception: weights of quality.InceptionFeatures, for the Frechet distance beside the sliced Wasserstein one.
    rollback: the run diverged; go on from its last snapshot with other random numbers.
    """
    # ---- Set up
    dataset, held_out = SliceDataset(data, "train"), SliceDataset(data, "val", check=False)
    if dataset.size != config.size:
        raise DatasetError(f"{data} holds {dataset.size}x{dataset.size} slices but --size is {config.size}: prepare "
                           f"it with --size {config.size}, or choose another preset")
    trainer = Trainer(config, device)
    meta = {"kind": "gan", "config": dataclasses.asdict(config), "model": dataclasses.asdict(config.model()),
            "data": dataset.known(), "held_out": dataset.held_out_ids()}
    with Run(out, meta, trainer, config.seed, rollback) as run:
        if run.resumed:
            distributed.print0(f"Resuming at {trainer.images_seen / 1000:g} kimg"
                               + (": the training is over" if trainer.images_seen >= config.kimg * 1000 else ""))
        distributed.check_same_state(trainer.g)
        batches = image_batches(dataset, config.batch, run.seed, config.workers, trainer.images_seen, device)
        quality = Quality(held_out, dataset, inception, device) if distributed.is_main() else None
        if quality and not run.resumed:
            save_hu_grid(out / "real.png", quality.val_hu[:: max(1, len(quality.val_hu) // 32)][:32].numpy())
        distributed.print0(f"{dataset.told()}, {len(held_out)} held out; "
                           f"{trainer.world} x {config.batch} images a step in {trainer.g.compute_dtype} on {device}")

        # ---- Train
        while trainer.images_seen < config.kimg * 1000:
            before, swd = trainer.images_seen, None
            real = encode(next(batches).to(device, non_blocking=True).float())
            run.log.add(trainer.global_batch, **trainer.step(real, before // trainer.global_batch))
            done = trainer.images_seen >= config.kimg * 1000

            def due(kimg, before=before, done=done):
                return done or before // (kimg * 1000) < trainer.images_seen // (kimg * 1000)

            if due(config.tick_kimg) or due(config.grid_kimg):
                extra = {"ada_p": trainer.ada.p, "r_t": trainer.ada.r_t} if trainer.ada else {}
                if due(config.grid_kimg):
                    extra |= distributed.gather(quality.measure(trainer, out) if quality else None)[0]
                    swd = extra["swd"]
                run.tick(trainer.images_seen, device, **extra)
            run.end_step(trainer.images_seen, due(config.snapshot_kimg), distance=swd)


class Quality:
    """What is measured on samples now and then, on rank 0: distances to real slices, and a grid to look at.

    val_hu: evenly spaced held-out slices, int16 [M, N, N], all of them up to MOST_HELD_OUT.
    """

    def __init__(self, held_out: SliceDataset, train_slices: SliceDataset, inception: Path | None, device):
        self.val_hu = torch.stack([held_out[i]["hu"] for i in evenly(range(len(held_out)), MOST_HELD_OUT)])
        self.features = InceptionFeatures(inception, device) if inception else None
        if self.features:
            pick = evenly(range(len(train_slices)), MOST_REAL)
            self.real = torch.cat([                                  # a part at a time: at 512 pixels they are 1 GB
                self.features(encode(torch.stack([train_slices[i]["hu"] for i in pick[first:first + 32]]).float()))
                for first in range(0, len(pick), 32)])

    @torch.no_grad()
    def measure(self, trainer: Trainer, out: Path) -> dict[str, float]:
        """`swd` against the held-out slices, HU, and `fid` against the training slices where Inception is given."""
        count = max(32, len(self.val_hu), len(self.real) if self.features else 0)
        generator = torch.Generator().manual_seed(trainer.config.seed)
        z = torch.randn(count, trainer.config.style_dim, generator=generator)
        samples, features = [], []
        for part in z.split(32):                       # of the images themselves, three times as large, none is kept
            images = trainer.g_ema(part.to(trainer.device), noise="const").cpu()
            if 32 * len(samples) < max(32, len(self.val_hu)):
                samples.append(decode(images))
            if self.features:
                features.append(self.features(images))
        samples = torch.cat(samples)
        save_hu_grid(out / f"samples-{trainer.images_seen // 1000:06d}.png", samples[:32].numpy())
        result = {"swd": sliced_wasserstein(self.val_hu, samples[: len(self.val_hu)])}
        if self.features:
            result["fid"] = frechet_distance(self.real, torch.cat(features))
        return result
