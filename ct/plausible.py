"""Whether numbers are the Hounsfield units of a head in air, and slices that hold nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ct.scan import AIR_HU, Scan

AIR_BELOW, SOFT, BONE_ABOVE = -300, (-100, 150), 300
MIN_SOFT = 0.01                 # share of all voxels
SOFT_BY_BONE = 0.3              # a head has several times as much soft tissue as bone


def tissue_shares(hu: np.ndarray, saturation_hu: tuple[float, float] = (-np.inf, np.inf)) -> dict[str, float]:
    """The shares of air, bone and soft tissue; what the source clipped at its low end is air, at its high end bone."""
    low, high = saturation_hu
    counts = np.zeros(3)
    for image in hu:                                  # without temporary volumes
        air = (image < AIR_BELOW) | (image <= low)
        bone = (image > BONE_ABOVE) | (image >= high)
        soft = (image > SOFT[0]) & (image < SOFT[1]) & ~air & ~bone
        counts += air.sum(), bone.sum(), soft.sum()
    return dict(zip(("air", "bone", "soft tissue"), (counts / hu.size).tolist()))


def like_a_head(shares: dict[str, float]) -> bool:
    """Whether tissue_shares are those of a head in air, wherever it was cut."""
    return (shares["air"] > shares["bone"] and shares["soft tissue"] > MIN_SOFT
            and shares["soft tissue"] > SOFT_BY_BONE * shares["bone"])


def describe(shares: dict[str, float]) -> str:
    """'62% air, 5% bone, 30% soft tissue'."""
    return ", ".join(f"{share:.0%} {name}" for name, share in shares.items())


def without_blanks(scan: Scan) -> Scan:
    """The scan with slices of one value other than air, which pad some volumes, set to air, and a note on them."""
    air = max(AIR_HU, scan.saturation_hu[0])
    blank = [k for k, image in enumerate(scan.hu) if image[0, 0] > max(air, AIR_BELOW) and np.ptp(image) == 0]
    if not blank:
        return scan
    hu = scan.hu.copy()
    hu[blank] = air
    return replace(scan, hu=hu, notes=(*scan.notes, f"slices of a single value, taken as air: {len(blank)}"))
