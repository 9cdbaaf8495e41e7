"""The published forward pass on our parameters: what benchmarks/speed.py compares with.

As released (Karras et al. 2020 and the PyTorch code of Lee et al. 2022): one weight a sample in a grouped
convolution, filters as zero insertion, padding and a plain convolution, bias, activation and gain one after the
other, float32, contiguous. Same architecture, same state dict, the same numbers up to rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from model import Discriminator, Generator, ToRGB
from op.bias_act import SQRT2
from op.modulated_conv import modulated_conv2d_ref


def plain_upfirdn2d(x: torch.Tensor, kernel: torch.Tensor, up: int = 1, down: int = 1, pad=(0, 0)) -> torch.Tensor:
    """upfirdn2d of x [B, C, H, W] with a symmetric kernel, as the released code does without its CUDA extension."""
    b, c, h, w = x.shape
    x = F.pad(x.reshape(-1, 1, h, 1, w, 1), (0, up - 1, 0, 0, 0, up - 1)).reshape(-1, 1, h * up, w * up)
    y = F.conv2d(F.pad(x, (pad[0], pad[1], pad[0], pad[1])), kernel.flip(0, 1)[None, None])[:, :, ::down, ::down]
    return y.reshape(b, c, *y.shape[2:])


def plain_bias_act(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(x + bias.reshape(1, -1, *[1] * (x.ndim - 2)), 0.2) * SQRT2


class ReferenceGenerator(Generator):
    """Generator whose synthesis is the published one."""

    def synthesis(self, w_plus: torch.Tensor, noise="random") -> torch.Tensor:
        if w_plus.ndim == 2:
            w_plus = w_plus[:, None].expand(-1, self.config.n_latent, -1)
        maps, w = self.noise_maps(noise, len(w_plus)), w_plus.unbind(1)
        x = self.input.input.repeat(len(w_plus), 1, 1, 1)
        x = _styled(self.conv1, x, w[0], maps[0])
        image = _to_rgb(self.to_rgb1, x, w[1], None)
        for i, to_rgb in enumerate(self.to_rgbs):
            x = _styled(self.convs[2 * i], x, w[2 * i + 1], maps[2 * i + 1])
            x = _styled(self.convs[2 * i + 1], x, w[2 * i + 2], maps[2 * i + 2])
            image = _to_rgb(to_rgb, x, w[2 * i + 3], image)
        return image if self.config.fold == 1 else _to_rgb(self.to_fine, x, w[-1], image)


class ReferenceDiscriminator(Discriminator):
    """Discriminator whose trunk is the published one."""

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        x, stages = _conv_layer(self.convs[0], F.pixel_unshuffle(images, self.config.fold)), []
        stages.append(x)
        for block in self.convs[1:]:
            y = _conv_layer(block.conv2, _conv_layer(block.conv1, x))
            x = (y + _conv_layer(block.skip, x)) / SQRT2
            stages.append(x)
        return stages


def _modulated(conv, x, w):
    y = modulated_conv2d_ref(x, conv.weight[0] * conv.scale, conv.modulation(w), conv.demodulate, conv.upsample)
    return plain_upfirdn2d(y, conv.blur.kernel, pad=conv.blur.pad) if conv.upsample else y


def _styled(layer, x, w, noise):
    y = _modulated(layer.conv, x, w)
    if noise is not None:
        y = y + layer.noise.weight * noise
    return plain_bias_act(y, layer.activate.bias)


def _to_rgb(layer: ToRGB, x, w, skip):
    y = F.pixel_shuffle(_modulated(layer.conv, x, w) + layer.bias, layer.fold)
    return y if skip is None else y + plain_upfirdn2d(skip, layer.upsample.kernel, up=2, pad=(2, 1))


def _conv_layer(layer, x):
    """Blur (kept in full), convolution of stride 2 where the layer downsamples, bias and activation."""
    stride = 1
    for part in layer:
        if hasattr(part, "kernel"):
            x, stride = plain_upfirdn2d(x, part.kernel, pad=part.pad), 2
        elif hasattr(part, "scale"):
            x = F.conv2d(x, part.weight * part.scale, stride=stride, padding=part.padding)
        else:
            x = plain_bias_act(x, part.bias)
    return x
