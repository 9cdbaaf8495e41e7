"""HU to three windowed channels in [-1, 1] and back (Lee et al., Nature Communications 13:4251, 2022).

The paper averages the HU estimates of the channels that are not clipped at a pixel. Here the finest channel
that is not clipped wins, for two reasons: through 8-bit pictures an average with the four times coarser
-20..180 channel can miss by more than the finest channel's own step, and a generator errs about equally in
[-1, 1] in every channel, so the narrowest window has the least error in HU. On consistent channels the two
rules agree.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch

Array = TypeVar("Array", np.ndarray, torch.Tensor)

WINDOWS_HU = ((5, 55), (0, 80), (-20, 180))             # finest first and nested, as decode needs them
BONE_HU = 95.0                                          # blood does not reach it
_STEP_8BIT = 2 / 255                                    # one grey level of an 8-bit picture, within [-1, 1]


def encode(hu: Array) -> Array:
    """HU [..., H, W] -> [..., 3, H, W] in [-1, 1], one channel a window of WINDOWS_HU, clipped at its ends.

    Takes and gives numpy arrays or torch tensors (any device, differentiable). A float dtype is kept,
    integers become float32.
    """
    xp = _namespace(hu)
    hu = _as_float(hu)
    channels = [xp.clip((hu - low) * (2 / (high - low)) - 1, -1, 1) for low, high in WINDOWS_HU]
    return xp.stack(channels, axis=-3)


def decode(x: Array) -> Array:
    """Channels [..., 3, H, W] in [-1, 1] -> HU [..., H, W] in -20..180; encode's exact inverse in that range.

    From the coarsest channel to the finest, each replaces the estimate so far where it is not clipped
    (|x| < 1; in 8 bits neither 0 nor 255). A clipped channel still bounds the estimate: HU is at least its
    high end, or at most its low end. Where all are clipped the outermost bound remains. So 8-bit pictures
    come back to within half a step of the finest window that covers the HU.

    The change from one channel to the next is spread over the last 8-bit step before the clip, so that
    decode is continuous on a generator's channels, which do not quite agree; 8-bit levels and consistent
    channels are not touched by this.

    Raises ValueError if the third axis from the end is not of length 3.
    """
    xp = _namespace(x)
    if x.ndim < 3 or x.shape[-3] != len(WINDOWS_HU):
        raise ValueError(f"decode: expected channels [..., {len(WINDOWS_HU)}, H, W], got {tuple(x.shape)}")
    x = xp.clip(_as_float(x), -1, 1)
    hu = _channel_hu(x, len(WINDOWS_HU) - 1)
    for c in reversed(range(len(WINDOWS_HU) - 1)):
        own, level = _channel_hu(x, c), x[..., c, :, :]
        unclipped = xp.clip((1 - abs(level)) / _STEP_8BIT, 0, 1)
        side = xp.sign(level)                            # the larger of both, or where it is negative, the smaller:
        bounded = side * xp.maximum(side * hu, side * own)             # for torch, ten times as fast as to choose
        hu = bounded + unclipped * (own - bounded)
    return hu


def _channel_hu(x: Array, c: int) -> Array:
    low, high = WINDOWS_HU[c]
    return low + (x[..., c, :, :] + 1) * ((high - low) / 2)


def _namespace(x: Array):
    return torch if isinstance(x, torch.Tensor) else np


def _as_float(x: Array) -> Array:
    if isinstance(x, torch.Tensor):
        return x if x.is_floating_point() else x.float()
    return x if np.issubdtype(x.dtype, np.floating) else x.astype(np.float32)
