"""Folders of PNG or JPEG slices with a scan.json beside them, and the original's layout <case>/png/*.png."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ct.scan import Scan, ScanError
from ct.window import WINDOWS_HU, decode

SUFFIXES = (".png", ".jpg", ".jpeg")
ORDERS = ("inferior-to-superior", "superior-to-inferior")
SCAN_JSON_HELP = (
    'scan.json must hold {"windows_hu": [[low, high]] for grey pictures or three such pairs for RGB, '
    '"slice_spacing_mm": number or null, "pixel_spacing_mm": number, [row, column] or null, '
    f'"order": "{ORDERS[0]}" or "{ORDERS[1]}"}}; "clipped_hu": [low, high] besides, where values were clipped to less '
    "than the window"
)
LOOSE_HELP = (
    'scan.json of loose slices must hold {"loose": true, "windows_hu": [[low, high]], "pixel_spacing_mm": number or '
    '[row, column], the assumed one where it is unknown}; "clipped_hu" as for scans'
)


@dataclass(frozen=True)
class SliceSpec:
    """What scan.json says: one or three windows in HU, spacings in mm (None where unknown), the file order.

    clipped_hu  what values were clipped to before they were written, where that is less than the windows
    loose       the pictures are no scan but single slices of many people (ct.loose)
    """

    windows_hu: tuple[tuple[float, float], ...]
    slice_spacing_mm: float | None
    pixel_spacing_mm: tuple[float, float] | None
    order: str
    clipped_hu: tuple[float, float] | None = None
    loose: bool = False

    @property
    def saturation_hu(self) -> tuple[float, float]:
        """As in ct.scan.Scan."""
        return self.clipped_hu or (min(low for low, _ in self.windows_hu), max(high for _, high in self.windows_hu))


ORIGINAL_LAYOUT = SliceSpec(WINDOWS_HU, None, None, ORDERS[0])   # <case>/png/*.png without a scan.json


def natural_key(path: Path) -> tuple:
    """Sort key under which '2.png' comes before '10.png'."""
    parts = re.split(r"(\d+)", path.stem)
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in parts), path.name


def load_spec(path: Path) -> SliceSpec:
    """Read and check a scan.json. Raises ScanError naming the file and the key."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ScanError(f"{path}: cannot be read as JSON ({error}); {SCAN_JSON_HELP}") from error
    if not isinstance(data, dict):
        raise ScanError(f"{path}: expected an object, found {type(data).__name__}; {SCAN_JSON_HELP}")
    loose = data.get("loose", False)
    if not isinstance(loose, bool):
        raise ScanError(f"{path}: 'loose' must be true or false, found {loose!r}; {LOOSE_HELP}")
    keys = ("windows_hu", "pixel_spacing_mm") if loose else ("windows_hu", "slice_spacing_mm", "pixel_spacing_mm",
                                                             "order")
    for key in keys:
        if key not in data:
            raise ScanError(f"{path}: '{key}' is missing; {LOOSE_HELP if loose else SCAN_JSON_HELP}")
    windows, pixel_spacing_mm = _windows(path, data["windows_hu"]), _pixel_spacing(path, data["pixel_spacing_mm"])
    clipped_hu = _clipped(path, data["clipped_hu"]) if "clipped_hu" in data else None
    if loose:
        if pixel_spacing_mm is None:
            raise ScanError(f"{path}: 'pixel_spacing_mm' is null, and one slice does not tell the size of its head; "
                            f"{LOOSE_HELP}")
        return SliceSpec(windows, None, pixel_spacing_mm, ORDERS[0], clipped_hu, loose)
    if data["order"] not in ORDERS:
        raise ScanError(f"{path}: 'order' must be one of {', '.join(ORDERS)}, found {data['order']!r}")
    slice_spacing_mm = _spacing(path, "slice_spacing_mm", data["slice_spacing_mm"])
    return SliceSpec(windows, slice_spacing_mm, pixel_spacing_mm, data["order"], clipped_hu)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _windows(path: Path, value) -> tuple[tuple[float, float], ...]:
    pairs_ok = isinstance(value, list) and len(value) in (1, 3) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair)) and pair[0] < pair[1]
        for pair in value)
    if not pairs_ok:
        raise ScanError(f"{path}: 'windows_hu' must be one [low, high] pair (grey) or three (RGB) in HU, low "
                        f"below high, as in [[-20, 100]]; found {value!r}")
    windows = tuple((float(low), float(high)) for low, high in value)
    if len(windows) == 3 and windows != WINDOWS_HU:
        raise ScanError(f"{path}: three 'windows_hu' must be {[list(w) for w in WINDOWS_HU]} for R, G and B, the "
                        f"windows of the method; found {value!r}; export the slices again with these, or as "
                        "16-bit grey with one window")
    return windows


def _clipped(path: Path, value) -> tuple[float, float]:
    if not (isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)) and value[0] < value[1]):
        raise ScanError(f"{path}: 'clipped_hu' must be [low, high] in HU, low below high; found {value!r}")
    return float(value[0]), float(value[1])


def _spacing(path: Path, key: str, value) -> float | None:
    if value is None:
        return None
    if not _is_number(value) or value <= 0:
        raise ScanError(f"{path}: '{key}' must be a positive number of mm or null, found {value!r}")
    return float(value)


def _pixel_spacing(path: Path, value) -> tuple[float, float] | None:
    pair = value if isinstance(value, list) else [value, value]
    if len(pair) != 2 or (isinstance(value, list) and None in pair):
        raise ScanError(f"{path}: 'pixel_spacing_mm' must be a number, [row, column] or null; found {value!r}")
    row, column = (_spacing(path, "pixel_spacing_mm", v) for v in pair)
    return None if row is None else (row, column)


def read_slices(scan_id: str, pictures: Sequence[Path], scan_json: Path | None, mask: Path | None = None,
                unknown_slice_spacing_mm: float = 5.0) -> Scan:
    """Read a folder's pictures as a Scan; scan_json None means the original's three-window pictures.

    Grey g becomes low + g / 255 * (high - low) HU (16-bit: / 65535); RGB of three windows is decoded by
    ct.window. mask: a .npy [S, H, W] in the order of the file names, non-zero in the brain.
    unknown_slice_spacing_mm stands in for an unknown slice spacing; 0 refuses such scans.
    Raises ScanError for pictures that cannot be read, differ in size or do not fit the windows.
    """
    spec = ORIGINAL_LAYOUT if scan_json is None else load_spec(scan_json)
    if spec.loose:
        raise ScanError(f"{scan_json}: loose slices are no scan: without neighbours and positions they can only be "
                        "trained on (prepare.py)")
    pictures = sorted(pictures, key=natural_key)
    slices = [read_picture(path, spec) for path in pictures]
    for path, image in zip(pictures, slices):
        if image.shape != slices[0].shape:
            raise ScanError(f"{path}: {image.shape[1]}x{image.shape[0]} pixels, but {pictures[0].name} has "
                            f"{slices[0].shape[1]}x{slices[0].shape[0]}; the slices of a scan share one size")
    for before, path in zip(pictures, pictures[1:]):
        if natural_key(before)[0] == natural_key(path)[0]:
            raise ScanError(f"{path}: the same slice as {before.name}, by its name; leave one of them in the folder")
    hu = np.stack(slices)
    brain = None if mask is None else _read_mask(mask, hu.shape)
    if spec.order == "superior-to-inferior":
        hu, brain = hu[::-1].copy(), None if brain is None else brain[::-1].copy()
    spacing, notes = spec.slice_spacing_mm, _skipped_numbers(pictures)
    if spacing is None:
        if unknown_slice_spacing_mm <= 0:
            raise ScanError(f"{scan_id}: slice spacing unknown; write slice_spacing_mm in scan.json or give "
                            "--unknown-slice-spacing-mm a number above 0")
        spacing = float(unknown_slice_spacing_mm)
        notes = (f"slice spacing unknown, {spacing:g} mm assumed (--unknown-slice-spacing-mm)", *notes)
    return Scan(scan_id, hu, np.arange(len(hu)) * spacing, spec.pixel_spacing_mm, spec.saturation_hu, brain,
                source="slices", notes=notes)


def _skipped_numbers(pictures: Sequence[Path]) -> tuple[str, ...]:
    """A note where files are numbered one by one and some numbers are missing."""
    if not all(path.stem.isdecimal() for path in pictures):
        return ()
    numbers = np.array([int(path.stem) for path in pictures])
    steps = np.diff(numbers)
    if (steps == 1).all() or (steps == 1).mean() < 0.5:
        return ()
    skipped = sorted(set(range(numbers[0], numbers[-1] + 1)) - set(numbers.tolist()))
    shown = ", ".join(map(str, skipped[:5])) + (", ..." if len(skipped) > 5 else "")
    return (f"slices missing, by their numbers: {len(skipped)} ({shown}); the others are taken as evenly spaced",)


def read_picture(path: Path, spec: SliceSpec) -> np.ndarray:
    """One picture as HU, float32 [H, W]. Raises ScanError where it cannot be read or does not fit the windows."""
    try:
        with Image.open(path) as image:
            if image.mode in ("P", "RGBA"):
                image = image.convert("RGB")
            elif image.mode == "LA":
                image = image.convert("L")
            mode, pixels = image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ScanError(f"{path}: cannot be read as a picture ({error})") from error
    if mode == "L":
        full = 255
    elif mode.startswith("I"):                                                    # 16-bit PNG
        full = 65535
    elif mode == "RGB":
        full = 255
    else:
        raise ScanError(f"{path}: picture mode {mode} is neither grey (8 or 16 bit) nor RGB")
    if len(spec.windows_hu) == 3:
        if mode != "RGB":
            raise ScanError(f"{path}: a grey picture, but three windows, one for each of R, G and B; "
                            f"{SCAN_JSON_HELP}")
        return np.asarray(decode(pixels.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1), np.float32)
    if mode == "RGB":
        pixels = _grey(path, pixels)
    low, high = spec.windows_hu[0]
    return (low + pixels.astype(np.float32) / np.float32(full) * (high - low)).astype(np.float32)


def _grey(path: Path, rgb: np.ndarray) -> np.ndarray:
    """The one channel of a grey picture stored as RGB; JPEG's colour conversion may cost 2 levels."""
    tolerance = 0 if path.suffix.lower() == ".png" else 2
    spread = int((rgb.max(-1).astype(int) - rgb.min(-1)).max())
    if spread > tolerance:
        raise ScanError(f"{path}: a colour picture (channels differ by up to {spread} levels), but one window; "
                        f"{SCAN_JSON_HELP}")
    return rgb[..., 1]


def _read_mask(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    try:
        mask = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ScanError(f"{path}: cannot be read as a NumPy array ({error})") from error
    if mask.shape != shape:
        raise ScanError(f"{path}: the mask is {list(mask.shape)}, the slices are {list(shape)} [S, H, W]")
    if not mask.any():
        raise ScanError(f"{path}: the mask is empty; delete it to have the brain found")
    return mask != 0
