"""HU slices as pictures: grey windows, contact sheets."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from isal import isal_zlib
from PIL import Image
from scipy import ndimage

from common.pictures import UNREADABLE

BRAIN_WINDOW_HU = (0.0, 80.0)
RESIDUAL_FULL_HU = 30.0                 # shown in the last colour: yellow where hyperdense, pale blue where hypodense
PANELS = ("query", "closest normal", "residual", "mask")          # of an overlay, from left to right
FILTER, FILTER_PX = Image.Resampling.HAMMING, 1        # of reduced pictures; it reaches a pixel of the coarser picture
SQUARE = 0.01                           # pixels whose sides differ by a smaller share are shown as square
PNG_LEVEL = 1                           # of ISA-L's 0 to 3; the higher ones save under 2 %


def grey(hu: np.ndarray, window_hu: tuple[float, float] = BRAIN_WINDOW_HU) -> np.ndarray:
    """HU of any shape -> uint8, black at the window's low end."""
    low, high = window_hu
    share = (hu - low) / (high - low)
    np.clip(share, 0, 1, out=share)
    share *= 255
    share += 0.5
    return share.astype(np.uint8)


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


def square_shape(shape: tuple[int, int], pixel_spacing_mm: tuple[float, float] | None) -> tuple[float, float]:
    """Height and width of a slice [H, W] in square pixels of its finer side; as they are, where none is known."""
    row_mm, column_mm = pixel_spacing_mm or (1.0, 1.0)
    finer = min(row_mm, column_mm)
    if max(row_mm, column_mm) <= (1 + SQUARE) * finer:
        return shape
    return shape[0] * row_mm / finer, shape[1] * column_mm / finer


def overlay_panels(query_hu: np.ndarray, reconstruction_hu: np.ndarray, residual_hu: np.ndarray, lesion: np.ndarray,
                   side: int = 360, pixel_spacing_mm: tuple[float, float] | None = None) -> Image.Image:
    """One slice as four panels (PANELS): query, closest normal, residual, and the query with the lesion mask in red.

    All [H, W]; pixel_spacing_mm (row, column): a panel's pixels are square, whatever the slice's are, and its longer
    side is reduced to `side` of them if it is longer.
    """
    shape = square_shape(query_hu.shape, pixel_spacing_mm)
    scale = min(1.0, side / max(shape))
    height, width = (max(1, round(length * scale)) for length in shape)
    row = np.zeros((height, len(PANELS), width, 3), np.uint8)
    for panel, hu in enumerate((query_hu, reconstruction_hu)):
        row[:, panel] = _reduced(grey(hu), width, height)[..., None]
    row[:, 3] = row[:, 0]
    _draw_part(row[:, 2], residual_hu != 0, lambda: _residual_picture(residual_hu))
    _draw_part(row[:, 3], lesion, lambda: mark(query_hu, lesion, side))
    return Image.fromarray(row.reshape(height, len(PANELS) * width, 3))


def _reduced(picture: np.ndarray, width: int, height: int, box: tuple[float, float, float, float] | None = None
             ) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((width, height), FILTER, box))


def _draw_part(panel: np.ndarray, where: np.ndarray, picture: Callable[[], np.ndarray]) -> None:
    """Replaces, in a reduced panel [h, w, 3], what hangs on the pixels `where` [H, W] of the picture [H, W, 3]."""
    if not where.any():
        return
    (top, bottom), (left, right) = (
        (max(0, int(found[0] * reduced / length) - reach - 1),
         min(reduced, int((found[-1] + 1) * reduced / length) + reach + 2))
        for found, reduced, length, reach in (
            (np.flatnonzero(where.any(1 - axis)), panel.shape[axis], where.shape[axis],
             FILTER_PX * max(1, -(-panel.shape[axis] // where.shape[axis]))) for axis in (0, 1)))
    y, x = (length / reduced for length, reduced in zip(where.shape, panel.shape))
    panel[top:bottom, left:right] = _reduced(picture(), right - left, bottom - top,
                                             (left * x, top * y, right * x, bottom * y))


def _residual_picture(residual_hu: np.ndarray) -> np.ndarray:
    """residual_colours [H, W, 3], worked out only about the brain: it is 0, and black, elsewhere."""
    picture = np.zeros((*residual_hu.shape, 3), np.uint8)
    rows, columns = (np.flatnonzero(residual_hu.any(1 - axis)) for axis in (0, 1))
    part = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    picture[part] = residual_colours(residual_hu[part])
    return picture


def save_png(path: Path, picture: np.ndarray) -> None:
    """uint8 [H, W, 3] as PNG by ISA-L: in a tenth of the time of zlib's level 2, and a seventh larger."""
    height, width, _ = picture.shape
    rows = picture.reshape(height, 3 * width)
    filtered = np.empty((height, 3 * width + 1), np.uint8)
    filtered[:, 0] = 2                                       # the filter 'up': each row less the one above
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    eight_bit_rgb = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", eight_bit_rgb), (b"IDAT", isal_zlib.compress(filtered, PNG_LEVEL)), (b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks))


def pack_overlay(path: Path, side: int, quality: int) -> tuple[str, float]:
    """An overlay's file as JPEG in base64, its panels at most `side` pixels long; and a panel's width by height.

    quality: 1 to 95, of JPEG. Raises OSError where the file is no picture, or one of panels without a pixel.
    """
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        width, height = picture.width // len(PANELS), picture.height
        if not width:
            raise ValueError(f"narrower than its {len(PANELS)} panels")
        scale = min(1.0, side / max(width, height))
        if scale < 1:
            size = (len(PANELS) * round(width * scale), round(height * scale))
            picture = picture.resize(size, FILTER)
    except UNREADABLE as error:
        raise OSError(f"{path}: cannot be read as a picture ({error})") from error
    packed = io.BytesIO()
    picture.save(packed, "JPEG", quality=quality, optimize=True)
    return base64.b64encode(packed.getvalue()).decode(), width / height
