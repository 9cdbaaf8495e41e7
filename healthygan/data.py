"""Images and head-CT slices for HealthyGAN: read once, kept in memory, handed out as [B, 3, N, N] in [-1, 1].

A source is a folder of images (any size, grey or RGB, 8 or 16 bit) or a database of slices made by prepare.py. An
image loses its top 8 % (burnt-in text), is cut to its central square and resized; a slice is in its frame already, at
its size or shrunk by a whole factor, and its three HU windows are the channels, as for CN-StyleGAN. In memory an image
takes 2 N^2 bytes a channel.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from common.pictures import UNREADABLE, refuse_16_bit_colour
from ct.window import encode
from dataset import DatasetError, SliceDataset

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
FULL = 65535                             # white, as images are kept
DARK = FULL // 8                         # a folder with nothing brighter is likely 12 bits stored in 16
TIFF_PHOTOMETRIC = 262                   # TIFF tag: what 0 means
WHITE_IS_ZERO = 0                        # of the latter, as scanners of films write it


@dataclass(frozen=True)
class ImageSettings:
    """Everything that decides which pixels a network sees; stored with the model and used again for testing.

    kind       'images' or 'slices'
    size       side N of what the network sees, pixels
    crop_top   part of an image's rows dropped at the top
    white_16bit  the value of a 16-bit image that is white
    slices     the preprocessing settings of the database, where kind is 'slices'
    """

    kind: str
    size: int
    crop_top: float = 0.08
    white_16bit: int = FULL
    slices: dict | None = None


@dataclass(frozen=True)
class Pictures:
    """A set of images or slices in memory.

    pixels      images: uint16 [n, C, N, N], C 1 or 3, 65535 is white; slices: int16 [n, 1, N, N] in HU
    names       one each: 'folder/file' without suffix below its source, or 'scan/slice'
    units       what belongs to one score: the image itself, or the scan
    unreadable  {name: reason} of images that were skipped
    """

    settings: ImageSettings
    pixels: np.ndarray
    names: list[str]
    units: list[str]
    unreadable: dict[str, str]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, indices: Sequence[int]) -> torch.Tensor:
        """Images float32 [len(indices), 3, N, N] in [-1, 1]."""
        return self._encode(torch.from_numpy(self.pixels[np.asarray(indices)].astype(np.float32)))

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Stored values as float32 [n, C, N, N] -> images."""
        if self.settings.kind == "slices":
            return encode(pixels[:, 0])
        return (pixels * (2 / FULL) - 1).expand(-1, 3, -1, -1)

    def on(self, device: torch.device) -> Callable[[Sequence[int]], torch.Tensor]:
        """What [] does, on a device that holds all pixels: one that waits for images at every step stands idle."""
        stored = torch.from_numpy(self.pixels.view(np.int16)).to(device)          # few operations take uint16

        def images(indices: Sequence[int]) -> torch.Tensor:
            pixels = stored[torch.tensor(indices).to(device, non_blocking=True)]
            return self._encode((pixels.int() & FULL if self.settings.kind == "images" else pixels).float())

        return images

    def take(self, indices: Sequence[int]) -> Pictures:
        """The subset at these indices, in that order."""
        return dataclasses.replace(self, pixels=self.pixels[np.asarray(indices, int)],
                                   names=[self.names[i] for i in indices], units=[self.units[i] for i in indices])


# ---------------------------------------------------------------------------------------------------------------
# Images

def read_image(path: Path, settings: ImageSettings) -> np.ndarray:
    """An image file as uint16 [C, N, N], C 1 (grey) or 3. Raises OSError or ValueError when it cannot be read.

    16 bits are scaled to 0..65535 by white_16bit, not clipped to 8; transparency is left out, and the image is turned
    as its EXIF orientation says. 16-bit colour and grey with alpha come in 8 bits, of which white_16bit says nothing:
    they are refused.
    """
    with Image.open(path) as image:
        if image.format == "TIFF" and image.n_frames > 1:
            raise ValueError(f"expected one image, found {image.n_frames} in a row: save each to a file of its own")
        if image.mode == "F":
            raise ValueError("expected 8 or 16 bits a pixel, found floating point")
        refuse_16_bit_colour(path, image)
        inverted = getattr(image, "tag_v2", {}).get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):                                    # 16 bits; 'I' in files with 32
            pixels = np.asarray(image).astype(np.float32) * (FULL / settings.white_16bit)
            if pixels.min() < 0 or np.asarray(image).max() > FULL:
                raise ValueError("expected 8 or 16 bits a pixel, found values beyond 16 bits")
            if inverted:                                                  # of 8 bits and less Pillow does it itself
                pixels = (FULL - pixels).clip(0)
        else:
            pixels = np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")) * np.float32(257)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.shape[2] == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., :1]
    pixels = centre_square(pixels[int(settings.crop_top * len(pixels)):])
    side = (settings.size, settings.size)
    resized = [Image.fromarray(np.ascontiguousarray(channel)).resize(side, Image.Resampling.BILINEAR)
               for channel in pixels.transpose(2, 0, 1)]
    return np.stack([np.asarray(channel).clip(0, FULL).round().astype(np.uint16) for channel in resized])


def centre_square(pixels: np.ndarray) -> np.ndarray:
    """[H, W, C] -> the central [S, S, C], S the shorter side."""
    side = min(pixels.shape[:2])
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    return pixels[top:top + side, left:left + side]


def read_images(folder: Path, settings: ImageSettings) -> Pictures:
    """All images below a folder, by name, nested ones as well; one that cannot be read is skipped and named.

    Warns of a folder that is all dark: --white-16bit is then likely wrong. Raises DatasetError where there is no
    folder, no image in it, or none that can be read.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder; expected a folder of images")
    paths = sorted(_image_files(folder))
    if not paths:
        raise DatasetError(f"{folder}: no images in it; expected files ending in {', '.join(sorted(SUFFIXES))}")

    def attempt(path):
        try:
            return read_image(path, settings)
        except UNREADABLE as error:
            return str(error) or type(error).__name__

    with ThreadPoolExecutor() as pool:
        read = list(pool.map(attempt, paths))
    top = Path(os.path.abspath(folder)).name                 # of '..' too; a link to a folder keeps its own name
    names = [without_suffix(top / path.relative_to(folder)) for path in paths]
    unreadable = {name: got for name, got in zip(names, read) if isinstance(got, str)}
    kept = [i for i, got in enumerate(read) if not isinstance(got, str)]
    if not kept:
        raise DatasetError(f"{folder}: none of its {len(paths)} images can be read; the first: "
                           f"{paths[0].name}: {read[0]}")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DatasetError(f"{folder}: {twice[0]} is there with several suffixes; expected one file of a name")
    kept_names, pixels = [names[i] for i in kept], stack([read[i] for i in kept])
    if 0 < (brightest := int(pixels.max())) <= DARK:
        warnings.warn(f"{folder}: its brightest pixel has {100 * brightest / FULL:.1f} % of white; for 12 bits stored "
                      f"in 16 give --white-16bit 4095 (now {settings.white_16bit})", stacklevel=2)
    return Pictures(settings, pixels, kept_names, kept_names, unreadable)


def _image_files(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Image files below a folder, by links to folders as well; hidden ones are left out. above: what it lies in."""
    own = folder.resolve()
    if own in above:                                              # a link to where it lies would go round for ever
        return
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _image_files(path, above | {own})
        elif path.suffix.lower() in SUFFIXES:
            yield path


def without_suffix(path: Path) -> str:
    """An image's name: only a suffix that images have is left out, since a name may hold dots."""
    return (path.with_suffix("") if path.suffix.lower() in SUFFIXES else path).as_posix()


def stack(images: Sequence[np.ndarray]) -> np.ndarray:
    """[C, N, N] each -> [n, C, N, N]; grey ones become RGB where some are."""
    channels = max(len(image) for image in images)
    return np.stack([np.broadcast_to(image, (channels, *image.shape[1:])) for image in images])


# ---------------------------------------------------------------------------------------------------------------
# Slices

def read_slices(path: Path, split: str, settings: ImageSettings, scans: set[str] | None = None) -> Pictures:
    """The slices of one split ('train', 'val', 'all') of a database, of all its scans or of those named.

    Raises DatasetError when the database was prepared in another way than settings.slices.
    """
    slices = SliceDataset(path, split)
    if slices.size % settings.size:
        raise DatasetError(f"{path}: slices of {slices.size} x {slices.size} cannot be shrunk by a whole factor to the "
                           f"network's {settings.size}: prepare it with --size {settings.size}, or choose another "
                           "preset")
    if settings.slices is not None and slices.manifest["settings"] != settings.slices:
        raise DatasetError(f"{path}: prepared with other settings ({slices.manifest['settings']}) than what the "
                           f"network learnt from ({settings.slices}): prepare it with those")
    items = [slices[i] for i in range(len(slices))]
    by_scan = {scan["scan_id"]: scan["slices"] for scan in slices.manifest["scans"]}
    names = [f"{scan_id}/{number:02d}" for scan_id in slices.scan_ids for number in by_scan[scan_id]]
    units = [slices.scan_ids[item["scan"]] for item in items]
    pixels = np.stack([shrink(item["hu"][None].float(), settings.size)[0].round().short().numpy() for item in items])
    everything = Pictures(settings, pixels[:, None], names, units, {})
    return everything.take([i for i, unit in enumerate(units) if scans is None or unit in scans])


def shrink(hu: torch.Tensor, size: int) -> torch.Tensor:
    """HU float [S, N, N] -> [S, size, size], N a multiple of size: means of squares."""
    return F.avg_pool2d(hu, hu.shape[-1] // size)


# ---------------------------------------------------------------------------------------------------------------
# Sources

def is_database(path: Path) -> bool:
    return path.is_file() or path.suffix == ".lmdb"


def class_folders(data: Path, stage: str, classes: tuple[str, str]) -> list[Path]:
    """data/stage/{classes} or data/{classes}. Raises DatasetError naming what is missing."""
    base = data / stage if (data / stage).is_dir() else data
    for name in classes:
        if not (base / name).is_dir():
            raise DatasetError(f"{base / name}: no such folder; expected images in {data}/{stage}/{classes[0]} and "
                               f"{data}/{stage}/{classes[1]}")
    return [base / name for name in classes]


def join(parts: Sequence[Pictures]) -> Pictures:
    """Several sources as one set."""
    unreadable = {name: reason for part in parts for name, reason in part.unreadable.items()}
    pixels = stack([image for part in parts for image in part.pixels])
    return Pictures(parts[0].settings, pixels, [n for p in parts for n in p.names],
                    [u for p in parts for u in p.units], unreadable)
