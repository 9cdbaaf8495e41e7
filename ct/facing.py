"""Whether a head in the canonical frame lies nose down, as where a picture of it was turned or mirrored.

DICOM says how the patient lay; pictures do not, and some exporters turn them, also before they become NIfTI. Nothing is
turned back: whether left and right changed places, too, cannot be seen.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage as ndi

from ct.standardise import MIDDLE, Standardised

COARSE = 96                     # pixels of a slice's side from which on only every second, third ... is looked at
HOLLOW, SOLID = 8.0, 12.0       # HU above the lower end of the range: air and fat are less, soft tissue is more
LEAST_HOLLOW = 50               # coarse pixels, or the base of the head is not in the scan
BEHIND_HOLLOW = 0.03            # of the head's diameter: hollows lie so far behind the outline's middle
SKEWED = 0.03                   # of the brain's widths by row: a longer end in front, the wide one behind, is below 0
NOSE_DOWN = ("nose down, as it seems: the brain is widest in front, and the hollows of the base lie behind; turn the "
             "slices, or correct their orientation")


def check_facing(standardised: Standardised, head_fraction: float, low_hu: float) -> tuple[str, ...]:
    """A note where front and back of the head have plainly changed places.

    head_fraction of the frame is the head's diameter; low_hu: the lower end of the HU in it. Two signs must agree: the
    brain's widest part lies in front of its middle, and so does the middle of the head's outline of the hollows at its
    base (nose, sinuses, orbits). Of 140 upright heads none has both, of the same turned about 108 have.
    """
    step = max(1, standardised.hu.shape[1] // COARSE)
    hu, brain = standardised.hu[:, ::step, ::step], standardised.brain[:, ::step, ::step]
    areas = brain.sum(axis=(1, 2))
    middle = areas > MIDDLE * areas.max()
    if _skewness(brain[middle].sum(axis=(0, 2))) <= SKEWED:
        return ()
    behind = _hollows_behind(hu[:int(middle.argmax()) + 2], low_hu)
    return (NOSE_DOWN,) if behind > BEHIND_HOLLOW * head_fraction * hu.shape[1] else ()


def _skewness(widths: np.ndarray) -> float:
    """Of a brain's widths [N] by row, from the front: below 0 where the wide end is behind."""
    rows = np.arange(len(widths))
    centre = np.average(rows, weights=widths)
    spread = np.sqrt(np.average((rows - centre) ** 2, weights=widths))
    return float(np.average((rows - centre) ** 3, weights=widths) / spread**3)


def _hollows_behind(hu: np.ndarray, low_hu: float) -> float:
    """How many rows the air and fat within the outline of a head lie behind its middle; -inf where there is little."""
    rows, total, count = np.arange(hu.shape[1])[:, None], 0.0, 0
    for image in hu:
        outline = ndi.binary_fill_holes(ndi.binary_opening(image > low_hu + SOLID))
        hollow = outline & (image <= low_hu + HOLLOW)
        if hollow.any():
            total += (rows * hollow).sum() - hollow.sum() * (rows * outline).sum() / outline.sum()
            count += int(hollow.sum())
    return total / count if count >= LEAST_HOLLOW else -np.inf
