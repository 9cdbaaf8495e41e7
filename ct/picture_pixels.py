"""PNG and JPEG files: what their header tells, and their pixels, decoded by ct.decoder_process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ct.decoder_process import DecodingError, decode_apart
from ct.limits import check_size
from ct.scan import ScanError

FORMATS = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff"}         # by Pillow's name, with their first bytes
MAGIC = tuple(FORMATS.values())
GREY, COLOUR = ("L", "LA"), ("RGB", "RGBA", "P", "PA")                   # of 8 bits; those of 16 begin with I
BYTES = 4                                             # of a pixel in memory, at most


def read_pixels(path: Path, count: int) -> tuple[np.ndarray, np.ndarray | None, int]:
    """Pixels [H, W] or [H, W, 3] turned upright, where they are transparent (None: nowhere), and the full scale.

    count: pictures of this size that are to be read. Raises ScanError for a picture that cannot be read, that is too
    large, or neither grey (8 or 16 bits) nor RGB.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(26)
        if head.startswith(FORMATS["PNG"]) and head[24] == 16 and head[25] != 0:
            raise ScanError(f"{path.name}: 16-bit colour or grey with alpha; save the slices as 16-bit grey")
        with Image.open(path, formats=tuple(FORMATS)) as opened:         # the header alone, in Python
            height, width, mode = opened.height, opened.width, opened.mode
        check_size(path.name, count, height, width)
        if mode not in (*GREY, *COLOUR) and not mode.startswith("I"):
            raise ScanError(f"{path.name}: picture mode {mode} is neither grey (8 or 16 bit) nor RGB")
        pixels, *outside = decode_apart("picture", path, BYTES * height * width)
    except ScanError:
        raise
    except Image.DecompressionBombError as error:     # its own limit, before ours is asked
        raise ScanError(f"{path.name}: more pixels than any slice has; export the slices in their own size") from error
    except Exception as error:                        # Pillow raises whatever a damaged file leads to
        reason = str(error) if isinstance(error, DecodingError) else type(error).__name__
        raise ScanError(f"{path.name}: cannot be read as a picture ({reason}: damaged, truncated, or neither PNG nor "
                        "JPEG)") from error
    return pixels, outside[0] if outside else None, 255 if pixels.dtype == np.uint8 else 65535


def is_jpeg(path: Path) -> bool:
    """By the first bytes of a file: names may say otherwise."""
    with open(path, "rb") as file:
        return file.read(3) == FORMATS["JPEG"]


def decode(path: str) -> list[np.ndarray]:
    """Pixels and, where some are transparent, which; see ct.decoder_process."""
    with Image.open(path, formats=tuple(FORMATS)) as opened:
        image = ImageOps.exif_transpose(opened)
    outside, mode = [], image.mode
    if mode.startswith("I"):
        return [np.asarray(image)]
    if image.has_transparency_data:
        image = image.convert("RGBA")
        transparent = np.asarray(image)[..., 3] == 0
        outside = [transparent] if transparent.any() else []
    if image.mode not in ("L", "RGB"):
        image = image.convert("L" if mode in GREY else "RGB")
    return [np.asarray(image), *outside]
