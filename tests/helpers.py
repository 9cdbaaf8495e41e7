"""For several test files: seeded synthetic heads, a recorder of gradients, a scan's job, a search for patient data."""

from __future__ import annotations

import base64
import gzip
import io
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from common.weights import CheckpointError
from ct.frame import PreprocessSettings
from ct.read import find_scans, read_scan
from ct.scan import Scan
from ct.standardise import StandardiseSettings
from dataset import ScanRecord, SliceWriter
from detect.bundle import save_bundle
from detect.inversion import Inversion, InversionSettings
from detect.jobs import Job
from detect.outputs import OUTPUTS
from detect.settings import Settings
from model import Encoder, Generator, ModelConfig
from tests.writers import PATIENT_MARKERS

EMBEDDED = re.compile(rb"data:[\w/+.-]+;base64,([A-Za-z0-9+/=\s]+)")
CLOCK = {"seconds", "memory_gb", "img_per_s", "s_per_kimg"}


def without_clock(figures: dict) -> dict:
    """A row of statistics or a run's state without what a clock says, which no two runs share."""
    return {name: value for name, value in figures.items() if name not in CLOCK}


def assert_identical(a, b, where=""):
    """The same types and values all the way down; tensors to the bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_identical(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_identical(*pair, f"{where}/{i}")
    else:
        assert a == b, where


def read_all(folder, **kwargs) -> list[Scan]:
    return [read_scan(source) for source in find_scans(folder, **kwargs)]


def assert_every_change_is_found(folder: Path, change: str, read: Callable[[], Any]) -> None:
    """100 flipped bits ("flip") or 100 lengths ("cut") of each file of a model: read() refuses the file by name.

    Or, as of white space in model.json, gives what it gave. The files are left as they were.
    """
    whole, rng = read(), np.random.default_rng(0)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for _ in range(100):
            altered = bytearray(content)
            if change == "flip":
                altered[rng.integers(len(content))] ^= 1 << rng.integers(8)
            else:
                del altered[rng.integers(len(content)):]
            path.write_bytes(altered)
            try:
                found = read()
            except CheckpointError as error:
                assert path.name in str(error)
            else:
                assert path.name == "model.json" and found == whole
        path.write_bytes(content)


def synthetic_head(slices=24, size=96, spacing_mm=(5.0, 2.4, 2.4), angle_deg=0.0, shift_mm=(0.0, 0.0), noise=3.0,
                   lesion=None, seed=0):
    """A head of ellipsoids: hu float32 [S, H, W] (inferior to superior) and its true brain mask, bool [S, H, W].

    lesion: (z_mm, y_mm, x_mm, radius_mm, hu) relative to the brain's centre, or None.
    The brain is 140 mm long, 120 mm wide and 130 mm high; the vertex lies 10 mm below the top slice.
    """
    rng = np.random.default_rng(seed)
    dz, dy, dx = spacing_mm
    z = (np.arange(slices) - (slices - 1)) * dz + 75.0                      # brain top (65 mm) is 10 mm below the top
    y = (np.arange(size) - (size - 1) / 2) * dy - shift_mm[0]
    x = (np.arange(size) - (size - 1) / 2) * dx - shift_mm[1]
    z, y, x = np.meshgrid(z, y, x, indexing="ij")
    a = np.deg2rad(angle_deg)
    y, x = np.cos(a) * y + np.sin(a) * x, -np.sin(a) * y + np.cos(a) * x

    def inside(ry, rx, rz, cy=0.0, cx=0.0, cz=0.0):
        return ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 + ((z - cz) / rz) ** 2 <= 1

    egg = 1 + 0.12 * y / 70                                                  # wider behind: front and back differ
    x_true, x = x, x / egg
    brain = inside(70, 60, 65)
    hu = np.full(z.shape, -1000.0)
    hu[inside(84, 74, 79)] = 40                                              # scalp
    hu[inside(78, 68, 73)] = 1000                                            # skull
    hu[brain] = 30
    hu[inside(66, 56, 61) & ~inside(60, 50, 55)] = 38                        # cortex
    x = x_true
    hu[inside(25, 6, 14, cy=-5, cx=9, cz=8) | inside(25, 6, 14, cy=-5, cx=-9, cz=8)] = 8
    if lesion is not None:
        lz, ly, lx, radius, value = lesion
        hu[((z - lz) ** 2 + (y - ly) ** 2 + (x - lx) ** 2 <= radius**2) & brain] = value
    hu = hu + rng.normal(0, noise, hu.shape)
    return hu.astype(np.float32), brain


def write_heads(path, splits, first=0, size=32, hu_clip=(-20, 180)):
    """A database of heads, numbered from `first` on, of 4 slices, 5, 6 and so on."""
    standardise = StandardiseSettings(size=size, hu_clip=tuple(float(v) for v in hu_clip))
    with SliceWriter(path, PreprocessSettings(standardise).to_json()) as writer:
        for number, split in enumerate(splits):
            seed, mm = first + number, 7.0 * 32 / size
            hu, brain = synthetic_head(slices=12, size=size, spacing_mm=(10.0, mm, mm), angle_deg=5 * seed, seed=seed)
            shown = np.flatnonzero(brain.any((1, 2)))[:4 + number]
            record = ScanRecord.encode(f"head{seed}", hu[shown].clip(*hu_clip), brain[shown],
                                       10.0 * (shown.max() - shown))
            writer.add(record, split, f"patient{seed}")
    return path


def synthetic_scan(scan_id="head", **kwargs) -> tuple[Scan, np.ndarray]:
    """The same head as a Scan, with its true brain mask beside it."""
    spacing = kwargs.get("spacing_mm", (5.0, 2.4, 2.4))
    hu, brain = synthetic_head(**kwargs)
    return Scan(scan_id, hu, np.arange(len(hu)) * spacing[0], tuple(spacing[1:])), brain


class GradientRecorder:
    """In an optimiser's place: keeps the gradients of every step, and leaves the weights as they are.

    steps: one list a step, of the gradient of each parameter in the optimiser's order; None where there is none
    """

    def __init__(self, optimiser):
        self.param_groups, self.zero_grad = optimiser.param_groups, optimiser.zero_grad
        self.steps = []

    def step(self):
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.steps.append([None if p.grad is None else p.grad.clone() for p in parameters])


def unpacked(content: bytes) -> Iterator[bytes]:
    """A file's bytes and, of gzip, PNG and embedded data URIs, what is packed in them, at any depth."""
    yield content
    if content[:2] == b"\x1f\x8b":
        yield from unpacked(gzip.decompress(content))
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        with Image.open(io.BytesIO(content)) as image:
            image.load()                              # text chunks may come after the pixels
            yield repr(image.info).encode()
    for match in EMBEDDED.finditer(content):
        yield from unpacked(base64.b64decode(match[1]))


def leaks(folder: Path, *more: bytes) -> list[str]:
    """'file: marker' for every file below a folder that holds one of writers.PATIENT_MARKERS or `more`.

    Names and every byte are searched; DICOM files, which belong into the patient's study, are not.
    """
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".dcm"):
        parts = [str(path.relative_to(folder)).encode(), *unpacked(path.read_bytes())]
        found += [f"{path.name}: {marker.decode()}" for marker in (*PATIENT_MARKERS, *more)
                  if any(marker in part.lower() for part in parts)]
    return found


def write_smooth_images(folder: Path, count: int) -> None:
    """Smooth grey noise, 48 x 40 pixels, as PNG: in folders of other names other images."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([*folder.name.encode()])
    for i in range(count):
        pixels = np.kron(rng.integers(40, 120, (5, 6)), np.ones((8, 8)))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02d}.png")


def tiny_bundle(folder: Path, seed: int = 0) -> Path:
    """A model of 32 x 32 pixels with random weights that inverts and counts votes: quick, and good for nothing."""
    torch.manual_seed(seed)
    config = ModelConfig(size=32, style_dim=8, n_mlp=2, channel_base=128, channel_max=16)
    inversion = Inversion(InversionSettings(), Generator(config), Encoder(config))
    preprocessing = PreprocessSettings(StandardiseSettings(size=32), min_brain_fraction=0.01)
    meta = dict(preprocessing=preprocessing.to_json(), calibration=None, provenance=None)
    quiet = Settings("inversion").replace(threshold_hu=1000.0)      # or the whole brain is marked, and no score trusted
    return save_bundle(folder, inversion, quiet, meta)


def shuffled_head(shape, seed):
    """HU that a head in air has, half air, a third soft tissue, the rest bone, in any place: float32."""
    rng, count = np.random.default_rng(seed), int(np.prod(shape))
    air, soft = count // 2, count // 3
    hu = np.concatenate([np.full(air, -1000), rng.integers(0, 80, soft), rng.integers(300, 1500, count - air - soft)])
    return rng.permutation(hu).reshape(shape).astype(np.float32)


def project_one(projector, source, place: Path, work: Path, made: dict, writers=OUTPUTS) -> str:
    """One scan through the stages of detect/jobs.py, by itself: what is said of it."""
    with ExitStack() as held:
        job = Job(projector, source, place, work, made, writers, held)
        job.read(alone=True)
        job.project()
        return job.write()


def frames_by_source(ds):
    """(source instance, its frame) -> (pixels as stored, position) of a multi-frame object."""
    pixels = ds.pixel_array.reshape(int(ds.NumberOfFrames), ds.Rows, ds.Columns)
    found = {}
    for image, group in zip(pixels, ds.PerFrameFunctionalGroupsSequence):
        source, = group.DerivationImageSequence[0].SourceImageSequence
        key = source.ReferencedSOPInstanceUID, int(source.get("ReferencedFrameNumber", 1))
        found[key] = image, list(group.PlanePositionSequence[0].ImagePositionPatient)
    return found
