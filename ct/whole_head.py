"""Whether a scan is a whole, upright head: from the outline of the head, and from the brain that was found in it.

upright() looks at a coarse copy of the scan before anything else does: towards the vertex the skull's inside and the
head's outline shrink together to nothing; towards the base the inside ends while the face or the neck goes on. A stack
that plainly runs the other way is put right. check_head() looks at the brain mask: what it is surrounded by, its
volume and where it ends.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage as ndi

from ct.brain import bone_threshold, estimate_pixel_mm
from ct.limits import SLICE_MM
from ct.morphology import box, dilate
from ct.plausible import AIR_BELOW
from ct.scan import Scan, ScanError
from ct.slab import slice_thickness_mm

COARSE_MM = 3.0                 # of the coarse copy, in all directions
TYPICAL_FIELD_MM = 240.0        # taken for the coarse copy where the pixel spacing is unknown
GAP_MM = 7.0                    # gaps in the skull that are closed
ENDED = 0.35                    # of its largest area: the inside of the skull has ended
BEYOND_MM = 15.0                # stretch beyond that end in which the outline is looked at
SMALL, APART = 0.5, 0.2         # of the largest outline: at the vertex less, and less than at the other end by this
BRAIN_ML = (150.0, 2300.0)      # the inside of the skull of a preterm newborn, and of the largest heads
BRAIN_HU = (3.0, 75.0)          # median: beyond, the numbers are not HU
USUAL_BRAIN_HU = (15.0, 50.0)   # median: beyond, the scale is off by several HU, or a contrast agent was given
MIN_HEIGHT_MM = 55.0            # of the brain of a newborn, where both its ends are in the scan
MIDDLE = 0.7                    # slices with more than this share of the largest area are surrounded by the skull
MIN_ENCLOSED = 0.55             # of their border at least: half the skull may be taken out, ribs close less
REACH_MM = 5.0                  # from the brain's border to the bone
CUT = 0.45                      # of the largest area: a scan whose outermost slice shows more ends in the brain
AT_EDGE_MM, CUT_OFF_MM = 1.5, 40.0  # a brain that lies so near to the picture's edge over more than so much is cut off
NOISE_HU = 3.0                  # of JPEG in black
# The note on a stack that was put right. evaluate.py knows such scans by it, also in results that lie there already
UPSIDE_DOWN = ("upside down: the slices ran from the vertex to the base and were put in reverse order; whether left "
               "and right are right cannot be seen")
NEGATED = ("position_mm counts the other way, so that it rises to the vertex: it is the negative of the coordinate "
           "along the slice normal in the files, and in the maps, which lie as these do")


@dataclass(frozen=True)
class Profile:
    """Areas along a coarse copy of a scan, in its pixels: the inside of the skull, and the head's outline; both [s]."""

    inside: np.ndarray
    outline: np.ndarray
    step_mm: float


def upright(scan: Scan) -> Scan:
    """The scan with its vertex up; where the stack plainly ran the other way, reversed and with two notes."""
    if len(scan.hu) < 8 or scan.brain is not None:
        return scan
    below, above = ends(profile(scan))
    above = 1.0 if above is None else above           # cut off within the brain: as wide as there
    if below is None or below >= SMALL or above - below < APART:
        return scan
    turned = scan.upended()
    return replace(turned, notes=(*turned.notes, UPSIDE_DOWN, NEGATED))


def check_head(scan: Scan, brain: np.ndarray) -> tuple[str, ...]:
    """Why a percentile would mean little: notes on a brain that the scan does not show whole, and on unusual HU.

    scan and its brain mask, bool [S, H, W], at working thickness. Without the skull base positions are still measured
    from the vertex, and nothing is said. Raises ScanError for what is no head: a brain that no skull surrounds, of a
    volume, height or density that no brain has.
    """
    areas = brain.sum(axis=(1, 2))
    shown = np.flatnonzero(areas)
    if not len(shown):
        raise ScanError("no head: the brain mask is empty")
    density = float(np.median(scan.hu[brain]))
    if not BRAIN_HU[0] <= density <= BRAIN_HU[1]:
        raise ScanError(f"no head in HU: the median inside the skull is {density:.0f} HU, expected {BRAIN_HU[0]:.0f} "
                        f"to {BRAIN_HU[1]:.0f}; check the rescale or the window")
    enclosed = _enclosed(scan, brain, np.flatnonzero(areas > MIDDLE * areas.max()))
    if enclosed < MIN_ENCLOSED:
        raise ScanError(f"no head: {enclosed:.0%} of the border of what might be a brain is bone, expected at least "
                        f"{MIN_ENCLOSED:.0%} (another part of the body, or a skull that was removed?)")
    (base, below), (vertex, above) = ((bool(areas[end] > CUT * areas.max()), _goes_on(scan, brain[end], end + step))
                                      for end, step in ((shown[0], -1), (shown[-1], 1)))
    lost = (base and below) or (vertex and above)         # the skull is open there, as where a picture cuts it off
    base, vertex = base and not below, vertex and not above
    height = float(np.ptp(scan.position_mm[shown]))
    if not base and not vertex and height < MIN_HEIGHT_MM:
        raise ScanError(f"no head: what might be a brain is {height:.0f} mm high, expected at least "
                        f"{MIN_HEIGHT_MM:.0f} mm (another part of the body?)")
    if scan.pixel_spacing_mm is not None and scan.brain is None:
        volume = float(areas @ _thickness_mm(scan) * np.prod(scan.pixel_spacing_mm) / 1000)
        if volume > BRAIN_ML[1] or (volume < BRAIN_ML[0] and not base and not vertex):
            raise ScanError(f"no head of this size: the inside of the skull is {volume:.0f} ml, expected "
                            f"{BRAIN_ML[0]:.0f} to {BRAIN_ML[1]:.0f} (spacings wrong, or the size of a template?)")
    notes = []
    if not USUAL_BRAIN_HU[0] <= density <= USUAL_BRAIN_HU[1]:
        notes.append(f"the median inside the skull is {density:.0f} HU, in most heads {USUAL_BRAIN_HU[0]:.0f} to "
                     f"{USUAL_BRAIN_HU[1]:.0f}: is the HU scale right?")
    if vertex:
        notes.append("partial head: ends below the vertex; positions unknown")
    if lost:
        notes.append("partial head: the brain that was found ends at once where the head goes on; sizes and places "
                     "unknown")
    if _at_edge_mm(scan, brain) > CUT_OFF_MM:
        notes.append("partial head: the picture's edge cuts off the brain; sizes and places unknown")
    return tuple(notes)


def _goes_on(scan: Scan, image: np.ndarray, beyond: int) -> bool:
    """Whether there is tissue in slice `beyond`, if there is one, where another shows brain, bool [H, W]."""
    if not 0 <= beyond < len(scan.hu):
        return False
    return bool((scan.hu[beyond][image] > max(AIR_BELOW, scan.saturation_hu[0] + 12)).mean() > 0.5)


def _at_edge_mm(scan: Scan, brain: np.ndarray) -> float:
    """The longest stretch over which the brain, bool [S, H, W], lies at the edge of what a slice shows.

    That is the picture's edge, or padding beyond it: air that reaches it, on this slice, or but for noise on all. A
    whole brain has bone and skin there. Where a picture was cut to the size of the brain, this touches the edges, each
    for 20 to 30 mm.
    """
    low = scan.saturation_hu[0]
    always = scan.hu.max(axis=0) <= max(AIR_BELOW, low + NOISE_HU)
    typical = scan.pixel_spacing_mm or (TYPICAL_FIELD_MM / max(scan.hu.shape[1:]),) * 2
    reach = [max(1, round(AT_EDGE_MM / mm)) for mm in typical]
    stretches = []
    for image, hu in zip(brain, scan.hu):
        air = always | (hu <= max(AIR_BELOW, low))
        if not _may_touch(image, air, max(reach)):
            continue
        labels, _ = ndi.label(np.pad(air, 1, constant_values=True))
        image = np.pad(image, 1)
        around = box(image, max(reach))
        near = ndi.maximum_filter(labels[around] == labels[0, 0], [2 * pixels + 1 for pixels in reach])
        stretches += ndi.find_objects(ndi.label(image[around] & near)[0])
    if not stretches:
        return 0.0
    row_mm, column_mm = scan.pixel_spacing_mm or (estimate_pixel_mm(scan),) * 2
    return max(float(np.hypot((rows.stop - rows.start) * row_mm, (columns.stop - columns.start) * column_mm))
               for rows, columns in stretches)


def _may_touch(image: np.ndarray, air: np.ndarray, reach: int) -> bool:
    """False where neither air nor the picture's edge is within `reach` pixels of a brain; both bool [H, W].

    Air of a sinus counts, too: what of it reaches the edge takes long to tell, and is asked only where this is True.
    """
    if not image.any():
        return False
    rows, columns = around = box(image, reach + 1)
    if not (rows.start and columns.start and rows.stop < image.shape[0] and columns.stop < image.shape[1]):
        return True
    return bool((dilate(image[around], 1.5 * reach) & air[around]).any())


def _enclosed(scan: Scan, brain: np.ndarray, slices: np.ndarray) -> float:
    """Share of the brain's border in these slices that has bone within REACH_MM, on a copy of about 2 mm pixels."""
    row_mm, column_mm = scan.pixel_spacing_mm or (TYPICAL_FIELD_MM / max(scan.hu.shape[1:]),) * 2
    strides = [max(1, round(2.0 / mm)) for mm in (row_mm, column_mm)]
    reach = max(1, round(REACH_MM / float(np.sqrt(row_mm * strides[0] * column_mm * strides[1]))))
    near = border = 0
    for s in slices[np.linspace(0, len(slices) - 1, min(9, len(slices))).astype(int)]:
        bone = scan.hu[s, ::strides[0], ::strides[1]] >= bone_threshold(scan)
        inside = brain[s, ::strides[0], ::strides[1]]
        edge = inside & ~ndi.binary_erosion(inside)
        near += int((edge & ndi.binary_dilation(bone, np.ones((3, 3)), iterations=reach)).sum())
        border += int(edge.sum())
    return near / max(border, 1)


def _heights_mm(scan: Scan) -> np.ndarray:
    """Of the slices above the lowest, [S]; a gap wider than slices of a head CT ever are counts as one of these."""
    return np.append(0.0, np.cumsum(np.minimum(np.diff(scan.position_mm), SLICE_MM[1])))


def _thickness_mm(scan: Scan) -> np.ndarray:
    """Of each slice, [S], across gaps: the brain, whose volume is to be known, goes on where slices are missing."""
    if len(scan.hu) < 2:
        return np.array([scan.slice_spacing_mm])
    return slice_thickness_mm(_heights_mm(scan), across_gaps=True)


def _at_even_steps(scan: Scan, step_mm: float) -> np.ndarray:
    """The number of the slice that is nearest at every step from the lowest to the highest; half way: the lower."""
    heights = _heights_mm(scan)
    count = int(heights[-1] / step_mm + 0.01) + 1          # headers round: a last step may be short by a hundredth
    return np.searchsorted((heights[1:] + heights[:-1]) / 2, step_mm * np.arange(count))


def profile(scan: Scan) -> Profile:
    """Areas of a coarse copy of the scan: at even steps the nearest slice, and of it every few pixels."""
    row_mm, column_mm = scan.pixel_spacing_mm or (TYPICAL_FIELD_MM / max(scan.hu.shape[1:]),) * 2
    strides = [max(1, round(COARSE_MM / mm)) for mm in (row_mm, column_mm)]
    step_mm = max(1, round(COARSE_MM / scan.slice_spacing_mm)) * scan.slice_spacing_mm
    taken, of_step = np.unique(_at_even_steps(scan, step_mm), return_inverse=True)
    hu = np.clip(scan.hu[:, ::strides[0], ::strides[1]][taken], -500, 500)
    pixel_mm = float(np.sqrt(row_mm * strides[0] * column_mm * strides[1]))
    tissue = ndi.binary_opening(hu > max(AIR_BELOW, scan.saturation_hu[0] + 12), np.ones((1, 3, 3)))
    bone = hu >= bone_threshold(scan)
    radius = max(1, round(GAP_MM / 2 / pixel_mm))
    skull = np.stack([_closed(image, radius) for image in bone])
    filled = np.stack([ndi.binary_fill_holes(image) for image in skull])
    inside = ndi.binary_opening(filled & ~skull & tissue, np.ones((1, 3, 3)))
    areas = np.array([_largest(image) for image in inside])
    labels, count = ndi.label(tissue)
    if not areas.any() or not count:
        return Profile(areas[of_step], np.zeros(len(of_step)), step_mm)
    middle = int(areas.argmax())
    head = labels == np.bincount(labels[middle][inside[middle]], minlength=count + 1)[1:].argmax() + 1
    outline = np.array([ndi.binary_fill_holes(image).sum() for image in head])
    return Profile(areas[of_step], outline[of_step], step_mm)


def ends(found: Profile) -> tuple[float | None, float | None]:
    """How large the outline still is beyond the lower and the upper end of the skull's inside, of the head's largest.

    Above 1 where the shoulders are in the scan. None where the scan, or what of it is no padding, ends before the
    inside does.
    """
    inside, outline = found.inside, found.outline
    middle, largest = int(inside.argmax()), inside.max(initial=0)
    count = max(1, round(BEYOND_MM / found.step_mm))

    if not largest or not outline.any():
        return None, None
    head = outline[inside >= ENDED * largest].max()         # of the scan it may be the shoulders that are the largest

    def beyond(areas: np.ndarray, outlines: np.ndarray) -> float | None:
        ended = np.flatnonzero(areas < ENDED * largest)
        if not len(ended) or not outlines[ended[0]:].any():
            return None
        return float(outlines[ended[0]:ended[0] + count].mean() / head)

    return beyond(inside[middle::-1], outline[middle::-1]), beyond(inside[middle:], outline[middle:])


def _closed(mask: np.ndarray, radius: int) -> np.ndarray:
    disk = np.hypot(*np.mgrid[-radius:radius + 1, -radius:radius + 1]) <= radius + 0.5
    padded = np.pad(mask, radius + 1)
    return ndi.binary_closing(padded, disk)[radius + 1:-radius - 1, radius + 1:-radius - 1]


def _largest(mask: np.ndarray) -> int:
    labels, _ = ndi.label(mask)
    return int(np.bincount(labels.ravel())[1:].max(initial=0))
