"""The small U-Net of the denoising autoencoder."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class UNet(nn.Module):
    """[B, 1, N, N] -> [B, 1, N, N]; N a multiple of 2^(depth + 1).

    2 x 2 pixels are folded into channels first: a CPU spends most of its time at the full resolution.
    """

    def __init__(self, width: int, depth: int):
        super().__init__()
        widths = [width << level for level in range(depth + 1)]
        self.down = nn.ModuleList(_convolutions(a, b) for a, b in zip([4, *widths], widths))
        self.narrow = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in zip(widths, widths[1:]))
        self.up = nn.ModuleList(_convolutions(2 * a, a) for a in widths[:-1])
        self.last = nn.Conv2d(width, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept, x = [], F.pixel_unshuffle(x, 2)
        for level in self.down[:-1]:
            kept.append(level(x))
            x = F.avg_pool2d(kept[-1], 2)
        x = self.down[-1](x)
        for narrow, level, skip in zip(reversed(self.narrow), reversed(self.up), reversed(kept)):
            x = F.interpolate(narrow(x), scale_factor=2.0)
            x = level(torch.cat([x, skip], 1))
        return F.pixel_shuffle(self.last(x), 2)


def _convolutions(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.GroupNorm(max(1, outputs // 8), outputs), nn.SiLU()]
    return nn.Sequential(*layers)
