"""A painter: a generator and an encoder that were trained to draw what is hidden from them (gan/inpainting.py)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from common.weights import CheckpointError
from ct.halves import doubled, halved
from ct.window import decode, encode
from model import Encoder, Generator
from op.threads import in_batches

AT = 128                                  # lengths are pixels of images of this side
CENTRE = 0.8                              # of a hidden block's side: what is drawn there is kept
AT_ONCE = 4                               # images whose channels become HU at a time, in a processor's cache


class Painter:
    """range_hu: the HU that the networks were trained on, and draw. size: the side of their images."""

    NAMES = ("generator", "encoder")

    def __init__(self, generator: Generator, encoder: Encoder, range_hu: tuple[float, float]):
        if not encoder.config.encoder_masks:
            raise CheckpointError("method inpainting: needs an encoder that was trained with --hide (train_encoder.py)")
        self.generator, self.encoder = generator, encoder
        self.range_hu = tuple(float(v) for v in range_hu)
        self.size = generator.config.size

    def networks(self) -> dict[str, torch.nn.Module]:
        return {"generator": self.generator, "encoder": self.encoder}

    def images(self, hu: torch.Tensor) -> torch.Tensor:
        """The networks' images [S, 3, N, N] of slices [S, N, N], HU."""
        return encode(hu.clamp(*self.range_hu))

    def draw(self, images: torch.Tensor, hidden: torch.Tensor, bone: torch.Tensor, batch: int) -> torch.Tensor:
        """HU [S, N, N] within range_hu of images [S, 3, N, N] of which `hidden`, bool [S, N, N], is not seen; `batch`
        of them at a time. Without gradients."""
        def drawn(*part: torch.Tensor) -> torch.Tensor:
            found = self.encoder.redraw(self.encoder.masked(*part), self.generator)
            return torch.cat([decode(some) for some in found.split(AT_ONCE)]).clamp(*self.range_hu)

        return in_batches(drawn, batch, images, hidden, bone)

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
