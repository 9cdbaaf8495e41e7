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
import torch.nn.functional as F

from op import build, fused, winograd
from op.between import enlarged_beside, scaled_sum, styled_act
from op.bias_act import SQRT2, bias_act
from op.median import median2d
from op.upfirdn2d import binomial_kernel, upfirdn2d

KERNELS = ("bias_act", "median", "styled_act", "upfirdn2d")
LAYOUTS = ("contiguous", "channels_last", "strided")
# Largest error allowed, as a part of the largest value: some 16 to 20 units of rounding in half precision, where the
# second derivative of a square holds about as many roundings one after the other, and more in float32 and float64
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
WINOGRAD_TOLERANCE = 1e-4                                # it subtracts large numbers, twice for a second derivative
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
    print("all that is there works" if healthy else
          "NOT well: see above; --ops ref runs without the kernels, but for a CPU's median")
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
    for dtype in fused.FLAGS:
        kind = str(dtype).removeprefix("torch.")
        yield f"fused {kind}, C", *_attempt(lambda t=dtype: check_fused(t))
    yield "winograd, C", *_attempt(check_winograd)
    if not torch.cuda.is_available():
        for name in KERNELS:
            yield f"{name}, CUDA", "not checked: torch sees no GPU", None
        return
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        capability = torch.cuda.get_device_capability(device)
        with ThreadPoolExecutor(len(KERNELS)) as pool:
            built = pool.map(lambda name, c=capability: _attempt(lambda: build.load_cuda(name, c) and {}), KERNELS)
        for name, finding in zip(KERNELS, built):
            yield f"{name}, build for sm_{capability[0]}{capability[1]}", *finding
        for dtype in TOLERANCE:
            kind = str(dtype).removeprefix("torch.")
            yield f"median, {kind}", *_attempt(lambda t=dtype, d=device: check_median(d, t, "cuda"))
            yield f"bias_act, {kind}", *_attempt(lambda t=dtype, d=device: check_bias_act(d, t))
            yield f"styled_act, {kind}", *_attempt(lambda t=dtype, d=device: check_styled_act(d, t))
            yield f"upfirdn2d, {kind}", *_attempt(lambda t=dtype, d=device: check_upfirdn2d(d, t))


def _attempt(check: Callable[[], dict[str, float]]) -> tuple[str, bool]:
    """Runs a check: what it found, with the worst part, or all that disagree, and whether it is well."""
    start = time.perf_counter()
    try:
        errors = check()
    except (build.BuildError, RuntimeError, ValueError) as problem:
        return f"FAILED: {problem}", False
    seconds = time.perf_counter() - start
    worst = sorted(errors, key=lambda part: -_above(errors[part]))
    wrong = [part for part in worst if not errors[part] <= 1]
    largest = errors[worst[0]] if worst else 0.0
    parts = "".join(f"; {part}: {errors[part]:.2g}" for part in wrong or worst[:1] if largest)
    return f"{'DISAGREES' if wrong else 'ok'}, {largest:.2g} of the tolerance, {seconds:.1f} s{parts}", not wrong


def _above(error: float) -> float:
    """For order: not a number is worse than any."""
    return error if error == error else float("inf")


# ---- one op on one device in one dtype, over layouts and odd sizes: the largest error of every part (output, gradient
# by each input, gradient of gradients by each) in each layout, 1 being the tolerance

def check_median(device: torch.device, dtype: torch.dtype, impl: str) -> dict[str, float]:
    """An error of 2 for each pixel that differs."""
    wrong = dict.fromkeys(LAYOUTS, 0.0)
    for (height, width), size, border in itertools.product(((33, 40), (1, 5)), (3, 19, 35), ("zero", "replicate")):
        x = _random(2, 2, height, width).mul(4).to(dtype)
        x[0, 0] = x[0, 0].round()                                                          # ties
        reference = median2d(x, size, "ref", border)
        for layout in LAYOUTS:
            found = median2d(lay_out(x.to(device), layout), size, impl, border).cpu()
            wrong[layout] += 2 * (found != reference).sum().item()
    return wrong


@torch.no_grad()
def check_fused(dtype: torch.dtype) -> dict[str, float]:
    """Every pass of op/fused.py, with noise of every kind. Raises BuildError: without it all would be PyTorch's."""
    build.load_c("fused", *fused.FLAGS[dtype])
    seeds = itertools.count()

    def some(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return lay_out(_random(*shape, seed=next(seeds)).to(dtype), "channels_last")

    y, factor, then = some(3, 64, 7, 6), some(3, 64, 1, 1), some(3, 64, 1, 1)
    strength, bias = some(1, dtype=torch.float32), some(64, dtype=torch.float32)
    maps = {str(kind): some(*kind, 7, 6, dtype=torch.float32) for kind in ((1, 1), (3, 1), (1, 64), (3, 64))}
    maps["of two"] = some(3, 64, 7, 6), some(1, 1, 7, 6, dtype=torch.float32)
    passes = {f"styled_act, noise {kind}": (fused.styled_act, styled_act, (y, factor, noise, strength, bias, 0.2, then))
              for kind, noise in maps.items()}
    passes["styled_act, folded"] = fused.styled_act, styled_act, (some(3, 256, 7, 6), factor, None, strength, bias, 0.2,
                                                                  None)
    passes["bias_act"] = fused.bias_act, bias_act, (y, bias, 0.2, SQRT2)
    passes["scaled_sum"] = fused.scaled_sum, scaled_sum, (y, some(3, 64, 7, 6), 0.5)
    passes["enlarged_beside"] = fused.enlarged_beside, _enlarged_beside, (y, some(3, 32, 14, 12))
    errors = {}
    for name, (ours, reference, inputs) in passes.items():
        found = ours(*inputs)
        if found is None:
            raise RuntimeError(f"{name}: left to PyTorch, although the library is built")
        errors[name] = _error(found, reference(*map(_doubled, inputs)))
    return _in_tolerances(errors, dtype)


def _enlarged_beside(x, other):
    return enlarged_beside(x, other, binomial_kernel(gain=4))


def _doubled(x):
    """x in doubles, of which op/fused.py does none; tuples of tensors too."""
    if isinstance(x, tuple):
        return tuple(map(_doubled, x))
    return x.double() if isinstance(x, torch.Tensor) else x


def check_winograd() -> dict[str, float]:
    """Right on every CPU, although used on those with AVX2 or AVX512 alone. Raises BuildError."""
    build.load_c("winograd", *winograd.FLAGS)
    errors: dict[str, float] = {}
    for images, into, out, rows, columns in ((2, 16, 32, 9, 7), (1, 64, 16, 33, 18), (3, 16, 16, 1, 1)):
        inputs = {"x": _random(images, into, rows, columns).float(), "weight": _random(out, into, 3, 3, seed=1).float()}
        compare(errors, "channels_last", _convolved, inputs)
    return {part: error / WINOGRAD_TOLERANCE for part, error in errors.items()}


def _convolved(x, weight):
    return winograd.conv2d(x, weight) if x.dtype == torch.float32 else F.conv2d(x, weight, padding=1)


def check_bias_act(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    errors: dict[str, float] = {}
    for shape, layout in itertools.product(((3, 5, 7, 9), (2, 16, 6, 5), (3, 8)), LAYOUTS):
        x, bias = _random(*shape), _random(shape[1], seed=1)
        x = off_the_kink(x, torch.ones(()), bias.reshape(-1, *[1] * (x.ndim - 2)), dtype=dtype)
        inputs = {"x": lay_out(x.to(device, dtype), layout), "bias": bias.to(device, _wide(dtype))}
        for gain in (SQRT2, 1):                          # a whole number, as styled_act asks for, is handed on too
            compare(errors, layout, lambda x, bias, gain=gain: bias_act(x, bias, gain=gain), inputs)
    return _in_tolerances(errors, dtype)


def check_styled_act(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Over noise of every kind; 8 channels are less than a pack of threads, 40 are not for the kernel."""
    errors: dict[str, float] = {}
    for (batch, channels, side), layout in itertools.product(((3, 8, 40), (2, 64, 9), (2, 40, 5)), LAYOUTS):
        factor, bias = _random(batch, channels, 1, 1, seed=1), _random(channels, seed=3)
        factor = factor + factor.sign() / 2                                                # far from 0
        strength = _random(1, seed=2)
        for maps in (None, (1, 1), (batch, 1), (1, channels), (batch, channels)):
            noise = None if maps is None else _random(*maps, side, side + 1, seed=4)
            added = [bias.reshape(-1, 1, 1), *([] if noise is None else [noise * strength])]
            x = off_the_kink(_random(batch, channels, side, side + 1), factor, *added, dtype=dtype)
            inputs = {"x": lay_out(x.to(device, dtype), layout), "factor": factor.to(device, dtype)}
            wide = {"strength": strength, "bias": bias} | ({} if noise is None else {"noise": noise})
            inputs |= {name: t.to(device, _wide(dtype)) for name, t in wide.items()}
            for orders in (1, 2):
                compare(errors, layout, _styled, inputs, orders)
    return _in_tolerances(errors, dtype)


def _styled(x, factor, strength, bias, noise=None):
    return styled_act(x, factor, noise, strength, bias)


def check_upfirdn2d(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    errors: dict[str, float] = {}
    for (taps, up, down, pad), (channels, layout) in itertools.product(
        RESAMPLINGS, itertools.product((3, 8), LAYOUTS)
    ):
        x = lay_out(_random(2, channels, 11, 14).to(device, dtype), layout)
        for kernel in (_random(taps, taps, seed=1), binomial_kernel([1, 3, 2, 5, 1][:taps])):
            kernel = kernel.to(device, torch.float32)
            def resample(x, args=(kernel, up, down, pad)):
                return upfirdn2d(x, args[0].to(x.device), *args[1:])

            compare(errors, layout, resample, {"x": x})
    return _in_tolerances(errors, dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Of the parameters beside activations of dtype: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def _in_tolerances(errors: dict[str, float], dtype: torch.dtype) -> dict[str, float]:
    return {part: error / TOLERANCE[dtype] for part, error in errors.items()}


def off_the_kink(x: torch.Tensor, factor: torch.Tensor, *added: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x, moved where rounding to dtype could turn the sign of x * factor + all that is added, which picks the slope.

    On the other side of the kink a gradient is off by a factor of 5, however exact the arithmetic. With u the unit of
    rounding (half of eps) and S the sum of the terms' sizes, rounding moves the sum by 4 u S at most: u S each for x,
    factor, the terms and the first sum (the last one keeps the sign). A sum nearer to 0 is moved to 8 u S.
    """
    terms = x * factor, *added
    total, least = sum(terms), 4 * torch.finfo(dtype).eps * sum(term.abs() for term in terms)
    return x + torch.where(total.abs() < least, total.sign() * least - total, 0) / factor


def compare(worst: dict[str, float], layout: str, function: Callable[..., torch.Tensor],
            inputs: dict[str, torch.Tensor], orders: int = 2) -> None:
    """function(**inputs) and its gradients against doubles on the CPU, into worst[part, in that layout].

    An error is the largest difference over the largest value. The parts are the output, the gradient by each input (of
    orders 2 another one, that can be differentiated) and of orders 2 the gradient of the gradients by each.
    """
    exact = {name: t.cpu().double() for name, t in inputs.items()}
    results = [gradients(function, leaves, orders) for leaves in (inputs, exact)]
    kinds = ("gradient",) if orders == 1 else ("differentiable gradient", "second gradient")
    parts = ["output", *(f"{kind} by {name}" for kind in kinds for name in inputs)]
    for part, ours, true in zip(parts, *results, strict=True):
        name = f"{part}, {layout}"
        worst[name] = max(worst.get(name, 0.0), _error(ours, true), key=_above)


def _error(ours: torch.Tensor, true: torch.Tensor) -> float:
    return ((ours.cpu().double() - true).abs().max() / true.abs().max().clamp(min=1e-30)).item()


def gradients(function: Callable[..., torch.Tensor], inputs: dict[str, torch.Tensor], orders: int
              ) -> list[torch.Tensor]:
    """function(**inputs) and the gradients of an energy of it by each input: the first, and (orders 2) the second."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    y = function(**leaves)
    first = torch.autograd.grad(_energy(y), leaves.values(), create_graph=orders > 1, materialize_grads=True)
    second = (torch.autograd.grad(sum(map(_energy, first)), leaves.values(), materialize_grads=True)
              if orders > 1 else ())
    return [y.detach(), *(g.detach() for g in first), *second]


def _energy(x):
    """Its gradient is x in units of its root mean square, which neither leaves float16 nor sinks into its subnormals.

    That unit counts as a constant; rounding errors of many elements average out in it.
    """
    x = x.to(_wide(x.dtype))
    unit = x.detach().square().mean().sqrt().clamp(min=1e-30)
    return x.square().sum() / (2 * unit)


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same tensor in memory as named: 'strided' is every second column of a wider one."""
    if layout == "channels_last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return torch.stack([x, x], -1).flatten(-2)[..., ::2] if layout == "strided" else x.contiguous()


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


if __name__ == "__main__":
    sys.exit(main())
