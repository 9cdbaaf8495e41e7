"""Folders of PNG or JPEG slices with a scan.json beside them, and the original's layout <case>/png/*.png."""

from __future__ import annotations

import codecs
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from ct.geometry import nominal_stack
from ct.limits import check_pixel_spacing, check_ratio, check_slice_spacing
from ct.picture_pixels import MAGIC, is_jpeg, read_pixels
from ct.scan import Found, Scan, ScanError, ScanSource
from ct.window import WINDOWS_HU, decode, encode

KIND = "slices"
SCAN_JSON, MASK = "scan.json", ("BrainExtraction", "bet.npy")
TWELVE_BITS = 4095
WHITE_BORDER = 0.8                                    # share of the border from which a picture looks inverted
AGREE = 3.0                                           # levels: channels of one HU differ by less, but at edges of
MISFIT = 0.5                                          # pictures that were resized: of their tissue, no more than this
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
        """As in ct.scan.Scan: the windows end what was not clipped before."""
        low, high = self.clipped_hu or (-math.inf, math.inf)
        return max(low, min(low for low, _ in self.windows_hu)), min(high, max(high for _, high in self.windows_hu))


ORIGINAL_LAYOUT = SliceSpec(WINDOWS_HU, None, None, ORDERS[0])   # <case>/png/*.png without a scan.json


# ---- claims and find

def claims(path: Path, head: bytes) -> bool:
    """Whether a file is a PNG or JPEG, by its first bytes or its name, or belongs to a folder of them."""
    return head.startswith(MAGIC) or path.suffix.lower() in SUFFIXES or path.name in (SCAN_JSON, MASK[1])


def find(paths: Sequence[Path]) -> list[Found]:
    """One scan per folder of pictures; an error where its scan.json or its pictures are missing."""
    folders: dict[Path, list[Path]] = {}
    for path in paths:
        files = folders.setdefault(path.parent, [])
        if path.name not in (SCAN_JSON, MASK[1]):
            files.append(path)
    found = []
    for directory, pictures in folders.items():
        found += _find_in(directory, pictures)
    return found


def _find_in(directory: Path, pictures: list[Path]) -> list[Found]:
    case = directory.parent if directory.name.lower() == "png" else directory
    specs = [path for path in (directory / SCAN_JSON, case / SCAN_JSON) if path.is_file()]
    if not pictures:
        if not specs or any(p.is_dir() and p.name.lower() == "png" for p in directory.iterdir()):
            return []
        error = f"{SCAN_JSON}: there are no PNG or JPEG slices beside it"
    elif not specs and (case == directory or any(p.suffix.lower() != ".png" for p in pictures)):
        error = f"{len(pictures)} pictures without a {SCAN_JSON} ({pictures[0].name} and others); {SCAN_JSON_HELP}"
    else:
        mask = case.joinpath(*MASK)
        options = {"scan_json": specs[0] if specs else None, "mask": mask if mask.is_file() else None}
        return [Found(KIND, tuple(pictures), case, options=options)]
    return [Found(KIND, tuple(pictures or specs), case, error=error)]


# ---- order

def natural_key(path: Path) -> tuple:
    """Sort key under which '2.png' comes before '10.png'."""
    parts = re.split(r"(\d+)", path.stem)
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in parts), path.name


def in_order(pictures: Sequence[Path]) -> list[tuple[Fraction, Path]]:
    """Pictures with the number that their names give, in its order. ScanError where the names give no order.

    All names must read alike but for their numbers, and if several numbers change they must rise together. A sign and
    decimals belong to the number where names are told apart by them (z-60.0, z5.0), and at the start of a name. A dash
    that is in all names says nothing: it is refused where it may be a sign (z-60.0, z-55.0).
    """
    stems = [path.stem for path in pictures]
    plain, decimal, signed = r"\d+", r"(?:^[-+])?\d+(?:\.\d+)?", r"[-+]?\d+(?:\.\d+)?"
    at_start = any(re.match(r"[-+]\d", stem) for stem in stems)
    for reading in (decimal, signed) if at_start else (plain, decimal, signed):
        texts = {tuple(re.split(reading, stem)) for stem in stems}
        if len(texts) > 1:
            continue
        found = [re.findall(reading, stem) for stem in stems]
        exact = [[Fraction(number) for number in numbers] for numbers in found]                   # a UID has 20 digits
        order = sorted(range(len(stems)), key=exact.__getitem__)
        for before, k in zip(order, order[1:]):
            if exact[before] == exact[k]:
                first, second = sorted((pictures[before].name, pictures[k].name))
                raise ScanError(f"{second}: the same slice as {first}, by their names; take one of them out")
        lowest = [min(column) for column in zip(*exact)]
        ranked = np.array([[float(number - low) for number, low in zip(exact[k], lowest)] for k in order])
        changing = [column for column in range(ranked.shape[1]) if np.ptp(ranked[:, column]) > 0]
        if not all((np.diff(ranked[:, column]) > 0).all() for column in changing):
            continue
        (text,), columns = texts, list(zip(*found))
        if not _rises_by_more_than_dashes(stems, text, columns, ranked, changing):
            continue
        return [(exact[k][changing[0]] if changing else Fraction(0), pictures[k]) for k in order]
    raise ScanError(f"the names of the pictures give no order ({min(pictures).name}, {max(pictures).name}): they must "
                    "be alike but for one number, or for numbers that rise together; name the slices by number, and "
                    "put each series in a folder of its own")


def _rises_by_more_than_dashes(stems: list[str], text: tuple[str, ...], columns: Sequence[Sequence[str]],
                               ranked: np.ndarray, changing: list[int]) -> bool:
    """Whether an order that the changing numbers rise in stands: not where they do only with a dash as a sign that all
    names have. ScanError where a dash that is read as none may be one.

    text: what all names have before, between and behind their numbers; columns: the numbers as written, in the order of
    stems; ranked: their values, in the order found, less the lowest of each.
    """
    behind = [column for column in changing if column and text[column] == "." and text[column - 1].endswith("-")]
    dashed = [column for column in changing if text[column].endswith("-")] + behind
    signed = [column for column in changing if (column or text[0])
              and any(number.startswith("-") for number in columns[column])]
    if len({*dashed, *signed}) < len(changing):
        return True                                    # a number without a dash tells the order
    if any(all(number.startswith("-") for number in columns[column]) for column in signed):
        return False                                   # no sign by which names are told apart, though the others rise
    for column in dashed:
        numbers = columns[column]
        if column in behind:                           # zeros there are digits, and pad nothing
            numbers = [number.lstrip("0") or "0" for number in numbers]
        decimals = columns[column + 1] if text[column + 1] == "." and column + 1 < len(columns) else None
        _refuse_sign(stems, numbers, ranked[:, column], decimals)
    return True


def _refuse_sign(stems: list[str], numbers: Sequence[str], ranked: np.ndarray, decimals: Sequence[str] | None) -> None:
    """ScanError where the dash before these numbers, which all names have, may be their sign.

    ranked: their values, in order, less the lowest; decimals: what comes after a point behind them, if that is a number
    of its own. Not where they count: whole, one by one or padded with zeros (im-0005), or from 0 or 1 with few gaps;
    with decimals, which positions have, padded or not (z-060.0), only if these stay, padded and from 0 or 1.
    """
    steps, padded = np.diff(ranked), any(re.match(r"0\d", number) for number in numbers)
    decimals = decimals or [number.partition(".")[2] for number in numbers]
    few_gaps = min(map(float, numbers)) <= 1 and (steps == 1).sum() >= len(steps) / 2
    counts = padded and few_gaps and len(set(decimals)) == 1 if any(decimals) else (
        padded or few_gaps or (steps == 1).all())
    if not counts:
        raise ScanError(f"{min(stems)}, {max(stems)}: is the dash before the number a sign? Name the slices by numbers "
                        "without one")


# ---- scan.json

def load_spec(path: Path) -> SliceSpec:
    """Read and check a scan.json, in UTF-8 or UTF-16. Raises ScanError naming the file and the key."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
        data = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        where = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise ScanError(f"{path.name}: cannot be read as JSON ({where}; numbers have a point, not a comma); "
                        f"{SCAN_JSON_HELP}") from error
    if not isinstance(data, dict):
        raise ScanError(f"{path.name}: expected an object, found {type(data).__name__}; {SCAN_JSON_HELP}")
    loose = data.get("loose", False)
    if not isinstance(loose, bool):
        raise ScanError(f"{path.name}: 'loose' must be true or false, found {loose!r}; {LOOSE_HELP}")
    keys = ("windows_hu", "pixel_spacing_mm") if loose else ("windows_hu", "slice_spacing_mm", "pixel_spacing_mm",
                                                             "order")
    for key in keys:
        if key not in data:
            raise ScanError(f"{path.name}: '{key}' is missing; {LOOSE_HELP if loose else SCAN_JSON_HELP}")
    windows, pixel_spacing_mm = _windows(path, data["windows_hu"]), _pixel_spacing(path, data["pixel_spacing_mm"])
    clipped_hu = _clipped(path, data["clipped_hu"], windows) if "clipped_hu" in data else None
    if loose:
        if pixel_spacing_mm is None:
            raise ScanError(f"{path.name}: 'pixel_spacing_mm' is null, and one slice does not tell the size of its "
                            f"head; {LOOSE_HELP}")
        return SliceSpec(windows, None, pixel_spacing_mm, ORDERS[0], clipped_hu, loose)
    if data["order"] not in ORDERS:
        raise ScanError(f"{path.name}: 'order' must be one of {', '.join(ORDERS)}, found {data['order']!r}")
    slice_spacing_mm = _spacing(path, "slice_spacing_mm", data["slice_spacing_mm"])
    return SliceSpec(windows, slice_spacing_mm, pixel_spacing_mm, data["order"], clipped_hu)


def _is_number(value) -> bool:
    """Whether it is one that a float holds: JSON's may have any number of digits."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _windows(path: Path, value) -> tuple[tuple[float, float], ...]:
    pairs_ok = isinstance(value, list) and len(value) in (1, 3) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair)) and pair[0] < pair[1]
        for pair in value)
    if not pairs_ok:
        raise ScanError(f"{path.name}: 'windows_hu' must be one [low, high] pair (grey) or three (RGB) in HU, low "
                        f"below high, as in [[-20, 100]]; found {value!r}")
    windows = tuple((float(low), float(high)) for low, high in value)
    if len(windows) == 3 and windows != WINDOWS_HU:
        raise ScanError(f"{path.name}: three 'windows_hu' must be {[list(w) for w in WINDOWS_HU]} for R, G and B, the "
                        f"windows of the method; found {value!r}; export the slices again with these, or as "
                        "16-bit grey with one window")
    return windows


def _clipped(path: Path, value, windows: tuple[tuple[float, float], ...]) -> tuple[float, float]:
    if not (isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)) and value[0] < value[1]):
        raise ScanError(f"{path.name}: 'clipped_hu' must be [low, high] in HU, low below high; found {value!r}")
    if value[0] >= max(high for _, high in windows) or value[1] <= min(low for low, _ in windows):
        raise ScanError(f"{path.name}: 'clipped_hu' {value!r} lies beyond 'windows_hu'; it says to what HU were "
                        "clipped, if to less than the windows show")
    return float(value[0]), float(value[1])


def _spacing(path: Path, key: str, value) -> float | None:
    if value is None:
        return None
    if not _is_number(value) or value <= 0:
        raise ScanError(f"{path.name}: '{key}' must be a positive number of mm or null, found {value!r}")
    return float(value)


def _pixel_spacing(path: Path, value) -> tuple[float, float] | None:
    pair = value if isinstance(value, list) else [value, value]
    if len(pair) != 2 or (isinstance(value, list) and None in pair):
        raise ScanError(f"{path.name}: 'pixel_spacing_mm' must be a number, [row, column] or null; found {value!r}")
    row, column = (_spacing(path, "pixel_spacing_mm", v) for v in pair)
    return None if row is None else (row, column)


def spec_of(source: ScanSource) -> SliceSpec:
    """What is known of a source's pictures without reading them. Raises ScanError as load_spec."""
    scan_json = source.options["scan_json"]
    return ORIGINAL_LAYOUT if scan_json is None else load_spec(scan_json)


# ---- reading

def read(source: ScanSource) -> Scan:
    """Read a folder's pictures as a Scan; without a scan.json they are the original's three-window pictures.

    options of the source: scan_json and mask (paths or None), and from the search unknown_slice_spacing_mm, which
    stands in for an unknown slice spacing; 0 refuses such scans.

    Grey g becomes low + g / 255 * (high - low) HU (16-bit: / 65535); RGB of three windows is decoded by ct.window.
    Pictures are turned as their EXIF says; what is transparent is outside. The mask, a .npy [S, H, W] in the order of
    the file names, is non-zero in the brain. Raises ScanError for pictures that cannot be read, have no order, differ
    in size, do not fit the windows or look inverted.
    """
    scan_json, mask = source.options["scan_json"], source.options["mask"]
    spec = spec_of(source)
    if spec.loose:
        unpacked = f", from a folder: unpack {source.archive.name}" if source.archive is not None else ""
        raise ScanError(f"{scan_json.name}: loose slices are no scan: without neighbours and positions they can only "
                        f"be trained on (prepare.py){unpacked}")
    numbered = in_order(source.paths)
    pictures = [path for _, path in numbered]
    spacing, notes = spec.slice_spacing_mm, _skipped_numbers([number for number, _ in numbered])
    if spacing is None:
        spacing = float(source.options["unknown_slice_spacing_mm"])
        if spacing <= 0:
            raise ScanError(f"{SCAN_JSON}: slice spacing unknown; write slice_spacing_mm there or give "
                            "--unknown-slice-spacing-mm a number above 0")
        notes = (f"slice spacing unknown, {spacing:g} mm assumed (--unknown-slice-spacing-mm)", *notes)
    check_slice_spacing(SCAN_JSON, spacing)
    hu = _read_pictures(pictures, spec)
    brain = None if mask is None else _read_mask(mask, hu.shape)
    if spec.order == "superior-to-inferior":
        hu, brain = hu[::-1].copy(), None if brain is None else brain[::-1].copy()
    _refuse_inverted(pictures, hu, spec.saturation_hu)
    position = np.arange(len(hu)) * spacing
    return Scan(source.scan_id, hu, position, spec.pixel_spacing_mm, spec.saturation_hu, brain,
                nominal_stack(position, spec.pixel_spacing_mm), KIND, notes)


def _skipped_numbers(numbers: Sequence[Fraction]) -> tuple[str, ...]:
    """A note where files are numbered one by one and some numbers are missing."""
    steps = [after - before for before, after in zip(numbers, numbers[1:])]
    by_one = steps.count(1)
    if by_one == len(steps) or by_one < len(steps) / 2 or any(number % 1 for number in numbers):
        return ()
    missing = int(numbers[-1] - numbers[0]) + 1 - len(numbers)
    first = [int(before) + k for before, step in zip(numbers, steps) for k in range(1, min(int(step), 7))][:5]
    shown = ", ".join(map(str, first)) + (", ..." if missing > 5 else "")
    return (f"slices missing, by their numbers: {missing} ({shown}); the others are taken as evenly spaced",)


def _read_pictures(pictures: list[Path], spec: SliceSpec) -> np.ndarray:
    """HU, float32 [S, H, W], of pictures of one size."""
    hu, brightest, misfits = None, 0, np.zeros(2, int)
    for k, path in enumerate(pictures):
        pixels, outside, full = read_pixels(path, len(pictures))
        if hu is None:
            check_ratio(path.name, len(pictures) * pixels.nbytes, sum(other.stat().st_size for other in pictures))
            hu = np.empty((len(pictures), *pixels.shape[:2]), np.float32)
            if spec.pixel_spacing_mm is not None:
                check_pixel_spacing(SCAN_JSON, spec.pixel_spacing_mm, pixels.shape[:2])
        if pixels.shape[:2] != hu.shape[1:]:
            raise ScanError(f"{path.name}: {pixels.shape[1]}x{pixels.shape[0]} pixels, but {pictures[0].name} has "
                            f"{hu.shape[2]}x{hu.shape[1]}; export all slices of a scan in one size")
        brightest = max(brightest, int(pixels.max())) if full > 255 else 65535
        hu[k] = _pixels_to_hu(path, pixels, outside, full, spec)
        if len(spec.windows_hu) == 3:
            misfits += _misfits(pixels, hu[k])
    if misfits[0] > MISFIT * misfits[1]:
        raise ScanError(f"{pictures[0].name} and the other pictures: R, G and B are of no one HU in "
                        f"{misfits[0] / misfits[1]:.0%} of the tissue: grey pictures saved as RGB, or channels in the "
                        f"order B, G, R? Give a {SCAN_JSON} with the one window, or swap the channels")
    if brightest <= TWELVE_BITS:
        raise ScanError(f"{pictures[0].name} and the other 16-bit pictures reach {brightest} of 65535 only: 12-bit "
                        "values? Scale them to the full 16 bits, so that 65535 is the window's high end")
    return hu


def read_picture(path: Path, spec: SliceSpec) -> np.ndarray:
    """One picture as HU, float32 [H, W]. Raises ScanError where it cannot be read or does not fit the windows."""
    return _pixels_to_hu(path, *read_pixels(path, 1), spec)


def _pixels_to_hu(path: Path, pixels: np.ndarray, outside: np.ndarray | None, full: int,
                  spec: SliceSpec) -> np.ndarray:
    """One picture's HU, float32 [H, W]."""
    if len(spec.windows_hu) == 3:
        if pixels.ndim != 3:
            raise ScanError(f"{path.name}: a grey picture, but three windows, one for each of R, G and B; "
                            f"{SCAN_JSON_HELP}")
        if is_jpeg(path):
            raise ScanError(f"{path.name}: a JPEG, which mixes the three windows (it keeps brightness and, coarser, "
                            "colour): HU would be off by several; export the slices as PNG, or as grey with one window")
        hu = np.asarray(decode(pixels.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1), np.float32)
    else:
        pixels = _grey(path, pixels) if pixels.ndim == 3 else pixels
        low, high = spec.windows_hu[0]
        hu = (low + pixels.astype(np.float32) / np.float32(full) * (high - low)).astype(np.float32)
    if outside is not None:
        hu[outside] = min(low for low, _ in spec.windows_hu)
    return hu


def _misfits(pixels: np.ndarray, hu: np.ndarray) -> np.ndarray:
    """How many pixels of a picture of three windows, uint8 [H, W, 3], are not what its HU [H, W] would be written as;
    and of how many, without those that are black or white in all three."""
    windows = pixels.transpose(2, 0, 1)
    tissue = (windows.max(0) > 0) & (windows.min(0) < 255)
    apart = np.abs((encode(hu) + 1) * 127.5 - windows).max(0) > AGREE
    return np.array([(apart & tissue).sum(), tissue.sum()])


def _refuse_inverted(pictures: list[Path], hu: np.ndarray, saturation: tuple[float, float]) -> None:
    """ScanError where the pictures' border, which is air around a head, is at the window's high end."""
    border = np.concatenate([hu[:, [0, -1]].ravel(), hu[:, :, [0, -1]].ravel()])
    if (border >= saturation[1] - 0.02 * (saturation[1] - saturation[0])).mean() > WHITE_BORDER:
        raise ScanError(f"{pictures[0].name} and the others are white at their border, where a head has air around it: "
                        "inverted grey values? Export them with air in black")


def _grey(path: Path, rgb: np.ndarray) -> np.ndarray:
    """The one channel of a grey picture stored as RGB; JPEG's colour conversion may cost 2 levels."""
    tolerance = 0 if path.suffix.lower() == ".png" else 2
    spread = int((rgb.max(-1).astype(int) - rgb.min(-1)).max())
    if spread > tolerance:
        raise ScanError(f"{path.name}: a colour picture (channels differ by up to {spread} levels), but one window; "
                        f"{SCAN_JSON_HELP}")
    return rgb[..., 1]


def _read_mask(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    try:
        mask = np.load(path, mmap_mode="r", allow_pickle=False)        # its shape before its values
    except (OSError, ValueError, EOFError) as error:
        raise ScanError(f"{path.name}: cannot be read as a NumPy array ({error})") from error
    if mask.shape != shape:
        raise ScanError(f"{path.name}: the mask is {list(mask.shape)}, the slices are {list(shape)} [S, H, W]; make it "
                        "anew, or delete it to have the brain found")
    if not mask.any():
        raise ScanError(f"{path.name}: the mask is empty; delete it to have the brain found")
    return mask != 0
