"""A healthy adult head as CT sees it, before the scanner: tissues and HU on a 1 mm grid, another one each time.

The brain is the MNI ICBM152 template (`atlas.py`) warped by an affine, smooth random fields and, with age, by
wider ventricles and sulci. Scalp, skull, orbits and sinuses are geometry around it (`skull.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from demos.atlas import BRAIN_BOX, HEAD_BOX, load_atlas
from demos.canvas import (
    CENTRE,
    MIDDLE,
    SHAPE,
    SIGNS,
    STEP,
    Canvas,
    Tissue,
    capsule,
    cover,
    ellipsoid,
    mirrored,
    refine,
    resize,
    sample,
    smooth_noise,
)
from demos.skull import (
    paint_face,
    paint_hollows,
    paint_scalp,
    paint_skull,
    skin_distance,
    skull_distance,
    temporal_muscle,
)

COARSE = tuple((n - 1) // STEP + 1 for n in SHAPE)          # warps
MEDIUM = tuple((n - 1) // (STEP // 2) + 1 for n in SHAPE)   # surfaces

__all__ = ["Head", "Tissue", "build_head"]


@dataclass(frozen=True)
class Head:
    tissue: np.ndarray       # uint8 [Z, Y, X], the dominant Tissue
    hu: np.ndarray           # float32 [Z, Y, X], noise-free, partial volume between tissues
    depth_mm: np.ndarray     # float32 [Z, Y, X], distance to the inner table, positive inside the cranial cavity
    midline_mm: np.ndarray   # float32 [Z, Y, X], signed distance to the midsagittal surface, positive to the left
    mni_mm: np.ndarray       # float16 [3, Z, Y, X], MNI x (right), y (anterior), z (superior)
    facts: dict              # age, scales, thicknesses, volumes: plain numbers


def build_head(rng: np.random.Generator) -> Head:
    """Another healthy head from `rng`: 200 mm high, from the upper jaw to above the vertex, air around it."""
    facts = _draw_facts(rng)
    scales = tuple(facts[f"scale_{axis}"] for axis in "zyx")
    coarse = _coordinates(scales, rng)
    surfaces = _surfaces(resize(coarse, MEDIUM), facts, rng)
    canvas = Canvas(resize(coarse, SHAPE), scales)
    for paint in (paint_scalp, paint_face, paint_skull, paint_hollows):
        paint(canvas, surfaces, facts, rng)
    _paint_brain(canvas, surfaces["cavity"], _brain_coordinates(coarse, facts, rng), facts, rng)
    x = canvas.mni[2]
    return Head(canvas.tissue.numpy(), canvas.hu.numpy(), surfaces["cavity"].numpy(), (x * -scales[2]).numpy(),
                canvas.mni.flip(0).to(torch.float16).numpy(), _measured(facts, canvas, surfaces))


def _draw_facts(rng: np.random.Generator) -> dict:
    age = float(rng.uniform(20, 90))
    atrophy = float(np.clip((age - 35) / 55 + rng.normal(0, 0.15), 0, 1.15))
    shape = rng.normal(0, 0.028, 3).clip(-0.06, 0.06)
    z, y, x = (0.893 + 0.03 * float(np.clip(rng.normal(), -2, 2))) * (1 + shape - shape.mean())
    rarefaction = 7.0 * max(0.0, atrophy - 0.4) * float(rng.uniform(0, 1.5))    # periventricular, with age
    grey = 39.0 + float(rng.normal(0, 0.7)) - 0.8 * atrophy
    return {"age": age, "atrophy": atrophy, "scale_z": float(z), "scale_y": float(y), "scale_x": float(x),
            "grey_hu": grey, "white_hu": grey - float(rng.uniform(8.2, 9.6)) + 2.0 * atrophy,
            "rarefaction_hu": rarefaction, "csf_hu": float(rng.uniform(5.0, 9.0)),
            "skull_mm": float(rng.uniform(5.2, 8.0)), "bone_hu": float(rng.uniform(1150, 1550)),
            "scalp_mm": float(rng.uniform(4.0, 7.0)), "fat_hu": float(rng.uniform(-100, -85))}


def _coordinates(scales: tuple, rng: np.random.Generator) -> torch.Tensor:
    """MNI z, y, x of each voxel on the coarse grid, [3, z, y, x]."""
    axes = [torch.linspace(0, n - 1, c) for n, c in zip(SHAPE, COARSE)]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    for i in range(3):
        grid[i] = MIDDLE[i] + SIGNS[i] * (grid[i] - CENTRE[i]) / scales[i]
    return grid + 2.0 * smooth_noise(rng, 60.0, COARSE, 3)


def _brain_coordinates(coarse: torch.Tensor, facts: dict, rng: np.random.Generator) -> torch.Tensor:
    """Where the brain of each coarse voxel comes from: folds displaced, shrunken and ventricles spread by age."""
    spread = sample(load_atlas().spread, BRAIN_BOX, coarse)
    side = 1 + 0.15 * float(rng.normal()) * torch.tanh(coarse[2] / 8)
    width = -1.0 + 5.0 * facts["atrophy"] + float(rng.normal(0, 0.5))
    middle = torch.tensor((5.0, -18.0, 0.0)).view(3, 1, 1, 1)
    shrunk = middle + (coarse - middle) * (1 + 0.02 * facts["atrophy"])
    return shrunk - width * side * spread + 1.3 * smooth_noise(rng, 22.0, COARSE, 3)


def _surfaces(mni: torch.Tensor, facts: dict, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Signed distances in mm on the full grid, positive inside: cavity, skull, skin."""
    atlas = load_atlas()
    scale = float(np.mean([facts[f"scale_{axis}"] for axis in "zyx"]))
    cavity, vault = sample(np.stack([atlas.cavity, atlas.vault]), HEAD_BOX, mni) * scale
    skull = skull_distance(mni, vault, facts, smooth_noise(rng, 30.0, MEDIUM)[0])
    skull = torch.maximum(skull, cavity + 2.2)
    skin = skin_distance(mni, skull, facts, smooth_noise(rng, 30.0, MEDIUM)[0])
    return dict(zip(("cavity", "skull", "skin", "temporal"),
                    resize(torch.stack([cavity, skull, skin, temporal_muscle(mni, skull)]), SHAPE)))


def _measured(facts: dict, canvas: Canvas, surfaces: dict) -> dict:
    counts = torch.bincount(canvas.tissue.flatten(), minlength=len(Tissue))
    cavity = float((surfaces["cavity"] > 0).sum()) / 1000
    return facts | {"cavity_ml": cavity, "ventricle_ml": float(counts[Tissue.VENTRICLE]) / 1000,
                    "csf_ml": float(counts[Tissue.CSF]) / 1000}


def _paint_brain(canvas: Canvas, cavity: torch.Tensor, coarse: torch.Tensor, facts: dict,
                 rng: np.random.Generator) -> None:
    """CSF up to the inner table, then grey and white matter with soft borders, then what lies between them."""
    at = tuple(slice(a.start // STEP * STEP, min((a.stop - 1) // STEP * STEP + STEP, n - 1) + 1)
               for a, n in zip(canvas.around((-80, -108, -76), (84, 76, 76)), SHAPE))
    part = canvas.part(at, refine(coarse, at))
    cavity = cavity[at]
    atlas, atrophy = load_atlas(), facts["atrophy"]
    brain, white, ventricle = sample(np.stack([atlas.brain, atlas.white, atlas.ventricle]), BRAIN_BOX, part.mni)
    _fold(brain, white, refine(_fold_distance(coarse, rng), at)[0], cavity, part.mni, atrophy)
    part.paint(cover(cavity), facts["csf_hu"], Tissue.CSF)
    part.tissue.masked_fill_((cavity > 0) & (ventricle > 0), int(Tissue.VENTRICLE))
    tissue = ((brain - 0.38 - 0.4 * atrophy) / 0.4 + 0.5).clamp_(0, 1) * cover(cavity - 0.8 - 1.2 * atrophy)
    canal = capsule(part.mni, (-60, -43, 0), (-120, -48, 0), (12.5, 10.5))
    part.paint(cover(torch.minimum(canal, -cavity)), facts["csf_hu"], Tissue.CSF)
    tissue = torch.maximum(tissue, cover(torch.minimum(canal - 5, -62.0 - part.mni[0])))    # the cord
    share = _white_share(white, part.mni)
    texture = refine(0.8 * smooth_noise(rng, 9.0, COARSE) + 0.6 * smooth_noise(rng, 30.0, COARSE), at)[0]
    near = refine(sample(atlas.spread, BRAIN_BOX, coarse).norm(dim=0, keepdim=True), at)[0]     # 1 at the ventricles
    rarefied = facts["rarefaction_hu"] * share * near.pow_(4)
    hu = facts["grey_hu"] + texture + (facts["white_hu"] - facts["grey_hu"]) * share - rarefied
    part.paint(tissue, hu, Tissue.GREY)
    _label_brain(part, cavity, tissue > 0.5, share)
    _paint_dura(part, cavity, rng)
    _paint_calcifications(part, facts, rng)


def _fold_distance(coarse: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """About the distance in mm to surfaces that run radially into the brain: zeros of noise constant along rays."""
    ray = torch.stack([(coarse[i] - c) / r for i, (c, r) in enumerate(((4, 76), (-16, 92), (0, 72)))])
    ray = ray / ray.norm(dim=0).clamp_min(0.1)
    noise = sample(rng.standard_normal((1, 15, 15, 15), dtype=np.float32), ((-1, 1),) * 3, ray)
    slope = torch.stack(torch.gradient(noise[0], spacing=float(STEP))).norm(dim=0)
    return noise.abs() / slope.clamp_min(0.02) + 60 * (0.08 - slope).clamp_min(0)    # no pools where noise is flat


def _fold(brain: torch.Tensor, white: torch.Tensor, distance: torch.Tensor, cavity: torch.Tensor, mni: torch.Tensor,
          atrophy: float) -> None:
    """Cut this head's own sulci, lined with cortex; those of the atlas are the same for all."""
    near = torch.sigmoid((15 - cavity) / 2.5) * torch.sigmoid((mni[0] + 12) / 3)
    brain -= (0.3 + 0.6 * atrophy) * near * torch.exp(-(distance / 1.1).square())
    white -= 0.9 * near * torch.exp(-(distance / 3.5).square())


def _white_share(white: torch.Tensor, mni: torch.Tensor) -> torch.Tensor:
    """White matter's share with crisp borders; pallidum and thalamus, mixed in the atlas, made greyer."""
    share = ((white - 0.5) / 0.5 + 0.5).clamp_(0, 1)
    folded = torch.stack([mni[0], mni[1], mni[2].abs()])
    for centre, radii in (((-1, -4, 20), (8, 10, 6)), ((8, -18, 12), (10, 13, 9))):
        share = share * (1 - 0.55 * torch.sigmoid(ellipsoid(folded, centre, radii)))
    return share


def _tentorium(mni: torch.Tensor | tuple) -> torch.Tensor:
    """Height above the tentorium in mm: a tent whose ridge falls from the splenium to the inner occiput."""
    z, y, x = mni
    side = x.abs()
    return z - (8 - 0.4 * (y + 46).abs() - 0.62 * side + 0.0035 * side.square())


def _label_brain(part: Canvas, cavity: torch.Tensor, tissue: torch.Tensor, share: torch.Tensor) -> None:
    z, y, x = part.mni
    part.tissue.masked_fill_(tissue & (share > 0.5), int(Tissue.WHITE))
    deep = ellipsoid(torch.stack([z, y, x.abs()]), (5, -4, 19), (17, 28, 15)) > 0
    part.tissue.masked_fill_(tissue & deep & (share <= 0.5), int(Tissue.DEEP_GREY))
    below = tissue & (_tentorium(part.mni) < 0) & (y < -8)
    stem = torch.maximum(capsule(part.mni, (-8, -20, 0), (-34, -26, 0), (16, 19)),
                         capsule(part.mni, (-34, -28, 0), (-120, -48, 0), (19, 6))) > 0
    part.tissue.masked_fill_(below & (y < -30) & (x.abs() < 62), int(Tissue.CEREBELLUM))
    part.tissue.masked_fill_(tissue & ((stem & (z < -8)) | (cavity < 0)), int(Tissue.BRAINSTEM))


def _paint_dura(part: Canvas, cavity: torch.Tensor, rng: np.random.Generator) -> None:
    """Falx, tentorium, venous sinuses and the arteries of the base."""
    blood = float(rng.uniform(46, 56))
    at = part.around((-30, -110, -1), (90, 80, 1))
    z, y, x = part.mni[(slice(None), *at)]
    depth, above = cavity[at], _tentorium((z, y, x))
    arch = ((z - 6) / 42).square() + ((y - 4) / 53).square()       # the falx spares the corpus callosum
    inside = torch.minimum(torch.minimum(depth, 40 * (arch - 1)), torch.minimum(above + 1, z + 24))
    part.paint(cover(torch.minimum(0.9 - x.abs(), inside)), float(rng.uniform(49, 56)), Tissue.FALX, at)
    width = 2.2 + 2.8 * torch.sigmoid((10 - y) / 20)
    groove = torch.minimum(depth + 0.5, above + 4 + (z + 12).clamp(max=0))
    part.paint(cover(torch.minimum(width - x.abs() - 0.7 * depth, groove)), blood, Tissue.VESSEL, at)

    at = part.around((-48, -104, -66), (10, -12, 66))
    z, y, x = part.mni[(slice(None), *at)]
    notch = ((y + 20) / 30).square() + (x / 25).square()            # the midbrain passes here
    tent = torch.minimum(torch.minimum(0.8 - _tentorium((z, y, x)).abs(), cavity[at]),
                         torch.minimum(25 * (notch - 1), -12 - y))
    part.paint(cover(tent), float(rng.uniform(45, 51)), Tissue.TENTORIUM, at)

    part.rod((6, -48, 0), (-13, -100, 0), (1.4, 2.2), blood, Tissue.VESSEL, cavity)
    part.rod((-12, -105, 0), (-24, -105, 0), (7, 6), blood, Tissue.VESSEL, cavity)     # torcula
    for side, size in zip((-1, 1), rng.uniform(2.4, 4.8, 2)):
        for start, end in TRANSVERSE_SINUS:
            part.rod(mirrored(start, side), mirrored(end, side), (size, size), blood, Tissue.VESSEL, cavity)
        for start, end, radius in ARTERIES:
            part.rod(mirrored(start, side), mirrored(end, side), (radius, radius), blood - 6, Tissue.VESSEL)


TRANSVERSE_SINUS = (   # the right side, mirrored
    ((-14, -101, 3), (-24, -84, 48)), ((-24, -84, 48), (-34, -54, 58)), ((-34, -54, 58), (-58, -42, 44)))
ARTERIES = (   # start, end, radius: the right side, mirrored
    ((-52, -24, 0.5), (-34, -11, 0.5), 1.5), ((-34, -11, 0.5), (-18, -11, 0), 1.5),    # basilar
    ((-24, 6, 11), (-16, 4, 13), 1.8), ((-16, 4, 13), (-14, 6, 34), 1.3),              # carotid, middle cerebral
    ((-16, 4, 13), (-8, 16, 2), 1.0), ((-18, -11, 0), (-16, -18, 16), 1.1),            # anterior, posterior cerebral
    ((-17, 1, 0), (-30, 1, 0), 1.2))                                                   # pituitary stalk


def _paint_calcifications(part: Canvas, facts: dict, rng: np.random.Generator) -> None:
    """Choroid plexus, pineal gland and pallidum, commoner and denser with age; soft where not calcified."""
    older = min(1.0, (facts["age"] - 15) / 50)
    pineal = rng.random() < 0.3 + 0.45 * older
    part.ball((1, -31, 0), tuple(rng.uniform(1.6, 3.2, 3)), rng.uniform(90, 280) if pineal else 38.0, Tissue.PINEAL)
    plexus = rng.random() < 0.15 + 0.6 * older
    pallidum = rng.random() < 0.15 * older
    for side in (-1, 1):
        part.ball((9, -39, side * 25), (5, 4, 3), 34.0, Tissue.CHOROID)
        if plexus:
            part.ball((8 + rng.uniform(-2, 2), -40, side * 25), tuple(rng.uniform(1.4, 3.2, 3)), rng.uniform(80, 300),
                      Tissue.CHOROID)
        if pallidum:
            part.ball((0, -3, side * 19), tuple(rng.uniform(1.5, 3.0, 3)), rng.uniform(48, 85), Tissue.DEEP_GREY)
    facts.update(pineal_calcified=pineal, plexus_calcified=plexus, pallidum_calcified=pallidum)
