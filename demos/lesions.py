"""Emergencies of the head in a healthy one, each with its truth: `add_emergency`.

Blood is in `bleeds.py`; here are infarcts, hydrocephalus, tumours and hypoxic injury. What the truth mask marks is
what an annotator would outline as abnormal:

    haemorrhages              the blood, without the oedema around it
    infarct_early, _late      the part of the territory whose HU changed, with its narrow sulci
    hydrocephalus             the enlarged ventricles
    tumour                    the mass and its oedema
    hypoxic                   the swollen supratentorial grey matter, cortical and deep
    aneurysm                  the sac, and blood around it
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from demos import bleeds
from demos.anatomy import Head, Tissue
from demos.shapes import (
    BRAIN,
    CEREBRUM,
    above_tentorium,
    angle_deg,
    between,
    blob,
    bounds,
    direction,
    fluid_share,
    growth,
    near_point,
    nearest,
    paint,
    smooth_noise,
    soft,
    volume_ml,
)
from demos.warps import Cavity, blocks, displacement, enter, leave, move, voxels

TERRITORIES = {"MCA": 0.6, "ACA": 0.1, "PCA": 0.17, "cerebellar": 0.13}     # and how often each is struck
INSULA = (36.0, 2.0, 2.0)       # MNI mm: the middle of the deep branches' bed
M1 = ((10, 0, -17), (20, 3, -16), (30, 4, -16), (38, 2, -12))   # MNI mm, the stem of the middle cerebral artery


def add_emergency(head: Head, kind: str, rng: np.random.Generator,
                  severity: float | None = None) -> tuple[Head, np.ndarray, dict]:
    """A head with an emergency of a kind of KINDS: (new head, truth mask bool [Z, Y, X], facts).

    head is not changed. severity runs from 0, what a resident misses, to 1, what nobody misses; drawn evenly where
    None. facts: kind, severity, volume_ml of the mask, hu of the lesion (nominal), side, shift_mm (midline shift) and
    what else the kind has. Raises ValueError for an unknown kind or a severity outside 0..1.
    """
    if kind not in PAINTERS:
        raise ValueError(f"add_emergency: kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if severity is None:
        severity = float(rng.uniform())
    if not 0 <= severity <= 1:
        raise ValueError(f"add_emergency: severity must lie in 0..1; got {severity}")
    cavity = enter(head)
    mask, facts = PAINTERS[kind](cavity, severity, rng)
    truth = np.zeros(head.tissue.shape, bool)
    truth[cavity.box] = mask & (cavity.depth_mm > 0)
    return leave(head, cavity), truth, {"kind": kind, "severity": severity, "volume_ml": volume_ml(truth), **facts}


# ---- infarcts


def territory(cavity: Cavity, severity: float, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """The bed of an artery or of one of its branches, as a shape on blocks [z, y, x] in mm, and where it lies."""
    name = str(rng.choice(list(TERRITORIES), p=list(TERRITORIES.values())))
    side = int(rng.choice([-1, 1]))
    mni = cavity.mni()
    x, y, z = mni[0] * side, mni[1], mni[2]
    above = above_tentorium(mni)
    wander = np.clip(3.5 * smooth_noise(x.shape, 3, rng) + 4.0 * smooth_noise(x.shape, 7, rng), -11, 11)
    aca = np.minimum(np.minimum(15 + 0.2 * np.maximum(z, 0) - x, y + 48), np.maximum(z - 4, y - 24))
    pca = np.minimum(np.maximum(-58 - y + 0.3 * (42 - x), np.minimum(-z - 4, np.minimum(-14 - y, 36 - x))), 34 - z)
    if name == "MCA":
        shape = np.minimum(np.minimum(x - 15, -2 - aca), np.minimum(-2 - pca, z + 34))
        shape = np.minimum(shape, _branch(mni, side, severity, rng))
    elif name == "ACA":
        middle = (rng.uniform(-5, 40), rng.uniform(10, 50))
        shape = np.minimum(aca, between(14, 70, severity) - np.hypot(y - middle[0], z - middle[1]))
    elif name == "PCA":
        shape = np.minimum(pca, between(24, 90, severity) + (-75 - y))
    else:
        centre = np.array([rng.uniform(18, 32), rng.uniform(-72, -52), rng.choice([-24, -42])])
        shape = between(9, 32, severity) - np.sqrt((x - centre[0])**2 + (y - centre[1])**2 + (1.2 * (z - centre[2]))**2)
        shape = np.minimum(shape, -1 - above)
    shape = np.minimum(shape + wander, 2 + x)
    if name != "cerebellar":
        shape = np.minimum(shape, above)
    return shape, {"place": name, "side": "right" if side > 0 else "left"}


def _branch(mni: np.ndarray, side: int, severity: float, rng: np.random.Generator) -> np.ndarray:
    """The share of the MCA's bed that is struck: deep branches, a wedge to the cortex, or all of it."""
    if severity > 0.8:
        return np.full(mni.shape[1:], 40.0)
    if rng.random() < 0.25:
        x, y, z = mni - (np.array(INSULA) * (side, 1, 1))[:, None, None, None]
        return between(10, 26, severity) - np.sqrt(x**2 + (0.7 * y) ** 2 + z**2)
    off = angle_deg(mni, direction(rng.uniform(-45, 40), rng.uniform(-5, 45), side))
    return (between(14, 48, severity) - off) * 0.8


def _brain_of(cavity: Cavity, shape: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a territory has brain, 0..1 [Z, Y, X], and its outline with the narrow sulci in it, bool [Z, Y, X]."""
    brain = cavity.of(*BRAIN)
    full = voxels(shape)
    return soft(full, 5.0) * brain, (full > 0) & (brain | (voxels(blocks(brain)) > 0.6)) & (cavity.depth_mm > 1)


def infarct_early(cavity: Cavity, severity: float, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Hours old: grey matter of a territory loses 3-8 HU and its contrast to white, sulci narrow a little."""
    shape, facts = territory(cavity, np.clip(severity + rng.uniform(-0.15, 0.25), 0, 1), rng)
    loss = between(3.0, 8.0, severity)
    shift = move(cavity, displacement(cavity, between(0.01, 0.07, severity) * soft(shape, 8), steps=2, carried=True))
    cover, mask = _brain_of(cavity, shape)
    grey = np.clip((cavity.hu - 26) / 9, 0.35, 1) * np.clip((cavity.hu - 15) / 8, 0, 1)
    paint(cavity, cover, cavity.hu - loss * grey, rng, 0.0)
    dense = facts["place"] == "MCA" and rng.random() < 0.35
    if dense:
        mask |= _dense_artery(cavity, 1 if facts["side"] == "right" else -1, rng)
    return mask, {**facts, "hu": -loss, "dense_artery": bool(dense), "shift_mm": shift}


def _dense_artery(cavity: Cavity, side: int, rng: np.random.Generator) -> np.ndarray:
    """A clot in the stem of the middle cerebral artery: a tube of 60-80 HU; returns its mask."""
    points = np.array(M1, float) + rng.uniform(-1.5, 1.5, (len(M1), 3))
    along = np.linspace(0, len(M1) - 1, 40)
    path = np.stack([np.interp(along, range(len(M1)), points[:, i]) for i in range(3)], 1) * (side, 1, 1)
    voxel = np.array([nearest(cavity, tuple(path[i])) for i in (0, 13, 26, 39)], float)     # steps of 2 voxels
    fine = np.stack([np.interp(np.linspace(0, 3, 90), range(4), voxel[:, i]) for i in range(3)], 1)
    line = np.ones(cavity.hu.shape, bool)
    line[tuple(np.rint(fine).astype(int).T)] = False
    low, high = np.maximum(fine.min(0).astype(int) - 6, 0), fine.max(0).astype(int) + 7
    box = tuple(slice(a, b) for a, b in zip(low, high))
    shape = np.full(cavity.hu.shape, -99, np.float32)
    shape[box] = rng.uniform(1.6, 2.2) - ndimage.distance_transform_edt(line[box])
    shape[cavity.depth_mm < 1] = -99
    cover = soft(shape)
    paint(cavity, cover, float(rng.uniform(60, 80)), rng, 0.0)
    return cover > 0.5


def infarct_late(cavity: Cavity, severity: float, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Days old: a wedge of 14-22 HU to the cortex that swells; or months old: 9-14 HU, shrunken (ex vacuo)."""
    shape, facts = territory(cavity, severity, rng)
    old = rng.random() < 0.35
    hu = float(rng.uniform(9, 14) if old else rng.uniform(14, 22))
    swelling = -rng.uniform(0.15, 0.35) if old else between(0.04, 0.2, severity)
    brain = blocks(cavity.of(*BRAIN))
    shift = move(cavity, displacement(cavity, swelling * soft(shape, 6) * brain, steps=2, carried=True))
    cover, mask = _brain_of(cavity, shape)
    sulci = np.clip((cavity.hu - 14) / 10, 0, 1)
    target = hu + 0.2 * np.clip(cavity.hu - 32, -6, 8)          # a trace of the old grey-white contrast stays
    paint(cavity, cover, np.minimum(cavity.hu, sulci * target + (1 - sulci) * cavity.hu), rng, 1.2)
    return mask, {**facts, "hu": hu, "old": bool(old), "shift_mm": shift}


# ---- ventricles, masses, swelling


def hydrocephalus(cavity: Cavity, severity: float, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Ventricles 1.6 to 6 times as large, sulci pressed shut, CSF pressed into the white matter around the horns."""
    factor = between(1.6, 6.0, severity)
    fluid = cavity.of(Tissue.VENTRICLE, Tissue.CHOROID)
    before = volume_ml(fluid)
    obstructive = rng.random() < 0.5
    source = ndimage.gaussian_filter(blocks(fluid), 0.6) * 1.95 * np.log(factor)    # blocks hold some brain as well
    if obstructive:                                             # the aqueduct is shut: the fourth stays as it is
        mni = cavity.mni()
        source[(mni[2] < -9) & (mni[1] < -22)] = 0
    move(cavity, displacement(cavity, source, steps=6, carried=True, ventricles_yield=0.0))
    _shrink_plexus(cavity, round(2.5 * (factor ** (1 / 3) - 1)))
    mask = cavity.of(Tissue.VENTRICLE, Tissue.CHOROID)
    seep = rng.random() * severity
    if seep > 0.1:
        nearby = ndimage.gaussian_filter(blocks(mask), 1.3)
        nearby *= np.clip(1 + 0.4 * smooth_noise(nearby.shape, 4, rng), 0.3, 1.6)
        cover = voxels(np.clip(2.2 * nearby, 0, 1)) * cavity.of(Tissue.WHITE) * seep
        paint(cavity, cover, np.minimum(cavity.hu, 17.0), rng, 0.0)
    return mask, {"hu": 8.0, "obstructive": bool(obstructive), "ventricles_before_ml": before, "seep": seep}


def _shrink_plexus(cavity: Cavity, layers: int) -> None:
    """Takes layers of voxels off the calcified plexus, which the ventricles' growth has stretched."""
    plexus = cavity.of(Tissue.CHOROID)
    box = bounds(plexus)
    lost = plexus[box]
    if layers and lost.size:
        lost = lost & ~ndimage.binary_erosion(lost, iterations=layers)
        cavity.tissue[box][lost] = Tissue.VENTRICLE
        fluid = cavity.of(Tissue.VENTRICLE)
        near = fluid[box] & ndimage.binary_dilation(lost)
        cavity.hu[box][near] = np.minimum(cavity.hu[box][near], float(np.median(cavity.hu[fluid])))


def tumour(cavity: Cavity, severity: float, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """A glioma or metastasis (uneven, often dead inside) or a meningioma (even, on the dura), with oedema in the white
    matter only, which gives it fingers."""
    sort = str(rng.choice(["glioma", "metastasis", "meningioma"], p=[0.4, 0.35, 0.25]))
    volume = between(1.0, 70 if sort == "glioma" else 40, severity)
    radius = np.cbrt(240 * volume)
    side = int(rng.choice([-1, 1]))
    home = cavity.of(*CEREBRUM) & (side * -cavity.midline_mm > min(8, 0.5 * radius) + 2)
    depth = cavity.depth_mm
    home &= abs(depth - 0.65 * radius) < 3 if sort == "meningioma" else (depth > 0.75 * radius + 5) & (depth < 45)
    spot = (side * rng.uniform(8, 50), rng.uniform(-85, 55), rng.uniform(-5, 60))
    rough = {"glioma": 0.25, "metastasis": 0.1, "meningioma": 0.07}[sort]
    shape = blob(cavity, nearest(cavity, spot, home), volume, depth > 1, rng, rough, 0.15, reach_mm=45)
    reach = rng.uniform(2.5, 6) + (28 if sort != "meningioma" else 12) * severity * rng.uniform(0.3, 1)
    push = growth(shape, 0.8) + 0.12 * blocks(soft(shape + reach, 6) * cavity.of(Tissue.WHITE))
    shift = move(cavity, displacement(cavity, push, steps=3))
    barred = cavity.of(Tissue.FALX, Tissue.TENTORIUM) | (depth < 1) | (side * -cavity.midline_mm < 1)
    if sort == "meningioma":
        barred &= depth < 1
    shape[barred] = -99

    fingers = shape + reach * (1 + 0.35 * voxels(smooth_noise(blocks(shape).shape, 4, rng)))
    white = cavity.of(Tissue.WHITE)
    white[1:-1] &= ndimage.uniform_filter(white.astype(np.float32), 5)[1:-1] > 0.35     # spares the thin U-fibres
    halo = soft(fingers, 5.0) * white * ~barred
    oedema_hu = float(rng.uniform(15, 23))
    paint(cavity, halo, np.minimum(cavity.hu, oedema_hu), rng, 0.8)

    hu = float(rng.uniform(42, 56) if sort == "meningioma" else rng.uniform(34, 44))
    target = np.full(shape.shape, hu, np.float32)
    dead = sort != "meningioma" and (volume > 6 or rng.random() < 0.3)
    if dead:
        rim = rng.uniform(3.0, 6.5) * (1 + 0.4 * np.clip(voxels(smooth_noise(blocks(shape).shape, 3, rng)), -1.5, 1.5))
        target -= soft(shape - rim, 2.5) * (hu - rng.uniform(14, 22))
    cover = soft(shape)
    paint(cavity, cover, target, rng, 2.0)
    calcified = sort == "meningioma" and rng.random() < 0.3
    if calcified:
        specks = np.clip(smooth_noise(shape.shape, 3, rng) - 1.7, 0, 1) * soft(shape - 3, 3)
        paint(cavity, specks, float(rng.uniform(120, 260)), rng, 0.0)
    mask = (cover > 0.5) | (halo > 0.5)
    return mask, {"hu": hu, "sort": sort, "side": "right" if side > 0 else "left", "dead_inside": bool(dead),
                  "calcified": bool(calcified), "oedema_ml": volume_ml(halo > 0.5), "oedema_hu": oedema_hu,
                  "mass_ml": volume_ml(cover > 0.5), "shift_mm": shift}


def hypoxic(cavity: Cavity, severity: float, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """After cardiac arrest: grey matter darkens to white, the brain swells, CSF spaces close, dura looks bright."""
    lost = between(0.35, 1.0, severity)
    brain = cavity.of(*CEREBRUM)
    move(cavity, displacement(cavity, between(0.03, 0.16, severity) * blocks(brain), steps=3, carried=True))
    brain = cavity.of(*CEREBRUM)
    grey = cavity.of(Tissue.GREY, Tissue.DEEP_GREY)
    white_hu = float(np.median(cavity.hu[cavity.of(Tissue.WHITE)]))
    level = white_hu - 2.5 * severity
    uneven = voxels(np.clip(1 + 0.15 * smooth_noise(blocks(grey).shape, 5, rng), 0.6, 1.3))
    target = cavity.hu - np.clip(cavity.hu - level, 0, 14) * np.clip(lost * uneven, 0, 1)
    paint(cavity, brain.astype(np.float32), target, rng, 0.0)
    bright = severity > 0.35 and rng.random() < 0.5
    if bright:                                                  # veins are full and the CSF around them is gone
        dura = cavity.of(Tissue.FALX, Tissue.TENTORIUM).astype(np.float32)
        paint(cavity, dura, np.maximum(cavity.hu, 55.0), rng, 1.0)
        basal = voxels(near_point(cavity.mni(), (0, -10, -16), 20))
        paint(cavity, fluid_share(cavity, Tissue.CSF) * basal, 34.0, rng, 0.0)
    return grey, {"hu": level, "contrast_lost": lost, "bright_dura": bool(bright)}


PAINTERS = {
    "epidural": bleeds.epidural,
    "subdural_acute": bleeds.subdural_acute,
    "subdural_chronic": bleeds.subdural_chronic,
    "subarachnoid": bleeds.subarachnoid,
    "intraparenchymal": bleeds.intraparenchymal,
    "intraventricular": bleeds.intraventricular,
    "infarct_early": infarct_early,
    "infarct_late": infarct_late,
    "hydrocephalus": hydrocephalus,
    "tumour": tumour,
    "hypoxic": hypoxic,
    "aneurysm": bleeds.aneurysm,
}
KINDS = tuple(PAINTERS)
