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
import textwrap
from pathlib import Path
from typing import Any


def describe(folder: str | Path) -> str:
    """What a bundle is, for people to read: method, files, settings, versions, and provenance in short."""
    from common.weights import load_tensors
    from detect.bundle import load_bundle

    bundle = load_bundle(folder)
    meta = bundle.meta
    lines = [f"{folder}: format version {meta['format_version']}, weights {bundle.weights_hash[:16]}"]
    lines += rows(meta["config"])
    for name in meta["files"]:
        path = Path(folder) / name
        count = sum(tensor.numel() for tensor in load_tensors(path).values())
        lines.append(f"  {path.stem:20} {count / 1e6:.2f} M numbers, {path.stat().st_size / 1e6:.1f} MB")
    stats = getattr(bundle.reconstructor, "latent", None)
    if stats is not None:
        lines.append(f"  {'latent statistics':20} {len(stats.positions_mm)} positions, {stats.positions_mm[0]:g} to "
                     f"{stats.positions_mm[-1]:g} mm below the vertex; {stats.components.shape[-1]} of "
                     f"{stats.components.shape[-2]} components, {stats.explained().mean():.0%} of the variance")
    lines.append("  settings, for --set of projector.py:")
    lines += [f"    {f'{name}={value}':32} {what}" for name, value, what in bundle.settings.listing()]
    lines += rows({"versions": meta["versions"], "preprocessing": meta["preprocessing"]})
    lines += calibrated_by(meta["calibration"]) + comes_from(meta["provenance"] or {})
    return "\n".join([*lines, f"  {'in full':20} {Path(folder) / 'model.json'}, or show --json"])


def comes_from(known: dict) -> list[str]:
    """Lines of where a bundle comes from, by its provenance: a few, whatever that holds."""
    notes = known.get("notes")
    notes = {f"note: {key}": value for key, value in notes.items()} if isinstance(notes, dict) else {"notes": notes}
    others = {key: value for key, value in known.items()
              if key not in ("reader", "readers", "init", "notes", "versions")}
    return [*rows(others | {"made with": known.get("versions")}), *taught_by("begun with", known.get("init")),
            *taught_by("reader taught by", known.get("reader")), *rows(notes)]


def taught_by(title: str, run: dict | None) -> list[str]:
    """Lines of what taught a run and those that it began with, by a bundle's provenance."""
    lines = []
    while run:
        counts = run["data"]["counts"]
        scans = counts["train"]["scans"] + counts["val"]["scans"]
        lines.append(f"  {title:20} {scans - run['held_out']} of the {scans} scans of database "
                     f"{run['data']['digest'][:16]}, {run['images_seen']} images")
        run, title = run.get("init"), "having begun with"
    return lines


def calibrated_by(calibration: dict | None) -> list[str]:
    """The line of the scans that a bundle is calibrated by, and its thresholds."""
    from detect.calibration import healthy_scores, threshold_of

    if not calibration:
        return rows({"calibration": "none: scores without percentiles"})
    found = {how: threshold_of(calibration, how) for how in healthy_scores(calibration)}
    any_one = next(iter(found.values()))                  # all are of one rate, and lack for one reason
    values = ", ".join(f"{how} {one.value:.3g}" for how, one in found.items() if one.value is not None)
    return rows({"calibration": f"{calibration['scans']} healthy scans; " + (
        f"thresholds, exceeded by {any_one.fpr:.0%} of such scans at most: {values}" if values else
        f"no thresholds: {any_one.reason}")})


def rows(table: dict) -> list[str]:
    """A line for each value of a table, wrapped; none for what is None."""
    indent = " " * 23
    return [line for key, value in table.items() if value is not None
            for line in textwrap.wrap(in_short(value), 118, initial_indent=f"  {key:20} ", subsequent_indent=indent,
                                      break_long_words=False, break_on_hyphens=False)]


def in_short(value: Any) -> str:
    """A value of model.json for people: databases and runs by their numbers, a list of texts in full, one of objects by
    its length.
    """
    if isinstance(value, dict) and "counts" in value:
        scans = {split: count["scans"] for split, count in value["counts"].items()}
        return f"database {value['digest'][:16]}: {scans['train']} scans to train on, {scans['val']} held out"
    if isinstance(value, dict) and "images_seen" in value:
        return f"{value['images_seen']} images" + (
            f" of database {value['data_digest'][:16]}" if "data_digest" in value else "")
    if isinstance(value, dict):
        return ", ".join(f"{key} {in_short(one)}" for key, one in value.items())
    if isinstance(value, list) and {type(one) for one in value} == {str}:
        return "; ".join(value)
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        return f"{len(value)} entries"
    return str(value)


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
