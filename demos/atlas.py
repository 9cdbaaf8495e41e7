"""Maps of the MNI ICBM152 2009a brain, prepared once per process for the heads that `anatomy.py` builds.

The tissue maps (Fonov et al., NeuroImage 2011) come with the nilearn package: grey matter, white matter and a
skull-stripped T1 at 1 mm. They are averages over 152 people, so folds are blurred; local contrast is raised here.
All maps are [Z, Y, X] with z, y, x growing in the MNI directions (superior, anterior, right).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import nibabel as nib
import numpy as np
from scipy import ndimage as ndi

MNI_MAPS = "datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
ORIGIN = np.array([-72, -134, -98])          # z, y, x in mm of the maps' first voxel
BRAIN_BOX = ((-72, 88), (-112, 80), (-80, 80))       # z, y, x in mm, what is kept of the maps
SPREAD_STEP = 4                              # mm, grid of the ventricles' spreading
HEAD_BOX = ((-116, 116), (-144, 120), (-108, 108))
HEAD_STEP = 2                                # mm, grid of the cavity: its surface is smooth
FLUID = 0.6                                  # tissue below this is a ventricle or a cistern
LATERAL_SEED = (8, -42, 26)                  # z, y, x in the left and right ventricles' common component
MIDLINE_VENTRICLES = (((-12, 12), (-28, 4), (-6, 6)), ((-46, -20), (-60, -36), (-14, 14)))  # third, fourth
TEMPORAL_HORNS = (((-24, -4), (-40, -6), (24, 44)), ((-24, -4), (-40, -6), (-44, -24)))


@dataclass(frozen=True)
class Atlas:
    brain: np.ndarray        # float32 on BRAIN_BOX at 1 mm, about 1 in tissue and 0 in CSF, folds sharpened
    white: np.ndarray        # float32 on BRAIN_BOX, share of white matter in the tissue
    ventricle: np.ndarray    # float32 on BRAIN_BOX, mm, positive where CSF is nearer a ventricle than a cistern
    spread: np.ndarray       # float32 [3, ...] on BRAIN_BOX at SPREAD_STEP, away from the ventricles, at most 1
    cavity: np.ndarray       # float32 on HEAD_BOX at HEAD_STEP, mm, positive inside the inner table
    vault: np.ndarray        # float32, the same for the smoother outer surface of the skull less its thickness


@lru_cache(maxsize=1)
def load_atlas() -> Atlas:
    """The maps, read and prepared at the first call (some seconds), then kept."""
    t1, grey, white = (_read(name) for name in ("t1", "gm", "wm"))
    tissue = grey + white
    folds = tissue + 1.2 * (tissue - ndi.gaussian_filter(tissue, 2.0)) + 1.0 * (t1 - ndi.gaussian_filter(t1, 3.0))
    folds += 0.6 * _torcular_gap()
    share = white / np.maximum(tissue, 0.05)
    share += 0.8 * (share - ndi.gaussian_filter(share, 2.0))
    ventricles = _ventricles(tissue, t1)
    cisterns = (tissue < FLUID) & ~ndi.binary_dilation(ventricles, iterations=2)
    outside = ndi.distance_transform_edt(~ventricles)
    nearer = (ndi.distance_transform_edt(~cisterns) - outside) / 2
    cavity, vault = _cavity(t1)
    return Atlas(folds, share, nearer.astype(np.float32), _spread(outside), cavity, vault)


def _read(name: str) -> np.ndarray:
    path = files("nilearn").joinpath(MNI_MAPS.format(name))
    volume = np.asarray(nib.load(path).dataobj).transpose(2, 1, 0)
    return volume[_box(BRAIN_BOX, ORIGIN)].astype(np.float32) / 255


def _box(box: tuple, origin: tuple) -> tuple[slice, ...]:
    """Voxels of a box in mm, both ends included, on a 1 mm grid that starts at `origin`."""
    return tuple(slice(low - start, high - start + 1) for (low, high), start in zip(box, origin))


def _torcular_gap() -> np.ndarray:
    """Weight 0..1 on BRAIN_BOX where the average washes brain out: around the torcula."""
    z, y, x = np.ogrid[tuple(slice(low, high + 1) for low, high in BRAIN_BOX)]
    return np.exp(-(((z + 20) / 11.0) ** 4) - ((y + 90) / 16.0) ** 4 - (x / 50.0) ** 4).astype(np.float32)


def _ventricles(tissue: np.ndarray, t1: np.ndarray) -> np.ndarray:
    origin = [low for low, _ in BRAIN_BOX]
    fluid = (tissue < FLUID) & (t1 > 0.05)
    labels, _ = ndi.label(ndi.binary_opening(fluid))
    ventricles = labels == labels[tuple(np.subtract(LATERAL_SEED, origin))]
    for part in MIDLINE_VENTRICLES + TEMPORAL_HORNS:
        box = _box(part, origin)
        ventricles[box] |= fluid[box]
    return ventricles


def _spread(outside: np.ndarray) -> np.ndarray:
    """Unit vectors away from the ventricles, fading with the distance from their walls."""
    coarse = ndi.gaussian_filter(outside, 3.0)[(slice(None, None, SPREAD_STEP),) * 3]
    away = np.stack(np.gradient(coarse, SPREAD_STEP))
    fading = np.exp(-coarse / 14.0)
    return (away / np.maximum(np.linalg.norm(away, axis=0), 0.3) * fading).astype(np.float32)


def _cavity(t1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Signed distances to the inner table and to a smoother vault around it.

    The brain's mask is closed: by little at the base, where bone reaches between the lobes, by much over the
    vault, which is nearly convex. Cisterns at the base that the mask lacks are added.
    """
    shape = tuple((high - low) // HEAD_STEP + 1 for low, high in HEAD_BOX)
    mask = np.zeros(shape, bool)
    box = tuple(slice((b[0] - h[0]) // HEAD_STEP, (b[1] - h[0]) // HEAD_STEP + 1) for b, h in zip(BRAIN_BOX, HEAD_BOX))
    mask[box] = ndi.binary_opening(t1 > 0.1, iterations=2)[(slice(None, None, HEAD_STEP),) * 3]
    z, y, x = (np.arange(low, high + 1, HEAD_STEP) for low, high in HEAD_BOX)
    z, y, x = z[:, None, None], y[None, :, None], x[None, None, :]
    mask |= ((z + 18) / 10) ** 2 + ((y + 2) / 14) ** 2 + (x / 13) ** 2 < 1     # suprasellar cistern
    mask |= ((z + 34) / 5) ** 2 + ((y - 2) / 6) ** 2 + (x / 7) ** 2 < 1        # sella
    near, wide = _closed(mask, HEAD_STEP, 8.0), _hull(mask)
    over = 1 / (1 + np.exp(-np.clip((z + 8 - 0.16 * y) / 4, -30, 30)))         # the vault's share of each level
    keel = 3.5 * np.exp(-((x / 16) ** 2)) / (1 + np.exp(-(z - 55) / 6))         # the vertex has no dip in the midline
    cavity = ndi.gaussian_filter(keel + near + over * (np.maximum(wide, near) - near) + 1.0, 0.7)
    return cavity.astype(np.float32), ndi.gaussian_filter(cavity, 2.5).astype(np.float32)


def _hull(mask: np.ndarray) -> np.ndarray:
    """Signed distance to a nearly convex hull: the mask closed by a ball of 80 mm, worked out at twice the step."""
    pad, step = 24, 2 * HEAD_STEP
    coarse = np.pad(mask[::2, ::2, ::2], pad)
    hull = ndi.gaussian_filter(_closed(coarse, step, 80.0), 0.7)[(slice(pad, -pad),) * 3]
    return ndi.zoom(hull, np.divide(mask.shape, hull.shape), order=1, grid_mode=False)


def _closed(mask: np.ndarray, step: float, radius: float) -> np.ndarray:
    """Signed distance in mm, positive inside, to the mask closed by a ball of `radius` mm."""
    grown = ndi.distance_transform_edt(~mask) * step < radius
    closed = (ndi.distance_transform_edt(grown) * step > radius) | mask
    return (ndi.distance_transform_edt(closed) - ndi.distance_transform_edt(~closed)) * step
