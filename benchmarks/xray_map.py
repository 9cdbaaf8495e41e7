"""Where HealthyGAN's map looks on chest X-rays: inside the lungs, outside, or at the picture's frame.

    python -m benchmarks.xray_map --data cxr --model models/healthygan-cxr-128 --out runs/xray-map

--data holds test/healthy and test/diseased. Writes to --out metrics.json, table.md and lungs.png, every image with its
lungs outlined, healthy ones first: the mask is simple and to be checked by eye. The rows of the table:

  whole map                          the score as it is
  map inside / outside the lungs     mean of the map there
  outer frame of the map             mean over the outermost eighth of each side, which holds little lung
  lungs alone shown                  everything else is painted in the image's mean grey before it is translated
  area of the lungs, darker          no map at all: share of the frame that the lungs take up, mean grey, and that of
                                     the lungs. What these reach, pictures of the two sources differ by

The line of what was pasted checks the cause: a smooth bright spot, as an opacity is, in a lung of each healthy image,
against the same images without. A score of opacities rises, and the map lies on the spot.

A lung is the ellipse in its half of the picture that is darkest against the ring around it, times the root of its area;
what is dark and reaches a side or the lower edge is air beside the patient. Exit codes: 0 done, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from benchmarks.compare import shown, write_figures
from config import exit_code
from ct.picture import tile
from detect.folder import make_writable
from evaluation import metrics
from evaluation.metrics import defined
from healthygan.data import FULL, class_folders, read_images
from healthygan.model import Generator
from healthygan.scoring import difference
from healthygan.weights import find_model

GRID = 64                                # lungs are looked for on images of this side
AIR = 0.25                               # of white: darker, and at the edge, it is air
# Of the ellipses, in shares of the side: centre, half axes, and how far the upper end leans to the midline
CENTRES_X, CENTRES_Y = np.linspace(0.2, 0.38, 7), np.linspace(0.32, 0.6, 8)
HALF_WIDTHS, HALF_HEIGHTS, LEANS = np.linspace(0.09, 0.17, 5), np.linspace(0.18, 0.42, 7), (0.0, 0.15, 0.3)
RING = 0.06                              # its width
FRAME = 8                                # the outer frame is the side over this
BATCH, COLUMNS = 16, 10
OPACITY, OPACITY_SD = 0.2, 0.08          # of white at its middle; its Gaussian, of the side
SEED = 0


def lungs(images: np.ndarray) -> np.ndarray:
    """Masks bool [n, N, N] of images [n, N, N] in 0..1, N a multiple of GRID."""
    small = images.reshape(len(images), GRID, images.shape[1] // GRID, GRID, -1).mean((2, 4))
    small = np.stack([ndimage.gaussian_filter(without_air(one), 1) for one in small])
    inside, ring = ellipses()
    weights = np.sqrt(inside.sum(1, keepdims=True)) * (ring / ring.sum(1, keepdims=True)
                                                       - inside / inside.sum(1, keepdims=True))
    halves = [inside[(weights @ part.reshape(len(part), -1).T).argmax(0)].reshape(part.shape)
              for part in (small, small[:, :, ::-1])]
    found = (halves[0] + halves[1][:, :, ::-1]) > 0
    return found.repeat(images.shape[1] // GRID, 1).repeat(images.shape[2] // GRID, 2)


def without_air(image: np.ndarray) -> np.ndarray:
    """[N, N] with the air beside the patient in the image's median grey."""
    labels, _ = ndimage.label(image < AIR)
    at_edge = np.unique(np.concatenate([labels[:, 0], labels[:, -1], labels[-1]]))
    return np.where(np.isin(labels, at_edge[at_edge > 0]), np.median(image), image)


def ellipses() -> tuple[np.ndarray, np.ndarray]:
    """All candidates on the left of the picture and the rings around them, float32 [K, GRID^2] of 0 and 1."""
    y, x = np.mgrid[:GRID, :GRID] / (GRID - 1)
    inside, ring = [], []
    for cx, cy, a, b, lean in itertools.product(CENTRES_X, CENTRES_Y, HALF_WIDTHS, HALF_HEIGHTS, LEANS):
        across, down = x - cx + lean * (y - cy), y - cy
        inside.append((across / a) ** 2 + (down / b) ** 2 < 1)
        ring.append(((across / (a + RING)) ** 2 + (down / (b + RING)) ** 2 < 1) & ~inside[-1])
    return tuple(np.stack(part).reshape(len(part), -1).astype(np.float32) for part in (inside, ring))


def with_opacity(images: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, N, N] in 0..1 with a spot in a lung of each, and masks of the spots: its brighter half."""
    rng, (y, x) = np.random.default_rng(SEED), np.mgrid[:images.shape[1], :images.shape[2]]
    spots = []
    for mask in masks:
        at_y, at_x = rng.choice(np.argwhere(mask))
        variance = (OPACITY_SD * len(mask)) ** 2
        spots.append(np.exp(-((y - at_y) ** 2 + (x - at_x) ** 2) / (2 * variance)) * mask)
    return (images + OPACITY * np.stack(spots)).clip(0, 1), np.stack(spots) > 0.5


@torch.no_grad()
def maps(generator: Generator, images: np.ndarray) -> np.ndarray:
    """The generator's differences, [n, N, N] in 0..1, of grey images [n, N, N] in 0..1."""
    x = torch.from_numpy(images.astype(np.float32) * 2 - 1)[:, None].expand(-1, 3, -1, -1)
    return torch.cat([difference(part, generator(part).y) for part in x.split(BATCH)]).double().numpy()


def report(images: np.ndarray, masks: np.ndarray, labels: np.ndarray, generator: Generator) -> dict:
    """The figures of metrics.json. images [n, N, N] in 0..1, masks bool of that shape, labels [n]."""
    whole, frame = maps(generator, images), np.ones(images.shape[1:], bool)
    width = images.shape[1] // FRAME
    frame[width:-width, width:-width] = False
    grey = images.mean((1, 2))
    blanked = np.where(masks, images, grey[:, None, None])
    healthy = labels == 0
    pasted, spots = with_opacity(images[healthy], masks[healthy])
    pasted = maps(generator, pasted)
    scores = {"whole map": whole.mean((1, 2)),
              "map inside the lungs": np.array([one[mask].mean() for one, mask in zip(whole, masks)]),
              "map outside the lungs": np.array([one[~mask].mean() for one, mask in zip(whole, masks)]),
              "outer frame of the map": whole[:, frame].mean(1),
              "lungs alone shown": maps(generator, blanked).mean((1, 2)),
              "area of the lungs": masks.mean((1, 2)), "mean grey, darker": -grey,
              "mean grey of the lungs, darker": -np.array([one[mask].mean() for one, mask in zip(images, masks)])}

    def share(chosen: np.ndarray, where: np.ndarray) -> dict:
        return {"of the map": float((chosen * where).sum() / max(chosen.sum(), np.finfo(float).tiny)),
                "of the frame": float(where.mean())}

    with_and_without = np.concatenate([pasted.mean((1, 2)), whole[healthy].mean((1, 2))])
    return {"healthy": int(healthy.sum()), "diseased": int((labels == 1).sum()),
            "auc": {name: {"auc": metrics.auc(one, labels), "auc_delong": defined(metrics.delong_interval, one, labels)}
                    for name, one in scores.items()},
            "share": {group: share(whole[labels == label], masks[labels == label])
                      for label, group in enumerate(("healthy", "diseased"))},
            "pasted": share(pasted, spots) | {
                "auc": metrics.auc(with_and_without, np.repeat([1, 0], healthy.sum())),
                "rises": float((pasted.mean((1, 2)) > whole[healthy].mean((1, 2))).mean())}}


def table(figures: dict) -> str:
    """Markdown: a row a way to score; then the shares."""
    lines = [f"{figures['diseased']} diseased and {figures['healthy']} healthy.", "",
             "| score | AUC | DeLong 95 % |", "| --- | --- | --- |"]
    lines += [f"| {name} | {shown(f['auc'])} | {shown(f['auc_delong'])} |" for name, f in figures["auc"].items()]
    shares = ", ".join(f"{group} {f['of the map']:.2f} on {f['of the frame']:.2f} of the frame"
                       for group, f in figures["share"].items())
    pasted = figures["pasted"]
    return "\n".join([*lines, "", f"- The map's mass inside the lungs: {shares}.",
                      f"- An opacity pasted into the healthy: AUC {pasted['auc']:.2f} against the same images without, "
                      f"the score rises in {pasted['rises']:.2f} of them; {pasted['of the map']:.2f} of the map's mass "
                      f"lies on it, {pasted['of the frame']:.2f} of the frame."]) + "\n"


def montage(images: np.ndarray, masks: np.ndarray) -> Image.Image:
    """All images with the outlines of their lungs."""
    tiles = np.repeat((images * 255).astype(np.uint8)[..., None], 3, -1)
    for one, mask in zip(tiles, masks):
        one[mask & ~ndimage.binary_erosion(mask)] = (255, 60, 60)
    return Image.fromarray(tile(tiles, COLUMNS))


def benchmark(args: argparse.Namespace) -> int:
    """Returns the exit code. Raises CheckpointError and DatasetError."""
    make_writable(args.out)
    model = find_model(args.model)
    if model.settings.kind != "images" or model.settings.size % GRID:
        raise ValueError(f"--model {args.model}: expected one that learnt from images, their side a multiple of {GRID}")
    folders = class_folders(args.data, "test", ("healthy", "diseased"))
    parts = [read_images(folder, model.settings) for folder in folders]
    images = np.concatenate([part.pixels.mean(1) / FULL for part in parts])
    labels, masks = np.repeat([0, 1], [len(part) for part in parts]), lungs(images)
    montage(images, masks).save(args.out / "lungs.png")
    figures = report(images, masks, labels, model.generator) | {"weights_sha256": model.weights_hash}
    write_figures(args.out, figures, table(figures))
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with test/healthy and test/diseased")
    parser.add_argument("--model", type=Path, required=True, help="model's or run's folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for figures and the montage")
    return exit_code(benchmark, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
