"""A reader: a network that sees a slice beside what its surroundings call for, and tells what does not belong in it.

How far a healthy slice differs from what its surroundings call for hangs on the place, and the measure knows that
(normative.py). It hangs on the head as well: wide sulci and ventricles, a rim that the skull's hardened beam makes
denser, another side that looks the same. The reader is taught to tell these from what does not belong, on healthy
slices into which random shapes of other densities are drawn (gan/reading.py): no lesion and no label. What it says is
one more residual, judged by what it says of healthy heads at the same place.

It sees no texture: a shape's grain would tell that it was drawn. That learning to find drawn anomalies finds real ones
is what Tan et al. 2020 ('Detecting outliers with foreign patch interpolation') and Zavrtanik et al. 2021 ('DRAEM')
report for other pictures; in DRAEM, too, a network reads the picture beside its reconstruction.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from common.weights import CheckpointError, load_strictly, load_tensors
from detect.residual import slice_medians
from op.banded import smoothed
from op.conv import conv2d, ready
from op.layers import Kept
from op.threads import in_batches

CHANNELS = 6                              # of reader_input()
GROUPS = 8                                # of channels that are normalised together
AT, SMOOTH = 128, 0.7                     # Gaussian that takes away the grain, pixels of images of this side
TOP_HU = 70.0                             # what is denser looks alike: training slices end there
MIDDLE_HU, UNIT_HU = 30.0, 20.0           # of what it sees
SCALE = 2.0                               # of log odds, so that normative.FLOOR_HU is a floor for them, too
AT_ONCE = 4                               # images in the network at a time, in a processor's cache
RARE = -3.0                               # log odds that training starts from
VERSION = 2                               # of what is made of the network's output; 1 took no slice_medians() away


class Conv(nn.Module):
    """A convolution of k x k, with the size kept."""

    def __init__(self, in_ch: int, out_ch: int, kernel: int):
        super().__init__()
        plain = nn.Conv2d(in_ch, out_ch, kernel)
        self.weight, self.bias, self.padding, self.kept = plain.weight, plain.bias, kernel // 2, Kept()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.kept(self.weight, x.dtype, lambda: ready(self.weight, x.dtype, self.padding == 1))
        return conv2d(x, weight, padding=self.padding) + self.bias.to(x)[:, None, None]


class Block(nn.Module):
    """Twice a convolution, a normalisation and an activation."""

    def __init__(self, in_ch: int, out_ch: int):
        super().__init__()
        self.convs = nn.ModuleList([Conv(in_ch, out_ch, 3), Conv(out_ch, out_ch, 3)])
        self.norms = nn.ModuleList([nn.GroupNorm(GROUPS, out_ch) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv, norm in zip(self.convs, self.norms):
            x = F.silu(F.group_norm(conv(x), GROUPS, norm.weight.to(x), norm.bias.to(x)))
        return x


class Reader(nn.Module):
    """A U-Net on pixels of 2 x 2. widths: channels at each of its resolutions, each half of the one before."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.widths, self.compute_dtype = tuple(widths), torch.float32
        self.down = nn.ModuleList(Block(a, b) for a, b in zip((CHANNELS * 4, *widths[:-1]), widths))
        self.up = nn.ModuleList(Block(below + beside, beside) for below, beside in zip(widths[:0:-1], widths[-2::-1]))
        self.last = Conv(widths[0], 2 * 4, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.constant_(self.last.bias, RARE)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """reader_input() [B, 6, N, N] -> log odds float32 [B, 2, N, N]: too dense to belong there, not dense enough.

        N must be divisible by 2 to the power of the number of widths.
        """
        x, beside = F.pixel_unshuffle(images, 2).to(self.compute_dtype), []
        for depth, block in enumerate(self.down):
            x = block(F.avg_pool2d(x, 2) if depth else x)
            beside.append(x)
        for block, other in zip(self.up, beside[-2::-1]):
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), other], dim=1))
        return F.pixel_shuffle(self.last(x).float(), 2)

    @torch.no_grad()
    def read(self, query_hu: torch.Tensor, expected_hu: torch.Tensor, brain: torch.Tensor, bone: torch.Tensor
             ) -> torch.Tensor:
        """What it says of slices, float32 [S, 2, N, N]: above 0 where too dense; below where not dense enough.

        Beyond what it says of half of the slice's soft brain: where a bleed is bright and large, it comes to doubt all
        that is in the slice (its normalisations see the whole). Arguments as of reader_input(). 0 outside soft brain.
        """
        def said(*part: torch.Tensor) -> torch.Tensor:
            found, soft = self(reader_input(*part)), part[2] & ~part[3]
            found = found - slice_medians(found, soft)[..., None, None]
            return SCALE * torch.stack([found[:, 0], -found[:, 1]], dim=1) * soft[:, None]

        return in_batches(said, AT_ONCE * torch.get_num_threads(), query_hu, expected_hu, brain, bone)


def reader_input(query_hu: torch.Tensor, expected_hu: torch.Tensor, brain: torch.Tensor, bone: torch.Tensor
                 ) -> torch.Tensor:
    """What a reader sees, float32 [S, 6, N, N]: slice, other side, difference from the expected, that, bone and brain.

    query_hu [S, N, N]: slices, HU; expected_hu [S, N, N]: what their surroundings call for; brain and bone bool.
    """
    soft, query_hu, expected_hu = brain & ~bone, query_hu.clamp(0, TOP_HU), expected_hu.clamp(0, TOP_HU)
    query, expected = ((hu - MIDDLE_HU) / UNIT_HU
                       for hu in (torch.where(soft, grainless(query_hu, soft), query_hu), expected_hu))
    difference = grainless(query_hu - expected_hu, soft) / UNIT_HU
    return torch.stack([query, query.flip(-1), difference, expected, bone.to(query), brain.to(query)], dim=1)


def grainless(hu: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    """hu [S, N, N] without its grain, in soft brain, bool [S, N, N]; 0 elsewhere."""
    return smoothed(hu, soft, SMOOTH * hu.shape[-1] / AT)


def config_of(reader: Reader) -> dict[str, Any]:
    """What a bundle's config says of it."""
    return {"widths": list(reader.widths), "version": VERSION}


def load_reader(folder: Path, config: Any, device: torch.device) -> Reader:
    """By config_of() from a bundle's folder, in eval mode and frozen. Raises CheckpointError naming the file."""
    where = f"{folder / 'model.json'}: config: reader"
    if not isinstance(config, dict) or config.get("version") != VERSION:
        raise CheckpointError(f"{where}: of another version than this program's, {VERSION}: healthy scans would be "
                              "judged otherwise; make the bundle anew with latent_stats.py --reader")
    try:
        reader = Reader(config.get("widths"))
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{where}: expected channels as widths, got {config!r}") from error
    path = folder / "reader.safetensors"
    load_strictly(reader, load_tensors(path), path)
    return reader.eval().requires_grad_(False).to(device)
