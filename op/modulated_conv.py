"""Modulated convolution with one shared-weight convolution for the whole batch.

The released form builds one weight per sample and runs a grouped convolution. Scaling the input channels by the
style and the output channels by the demodulation factor is the same function (Karras et al. 2020, eq. 1 and 3):
    w'_ijk = s_i w_ijk,   y_j = (w' * x)_j / sqrt(sum_ik w'_ijk^2 + 1e-8) = d_j (w * (s x))_j
and lets the batch share one large convolution.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from op import winograd
from op.conv import Ready, conv2d, ready
from op.cuda import is_ref

FOLD_FROM = 8                                 # pixels of a side: of smaller ones the weights are most of the work
FOLD_TILES_FROM = 32                          # of op/winograd.py


@dataclass(frozen=True)
class Weight:
    """Of one modulated convolution, as modulated_conv2d takes it."""

    kernel: Ready                             # [O, I, k, k], or folded [4 O, I, k, k]
    energy: torch.Tensor | None               # [O, I], float32 or wider, for the demodulation; None without one
    folded: bool = False


def prepared(weight: torch.Tensor, dtype: torch.dtype, demodulate: bool = True,
             upsample: torch.Tensor | None = None, transposed: bool = False) -> Weight:
    """weight [O, I, k, k], with its gain, for convolutions in dtype; upsample: the filter after it, to be folded in.

    transposed: for a transposed convolution, without that filter.

    The energy is computed in float32 (float64 for a double weight) whatever dtype is.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    energy = weight.to(wide).square().sum((2, 3)) if demodulate else None
    kernel = weight if upsample is None else folded(weight, upsample)
    return Weight(ready(kernel, dtype, not transposed), energy, upsample is not None)


def folded(weight: torch.Tensor, blur: torch.Tensor) -> torch.Tensor:
    """[4 O, I, 3, 3]: a transposed convolution of stride 2 by weight [O, I, 3, 3] and the filter blur [4, 4] after it.

    Each of 2 x 2 pixels that one becomes hangs on its 3 x 3 neighbours: as one convolution without stride, that is four
    times the operations, and for a matrix unit still less work than the transposed convolution and the filter.
    """
    out, into = weight.shape[:2]
    tap = torch.eye(9, dtype=weight.dtype, device=weight.device).reshape(9, 1, 3, 3)
    both = F.conv2d(tap, blur.to(weight)[None, None], padding=3)                       # of each tap, [9, 1, 6, 6]
    phases = both.reshape(9, 3, 2, 3, 2).flip(1, 3)                    # both[2 j + p], where p is which of the 2 pixels
    taps = phases.permute(2, 4, 1, 3, 0).reshape(4 * 9, 9)
    kernel = taps @ weight.permute(0, 2, 3, 1).reshape(out, 9, into)                                 # [O, 4 x 9, I]
    return kernel.reshape(out, 4, 9 * into).transpose(0, 1).reshape(4 * out, 3, 3, into).permute(0, 3, 1, 2)


def folding_pays(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the transposed convolution of x [B, I, H, W] by weight [O, I, 3, 3] is better folded.

    Without gradients: on a CPU with AMX in bfloat16, and in float32 where a quarter of the operations is enough.
    """
    if (x.device.type != "cpu" or is_ref()
            or torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return False
    if x.dtype == torch.bfloat16:
        return x.shape[-1] >= FOLD_FROM and has_matrix_unit()
    return x.dtype == torch.float32 and x.shape[-1] >= FOLD_TILES_FROM and winograd.is_for(weight)


@functools.cache
def has_matrix_unit() -> bool:
    """Whether this CPU multiplies bfloat16 in tiles (AMX)."""
    return torch.cpu.get_capabilities().get("amx_bf16", False)


def unfolded(y: torch.Tensor) -> torch.Tensor:
    """[B, 4 C, H, W], 2 x 2 pixels at once, as [B, C, 2 H, 2 W]."""
    y = y.unflatten(1, (2, 2, y.shape[1] // 4)).permute(0, 3, 4, 1, 5, 2)
    return y.flatten(4, 5).flatten(2, 3).contiguous(memory_format=torch.channels_last)


def modulated_conv2d(
    x: torch.Tensor, weight: Weight, style: torch.Tensor, upsample: bool = False, modulated: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [B, I, H, W], style [B, I] -> (y [B, O, H', W'], demodulation [B, O, 1, 1] or None). modulated: x is already.

    y is not yet demodulated: the caller folds the factor into its next pass. Padding k // 2; with `upsample` a
    transposed convolution of stride 2 without padding (H' = 2 H + k - 2), to be blurred by the caller, but for a folded
    weight y [B, 4 O, H, W], that is blurred and to be unfolded. The factor is in float32 or wider before it is
    rounded.
    """
    factor = None
    if weight.energy is not None:
        factor = torch.rsqrt(style.to(weight.energy.dtype).square() @ weight.energy.t() + 1e-8)     # (B, O)
        factor = factor[:, :, None, None].to(x.dtype)
    if not modulated:
        x = x * style[:, :, None, None].to(x.dtype)
    if upsample and not weight.folded:
        y = F.conv_transpose2d(x, weight.kernel.weight.transpose(0, 1), stride=2)
    else:
        y = conv2d(x, weight.kernel, padding=weight.kernel.weight.shape[-1] // 2)
    return y, factor


def modulated_product(x: torch.Tensor, weight: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
    """A modulated convolution of 1 x 1 to a few channels, not demodulated: x [B, I, H, W], weight [O, I], style [B, I].

    Gives [B, O, H, W]. It is x that is large here, so the weights are scaled, and each sample has a matrix of its own.
    """
    weights = (weight * style[:, None]).to(x.dtype)                                             # (B, O, I)
    y = x.permute(0, 2, 3, 1).flatten(1, 2) @ weights.transpose(1, 2)
    return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def modulated_conv2d_ref(x, weight, style, demodulate=True, upsample=False):
    """The published form, one weight a sample in a grouped convolution; demodulated. For tests and benchmarks."""
    b, i, h, w = x.shape
    o, _, k, _ = weight.shape
    per_sample = weight[None] * style[:, None, :, None, None]                 # (B, O, I, k, k)
    if demodulate:
        per_sample = per_sample * torch.rsqrt(per_sample.square().sum((2, 3, 4), keepdim=True) + 1e-8)
    x = x.reshape(1, b * i, h, w)
    if upsample:
        y = F.conv_transpose2d(x, per_sample.transpose(1, 2).reshape(b * i, o, k, k), stride=2, groups=b)
    else:
        y = F.conv2d(x, per_sample.reshape(b * o, i, k, k), padding=k // 2, groups=b)
    return y.reshape(b, o, *y.shape[2:])
