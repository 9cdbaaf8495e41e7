"""Which implementation runs, how an op is registered with torch, and how a kernel of op/csrc is started.

Every op takes impl='auto', 'ref' or 'cuda'. 'auto' means the kernel for a tensor on a CUDA device and plain PyTorch
elsewhere; set_impl('ref') makes it plain PyTorch everywhere, for machines where the kernels can't be built.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence

import torch
from torch.autograd import forward_ad

from op.build import load_cuda

IMPLS = ("auto", "ref", "cuda")
NAMESPACE = "cn_stylegan"                                     # of the ops registered with torch.library
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}    # as op/csrc/launch.cuh has them

_default = "auto"


def set_impl(impl: str) -> None:
    """What impl='auto' means from now on in this process: 'auto' or 'ref'. For the scripts' --ops flag."""
    global _default
    if impl not in ("auto", "ref"):
        raise ValueError(f"set_impl: expected auto or ref, got {impl!r}")
    _default = impl


def is_ref() -> bool:
    """Whether 'auto' means plain PyTorch everywhere."""
    return _default == "ref"


def is_watched() -> bool:
    """Whether PyTorch looks on, or what it hands out has no data: of what C does it sees nothing.

    That is while it writes down a program or a tangent, in a dispatch mode (make_fx, FakeTensorMode, FlopCounterMode)
    and within a transform of torch.func (vmap, grad).
    """
    return (torch.compiler.is_compiling() or torch.jit.is_tracing() or forward_ad._current_level >= 0
            or _modes() > 0 or _transform() is not None)


def is_transformed() -> bool:
    """Whether a transform of torch.func hands out tensors: it goes through PyTorch's operations alone."""
    return not torch.compiler.is_compiling() and _transform() is not None


# Not public: of a torch without them nothing is known of modes or transforms
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_transform = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: None)


def choose(op: str, impl: str, x: torch.Tensor) -> str:
    """'cuda' or 'ref' for this tensor. Raises ValueError for an unknown impl and for 'cuda' on another device."""
    if impl not in IMPLS:
        raise ValueError(f"{op}: impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "cuda" and not x.is_cuda:
        raise ValueError(f"{op}: impl='cuda' needs a tensor on a CUDA device, got one on {x.device}; use 'auto'")
    if impl != "auto":
        return impl
    return "cuda" if x.is_cuda and _default == "auto" and not is_transformed() else "ref"


def layout_of(x: torch.Tensor) -> torch.memory_format:
    """channels_last for a tensor that lies so and not otherwise, else contiguous: the layout that the ops keep.

    What vmap hands out does not tell.
    """
    if (x.ndim == 4 and not is_transformed()
            and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()):
        return torch.channels_last
    return torch.contiguous_format


def register(schema: str, run: Callable, fake: Callable, save: Callable, backward: Callable) -> Callable:
    """Registers a differentiable op with torch.library; returns the function to call it by.

    schema: 'name(Tensor x, ...) -> Tensor'; run: its implementation on any device; fake: the same on tensors without
    data; save(ctx, inputs, output) and backward(call, ctx, grad), which composes the gradient of calls of `call`, the
    op itself, so that any order of differentiation is covered.

    Where PyTorch looks on, as in compiled and exported programs, it is the registered op. Otherwise an
    autograd.Function of the same parts: torch.library's own wrapper takes several times as long to call as a small
    kernel to run. Transforms of torch.func take neither: for them `run` itself, of PyTorch's operations there
    (but for median2d, which has no gradient and stays the registered op).
    """
    name, signature = schema.split("(", 1)
    op = torch.library.custom_op(f"{NAMESPACE}::{name}", run, mutates_args=(), schema=f"({signature}")
    op.register_fake(fake)
    op.register_autograd(functools.partial(backward, op), setup_context=save)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = run(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, grad):
            return backward(Eager.apply, ctx, grad)

    def call(*inputs):
        if is_transformed():
            return run(*inputs)
        return op(*inputs) if is_watched() else Eager.apply(*inputs)

    return call


def launch(name: str, x: torch.Tensor, *arguments: torch.Tensor | int | float | Sequence[int] | None) -> None:
    """Starts the launcher `<name>_cuda` of op/csrc/<name>.cu on x's device and current stream.

    A tensor is handed over as its address, a float as double, an int as int64, a sequence as an array of int64. The
    kernel is built at first use: raises op.build.BuildError, RuntimeError where CUDA refuses the launch, and ValueError
    for a tensor on another device, whose address the kernel could not read.
    """
    for argument in arguments:
        if isinstance(argument, torch.Tensor) and argument.device != x.device:
            raise ValueError(f"{name}: expected all tensors on {x.device}, got one on {argument.device}")
    launcher = getattr(load_cuda(name, torch.cuda.get_device_capability(x.device)), f"{name}_cuda")
    with torch.cuda.device(x.device):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        code = launcher(*map(_as_c, arguments), stream)
    if code:
        raise RuntimeError(f"{name}: CUDA refused to start the kernel, error {code}; `python -m op.doctor` checks "
                           "the kernels, and --ops ref does without them")


def _as_c(argument):
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    if isinstance(argument, (tuple, list)):
        return (ctypes.c_int64 * len(argument))(*argument)
    return None if argument is None else ctypes.c_int64(argument)
