"""The intracranial space from HU and morphology: brain, CSF and blood up to the bone's inner edge.

Each slice is cut into chambers: soft tissue (neither bone nor fat nor air) opened by a radius that seals
foramina, sutures and thin bone. Starting at the level with the largest chamber inside a skull, chambers are
followed upwards and downwards; one is kept when it lies where the mask of the neighbouring slice lies, which
drops orbits, sinuses, mastoid cells, the infratemporal fossa and the scalp. Below the foramen magnum nothing is
kept. Sizes are in mm; where the pixel spacing is unknown it is estimated from the size of the head.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy import ndimage as ndi

from ct.morphology import box, closed, dilate, erode, filled, hull, opened
from ct.scan import Scan, ScanError

ADULT_SKULL_AREA_MM2 = np.pi / 4 * 180 * 145   # the skull's outline on its largest slices
MIN_SKULL_SHARE = 0.02          # of the picture; a smaller outline is no head
WORK_MM = 1.0                   # pixel size of the morphology
SEALS_MM = (4.0, 6.5, 9.0, 13.0)  # gaps up to twice this are closed; the first seal that holds is used
MIN_PLATE = 0.03                # a bone counts as skull from this share of the largest one's volume
MIN_SEED = 0.4                  # the skull is closed when a chamber fills this share of its largest outline
HOLDS = 0.75                    # a seal holds when this share of the neighbour's area is found again
FAT_HU = -8.0                   # below: fat or air, where soft tissue is at SOFT_HU or denser
SOFT_HU = 30.0                  # usual median of soft tissue; on some scanners, and CSF with it, up to 15 HU lower
FAT_BLUR_MM = 0.7               # so that noise in CSF is not taken for fat
REACH_MM = 2.0                  # how far a mask may spread from slice to slice, besides the slices' distance
MIN_OVERLAP = 0.6               # share of a chamber that must lie where its neighbour's mask lies
MAX_FAT_CONTACT = 0.25          # share of a chamber's border that may be fat or air
MIN_BRAIN_MM2 = 3000.0          # the largest chamber of a head is at least this
MIN_PART_MM2 = 150.0            # smaller parts are partial volume: ethmoid, sella, the last of the vertex
FORAMEN_MAGNUM_MM2 = 1100.0     # a smaller part behind and below the middle is the spinal canal's
SMOOTH_MM = 2.0                 # narrower tongues of the mask are cut
ISLAND_MM2 = 30.0               # larger islands of skull (clinoids, petrous tips) are not brain


def brain_mask(scan: Scan) -> np.ndarray:
    """The intracranial space, bool [S, H, W]; scan.brain itself where the scan came with a mask.

    Raises ScanError when there is no skull around soft tissue on any slice.
    """
    if scan.brain is not None:
        return scan.brain
    row_mm, column_mm = scan.pixel_spacing_mm or (estimate_pixel_mm(scan),) * 2
    shape = tuple(max(1, round(n * mm / WORK_MM)) for n, mm in zip(scan.hu.shape[1:], (row_mm, column_mm)))
    hu = np.stack([_resize(np.clip(image, -200, 300), shape) for image in scan.hu])
    # What lies around the head and its holder is air, and is left aside; the margin holds the blur's reach twice.
    head = (slice(None), *box((hu >= fat_threshold(scan)).any(axis=0), margin=8))
    bone = hu[head] >= bone_threshold(scan)
    skull = _skull(bone)
    mask = np.zeros(hu.shape, bool)
    mask[head] = _refine(_follow(hu[head], bone, skull, scan), skull)
    return _full_size(mask, scan.hu.shape)


def bone_threshold(scan: Scan) -> float:
    """HU from which a pixel counts as bone: above acute blood (50-90 HU), below a saturated bone window."""
    return float(min(110.0, scan.saturation_hu[1] - 6.0))


def fat_threshold(scan: Scan) -> float:
    """HU below which a pixel counts as fat or air; above where a narrow window clips them to (0..80 HU: 0).

    Follows the scan's soft tissue down, where that is darker than usual: CSF lies below FAT_HU there.
    """
    step = max(1, max(scan.hu.shape[1:]) // 128)
    hu = scan.hu[:, ::step, ::step]
    soft = hu[(hu > 5) & (hu < 60)]
    darker = min(0.0, float(np.median(soft)) - SOFT_HU) if soft.size else 0.0
    return float(max(FAT_HU + darker, scan.saturation_hu[0] + 3.0))


def estimate_pixel_mm(scan: Scan) -> float:
    """Pixel size in mm for scans that do not tell it: the skull's convex hull, taken for an adult's.

    A child's head comes out as large as an adult's, which is what the sizes here and the standard frame want.
    Raises ScanError when no skull is found.
    """
    step = max(1, max(scan.hu.shape[1:]) // 128)
    hu = scan.hu[:, ::step, ::step]
    heads = [_largest(image) for image in opened(hu > fat_threshold(scan), 2.0)]
    areas = [hull(bone & head).sum() for bone, head in zip(hu >= bone_threshold(scan), heads)]
    area = np.percentile(areas, 90) * step**2   # the jaw's hull can be larger than the vault's
    if area < MIN_SKULL_SHARE * scan.hu[0].size:
        raise ScanError(_no_head(scan, "no skull"))
    return float(np.sqrt(ADULT_SKULL_AREA_MM2 / area))


def _no_head(scan: Scan, found: str) -> str:
    return (f"{scan.scan_id}: no head found: expected axial slices, inferior to superior, with soft tissue "
            f"(0..80 HU) inside a closed skull (>= {bone_threshold(scan):.0f} HU), found {found}, "
            f"HU {scan.hu.min():.0f}..{scan.hu.max():.0f}; check the HU window or rescale, and that it is a head")


def _skull(bone: np.ndarray) -> np.ndarray:
    """Bone without small pieces: a newborn's skull is of several, calcifications in the brain are small ones."""
    labels, _ = ndi.label(bone)
    sizes = np.bincount(labels.reshape(-1))
    sizes[0] = 0
    return bone & (sizes >= MIN_PLATE * sizes.max())[labels]


def _follow(hu: np.ndarray, bone: np.ndarray, skull: np.ndarray, scan: Scan) -> np.ndarray:
    """Mask at working resolution: from the largest chamber up to the vertex and down to the foramen magnum."""
    fat = ndi.gaussian_filter(hu, (0, FAT_BLUR_MM / WORK_MM, FAT_BLUR_MM / WORK_MM)) < fat_threshold(scan)
    soft = ~bone & ~fat
    inside, hulls, seeds = _enclose(soft, skull)
    start = int(np.argmax([seed.sum() for seed in seeds]))
    area = seeds[start].sum() * WORK_MM**2
    if area < MIN_BRAIN_MM2:
        raise ScanError(_no_head(scan, f"at most {area / 100:.0f} cm2 of it on a slice"))
    mask = np.zeros(hu.shape, bool)
    mask[start] = seeds[start]
    centre = ndi.center_of_mass(mask[start])
    for step, last, smallest in ((1, len(hu), MIN_PART_MM2), (-1, -1, FORAMEN_MAGNUM_MM2)):
        for s in range(start + step, last, step):
            gap_mm = abs(scan.position_mm[s] - scan.position_mm[s - step])
            near = dilate(mask[s - step], (REACH_MM + gap_mm) / WORK_MM)
            upwards = inside[s] & (step > 0)   # above the largest chamber nothing in the skull is fat: dark CSF, or air
            found = _continue(soft[s] | (fat[s] & upwards), fat[s] & ~upwards, mask[s - step]) & near
            if (found & ~inside[s]).any():   # the skull has a hole too wide to seal
                found &= hulls[s]
            parts = _parts(found)
            if step < 0:
                parts = [part for part in parts if not _is_canal(part, centre)]
            if sum(part.sum() for part in parts) * WORK_MM**2 < smallest:
                break
            mask[s] = np.any(parts, axis=0)
    return mask


def _enclose(soft: np.ndarray, skull: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """The inside of the skull and its convex hull, both [S, h, w], and each slice's largest chamber inside.

    The first seal that closes the skull is used; where none does (open fontanelles), the convex hull.
    """
    hulls = np.stack([hull(image) for image in skull])
    for seal_mm in (*SEALS_MM, None):
        inside = hulls if seal_mm is None else np.stack([filled(image) for image in closed(skull, seal_mm / WORK_MM)])
        seeds = [_largest_chamber(image, seal_mm or SEALS_MM[0]) for image in inside & soft]
        if max(seed.sum() for seed in seeds) >= MIN_SEED * np.percentile(hulls.sum(axis=(1, 2)), 90):
            break
    return inside, hulls, seeds


def _cut(soft: np.ndarray, seal_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """The soft tissue of one slice cut at necks narrower than twice seal_mm: cores, and the nearest core's number.

    int [h, w] both, 0 where there is none. A chamber is what _chamber makes of a number.
    """
    radius = seal_mm / WORK_MM
    cores, count = ndi.label(erode(soft, radius))
    reached = soft & dilate(cores > 0, radius + 1.5)
    if count == 1:
        return cores, reached.astype(cores.dtype)
    owner = np.zeros_like(cores)
    where = box(reached)
    nearest = ndi.distance_transform_edt(cores[where] == 0, return_distances=False, return_indices=True)
    owner[where] = np.where(reached[where], cores[where][tuple(nearest)], 0)
    return cores, owner


def _chamber(cores: np.ndarray, owner: np.ndarray, number: int) -> np.ndarray:
    """One of the chambers of _cut, bool [h, w]: what belongs to a core and hangs together with it."""
    mine = owner == number
    where = box(mine)
    labels, count = ndi.label(mine[where])
    keep = np.zeros(count + 1, bool)
    keep[labels[cores[where] == number]] = True
    mine[where] = keep[labels]
    return mine


def _largest_chamber(soft: np.ndarray, seal_mm: float) -> np.ndarray:
    cores, owner = _cut(soft, seal_mm)
    at_most = np.bincount(owner.reshape(-1))
    at_most[0] = 0
    best, size = np.zeros(soft.shape, bool), 0
    for number in np.argsort(-at_most, kind="stable"):
        if at_most[number] <= size:
            break
        chamber = _chamber(cores, owner, number)
        if chamber.sum() > size:
            best, size = chamber, chamber.sum()
    return best


def _continue(soft: np.ndarray, fat: np.ndarray, neighbour: np.ndarray) -> np.ndarray:
    """The chambers of one slice that continue its neighbour's mask, sealed only as tightly as it takes.

    A leak counts against a seal as much as the brain that it finds counts for it.
    """
    best, best_score = np.zeros(soft.shape, bool), 0.0
    below = dilate(neighbour, REACH_MM / WORK_MM)
    for seal_mm in SEALS_MM:
        found = np.zeros(soft.shape, bool)
        cores, owner = _cut(soft, seal_mm)
        for number in np.flatnonzero(np.bincount(owner[below], minlength=1)[1:]) + 1:
            chamber = _chamber(cores, owner, number)
            overlaps = (chamber & below).sum() >= MIN_OVERLAP * chamber.sum()
            if overlaps and _fat_contact(chamber, fat) <= MAX_FAT_CONTACT:
                found |= chamber
        score = 2.0 * (found & below).sum() - found.sum()
        if score > 1.1 * best_score:
            best, best_score = found, score
        if score >= HOLDS * neighbour.sum():
            break
    return best


def _fat_contact(chamber: np.ndarray, fat: np.ndarray) -> float:
    """Share of a chamber's border that is fat or air: brain borders on bone, globes and mucosa do not."""
    where = box(chamber, margin=1)
    ring = dilate(chamber[where], 1.0) & ~filled(chamber[where])
    return float(fat[where][ring].mean()) if ring.any() else 0.0


def _is_canal(part: np.ndarray, centre: tuple[float, float]) -> bool:
    """Whether a part is the spinal canal or the foramen magnum: small, behind the middle, near the midline."""
    row, column = ndi.center_of_mass(part)
    return (part.sum() * WORK_MM**2 < FORAMEN_MAGNUM_MM2 and (row - centre[0]) * WORK_MM > 10
            and abs(column - centre[1]) * WORK_MM < 25)


def _refine(coarse: np.ndarray, skull: np.ndarray) -> np.ndarray:
    """Cut tongues, and fill what is not skull (calcifications, air, the falx)."""
    mask = np.zeros(coarse.shape, bool)
    for s in np.flatnonzero(coarse.any(axis=(1, 2))):
        smooth = opened(coarse[s], SMOOTH_MM / WORK_MM)
        labels, count = ndi.label(filled(smooth) & ~smooth)
        islands = np.bincount(labels[skull[s]], minlength=count + 1) * WORK_MM**2 > ISLAND_MM2
        mask[s] = smooth | ((labels > 0) & ~islands[labels])
    return mask


def _full_size(mask: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """A mask at working resolution, bool [S, h, w], at the scan's own shape (S, H, W)."""
    full = np.zeros(shape, bool)
    for s in np.flatnonzero(mask.any(axis=(1, 2))):
        full[s] = _resize(mask[s].astype(np.float32), shape[1:]) > 0.5
    return full


def _parts(mask: np.ndarray) -> list[np.ndarray]:
    """The connected parts of a mask that are large enough to be brain, one bool [h, w] each."""
    labels, _ = ndi.label(mask)
    sizes = np.bincount(labels.reshape(-1))[1:]
    return [labels == 1 + i for i in np.flatnonzero(sizes * WORK_MM**2 >= MIN_PART_MM2)]


def _largest(mask: np.ndarray) -> np.ndarray:
    """The largest connected part of a mask, bool [h, w]."""
    labels, count = ndi.label(mask)
    return labels == 1 + np.argmax(np.bincount(labels.reshape(-1))[1:]) if count else mask


def _resize(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Bilinear; averages over the pixels that it merges where the picture gets smaller."""
    return np.asarray(Image.fromarray(image).resize(shape[::-1], Image.Resampling.BILINEAR))
