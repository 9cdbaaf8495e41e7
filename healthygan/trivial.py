"""What the looks of a collection give away: two baselines with HealthyGAN's own information, in seconds.

    python -m healthygan.trivial --data cxr

A logistic regression of train/mixed against train/healthy on thumbnails, and the error of a PCA reconstruction
fitted on train/healthy; AUC on test/{healthy,diseased}. Where these score high, the classes differ by source, and
a HealthyGAN's AUC on the same images says little about disease.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from config import exit_code
from evaluation import metrics
from healthygan.data import ImageSettings, class_folders, read_images

REGULARISATIONS = (1.0, 0.1)             # scikit-learn's C: its default, and a stronger ridge


def thumbnails(folder: Path, side: int) -> np.ndarray:
    """Grey images as rows [n, side^2] in [0, 1]; cropped as HealthyGAN sees them."""
    pictures = read_images(folder, ImageSettings("images", side))
    return pictures.pixels.mean(1).reshape(len(pictures), -1) / 65535


def logistic(healthy: np.ndarray, mixed: np.ndarray, test: np.ndarray, c: float) -> np.ndarray:
    """Score of each test row: how much it looks like mixed rather than healthy. c: inverse of the ridge's strength."""
    labels = np.repeat([0, 1], [len(healthy), len(mixed)])
    model = LogisticRegression(C=c, max_iter=5000).fit(np.concatenate([healthy, mixed]), labels)
    return model.decision_function(test)


def pca_error(healthy: np.ndarray, test: np.ndarray, components: int) -> np.ndarray:
    """Score of each test row: mean squared error of its reconstruction by the healthy rows' components."""
    pca = PCA(components, svd_solver="full").fit(healthy)
    return np.square(pca.inverse_transform(pca.transform(test)) - test).mean(1)


def baselines(data: Path, components: int) -> list[tuple[str, float, tuple[float, float]]]:
    """(name, AUC, 95 % interval) of each baseline on the test images. Raises DatasetError."""
    folders = [*class_folders(data, "train", ("healthy", "mixed")),
               *class_folders(data, "test", ("healthy", "diseased"))]
    results = []
    for side in (8, 32):
        healthy, mixed, normal, diseased = (thumbnails(folder, side) for folder in folders)
        test, labels = np.concatenate([normal, diseased]), np.repeat([0, 1], [len(normal), len(diseased)])
        scored = {f"logistic regression, mixed against healthy, {side}x{side}, C = {c:g}":
                  logistic(healthy, mixed, test, c) for c in REGULARISATIONS}
        if side == 8:
            scored[f"PCA error of the healthy, {components} components, {side}x{side}"] = pca_error(
                healthy, test, components)
        results += [(name, metrics.auc(scores, labels), metrics.delong_interval(scores, labels))
                    for name, scores in scored.items()]
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="healthygan.trivial", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/{healthy,mixed}, "
                                                                 "test/{healthy,diseased}")
    parser.add_argument("--components", type=int, default=10, help="of the PCA (default %(default)s)")
    args = parser.parse_args(argv)
    if args.components < 1:
        parser.error(f"--components must be at least 1, got {args.components}")
    return exit_code(report, args)


def report(args: argparse.Namespace) -> None:
    """The table. Raises DatasetError, and ValueError for more --components than images."""
    results = baselines(args.data, args.components)
    print("| baseline | test AUC | 95 % interval |\n| --- | --- | --- |")
    for name, auc, (low, high) in results:
        print(f"| {name} | {auc:.2f} | {low:.2f}-{high:.2f} |")


if __name__ == "__main__":
    sys.exit(main())
