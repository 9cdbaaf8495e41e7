"""The CUDA kernels: their arithmetic on the CPU, their build, their registration with torch, and on a GPU all of it.

Without a GPU the kernels' own functions run thread by thread under g++ (op/csrc/emulate.cpp), over tiles and edges,
and nvcc compiles every source for an H100 or H200 where it is installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

import op
from op import bias_act, binomial_kernel, build, doctor, fused, styled, upfirdn2d, winograd
from op.bias_act import _bias_act_cuda
from op.cuda import _as_c, choose, launch
from op.median import median2d

NCHW, NHWC = torch.contiguous_format, torch.channels_last
HOPPER = (9, 0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
needs_nvcc = pytest.mark.skipif(not (shutil.which("nvcc") and torch.version.cuda), reason="no nvcc or CUDA torch")


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the kernels' arithmetic, emulated

@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> ctypes.CDLL:
    if torch.cuda.is_available():
        pytest.skip("on a GPU the kernels themselves are tested")
    if not shutil.which("g++"):
        pytest.skip("no g++ to emulate the kernels with")
    library = tmp_path_factory.mktemp("emulated") / "emulate.so"
    flags = ["-O1", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined,bounds", "-static-libubsan",
             "-fno-sanitize-recover", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, build.SOURCES / "emulate.cpp", "-o", library], check=True)
    return ctypes.CDLL(str(library))


def address(t: torch.Tensor | None) -> ctypes.c_void_p | None:
    return None if t is None else ctypes.c_void_p(t.data_ptr())


def emulate_upfirdn2d(emulated, x, kernel, up, down, pad, mode, correlate=False):
    left, right, top, bottom = pad if len(pad) == 4 else (*pad, *pad)
    (b, c, h, w), (kh, kw) = x.shape, kernel.shape
    last = x.is_contiguous(memory_format=NHWC) and not x.is_contiguous()
    out_h, out_w = (h * up + top + bottom - kh) // down + 1, (w * up + left + right - kw) // down + 1
    y = torch.full((b, c, out_h, out_w), torch.nan).contiguous(memory_format=NHWC if last else NCHW)
    sizes = [b if last else b * c, h, w, out_h, out_w, c if last else 1, kh, kw, up, down, left, top, int(correlate)]
    emulated.emulate_upfirdn2d(address(x), address(kernel), address(y), (ctypes.c_int64 * 13)(*sizes), mode)
    return y


@pytest.mark.parametrize("taps, up, down, pad", doctor.RESAMPLINGS)
@pytest.mark.parametrize("shape, layout", [((2, 3, 11, 14), NCHW), ((2, 3, 5, 7), NHWC), ((1, 8, 18, 5), NHWC)])
def test_upfirdn2d_kernels(emulated, taps, up, down, pad, shape, layout):
    x = rand(*shape).contiguous(memory_format=layout)
    tiled = taps == 4 and 1 in (up, down) and up + down <= 3
    for kernel in (rand(taps, taps, seed=1), binomial_kernel([1, 3, 2, 5, 1][:taps]), rand(taps, taps) * 0):
        for correlate in (False, True):
            turned = kernel.flip(0, 1) if correlate else kernel
            expected = upfirdn2d(x.double(), turned.double(), up, down, pad)
            for mode in (0, 1, 2) if tiled else (0, 1):
                y = emulate_upfirdn2d(emulated, x, kernel, up, down, pad, mode, correlate)
                torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", [
    torch.tensor([1.0, -1, 1, -1])[:, None] * torch.ones(4),                   # sums to zero: not factorised
    torch.tensor([1.0, 2, 0, -3])[:, None] * torch.tensor([0.0, 2, 1, 4]),
    torch.eye(4), binomial_kernel() * 1e-20, binomial_kernel() + 1e-3 * torch.eye(4),
])
def test_upfirdn2d_tiles_factorise_only_what_is_a_product(emulated, kernel):
    x = rand(1, 4, 9, 9).contiguous(memory_format=NHWC)
    expected = upfirdn2d(x.double(), kernel.double(), pad=(2, 1)) / kernel.abs().max()
    y = emulate_upfirdn2d(emulated, x, kernel.contiguous(), 1, 1, (2, 1), 2) / kernel.abs().max()
    torch.testing.assert_close(y.double(), expected.double(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("shape, layout", [
    ((3, 5, 4, 6), NCHW), ((3, 8, 3, 5), NHWC), ((3, 5, 3, 5), NHWC), ((6, 8), NCHW),
])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_bias_act_kernels(emulated, shape, layout, packed, wide):
    x, bias, gradient = rand(*shape), rand(shape[1], seed=1), rand(*shape, seed=2)
    if layout == NHWC:
        x, gradient = x.contiguous(memory_format=NHWC), gradient.contiguous(memory_format=NHWC)
    inner = 1 if layout == NHWC or len(shape) == 2 else 24
    if packed and x.numel() % 4 or packed and inner == 1 and shape[1] % 4:
        pytest.skip("the launcher takes no packs here")
    sizes = [*map(ctypes.c_int64, (x.numel(), shape[1], inner)), ctypes.c_double(0.1), ctypes.c_double(3), packed, wide]
    leaf = x.double().requires_grad_()
    expected = bias_act(leaf, bias.double(), 0.1, 3.0)
    for b, forward in ((bias, expected), (None, bias_act(x.double(), None, 0.1, 3.0))):
        y = torch.empty_like(x)
        emulated.emulate_bias_act(address(x), address(b), None, address(y), *sizes)
        torch.testing.assert_close(y.double(), forward, atol=1e-5, rtol=0)
    output, derivative = expected.float(), torch.empty_like(x)
    emulated.emulate_bias_act(address(gradient), None, address(output), address(derivative), *sizes)
    (backward,) = torch.autograd.grad(expected, leaf, gradient.double())
    torch.testing.assert_close(derivative.double(), backward, atol=1e-5, rtol=0)


def emulate_median2d(emulated, x, size, border, wide=False, backwards=False):
    y = torch.full_like(x, 7.0)
    planes, height, width = x.shape
    emulated.emulate_median2d(address(x), address(y), ctypes.c_int64(planes), height, width, size,
                              border == "replicate", wide, backwards)
    return y


def pictures() -> dict[str, torch.Tensor]:
    noise = rand(2, 40, 67)
    infinite = noise.clone()
    infinite[:, ::3, ::4], infinite[:, 1::3, 1::4] = torch.inf, -torch.inf
    blob = noise * (torch.linspace(-1, 1, 40)[:, None].square() + torch.linspace(-1, 1, 67).square() < 0.3)
    return {"noise": noise, "ties": noise.round(), "infinite": infinite, "masked": blob, "constant": noise * 0 - 3,
            "tiny numbers": noise * 1e-44, "steps": torch.arange(33.0 * 70).reshape(1, 33, 70) // 9,
            "one pixel": noise[:, :1, :1].contiguous(), "flat": noise[:, :2].contiguous()}


@pytest.mark.parametrize("size", (3, 19, 31))
@pytest.mark.parametrize("name", pictures())
def test_median_kernel(emulated, name, size):
    x = pictures()[name]
    for border in ("zero", "replicate"):
        expected = median2d(x, size, border=border)
        for backwards in (False, True):                        # threads between two barriers in either order
            assert torch.equal(emulate_median2d(emulated, x, size, border, backwards=backwards), expected), border


def test_median_kernel_of_wide_windows(emulated):
    x = pictures()["infinite"][:1, :9, :12].contiguous()
    for size, border in ((7, "zero"), (7, "replicate"), (41, "replicate")):
        assert torch.equal(emulate_median2d(emulated, x, size, border, wide=True), median2d(x, size, border=border))


@pytest.mark.parametrize("wide", (False, True))
def test_median_kernel_passes_nan_on(emulated, wide):
    x = pictures()["noise"][:1].contiguous()
    y = x.clone()
    y[0, 20, 30], y[0, 21, 31] = torch.nan, -torch.tensor(torch.nan)
    near = torch.zeros(40, 67, dtype=torch.bool)
    near[18:23, 28:33] = near[19:24, 29:34] = True
    result = emulate_median2d(emulated, y, 5, "zero", wide)[0]
    assert torch.equal(result.isnan(), near)
    assert torch.equal(result[~near], median2d(x, 5)[0][~near])


NOISE = {"none": None, "one map": (1, 1), "a map an image": (3, 1), "a channel each": (3, 0), "of all": (1, 0)}


@pytest.fixture
def styled_on_the_cpu(emulated, monkeypatch):
    """op/styled.py as on a GPU, its kernel emulated; the arguments of each start."""
    calls = []

    def start(name, into, *arguments):
        calls.append(arguments)
        return emulated.emulate_styled_act(*map(_as_c, arguments), None)

    monkeypatch.setattr(styled, "choose", lambda op, impl, x: "cuda" if x.dtype == torch.float32 else "ref")
    monkeypatch.setattr(styled, "launch", start)
    return calls


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("channels, height, width", [(8, 36, 30), (64, 9, 8), (1024, 3, 2), (4, 1, 1)])
def test_styled_act_kernel_with_both_gradients(styled_on_the_cpu, noise, channels, height, width):
    maps = NOISE[noise] and rand(NOISE[noise][0], NOISE[noise][1] or channels, height, width, seed=4)
    inputs = {"x": rand(3, channels, height, width).contiguous(memory_format=NHWC), "strength": rand(1, seed=2),
              "factor": rand(3, channels, 1, 1, seed=1), "bias": rand(channels, seed=3)}
    inputs |= {} if maps is None else {"noise": maps}

    for orders in (1, 2):
        exact = {name: t.double() for name, t in inputs.items()}
        results = [doctor.gradients(doctor._styled, leaves, orders) for leaves in (inputs, exact)]
        for ours, expected in zip(*results):
            largest = float(expected.abs().max())
            torch.testing.assert_close(ours.double(), expected, atol=1e-5 * largest, rtol=0)
    # Forward, gradient; forward, a gradient to be differentiated again, which starts none, and the last one through it
    assert [call[6] is None for call in styled_on_the_cpu] == [True, False, True, False]


def test_styled_act_sums_only_what_is_asked_for(styled_on_the_cpu):
    """As in the projection: of the code, then of the noise maps."""
    y, factor = rand(2, 8, 4, 4).contiguous(memory_format=NHWC).requires_grad_(), rand(2, 8, 1, 1, seed=1)
    noise, strength, bias = rand(2, 1, 4, 4, seed=4), rand(1, seed=2), rand(8, seed=3)
    factor.requires_grad_()
    op.styled_act(y, factor, noise, strength, bias).sum().backward()
    factor.requires_grad_(False)
    noise.requires_grad_()
    op.styled_act(y, factor, noise, strength, bias).sum().backward()
    (_, code, _, maps) = styled_on_the_cpu
    present = [[argument is not None for argument in (call[0], *call[8:11])] for call in (code, maps)]
    assert present == [[True, False, True, False], [False, True, False, False]]        # y, noise's, sums, strength's


@pytest.mark.parametrize("y", [rand(2, 8, 4, 4), rand(2, 6, 4, 4).contiguous(memory_format=NHWC),
                               rand(2, 24, 4, 4).contiguous(memory_format=NHWC),
                               rand(1 + 2 * 8 * 16)[1:].reshape(2, 4, 4, 8).permute(0, 3, 1, 2)],
                         ids=["NCHW", "no packs", "packs that do not divide a block", "not aligned"])
def test_what_styled_act_leaves_to_pytorch(styled_on_the_cpu, y):
    channels = y.shape[1]
    found = op.styled_act(y, rand(2, channels, 1, 1, seed=1), None, torch.ones(1), rand(channels, seed=2))
    assert found.shape == y.shape and styled_on_the_cpu == []


# ---- the build

@needs_nvcc
@pytest.mark.parametrize("name", doctor.KERNELS)
def test_nvcc_compiles_and_the_library_loads(name):
    library = build.load_cuda(name, HOPPER)
    assert getattr(library, f"{name}_cuda")


@needs_nvcc
def test_built_once_into_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "CUDA_FLAGS", ("-O0", *build.CUDA_FLAGS[1:]))
    for _ in range(2):
        build.load_cuda.__wrapped__("bias_act", HOPPER)
        monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("built again"))
    assert [path.name.partition("-")[0] for path in (tmp_path / "cn-stylegan").iterdir()] == ["bias_act"]


def test_the_key_knows_source_flags_and_compiler(monkeypatch, tmp_path):
    flags, other = (["-O3", build.cuda_target(capability)] for capability in (HOPPER, (8, 0)))
    keys = [build._cuda_key(*parts) for parts in (
        ("median", flags, b"1"), ("median", flags, b"2"), ("median", other, b"1"), ("bias_act", flags, b"1"))]
    changed = tmp_path / "portable.h"
    changed.write_text("changed")
    sources = build.cuda_sources("median")
    monkeypatch.setattr(build, "cuda_sources", lambda name: [*sources[:-1], changed])
    keys.append(build._cuda_key("median", flags, b"1"))
    assert len(set(keys)) == 5
    monkeypatch.setattr(build, "cuda_sources", lambda name: sources)
    assert build._cuda_key("median", flags, b"1") == keys[0]


def test_an_nvcc_of_another_cuda_than_torchs(monkeypatch, tmp_path):
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 11.8, V11.8.89\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(build.BuildError, match=r"nvcc is of CUDA 11, torch of CUDA 13; install the CUDA toolkit"):
        build.load_cuda.__wrapped__("median", HOPPER)


def test_no_nvcc(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(build.BuildError, match=r"(?s)no nvcc in .*CUDA_HOME.*--ops ref does without"):
        build.load_cuda.__wrapped__("median", HOPPER)


@needs_nvcc
def test_a_compile_error_shows_the_last_lines_and_the_way_round(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "CUDA_FLAGS", ("-DTILE=(",))
    with pytest.raises(build.BuildError, match=r"(?s)kernel median cannot be built.*error.*--ops ref does without"):
        build.load_cuda.__wrapped__("median", HOPPER)
    assert list((tmp_path / "cn-stylegan").iterdir()) == []


# ---- starting a kernel

@pytest.fixture
def started(monkeypatch):
    """The arguments that launchers are called with, on a machine without a GPU."""
    calls = []
    library = SimpleNamespace(bias_act_cuda=lambda *arguments: calls.append(arguments) or 0)
    monkeypatch.setattr("op.cuda.load_cuda", lambda name, capability: library)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    return calls


def test_whole_numbers_are_handed_over_as_the_launcher_takes_them(started):
    """A gain of 1 in an integer's register would be read from a float's, and shift what follows."""
    _bias_act_cuda(rand(2, 3, 4, 5), rand(3, seed=1), None, 0, 1)
    (arguments,) = started
    assert [type(a) for a in arguments[4:]] == [ctypes.c_int64] * 4 + [ctypes.c_double] * 2 + [ctypes.c_void_p]
    assert [a.value for a in arguments[4:]] == [0, 120, 3, 20, 0.0, 1.0, 7]


def test_a_tensor_on_another_device_is_refused(started):
    with pytest.raises(ValueError, match="bias_act: expected all tensors on cpu, got one on meta"):
        launch("bias_act", rand(1), rand(1), rand(1).to("meta"))
    assert started == []


# ---- choosing

def test_cpu_tensors_take_the_reference_and_set_impl_turns_the_kernels_off():
    on_gpu = torch.empty(0).to("meta")
    assert choose("op", "auto", torch.empty(0)) == choose("op", "auto", on_gpu) == "ref"
    with torch._subclasses.FakeTensorMode():
        on_gpu = torch.empty(1, device="cuda")
        assert choose("op", "auto", on_gpu) == choose("op", "cuda", on_gpu) == "cuda"
        try:
            op.set_impl("ref")
            assert choose("op", "auto", on_gpu) == "ref" and choose("op", "cuda", on_gpu) == "cuda"
        finally:
            op.set_impl("auto")
        assert choose("op", "auto", on_gpu) == "cuda"


@pytest.mark.parametrize("call", [
    lambda: bias_act(torch.zeros(1, 2), impl="cuda"),
    lambda: upfirdn2d(torch.zeros(1, 1, 4, 4), torch.ones(2, 2), impl="cuda"),
    lambda: median2d(torch.zeros(4, 4), 3, "cuda"),
])
def test_the_kernels_refuse_a_cpu_tensor(call):
    with pytest.raises(ValueError, match="impl='cuda' needs a tensor on a CUDA device, got one on cpu; use 'auto'"):
        call()


def test_refusals():
    with pytest.raises(ValueError, match="impl must be one of auto, ref, cuda, got 'fast'"):
        bias_act(torch.zeros(1, 2), impl="fast")
    with pytest.raises(ValueError, match="expected auto or ref, got 'cuda'"):
        op.set_impl("cuda")


# ---- registration with torch: on the CPU the registered ops are their references

DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [NCHW, NHWC])
def test_opcheck(device, layout):
    ops = torch.ops.cn_stylegan
    x = rand(2, 3, 6, 5).contiguous(memory_format=layout).to(device).requires_grad_()
    bias, kernel = rand(3, seed=1).to(device).requires_grad_(), rand(4, 4, seed=2).to(device)
    output = rand(2, 3, 6, 5, seed=3).contiguous(memory_format=layout).to(device)
    impl = "cuda" if device == "cuda" else "ref"
    torch.library.opcheck(ops.bias_act, (x, bias, None, 0.2, 2.0))
    torch.library.opcheck(ops.bias_act, (x, None, None, 0.2, 1.0))
    torch.library.opcheck(ops.bias_act, (x, None, output, 0.2, 2.0))
    for up, down in ((1, 1), (2, 1), (1, 2)):
        torch.library.opcheck(ops.upfirdn2d, (x, kernel, up, down, [2, 1, 1, 2], False, impl))
    torch.library.opcheck(ops.median2d, (x.detach(), 3, "auto" if device == "cpu" else "cuda", "zero"))


def test_the_registered_bias_act_has_both_gradients():
    x, bias = rand(2, 3, 2, 2).double().requires_grad_(), rand(3, seed=1).double().requires_grad_()

    def registered(a, b):
        return torch.ops.cn_stylegan.bias_act(a, b, None, 0.2, 2.0)

    torch.testing.assert_close(registered(x, bias), bias_act(x, bias, gain=2.0), atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(registered, (x, bias))
    assert torch.autograd.gradgradcheck(lambda a, b: registered(a, b) ** 2, (x, bias))


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bias, self.kernel = torch.nn.Parameter(rand(3)), binomial_kernel()

    def forward(self, x):
        y = torch.ops.cn_stylegan.bias_act(upfirdn2d(x, self.kernel, up=2, pad=(2, 1)), self.bias, None, 0.2, 1.0)
        return y * median2d(x, 3).mean()


def test_compile_and_export_pass_through():
    block, x = Block(), rand(2, 3, 6, 5).requires_grad_()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(*(torch.autograd.grad(f(x).square().sum(), [x, block.bias]) for f in (compiled, block))):
        torch.testing.assert_close(ours, eager)
    exported = torch.export.export(block, (x,))
    targets = {str(node.target) for node in exported.graph.nodes}
    assert {f"cn_stylegan.{name}.default" for name in ("bias_act", "upfirdn2d", "median2d")} <= targets
    torch.testing.assert_close(exported.module()(x), block(x))


# ---- whole ops against the reference in doubles; the doctor's own checks

OPS = {"bias_act": doctor.check_bias_act, "styled_act": doctor.check_styled_act, "upfirdn2d": doctor.check_upfirdn2d}


def wrong_parts(errors: dict[str, float]) -> dict[str, float]:
    return {part: error for part, error in errors.items() if not error <= 1}


@pytest.mark.parametrize("dtype", doctor.TOLERANCE)
@pytest.mark.parametrize("check", OPS.values(), ids=OPS)
@needs_gpu
def test_kernels_and_gradients_of_both_orders_on_a_gpu(check, dtype):
    assert wrong_parts(check(torch.device("cuda"), dtype)) == {}


@pytest.mark.parametrize("dtype", doctor.TOLERANCE)
@needs_gpu
def test_median_on_a_gpu(dtype):
    assert wrong_parts(doctor.check_median(torch.device("cuda"), dtype, "cuda")) == {}


@pytest.mark.parametrize("size", (99, 231))
@needs_gpu
def test_wide_median_on_a_gpu(size):
    x = rand(1, 20, 24)
    assert torch.equal(median2d(x.cuda(), size, border="replicate").cpu(), median2d(x, size, border="replicate"))


@needs_gpu
def test_more_than_two_to_the_31_elements_on_a_gpu():
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of GPU memory")
    x = torch.zeros(2, 1, 32776, 32776, dtype=torch.float16, device="cuda")
    x[-1, :, -4:, -4:] = rand(1, 4, 4).cuda()
    corner = x[-1:, :, -8:, -8:].clone()
    assert torch.equal(bias_act(x)[-1:, :, -8:, -8:], bias_act(corner))
    y = upfirdn2d(x, binomial_kernel().cuda(), pad=(2, 1))
    assert torch.equal(y[-1:, :, -4:, -4:], upfirdn2d(corner, binomial_kernel().cuda(), pad=(2, 1))[:, :, -4:, -4:])


@pytest.mark.parametrize("dtype", doctor.TOLERANCE)
@pytest.mark.parametrize("check", OPS.values(), ids=OPS)
def test_plain_pytorch_is_within_the_doctors_tolerance(check, dtype, monkeypatch):
    """In every dtype, with room to spare: what a kernel has more is its own error."""
    monkeypatch.setattr("op.cuda._default", "ref")
    assert max(check(torch.device("cpu"), dtype).values()) < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_doctor_names_the_part_that_is_wrong(dtype, monkeypatch):
    monkeypatch.setattr("op.cuda._default", "ref")

    class WrongByStrength(torch.autograd.Function):
        forward = staticmethod(lambda ctx, strength: strength.clone())
        backward = staticmethod(lambda ctx, grad: grad * 1.25)

    def wrong(y, factor, noise, strength, bias):
        reference = y.dtype == torch.float64
        return op.styled_act(y, factor, noise, strength if reference else WrongByStrength.apply(strength), bias)

    monkeypatch.setattr(doctor, "styled_act", wrong)
    finding, well = doctor._attempt(lambda: doctor.check_styled_act(torch.device("cpu"), dtype))
    assert not well and finding.startswith("DISAGREES") and "; gradient by strength, channels_last: " in finding
    assert "; gradient by x" not in finding and "; output" not in finding


def test_not_a_number_disagrees():
    assert doctor._attempt(lambda: {"output": 0.5, "gradient by x": float("nan")})[1] is False


def test_the_doctor_finds_a_kernel_that_disagrees(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.main() == 0
    assert "upfirdn2d, CUDA          not checked: torch sees no GPU" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "median2d", lambda x, size, impl, border: x + (impl == "ref"))
    assert doctor.main() == 1
    assert "median, C                DISAGREES" in capsys.readouterr().out


@pytest.mark.parametrize("line, module, name", [
    ("fused float32, C", fused, "scaled_sum"), ("fused bfloat16, C", fused, "styled_act"),
    ("winograd, C", winograd, "conv3x3"),
])
def test_the_doctor_finds_c_that_disagrees_or_does_not_build(line, module, name, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    def finding() -> str:
        text, works = {name: (text, works) for name, text, works in doctor.checks()}[line]
        assert works == text.startswith("ok")
        return text

    assert finding().startswith("ok")
    right = getattr(module, name)

    def wrong(*args):
        found = right(*args)
        return None if found is None else found * 1.2

    monkeypatch.setattr(module, name, wrong)
    assert finding().startswith("DISAGREES")
    fails = tmp_path / "cc"
    fails.write_text('#!/bin/sh\ncase "$*" in *-dM*) exit 0;; esac; echo "internal compiler error" >&2; exit 1\n')
    fails.chmod(0o755)
    monkeypatch.setenv("CC", str(fails))
    monkeypatch.setattr(build, "load_c", build.load_c.__wrapped__)
    assert finding().startswith("FAILED") and "internal compiler error" in finding()
