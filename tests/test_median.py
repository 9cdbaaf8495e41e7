"""Median filter: hand-computed windows, the implementations against each other, and life without a compiler."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import warnings

import pytest
import torch

from op import build, median
from op.median import median2d

FAST = ("cpu", "scipy")
STEPS = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])


@pytest.fixture
def fresh_build(monkeypatch, tmp_path):
    """An empty cache folder, and no library or warning remembered, before and after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for remembered in (build.load_c, median._best_cpu_impl):
        remembered.cache_clear()
    yield tmp_path
    for remembered in (build.load_c, median._best_cpu_impl):
        remembered.cache_clear()


@pytest.mark.parametrize("impl", ("auto", *FAST, "ref"))
def test_hand_computed(impl):
    # the corner window holds 1, 2, 4, 5 and five zeros from outside; the middle one holds 1 to 9
    expected = torch.tensor([[0.0, 2.0, 0.0], [2.0, 5.0, 3.0], [0.0, 5.0, 0.0]])
    assert torch.equal(median2d(STEPS, 3, impl), expected)
    # replicated: the corner window is 1 1 2, 1 1 2, 4 4 5
    expected = torch.tensor([[2.0, 3.0, 3.0], [4.0, 5.0, 6.0], [7.0, 7.0, 8.0]])
    assert torch.equal(median2d(STEPS, 3, impl, border="replicate"), expected)


def images() -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 70, 67, generator=gen)
    infinite = noise.clone()
    infinite[:, ::3, ::4] = torch.inf
    infinite[:, 1::3, 1::4] = -torch.inf
    blob = noise * (torch.linspace(-1, 1, 70)[:, None].square() + torch.linspace(-1, 1, 67).square() < 0.3)
    return {
        "noise": noise, "ties": noise.round(), "infinite": infinite, "masked": blob, "constant": noise * 0 - 3,
        "tiny numbers": noise * 1e-44, "zeros of both signs": noise.sign() * 0,
        "two tiles": torch.randn(1, 130, 65, generator=gen), "one pixel": torch.randn(3, 1, 1, generator=gen),
        "narrow": torch.randn(2, 90, 3, generator=gen), "flat": torch.randn(2, 2, 100, generator=gen),
    }


@pytest.mark.parametrize("size", (1, 3, 5, 7, 19))
@pytest.mark.parametrize("name", images())
def test_fast_ones_equal_the_reference(name, size):
    x = images()[name]
    for border in median.BORDERS:
        reference = median2d(x, size, "ref", border)
        for impl in FAST:
            assert torch.equal(median2d(x, size, impl, border), reference), (impl, border)


@pytest.mark.parametrize("impl", FAST)
def test_window_larger_than_the_picture(impl):
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(median2d(x, 21, impl), torch.zeros_like(x))  # most of every window lies outside
    assert torch.equal(median2d(x, 21, impl, "replicate"), median2d(x, 21, "ref", "replicate"))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("size", (5, 7))
def test_dtypes(dtype, size):
    x = torch.randn(2, 40, 70, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    result = median2d(x, size, "cpu")
    assert result.dtype == dtype
    assert torch.equal(result, median2d(x, size, "ref"))


def test_doubles_that_round_to_the_same_float_stay_apart():
    x = 1 + torch.arange(9, dtype=torch.float64).reshape(3, 3) * 1e-12
    assert median2d(x, 3, "cpu")[1, 1] == 1 + 4e-12


@pytest.mark.parametrize("impl", ("auto", *FAST, "ref"))
def test_layouts(impl):
    x = torch.randn(3, 2, 40, 33, generator=torch.Generator().manual_seed(3))
    expected = median2d(x, 7, "ref")
    assert torch.equal(median2d(x.transpose(-1, -2), 7, impl), expected.transpose(-1, -2))
    assert torch.equal(median2d(x[:, :, ::2], 7, impl), median2d(x[:, :, ::2].clone(), 7, "ref"))
    assert torch.equal(median2d(x.permute(1, 0, 2, 3), 7, impl), expected.permute(1, 0, 2, 3))
    assert torch.equal(median2d(x[1, 0], 7, impl), expected[1, 0])
    assert median2d(x[:0], 7, impl).shape == (0, 2, 40, 33)


def test_input_is_left_alone_and_no_gradient_flows():
    x = STEPS.clone().requires_grad_()
    for size in (1, 3):
        result = median2d(x, size)
        assert not result.requires_grad
        result.fill_(0)
    assert torch.equal(x.detach(), STEPS)


@pytest.mark.filterwarnings("ignore")                     # that torch.jit is deprecated
def test_a_trace_holds_the_filter():
    x, other = (torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    traced = torch.jit.trace(lambda x: median2d(x, 5), (x,), check_trace=False)
    assert torch.equal(traced(other), median2d(other, 5))


def test_reference_in_row_chunks(monkeypatch):
    x = torch.randn(2, 17, 12, generator=torch.Generator().manual_seed(4))
    whole = median2d(x, 5, "ref")
    monkeypatch.setattr(median, "REF_BYTES", 3 * 2 * 12 * 25 * 4)  # three rows at a time
    assert torch.equal(median2d(x, 5, "ref"), whole)


def test_threads_share_the_planes():
    x = torch.randn(5, 20, 70, generator=torch.Generator().manual_seed(5))
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 8):
            torch.set_num_threads(count)
            assert torch.equal(median2d(x, 7, "cpu"), median2d(x, 7, "ref"))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("arguments", "message"), (
    ((STEPS, 4), "odd number of pixels, got 4"),
    ((STEPS, -1), "odd number of pixels, got -1"),
    ((STEPS, 3.0), "odd number of pixels, got 3.0"),
    ((STEPS, 3, "cuda"), "impl='cuda' needs a tensor on a CUDA device, got one on cpu"),
    ((STEPS, 3, "auto", "wrap"), "border must be one of zero, replicate, got 'wrap'"),
    ((STEPS.int(), 3), r"floating tensor \[..., H, W\], got torch.int32"),
    ((STEPS[0], 3), r"floating tensor \[..., H, W\], got torch.float32 \(3,\)"),
    ((STEPS.where(STEPS != 5, torch.nan), 3), "holds NaN"),
))
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        median2d(*arguments)


def test_cpu_impl_refuses_another_device():
    with pytest.raises(ValueError, match="got one on meta"):
        median2d(STEPS.to("meta"), 3, "cpu")


def test_on_a_gpu_the_median_of_doubles_with_nan_is_nan(monkeypatch):
    """Their kernel sees ranks, which are numbers; here the reference is in its place."""
    def reference(planes, size, border):
        margin = size // 2
        padded = torch.nn.functional.pad(planes[None], (margin,) * 4, mode=median.BORDERS[border])[0]
        return median._median_ref(padded, size)

    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    x[0, 3, 4] = x[1, 0, 0] = x[1, 8, 5] = torch.nan
    x[0, 7, 7] = torch.inf
    as_doubles = median._median_cuda
    monkeypatch.setattr(median, "_median_cuda", reference)
    for size, border in ((3, "zero"), (3, "replicate"), (7, "replicate")):
        expected = reference(x, size, border)
        assert expected.isnan().any() and not expected.isnan().all()
        assert torch.equal(as_doubles(x, size, border).nan_to_num(99), expected.nan_to_num(99))


# --- the build ---


def test_built_once_into_the_cache_folder(fresh_build, monkeypatch):
    written = []
    monkeypatch.setattr(os, "fsync", lambda file: written.append(os.fstat(file).st_size))
    median2d(STEPS, 3, "cpu")
    (library,) = (fresh_build / "cache/cn-stylegan").iterdir()
    assert written == [library.stat().st_size]
    built = library.stat().st_mtime_ns
    build.load_c.cache_clear()
    median2d(STEPS, 3, "cpu")
    assert [path.stat().st_mtime_ns for path in library.parent.iterdir()] == [built]


LOAD = [sys.executable, "-c", "import build; print(build.load_c('median').median2d.__name__)"]


@pytest.mark.parametrize("size", [0, 100])
def test_a_library_that_was_cut_short_is_built_anew(fresh_build, size):
    """As a machine that stops may leave it."""
    for _ in range(2):
        run = subprocess.run(LOAD, capture_output=True, text=True, cwd=build.SOURCES.parent)
        assert run.stdout.strip() == "median2d", run.stderr
        (library,) = (fresh_build / "cache/cn-stylegan").iterdir()
        assert library.stat().st_size > 1000
        library.write_bytes(library.read_bytes()[:size])


def test_processes_that_start_together(fresh_build):
    runs = [subprocess.Popen(LOAD, stdout=subprocess.PIPE, text=True, cwd=build.SOURCES.parent) for _ in range(2)]
    assert [run.communicate()[0].strip() for run in runs] == ["median2d"] * 2
    assert len(list((fresh_build / "cache/cn-stylegan").iterdir())) == 1


def test_no_compiler(fresh_build, monkeypatch):
    monkeypatch.setenv("PATH", str(fresh_build))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(build.BuildError, match="no C compiler.*install gcc"):
        median2d(STEPS, 3, "cpu")
    with pytest.warns(UserWarning, match="runs on scipy.*no C compiler"):
        result = median2d(STEPS, 3)
    assert torch.equal(result, median2d(STEPS, 3, "ref"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        median2d(STEPS, 3)  # warned once


def fake_compiler(folder, script):
    path = folder / "fakecc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_compile_error_shows_the_last_lines(fresh_build, monkeypatch):
    script = 'case "$*" in *-dM*) exit 0;; esac; for i in 1 2 3 4 5 6 7 8 9; do echo "line $i" >&2; done; exit 1'
    monkeypatch.setenv("CC", fake_compiler(fresh_build, script))
    with pytest.raises(build.BuildError, match="median.c failed:\nline 2\n(.*\n)*line 9$"):
        median2d(STEPS, 3, "cpu")
    assert list((fresh_build / "cache/cn-stylegan").iterdir()) == []


def test_a_failing_compiler_is_not_started_at_every_call(fresh_build, monkeypatch):
    started = fresh_build / "started"
    monkeypatch.setenv("CC", fake_compiler(fresh_build, f'echo "$*" >> {started}; exit 1'))
    with pytest.warns(UserWarning, match="runs on scipy"):
        median2d(STEPS, 3)
    times = started.read_text()
    assert torch.equal(median2d(STEPS, 3), median2d(STEPS, 3, "ref")) and started.read_text() == times


def test_a_compiler_that_is_no_program(fresh_build, monkeypatch):
    program = fake_compiler(fresh_build, "")
    with open(program, "w") as file:
        file.write("not a program")
    monkeypatch.setenv("CC", program)
    with pytest.raises(build.BuildError, match="fakecc does not start: .*; set CC to a C compiler"):
        median2d(STEPS, 3, "cpu")
    with pytest.warns(UserWarning, match="runs on scipy.*does not start"):
        assert torch.equal(median2d(STEPS, 3), median2d(STEPS, 3, "ref"))


def test_compiler_without_march_native_is_used_without_it(fresh_build, monkeypatch):
    monkeypatch.setenv("CC", fake_compiler(fresh_build, 'case "$*" in *-march*) exit 1;; esac; exec gcc "$@"'))
    assert median2d(STEPS, 3, "cpu")[1, 1] == 5


def test_cc_that_names_nothing(fresh_build, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(build.BuildError, match="CC='no-such-compiler' names no program"):
        median2d(STEPS, 3, "cpu")


def test_cache_folder_that_cannot_be_written(fresh_build, monkeypatch):
    blocked = fresh_build / "file"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(blocked))
    with pytest.raises(build.BuildError, match="Set XDG_CACHE_HOME"):
        median2d(STEPS, 3, "cpu")


def test_a_user_without_a_home_folder(fresh_build, monkeypatch):
    """As in a container that is run as a number: no HOME, and no entry among the users."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(build.BuildError, match="no home folder.*set XDG_CACHE_HOME"):
        median2d(STEPS, 3, "cpu")
    with pytest.warns(UserWarning, match="runs on scipy.*no home folder"):
        assert torch.equal(median2d(STEPS, 3), median2d(STEPS, 3, "ref"))
