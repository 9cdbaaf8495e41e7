"""Pictures of what HealthyGAN does with an image, side by side, and difference maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ct.picture import residual_colours
from healthygan.model import Translation
from healthygan.scoring import difference

FULL_DIFFERENCE = 0.25        # the difference, of the whole range, that is drawn brightest


def panels(x: torch.Tensor, of_x: Translation) -> np.ndarray:
    """x, t, y, m, |x - y| and that painted over x, side by side: uint8 [B, H, 6 W, 3].

    Differences go from black by red to yellow, as dense residuals of CN-StyleGAN do.
    """
    def rgb(images):
        return ((images.permute(0, 2, 3, 1).float().cpu().numpy() + 1) * 127.5 + 0.5).clip(0, 255).astype(np.uint8)

    mask = rgb(of_x.m.expand(-1, 3, -1, -1) * 2 - 1)
    maps = difference(x, of_x.y).float().cpu().numpy()
    colours = np.stack([residual_colours(one, FULL_DIFFERENCE) for one in maps])
    share = np.clip(2 * maps / FULL_DIFFERENCE, 0, 1)[..., None]
    over = ((1 - share) * rgb(x) + share * colours).astype(np.uint8)
    return np.concatenate([rgb(x), rgb(of_x.t), rgb(of_x.y), mask, colours, over], axis=2)


def save_grid(path: Path, x: torch.Tensor, of_x: Translation) -> None:
    """The panels of several images below each other, as one PNG."""
    Image.fromarray(np.concatenate(list(panels(x, of_x)))).save(path)


def save_map(path: Path, one: np.ndarray) -> None:
    """A difference map [H, W] in [0, 1] as a 16-bit grey PNG: 65535 is 1."""
    Image.fromarray((one.clip(0, 1) * 65535 + 0.5).astype(np.uint16)).save(path)
