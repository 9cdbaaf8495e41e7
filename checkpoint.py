"""The paper's released files to a model bundle, and bundles for people to read.

    python checkpoint.py import-released --ckpt checkpoint.pth --latent-statistics latent_statistics.pkl --out DIR
    python checkpoint.py show DIR

Nothing in the files is executed. Exit codes: 0 done, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path


def describe(folder: str | Path) -> str:
    """What a bundle is, for people to read: method, files, settings, versions and provenance."""
    from common.weights import load_tensors
    from detect.bundle import load_bundle

    bundle = load_bundle(folder)
    meta = bundle.meta
    lines = [f"{folder}: format version {meta['format_version']}, weights {bundle.weights_hash[:16]}"]
    lines += [f"  {key:20} {value}" for key, value in meta["config"].items()]
    for name in meta["files"]:
        path = Path(folder) / name
        count = sum(tensor.numel() for tensor in load_tensors(path).values())
        lines.append(f"  {path.stem:20} {count / 1e6:.2f} M numbers, {path.stat().st_size / 1e6:.1f} MB")
    stats = getattr(bundle.reconstructor, "latent", None)
    if stats is not None:
        lines.append(f"  {'latent statistics':20} {len(stats.positions_mm)} positions, {stats.positions_mm[0]:g} to "
                     f"{stats.positions_mm[-1]:g} mm below the vertex; {stats.components.shape[-1]} of "
                     f"{stats.components.shape[-2]} components, {stats.explained().mean():.0%} of the variance")
    lines += taught_by((meta["provenance"] or {}).get("reader"))
    lines.append("  settings, for --set of projector.py:")
    lines += [f"    {f'{name}={value}':32} {what}" for name, value, what in bundle.settings.listing()]
    shown = shortened(meta)
    return "\n".join(lines + [f"  {key:20} {json.dumps(value)}" for key, value in shown.items()])


def taught_by(reader: dict | None) -> list[str]:
    """Lines of what taught a bundle's reader and those that it began with, by its provenance."""
    lines, title = [], "reader taught by"
    while reader:
        counts = reader["data"]["counts"]
        scans = counts["train"]["scans"] + counts["val"]["scans"]
        lines.append(f"  {title:20} {scans - reader['held_out']} of the {scans} scans of database "
                     f"{reader['data']['digest'][:16]}, {reader['images_seen']} images")
        reader, title = reader.get("init"), "having begun with"
    return lines


def shortened(meta: dict) -> dict:
    """model.json's versions, settings and provenance; of the calibration the number of scans and the thresholds."""
    from detect.bundle import BUNDLE_META

    shown = {key: meta[key] for key in ("versions", *BUNDLE_META) if key != "calibration"}
    if meta["calibration"]:
        thresholds = meta["calibration"]["threshold"]
        shown["calibration"] = {"scans": meta["calibration"]["scans"], "threshold": thresholds}
    return shown


def facts(folder: str | Path) -> dict:
    """What a bundle is, for programs: JSON."""
    from detect.bundle import read_bundle_meta

    meta, weights_hash = read_bundle_meta(folder)
    return {"format_version": meta["format_version"], "weights_sha256": weights_hash, "config": meta["config"],
            "files": meta["files"]} | shortened(meta)


def reason(error: Exception, args: argparse.Namespace) -> str:
    """What to say of an error. The system's own tell neither the flag nor the mend."""
    if not isinstance(error, OSError):
        return str(error)
    why = f"({error.strerror or error})"
    if args.command == "import-released":                 # what it reads raises CheckpointError
        return f"--out {args.out}: cannot be written {why}; give a folder on a disk that has room and may be written to"
    return f"{args.folder}: cannot be read {why}; give the folder of a model bundle that this user may read"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Import the paper's released files, or show a model bundle.")
    commands = parser.add_subparsers(dest="command", required=True)
    bring = commands.add_parser("import-released", help="the paper's released files to a model bundle")
    bring.add_argument("--ckpt", required=True, help="checkpoint.pth with g_ema, d and e")
    bring.add_argument("--latent-statistics", required=True, help="latent_statistics.pkl")
    bring.add_argument("--out", required=True, help="folder of the bundle")
    bring.add_argument("--fp32", action="store_true", help="store float32 (default: float16, half the size)")
    bring.add_argument("--overwrite", action="store_true", help="replace a bundle that is there")
    show = commands.add_parser("show", help="check a bundle and print what it is")
    show.add_argument("folder")
    show.add_argument("--json", action="store_true", help="for programs")
    args = parser.parse_args(argv)

    import torch  # only now: --help needs none of what takes seconds to import

    from common.weights import CheckpointError
    from detect.bundle import import_released

    try:
        if args.command == "import-released":
            dtype = torch.float32 if args.fp32 else torch.float16
            args.folder = import_released(args.ckpt, args.latent_statistics, args.out, dtype, args.overwrite)
        print(json.dumps(facts(args.folder), indent=1) if getattr(args, "json", False) else describe(args.folder))
    except (CheckpointError, OSError) as error:
        print(reason(error, args), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)        # `checkpoint.py show MODEL | head` ends as any such pipe does
    sys.exit(main())
