"""Score images or head-CT slices with a trained HealthyGAN: what its healthy version takes away is the anomaly.

    python -m healthygan.test --data cxr --model models/healthygan-cxr-128 --out results/cxr
    python -m healthygan.test --data test.lmdb --model runs/healthygan-ct --out results/ct
    python -m healthygan.test --data IMAGES --model 360000-G.ckpt --out results/released

--data is a folder with test/healthy and test/diseased (or these two alone), any other folder of images, or a
database of slices made by prepare.py. --model is a model's folder, a run's folder (its best generator is taken), or
the released weights. Model and threshold were fixed before: nothing here looks at a label. Writes to --out

    scores.csv             a row an image (or scan: the mean of its slices), highest score first; slices.csv
    labels.csv             where --data tells the classes: for evaluate.py
    maps/, overlays/       |x - y| / 2 as 16-bit PNG; x, t, y, m, |x - y| and that over x, side by side
    run.json               versions, weights, settings

What an earlier run wrote there is removed first; figures by evaluate.py are not. Results of projector.py are refused.

Exit codes: 0 done, 2 wrong usage, 3 some images could not be read (rows with a reason). For research only.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import platform
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # run as a script from anywhere

import distributed
from common.files import read_table, write_table
from common.results import refuse_projected
from common.weights import CheckpointError
from config import exit_code
from dataset import DatasetError
from healthygan.data import Pictures, class_folders, is_database, join, read_images, read_slices
from healthygan.model import BF16_UNITS
from healthygan.pictures import panels, save_map
from healthygan.scoring import difference, unit_scores
from healthygan.weights import Model, find_model
from op import memory

SCORE_COLUMNS = ("scan_id", "score", "percentile", "flagged", "status", "reason", "slices", "seconds", "notes")
SLICE_COLUMNS = ("scan_id", "slice", "score")
LABEL_COLUMNS = ("scan_id", "label")
CLASSES = ("healthy", "diseased")


def read_data(data: Path, model: Model) -> tuple[Pictures, dict[str, int] | None]:
    """The pictures to score, and their labels by name where the folders tell them. Raises DatasetError."""
    if not data.exists():
        raise DatasetError(f"--data {data}: no such file or folder")
    kind = "slices" if is_database(data) else "images"
    if kind != model.settings.kind:
        raise DatasetError(f"--data {data}: holds {kind}, but the model was trained on {model.settings.kind}")
    if kind == "slices":
        return read_slices(data, "all", model.settings), None
    base = data / "test" if (data / "test").is_dir() else data
    if not any((base / name).is_dir() for name in CLASSES):
        if base == data and (data / "train").is_dir():
            raise DatasetError(f"--data {data}: has train/ but no test/; expected images in {data}/test/{CLASSES[0]} "
                               f"and {data}/test/{CLASSES[1]}. Give {data}/train/... if its images are meant")
        return read_images(base, model.settings), None
    parts = [read_images(folder, model.settings) for folder in class_folders(data, "test", CLASSES)]
    labels = {name: label for label, part in enumerate(parts) for name in (*part.names, *part.unreadable)}
    return join(parts), labels


def clear(out: Path) -> None:
    """Removes what an earlier run has written, lest scores, labels and pictures of other data stay side by side.

    Of scores.csv and run.json whatever is there: this run writes them anew. Else ours are tables as write_results makes
    them, and pictures that are both in maps/ and overlays/; all else stays.
    """
    for name in ("scores.csv", "run.json"):
        (out / name).unlink(missing_ok=True)
    begins = {None: "", **{str(label): f"{name}/" for label, name in enumerate(CLASSES)}}      # names, by their label
    for path, columns in ((out / "slices.csv", SLICE_COLUMNS), (out / "labels.csv", LABEL_COLUMNS)):
        with contextlib.suppress(ValueError):                         # there is none, or no table of ours
            if all(tuple(row) == columns and row["scan_id"].startswith(begins.get(row.get("label"), "\0"))
                   for row in read_table(path, columns)):
                path.unlink()
    for one in sorted((out / "maps").rglob("*.png")):
        both = [out / kind / one.relative_to(out / "maps") for kind in ("maps", "overlays")]
        if all(path.is_file() for path in both):
            for path in both:
                path.unlink()
                with contextlib.suppress(OSError):                    # until one is not empty
                    for folder in path.relative_to(out).parents[:-1]:
                        (out / folder).rmdir()


@torch.no_grad()
def translate(model: Model, pictures: Pictures, out: Path, device: torch.device, batch: int) -> np.ndarray:
    """Every picture's score, float64 [n]; writes its map and its panels. Raises CheckpointError for one that is NaN."""
    generator, scores = model.generator.to(device), []
    for indices in np.array_split(np.arange(len(pictures)), -(-len(pictures) // batch)):
        x = pictures[indices].to(device)
        of_x = generator(x)
        maps = difference(x, of_x.y).cpu()
        scores += maps.double().mean((1, 2)).tolist()
        if strange := [i for i in indices if not math.isfinite(scores[i])]:
            raise CheckpointError(f"--model: what it makes of {pictures.names[strange[0]]} is not finite: its weights "
                                  f"are damaged, or too large for {model.generator.compute_dtype} (--precision fp32)")
        for i, one, side_by_side in zip(indices, maps.numpy(), panels(x, of_x)):
            paths = [out / kind / f"{pictures.names[i]}.png" for kind in ("maps", "overlays")]
            for path in paths:
                path.parent.mkdir(parents=True, exist_ok=True)
            save_map(paths[0], one)
            Image.fromarray(side_by_side).save(paths[1])
    return np.array(scores)


def score_rows(model: Model, pictures: Pictures, scores: np.ndarray, seconds: float) -> list[dict]:
    """Rows of scores.csv, highest score first; images that could not be read last, as failed."""
    healthy, threshold = model.meta.get("validation_scores"), model.meta.get("threshold")
    notes = "" if threshold is not None else "no threshold: no healthy images were kept aside in training"
    rows, slices = [], Counter(pictures.units)
    for unit, score in unit_scores(scores, pictures.units).items():
        rows.append({"scan_id": unit, "score": score, "status": "ok", "slices": slices[unit],
                     "percentile": f"{100 * np.mean(np.array([*healthy, np.inf]) < score):.6g}" if healthy else "",
                     "flagged": "" if threshold is None else int(score > threshold),
                     "seconds": f"{seconds * slices[unit] / len(pictures):.4g}", "notes": notes})
    rows.sort(key=lambda row: -row["score"])
    return rows + [{"scan_id": name, "status": "failed", "reason": reason}
                   for name, reason in sorted(pictures.unreadable.items())]


def write_results(out: Path, pictures: Pictures, scores: np.ndarray, rows: list[dict], labels) -> None:
    """scores.csv; slices.csv of scans; labels.csv where they are known."""
    write_table(out / "scores.csv", SCORE_COLUMNS, rows, exact=("score",))
    if pictures.settings.kind == "slices":
        numbers = [int(name.rpartition("/")[2]) for name in pictures.names]
        write_table(out / "slices.csv", SLICE_COLUMNS, [
            {"scan_id": unit, "slice": number, "score": score}
            for unit, number, score in zip(pictures.units, numbers, scores)], exact=("score",))
    if labels is not None:
        write_table(out / "labels.csv", LABEL_COLUMNS,
                  [{"scan_id": name, "label": label} for name, label in labels.items()])


def test(args: argparse.Namespace) -> int:
    """Does what the command line says; returns the exit code. Raises CheckpointError, DatasetError.

    ValueError where projector.py has results in --out.
    """
    refuse_projected(args.out)
    memory.keep_freed()
    device = distributed.pick_device(args.device)
    model = find_model(args.model)
    if args.white_16bit is not None:
        settings = dataclasses.replace(model.settings, white_16bit=args.white_16bit)
        model = dataclasses.replace(model, settings=settings)
    dtype = model.generator.compute_dtype = distributed.pick_precision(args.precision, device, BF16_UNITS)
    pictures, labels = read_data(args.data, model)
    args.out.mkdir(parents=True, exist_ok=True)
    clear(args.out)
    started = time.perf_counter()
    scores = translate(model, pictures, args.out, device, args.batch)
    seconds = time.perf_counter() - started
    write_results(args.out, pictures, scores, score_rows(model, pictures, scores, seconds), labels)
    report = {"weights_sha256": model.weights_hash, "image_settings": dataclasses.asdict(model.settings),
              "threshold": model.meta.get("threshold"), "chosen": model.meta.get("chosen"),
              "images": len(pictures), "failed": len(pictures.unreadable), "seconds": seconds, "device": str(device),
              "precision": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
              "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}}
    (args.out / "run.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for name, reason in pictures.unreadable.items():
        print(f"skipped: {name}: {reason}", file=sys.stderr)
    print(f"{len(set(pictures.units))} scored, {len(pictures.unreadable)} could not be read: {args.out / 'scores.csv'}")
    return 3 if pictures.unreadable else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="healthygan.test", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of images, or a database")
    parser.add_argument("--model", type=Path, required=True, help="model's or run's folder, or released *-G.ckpt")
    parser.add_argument("--out", type=Path, default=Path("results/healthygan"),
                        help="results folder, none of projector.py's")
    parser.add_argument("--white-16bit", type=int, help="value that is white in 16-bit images (default: as in the "
                                                        "training); 4095 for 12 bits stored in 16")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--batch", type=int, default=16, help="images at a time (default %(default)s)")
    args = parser.parse_args(argv)
    if args.batch < 1:
        parser.error(f"--batch must be at least 1, got {args.batch}")
    if args.white_16bit is not None and not 1 <= args.white_16bit <= 65535:
        parser.error(f"--white-16bit must lie in 1..65535, got {args.white_16bit}")
    return exit_code(test, args)


if __name__ == "__main__":
    sys.exit(main())
