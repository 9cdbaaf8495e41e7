"""What this machine has for the ops, what builds, and whether every kernel agrees with its reference.

    python -m op.doctor

Prints a line for each thing and exits with 0 if everything that is there works, else with 1. A machine without a GPU
is not ill: its kernels are reported as not checked.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from op import build
from op.between import styled_act
from op.bias_act import SQRT2, bias_act
from op.median import median2d
from op.upfirdn2d import binomial_kernel, upfirdn2d

KERNELS = ("bias_act", "median", "styled_act", "upfirdn2d")
LAYOUTS = ("contiguous", "channels_last", "strided")
# Largest error allowed, as a part of the largest value; the second derivative of a square holds several roundings
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
# The cases of the networks (4 x 4 kernel), their gradients' paddings, and odd ones
RESAMPLINGS = (
    (4, 1, 1, (1, 1)), (4, 1, 1, (2, 2)), (4, 2, 1, (2, 1)), (4, 1, 2, (1, 1)), (4, 1, 2, (-1, 3, 2, -2)),
    (4, 2, 1, (-1, 2, 1, 0)), (3, 1, 1, (0, 2)), (5, 3, 2, (2, 4)),
)


def main() -> int:
    for name, text in machine().items():
        print(f"{name:10} {text}")
    healthy = True
    for name, finding, works in checks():
        print(f"{name:24} {finding}", flush=True)
        healthy &= works is not False
    print("all that is there works" if healthy else "NOT well: see above; --ops ref runs without the CUDA kernels")
    return 0 if healthy else 1


def machine() -> dict[str, str]:
    """Versions of what the ops are built with, 'none' where there is none."""
    found = {"torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"}
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    found["GPU"] = ", ".join(f"{gpu.name} (sm_{gpu.major}{gpu.minor})" for gpu in gpus) or "none"
    for name, flag in (("nvcc", "--version"), ("g++", "--version"), ("gcc", "--version")):
        path = shutil.which(name)
        run = path and subprocess.run([path, flag], capture_output=True, text=True)
        lines = [line for line in run.stdout.splitlines() if any(c.isdigit() for c in line)] if run else []
        release = [line for line in lines if "release" in line] or lines
        found[name] = f"{release[0]} ({path})" if release else "none"
    return found


def checks() -> Iterator[tuple[str, str, bool | None]]:
    """Everything that can be checked here: (name, what was found, whether it works or None if it isn't there)."""
    yield "median, C", *_attempt(lambda: check_median(torch.device("cpu"), torch.float32, "cpu"))
    if not torch.cuda.is_available():
        for name in KERNELS:
            yield f"{name}, CUDA", "not checked: torch sees no GPU", None
        return
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        capability = torch.cuda.get_device_capability(device)
        with ThreadPoolExecutor(len(KERNELS)) as pool:
            built = pool.map(lambda name, c=capability: _attempt(lambda: build.load_cuda(name, c) and 0), KERNELS)
        for name, finding in zip(KERNELS, built):
            yield f"{name}, build for sm_{capability[0]}{capability[1]}", *finding
        for dtype in TOLERANCE:
            kind = str(dtype).removeprefix("torch.")
            yield f"median, {kind}", *_attempt(lambda t=dtype, d=device: check_median(d, t, "cuda"))
            yield f"bias_act, {kind}", *_attempt(lambda t=dtype, d=device: check_bias_act(d, t))
            yield f"styled_act, {kind}", *_attempt(lambda t=dtype, d=device: check_styled_act(d, t))
            yield f"upfirdn2d, {kind}", *_attempt(lambda t=dtype, d=device: check_upfirdn2d(d, t))


def _attempt(check: Callable[[], float]) -> tuple[str, bool]:
    """Runs a check that returns its error as a part of the tolerance."""
    start = time.perf_counter()
    try:
        error = check()
    except (build.BuildError, RuntimeError, ValueError) as problem:
        return f"FAILED: {problem}", False
    seconds = time.perf_counter() - start
    return f"{'ok' if error <= 1 else 'DISAGREES'}, {error:.2g} of the tolerance, {seconds:.1f} s", error <= 1


# ---- one op on one device in one dtype, over layouts and odd sizes: its largest error, 1 being the tolerance

def check_median(device: torch.device, dtype: torch.dtype, impl: str) -> float:
    wrong = 0
    for (height, width), size, border in itertools.product(((33, 40), (1, 5)), (3, 19, 35), ("zero", "replicate")):
        x = _random(2, 2, height, width).mul(4).to(dtype)
        x[0, 0] = x[0, 0].round()                                                          # ties
        reference = median2d(x, size, "ref", border)
        for laid_out in (lay_out(x.to(device), layout) for layout in LAYOUTS):
            wrong += (median2d(laid_out, size, impl, border).cpu() != reference).sum().item()
    return float(2 * wrong)


def check_bias_act(device: torch.device, dtype: torch.dtype) -> float:
    errors = [0.0]
    for shape, layout in itertools.product(((3, 5, 7, 9), (2, 16, 6, 5), (3, 8)), LAYOUTS):
        x, bias = _random(*shape).to(device, dtype), _random(shape[1], seed=1).to(device)
        for gain in (SQRT2, 1):                          # a whole number, as styled_act asks for, is handed on too
            errors += relative_errors(lambda *t, gain=gain: bias_act(*t, gain=gain), [lay_out(x, layout), bias])
    return max(errors) / TOLERANCE[dtype]


def check_styled_act(device: torch.device, dtype: torch.dtype) -> float:
    """Over noise of every kind; 8 channels are less than a pack of threads, 40 are not for the kernel."""
    errors = [0.0]
    for (batch, channels, side), layout in itertools.product(((3, 8, 40), (2, 64, 9), (2, 40, 5)), LAYOUTS):
        y, factor = _random(batch, channels, side, side + 1), _random(batch, channels, 1, 1, seed=1)
        strength, bias = _random(1, seed=2).to(device).float(), _random(channels, seed=3).to(device).float()
        leaves = [lay_out(y.to(device, dtype), layout), factor.to(device, dtype), strength, bias]
        for maps in (None, (1, 1), (batch, 1), (1, channels), (batch, channels)):
            noise = [] if maps is None else [_random(*maps, side, side + 1, seed=4).to(device).float()]
            for orders in (1, 2):
                errors += relative_errors(_styled, leaves + noise, orders)
    return max(errors) / TOLERANCE[dtype]


def _styled(y, factor, strength, bias, noise=None):
    return styled_act(y, factor, noise, strength, bias)


def check_upfirdn2d(device: torch.device, dtype: torch.dtype) -> float:
    errors = [0.0]
    for (taps, up, down, pad), (channels, layout) in itertools.product(
        RESAMPLINGS, itertools.product((3, 8), LAYOUTS)
    ):
        x = lay_out(_random(2, channels, 11, 14).to(device, dtype), layout)
        for kernel in (_random(taps, taps, seed=1), binomial_kernel([1, 3, 2, 5, 1][:taps])):
            kernel = kernel.to(device, torch.float32)
            def resample(t, args=(kernel, up, down, pad)):
                return upfirdn2d(t, args[0].to(t.device), *args[1:])

            errors += relative_errors(resample, [x])
    return max(errors) / TOLERANCE[dtype]


def relative_errors(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], orders: int = 2) -> list[float]:
    """Of function(*inputs), its gradient and (orders 2) its second gradient, against doubles on the CPU.

    Each is the largest difference over the largest value.
    """
    results = [gradients(function, leaves, orders) for leaves in (inputs, [t.cpu().double() for t in inputs])]
    return [((ours.cpu().double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)).item()
            for ours, exact in zip(*results)]


def gradients(function, inputs, orders):
    """function(*inputs) and its gradients of an energy by each input: the first, and (orders 2) the second."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = function(*leaves)
    first = torch.autograd.grad(_energy(y), leaves, create_graph=orders > 1, materialize_grads=True)
    second = torch.autograd.grad(sum(map(_energy, first)), leaves, materialize_grads=True) if orders > 1 else ()
    return y.detach(), *(g.detach() for g in first), *second


def _energy(x):
    """Scaled so that two gradients of it stay within float16."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().sum() / x.numel() ** 0.5


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same tensor in memory as named: 'strided' is every second column of a wider one."""
    if layout == "channels_last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return torch.stack([x, x], -1).flatten(-2)[..., ::2] if layout == "strided" else x.contiguous()


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


if __name__ == "__main__":
    sys.exit(main())
