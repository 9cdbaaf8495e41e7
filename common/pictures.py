"""What Pillow raises for a file that is no picture, or a damaged one."""

from PIL import Image

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)        # a broken PNG: SyntaxError
