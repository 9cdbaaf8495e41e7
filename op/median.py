"""Exact two-dimensional median filter, which smooths the residual at every step of the projection (19 x 19 at 512).

`cpu` (op/csrc/median.c) and `cuda` (op/csrc/median.cu) are the fast ones, compiled at first use; `scipy` is for
machines without a compiler; `ref` is the definition: a copy of every window, some rows at a time, on any device. All
give the same numbers.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from op.banded import dilated
from op.build import load_c, load_or_warn
from op.cuda import DTYPES, NAMESPACE, choose, is_watched, launch
from op.threads import spread

IMPLS = ("auto", "cpu", "scipy", "cuda", "ref")
BORDERS = {"zero": "constant", "replicate": "replicate"}
REF_BYTES = 1 << 28  # of window copies at a time in `ref`


def median2d(x: torch.Tensor, size: int, impl: str = "auto", border: str = "zero") -> torch.Tensor:
    """Median of the size x size window around each pixel. x float [..., H, W]; same shape, dtype and device.

    border: what lies outside the picture. 'zero', as in the paper's code: nothing is lost, as the residual outside
    the brain is zero anyway. 'replicate': the nearest pixel. size may exceed the picture. No gradient flows.

    impl: 'auto' takes 'cpu' for a tensor on the CPU ('scipy', with a warning, where that cannot be built), 'cuda' for
    one on a CUDA device ('ref' after op.set_impl('ref')) and 'ref' on any other. 'cpu' and 'cuda' raise
    op.build.BuildError where they cannot be built; 'cpu' spreads the planes over torch.get_num_threads() threads.

    Raises ValueError for an even size, a tensor that isn't floating, an impl that can't work there, and for NaN;
    but on a CUDA device the median of a window with NaN is NaN, since to find out would make the GPU wait.
    """
    _check(x, size, impl, border)
    if impl == "auto" and x.device.type != "cpu":
        impl = choose("median2d", impl, x)
    call = _registered if is_watched() else _median2d     # eagerly it would import torch's compiler
    return call(x.detach(), size, impl, border)


def _median2d(x, size, impl, border):
    if not x.is_cuda and torch.isnan(x).any():
        raise ValueError("median2d: the input holds NaN, and the median of such a window is undefined")
    if size == 1 or x.numel() == 0:
        return x.clone(memory_format=torch.contiguous_format)
    if impl == "auto":
        impl = _best_cpu_impl()
    planes = x.reshape(-1, *x.shape[-2:])
    if impl == "cuda":
        return _median_cuda(planes.contiguous(), size, border).reshape(x.shape)
    if planes.dtype in (torch.float16, torch.bfloat16):
        planes = planes.float()
    margin = size // 2
    padded = F.pad(planes[None], (margin,) * 4, mode=BORDERS[border])[0].contiguous()
    median = {"cpu": _median_cpu, "scipy": _median_scipy, "ref": _median_ref}[impl](padded, size)
    return median.to(x.dtype).reshape(x.shape)


_registered = torch.library.custom_op(f"{NAMESPACE}::median2d", _median2d, mutates_args=(),
                                      schema="(Tensor x, int size, str impl, str border) -> Tensor")


@_registered.register_fake
def _(x, size, impl, border):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _check(x: torch.Tensor, size: int, impl: str, border: str) -> None:
    if not isinstance(size, int) or size < 1 or size % 2 == 0:
        raise ValueError(f"median2d: size must be an odd number of pixels, got {size!r}")
    if impl not in IMPLS:
        raise ValueError(f"median2d: impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if border not in BORDERS:
        raise ValueError(f"median2d: border must be one of {', '.join(BORDERS)}, got {border!r}")
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"median2d: expected a floating tensor [..., H, W], got {x.dtype} {tuple(x.shape)}")
    if impl in ("cpu", "scipy") and x.device.type != "cpu":
        raise ValueError(f"median2d: impl={impl!r} needs a tensor on the CPU, got one on {x.device}; use 'auto'")
    if impl == "cuda":
        choose("median2d", impl, x)


@functools.cache                                          # also that it cannot be built: to try takes a compiler's time
def _best_cpu_impl() -> str:
    found = load_or_warn("median", "median2d runs on scipy, about 30 times slower at size 19")
    return "scipy" if found is None else "cpu"


# --- on a GPU: [P, H, W] -> [P, H, W] ---


def _median_cuda(planes: torch.Tensor, size: int, border: str) -> torch.Tensor:
    if planes.dtype == torch.float64:
        return torch.stack([_median_cuda_double(plane, size, border) for plane in planes])
    count, height, width = planes.shape
    if height * width >= 1 << 31:
        raise ValueError(f"median2d: a plane may have 2**31 - 1 pixels, got {height} x {width}")
    out = torch.empty_like(planes)
    launch("median", planes, planes, out, DTYPES[planes.dtype], count, height, width, size, int(border == "replicate"))
    return out


def _median_cuda_double(plane: torch.Tensor, size: int, border: str) -> torch.Tensor:
    """As _median_double. A zero border has a rank too, and is laid round the plane before ranking."""
    margin = size // 2
    padded = F.pad(plane[None], (margin,) * 4, mode=BORDERS[border])[0]
    median = _by_rank(padded, lambda ranks: _median_cuda(ranks, size, border)[:, margin:-margin, margin:-margin])
    return median.masked_fill(dilated(plane.isnan(), margin), torch.nan)              # whose ranks are numbers


# --- the others: padded float [P, H + size - 1, W + size - 1] -> [P, H, W] ---


def _median_ref(padded: torch.Tensor, size: int) -> torch.Tensor:
    planes, height, width = padded.shape[0], padded.shape[1] - size + 1, padded.shape[2] - size + 1
    rows = max(1, REF_BYTES // (planes * width * size * size * padded.element_size()))
    medians = []
    for top in range(0, height, rows):
        windows = padded[:, top:top + rows + size - 1].unfold(1, size, 1).unfold(2, size, 1)
        medians.append(windows.flatten(-2).median(-1).values)  # (P, rows, W, size * size)
    return torch.cat(medians, dim=1)


def _median_scipy(padded: torch.Tensor, size: int) -> torch.Tensor:
    margin = size // 2
    inside = slice(margin, -margin)
    return torch.from_numpy(np.stack([ndimage.median_filter(p, size)[inside, inside] for p in padded.numpy()]))


def _median_cpu(padded: torch.Tensor, size: int) -> torch.Tensor:
    if padded.dtype == torch.float64:
        return torch.stack([_median_double(plane, size) for plane in padded])
    planes, height, width = padded.shape[0], padded.shape[1] - size + 1, padded.shape[2] - size + 1
    out = padded.new_empty(planes, height, width)
    median = load_c("median").median2d
    median.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 3 + [ctypes.c_int]
    threads = min(torch.get_num_threads(), planes)

    def run(_: int, first: int, last: int) -> int:
        return median(padded[first:].data_ptr(), out[first:].data_ptr(), last - first, height, width, size)

    if any(spread(run, planes, threads)):
        raise MemoryError(f"median2d: no memory for windows of {size} x {size} pixels")
    return out


def _median_double(plane: torch.Tensor, size: int) -> torch.Tensor:
    return _by_rank(plane, lambda ranks: _median_cpu(ranks, size))


def _by_rank(plane: torch.Tensor, median: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A plane of doubles: the median commutes with ranking, and ranks below 2**24 are exact as 32-bit floats."""
    values, rank = plane.unique(return_inverse=True)
    if len(values) >= 1 << 24:
        raise ValueError(f"median2d: {len(values)} different doubles in a plane, 2**24 at most; pass float32")
    return values[median(rank.float()[None])[0].long()]
