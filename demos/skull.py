"""Everything of a phantom head outside the brain: scalp, muscles, skull, face, orbits, sinuses.

The skull is a shell around the intracranial space with two tables and diploe. Its base, the face and what lies in
them are balls and rods at their places in MNI coordinates, (z, y, x) in mm, warped with the head.
"""

from __future__ import annotations

import numpy as np
import torch

from demos.canvas import Canvas, Point, Tissue, capsule, cover, ellipsoid, mirrored, smooth_noise

SIDES = (-1, 1)
MUSCLE_HU, SKIN_HU, SPONGY_HU = 56.0, 60.0, 450.0


def skull_distance(mni: torch.Tensor, vault: torch.Tensor, facts: dict, noise: torch.Tensor) -> torch.Tensor:
    """The outer table: thick behind, thin at the temples and the base."""
    z, y, x = mni
    back = torch.sigmoid((-y - 70) / 10)
    temple = torch.sigmoid((x.abs() - 52) / 4) * torch.sigmoid((14 - z) / 8) * torch.sigmoid((y + 45) / 6)
    base = torch.sigmoid((-z - 20) / 4) * torch.sigmoid((y + 60) / 10)
    bump = torch.exp(-((z + 24) ** 2 + x**2) / 250) * torch.sigmoid((-y - 80) / 4)   # occipital protuberance
    brow = torch.exp(-(((z + 14) / 12) ** 2)) * torch.sigmoid((y - 55) / 5)
    share = (1 + 0.4 * back + 0.8 * bump + 0.6 * brow + 0.08 * noise) * (1 - 0.45 * temple) * (1 - 0.45 * base)
    return vault + facts["skull_mm"] * share


def temporal_muscle(mni: torch.Tensor, skull: torch.Tensor) -> torch.Tensor:
    """Signed distance to the temporal muscles, a layer on the bone of the temples."""
    z, y, x = mni
    fan = torch.exp(-(((z + 25) / 42) ** 4) - ((y - 12) / 36) ** 4) * torch.sigmoid((x.abs() - 40) / 4)
    return torch.minimum(skull + 11 * fan - 1.5, 20 * (fan - 0.15))


def skin_distance(mni: torch.Tensor, skull: torch.Tensor, facts: dict, noise: torch.Tensor) -> torch.Tensor:
    scalp = skull + facts["scalp_mm"] * (1 + 0.1 * noise)
    parts = [scalp, temporal_muscle(mni, skull) + facts["scalp_mm"],
             ellipsoid(mni, (-50, 10, 0), (92, 80, 75), 2.4),
             capsule(mni, (-58, -42, 0), (-130, -36, 0), (56, 52)),
             capsule(mni, (-30, 80, 0), (-62, 90, 0), (9, 13.5))]    # nose
    return torch.stack(parts).amax(0)


def paint_scalp(canvas: Canvas, surfaces: dict, facts: dict, rng: np.random.Generator) -> None:
    skin, skull = surfaces["skin"], surfaces["skull"]
    canvas.paint(cover(skin), SKIN_HU, Tissue.SKIN)
    canvas.paint(cover(skin - 2.5), facts["fat_hu"], Tissue.FAT)
    canvas.paint(cover(skull + 1.2), 35.0, Tissue.MUSCLE)     # galea and periosteum
    canvas.paint(cover(surfaces["temporal"]), MUSCLE_HU, Tissue.MUSCLE)


def paint_face(canvas: Canvas, surfaces: dict, facts: dict, rng: np.random.Generator) -> None:
    """Soft tissue and bones below the cranial cavity; the skull is painted over them."""
    at = canvas.around((-130, -130, -100), (-20, 110, 100))
    skin = surfaces["skin"] - 3.5
    strands = smooth_noise(rng, 9.0, tuple(skin[at].shape))[0]
    lean = torch.minimum(skin[at] - 3.5, 4 * strands + 4.5)
    canvas.paint(cover(torch.minimum(lean, -20.0 - canvas.mni[0][at])), MUSCLE_HU, Tissue.MUSCLE, at)
    for side in SIDES:
        for start, end, radii in MUSCLE_RODS:
            canvas.rod(mirrored(start, side), mirrored(end, side), radii, MUSCLE_HU, Tissue.MUSCLE, skin)
        canvas.ball(mirrored((-78, -14, 64), side), (18, 12, 9), -15.0, Tissue.MUSCLE)    # parotid gland
        canvas.ball(mirrored((-72, 38, 52), side), (14, 9, 6), facts["fat_hu"], Tissue.FAT)    # cheek
        canvas.ball(mirrored((-74, 4, 26), side), (14, 7, 4), facts["fat_hu"], Tissue.FAT)     # beside the pharynx
        for start, end, radii in FACE_RODS:
            canvas.rod(mirrored(start, side), mirrored(end, side), radii, facts["bone_hu"], Tissue.BONE, skin)
        for centre, sizes, hu in FACE_BALLS:
            canvas.ball(mirrored(centre, side), sizes, hu, Tissue.BONE)
    canvas.rod((-32, 80, 0), (-62, 90, 0), (5, 11), 40.0, Tissue.MUSCLE, skin + 1.5)    # nose
    for start, end, radii in MIDLINE_RODS:
        canvas.rod(start, end, radii, 700.0, Tissue.BONE, skin)
    paint_ears(canvas)


MUSCLE_RODS = (
    ((-78, -80, 16), (-120, -72, 16), (17, 18)),    # deep neck
    ((-66, -48, 58), (-120, -30, 48), (8, 10)),     # sternocleidomastoid
    ((-64, 32, 60), (-104, 10, 52), (7, 10)),       # masseter
    ((-66, 12, 34), (-90, 2, 44), (10, 8)),         # pterygoids
)
FACE_RODS = (   # start, end, radii at both: the right side, mirrored
    ((-40, -32, 58), (-35, -8, 15), (13, 7)),       # petrous pyramid
    ((-50, -40, 57), (-72, -38, 54), (13, 7)),      # mastoid
    ((-58, 60, 52), (-56, 28, 70), (3.5, 2.6)),     # zygomatic arch
    ((-56, 28, 70), (-50, -10, 70), (2.6, 3.0)),
    ((-58, 62, 50), (-30, 62, 51), (7, 4)),         # zygoma, lateral orbital rim
    ((-30, 62, 51), (-19, 67, 36), (4, 4)),         # upper orbital rim
    ((-58, 66, 48), (-58, 78, 22), (5, 4)),         # lower orbital rim
    ((-58, 78, 18), (-34, 82, 8), (4, 4)),          # nasal process
    ((-22, 10, 12), (-22, 17, 20), (2.5, 3)),       # anterior clinoid, lesser wing
    ((-22, 17, 20), (-16, 30, 44), (3, 3)),
    ((-48, 14, 15), (-84, 18, 17), (4, 2.5)),       # pterygoid process
    ((-60, -8, 54), (-66, -6, 54), (6, 5)),         # condyle of the jaw
    ((-66, -6, 54), (-104, -2, 50), (4.5, 5)),      # ramus
    ((-62, 18, 55), (-104, 12, 51), (2.2, 5)),
    ((-104, 12, 51), (-112, 66, 18), (6, 7)),
    ((-64, -34, 22), (-70, -32, 24), (8, 7)),       # occipital condyle
    ((-80, -34, 25), (-86, -34, 26), (8, 9)),       # lateral mass of the atlas
    ((-80, -46, 24), (-82, -70, 4), (3.5, 3.5)),    # its posterior arch
)
FACE_BALLS = (
    ((-72, 47, 29), (20, 21, 18), 1000.0),          # maxilla
    ((-92, 58, 16), (8, 20, 18), 900.0),            # alveolar process, palate
    ((-38, -20, 38), (5, 6, 8), 1800.0),            # otic capsule
)
MIDLINE_RODS = (
    ((-34, -8, 0), (-63, -26, 0), (7, 5)),          # clivus
    ((-44, 4, 0), (-42, 26, 0), (15, 14)),          # sphenoid body
    ((-27, -8, -8), (-27, -8, 8), (2, 2)),          # dorsum sellae
    ((-68, -22, 0), (-110, -20, 0), (5, 9)),        # dens and axis
    ((-80, -13, -10), (-80, -13, 10), (4, 4)),      # anterior arch of the atlas
    ((-30, 82, 0), (-44, 88, 0), (4, 2.5)),         # nasal bones
    ((-28, 55, 0), (-20, 58, 0), (3, 1.5)),         # crista galli
    ((-46, 40, 0), (-46, 68, 0), (12.8, 12.8)),     # ethmoid
)


def paint_ears(canvas: Canvas) -> None:
    for side in SIDES:
        centre = (-40, -34, side * 82)
        at = canvas.around((-74, -56, centre[2] - 12), (-8, -8, centre[2] + 12))
        z, y, x = canvas.mni[(slice(None), *at)]
        bent = torch.stack([z, y, x + side * 0.35 * (y + 34)])   # the rim stands off behind
        outer, inner = (ellipsoid(bent, centre, radii) for radii in ((31, 18, 4), (22, 11, 3)))
        canvas.paint(cover(torch.minimum(outer, -inner)), 30.0, Tissue.SKIN, at)


def paint_skull(canvas: Canvas, surfaces: dict, facts: dict, rng: np.random.Generator) -> None:
    """The shell around the cavity: tables of cortical bone, spongy diploe between, the foramen magnum open."""
    cavity, skull = surfaces["cavity"], surfaces["skull"]
    at = canvas.around((-80, -125, -90), (110, 100, 90))
    mni, cavity, skull = canvas.mni[(slice(None), *at)], cavity[at], skull[at]
    foramen = capsule(mni, (-54, -44, 0), (-120, -47, 0), (15, 12))
    canvas.paint(cover(torch.minimum(skull, -foramen)), facts["bone_hu"], Tissue.BONE, at)
    grain = smooth_noise(rng, 5.5, tuple(cavity.shape))[0]
    within = torch.minimum(skull, -cavity)
    spongy = torch.minimum(within - 1.7 - 0.2 * grain, -foramen - 2)
    canvas.paint(cover(spongy), SPONGY_HU + 110 * grain, Tissue.DIPLOE, at)
    z, y, x = mni
    wander = 1.2 * grain
    coronal = torch.minimum(0.7 - (y - 8 - 0.27 * (85 - z) + wander).abs(), z)
    lambdoid = torch.minimum(0.7 - (z - 42 + 1.2 * x.abs() + wander).abs() / 1.5, -60 - y)
    sagittal = torch.minimum(0.7 - (x + wander).abs(), torch.minimum(z - 45, 8 - y))
    sutures = torch.maximum(torch.maximum(coronal, lambdoid), sagittal)
    canvas.paint(0.6 * cover(torch.minimum(sutures, within - 0.3)), 100.0, Tissue.BONE, at)


def paint_hollows(canvas: Canvas, surfaces: dict, facts: dict, rng: np.random.Generator) -> None:
    """Orbits, air of nose, sinuses, mastoids and ears; all keep a plate of bone to the cavity."""
    at = canvas.around((-112, -62, -92), (16, 100, 92))
    part = canvas.part(at, canvas.mni[(slice(None), *at)])
    plate = -surfaces["cavity"][at] - 1.6
    walls = smooth_noise(rng, 6.0, tuple(plate.shape))[0].abs_()    # thin septa where the noise crosses zero
    air = torch.full_like(plate, -9.0)

    def hollow(centre: Point, radii: Point, power: float, septa: float) -> None:
        here, mni = part.near(centre, centre, max(radii))
        shape = torch.minimum(ellipsoid(mni, centre, radii, power), (walls[here] - septa) * 6 + 0.5)
        torch.maximum(air[here], shape, out=air[here])

    for side in SIDES:
        for centre, radii, power, septa in HOLLOWS:
            hollow(mirrored(centre, side), tuple(np.multiply(radii, rng.uniform(0.8, 1.1))), power, septa)
        if rng.random() < 0.85:
            frontal = tuple(np.multiply((17, 4.5, 15), rng.uniform(0.5, 1.1)))
            hollow((-14, 77, side * 12), frontal, 2, 0.04)
    hollow((-70, 52, 0), (20, 34, 13), 3, 0.35)      # nasal cavity between the turbinates
    hollow((-76, 8, 0), (18, 11, 13), 2, 0)          # nasopharynx
    walled = torch.minimum(plate, surfaces["skin"][at] - 5.0)
    part.paint(cover(torch.minimum(air, walled)), -990.0, Tissue.SINUS)
    for side in SIDES:
        ends = mirrored((-47, -23, 50), side), mirrored((-46, -26, 92), side)
        part.rod(*ends, (3.0, 3.5), -990.0, Tissue.SINUS, plate)       # ear canal
    here, mni = part.near((-64, 44, 0), (-64, 44, 0), 36)
    septum = torch.minimum(0.9 - mni[2].abs(), ellipsoid(mni, (-64, 44, 0), (28, 36, 9)))
    part.paint(cover(torch.minimum(septum, plate[here])), 350.0, Tissue.BONE, here)
    for side in SIDES:
        _paint_orbit(canvas, surfaces, facts, side)


HOLLOWS = (   # centre, radii, boxiness, thickness of septa: the right side, mirrored
    ((-72, 46, 29), (17, 18, 15), 2.3, 0.0),        # maxillary sinus
    ((-44, 16, 7.5), (8, 12, 7), 2.5, 0.0),         # sphenoid sinus
    ((-44, 48, 6), (13, 25, 5), 4.0, 0.1),       # ethmoid cells
    ((-52, -40, 58), (19, 13, 9), 2.5, 0.3),        # mastoid cells
    ((-42, -24, 46), (6, 5, 4), 2.0, 0.05),         # middle ear
)


def _paint_orbit(canvas: Canvas, surfaces: dict, facts: dict, side: int) -> None:
    """Fat in a cone, the globe with its wall and lens, the optic nerve and four straight muscles."""
    at = canvas.around((-60, 16, side * 32 - 18), (-22, 84, side * 32 + 18))
    mni = canvas.mni[(slice(None), *at)] * torch.tensor((1.0, 1.0, side)).view(3, 1, 1, 1)
    room = torch.minimum(-surfaces["cavity"][at] - 1.6, surfaces["skin"][at] - 2.5)

    def paint(distance: torch.Tensor, hu: float, tissue: Tissue) -> None:
        canvas.paint(cover(torch.minimum(distance, room)), hu, tissue, at)

    apex, middle = (-34, 20, 15), (-41, 60, 33)
    low = torch.stack([-41 + 0.88 * (mni[0] + 41), mni[1], mni[2]])     # the orbit is higher than wide
    cone = torch.maximum(capsule(low, apex, middle, (4, 18.5)), capsule(low, middle, (-41, 84, 35), (18.5, 18)))
    wall = 1.2 + 1.8 * torch.sigmoid((mni[2] - 34) / 4)     # paper-thin towards the ethmoid, strong at the temple
    paint(torch.minimum(cone + wall, 62 - mni[1]), facts["bone_hu"], Tissue.BONE)
    paint(cone, facts["fat_hu"], Tissue.FAT)
    for end in ((-41, 64, 20), (-41, 62, 47), (-27, 62, 33), (-55, 62, 33)):
        paint(capsule(mni, apex, end, (1.8, 2.0)), 55.0, Tissue.ORBIT)
    paint(capsule(mni, apex, (-41, 54, 33), (2.0, 2.4)), 35.0, Tissue.ORBIT)
    paint(capsule(mni, (-34, 70, 46), (-32, 62, 46), (3, 3)), 40.0, Tissue.ORBIT)   # lacrimal gland
    paint(ellipsoid(mni, (-41, 80, 35), (14, 5, 17)), 40.0, Tissue.SKIN)            # lids
    globe = ellipsoid(mni, (-41, 66, 34), (13, 13, 13))
    paint(globe, 50.0, Tissue.ORBIT)
    paint(globe - 1.5, 10.0, Tissue.ORBIT)
    paint(ellipsoid(mni, (-41, 75.5, 34), (4.8, 2.3, 4.8)), 85.0, Tissue.ORBIT)
