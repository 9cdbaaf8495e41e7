"""Convolutions of 3 x 3 with a quarter of the multiplications, for CPUs without a unit for matrices.

Winograd's F(4 x 4, 3 x 3) (Lavin and Gray 2016, arXiv:1509.09308) in C (op/csrc/winograd.c, compiled at first use), for
float32 in channels-last, where no gradient is asked for. What PyTorch offers on AVX2 multiplies each weight with each
pixel, at the full rate of the CPU; this takes less than half of its time, and differs by some 1e-5 of the largest value
(PyTorch itself by 1e-6).
"""

from __future__ import annotations

import ctypes
import functools

import torch

from op.build import BuildError, load_c
from op.cuda import is_ref
from op.fused import pool

TILE = 4                        # outputs of a side, from TILE + 2 inputs
PLACES = (TILE + 2) ** 2
LANES, PANEL, GAP = 8, 16, 16   # as winograd.c has them: input channels in LANES, output channels in PANELs
BLOCK, LARGE, LARGE_BLOCK = 24, 1 << 15, 96     # tiles at a time: few, so that what is made of them stays in a cache;
                                # more where the weights, of LARGE inputs times outputs, are what does not
TILES = 96                      # that are worth a thread
# A weight of 3 at the points 0, 1, -1, 2, -2 and infinity
POINTS = ((1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6), (1 / 24, 1 / 12, 1 / 6),
          (1 / 24, -1 / 12, 1 / 6), (0, 0, 1))


def is_for(weight: torch.Tensor) -> bool:
    """Whether convolutions by weight [O, I, k, k] are faster so: float32 on a CPU with AVX2 and no wider vectors."""
    return (weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.shape[2:] == (3, 3)
            and not weight.shape[0] % PANEL and not weight.shape[1] % LANES and not torch.is_grad_enabled()
            and not is_ref() and not torch.compiler.is_compiling()
            and torch.backends.cpu.get_cpu_capability() == "AVX2" and _library() is not None)


def transformed(weight: torch.Tensor) -> torch.Tensor:
    """weight [O, I, 3, 3] as conv3x3 takes it, [PLACES, O / PANEL, I, PANEL]."""
    out, into = weight.shape[:2]
    points = torch.tensor(POINTS, dtype=torch.float64)
    places = torch.kron(points, points) @ weight.double().flatten(2).permute(2, 0, 1).flatten(1)   # [PLACES, O x I]
    return places.to(weight.dtype).reshape(PLACES, out // PANEL, PANEL, into).transpose(2, 3).contiguous()


def conv3x3(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """F.conv2d(x, of what `weight` is transformed, padding=1): x [B, I, H, W] -> [B, O, H, W], both channels-last.

    The same to the bit whatever the number of threads.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    images, into, rows, columns = x.shape
    out = weight.shape[1] * PANEL
    if x.dtype != torch.float32 or weight.shape != (PLACES, out // PANEL, into, PANEL):
        raise ValueError(f"conv3x3: expected float32 with {weight.shape[2]} channels, got {x.dtype} {list(x.shape)}")
    y = torch.empty(images, out, rows, columns, memory_format=torch.channels_last)
    tiles = images * -(-rows // TILE) * -(-columns // TILE)
    threads = max(1, min(torch.get_num_threads(), tiles // TILES))
    block = BLOCK if into * out < LARGE else LARGE_BLOCK
    room = torch.empty(threads, PLACES * (block * (into + out) + 2 * GAP))

    def run(thread: int) -> None:
        first, last = tiles * thread // threads, tiles * (thread + 1) // threads
        _library().winograd(x.data_ptr(), weight.data_ptr(), y.data_ptr(), room[thread].data_ptr(), rows, columns, into,
                            out, first, last, block)

    if threads == 1:
        run(0)
    else:
        list(pool(torch.get_num_threads()).map(run, range(threads)))
    return y


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = load_c("winograd", "-ffp-contract=fast")            # a product and a sum in one instruction
    except BuildError:
        return None                                                   # op.median warns of it
    library.winograd.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 7
    library.winograd.restype = None
    return library
