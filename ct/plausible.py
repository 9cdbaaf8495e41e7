"""Whether numbers are the Hounsfield units of a head in air, and slices that hold nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ct.scan import AIR_HU, Scan, ScanError

AIR_BELOW, SOFT, BONE_ABOVE = -300, (-100, 150), 300
TISSUES = ("air", "bone", "soft tissue")
LEAST_SOFT, FALL = 0.05, 0.2    # of a slice to be compared with; the part of its share that no slice between falls to
MUCH_BONE = 0.15                # of a slice of a head
FILLED = 0.1                    # of a slice: one value of the noise of tissue has less
MUCH_AIR, NO_AIR = 0.2, 0.003   # of most slices; of shoulders that fill the picture their windpipe is more
MIN_SOFT = 0.01                 # share of all voxels
COARSE_HU = 2.0                 # a haemorrhage is 20 HU denser than brain, an infarct 5 HU less dense
SOFT_BY_BONE = 0.3              # a head has several times as much soft tissue as bone


def tissue_shares(hu: np.ndarray, saturation_hu: tuple[float, float] = (-np.inf, np.inf)) -> dict[str, float]:
    """The shares of air, bone and soft tissue; what the source clipped at its low end is air, at its high end bone."""
    return dict(zip(TISSUES, _shares(hu, saturation_hu).mean(axis=0).tolist()))


def _shares(hu: np.ndarray, saturation_hu: tuple[float, float]) -> np.ndarray:
    """The same of each slice, [S, 3]."""
    (low, high), shares = saturation_hu, np.zeros((len(hu), 3))
    for k, image in enumerate(hu):                    # without temporary volumes
        air = (image < AIR_BELOW) | (image <= low)
        bone = (image > BONE_ABOVE) | (image >= high)
        soft = (image > SOFT[0]) & (image < SOFT[1]) & ~air & ~bone
        shares[k] = [np.count_nonzero(tissue) for tissue in (air, bone, soft)]
    return shares / np.prod(hu.shape[1:])


def refuse_odd_slices(scan: Scan) -> None:
    """ScanError for slices, one or any number in a row, without soft tissue, or with bone in place of it or of air,
    that lie between slices that have both; and, wherever they lie, for those without the air that most slices show.

    Their rescale or their sign is another than their header says, or they are empty: towards the vertex and the neck a
    head shrinks, but between two slices of it no anatomy has a fifth of what both show, and none takes the air away.
    """
    air, bone, soft = _shares(scan.hu, scan.saturation_hu).T
    turned = (bone[:, None] > np.maximum(bone / FALL, MUCH_BONE)) & (air[:, None] < FALL * air)
    unlike = (soft > LEAST_SOFT) & ((soft[:, None] < FALL * soft) | turned)         # [S, S]: a slice, another
    odd = np.tril(unlike).any(axis=1) & np.triu(unlike).any(axis=1)
    if np.median(air) > MUCH_AIR:
        odd |= air < NO_AIR
    if odd.any():
        k = int(odd.argmax())
        if (filled_hu := _filling(scan, air)) is not None:
            raise ScanError(f"filled with {filled_hu:g} HU outside the scan, so that its slices cannot be compared (as "
                            "by a program that turned or registered it); fill with -1024 there")
        shares = dict(zip(TISSUES, (air[k], bone[k], soft[k])))
        raise ScanError(f"slice {k} (0: the most inferior): {describe(shares)}, unlike the slices around it, and "
                        f"{int(odd.sum()) - 1} more such slices: empty slices, or ones whose rescale, sign or window "
                        "is wrong; correct them at the source, or leave them out")


def _filling(scan: Scan, air: np.ndarray) -> float | None:
    """HU of a value other than air that fills much of a slice from a corner on, beside air; None where none does.

    air: the share of each slice, [S]. In one without, the air itself may be of another value by a wrong rescale.
    """
    least = max(AIR_BELOW, scan.saturation_hu[0])
    for image in scan.hu[air > NO_AIR]:
        for value in np.unique(image[[0, 0, -1, -1], [0, -1, 0, -1]]):
            if value > least and np.mean(image == value) > FILLED:
                return float(value)
    return None


def like_a_head(shares: dict[str, float]) -> bool:
    """Whether tissue_shares are those of a head in air, wherever it was cut."""
    return (shares["air"] > shares["bone"] and shares["soft tissue"] > MIN_SOFT
            and shares["soft tissue"] > SOFT_BY_BONE * shares["bone"])


def describe(shares: dict[str, float]) -> str:
    """'62% air, 5% bone, 30% soft tissue'."""
    return ", ".join(f"{share:.0%} {name}" for name, share in shares.items())


def coarse_steps(scan: Scan) -> tuple[str, ...]:
    """A note where a scan's values are so many HU apart that faint lesions are lost between them.

    By the values themselves: a header tells a step that whoever rounded them before did not keep to.
    """
    levels = np.empty(0, np.float32)
    for image in scan.hu:                             # the first one with soft tissue is enough where they are fine
        levels = np.union1d(levels, image[(image > SOFT[0]) & (image < SOFT[1])])
        step_hu = np.diff(levels).min(initial=np.inf)
        if step_hu <= COARSE_HU:
            return ()
    if len(levels) < 2:
        return ()
    return (f"values are stored in steps of {step_hu:.3g} HU: what differs by less from healthy tissue is lost",)


def without_blanks(scan: Scan) -> Scan:
    """The scan with slices of one value other than air, which pad some volumes, set to air, and a note on them."""
    air = max(AIR_HU, scan.saturation_hu[0])
    blank = [k for k, image in enumerate(scan.hu) if image[0, 0] > max(air, AIR_BELOW) and np.ptp(image) == 0]
    if not blank:
        return scan
    hu = scan.hu.copy()
    hu[blank] = air
    return replace(scan, hu=hu, notes=(*scan.notes, f"slices of a single value, taken as air: {len(blank)}"))
