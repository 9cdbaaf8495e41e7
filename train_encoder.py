"""Train the inversion encoder, image to W+ code (in-domain inversion, Zhu et al. 2020, ECCV).

    python train_encoder.py --data healthy.lmdb --gan runs/gan --out runs/encoder --preset ct128
    python train_encoder.py --data teach.lmdb --init models/head-128 --out runs/own --preset ct128
    torchrun --nproc-per-node=8 train_encoder.py --data healthy.lmdb --gan runs/gan --out runs/encoder

The generator stays as it is, unless --lr-generator says otherwise. With --init all three networks start from another
run of this command, on other data (phantoms, say): real scans are few. Or from a model bundle, which holds no
discriminator: that one starts from --gan's, or anew. Without --gan the slices must have been prepared as those that
the first networks have learnt from.
First epochs: perceptual loss only. Then perceptual + adversarial + in-domain, with the discriminator trained on real
against reconstructed slices. After every epoch PSNR and HU error in the brain of held-out scans. The same command
goes on from the last snapshot. SIGINT, SIGTERM, SIGHUP and SIGUSR1 end it with a snapshot after the step in progress.
Exit codes: 0 done, 2 wrong usage, 4 diverged again after going back to the last snapshot (which is kept), 129, 130 or
143 stopped by a signal.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from config import parse
from gan.settings import EncoderConfig

# As models/head-128 (docs/RESULTS.md): what is hidden is drawn; in the last part with an adversary, and of half of the
# images what is hidden is what the networks find anomalous
RECOMMENDED = EncoderConfig(epochs=18, perceptual_epochs=10, batch=16, lr=2e-4, lr_trunk=1e-3, lr_discriminator=3e-4,
                            lr_generator=1e-3, decay=0.6, adversarial=0.02, r1_gamma=1, knee=0.04, hide=0.88,
                            gated=0.5, encoder_width=0.5, encoder_code=128, rotate=0.6, rotate_deg=12)
# Networks that draw for models/head-128 what surroundings call for: no adversary, which would only sharpen it
SURROUNDINGS = replace(RECOMMENDED, epochs=60, adversarial=0, snapshot_epochs=2, halved=True, gated=0, hide=1,
                       hidden=20, changed=0, gradient=0, encoder_width=1)
# phantom-128: predicted noise maps of one channel, no adversary
NOISE = EncoderConfig(epochs=20, perceptual_epochs=20, lr=5e-5, lr_trunk=1e-3, lr_discriminator=5e-5,
                      lr_generator=2e-3, decay=0.35, r1_gamma=1, perceptual="pixels", knee=0.2, noise=True, erase=0.1,
                      coarse=0.8, workers=0)
PRESETS = {
    "paper512": EncoderConfig(),
    # For a GPU: models/head-256, five minutes of a shared H200, but without gated
    "ct256": replace(RECOMMENDED, epochs=51, perceptual_epochs=33, batch=64, encoder_width=0.75, snapshot_epochs=10,
                     workers=8),
    "ct128": replace(RECOMMENDED, workers=0),
    "half256": replace(SURROUNDINGS, batch=64, snapshot_epochs=10, workers=8),
    "half128": replace(SURROUNDINGS, workers=0),
    "noise128": NOISE,
    # A generator of heads from random codes (gan/coding.py): docs/RESULTS.md
    "heads128": EncoderConfig(epochs=20, perceptual_epochs=11, batch=16, lr_trunk=1e-3, lr_discriminator=1e-3,
                              lr_generator=1e-3, decay=0.15, adversarial=0.05, r1_gamma=2, knee=0.04, code_channels=8,
                              encoder_width=0.5, rotate=0, jitter_hu=0, workers=0),
    "smoke32": EncoderConfig(epochs=4, perceptual_epochs=2, lr=1e-3, lr_trunk=1e-3, workers=0),
}


def main(argv: list[str] | None = None) -> int:
    def arguments(parser):
        parser.add_argument("--data", "--data_path", type=Path, required=True,
                            help="database made by prepare.py, or a folder of scans (one process prepares it)")
        parser.add_argument("--gan", type=Path, metavar="RUN",
                            help="run folder of train.py; may be left out with --init")
        parser.add_argument("--init", type=Path, metavar="RUN",
                            help="run of this command whose networks are the first weights, or a model bundle")
        parser.add_argument("--out", type=Path, default=Path("runs/encoder"),
                            help="run folder; an unfinished run goes on")
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        parser.add_argument("--ops", default="auto", choices=("auto", "ref"), help="ref: no CUDA kernels of our own")
        parser.add_argument("--vgg16", type=Path, help="torchvision's vgg16 state dict, for --perceptual lpips")
        parser.add_argument("--lpips", type=Path, help="the linear weights of LPIPS-VGG; else all channels weigh alike")

    config, args = parse(__doc__, PRESETS, arguments, argv)
    if not (args.gan or args.init):
        print("error: --gan: expected a run folder of train.py to begin with; only with --init may it be left out",
              file=sys.stderr)
        return 2

    if (args.vgg16 or args.lpips) and (config.perceptual != "lpips" or config.hide or config.code_channels):
        print("error: --vgg16 and --lpips are weights of --perceptual lpips, which has no part in --hide and "
              "--code-channels: give that (and --hide 0, --code-channels 0), or leave them out", file=sys.stderr)
        return 2

    from bundling.origins import open_first_networks
    from gan.database import ensure_database  # only now: --help needs none of what takes seconds to import
    from gan.encoder_loop import train
    from gan.run import run_command
    from gan.run_folder import load_run
    from op import memory, set_impl

    def work(device, rollback):
        memory.keep_freed()
        set_impl(args.ops)
        first = open_first_networks(args.init, config.halved) if args.init else None
        size = (load_run(args.gan, "--gan", "gan", "train.py").meta["model"]["size"] if args.gan
                else first.model.size * (2 if config.halved else 1))
        data = ensure_database(args.data, args.out, size, None if args.gan else first.prepared)
        train(config, data, args.gan, args.out, device, args.vgg16, args.lpips, first, rollback)

    return run_command(work, args.device, args.out)


if __name__ == "__main__":
    sys.exit(main())
