"""Compiles the C and CUDA sources of op/csrc at first use and loads them; nothing is compiled at import or install.

A library lands in the user's cache folder ($XDG_CACHE_HOME/cn-stylegan, by default ~/.cache/cn-stylegan) under a
name that hashes the source, the compiler and the processor features or GPU it compiles for, so that a changed source,
a new compiler or another kind of machine sharing the home folder never meets a stale one. The file is written beside
its place and renamed: processes that start together may each compile, and none loads half a library.

The CUDA sources hold kernels and launchers with C linkage, and include nothing of torch: nvcc takes seconds, one
ctypes call starts a kernel, as with the C library, and a library serves every torch of its CUDA version. nvcc needs no
GPU: what was compiled on another machine with the same nvcc can be carried along, in $XDG_CACHE_HOME.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-O3", "-shared", "-fPIC", "-std=c11", "-fno-trapping-math")
COMPILERS = ("cc", "gcc", "clang")
# cudart is torch's own, already loaded: the current device and its streams are then the same for both
CUDA_FLAGS = ("-O3", "-shared", "-Xcompiler=-fPIC", "-cudart=shared", "-std=c++17", "-lineinfo", "--split-compile=0")


class BuildError(RuntimeError):
    """No library could be built. The message says why, with the compiler's last lines, and the mend."""


@functools.cache
def load_c(name: str, *flags: str) -> ctypes.CDLL:
    """The library compiled from op/csrc/<name>.c with these flags besides, built now if it isn't in the cache.

    Raises BuildError. The compiler is $CC, or the first of cc, gcc and clang on the path.
    """
    source = SOURCES / f"{name}.c"
    compiler = find_compiler()
    machine_flag, macros = _target(compiler)
    command = [*compiler, *FLAGS, *machine_flag, *flags]
    key = hashlib.sha256(b"\0".join([source.read_bytes(), " ".join(command).encode(), macros])).hexdigest()
    library = cache_folder() / f"{name}-{key[:16]}.so"
    try:
        return _loaded(command, source, library)
    except OSError as error:
        raise BuildError(f"cannot write or load {library}: {error}. Set XDG_CACHE_HOME to a folder that may "
                         "hold programs (writable, not mounted noexec)") from error


def load_or_warn(name: str, what: str, *flags: str) -> ctypes.CDLL | None:
    """load_c(name, *flags), or None and a warning of `what` runs slower where it cannot be built."""
    try:
        return load_c(name, *flags)
    except BuildError as error:
        warnings.warn(f"{what}: {error}", stacklevel=3)
        return None


def find_compiler() -> list[str]:
    """The C compiler as the start of a command: $CC (which may carry arguments), or the first one found."""
    if "CC" in os.environ:
        compiler = os.environ["CC"].split()
        if not compiler or shutil.which(compiler[0]) is None:
            raise BuildError(f"CC={os.environ['CC']!r} names no program; set CC to a C compiler, or unset it")
        return compiler
    for compiler in COMPILERS:
        if shutil.which(compiler):
            return [compiler]
    raise BuildError(f"no C compiler: none of {', '.join(COMPILERS)} is on the path; install gcc, or set CC")


@functools.cache
def load_cuda(name: str, capability: tuple[int, int]) -> ctypes.CDLL:
    """The library compiled from op/csrc/<name>.cu for GPUs of this compute capability, from the cache if it is there.

    Needs nvcc of torch's CUDA version and a C++ compiler. Raises BuildError.
    """
    try:
        nvcc = cuda_home() / "bin" / "nvcc"
        version = _nvcc_version(nvcc)
        command = [str(nvcc), *CUDA_FLAGS, cuda_target(capability)]
        library = cache_folder() / f"{name}-{_cuda_key(name, command[1:], version)}.so"
        return _loaded(command, SOURCES / f"{name}.cu", library)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        raise BuildError(f"the CUDA kernel {name} cannot be built or loaded:\n{_last_lines(str(error))}\n"
                         "See `python -m op.doctor`; --ops ref does without the kernels, but is slower") from error


def cuda_home() -> Path:
    """The CUDA toolkit: $CUDA_HOME, or where the nvcc on the path lives (behind a wrapper script, too)."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=os.path.join(named, "bin") if named else None)
    if nvcc is None:
        place = f"in {named}/bin (CUDA_HOME)" if named else "on the path"
        raise BuildError(f"no nvcc {place}; install the CUDA toolkit of torch's version, or set CUDA_HOME")
    run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", run.stderr, re.MULTILINE)
    return Path(top[1] if top else Path(nvcc).parent.parent).resolve()


def cuda_sources(name: str) -> list[Path]:
    """What <name>.cu is made of, headers included."""
    return [SOURCES / f"{name}.cu", SOURCES / f"{name}.h", SOURCES / "launch.cuh", SOURCES / "portable.h"]


def cuda_target(capability: tuple[int, int]) -> str:
    """nvcc's flag for machine code of one compute capability."""
    number = "".join(map(str, capability))
    return f"-gencode=arch=compute_{number},code=sm_{number}"


def _nvcc_version(nvcc: Path) -> bytes:
    """What nvcc says of itself. Raises BuildError where its CUDA is another than torch's: their runtimes don't mix."""
    import torch  # heavy, and not needed for C

    version = subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout
    release, wanted = re.search(rb"release (\d+)", version), (torch.version.cuda or "none").partition(".")[0]
    if release is None or release[1].decode() != wanted:
        raise BuildError(f"{nvcc} is of CUDA {release[1].decode() if release else 'unknown'}, torch of CUDA {wanted}; "
                         "install the CUDA toolkit of torch's version, or set CUDA_HOME to it")
    return version


def _cuda_key(name: str, flags: list[str], version: bytes) -> str:
    parts = [*(path.read_bytes() for path in cuda_sources(name)), " ".join(flags).encode(), version]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def cache_folder() -> Path:
    """Where compiled libraries are kept; it may not exist yet. Raises BuildError where there is no home folder."""
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root) / "cn-stylegan"
    try:
        return Path.home() / ".cache" / "cn-stylegan"
    except RuntimeError as error:                         # no HOME, and a user that the system does not know
        raise BuildError("no home folder to keep compiled libraries in; set XDG_CACHE_HOME to a folder") from error


def _target(compiler: list[str]) -> tuple[list[str], bytes]:
    """The flag for this machine's processor, where the compiler knows it, and the macros that it defines then.

    The macros tell the compiler's version and the processor's features: all that decides what a library becomes.
    """
    for flag in (["-march=native", "-mprefer-vector-width=512"], ["-march=native"], []):
        try:
            run = subprocess.run([*compiler, *flag, "-dM", "-E", "-x", "c", os.devnull], capture_output=True)
        except OSError as error:                          # an executable file that is no program
            raise BuildError(f"{' '.join(compiler)} does not start: {error}; set CC to a C compiler") from error
        if run.returncode == 0:
            return flag, run.stdout
    raise BuildError(f"{' '.join(compiler)} does not work:\n{_last_lines(run.stderr)}")


def _loaded(command: list[str], source: Path, library: Path) -> ctypes.CDLL:
    """The library, compiled where it is not there yet or does not load: a machine that stopped may leave it empty."""
    if library.exists():
        try:
            return ctypes.CDLL(str(library))
        except OSError:
            pass
    _compile(command, source, library)
    return ctypes.CDLL(str(library))


def _compile(command: list[str], source: Path, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        run = subprocess.run([*command, str(source), "-o", str(built)], capture_output=True)
        if run.returncode != 0:
            raise BuildError(f"{' '.join(command)} {source.name} failed:\n{_last_lines(run.stderr)}")
        with built.open("rb") as file:
            os.fsync(file.fileno())                       # else the name may reach the disk before the content
        built.replace(library)


def _last_lines(text: str | bytes, count: int = 8) -> str:
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    return "\n".join(text.strip().splitlines()[-count:])
