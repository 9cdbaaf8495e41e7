"""Train a StyleGAN2 on healthy head-CT slices (Karras et al. 2020, CVPR; adaptive augmentation: NeurIPS 2020).

    python train.py --data healthy.lmdb --out runs/gan --preset ct128
    torchrun --nproc-per-node=8 train.py --data healthy.lmdb --out runs/gan --preset paper512

Writes to --out: config.json, stats.jsonl, sample grids, TensorBoard curves, snapshots. Run the same command again
to go on from the last snapshot: weights, optimisers, EMA, augmentation, sampler position and random numbers.
SIGINT, SIGTERM, SIGHUP and SIGUSR1 end it with a snapshot after the step in progress. Exit codes: 0 done, 2 wrong
usage, 4 diverged again after going back to the last snapshot (which is kept), 129, 130 or 143 stopped by a signal.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import replace
from pathlib import Path

from config import parse
from gan.settings import TrainConfig

# Narrow enough for one CPU core: 13 images a second
CT128 = TrainConfig(size=128, style_dim=256, channel_base=2048, channel_max=256, fold=2, kimg=50, r1_gamma=4,
                    mixing=0.5, path_every=16, flip=False, ada_kimg=60, ada_cutout=0, ema_kimg=5, workers=0,
                    tick_kimg=1, grid_kimg=5, snapshot_kimg=5)
PRESETS = {
    "paper512": TrainConfig(),
    "ct256": replace(CT128, size=256, workers=4),
    "ct128": CT128,
    # Narrower still, every pixel drawn for itself: that of phantom-128
    "noise128": TrainConfig(size=128, style_dim=128, channel_base=2048, channel_max=128, kimg=100, r1_gamma=5,
                            ada_kimg=60, ada_cutout=0, ema_kimg=5, workers=0, tick_kimg=1, grid_kimg=5,
                            snapshot_kimg=10),
    "smoke32": TrainConfig(size=32, style_dim=32, channel_base=256, channel_max=16, kimg=0.064, batch=8, r1_gamma=0.1,
                           workers=0, tick_kimg=0.032, grid_kimg=0.064, snapshot_kimg=0.032),
}


def main(argv: list[str] | None = None) -> int:
    def arguments(parser):
        parser.add_argument("--data", "--data_path", type=Path, required=True,
                            help="database made by prepare.py, or a folder of scans (one process prepares it)")
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

    from gan.database import ensure_database  # only now: --help needs none of what takes seconds to import
    from gan.loop import train
    from gan.run import run_command
    from op import memory, set_impl

    def work(device, rollback):
        memory.keep_freed()
        set_impl(args.ops)
        if args.inception and not args.inception.is_file():
            raise ValueError(f"--inception {args.inception}: no such file; give torchvision's inception_v3 state dict")
        train(config, ensure_database(args.data, args.out, config.size), args.out, device, args.inception, rollback)

    return run_command(work, args.device, args.out)


if __name__ == "__main__":
    sys.exit(main())
