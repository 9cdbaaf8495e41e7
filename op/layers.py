"""The layers of StyleGAN2 (Karras et al. 2020), of which model.py is made: parameters in float32, names as released.

Weights have the equalised learning rate: they are normal at the start, and scaled by 1 / sqrt(inputs) when used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from op.between import enlarged_beside, scaled_sum, styled_act
from op.bias_act import SQRT2, bias_act
from op.conv import conv2d, ready
from op.cuda import is_watched
from op.modulated_conv import folding_pays, modulated_conv2d, modulated_product, prepared
from op.upfirdn2d import binomial_kernel, upfirdn2d


class Kept:
    """What is made of a parameter that is not trained, kept as long as it stays as it is and no gradient is asked for.

    Whether it does is told by its version, which a fused optimiser does not count up: so nothing that is trained, and
    what was kept before a training is forgotten in it. Changes to `.data` are not counted either: none on a frozen
    network.
    """

    def __init__(self):
        self.found = None, None

    def __call__(self, parameter: torch.Tensor, how: Hashable, make: Callable[[], Any]) -> Any:
        """make(), or what it gave for the same `how`."""
        if torch.is_grad_enabled() or parameter.requires_grad or is_watched():
            if parameter.requires_grad:
                self.found = None, None
            return make()
        if parameter.is_inference():                     # made in torch.inference_mode(): has no version
            return make()
        key = parameter.data_ptr(), parameter._version, how
        found = self.found                               # another thread may replace it
        if found[0] != key:
            self.found = found = key, make()
        return found[1]


class PixelNorm(nn.Module):
    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


class EqualLinear(nn.Module):
    """Linear layer with the equalised learning rate; `activate` adds leaky ReLU 0.2 with gain sqrt 2."""

    def __init__(self, in_dim, out_dim, bias_init=0.0, lr_mul=1.0, activate=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim) / lr_mul)
        self.bias = nn.Parameter(torch.full((out_dim,), float(bias_init)))
        self.scale, self.lr_mul, self.activate = lr_mul / math.sqrt(in_dim), lr_mul, activate
        self.kept = Kept()

    def forward(self, x):
        weight, bias = self.kept(self.weight, None, lambda: self.weight * self.scale), self.bias * self.lr_mul
        if self.activate:
            return bias_act(F.linear(x, weight), bias)
        return F.linear(x, weight, bias)


class EqualConv2d(nn.Module):
    def __init__(self, in_ch, out_ch, kernel, stride=1, padding=0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_ch, in_ch, kernel, kernel))
        self.scale, self.stride, self.padding = 1 / math.sqrt(in_ch * kernel**2), stride, padding
        self.kept = Kept()

    def forward(self, x):
        return self.parts(x, 1)[0]

    def parts(self, x, count):
        """forward(x) in so many parts of its channels, each in memory of its own."""
        weights = self.kept(self.weight, (x.dtype, count), lambda: [
            ready(part, x.dtype, self.stride == 1) for part in (self.weight * self.scale).chunk(count)])
        return [conv2d(x, weight, self.stride, self.padding) for weight in weights]


class Blur(nn.Module):
    """Binomial filter 1-3-3-1. pad: (before, after) on both axes; upsample_factor restores the energy."""

    def __init__(self, pad, upsample_factor=1, down=1):
        super().__init__()
        self.register_buffer("kernel", binomial_kernel(gain=upsample_factor**2))
        self.pad, self.down = pad, down

    def forward(self, x):
        return upfirdn2d(x, self.kernel, down=self.down, pad=self.pad)


class Upsample(nn.Module):
    """Twofold upsampling with the binomial filter: [B, C, H, W] -> [B, C, 2H, 2W]."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", binomial_kernel(gain=4))

    def forward(self, x):
        return upfirdn2d(x, self.kernel, up=2, pad=(2, 1))

    def beside(self, x, other):
        """forward(x) and other [B, O, 2H, 2W], their channels side by side."""
        return enlarged_beside(x, other, self.kernel)


class FusedLeakyReLU(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return bias_act(x, self.bias)


class NoiseInjection(nn.Module):
    """Holds the noise strength of one layer; the addition is folded into StyledConv's pass."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


class ModulatedConv2d(nn.Module):
    def __init__(self, in_ch, out_ch, kernel, style_dim, demodulate=True, upsample=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, out_ch, in_ch, kernel, kernel))
        self.modulation = EqualLinear(style_dim, in_ch, bias_init=1)
        self.scale, self.demodulate, self.upsample = 1 / math.sqrt(in_ch * kernel**2), demodulate, upsample
        self.kept = Kept()
        if upsample:
            self.blur = Blur(pad=(1, 1), upsample_factor=2)

    def forward(self, x, style, modulated=False):
        """x [B, I, H, W], style of modulation() [B, I], modulated: x is multiplied by it already.

        Gives (y, demodulation factor [B, O, 1, 1] or None); y may be folded, as that of op.modulated_conv2d.
        """
        fold = self.upsample and folding_pays(x, self.weight[0])
        weight = self.kept(self.weight, (x.dtype, fold), lambda: prepared(
            self.weight[0] * self.scale, x.dtype, self.demodulate, self.blur.kernel if fold else None,
            self.upsample and not fold))
        y, factor = modulated_conv2d(x, weight, style, self.upsample, modulated)
        return (self.blur(y) if self.upsample and not fold else y), factor


class StyledConv(nn.Module):
    """Modulated convolution, noise, bias and activation; factors are folded so that each pass does two things."""

    def __init__(self, in_ch, out_ch, style_dim, upsample=False):
        super().__init__()
        self.conv = ModulatedConv2d(in_ch, out_ch, 3, style_dim, upsample=upsample)
        self.noise = NoiseInjection()
        self.activate = FusedLeakyReLU(out_ch)

    def style(self, w):
        """w [B, style_dim] -> what the input is multiplied by, [B, I]."""
        return self.conv.modulation(w)

    def forward(self, x, style, noise, modulated=False, then=None):
        """noise: as op.styled_act's; modulated: x is multiplied by style; then [B, O]: the output is to be, by that."""
        y, factor = self.conv(x, style, modulated)       # leaky ReLU is homogeneous: its gain rides on the factors
        return styled_act(y, factor * SQRT2, noise, self.noise.weight * SQRT2, self.activate.bias * SQRT2,
                          then=None if then is None else then[:, :, None, None])


class ToRGB(nn.Module):
    """With fold 2 a pixel of x becomes 2 x 2 of the image."""

    def __init__(self, in_ch, style_dim, upsample=True, fold=1):
        super().__init__()
        if upsample:
            self.upsample = Upsample()
        self.conv, self.fold = ModulatedConv2d(in_ch, 3 * fold**2, 1, style_dim, demodulate=False), fold
        self.bias = nn.Parameter(torch.zeros(1, 3 * fold**2, 1, 1))

    def forward(self, x, w, skip):
        y = modulated_product(x, self.conv.weight[0, :, :, 0, 0] * self.conv.scale, self.conv.modulation(w))
        y = y.float() + self.bias                        # the image is summed in float32 in every precision
        if self.fold > 1:
            y = F.pixel_shuffle(y, self.fold)
        return y if skip is None else y + self.upsample(skip)


class ConvLayer(nn.Sequential):
    """[blur], convolution, [bias and activation]. A 1x1 downsampling filters only the samples that are kept."""

    def __init__(self, in_ch, out_ch, kernel, downsample=False, activate=True):
        layers = []
        if downsample:
            total = 2 + kernel - 1
            keep_in_blur = kernel == 1
            layers.append(Blur(pad=((total + 1) // 2, total // 2), down=2 if keep_in_blur else 1))
            layers.append(EqualConv2d(in_ch, out_ch, kernel, stride=1 if keep_in_blur else 2))
        else:
            layers.append(EqualConv2d(in_ch, out_ch, kernel, padding=kernel // 2))
        if activate:
            layers.append(FusedLeakyReLU(out_ch))
        super().__init__(*layers)


class ResBlock(nn.Module):
    def __init__(self, in_ch, out_ch):
        super().__init__()
        self.conv1 = ConvLayer(in_ch, in_ch, 3)
        self.conv2 = ConvLayer(in_ch, out_ch, 3, downsample=True)
        self.skip = ConvLayer(in_ch, out_ch, 1, downsample=True, activate=False)

    def forward(self, x):
        return scaled_sum(self.conv2(self.conv1(x)), self.skip(x), 1 / SQRT2)


def minibatch_stddev(x: torch.Tensor, group: int) -> torch.Tensor:
    """Append one channel with the mean standard deviation over groups of samples (Karras et al. 2018, section 3).

    x [B, C, H, W] -> [B, C + 1, H, W]. Group j holds the samples j, j + B/group, j + 2B/group, ...
    """
    b, _, h, w = x.shape
    std = torch.sqrt(x.float().reshape(group, b // group, -1).var(0, unbiased=False) + 1e-8).mean(1)
    return torch.cat([x, std.to(x.dtype).repeat(group).reshape(b, 1, 1, 1).expand(b, 1, h, w)], 1)
