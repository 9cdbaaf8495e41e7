"""What Pillow raises for a file that is no picture, or a damaged one; and a kind that it reads in part, refused."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)        # a broken PNG: SyntaxError
TIFF_BITS = 258                          # TIFF tag: the bits of each channel


def refuse_16_bit_colour(path: Path, image: Image.Image) -> None:
    """ValueError for 16-bit colour or grey with alpha, of which Pillow hands out the upper 8 bits alone.

    image: as opened from `path`.
    """
    if not image.mode.startswith("I") and _stored_bits(path, image) > 8:
        raise ValueError("expected 8 bits a channel, or grey of 16 bits; found 16-bit colour or grey with alpha: save "
                         "it as 16-bit grey")


def _stored_bits(path: Path, image: Image.Image) -> int:
    """Bits of a channel in the file, of the formats that may have more than 8: PNG, by its header, and TIFF."""
    if image.format == "PNG":
        with path.open("rb") as file:
            return file.read(25)[24]
    return max(getattr(image, "tag_v2", {}).get(TIFF_BITS, (8,)))
