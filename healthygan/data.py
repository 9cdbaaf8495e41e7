"""Images and head-CT slices for HealthyGAN: read once, kept in memory, handed out as [B, 3, N, N] in [-1, 1].

A source is a folder of images (any size, grey or RGB, 8 or 16 bit) or a database of slices made by prepare.py. An
image loses its top 8 % (burnt-in text), is cut to its central square and resized; a slice is in its frame already, at
its size or shrunk by a whole factor, and its three HU windows are the channels, as for CN-StyleGAN. In memory an image
takes 2 N^2 bytes a channel.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import distributed
from common.files import read_table
from common.groups import connected
from ct.window import encode
from dataset import DatasetError, SliceDataset
from sampler import InfiniteSampler

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
FULL = 65535                             # white, as images are kept
DARK = FULL // 8                         # a folder with nothing brighter is likely 12 bits stored in 16
TIFF_BITS, TIFF_PHOTOMETRIC = 258, 262   # TIFF tags: the bits of each channel, and what 0 means
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
    as its EXIF orientation says. Of 16-bit colour and grey with alpha Pillow hands out the upper 8 bits alone, of which
    white_16bit says nothing: they are refused.
    """
    with Image.open(path) as image:
        if image.format == "TIFF" and image.n_frames > 1:
            raise ValueError(f"expected one image, found {image.n_frames} in a row: save each to a file of its own")
        if image.mode == "F":
            raise ValueError("expected 8 or 16 bits a pixel, found floating point")
        if not image.mode.startswith("I") and stored_bits(path, image) > 8:
            raise ValueError("expected 8 bits a channel, or grey of 16 bits; found 16-bit colour or grey with alpha: "
                             "save it as 16-bit grey")
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


def stored_bits(path: Path, image: Image.Image) -> int:
    """Bits of a channel in the file, of the formats that may have more than 8: PNG, by its header, and TIFF."""
    if image.format == "PNG":
        with path.open("rb") as file:
            return file.read(25)[24]
    return max(getattr(image, "tag_v2", {}).get(TIFF_BITS, (8,)))


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
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:   # a broken PNG: SyntaxError
            return str(error) or type(error).__name__

    with ThreadPoolExecutor() as pool:
        read = list(pool.map(attempt, paths))
    top = Path(os.path.abspath(folder)).name                 # of '..' too; a link to a folder keeps its own name
    names = [_without_suffix(top / path.relative_to(folder)) for path in paths]
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


def _without_suffix(path: Path) -> str:
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


def is_database(path: Path) -> bool:
    return path.is_file() or path.suffix == ".lmdb"


# ---------------------------------------------------------------------------------------------------------------
# What a training learns from

@dataclass(frozen=True)
class TrainingData:
    """healthy: B; mixed: A; held_out: healthy units kept aside for the threshold (None where there are none)."""

    healthy: Pictures
    mixed: Pictures
    held_out: Pictures | None

    def facts(self) -> dict:
        """Counts and settings, JSON."""
        sets = {"healthy": self.healthy, "mixed": self.mixed, "held_out": self.held_out}
        counts = {name: {"units": len(set(part.units)), "images": len(part), "unreadable": len(part.unreadable)}
                  for name, part in sets.items() if part is not None}
        return {"counts": counts, "image_settings": dataclasses.asdict(self.healthy.settings)}

    def digest(self) -> dict[str, str]:
        """Of names and pixels of each set: of two runs with the same one, neither trained on what the other kept aside.
        """
        return {name: _digest(part) for name, part in vars(self).items() if part is not None}


def _digest(pictures: Pictures) -> str:
    found = hashlib.sha256(json.dumps(pictures.names).encode())
    found.update(np.ascontiguousarray(pictures.pixels))
    return found.hexdigest()[:16]


def join(parts: Sequence[Pictures]) -> Pictures:
    """Several sources as one set."""
    unreadable = {name: reason for part in parts for name, reason in part.unreadable.items()}
    pixels = stack([image for part in parts for image in part.pixels])
    return Pictures(parts[0].settings, pixels, [n for p in parts for n in p.names],
                    [u for p in parts for u in p.units], unreadable)


def refuse_shared(paths: Sequence[Path], of_each: Sequence[Iterable[str]], mend: str) -> None:
    """DatasetError where two sources share a name: what bears it would be scored, and held out, as one.

    One that is given twice, to weigh more, is the same source.
    """
    owners: dict[str, Path] = {}
    for path, names in zip(paths, of_each):
        own = path.resolve()
        for name in names:
            if owners.setdefault(name, own) != own:
                raise DatasetError(f"{name} is both in {owners[name]} and in {own}; expected different names: {mend}")


def class_folders(data: Path, stage: str, classes: tuple[str, str]) -> list[Path]:
    """data/stage/{classes} or data/{classes}. Raises DatasetError naming what is missing."""
    base = data / stage if (data / stage).is_dir() else data
    for name in classes:
        if not (base / name).is_dir():
            raise DatasetError(f"{base / name}: no such folder; expected images in {data}/{stage}/{classes[0]} and "
                               f"{data}/{stage}/{classes[1]}")
    return [base / name for name in classes]


def read_list(path: Path | None) -> set[str] | None:
    """Scan ids, one a line; None without a file."""
    if path is None:
        return None
    ids = {line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()}
    if not ids:
        raise DatasetError(f"{path}: no scan ids in it; expected one a line")
    return ids


def load_sources(paths: Sequence[Path], settings: ImageSettings, split: str, scans: Path | None) -> Pictures:
    """Folders of images, or databases (those of their scans that the file `scans` lists), as one set.

    Raises DatasetError where two folders have an image of one name.
    """
    wanted = read_list(scans)
    if settings.kind == "images":
        parts = [read_images(path, settings) for path in paths]
        refuse_shared(paths, [(*part.names, *part.unreadable) for part in parts], "rename one of the folders")
        return join(parts)
    parts = [read_slices(path, split, settings, wanted) for path in paths]
    if wanted is not None and (unknown := sorted(wanted.difference(*(part.units for part in parts)))):
        raise DatasetError(f"{scans}: {len(unknown)} scans are not in {', '.join(map(str, paths))} (split {split}), "
                           f"the first: {unknown[0]}")
    return join(parts)


def load_training(healthy: Sequence[Path], mixed: Sequence[Path], settings: ImageSettings, val_fraction: float,
                  seed: int, patients: Path | None = None, healthy_scans: Path | None = None,
                  mixed_scans: Path | None = None) -> TrainingData:
    """Both sets, and healthy units held out: a database's own validation split, or val_fraction of the images.

    Nobody who is held out is in a training set under another name, id or file: images are drawn accordingly, scans are
    refused. patients: CSV with the columns image and patient; the images of one patient are then held out together.
    """
    kinds = {is_database(path) for path in (*healthy, *mixed)}
    if len(kinds) > 1:
        raise DatasetError("--healthy and --mixed: expected folders of images only, or databases only, found both")
    if settings.kind == "slices":
        manifest = SliceDataset(healthy[0], "all", check=False).manifest
        settings = dataclasses.replace(settings, slices=manifest["settings"])
        validating = [path for path in healthy if _has_validation(path)]
        held_out = [read_slices(path, "val", settings) for path in validating]
        refuse_shared(validating, [set(part.units) for part in held_out],
                      "prepare both databases in one, or one of them from a folder of another name")
        data = TrainingData(load_sources(healthy, settings, "train", healthy_scans),
                            load_sources(mixed, settings, "train", mixed_scans), join(held_out) if held_out else None)
        if data.held_out:
            aside = _patients(validating, "val")
            for paths, part in ((healthy, data.healthy), (mixed, data.mixed)):
                refuse_seen(data.held_out, aside, part, _patients(paths, "train"))
        return data
    everything, unannotated = (load_sources(paths, settings, "train", None) for paths in (healthy, mixed))
    keep, aside = split_by_patient(everything, unannotated, val_fraction, seed, patients)
    return TrainingData(everything.take(keep), unannotated, everything.take(aside) if aside else None)


def _has_validation(path: Path) -> bool:
    return SliceDataset(path, "all", check=False).manifest["counts"]["val"]["slices"] > 0


def _patients(paths: Sequence[Path], split: str) -> dict[str, str]:
    """The patient of each scan in a split of databases."""
    sets = [SliceDataset(path, split, check=False) for path in paths]
    return {scan: patient for one in sets for scan, patient in zip(one.scan_ids, one.patients)}


def _looks(pictures: Pictures) -> list[Hashable]:
    """What copies of a picture share, whatever they are called and whether grey is stored as RGB.

    Of one that is all alike, such as air above the head, nothing is: several people have it.
    """
    found: list[Hashable] = []
    for pixels in pictures.pixels:
        channels = pixels[:1] if (pixels == pixels[:1]).all() else pixels
        blank = (channels == channels.flat[0]).all()
        found.append(object() if blank else hashlib.sha256(np.ascontiguousarray(channels)).digest())
    return found


def refuse_seen(held_out: Pictures, aside: Mapping[str, str], training: Pictures, patients: Mapping[str, str]) -> None:
    """DatasetError where a scan to train on is one of those held out, or of its patient, or holds one of its slices.

    aside, patients: the patient of each scan held out, and of each to train on.
    """
    def marks(pictures, patient_of):
        for unit, look in zip(pictures.units, _looks(pictures)):
            yield from ((("scan id", unit), unit), (("patient", patient_of[unit]), unit), (("slice", look), unit))

    known = dict(marks(held_out, aside))
    for mark, unit in marks(training, patients):
        if mark in known:
            raise DatasetError(
                f"scan {known[mark]} is held out for the threshold (validation split of --healthy), but {unit}, to be "
                f"trained on, has the same {mark[0]}: leave that out with --healthy-scans or --mixed-scans, or prepare "
                "both databases in one")


def split_by_patient(healthy: Pictures, mixed: Pictures, fraction: float, seed: int,
                     patients: Path | None) -> tuple[list[int], list[int]]:
    """Indices of healthy (kept, held out): `fraction` of the patients, drawn by seed, are held out with all of theirs.

    Copies of an image are of one patient, whatever they are called, and who is in `mixed`, too, is never held out.
    patients may name images of mixed as well; without it each image is its own patient.
    """
    names = healthy.names
    patient: dict[str, Hashable] = {name: name for name in names}
    others: list[Hashable] = [object() for _ in mixed.names]                    # nobody who is known
    if patients is not None:
        rows = read_table(patients, ("image", "patient"), DatasetError)
        listed = {_without_suffix(Path(row["image"])): row["patient"] for row in rows}
        if missing := [name for name in names if name not in listed]:
            raise DatasetError(f"{patients}: no patient for {len(missing)} images, the first: {missing[0]}")
        patient = {name: listed[name] for name in names}
        others = [listed.get(name, nobody) if name not in patient else nobody
                  for name, nobody in zip(mixed.names, others)]
    people, looks = [*(patient[name] for name in names), *others], [*_looks(healthy), *_looks(mixed)]
    group = connected([(("patient", person), ("look", look)) for person, look in zip(people, looks)])
    own: dict[int, str] = {}                                                    # the first patient of each, for order
    for name, number in zip(names, group):
        own[number] = min(own.get(number, patient[name]), patient[name])
    order = sorted(own, key=own.get)
    seen, wanted = set(group[len(names):]), round(fraction * len(order))
    free = [number for number in order if number not in seen]
    if wanted == len(order):
        raise DatasetError(f"--val-fraction {fraction:g} keeps all {len(order)} healthy images (or patients) aside; "
                           "expected some left to train on: lower it")
    if wanted > len(free):
        raise DatasetError(f"--val-fraction {fraction:g} keeps {wanted} of {len(order)} healthy images (or patients) "
                           f"aside, but only {len(free)} are not in the unannotated set, too, by whatever name: leave "
                           "them out of that, or give --val-fraction 0, without a threshold")
    held_out = {free[i] for i in np.random.default_rng(seed).permutation(len(free))[:wanted]}
    return ([i for i, number in enumerate(group[:len(names)]) if number not in held_out],
            [i for i, number in enumerate(group[:len(names)]) if number in held_out])


def batches(pictures: Pictures, batch: int, seed: int, start: int = 0,
            device: torch.device | str = "cpu") -> Iterator[torch.Tensor]:
    """Images [batch, 3, N, N] for ever: this rank's share of a shuffled stream of which `start` are used up."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    stream, images = iter(InfiniteSampler(len(pictures), seed, rank, world, start)), pictures.on(device)
    while True:
        yield images([next(stream) for _ in range(batch)])
