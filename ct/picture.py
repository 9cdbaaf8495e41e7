"""HU slices as pictures: grey windows, contact sheets."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

BRAIN_WINDOW_HU = (0.0, 80.0)
RESIDUAL_FULL_HU = 30.0                 # shown in the last colour: yellow where hyperdense, pale blue where hypodense
PANELS = ("query", "closest normal", "residual", "mask")          # of an overlay, from left to right


def grey(hu: np.ndarray, window_hu: tuple[float, float] = BRAIN_WINDOW_HU) -> np.ndarray:
    """HU of any shape -> uint8, black at the window's low end."""
    low, high = window_hu
    return (np.clip((hu - low) / (high - low), 0, 1) * 255 + 0.5).astype(np.uint8)


def tile(pictures: np.ndarray, columns: int) -> np.ndarray:
    """[B, H, W] or [B, H, W, 3] -> one picture with `columns` tiles a row; missing tiles are black."""
    rows = -(-len(pictures) // columns)
    blank = np.zeros((rows * columns - len(pictures), *pictures.shape[1:]), pictures.dtype)
    grid = np.concatenate([pictures, blank]).reshape(rows, columns, *pictures.shape[1:])
    return np.concatenate([np.concatenate(list(row), axis=1) for row in grid], axis=0)


def save_hu_grid(path: Path, hu: np.ndarray, columns: int = 8,
                 window_hu: tuple[float, float] = BRAIN_WINDOW_HU) -> None:
    """Write slices hu [B, N, N] as one PNG contact sheet."""
    Image.fromarray(tile(grey(hu, window_hu), columns)).save(path)


def residual_colours(residual_hu: np.ndarray, full_hu: float = RESIDUAL_FULL_HU) -> np.ndarray:
    """Signed residual [H, W] -> RGB uint8: black at 0, red to yellow where hyperdense, blue where hypodense."""
    strength = np.clip(np.abs(residual_hu) / full_hu, 0, 1)
    first, second = np.minimum(1, 2 * strength), np.maximum(0, 2 * strength - 1)
    high = np.stack([first, second, 0 * strength], -1)
    low = np.stack([second / 2, second, first], -1)
    return (np.where(residual_hu[..., None] > 0, high, low) * 255 + 0.5).astype(np.uint8)


def mark(hu: np.ndarray, lesion: np.ndarray, side: int = 360) -> np.ndarray:
    """A slice [H, W] in the brain window with its lesion mask in red: uint8 [H, W, 3].

    An outline and a light tint, so that what is marked stays readable; the outline is a pixel wide in a picture
    whose longer side is `side`.
    """
    picture = np.repeat(grey(hu)[..., None], 3, -1)
    edge = lesion & ~ndimage.binary_erosion(lesion, iterations=max(1, round(max(lesion.shape) / side)))
    marked = picture.copy()
    for where, share in ((lesion, 0.15), (edge, 0.9)):
        marked[where] = ((1 - share) * picture[where] + share * np.array([255, 40, 30])).astype(np.uint8)
    return marked


def overlay_panels(query_hu: np.ndarray, reconstruction_hu: np.ndarray, residual_hu: np.ndarray, lesion: np.ndarray,
                   side: int = 360) -> Image.Image:
    """One slice as four panels (PANELS): query, closest normal, residual, and the query with the lesion mask in red.

    All [H, W]; a panel's longer side is reduced to `side` pixels if it is longer.
    """
    query, marked = np.repeat(grey(query_hu)[..., None], 3, -1), mark(query_hu, lesion, side)
    normal = np.repeat(grey(reconstruction_hu)[..., None], 3, -1)
    row = Image.fromarray(np.concatenate([query, normal, residual_colours(residual_hu), marked], 1))
    scale = min(1.0, side / max(query.shape[:2]))
    return row.resize((round(row.width * scale), round(row.height * scale)), Image.Resampling.LANCZOS)


def pack_overlay(path: Path, side: int, quality: int) -> tuple[str, float]:
    """An overlay's file as WebP in base64, its panels at most `side` pixels long; and a panel's width by height.

    quality: 1 to 100, of WebP. Raises OSError where the file is no picture.
    """
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    width, height = picture.width // len(PANELS), picture.height
    scale = min(1.0, side / max(width, height))
    if scale < 1:
        size = (len(PANELS) * round(width * scale), round(height * scale))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    packed = io.BytesIO()
    picture.save(packed, "WEBP", quality=quality, method=2)
    return base64.b64encode(packed.getvalue()).decode(), width / height
