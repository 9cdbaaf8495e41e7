"""What a CT makes of a phantom head: slices of 5 mm with partial volume, blur, noise and artefacts; and its files.

The head is laid into a gantry, off-centre and turned, and averaged over the thickness of each slice. Beam hardening
and the noise's strength come from projections through the head: with p_bone the line integral of what is denser than
soft tissue, a projection measures beta * (p_bone - vault)**2 too little (the second-order term of Brooks and Di Chiro,
Phys Med Biol 1976, beyond what a scanner corrects for), and its variance grows with exp(mu * p). Noise has the power
spectrum of filtered back-projection with a soft kernel, |f| exp(-|f| / f0) (Riederer et al., Phys Med Biol 1978, for
the ramp; the fall-off as measured on clinical head CT).

Gantry coordinates are (z, y, x) in mm: z to the head, y to the back, x to the patient's left, (y, x) from the middle
of the field of view.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pydicom
import torch
import torch.nn.functional as F
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from scipy import fft, sparse

from ct.geometry import SliceStack
from ct.scan import Scan
from demos.anatomy import Head

SIZE = 512                        # pixels of a slice's side
COARSE = SIZE // 2                # the head is sampled at twice the pixel size, about its own 1 mm
SLICE_MM = 5.0
SLICES = (24, 36)
FOV_MM = (205, 256)               # fields of view; pixels of 0.40 to 0.50 mm
SUB_SLICES_MM = np.arange(-2.0, 2.5)   # averaged to one slice
HU_RANGE = (-1024, 3071)
AIR_HU = -1000.0
FORAMEN_MAGNUM_MM2 = 1500.0       # the scan starts near the lowest level where the cranial cavity is as large
BEAM_SIZE = 128                   # pixels of the slices through which projections are computed
ANGLES = 60
WATER_PER_CM = 0.2                # attenuation at the beam's mean energy
BONE_FROM_HU = 120.0
VAULT_CM = 1.8                    # of bone, about the vault, is what the scanner corrects for by itself
STARVED_CM = 25.0                 # behind more water and bone hardly a photon arrives
BRAIN_HU = (0.0, 100.0)


@dataclass(frozen=True)
class Setup:
    """How one scan is taken.

    fov_mm       side of the field of view
    turn_deg     in the slice, from the row axis towards the column axis
    pitch_deg    chin down (positive), which is what a tilted gantry amounts to as well
    roll_deg     towards the patient's left shoulder
    shift_mm     (y, x) of the middle of the head's grid in the field of view
    position_mm  float64 [S], z of the slices
    blur_mm      standard deviation of the kernel's blur, besides that of the sampling
    noise_hu     standard deviation in the brain's middle slices
    noise_f0     1/mm, where the noise spectrum falls off
    hardening    strength of beam hardening by bone, 1/cm
    cupping_hu   how much darker the middle is than the rim of the brain
    streaks      strength of the low-signal streaks, relative to the noise; 0 for none
    motion_mm    (z of the slice during which the head moves, extent along z, dy, dx)
    holder       (radius, thickness, gap to the head in mm, half its opening in degrees, HU); None: not in view
    """

    fov_mm: int
    turn_deg: float
    pitch_deg: float
    roll_deg: float
    shift_mm: tuple[float, float]
    position_mm: np.ndarray
    blur_mm: float = 0.3
    noise_hu: float = 4.0
    noise_f0: float = 0.11
    hardening: float = 0.02
    cupping_hu: float = 1.0
    streaks: float = 0.0
    motion_mm: tuple[float, float, float, float] | None = None
    holder: tuple[float, float, float, float, float] | None = (125.0, 2.5, 4.0, 60.0, 100.0)


def acquire(head: Head, truth: np.ndarray | None, rng: np.random.Generator,
            setup: Setup | None = None) -> tuple[Scan, np.ndarray]:
    """Scan a head; its Scan (whole HU) and the truth in the scan's geometry, bool [S, 512, 512].

    truth: bool [Z, Y, X] in the head's grid, or None. A pixel is true where the truth fills at least half of it; a
    truth too small or thin to fill half of any pixel is cut at half of what it fills at most, so that it never
    vanishes. setup: drawn where None.
    """
    setup = setup or draw_setup(head, rng)
    hu, share = _sample(head, truth, setup)
    bone = _beam(hu, setup, rng)
    hu += bone.error_hu
    spread = _upsampling(COARSE, setup.blur_mm / (setup.fov_mm / SIZE))
    image = _resize(hu, spread)
    image += _noise(len(hu), setup, rng) * _resize(bone.noise_hu, _linear(BEAM_SIZE, SIZE))
    if setup.holder is not None:
        image += _holder(hu, setup)
    np.clip(np.rint(image, out=image), *HU_RANGE, out=image)
    image[:, _off_field()] = HU_RANGE[0]
    mask = np.zeros(image.shape, bool)
    for s in np.flatnonzero(share.any(axis=(1, 2))):
        mask[s] = _resize(share[s:s + 1], spread)[0] >= min(0.5, share.max() / 2)
    pixel = setup.fov_mm / SIZE
    corner = -setup.fov_mm / 2 + pixel / 2
    origins = np.stack([np.full(len(image), corner)] * 2 + [setup.position_mm], axis=1)
    stack = SliceStack(origins, np.array([0.0, pixel, 0.0]), np.array([pixel, 0.0, 0.0]))
    return Scan("phantom", image, setup.position_mm, (pixel, pixel), geometry=stack, source="dicom"), mask


# ---- placing the head

def draw_setup(head: Head, rng: np.random.Generator) -> Setup:
    """A setup as in daily work: most heads nearly straight, some far from it; the whole cranial cavity in view.

    Slices run about along the orbitomeatal line, 6 degrees steeper than MNI's horizontal.
    """
    turn, pitch, roll = np.clip(rng.normal((0, 6, 0), (4.5, 5, 2)), (-12, -8, -5), (12, 20, 5))
    shift = np.clip(rng.normal((4, 0), (7, 7)), -20, 20)
    margin, below, above = rng.uniform((14, -4, 2), (40, 10, 7))
    outside, cavity = _places(head, turn, pitch, roll)
    length = np.ptp(outside[:, 1:], axis=0).max()
    fov = int(np.clip(length + margin, *FOV_MM))
    room = np.maximum((fov - np.ptp(outside[:, 1:], axis=0)) / 2 - 1, 0)
    middle = (outside[:, 1:].max(axis=0) + outside[:, 1:].min(axis=0)) / 2
    shift = np.clip(shift, -room, room) - middle
    top = outside[:, 0].max() + above
    levels, counts = np.unique(np.floor(cavity[:, 0] / SLICE_MM), return_counts=True)
    base = levels[counts * STEP**3 / SLICE_MM >= FORAMEN_MAGNUM_MM2].min() * SLICE_MM - below
    count = int(np.clip(np.ceil((top - base) / SLICE_MM), *SLICES))
    position = np.round(top, 1) - SLICE_MM * np.arange(count)[::-1]
    moves = rng.random() < 0.2
    at, angle = rng.uniform((position[0], 0), (position[-1], 2 * np.pi))
    size, extent = rng.uniform((0.7, 4), (2.0, 12))
    motion = (at, extent, size * np.sin(angle), size * np.cos(angle)) if moves else None
    held = rng.random() < 0.85
    holder = tuple(rng.uniform((100, 1.5, 2, 40, -200), (135, 3.5, 9, 85, 250)))
    return Setup(
        fov, turn, pitch, roll, tuple(shift), position, blur_mm=rng.uniform(0.1, 0.4),
        noise_hu=rng.uniform(3.0, 4.6), noise_f0=rng.uniform(0.105, 0.15), hardening=rng.uniform(0.008, 0.03),
        cupping_hu=rng.uniform(-0.5, 2.0), streaks=rng.uniform(0.6, 2.0) * (rng.random() < 0.3), motion_mm=motion,
        holder=holder if held else None)


STEP = 4                          # voxels, of the coarse look at where the head lies


def _places(head: Head, turn: float, pitch: float, roll: float) -> tuple[np.ndarray, np.ndarray]:
    """Points of the head and of its cranial cavity in the gantry, mm, both [n, 3]; the grid's middle at 0."""
    coarse = (slice(None, None, STEP),) * 3
    middle = (np.array(head.hu.shape) - 1) / 2
    turned = _rotation(turn, pitch, roll)
    head_at, cavity_at = (np.argwhere(mask) * STEP - middle
                          for mask in (head.hu[coarse] > -300, head.depth_mm[coarse] > 2))
    return head_at @ turned.T, cavity_at @ turned.T


def _rotation(turn_deg: float, pitch_deg: float, roll_deg: float) -> np.ndarray:
    """Head to gantry, [3, 3] on (z, y, x): first the roll, then the pitch, then the turn."""
    (ct, cp, cr), (st, sp, sr) = (f(np.deg2rad([turn_deg, pitch_deg, roll_deg])) for f in (np.cos, np.sin))
    roll = np.array([[cr, 0, -sr], [0, 1, 0], [sr, 0, cr]])
    pitch = np.array([[cp, sp, 0], [-sp, cp, 0], [0, 0, 1]])
    turn = np.array([[1, 0, 0], [0, ct, -st], [0, st, ct]])
    return turn @ pitch @ roll


def _sample(head: Head, truth: np.ndarray | None, setup: Setup) -> tuple[np.ndarray, np.ndarray]:
    """Slices averaged over their thickness, HU float32 [S, 256, 256], and the truth's share of each pixel.

    Below the head's grid its lowest level goes on: a neck, not air. On the other sides there is air.
    """
    volumes = np.stack([head.hu] if truth is None else [head.hu, truth.astype(np.float32)])
    for face in ((0, slice(-1, None)), (0, slice(None), [0, -1]), (0, slice(None), slice(None), [0, -1])):
        volumes[face] = AIR_HU
    source = torch.from_numpy(volumes)[None]
    shape = np.array(head.hu.shape)
    inverse = _rotation(setup.turn_deg, setup.pitch_deg, setup.roll_deg).T
    scale = 2 / (shape - 1)[:, None]                               # voxels to grid_sample's [-1, 1]
    axis = (np.arange(COARSE) - (COARSE - 1) / 2) * setup.fov_mm / COARSE
    y, x = np.meshgrid(axis - setup.shift_mm[0], axis - setup.shift_mm[1], indexing="ij")
    plane = (scale * inverse[:, 1:]) @ np.stack([y, x]).reshape(2, -1)
    plane = torch.from_numpy(plane[::-1].T.astype(np.float32).reshape(COARSE, COARSE, 3))
    out = torch.empty(len(volumes), len(setup.position_mm), COARSE, COARSE)
    for s, position in enumerate(setup.position_mm):
        z = position + SUB_SLICES_MM
        moved = np.concatenate([z[:, None], -_motion(z, setup)], axis=1)                   # [5, 3]
        steps = ((scale * inverse) @ moved.T)[::-1].T.astype(np.float32)
        grid = plane + torch.from_numpy(steps)[:, None, None]
        found = F.grid_sample(source, grid[None], padding_mode="border", align_corners=True)
        out[:, s] = found[0].mean(dim=1)
    result = out.numpy()
    return result[0], result[1] if truth is not None else np.zeros((len(result[0]), 1, 1), np.float32)


def _motion(z: np.ndarray, setup: Setup) -> np.ndarray:
    """Where the head has gone while the level z is measured, mm (y, x), [n, 2]; it comes back."""
    if setup.motion_mm is None:
        return np.zeros((len(z), 2))
    at, extent, dy, dx = setup.motion_mm
    return np.exp(-0.5 * ((z - at) / extent) ** 2)[:, None] * np.array([dy, dx])


# ---- resampling in the plane

def _resize(volume: np.ndarray, weights: sparse.csr_array) -> np.ndarray:
    """[S, n, n] to [S, m, m] with weights [m, n] along both axes."""
    count, n, _ = volume.shape
    m = weights.shape[0]
    rows = weights @ np.ascontiguousarray(volume.transpose(1, 0, 2)).reshape(n, -1)            # [m, S * n]
    columns = weights @ np.ascontiguousarray(rows.reshape(m, count, n).transpose(2, 1, 0)).reshape(n, -1)
    return np.ascontiguousarray(columns.reshape(m, count, m).transpose(1, 2, 0))


def _upsampling(n: int, blur: float) -> sparse.csr_array:
    """Catmull-Rom interpolation to twice the size, then a Gaussian of `blur` new pixels, float32 [2n, n].

    The slight overshoot at bone is that of a reconstruction kernel.
    """
    offset = (np.arange(2 * n)[:, None] - 0.5) / 2 - np.arange(n)
    t = np.abs(offset)
    cubic = np.where(t < 1, 1.5 * t**3 - 2.5 * t**2 + 1, np.where(t < 2, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2, 0))
    apart = np.arange(2 * n)[:, None] - np.arange(2 * n)
    gauss = np.exp(-0.5 * (apart / max(blur, 1e-3)) ** 2) * (np.abs(apart) <= max(1, round(3 * blur)))
    weights = sparse.csr_array(gauss) @ sparse.csr_array(cubic)
    return _normalised(weights)


@lru_cache(maxsize=4)
def _linear(n: int, m: int) -> sparse.csr_array:
    """Linear interpolation from n pixels to m, float32 [m, n]."""
    place = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
    return _normalised(sparse.csr_array(np.maximum(1 - np.abs(place[:, None] - np.arange(n)), 0)))


def _normalised(weights: sparse.csr_array) -> sparse.csr_array:
    return (sparse.diags_array(1 / weights.sum(axis=1)) @ weights).tocsr().astype(np.float32)


# ---- what the beam does

@dataclass(frozen=True)
class _Beam:
    error_hu: np.ndarray          # float32 [S, 256, 256]: beam hardening, cupping and streaks
    noise_hu: np.ndarray          # float32 [S, 128, 128]: the noise's standard deviation


def _beam(hu: np.ndarray, setup: Setup, rng: np.random.Generator) -> _Beam:
    """Errors and noise of slices [S, 256, 256], from projections at ANGLES angles."""
    small = hu.reshape(len(hu), BEAM_SIZE, 2, BEAM_SIZE, 2).mean(axis=(2, 4))
    pixel_cm = setup.fov_mm / BEAM_SIZE / 10
    project = _projector()
    pixels = small.reshape(len(small), -1).T                       # [pixels, S]
    total = project @ np.maximum(1 + pixels / 1000, 0) * pixel_cm  # [angles * bins, S], cm of water
    bone = project @ (np.maximum(pixels - BONE_FROM_HU, 0) / 1000) * pixel_cm
    brain = (small > BRAIN_HU[0]) & (small < BRAIN_HU[1])

    # The tube's current follows the head about half-way, so thick slices are noisier, but not by all of it.
    noise = np.sqrt(_back(project, np.exp(WATER_PER_CM * (total + bone))))
    area = brain.sum(axis=(1, 2))
    by_slice = np.array([n[b].mean() if b.any() else n.mean() for n, b in zip(noise, brain)])
    usual = np.median(by_slice[area >= area.max() / 2])
    noise *= (setup.noise_hu / np.sqrt(by_slice * usual))[:, None, None]

    wrong = -setup.hardening * np.maximum(bone - VAULT_CM, 0) ** 2 - _cup(setup) * total**2
    if setup.streaks:             # rays that hardly a photon survives are worse than their variance tells
        starved = np.exp(2 * WATER_PER_CM * (total + bone - STARVED_CM))
        wrong += setup.streaks * 0.004 * starved * rng.standard_normal(starved.shape, np.float32)
    error = _back(project, _ramp(wrong, pixel_cm)) * 1000
    return _Beam(_resize(error, _linear(BEAM_SIZE, COARSE)), noise)


def _cup(setup: Setup) -> float:
    """c, 1/cm: p -> p - c p**2 makes the middle of a 16 cm disc of water darker than its rim by about 11000 c HU."""
    return setup.cupping_hu / 11000


@lru_cache(maxsize=1)
def _projector() -> sparse.csr_array:
    """Parallel-beam line integrals through a picture, in pixels, float32 [ANGLES * BEAM_SIZE, BEAM_SIZE**2].

    Every pixel goes to the two nearest of the detector's bins.
    """
    n = BEAM_SIZE
    axis = np.arange(n) - (n - 1) / 2
    y, x = (a.ravel() for a in np.meshgrid(axis, axis, indexing="ij"))
    rows, columns, values = [], [], []
    for k, angle in enumerate(np.arange(ANGLES) * np.pi / ANGLES):
        place = x * np.cos(angle) + y * np.sin(angle) + (n - 1) / 2
        low = np.floor(place).astype(int)
        for bin_, weight in ((low, low + 1 - place), (low + 1, place - low)):
            inside = (bin_ >= 0) & (bin_ < n)
            rows.append(k * n + bin_[inside])
            columns.append(np.flatnonzero(inside))
            values.append(weight[inside])
    entries = (np.concatenate(values).astype(np.float32), (np.concatenate(rows), np.concatenate(columns)))
    return sparse.csr_array(entries, shape=(ANGLES * n, n * n))


def _back(project: sparse.csr_array, projections: np.ndarray) -> np.ndarray:
    """Mean over the angles of what reaches each pixel, float32 [S, BEAM_SIZE, BEAM_SIZE]."""
    pixels = project.T @ projections.astype(np.float32) / ANGLES
    return np.ascontiguousarray(pixels.T).reshape(-1, BEAM_SIZE, BEAM_SIZE)


def _ramp(projections: np.ndarray, pixel_cm: float) -> np.ndarray:
    """Projections filtered with pi |f|, so that _back reconstructs them, per cm."""
    shaped = projections.reshape(ANGLES, BEAM_SIZE, -1)
    frequency = fft.rfftfreq(2 * BEAM_SIZE, pixel_cm).astype(np.float32)
    filtered = fft.rfft(shaped, 2 * BEAM_SIZE, axis=1) * (np.pi * frequency)[:, None]
    return fft.irfft(filtered, axis=1)[:, :BEAM_SIZE].reshape(projections.shape)


def _noise(count: int, setup: Setup, rng: np.random.Generator) -> np.ndarray:
    """Noise of standard deviation 1, float32 [count, 512, 512], every slice its own."""
    frequency = fft.fftfreq(SIZE, setup.fov_mm / SIZE)
    f = np.hypot(frequency[:, None], frequency)
    amplitude = np.sqrt(f * np.exp(-f / setup.noise_f0))
    amplitude *= SIZE / np.sqrt((amplitude**2).sum())
    amplitude = (amplitude * SIZE).astype(np.float32)
    out = np.empty((count + count % 2, SIZE, SIZE), np.float32)
    for k in range(0, count, 2):          # the real and the imaginary part are two independent slices
        white = rng.standard_normal((SIZE, SIZE, 2), np.float32).view(np.complex64)[..., 0]
        both = fft.ifft2(white * amplitude, overwrite_x=True)
        out[k], out[k + 1] = both.real, both.imag
    return out[:count]


def _holder(hu: np.ndarray, setup: Setup) -> np.ndarray:
    """The head holder's shell behind the head as HU above air, float32 [512, 512], the same on every slice."""
    radius, thickness, gap, opening, shell_hu = setup.holder
    pixel = setup.fov_mm / SIZE
    at_y, at_x = np.nonzero((hu > -300).any(axis=0))
    y, x = ((at - (COARSE - 1) / 2) * setup.fov_mm / COARSE for at in (at_y, at_x))
    aside = (x.max() + x.min()) / 2
    radius = max(radius, (x.max() - x.min()) / 2 + gap + 1)
    below = (y - np.sqrt((radius - gap) ** 2 - (x - aside) ** 2)).max()      # the highest circle that clears the head
    axis = (np.arange(SIZE) - (SIZE - 1) / 2) * pixel
    rows, columns = np.meshgrid(axis - below, axis - aside, indexing="ij")
    shell = np.clip((thickness / 2 - np.abs(np.hypot(rows, columns) - radius)) / pixel + 0.5, 0, 1)
    shell *= np.abs(np.rad2deg(np.arctan2(columns, rows))) < opening
    return (shell * (shell_hu - AIR_HU)).astype(np.float32)


@lru_cache(maxsize=1)
def _off_field() -> np.ndarray:
    """bool [512, 512]: outside the circle that is reconstructed."""
    axis = np.arange(SIZE) - (SIZE - 1) / 2
    return np.hypot(axis[:, None], axis) > SIZE / 2


# ---- files

def write_dicom(folder: Path, scan: Scan, uid_words: tuple) -> None:
    """The scan as a CT series, one file a slice; the same words give the same UIDs, and so the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, (image, origin) in enumerate(zip(scan.hu, scan.geometry.origins)):
        ds = _series(scan, uid_words)
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = _uid(*uid_words, "image", k)
        ds.InstanceNumber = k + 1
        ds.ImagePositionPatient = [f"{v:.10g}" for v in origin]
        ds.SliceLocation = f"{scan.position_mm[k]:.10g}"
        ds.PixelData = (image - HU_RANGE[0]).astype("<u2").tobytes()
        ds.save_as(folder / f"{k + 1:04d}.dcm", enforce_file_format=True)


def _series(scan: Scan, uid_words: tuple) -> pydicom.Dataset:
    """What all slices of a series share."""
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = CTImageStorage
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.ImplementationClassUID = _uid("demos/scanner.py")
    ds.file_meta.ImplementationVersionName = "PHANTOM"       # pydicom's own version would change the bytes
    ds.StudyInstanceUID = _uid(*uid_words, "study")
    ds.SeriesInstanceUID = _uid(*uid_words, "series")
    ds.FrameOfReferenceUID = _uid(*uid_words, "frame of reference")
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = "Phantom", scan.scan_id, "", ""
    ds.StudyDate = ds.SeriesDate = ds.ContentDate = "20000101"
    ds.StudyTime = ds.SeriesTime = ds.ContentTime = "000000"
    ds.StudyID, ds.SeriesNumber, ds.AcquisitionNumber, ds.AccessionNumber = "1", 1, 1, ""
    ds.ReferringPhysicianName, ds.PositionReferenceIndicator = "", ""
    ds.Manufacturer, ds.StudyDescription = "Phantom", "Synthetic head CT, not a patient"
    ds.Modality, ds.BodyPartExamined, ds.PatientPosition = "CT", "HEAD", "HFS"
    ds.ImageType, ds.KVP = ["ORIGINAL", "PRIMARY", "AXIAL"], 120
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing = [f"{mm:.10g}" for mm in scan.pixel_spacing_mm]
    ds.SliceThickness = SLICE_MM
    ds.Rows, ds.Columns = scan.hu.shape[1:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, HU_RANGE[0], "HU"
    ds.WindowCenter, ds.WindowWidth = 40, 80
    return ds


def _uid(*words) -> str:
    """A UID under the root 2.25, from a hash of the words."""
    return f"2.25.{int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:16])}"
