"""Train a reader: it finds, in a slice beside what its surroundings call for, what does not belong there.

    python train_reader.py --data healthy.lmdb --encoder runs/encoder --out runs/reader --preset ct128
    torchrun --nproc-per-node=8 train_reader.py --data healthy.lmdb --encoder runs/encoder --out runs/reader
    python train_reader.py --data own.lmdb --encoder models/head-128 --init models/head-128 --fold 1:3 --out runs/own-1

It learns on healthy slices into which random shapes of other densities are drawn; no lesion and no label is needed.
The networks of --encoder, a run of train_encoder.py or a model bundle, stay as they are: with --hide they draw what
surroundings call for, without it the closest normal, and the reader sees a slice beside that. --data may be another
database than a model's, prepared in the same way, as long as no scan that it holds out is one that taught the model's
networks. A run tells of those scans alone that it held out itself: for other ones make a model of it first
(latent_stats.py). A reader finds more in scans of a scanner that it knows: where only held-out scans are of it, --fold
1:3, 2:3 and 3:3 make three readers, and each calibrates by those that it has not seen; all scans of --data may be held
out then. After every epoch how well the shapes in held-out scans are found, and a picture (read-NNN.png: slice, what
was changed, what the reader says to both sides). latent_stats.py --reader puts it into a model. The same command goes
on from the last snapshot. SIGINT, SIGTERM, SIGHUP and SIGUSR1 end it with a snapshot after the step in progress. Exit
codes: 0 done, 2 wrong usage, 4 diverged again after going back to the last snapshot (which is kept), 129, 130 or 143
stopped by a signal.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from config import parse
from gan.settings import EveryNth, ReaderConfig

PRESETS = {
    "ct256": ReaderConfig(epochs=10, workers=8, batch=64),
    "ct128": ReaderConfig(epochs=4, workers=0),                 # as that of models/head-128
    "smoke32": ReaderConfig(epochs=2, width=24, depth=2, warm_up=0, workers=0),
}


def fold(text: str) -> EveryNth:
    """K:N of --fold."""
    try:
        return EveryNth(*map(int, text.split(":")))
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"expected K:N, such as 1:3 for the first of three folds, found {text!r}"
                                         ) from None


def main(argv: list[str] | None = None) -> int:
    def arguments(parser):
        parser.add_argument("--data", type=Path, required=True, help="database made by prepare.py")
        parser.add_argument("--encoder", type=Path, required=True, metavar="RUN",
                            help="run folder of train_encoder.py, or a model bundle")
        parser.add_argument("--surroundings", type=Path, metavar="RUN",
                            help="run folder of train_encoder.py --halved, whose networks draw what surroundings call "
                                 "for; the model is to have them, too")
        parser.add_argument("--init", type=Path, metavar="RUN",
                            help="run of this command whose averaged weights are the first ones, or a model bundle: "
                                 "those of its reader")
        parser.add_argument("--fold", type=fold, metavar="K:N",
                            help="learn from the scans that --data holds out, too, in half of what it sees, but for "
                                 "those of every N-th patient from the K-th on, and hold those out")
        parser.add_argument("--out", type=Path, default=Path("runs/reader"),
                            help="run folder; an unfinished run goes on")
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        parser.add_argument("--ops", default="auto", choices=("auto", "ref"), help="ref: no CUDA kernels of our own")

    config, args = parse(__doc__, PRESETS, arguments, argv)

    from bundling.origins import open_beside, open_first_reader
    from gan.reader_loop import train  # only now: --help needs none of what takes seconds to import
    from gan.run import run_command
    from op import memory, set_impl

    def work(device, rollback):
        memory.keep_freed()
        set_impl(args.ops)
        beside = open_beside(args.encoder, device, config.precision, args.surroundings)
        first = open_first_reader(args.init) if args.init else None
        train(config, args.data, beside, args.out, device, first, args.fold, rollback)

    return run_command(work, args.device, args.out)


if __name__ == "__main__":
    sys.exit(main())
