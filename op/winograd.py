"""Convolutions of 3 x 3 with a quarter of the multiplications, for CPUs without a unit for matrices.

Winograd's F(4 x 4, 3 x 3) (Lavin and Gray 2016, arXiv:1509.09308) in C (op/csrc/winograd.c, compiled at first use), for
float32 in channels-last, and its gradients of any order. What PyTorch offers on AVX2 and AVX512 multiplies each weight
with each pixel, at the full rate of the CPU; this takes less than half of its time, for the gradient by the weights a
fifth to two thirds, and is off by some 1e-5 of the largest value (PyTorch by 1e-6); one inf makes its whole tile NaN.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from op.build import load_or_warn
from op.cuda import is_ref, is_watched
from op.threads import spread

NHWC = torch.channels_last
FLAGS = ("-ffp-contract=fast",)  # a product and a sum in one instruction
TILE = 4                        # outputs of a side, from TILE + 2 inputs
PLACES = (TILE + 2) ** 2
LANES, PANEL, GAP = 8, 16, 16   # as winograd.c has them: input channels in LANES, output channels in PANELs
BLOCK, LARGE, LARGE_BLOCK = 24, 1 << 15, 96     # tiles at a time: few, so that what is made of them stays in a cache;
                                # more where the weights, of LARGE inputs times outputs, are what does not
TILES = 96                      # that are worth a thread
SUMS = 1 << 26                  # floats that the threads may add up apart
VECTORS = ("AVX2", "AVX512")    # of CPUs that it is for, by PyTorch's names
# A weight of 3 at the points 0, 1, -1, 2, -2 and infinity
POINTS = ((1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6), (1 / 24, 1 / 12, 1 / 6),
          (1 / 24, -1 / 12, 1 / 6), (0, 0, 1))


def is_for(weight: torch.Tensor) -> bool:
    """Whether convolutions by weight [O, I, k, k] are faster so: float32 on a CPU with AVX2 or AVX512, no autocast.

    With gradients the channels are to be in PANELs on both sides: one of them is a convolution the other way.
    """
    step = PANEL if torch.is_grad_enabled() else LANES
    return (weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.shape[2:] == (3, 3)
            and not weight.shape[0] % PANEL and not weight.shape[1] % step
            and not is_ref() and not is_watched() and not torch.is_autocast_enabled("cpu")
            and torch.backends.cpu.get_cpu_capability() in VECTORS and _library() is not None)


def conv2d(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """F.conv2d(x, weight, padding=1) of x [B, I, H, W] and weight [O, I, 3, 3], with gradients of any order."""
    return _Convolution.apply(x, weight)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return conv3x3(x, transformed(weight, weight.dtype))          # made anew each time, so not in float64

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return (conv2d(grad, _turned(weight)) if ctx.needs_input_grad[0] else None,
                _WeightGradient.apply(x, grad) if ctx.needs_input_grad[1] else None)


class _WeightGradient(torch.autograd.Function):
    """Gradient of conv2d(x, weight) by weight; linear in both x and grad, and so again made of convolutions."""

    @staticmethod
    def forward(ctx, x, grad):
        ctx.save_for_backward(x, grad)
        return weight_gradient(x, grad)

    @staticmethod
    def backward(ctx, weight):
        x, grad = ctx.saved_tensors
        return (conv2d(grad, _turned(weight)) if ctx.needs_input_grad[0] else None,
                conv2d(x, weight) if ctx.needs_input_grad[1] else None)


def _turned(weight: torch.Tensor) -> torch.Tensor:
    """weight of the convolution that goes from the outputs of this one to its inputs."""
    return weight.flip(2, 3).transpose(0, 1)


@torch.autocast("cpu", enabled=False)                    # of which the backward pass may still see one
def transformed(weight: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """weight [O, I, 3, 3] as conv3x3 takes it, [PLACES, O / PANEL, I, PANEL] in float32, computed in dtype."""
    out, into = weight.shape[:2]
    taps = weight.to(dtype).flatten(2).permute(2, 0, 1).flatten(1)                                     # [9, O x I]
    places = _points(taps) @ taps
    return places.float().reshape(PLACES, out // PANEL, PANEL, into).transpose(2, 3).contiguous()


def _points(like: torch.Tensor) -> torch.Tensor:
    """What a kernel [3, 3] is at each place: [PLACES, 9]."""
    points = torch.tensor(POINTS, dtype=torch.float64, device=like.device)
    return torch.kron(points, points).to(like.dtype)


def conv3x3(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """F.conv2d(x, of what `weight` is transformed, padding=1): x [B, I, H, W] -> [B, O, H, W], both channels-last.

    The same to the bit whatever the number of threads.
    """
    _check_devices("conv3x3", x, weight)
    x = x.contiguous(memory_format=NHWC)
    images, into, rows, columns = x.shape
    out = weight.shape[1] * PANEL
    if x.dtype != torch.float32 or weight.shape != (PLACES, out // PANEL, into, PANEL):
        raise ValueError(f"conv3x3: expected float32 with {weight.shape[2]} channels, got {x.dtype} {list(x.shape)}")
    y = torch.empty(images, out, rows, columns, dtype=x.dtype, device=x.device, memory_format=NHWC)

    def run(thread: int, room: torch.Tensor, first: int, last: int, block: int) -> None:
        _library().winograd(x.data_ptr(), weight.data_ptr(), y.data_ptr(), room.data_ptr(), rows, columns, into, out,
                            first, last, block)

    _spread(run, x, out, _threads(x.shape))
    return y


@torch.autocast("cpu", enabled=False)
def weight_gradient(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Gradient of F.conv2d(x, weight, padding=1) by weight, [O, I, 3, 3]: x [B, I, H, W], grad [B, O, H, W].

    Other threads add up in another order.
    """
    _check_devices("weight_gradient", x, grad)
    x, grad = (t.contiguous(memory_format=NHWC) for t in (x, grad))
    (_, into, rows, columns), out = x.shape, grad.shape[1]
    threads = max(1, min(_threads(x.shape), SUMS // (PLACES * into * out)))
    places = torch.zeros(threads, PLACES, into * out, dtype=torch.float32, device=x.device)

    def run(thread: int, room: torch.Tensor, first: int, last: int, block: int) -> None:
        _library().winograd_weight(x.data_ptr(), grad.data_ptr(), places[thread].data_ptr(), room.data_ptr(), rows,
                                   columns, into, out, first, last, block)

    _spread(run, x, out, threads)
    total = places.sum(0)
    found = _points(total).t() @ total
    return found.reshape(3, 3, into, out).permute(3, 2, 0, 1)


def _check_devices(name: str, x: torch.Tensor, other: torch.Tensor) -> None:
    if not (x.is_cpu and other.is_cpu):
        raise ValueError(f"{name}: expected tensors on the CPU, got them on {x.device} and {other.device}")


def _tiles(shape: torch.Size) -> int:
    images, _, rows, columns = shape
    return images * -(-rows // TILE) * -(-columns // TILE)


def _threads(shape: torch.Size) -> int:
    return max(1, min(torch.get_num_threads(), _tiles(shape) // TILES))


def _spread(run: Callable[..., None], x: torch.Tensor, out: int, threads: int) -> None:
    """run(thread, room, first, last, block) for the tiles of x."""
    tiles, into = _tiles(x.shape), x.shape[1]
    block = BLOCK if into * out < LARGE else LARGE_BLOCK
    room = torch.empty(threads, PLACES * (block * (into + out) + 2 * GAP), dtype=torch.float32, device=x.device)

    spread(lambda thread, first, last: run(thread, room[thread], first, last, block), tiles, threads)


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = load_or_warn("winograd", "convolutions of 3 x 3 run in PyTorch, slower", *FLAGS)
    if library is None:
        return None
    for function in (library.winograd, library.winograd_weight):
        function.argtypes, function.restype = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 7, None
    return library
