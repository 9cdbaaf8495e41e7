"""Blood: epidural, subdural, subarachnoid, intraparenchymal and intraventricular haemorrhage, and aneurysms.

Each function takes the cavity, a severity in 0..1 (what a resident misses to what nobody misses) and a generator,
changes the cavity in place and returns the truth mask, bool [Z, Y, X] on the cavity's box, and facts. The mask is the
blood that can be seen, without the oedema around it, as annotators of haemorrhage sets draw it.
"""

from __future__ import annotations

import numpy as np

from demos.anatomy import Tissue
from demos.shapes import (
    BRAIN,
    CEREBRUM,
    INFRATENTORIAL,
    above_tentorium,
    angle_deg,
    between,
    blob,
    direction,
    fluid_share,
    growth,
    near_point,
    nearest,
    paint,
    shell,
    smooth_noise,
    soft,
    volume_ml,
)
from demos.warps import Cavity, blocks, displacement, move, voxels

SITES = {                       # intraparenchymal: chance, MNI mm (right), spread mm, smallest and largest volume ml
    "basal ganglia": (0.35, (27, 0, 3), (3, 8, 4), (1.0, 80)),
    "thalamus": (0.15, (13, -18, 8), (2, 4, 2), (1.0, 25)),
    "lobar": (0.32, (38, -15, 28), (8, 38, 18), (1.0, 80)),
    "cerebellum": (0.12, (22, -62, -34), (6, 6, 4), (1.0, 30)),
    "pons": (0.06, (2, -26, -32), (2, 2, 3), (0.8, 8)),
}
CISTERNS = (                    # subarachnoid blood, basal pattern: MNI mm, reach mm, weight
    ((0, -4, -18), 15, 1.5), ((30, 4, -16), 13, 1.1), ((-30, 4, -16), 13, 1.1), ((43, 4, 0), 15, 0.9),
    ((-43, 4, 0), 15, 0.9), ((0, 42, -2), 20, 0.8), ((0, -24, -32), 13, 0.9), ((0, -34, -8), 15, 0.8),
)
ANEURYSMS = {                   # MNI mm; mirrored at random
    "anterior communicating": (1, 10, -14), "middle cerebral": (33, 5, -15), "posterior communicating": (13, -7, -18),
    "basilar tip": (0, -15, -17),
}


def epidural(cavity: Cavity, severity: float, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Biconvex clot between bone and dura, 60-75 HU, 4 to 32 mm thick, stopped by the sutures."""
    side = int(rng.choice([-1, 1]))
    thick = between(5, 32, severity)
    reach = np.sqrt(thick * rng.uniform(58, 85))                # a lens bulges inwards more than the skull outwards
    where = [(rng.uniform(-22, 8), rng.uniform(-14, 18)), (rng.uniform(45, 68), rng.uniform(5, 35)),
             (rng.uniform(-40, -15), rng.uniform(25, 50))][rng.choice(3, p=[0.55, 0.2, 0.25])]
    mni = cavity.mni()
    x, y, _ = mni
    sutures = np.stack([y - 14, y + 98 - 0.48 * abs(x), side * x - 4])      # coronal, lambdoid, sagittal: signed mm
    off = angle_deg(mni, direction(*where, side)) + abs(blocks(cavity.depth_mm) - 2)
    off += 2 * np.maximum(0.5 * reach - abs(sutures).min(0), 0)
    at = np.unravel_index(off.argmin(), off.shape)
    held = (sutures * np.sign(sutures[(slice(None), *at)])[:, None, None, None]).min(0)
    squared = sum((4 * (grid - c)) ** 2 for grid, c in zip(np.indices(off.shape, np.float32), at))
    thickness = thick * np.clip(1 - squared / reach**2, 0, 1) * np.clip(held / 6, 0, 1) ** 0.5
    thickness *= 1 + 0.05 * np.clip(smooth_noise(off.shape, 5, rng), -2, 2)
    shape = shell(cavity, thickness)
    shift = move(cavity, displacement(cavity, growth(shape, 1.0)))
    hu = float(rng.uniform(60, 75))
    cover = soft(shape)
    paint(cavity, cover, hu, rng, 3.0)
    if thick > 12 and rng.random() < 0.3:                       # fresh, still bleeding: the swirl sign
        swirl = blob(cavity, tuple(int(4 * c + 2) for c in at), volume_ml(cover > 0.5) / 8, shape > 1.5, rng, 0.4)
        paint(cavity, soft(np.minimum(swirl, shape - 1.5), 4), 42.0, rng)
    mask = cover > 0.5
    return mask, {"hu": hu, "side": _side(side), "thickness_mm": thick, "shift_mm": shift}


def subdural_acute(cavity: Cavity, severity: float, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Crescent of 55-75 HU, 3 to 20 mm thick, over a hemisphere, or a thin one along falx or tentorium."""
    hu = float(rng.uniform(55, 75))
    side = int(rng.choice([-1, 1]))
    place = rng.choice(["convexity", "falx", "tentorium"], p=[0.74, 0.15, 0.11])
    if place != "convexity":
        return _along_dura(cavity, Tissue.FALX if place == "falx" else Tissue.TENTORIUM, severity, side, hu, rng)
    thick = between(3.5, 20, severity)
    shape = _crescent(cavity, thick, side, rng)
    shift = move(cavity, displacement(cavity, growth(shape, 1.0)))
    cover = soft(shape)
    paint(cavity, cover, hu, rng, 3.5)
    return cover > 0.5, {"hu": hu, "side": _side(side), "place": "convexity", "thickness_mm": thick, "shift_mm": shift}


def subdural_chronic(cavity: Cavity, severity: float, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Crescent of 15-30 HU, 5 to 28 mm thick; some with denser blood sunk to a level, some on both sides."""
    hu = float(rng.uniform(14, 29))
    side = int(rng.choice([-1, 1]))
    both = rng.random() < 0.2
    thick = between(5, 28, severity) * (0.7 if both else 1.0)
    shape = _crescent(cavity, thick, side, rng)
    if both:
        shape = np.maximum(shape, _crescent(cavity, thick * rng.uniform(0.5, 0.9), -side, rng))
    shift = move(cavity, displacement(cavity, growth(shape, 1.0)))
    cover = soft(shape)
    mask = cover > 0.5
    target = np.full(cavity.hu.shape, hu, np.float32)
    mixed = rng.random() < 0.35
    if mixed:
        row = np.arange(mask.shape[1], dtype=np.float32)
        level = np.quantile(np.nonzero(mask)[1], rng.uniform(0.45, 0.75))
        target += (np.clip((row - level) / 10 + 0.5, 0, 1) * rng.uniform(15, 30))[:, None]
    paint(cavity, cover, target, rng, 2.0)
    return mask, {"hu": hu, "side": "both" if both else _side(side), "mixed": bool(mixed), "thickness_mm": thick,
                  "shift_mm": shift}


def _crescent(cavity: Cavity, thick: float, side: int, rng: np.random.Generator) -> np.ndarray:
    """A layer over the convexity of one hemisphere that thins towards its ends and does not cross the midline."""
    mni = cavity.mni()
    off = angle_deg(mni, direction(rng.uniform(-30, 35), rng.uniform(12, 32), side))
    reach = rng.uniform(28, 46) + 24 * np.clip(thick / 12, 0, 1)
    profile = np.sqrt(np.clip(1 - (off / reach) ** 2, 0, 1))
    profile *= np.clip((side * -blocks(cavity.midline_mm) - 3) / 7, 0, 1) * np.clip(above_tentorium(mni) / 8, 0, 1)
    return shell(cavity, thick * profile * (1 + 0.14 * np.clip(smooth_noise(off.shape, 6, rng), -2, 2)))


def _along_dura(cavity: Cavity, dura: Tissue, severity: float, side: int, hu: float,
                rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Blood 2 to 8 mm thick on one side of the falx, or on top of one half of the tentorium."""
    thick = between(2.5, 8, severity)
    sheet = cavity.of(dura)
    left = cavity.midline_mm
    if dura == Tissue.FALX:
        y = cavity.mni_mm[1]
        start = rng.uniform(-70, 0)
        beside = np.abs(left) - 0.5
        level = np.where(sheet.any(axis=2)[..., None], 0, -99)
        extent = np.minimum(y - start, start + between(40, 90, severity) - y) / 20
        width = thick * np.sqrt(np.clip(extent, 0, 1))
        shape = np.where(width > 0.8, np.minimum(width - beside, -side * left + 0.5), -99) + level
    else:
        on_side = sheet & (-side * left > 6)
        above = np.where(on_side.any(axis=0), len(on_side) - 1 - on_side[::-1].argmax(axis=0), -99)
        height = np.arange(len(on_side))[:, None, None] - above
        uneven = voxels(1 + 0.3 * smooth_noise(blocks(sheet).shape, 4, rng))
        shape = np.where(above > 0, np.minimum(height + 1, thick * uneven - height), -99)
    shape = np.where(cavity.depth_mm > 0.5, shape, -99).astype(np.float32)
    shift = move(cavity, displacement(cavity, growth(shape, 0.8)))
    cover = soft(shape)
    paint(cavity, cover, hu, rng, 3.0)
    return cover > 0.5, {"hu": hu, "side": _side(side), "place": dura.name.lower(), "thickness_mm": thick,
                         "shift_mm": shift}


def subarachnoid(cavity: Cavity, severity: float, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Blood of 45-70 HU in the CSF: basal cisterns and fissures (aneurysm), or some sulci of the convexity (trauma)."""
    basal = rng.random() < 0.65
    mni = cavity.mni()
    if basal:
        tilt = rng.uniform(-0.5, 0.5)                           # more on one side
        spread = between(0.8, 1.5, severity)
        density = np.zeros(mni.shape[1:], np.float32)
        for spot, reach, weight in CISTERNS:
            weight *= rng.uniform(0.5, 1.1) * (1 + tilt * np.sign(spot[0])) * between(0.4, 1.1, severity)
            density += weight * near_point(mni, spot, reach * spread)
    else:
        side = int(rng.choice([-1, 1]))
        off = angle_deg(mni, direction(rng.uniform(-60, 60), rng.uniform(18, 60), side))
        density = 1.6 * np.exp(-((off / between(10, 36, severity)) ** 2)) * (blocks(cavity.depth_mm) < 26)
    density = density * (1 + 0.35 * smooth_noise(density.shape, 4, rng))
    swelling = 0.25 * np.clip(density, 0, 1) * blocks(cavity.of(Tissue.CSF))
    widened = 0.5 * severity * rng.random() * blocks(cavity.of(Tissue.VENTRICLE)) if basal else 0
    move(cavity, displacement(cavity, swelling + widened, steps=2, carried=True, ventricles_yield=0.0))
    hu = between(48, 68, np.clip(severity + rng.uniform(-0.2, 0.2), 0, 1))
    cover = fluid_share(cavity, Tissue.CSF) * voxels(np.clip((density - 0.25) / 0.5, 0, 1))
    paint(cavity, cover, hu, rng, 3.0)
    mask = cover > 0.4
    if basal and rng.random() < severity:
        mask |= pool(cavity, between(0.01, 0.08, severity), 55.0, rng)
    return mask, {"hu": hu, "pattern": "basal" if basal else "convexity"}


def intraparenchymal(cavity: Cavity, severity: float, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Uneven clot of 55-80 HU, 1 to 80 ml, with a rim of oedema; deep ones may break into the ventricles."""
    names = list(SITES)
    site = names[rng.choice(len(names), p=[SITES[name][0] for name in names])]
    _, middle, spread, (smallest, largest) = SITES[site]
    side = int(rng.choice([-1, 1]))
    volume = between(smallest, largest, severity)
    home = cavity.of(*(INFRATENTORIAL if site in ("cerebellum", "pons") else CEREBRUM))
    deep = cavity.depth_mm > (6 + 0.5 * np.cbrt(240 * volume) if site == "lobar" else 4)
    target = np.array(middle) + rng.uniform(-1, 1, 3) * spread
    centre = nearest(cavity, (side * target[0], *target[1:]), home & deep)
    shape = blob(cavity, centre, volume, cavity.depth_mm > 3, rng, 0.26 if site == "lobar" else 0.2, reach_mm=15)
    shift = move(cavity, displacement(cavity, growth(shape, 1.1), steps=2))
    hu = float(rng.uniform(55, 80))
    breaks = site in ("basal ganglia", "thalamus", "pons") and rng.random() < 0.15 + 0.6 * severity
    barred = cavity.of(Tissue.FALX, Tissue.TENTORIUM) | (cavity.depth_mm < 1.5)
    if not breaks:
        barred |= cavity.of(Tissue.VENTRICLE)
    if site in ("lobar", "basal ganglia", "cerebellum"):
        barred |= side * -cavity.midline_mm < (1 if site == "cerebellum" else 3)
    shape[barred] = -99

    rim = rng.uniform(2, 5) + 6 * severity * rng.random()
    tissue = np.where(cavity.of(Tissue.WHITE), 1.0, 0.45) * cavity.of(*BRAIN)
    halo = soft(shape + rim, 5.0) * tissue * ~barred
    oedema_hu = float(rng.uniform(18, 26))
    paint(cavity, halo, np.minimum(cavity.hu, oedema_hu), rng, 1.0)
    cover = soft(shape)
    paint(cavity, cover, hu + 2.0 * np.clip(shape, -2, 3), rng, 3.5)
    mask = cover > 0.5
    oedema = (halo > 0.3) & ~mask
    if breaks:
        mask |= pool(cavity, rng.uniform(0.05, 0.5) * min(1.0, volume / 20), hu - 4, rng)
    return mask, {"hu": hu, "side": _side(side), "place": site, "oedema_ml": volume_ml(oedema),
                  "oedema_hu": oedema_hu, "into_ventricles": bool(breaks), "shift_mm": shift}


def intraventricular(cavity: Cavity, severity: float, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Blood of 50-80 HU in the ventricles, from a little at the back of an occipital horn to a cast of them all."""
    widen = 0.9 * severity * rng.random()
    source = widen * blocks(cavity.of(Tissue.VENTRICLE))
    move(cavity, displacement(cavity, source, steps=3, carried=True, ventricles_yield=0.0))
    hu = float(rng.uniform(50, 80))
    filled = between(0.035, 0.8, severity)
    return pool(cavity, filled, hu, rng), {"hu": hu, "filled": filled}


def pool(cavity: Cavity, filled: float, hu: float, rng: np.random.Generator) -> np.ndarray:
    """Blood that sinks in the ventricles: the patient lies supine, so to the back, under a level. Returns its mask.

    filled: share of the ventricles' volume; the sides differ, larger bleeds reach the third and fourth.
    """
    share = fluid_share(cavity, Tissue.VENTRICLE)
    x, y, z = cavity.mni_mm
    fourth = (z < -10) & (y < -25)
    third = ~fourth & (np.abs(x) < 4) & (z < 8) & (y > -30) & (y < 6)
    lateral = ~fourth & ~third
    parts = [(lateral & (x > 0), filled * rng.uniform(0.4, 1.6)), (lateral & (x <= 0), filled * rng.uniform(0.4, 1.6))]
    if filled > 0.2 or rng.random() < 0.3:
        parts.append((fourth, filled * rng.uniform(0.8, 3)))
    if filled > 0.3:
        parts.append((third, filled * rng.uniform(0.8, 2)))
    row = np.arange(share.shape[1], dtype=np.float32)[:, None]
    cover = np.zeros_like(share)
    for part, amount in parts:
        here = share * part
        below = np.cumsum(here.sum(axis=(0, 2))[::-1])[::-1]    # volume behind each row
        if below[0] > 0:
            level = float(np.searchsorted(-below, -min(amount, 1.0) * below[0]))
            cover += here * np.clip((row - level) / 1.5 + 0.5, 0, 1)
            stained = here * np.clip(1 - (level - row) / 40, 0, 1) * (row < level) * np.clip(amount, 0, 0.6)
            paint(cavity, stained * 0.5, 26.0, rng, 0.0)
    paint(cavity, cover, hu, rng, 3.0)
    return cover > 0.4


def aneurysm(cavity: Cavity, severity: float, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Round sac of 6 to 20 mm and 45-65 HU at the circle of Willis; some have a chalky rim, some have bled a little.

    The mask is the sac and the blood around it.
    """
    place = list(ANEURYSMS)[rng.choice(len(ANEURYSMS))]
    side = int(rng.choice([-1, 1]))
    diameter = between(6, 20, severity)
    x, y, z = np.array(ANEURYSMS[place]) + rng.uniform(-2, 2, 3)
    roomy = cavity.of(Tissue.CSF, Tissue.VESSEL) & (cavity.depth_mm > diameter / 2 + 1)
    centre = nearest(cavity, (side * x, y, z), roomy)
    volume = np.pi / 6 * diameter**3 / 1000
    shape = blob(cavity, centre, volume, cavity.depth_mm > 0.5, rng, 0.04, 0.08)
    move(cavity, displacement(cavity, growth(shape, 1.5), steps=2))
    hu = float(rng.uniform(45, 65))
    cover = soft(shape)
    paint(cavity, cover, hu, rng, 1.0)
    calcified = rng.random() < 0.35
    if calcified:
        arc = np.clip(1.5 * smooth_noise(shape.shape, 9, rng), 0, 1)
        paint(cavity, np.clip(1.4 - abs(shape - 0.6), 0, 1) * arc, float(rng.uniform(130, 300)), rng, 0.0)
    mask = cover > 0.5
    bled = rng.random() < 0.35
    if bled:
        where = near_point(cavity.mni(), cavity.mni_mm[(slice(None), *centre)], between(10, 18, severity))
        where *= 1 + 0.4 * smooth_noise(where.shape, 3, rng)
        blood = fluid_share(cavity, Tissue.CSF) * voxels(np.clip(2 * where - 0.5, 0, 1)) * ~mask
        paint(cavity, blood, float(rng.uniform(48, 62)), rng)
        mask |= blood > 0.4
    return mask, {"hu": hu, "place": place, "side": _side(side), "diameter_mm": diameter, "calcified": bool(calcified),
                  "bled": bool(bled)}


def _side(side: int) -> str:
    """Name of a sign of MNI x."""
    return "right" if side > 0 else "left"
