"""HU slices as pictures: grey windows, contact sheets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

BRAIN_WINDOW_HU = (0.0, 80.0)


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


def save_hu_grid(path: Path, hu: np.ndarray, columns: int = 8, window_hu: tuple[float, float] = BRAIN_WINDOW_HU) -> None:
    """Write slices hu [B, N, N] as one PNG contact sheet."""
    Image.fromarray(tile(grey(hu, window_hu), columns)).save(path)
