"""Painters: a generator and an encoder that were trained to draw what is hidden from them (gan/inpainting.py), or what
belongs there (gan/closest.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common.weights import CheckpointError
from ct.halves import doubled, halved
from ct.window import decode, encode
from model import Encoder, Generator
from op.threads import in_batches

AT = 128                                  # lengths are pixels of images of this side
CENTRE = 0.8                              # of a hidden block's side: what is drawn there is kept
AT_ONCE = 4                               # images whose channels become HU at a time, in a processor's cache


class Found(NamedTuple):
    """What is anomalous in slices: all [S, N, N], bool but for the first.

    expected_hu  what their surroundings call for, float32, HU
    anomalous    where the slices are not so
    hidden       what is drawn anew: that, and what goes on beyond it
    denser       of that where they are denser than expected; elsewhere less dense
    """

    expected_hu: torch.Tensor
    anomalous: torch.Tensor
    hidden: torch.Tensor
    denser: torch.Tensor


class Painter:
    """range_hu: the HU that the networks were trained on, and draw. size: the side of their images; slice_size: of the
    slices whose closest normals they draw."""

    NAMES, FILLED, TWICE = ("generator", "encoder"), False, 1

    def __init__(self, generator: Generator, encoder: Encoder, range_hu: tuple[float, float]):
        if not encoder.config.encoder_masks:
            raise CheckpointError("method inpainting: needs an encoder that was trained with --hide (train_encoder.py)")
        if encoder.config.encoder_filled != self.FILLED:
            raise CheckpointError("method inpainting: networks that draw closest normals at half the size in the place "
                                  "of those that draw what is hidden from them, or the other way round")
        self.generator, self.encoder = generator, encoder
        self.range_hu = tuple(float(v) for v in range_hu)
        self.size = generator.config.size
        self.slice_size = self.TWICE * self.size

    def networks(self) -> dict[str, torch.nn.Module]:
        return {"generator": self.generator, "encoder": self.encoder}

    def images(self, hu: torch.Tensor) -> torch.Tensor:
        """The networks' images [S, 3, N, N] of slices [S, N, N], HU."""
        return encode(hu.clamp(*self.range_hu))

    def draw(self, images: torch.Tensor, hidden: torch.Tensor, bone: torch.Tensor, batch: int) -> torch.Tensor:
        """HU [S, N, N] within range_hu of images [S, 3, N, N] of which `hidden`, bool [S, N, N], is not seen; `batch`
        of them at a time. Without gradients."""
        return in_batches(lambda *part: self._redrawn(self.encoder.masked(*part)), batch, images, hidden, bone)

    def _redrawn(self, images: torch.Tensor) -> torch.Tensor:
        """HU [S, N, N] within range_hu of images with masks, [S, 5, N, N]."""
        found = self.encoder.redraw(images, self.generator)
        return torch.cat([decode(some) for some in found.split(AT_ONCE)]).clamp(*self.range_hu)

    def closest(self, hu: torch.Tensor, found: Found, bone: torch.Tensor, batch: int) -> torch.Tensor:
        """HU [S, N, N] of slices, HU, drawn without what was found in them; bone, bool [S, N, N], may be drawn."""
        return self.draw(self.images(hu), found.hidden, bone, batch)

    def from_surroundings(self, hu: torch.Tensor, bone: torch.Tensor, side: float, batch: int) -> torch.Tensor:
        """Slices [S, N, N], HU, with every place drawn while it and its neighbours, blocks of `side` pixels of AT, are
        hidden; bone, bool [S, N, N], stays.

        N is the networks' size or twice that. They then see and draw the slices at half their size: what no one sees is
        drawn blurred all the same.
        """
        if hu.shape[-1] == 2 * self.size:
            small_hu, small_bone = halved(hu.clamp(*self.range_hu), bone)
            found = doubled(self.from_surroundings(small_hu, small_bone, side, batch), small_bone)
            return torch.where(bone, hu, found)

        def drawn(hu: torch.Tensor, bone: torch.Tensor) -> torch.Tensor:
            images, found = self.images(hu), torch.zeros_like(hu)
            for hidden, centre in blocks(self.size, side):
                hidden, centre = (mask.to(hu.device).expand_as(bone) for mask in (hidden, centre))
                found += self.draw(images, hidden, bone, batch) * centre
            return torch.where(bone, hu, found)

        return in_batches(drawn, batch, hu, bone)


class FilledPainter(Painter):
    """Networks that draw closest normals of slices twice the size of their images.

    What is hidden they see as its surroundings call for, and are told where the slice is denser than that (1) and where
    less dense (-1): so they draw a ventricle as fluid, and brain in the place of an infarct or of blood. What half the
    size leaves out comes back as detail (detect/inpainting.py).
    """

    FILLED, TWICE = True, 2

    def filled(self, hu: torch.Tensor, found: Found, bone: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The networks' images [S, 5, N / 2, N / 2] of slices [S, N, N], HU, and bone at their size, bool."""
        hidden = found.hidden & ~bone
        small, small_bone = halved(torch.where(hidden, found.expected_hu, hu).clamp(*self.range_hu), bone)
        side = hidden.to(hu) * torch.where(found.denser, 1.0, -1.0)
        told = F.avg_pool2d(side, 2) * ~small_bone
        return torch.cat([encode(small), told[:, None], small_bone[:, None].to(hu)], 1), small_bone

    def closest(self, hu: torch.Tensor, found: Found, bone: torch.Tensor, batch: int) -> torch.Tensor:
        def drawn(hu: torch.Tensor, bone: torch.Tensor, *found: torch.Tensor) -> torch.Tensor:
            images, small_bone = self.filled(hu, Found(*found), bone)
            return doubled(self._redrawn(images), small_bone)

        return in_batches(drawn, batch, hu, bone, *found)


def painter_of(generator: Generator, encoder: Encoder, range_hu: tuple[float, float]) -> Painter:
    """Of the kind that the encoder was trained for."""
    return (FilledPainter if encoder.config.encoder_filled else Painter)(generator, encoder, range_hu)


def block_sides(size: int, side: float) -> tuple[int, int]:
    """Sides, pixels of an image of this size: of a hidden block, and of its middle, which is kept. Blocks lie two of
    the latter apart."""
    hidden = round(side * size / AT)
    return hidden, round(CENTRE * hidden)


def blocks(size: int, side: float) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What to hide, blocks of `side` pixels of AT, and what to keep of it, bool [N, N] each: every place once."""
    hidden, centre = block_sides(size, side)
    period, margin, place = 2 * centre, (hidden - centre) // 2, torch.arange(size)

    def band(start: int, width: int) -> torch.Tensor:
        return (place - start) % period < width

    for y in range(0, period, centre):
        for x in range(0, period, centre):
            yield (band(y - margin, hidden)[:, None] & band(x - margin, hidden),
                   band(y, centre)[:, None] & band(x, centre))
