"""What a training of HealthyGAN learns from, and the healthy that it keeps aside, none of whom it learns from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import distributed
from common.files import read_table
from common.groups import connected
from common.sampler import InfiniteSampler
from dataset import DatasetError, SliceDataset
from healthygan.data import ImageSettings, Pictures, is_database, join, read_images, read_slices, without_suffix


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


def _patients(paths: Sequence[Path], split: str) -> dict[str, set[str]]:
    """The patients behind each scan id in a split of databases: two of these may give one id to scans of their own."""
    found = defaultdict(set)
    for one in (SliceDataset(path, split, check=False) for path in paths):
        for scan, patient in zip(one.scan_ids, one.patients):
            found[scan].add(patient)
    return found


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


def refuse_seen(held_out: Pictures, aside: Mapping[str, set[str]], training: Pictures,
                patients: Mapping[str, set[str]]) -> None:
    """DatasetError where a scan to train on is one of those held out, or of its patient, or holds one of its slices.

    aside, patients: the patients behind each scan id held out, and behind each to train on.
    """
    def marks(pictures, patients_of):
        for unit, look in zip(pictures.units, _looks(pictures)):
            yield from ((("scan id", unit), unit), (("slice", look), unit))
            yield from ((("patient", patient), unit) for patient in sorted(patients_of[unit]))

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
        listed = {without_suffix(Path(row["image"])): row["patient"] for row in rows}
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
