"""Train the inversion encoder, image to W+ code (in-domain inversion, Zhu et al. 2020, ECCV).

    python train_encoder.py --data healthy.lmdb --gan runs/gan --out runs/encoder --preset ct128
    torchrun --nproc-per-node=8 train_encoder.py --data healthy.lmdb --gan runs/gan --out runs/encoder

The generator stays as it is, unless --lr-generator says otherwise. With --init all three networks start from another
run of this command, on other data (phantoms, say): real scans are few.
First epochs: perceptual loss only. Then perceptual + adversarial + in-domain, with the discriminator trained on real
against reconstructed slices. After every epoch PSNR and HU error in the brain of held-out scans. The same command
goes on from the last snapshot. SIGINT, SIGTERM and SIGUSR1 end it with a snapshot after the step in progress. Exit
codes: 0 done, 2 wrong usage, 4 diverged again after going back to the last snapshot (which is kept), 130 or 143
stopped by a signal.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import replace
from pathlib import Path

import torch

import distributed
from config import parse
from dataset import DatasetError, SliceDataset, slice_batches
from gan.database import ensure_database
from gan.encoding import EncoderConfig, EncoderTrainer
from gan.inpainting import InpaintingTrainer
from gan.runlog import Run, load_run, run_command
from gan.snapshots import load_snapshot
from model import ModelConfig
from op import memory, set_impl
from weights import CheckpointError

# What made models/head-128 (docs/RESULTS.md): what is hidden is drawn, with an adversary in the last part
RECOMMENDED = EncoderConfig(epochs=21, perceptual_epochs=15, batch=16, lr=2e-4, lr_trunk=1e-3, lr_discriminator=3e-4,
                            lr_generator=1e-3, decay=0.6, adversarial=0.02, r1_gamma=1, knee=0.04, hide=0.88,
                            encoder_width=0.5, encoder_code=128, rotate=0.6, rotate_deg=12)
# phantom-128 and ct-ich-128: predicted noise maps of one channel, no adversary
NOISE = EncoderConfig(epochs=20, perceptual_epochs=20, lr=5e-5, lr_trunk=1e-3, lr_discriminator=5e-5,
                      lr_generator=2e-3, decay=0.35, r1_gamma=1, perceptual="pixels", knee=0.2, noise=True, erase=0.1,
                      coarse=0.8, workers=0)
PRESETS = {
    "paper512": EncoderConfig(),
    "ct256": RECOMMENDED,
    "ct128": replace(RECOMMENDED, workers=0),
    "noise128": NOISE,
    "smoke32": EncoderConfig(epochs=4, perceptual_epochs=2, lr=1e-3, lr_trunk=1e-3, workers=0),
}


def train(config: EncoderConfig, data: Path, gan: Path, out: Path, device: torch.device, vgg16=None,
          lpips=None, init: Path | None = None, rollback: bool = False) -> None:
    """Train for config.epochs. Raises DatasetError, CheckpointError; FloatingPointError when a loss is not finite.

    rollback: the run diverged; go on from its last snapshot with other random numbers.
    """
    # ---- Set up
    snapshot = load_run(gan, "--gan", "gan", "train.py")
    first = load_run(init, "--init", "encoder", "train_encoder.py") if init else None
    model = config.networks(snapshot.meta["model"])
    if first and replace(ModelConfig(**first.meta["model"]), encoder_noise=model.encoder_noise) != model:
        raise CheckpointError(f"--init {init}: its networks are {first.meta['model']}, those on --gan {gan} are to be "
                              f"{dataclasses.asdict(model)}; they must be the same")
    if first and first.meta["model"].get("encoder_noise") and not model.encoder_noise:
        raise CheckpointError(f"--init {init}: its encoder predicts noise maps; pass --noise")
    dataset, held_out = SliceDataset(data, "train"), SliceDataset(data, "val", check=False)
    if dataset.size != snapshot.meta["model"]["size"]:
        raise DatasetError(f"{data} holds {dataset.size}x{dataset.size} slices, the GAN in {gan} draws "
                           f"{snapshot.meta['model']['size']}: prepare it with that --size")
    trainer = (InpaintingTrainer if config.hide else EncoderTrainer)(config, snapshot, device, vgg16, lpips)
    if first:
        trainer.start_from(first)
    meta = {"kind": "encoder", "config": dataclasses.asdict(config), "model": dataclasses.asdict(trainer.model),
            "data": {key: dataset.manifest[key] for key in ("digest", "counts", "settings")},
            "held_out": dataset.held_out_ids(),          # neither digest nor counts tell which
            "gan": {"step": snapshot.step, **snapshot.meta},
            "init": {"step": first.step, **first.meta} if first else None}
    with Run(out, meta, trainer, config.seed, rollback) as run:
        distributed.check_same_state(trainer.e)
        batches = slice_batches(dataset, config.batch, run.seed, config.workers, trainer.images_seen)
        batch, epoch_of = trainer.global_batch, len(dataset)
        distributed.print0(f"{len(dataset)} slices of {len(dataset.scan_ids)} scans, {len(held_out)} held out; GAN at "
                           f"{snapshot.step / 1000:g} kimg; {trainer.e.compute_dtype} on {device}")

        # ---- Train
        while (before := trainer.images_seen) < config.epochs * epoch_of:
            trainer.set_rates(before / (config.epochs * epoch_of))
            full = before >= config.perceptual_epochs * epoch_of
            run.log.add(batch, **trainer.learn(next(batches), before // batch, full))
            epoch, done = trainer.images_seen // epoch_of, trainer.images_seen >= config.epochs * epoch_of
            epoch_ends = done or before // epoch_of < epoch
            if epoch_ends:
                quality = trainer.validate(held_out, out, epoch) if distributed.is_main() else {}
                run.tick(trainer.images_seen, device, epoch=epoch, **distributed.gather(quality)[0])
            run.end_step(trainer.images_seen, snapshot=epoch_ends)


def main(argv: list[str] | None = None) -> int:
    def arguments(parser):
        parser.add_argument("--data", "--data_path", type=Path, required=True,
                            help="database made by prepare.py, or a folder of scans (prepared on the fly)")
        parser.add_argument("--gan", type=Path, required=True, help="run folder of train.py")
        parser.add_argument("--init", type=Path, help="run of this command whose networks are the first weights")
        parser.add_argument("--out", type=Path, default=Path("runs/encoder"),
                            help="run folder; an unfinished run goes on")
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        parser.add_argument("--ops", default="auto", choices=("auto", "ref"), help="ref: no CUDA kernels of our own")
        parser.add_argument("--vgg16", type=Path, help="torchvision's vgg16 state dict, for --perceptual lpips")
        parser.add_argument("--lpips", type=Path, help="the linear weights of LPIPS-VGG; else all channels weigh alike")

    config, args = parse(__doc__, PRESETS, arguments, argv)

    def work(device, rollback):
        memory.keep_freed()
        set_impl(args.ops)
        size = load_snapshot(args.gan).meta["model"]["size"]
        data = ensure_database(args.data, args.out, size)
        train(config, data, args.gan, args.out, device, args.vgg16, args.lpips, args.init, rollback)

    return run_command(work, args.device, args.out)


if __name__ == "__main__":
    sys.exit(main())
