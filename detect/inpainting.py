"""Inpainting: what is anomalous is found by what its surroundings call for, and then drawn from them; the rest stays.

With the networks of an encoder that was trained to draw what is hidden from it (painter.py), in two stages:

surroundings   blocks of the brain are hidden in turn, and every place is drawn without being seen: anatomy without
               lesion, though blurred where no surroundings tell what is there: networks of half the size can do it
reconstruct    where the slice differs from that, smoothed a little, by gate_hu or more, in more than a speck, it is
               hidden, what is hypodense as far as it goes on (grow_hu: a large one's faint middle, or its edge), and
               drawn from what is around; elsewhere the networks see the slice, and draw it as it is.
               What shifts a slice as a whole is no lesion (level): hardened beams at the skull base, bone that the
               highest slices are in part, another scanner's calibration.
               Networks that were taught with such holes (train_encoder.py --gated) draw fluid in one of the shape of a
               ventricle or a sulcus, and tissue in one of any other
grain          what they smooth away of it there comes back; the rest has that of the head's other side, and where
               this is drawn anew, too, its own, no more than grain has: a bleed is not grain

So the closest normal is the same head, as sharp as it is, without what does not belong in it: the order of the paper's
inversion (code, what is anomalous, detail elsewhere: Lee et al. 2022, Methods) with a code in space in place of W+.
What is anomalous is judged by what its surroundings call for all the same (`judged`): a hole's shape tells of fluid in
an infarct, too. What is hidden only since something goes on is not judged: healthy ventricles and sulci do, too.
Where the model holds a reader (reader.py), it says besides what it makes of slice and surroundings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from common.weights import CheckpointError
from config import check_choices, check_range, option
from ct.window import BONE_HU
from detect.inversion import EncoderMethod, bone_mask, compact_pair, load_networks
from detect.painter import AT, Painter
from detect.reader import Reader
from detect.reconstruct import Reconstruction, Stages, Watch, error_hu
from detect.residual import components_touching, slice_medians, without_small_components
from model import Encoder, Generator
from op.banded import dilated, smoothed

OF_SURROUNDINGS = "surroundings_"         # files in a bundle of the networks for them begin so
SMOOTH, AROUND = 1.0, 1                   # of the residual that finds what is anomalous; what is hidden around it
NEAR = 0.6                                # of the residual that tells whether a place is so by itself
SPECK = 12                                # what is anomalous in fewer pixels together is a sulcus or grain
CLIP_HU = 40.0                            # a residual counts as no more than this: one bright pixel is no lesion
DETAIL = 2.0                              # what is finer than this Gaussian comes back where all is normal,
GROWN, GROWN_HU = 1.2, 5.0                # than this in what grow_hu adds, up to so much,
GRAIN, GRAIN_HU = 0.7, 3.0                # and than this in all else that is drawn anew; but first that of the other
OTHER_HU = 8.0                            # side's detail, up to so much, where it is normal: none of a lesion is in it


@dataclass(frozen=True)
class InpaintingSettings:
    hidden: int = option(40, "side of the blocks that are hidden in turn, pixels of 128 across the image: what is "
                             "larger is drawn from itself, what is smaller from what is around")
    gate_hu: float = option(8.0, "difference from what its surroundings call for, HU, at which a place is drawn anew")
    grow_hu: float = option(5.0, "what is connected with a hypodense place that is drawn anew is, too, where it "
                            "differs by more than this, HU; as gate_hu: nothing is")
    level: bool = option(True, "a slice's difference is told from its own level, the median over its brain, gate_hu at "
                               "most: what shifts a slice as a whole is not drawn anew")
    spared: float = option(0.5, "of gate_hu: what is less hypodense than this by itself is not drawn anew with what is "
                                "around it, as the septum between the ventricles is; 0 draws it, too")
    bright_rim: int = option(3, f"what is hidden around it where it is hyperdense, pixels of {AT}; {AROUND} elsewhere")
    judged: str = option("surroundings", "what a place that is drawn anew is judged against: what its surroundings "
                         "call for, or, if 'normal', how it is drawn", ("surroundings", "normal"))
    batch: int = option(32, "slices in the networks at a time: memory, not results", stored=False)

    def __post_init__(self):
        check_choices(self)
        check_range(self, ("batch",), 1, flags=False)
        if not 8 <= self.hidden <= AT // 2:
            raise ValueError(f"hidden must be from 8 to {AT // 2} pixels, got {self.hidden}")
        check_range(self, ("gate_hu",), 0, above=True, flags=False)
        if not 0 < self.grow_hu <= self.gate_hu:
            raise ValueError(f"grow_hu must be above 0 and at most gate_hu, {self.gate_hu:g}, got {self.grow_hu:g}")
        if not 0 <= self.spared < 1:
            raise ValueError(f"spared must be from 0 to below 1, got {self.spared:g}")
        check_range(self, ("bright_rim",), AROUND, flags=False)


class Found(NamedTuple):
    """What is anomalous in slices: all [S, N, N], bool but for the first.

    expected_hu  what their surroundings call for, float32, HU
    anomalous    where the slices are not so
    hidden       what is drawn anew: that, and what goes on beyond it
    """

    expected_hu: torch.Tensor
    anomalous: torch.Tensor
    hidden: torch.Tensor


class Inpainting(EncoderMethod):
    """range_hu: the HU that the networks were trained on. What is denser, up to BONE_HU, is no bone, but blood.

    surroundings: other networks, of half the size, for the first stage; None: the same for both.
    """

    name, Settings = "inpainting", InpaintingSettings

    def __init__(self, settings: InpaintingSettings, generator: Generator, encoder: Encoder,
                 range_hu: tuple[float, float], reader: Reader | None = None, surroundings: Painter | None = None):
        super().__init__(settings, generator, encoder, reader)
        self.painter = Painter(generator, encoder, range_hu)
        self.surroundings, self.range_hu = surroundings or self.painter, self.painter.range_hu
        if halves := self.halves:
            if (halves.size, halves.range_hu) != (self.size // 2, self.range_hu):
                raise CheckpointError(
                    f"networks for the surroundings: draw {halves.size} pixels and HU {halves.range_hu}; beside others "
                    f"that draw {self.size} and {self.range_hu} expected half the pixels and the same HU")

    def closest_normal(self, hu: torch.Tensor, brain: torch.Tensor, below_vertex_mm: np.ndarray,
                       watch: Watch | None = None) -> Reconstruction:
        self.check_shapes(hu, brain, below_vertex_mm)
        hu, brain = hu.to(self.device), brain.to(self.device)
        bone = bone_mask(hu)
        query_hu, soft, stages = hu.clamp(self.range_hu[0], BONE_HU), brain & ~bone, Stages()
        with stages.stage("surroundings", lambda: error_hu(query_hu, expected_hu, soft)):
            found = self.find_anomalous(query_hu, soft, bone)
            read = self.read(query_hu, expected_hu := found.expected_hu, brain, bone)
        with stages.stage("reconstruct", lambda: error_hu(query_hu, normal_hu, soft)):
            kept = bone | (~brain & (query_hu <= self.range_hu[0]))            # and air: the networks draw it badly
            drawn_hu = self.painter.draw(self.painter.images(hu), found.hidden, bone, self.settings.batch)
            normal_hu = torch.where(kept, query_hu, drawn_hu)
            normal_hu += self.detail(query_hu - normal_hu, soft, found.hidden, found.hidden & ~found.anomalous)
        if watch:
            watch(query_hu, normal_hu)
        judged_hu = None
        if self.settings.judged == "surroundings":
            as_it_is = torch.where(found.hidden, query_hu, normal_hu)
            judged_hu = torch.where(found.anomalous, expected_hu, as_it_is).cpu()
        return Reconstruction(query_hu.cpu(), normal_hu.cpu(), stages.error_hu, stages.seconds, judged_hu, read)

    def find_anomalous(self, query_hu: torch.Tensor, soft: torch.Tensor, bone: torch.Tensor) -> Found:
        """What slices [S, N, N], HU, show that their surroundings do not call for, by gate()."""
        expected_hu = self.from_surroundings(query_hu, bone)
        return Found(expected_hu, *self.gate(query_hu - expected_hu, soft))

    def expected(self, hu: torch.Tensor, bone: torch.Tensor) -> torch.Tensor:
        return self.from_surroundings(hu.clamp(*self.range_hu), bone)

    def from_surroundings(self, hu: torch.Tensor, bone: torch.Tensor) -> torch.Tensor:
        """Painter.from_surroundings of the networks that are for it."""
        return self.surroundings.from_surroundings(hu, bone, self.settings.hidden, self.settings.batch)

    def gate(self, difference_hu: torch.Tensor, soft: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a difference [S, N, N], HU, from the surroundings is anomalous in soft brain; and what to hide."""
        unit, gate = self.size / AT, self.settings.gate_hu
        if self.settings.level:
            shift = slice_medians(difference_hu[:, None], soft).clamp(-gate, gate)
            difference_hu = difference_hu - shift[..., None]
        clipped = difference_hu.clamp(-CLIP_HU, CLIP_HU)
        smooth = smoothed(clipped, soft, SMOOTH * unit)
        found = without_small_components(smooth.abs() > gate, SPECK * unit**2)
        dark = found & (smooth < 0)
        bright = _with_rim(found & (smooth > 0), self.settings.bright_rim * unit)
        whole = _with_rim(components_touching(dark, smooth < -self.settings.grow_hu), AROUND * unit)
        if self.settings.spared:
            whole &= ~soft | (smoothed(clipped, soft, NEAR * unit) < -self.settings.spared * gate)
        return bright | _with_rim(dark, AROUND * unit), bright | whole

    def detail(self, difference_hu: torch.Tensor, soft: torch.Tensor, drawn_anew: torch.Tensor,
               grown: torch.Tensor) -> torch.Tensor:
        """Detail too fine for the networks, HU [S, N, N]; difference_hu: the slice less what they drew.

        grown: the part of drawn_anew that grow_hu has added.
        """
        unit, hidden, seen = self.size / AT, soft & drawn_anew, soft & ~drawn_anew

        def finer(where: torch.Tensor, gaussian: float) -> torch.Tensor:
            return difference_hu - smoothed(difference_hu, where, gaussian * unit)

        grain = torch.where(grown, finer(hidden, GROWN).clamp(-GROWN_HU, GROWN_HU),
                            finer(hidden, GRAIN).clamp(-GRAIN_HU, GRAIN_HU))
        detail = finer(seen, DETAIL)
        if self.settings.judged == "surroundings":           # else the residual would hold the grain of both sides
            grain = torch.where(seen.flip(-1), detail.flip(-1).clamp(-OTHER_HU, OTHER_HU), grain)
        return torch.where(hidden, grain, detail) * soft

    @property
    def halves(self) -> Painter | None:
        """The networks for the surroundings, where these have their own."""
        return self.surroundings if self.surroundings is not self.painter else None

    def config(self) -> dict[str, Any]:
        halves = {"surroundings": asdict(self.halves.encoder.config)} if self.halves else {}
        return super().config() | {"range_hu": list(self.range_hu)} | halves

    def drawing(self, dtype: torch.dtype) -> dict[str, dict[str, torch.Tensor]]:
        return super().drawing(dtype) | (self.expecting(dtype) if self.halves else {})

    def expecting(self, dtype: torch.dtype) -> dict[str, dict[str, torch.Tensor]]:
        if not self.halves:
            return super().expecting(dtype)
        return {OF_SURROUNDINGS + name: tensors
                for name, tensors in compact_pair(self.halves.generator, self.halves.encoder, dtype).items()}

    def set_precision(self, dtype: torch.dtype) -> None:
        super().set_precision(dtype)
        for network in self.surroundings.networks().values():
            network.compute_dtype = dtype

    @classmethod
    def load(cls, folder: Path, config: Mapping[str, Any], settings: InpaintingSettings,
             device: torch.device) -> Inpainting:
        config = dict(config)
        range_hu, halves = config.pop("range_hu", None), config.pop("surroundings", None)
        if not isinstance(range_hu, list) or len(range_hu) != 2:
            raise CheckpointError(f"{folder / 'model.json'}: config: expected range_hu, two HU, got {range_hu!r}")
        if halves is not None:
            halves = Painter(**load_networks(folder, halves, Painter.NAMES, device, OF_SURROUNDINGS), range_hu=range_hu)
        return cls(settings, **cls.networks(folder, config, device), range_hu=range_hu, surroundings=halves)


def _with_rim(mask: torch.Tensor, width: float) -> torch.Tensor:
    """bool [S, N, N], and what is next to it, `width` pixels or one at least: a square's side to each side."""
    return dilated(mask, max(1, round(width)))
