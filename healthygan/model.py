"""Generator and critic of HealthyGAN (Rahman Siddiquee et al. 2022, SASHIMI, arXiv:2209.01822).

Parameter names and shapes are those of the released weights, `<iter>-G.ckpt` and `<iter>-D.ckpt`. Images are [B, 3, H,
W] in [-1, 1], H and W divisible by 4. A network computes in `compute_dtype`, float32 by default or bfloat16: on a CPU
and in bfloat16 channels-last. Parameters stay float32; images, masks and critic values go in and out as float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from op.conv import conv2d
from op.cuda import is_ref

BF16_UNITS = ("amx_bf16", "avx512_bf16")       # of CPUs on which these networks are faster in bfloat16


@dataclass(frozen=True)
class ModelConfig:
    """What it takes to rebuild both networks. The defaults are the released ones, for 256 x 256."""

    size: int = 256          # image side; the critic halves it critic_layers times
    width: int = 64          # the generator's channels: width, 2 width, 4 width
    blocks: int = 6          # residual blocks
    critic_width: int = 64   # the critic's channels: critic_width, doubled by every layer
    critic_max: int = 2048   # up to this
    critic_layers: int = 6

    def __post_init__(self):
        if self.size % 4 or self.size < 2**self.critic_layers:
            raise ValueError(f"--size must be divisible by 4 and at least 2^critic_layers = {2**self.critic_layers}, "
                             f"got {self.size}")
        if min(self.width, self.blocks, self.critic_width, self.critic_max, self.critic_layers) < 1:
            raise ValueError(f"widths, blocks and layers must be at least 1, got {self}")

    def generator(self) -> Generator:
        return Generator(self.width, self.blocks)

    def critic(self) -> Discriminator:
        return Discriminator(self.critic_width, self.critic_layers, self.critic_max)


class Translation(NamedTuple):
    """What the generator makes of an image x [B, 3, H, W]: y = m t + (1 - m) x."""

    t: torch.Tensor          # raw translation, [B, 3, H, W] in [-1, 1]
    m: torch.Tensor          # mask, [B, 1, H, W] in [0, 1]: 1 where t takes x's place
    y: torch.Tensor          # the healthy version, [B, 3, H, W] in [-1, 1]


# ---------------------------------------------------------------------------------------------------------------
# Layers: each works in the dtype and memory layout of its input

class Conv2d(nn.Conv2d):
    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        if bias is None and self.kernel_size == (3, 3):
            return conv2d(x, weight, padding=1)
        return self._conv_forward(x, weight, bias)


class ConvTranspose2d(nn.ConvTranspose2d):
    def forward(self, x):
        return F.conv_transpose2d(x, self.weight.to(x.dtype), stride=self.stride, padding=self.padding)


class InstanceNorm2d(nn.Module):
    """Affine instance norm, always by the image's own statistics, which are computed in float32.

    PyTorch's own instance norm leaves channels-last; on the CPU a batch norm of each image in turn is the same and
    several times faster.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        if x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last):
            return torch.cat([F.batch_norm(image, None, None, self.weight, self.bias, training=True)
                              for image in x.split(1)])
        return F.instance_norm(x, weight=self.weight.to(x.dtype), bias=self.bias.to(x.dtype))


class ResidualBlock(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))); nothing after the sum."""

    def __init__(self, channels: int):
        super().__init__()
        self.main = nn.Sequential(
            Conv2d(channels, channels, 3, padding=1, bias=False), InstanceNorm2d(channels), nn.ReLU(inplace=True),
            Conv2d(channels, channels, 3, padding=1, bias=False), InstanceNorm2d(channels))

    def forward(self, x):
        return x + self.main(x)


# ---------------------------------------------------------------------------------------------------------------
# Networks

class Generator(nn.Module):
    """Translates any image to its healthy version, in one direction only. 8,417,984 parameters by default."""

    def __init__(self, width: int = 64, blocks: int = 6):
        super().__init__()

        def stage(conv, channels):
            return [conv, InstanceNorm2d(channels), nn.ReLU(inplace=True)]

        def down(channels):
            return stage(Conv2d(channels // 2, channels, 4, stride=2, padding=1, bias=False), channels)

        def up(channels):
            return stage(ConvTranspose2d(2 * channels, channels, 4, stride=2, padding=1, bias=False), channels)

        self.main = nn.Sequential(
            *stage(Conv2d(3, width, 7, padding=3, bias=False), width),
            *down(2 * width), *down(4 * width),
            *[ResidualBlock(4 * width) for _ in range(blocks)],
            *up(2 * width), *up(width),
            Conv2d(width, 4, 7, padding=3, bias=False))
        self.compute_dtype = torch.float32

    def forward(self, x: torch.Tensor) -> Translation:
        """x [B, 3, H, W] in [-1, 1]. Raises ValueError for another shape."""
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % 4 or x.shape[3] % 4:
            raise ValueError(f"expected images [B, 3, H, W] with H and W divisible by 4, got {tuple(x.shape)}")
        z = self.main(_enter(x, self.compute_dtype)).float()
        t, m = torch.tanh(z[:, :3]), torch.sigmoid(2 * z[:, 3:])
        return Translation(t, m, m * t + (1 - m) * x)


class Discriminator(nn.Module):
    """The critic: unbounded values [B, 1, H / 2^layers, W / 2^layers]. 44,721,088 parameters by default."""

    def __init__(self, width: int = 64, layers: int = 6, max_width: int = 2048):
        super().__init__()
        channels = [3, *(min(width * 2**i, max_width) for i in range(layers))]
        stages = [(Conv2d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(0.01))
                  for before, after in zip(channels, channels[1:])]
        self.main = nn.Sequential(*(layer for stage in stages for layer in stage))
        self.conv1 = Conv2d(channels[-1], 1, 3, padding=1, bias=False)
        self.compute_dtype = torch.float32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv1(self.main(_enter(x, self.compute_dtype))).float()


def _enter(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    fast = dtype == torch.bfloat16 or (x.device.type == "cpu" and not is_ref())
    layout = torch.channels_last if fast else torch.contiguous_format
    return x.to(dtype).contiguous(memory_format=layout)
