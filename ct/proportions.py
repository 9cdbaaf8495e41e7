"""Whether a brain is as high as others of its width: slice spacings are often assumed, or lost in a conversion."""

from __future__ import annotations

import numpy as np

from ct.scan import Scan
from ct.standardise import HEAD_MM, vertex_mm

CAP = 0.126             # how far below the vertex a section is half of the largest, of that one's diameter
STRETCHED = 1.6         # in 57 scans of three hospitals 0.83 to 1.21 times as much: twice or half of any is beyond


def check_proportions(scan: Scan, brain: np.ndarray) -> tuple[str, ...]:
    """A note where the upper part of a brain is far too high or too low for its width: one of the spacings is wrong.

    scan and its brain mask, bool [S, H, W], at working thickness, with the vertex. Where the pixel spacing is unknown,
    the width is taken for an adult's. A part without the base shows that as well: of a ball cut above its middle the
    share is a little less, and only of its uppermost tenth too little.
    """
    areas = brain.sum(axis=(1, 2)).astype(float)
    largest = int(areas.argmax())
    last = int(np.flatnonzero(areas >= areas[largest] / 2)[-1])           # half: between this slice and the next
    if last + 1 == len(areas):
        return ()
    width = HEAD_MM
    if scan.pixel_spacing_mm is not None:
        width = float(np.sqrt(areas[largest] * np.prod(scan.pixel_spacing_mm) * 4 / np.pi))
    half = np.interp(-areas[largest] / 2, -areas[last:last + 2], scan.position_mm[last:last + 2])
    ratio = (vertex_mm(brain, scan.position_mm) - half) / (CAP * width)
    if 1 / STRETCHED <= ratio <= STRETCHED:
        return ()
    return (f"by its shape the head is {ratio:.1f} times as high as others of this width: are the slice spacing "
            f"({scan.slice_spacing_mm:.3g} mm) and the pixel spacing right?",)
