"""From a scan to the slices a network sees, and back: the one preprocessing that training and inference share.

The settings that decide the outcome are one dataclass (ct/settings.py), kept in the database and in every model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ct.brain import brain_mask
from ct.facing import check_facing
from ct.geometry import SliceStack, displaced
from ct.proportions import check_proportions
from ct.scan import Scan, ScanError
from ct.settings import PreprocessSettings
from ct.slab import Slabs, to_slabs
from ct.standardise import Standardised, from_frame, standardise
from ct.whole_head import check_head

# Of everything that decides what a network sees: slabs, brain mask, standardisation. Raise it with every change that
# alters pixels or masks: scores made before and after are not comparable, and a bundle of another version gives no
# percentiles.
VERSION = 1
SIDEWAYS_DEG = 60.0            # a head turned by more lies on its side; where by more than 90, it comes nose down
CLIP_HU = 1.0                  # a range that is smaller by so much is the same: formats round


@dataclass(frozen=True)
class Preprocessed:
    """One scan, ready for a network, with what it takes to bring maps back.

    slabs         slabs.scan is the scan at working thickness [T, H, W]; from_slabs leads back to its slices
    brain         bool [T, H, W], in the geometry of the slabs
    standardised  hu and brain [T, N, N], below_vertex_mm [T], and the frame (ct.standardise.from_frame)
    kept          bool [T]: enough brain, and above the neck
    reservations  why a score of this scan has no percentile (check_head, check_proportions, clipped_below,
                  displaced, check_facing); notes for the user
    """

    slabs: Slabs
    brain: np.ndarray
    standardised: Standardised
    kept: np.ndarray
    reservations: tuple[str, ...] = ()

    def kept_slices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What a network sees: hu float32 [K, N, N], brain bool [K, N, N], below_vertex_mm [K] of the kept slices."""
        standard = self.standardised
        return standard.hu[self.kept], standard.brain[self.kept], standard.below_vertex_mm[self.kept]

    def maps_to_scan(self, maps: np.ndarray, fill: float = 0.0) -> np.ndarray:
        """Maps [K, N, N] of the kept slices in the scan's own geometry, [S, H, W]: frame to pixels, slabs to slices.

        float32, or bool of bool. `fill` is what slices whose slab was not kept or that are in none and pixels outside
        the frame get. Between a slab that was kept and one that was not, the map of the former goes on.
        """
        maps = maps if maps.dtype == bool else maps.astype(np.float32, copy=False)
        found = self.slabs.from_slabs(self._nearest_kept(from_frame(maps, self.standardised.frame, fill=fill)))
        found[~self.values_to_scan(self.kept)] = fill
        return found

    def below_vertex_mm(self) -> np.ndarray:
        """Of each slice of the scan, float64 [S]: by its own position, also beyond the outermost slabs' centres."""
        vertex_mm = self.slabs.scan.position_mm[0] + self.standardised.below_vertex_mm[0]
        return vertex_mm - self.slabs.position_mm

    def values_to_scan(self, values: np.ndarray) -> np.ndarray:
        """One value per slab [T] as one per slice of the scan [S]; bool of bool."""
        return self.slabs.from_slabs(values[:, None, None])[:, 0, 0]

    def scores_to_scan(self, scores: np.ndarray) -> np.ndarray:
        """Scores [K] of the kept slices, float32 [S] per slice of the scan; 0 where it was not projected."""
        scores = self._nearest_kept(scores.astype(np.float32, copy=False))
        return self.values_to_scan(scores) * self.values_to_scan(self.kept)

    def _nearest_kept(self, values: np.ndarray) -> np.ndarray:
        """Values [K, ...] of the kept slices for all slabs, [T, ...]: of each that of the nearest kept one.

        Raises ValueError if there are not K of them.
        """
        mm = self.slabs.scan.position_mm
        if len(values) != self.kept.sum():
            raise ValueError(f"expected one map or score for each of {self.kept.sum()} kept slices, got {len(values)}")
        return values[np.abs(mm[:, None] - mm[self.kept]).argmin(1)]


def clipped_below(scan: Scan, settings: PreprocessSettings) -> tuple[str, ...]:
    """A note where the source clipped HU to less than the range of the settings: a bleed of 90 HU may be one of 80."""
    (low, high), (least, most) = scan.saturation_hu, settings.standardise.hu_clip
    if low <= least + CLIP_HU and high >= most - CLIP_HU:
        return ()
    return (f"HU clipped to {low:g}..{high:g} by the source, of {least:g}..{most:g} looked at: what lies beyond looks "
            "weaker than it is",)


def preprocess_scan(scan: Scan, settings: PreprocessSettings) -> Preprocessed:
    """Slabs, brain mask and canonical frame of a scan; ScanError when no head or no usable slice is found."""
    slabs = to_slabs(scan, settings.slab_mm, settings.thin_mm)
    brain = brain_mask(slabs.scan)
    try:
        reservations = check_head(slabs.scan, brain) or check_proportions(slabs.scan, brain)
    except ScanError as error:
        raise ScanError(f"{scan.scan_id}: {error}") from error
    reservations += clipped_below(scan, settings)
    if isinstance(scan.geometry, SliceStack):
        reservations += displaced(scan.geometry.origins, scan.position_mm)
    standardised = standardise(slabs.scan, brain, settings.standardise)
    below = standardised.below_vertex_mm
    kept = (standardised.brain.mean((1, 2)) >= settings.min_brain_fraction) & (below >= 0)
    kept &= below <= settings.max_below_vertex_mm
    if not kept.any():
        raise ScanError(f"{scan.scan_id}: no slice has brain on {settings.min_brain_fraction:.1%} of the frame "
                        f"and lies within {settings.max_below_vertex_mm:g} mm below the vertex")
    if scan.source != "dicom" or abs(standardised.frame.angle_deg) > SIDEWAYS_DEG:    # DICOM states how the patient lay
        reservations += check_facing(standardised, settings.standardise.head_fraction, settings.standardise.hu_clip[0])
    return Preprocessed(slabs, brain, standardised, kept, reservations)
