"""What the tests of HealthyGAN need: X-rays with a bright square, and a short training on them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image

from healthygan import train

FOLDERS = {"train/healthy": 12, "train/mixed": 10, "test/healthy": 6, "test/diseased": 5}


def write_xrays(data: Path) -> Path:
    """Smooth noise; in half of train/mixed and in all of test/diseased with a bright square."""
    rng = np.random.default_rng(0)
    for folder, count in FOLDERS.items():
        (data / folder).mkdir(parents=True)
        for i in range(count):
            pixels = np.kron(rng.integers(40, 120, (5, 6)), np.ones((8, 8)))
            if folder == "test/diseased" or (folder == "train/mixed" and i % 2):
                pixels[16:28, 16:28] = 250
            Image.fromarray(pixels.astype(np.uint8)).save(data / folder / f"{i:02d}.png")
    return data


def train_on(xrays: Path, out: Path, *more: object) -> int:
    """Exit code of 20 steps at 32 x 32."""
    flags = ["--preset", "smoke32", "--device", "cpu", "--precision", "fp32", *map(str, more)]
    return train.main(["--data", str(xrays), "--out", str(out), *flags])


def rows(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def stats(run: Path) -> dict[int, dict]:
    lines = (run / "stats.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines)}
