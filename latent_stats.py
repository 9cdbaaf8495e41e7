"""Calibration of a method on held-out healthy scans: writes the model bundle.

    python latent_stats.py --data healthy.lmdb --encoder runs/encoder --out models/mine --preset ct256
    python latent_stats.py --data healthy.lmdb --encoder pca.safetensors --set method=pca measure=surprise --out pca
    python latent_stats.py --data own.lmdb --encoder models/head-128 --out models/own

For the published search, the encoder's codes of the training slices, plain and augmented, give mean and principal
components by position below the vertex (detect/latent.py); --components, --passes, --positions, --spacing-mm,
--neighbour-mm and --seed are of these, and of no use to another method. Every held-out scan is then projected just as
projector.py will project, and of each patient the highest score is kept: these turn a new scan's score into a
percentile and a threshold. Few scans give a poor calibration: with --fold DATA RUN (several times) other runs of the
training, which held other scans out, add theirs, each projected by the networks that have not seen them. One process;
not for torchrun.
A model bundle as --encoder is calibrated anew, for the scanner of other healthy scans (prepare.py --like), or with
other settings (--set), and with other readers, if they were taught beside its networks (--reader); of the options of
the preset only --batch and --precision have a part in it.
Exit codes: 0 done, 2 wrong usage, 130 stopped by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP (no bundle is written).

A discriminator in the bundle is that of the encoder run, as in the released checkpoint: the GAN's, trained on against
the encoder's reconstructions. Its features measure the search's distance, so the calibration holds for this one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

from common.stopping import orderly_end
from config import parse
from detect.options import CodesConfig, StatsConfig

LARGE_MB = 25.0                       # beyond this a bundle is too large to be committed
OF_CODES = (*(f.name for f in dataclasses.fields(CodesConfig)), "seed")        # of the search's statistics alone

PRESETS = {
    "paper512": StatsConfig(components=512),
    "ct256": StatsConfig(passes=2),
    "ct128": StatsConfig(passes=2),
    "noise128": StatsConfig(passes=2),
    "smoke32": StatsConfig(components=4, passes=3),
}
# What each preset calibrates for, before --set; the recommended settings are those of the shipped bundles
RECOMMENDED = ("method=inpainting", "measure=surprise", "scan_score=top3")
SETTINGS = {
    "paper512": ("method=search",),
    "ct256": RECOMMENDED,
    "ct128": RECOMMENDED,
    "noise128": ("method=inversion", "measure=surprise", "scan_score=top3"),
    "smoke32": ("method=search", "steps_latent=3", "steps_noise=3"),
}


def report_size(folder: Path, components: int = 0) -> str:
    """A line with the size of the bundle, and where to save when it is large."""
    sizes = {path.name: path.stat().st_size / 1e6 for path in sorted(folder.iterdir())
             if path.suffix in (".safetensors", ".json")}
    total = sum(sizes.values())
    line = f"{folder}: {total:.1f} MB (" + ", ".join(f"{name} {size:.1f}" for name, size in sizes.items()) + ")"
    if total > LARGE_MB and components:
        line += (f"\nwarning: over {LARGE_MB:g} MB, much for a git repository, and float16 already: keep fewer "
                 f"--components than {components}, or train with a smaller --channel-max and --channel-base")
    return line


def read_notes(value: str | None) -> str | dict | None:
    """--provenance: the content of a JSON file, or the text itself. Raises ValueError for a file that is not JSON."""
    if value is None or not (value.endswith(".json") or Path(value).is_file()):
        return value
    try:
        return json.loads(Path(value).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--provenance {value}: expected a text or a JSON file: {error}") from error


def tell_of_unused(given: set[str], whose: str) -> None:
    """Print a note on the options in `given` that only the statistics of codes have a use for."""
    if unused := [f"--{name.replace('_', '-')}" for name in OF_CODES if name in given]:
        print(f"note: {', '.join(unused)}: of the codes' statistics, which only method=search makes; of no use to "
              f"{whose}", flush=True)


@orderly_end()
def main(argv: list[str] | None = None) -> int:
    def arguments(parser):
        add = parser.add_argument
        add("--data", "--data_path", type=Path, required=True,
            help="database made by prepare.py: the one that was trained on (or the same folder of scans)")
        add("--encoder", type=Path, required=True, metavar="RUN",
            help="run folder of train_encoder.py; for another method what its training has left; or a model bundle, to "
                 "calibrate it by the scans that --data holds out, with its own settings and those of --set")
        add("--fold", type=Path, nargs=2, metavar=("DATA", "RUN"), action="append", default=[],
            help="a further run and its database, with other scans held out: they join the calibration; may be given "
                 "several times")
        add("--reader", type=Path, metavar="RUN", action="append", default=[],
            help="a run of train_reader.py; given several times (its --fold), each calibrates by the held-out scans "
                 "that it has not seen, and the first is kept")
        add("--surroundings", type=Path, metavar="RUN",
            help="run folder of train_encoder.py --halved, whose networks draw what surroundings call for; else those "
                 "of --encoder do, in four times the time")
        add("--held-out", type=Path, metavar="DATA",
            help="a database with the same scans held out and prepared as new scans are to be: with all HU, say, where "
                 "training slices were cut to a range")
        add("--out", type=Path, required=True, help="folder of the bundle")
        add("--overwrite", action="store_true", help="replace the bundle in --out")
        add("--name", help="of the model, in its provenance (default: the folder's)")
        add("--provenance", help="text or JSON file to keep in model.json: commands, machine, data source")
        add("--set", dest="changes", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
            help="settings to calibrate for, such as method=inversion measure=surprise; over those of the preset. "
                 "checkpoint.py show MODEL lists them")
        add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        add("--ops", default="auto", choices=("auto", "ref"), help="ref: no CUDA kernels of our own")

    config, args = parse(__doc__, PRESETS, arguments, argv)

    import distributed  # only now: --help needs none of what takes seconds to import
    from bundling.build import Target, build, build_anew, changed_settings, noise_rate
    from bundling.origins import OF_ENCODER_RUNS, is_bundle, open_encoder_run, refuse_surroundings
    from detect.settings import Settings
    from gan.database import ensure_database
    from op import memory, set_impl

    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("latent_stats.py runs as one process: start it with python, not torchrun")
        memory.keep_freed()
        set_impl(args.ops)
        batch = getattr(args, "batch", None)                        # only where it was given: methods have their own
        data, target = args.data, Target(args.out, distributed.pick_device(args.device), config.precision, args.name,
                                         read_notes(args.provenance), args.overwrite)
        if is_bundle(args.encoder, "--encoder"):
            refuse_surroundings(args.surroundings, args.encoder)
            if args.fold or args.held_out or config.calibrate == "none":
                raise ValueError(f"--encoder {args.encoder}: a model bundle is calibrated by what --data holds out: "
                                 "leave out --fold, --held-out and --calibrate none")
            tell_of_unused(set(vars(args)), "a model bundle")
            folder = build_anew(args.encoder, data, args.changes, target, readers=args.reader, batch=batch)
            print(report_size(folder))
            return 0
        for flag, value in (("--held-out", args.held_out), ("--reader", args.reader),
                            ("--surroundings", args.surroundings)):
            if value and args.fold:
                raise ValueError(f"{flag} and --fold: give one of them")
        settings = changed_settings(Settings().changed(SETTINGS[args.preset]), args.changes, batch)
        if settings.method != "search":
            tell_of_unused(set(vars(args)), f"method={settings.method}")
        if settings.method in OF_ENCODER_RUNS:                      # the encoder's own database, where it made one
            run = open_encoder_run(args.encoder)
            settings = noise_rate(settings, args.changes, run.meta)
            data = ensure_database(data, args.encoder, run.meta["model"]["size"])
        folder = build(config, settings, data, args.encoder, target, further=args.fold, held_out=args.held_out,
                       readers=args.reader, surroundings=args.surroundings)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the bundle is not written", file=sys.stderr)
        return 130
    print(report_size(folder, config.components))
    return 0


if __name__ == "__main__":
    sys.exit(main())
