"""Train a StyleGAN2 on healthy head-CT slices (Karras et al. 2020, CVPR; adaptive augmentation: NeurIPS 2020).

    python train.py --data healthy.lmdb --out runs/gan --preset ct128
    torchrun --nproc-per-node=8 train.py --data healthy.lmdb --out runs/gan --preset paper512

Writes to --out: config.json, stats.jsonl, sample grids, TensorBoard curves, snapshots. Run the same command again
to go on from the last snapshot: weights, optimisers, EMA, augmentation, sampler position and random numbers.
SIGINT, SIGTERM and SIGUSR1 end it with a snapshot after the step in progress. Exit codes: 0 done, 2 wrong usage,
4 diverged again after going back to the last snapshot (which is kept), 130 or 143 stopped by a signal.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch

import distributed
from config import parse
from ct.picture import save_hu_grid
from ct.window import decode, encode
from dataset import DatasetError, SliceDataset, image_batches
from gan.database import ensure_database
from gan.quality import InceptionFeatures, frechet_distance, sliced_wasserstein
from gan.runlog import Run, run_command
from gan.training import TrainConfig, Trainer
from op import memory, set_impl

PRESETS = {
    "paper512": TrainConfig(),
    "ct256": TrainConfig(size=256, kimg=5000, r1_gamma=2, channel_multiplier=1, ada_kimg=200, ada_cutout=0),
    # Narrow enough for one CPU core: 13 images a second
    "ct128": TrainConfig(size=128, style_dim=256, channel_base=2048, channel_max=256, fold=2, kimg=50, r1_gamma=4,
                         mixing=0.5, path_every=16, flip=False, ada_kimg=60, ada_cutout=0, ema_kimg=5, workers=0,
                         tick_kimg=1, grid_kimg=5, snapshot_kimg=5),
    # Narrower still, every pixel drawn for itself: that of phantom-128 and ct-ich-128
    "noise128": TrainConfig(size=128, style_dim=128, channel_base=2048, channel_max=128, kimg=100, r1_gamma=5,
                            ada_kimg=60, ada_cutout=0, ema_kimg=5, workers=0, tick_kimg=1, grid_kimg=5,
                            snapshot_kimg=10),
    "smoke32": TrainConfig(size=32, style_dim=32, channel_base=256, channel_max=16, kimg=0.064, batch=8, r1_gamma=0.1,
                           workers=0, tick_kimg=0.032, grid_kimg=0.064, snapshot_kimg=0.032),
}


# ---------------------------------------------------------------------------------------------------------------
# The loop

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
            "data": {key: dataset.manifest[key] for key in ("digest", "counts", "settings")}}
    with Run(out, meta, trainer, config.seed, rollback) as run:
        if run.resumed:
            distributed.print0(f"Resuming at {trainer.images_seen / 1000:g} kimg")
        distributed.check_same_state(trainer.g)
        batches = image_batches(dataset, config.batch, run.seed, config.workers, trainer.images_seen)
        quality = Quality(held_out, dataset, inception, device) if distributed.is_main() else None
        if quality and not run.resumed:
            save_hu_grid(out / "real.png", quality.val_hu[:: max(1, len(held_out) // 32)][:32].numpy())
        distributed.print0(f"{len(dataset)} slices of {len(dataset.scan_ids)} scans, {len(held_out)} held out; "
                           f"{trainer.world} x {config.batch} images a step in {trainer.g.compute_dtype} on {device}")

        # ---- Train
        while trainer.images_seen < config.kimg * 1000:
            before = trainer.images_seen
            real = encode(next(batches).to(device, non_blocking=True).float())
            run.log.add(trainer.global_batch, **trainer.step(real, before // trainer.global_batch))
            done = trainer.images_seen >= config.kimg * 1000

            def due(kimg, before=before, done=done):
                return done or before // (kimg * 1000) < trainer.images_seen // (kimg * 1000)

            if due(config.tick_kimg):
                extra = {"ada_p": trainer.ada.p, "r_t": trainer.ada.r_t} if trainer.ada else {}
                if due(config.grid_kimg):
                    extra |= distributed.gather(quality.measure(trainer, out) if quality else None)[0]
                run.tick(trainer.images_seen, device, **extra)
            run.end_step(trainer.images_seen, snapshot=due(config.snapshot_kimg))


class Quality:
    """What is measured on samples now and then, on rank 0: distances to real slices, and a grid to look at."""

    def __init__(self, held_out: SliceDataset, train_slices: SliceDataset, inception: Path | None, device):
        self.val_hu = torch.stack([held_out[i]["hu"] for i in range(len(held_out))]).float()
        self.features = InceptionFeatures(inception, device) if inception else None
        if self.features:
            pick = range(0, len(train_slices), max(1, len(train_slices) // 2048))
            self.real = self.features(encode(torch.stack([train_slices[i]["hu"] for i in pick]).float()))

    @torch.no_grad()
    def measure(self, trainer: Trainer, out: Path) -> dict[str, float]:
        """`swd` against the held-out slices, HU, and `fid` against the training slices where Inception is given."""
        count = max(32, len(self.val_hu), len(self.real) if self.features else 0)
        generator = torch.Generator().manual_seed(trainer.config.seed)
        z = torch.randn(count, trainer.config.style_dim, generator=generator)
        images = torch.cat([trainer.g_ema(part.to(trainer.device), noise="const").cpu() for part in z.split(32)])
        samples = decode(images)
        save_hu_grid(out / f"samples-{trainer.images_seen // 1000:06d}.png", samples[:32].numpy())
        result = {"swd": sliced_wasserstein(self.val_hu, samples[: len(self.val_hu)])}
        if self.features:
            result["fid"] = frechet_distance(self.real, self.features(images))
        return result


# ---------------------------------------------------------------------------------------------------------------
# Command

def main(argv: list[str] | None = None) -> int:
    def arguments(parser):
        parser.add_argument("--data", "--data_path", type=Path, required=True,
                            help="database made by prepare.py, or a folder of scans (prepared on the fly)")
        parser.add_argument("--out", type=Path, default=Path("runs/gan"), help="run folder; an unfinished run goes on")
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        parser.add_argument("--ops", default="auto", choices=("auto", "ref"), help="ref: no CUDA kernels of our own")
        parser.add_argument("--inception", type=Path,
                            help="torchvision's inception_v3 state dict: the Frechet distance is measured, too")
        parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")

    config, args = parse(__doc__, PRESETS, arguments, argv)
    if args.dry_run:
        print(json.dumps(dataclasses.asdict(config), indent=2))
        return 0

    def work(device, rollback):
        memory.keep_freed()
        set_impl(args.ops)
        if args.inception and not args.inception.is_file():
            raise ValueError(f"--inception {args.inception}: no such file; give torchvision's inception_v3 state dict")
        train(config, ensure_database(args.data, args.out, config.size), args.out, device, args.inception, rollback)

    return run_command(work, args.device, args.out)


if __name__ == "__main__":
    sys.exit(main())
