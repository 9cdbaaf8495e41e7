"""Compiles the C sources of op/csrc at first use and loads them; nothing is compiled at import or at install.

A library lands in the user's cache folder ($XDG_CACHE_HOME/cn-stylegan, by default ~/.cache/cn-stylegan) under a
name that hashes the source, the compiler and the processor features it compiles for, so that a changed source, a
new compiler or another kind of machine sharing the home folder never meets a stale one. The file is written beside
its place and renamed: processes that start together may each compile, and none loads half a library.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-O3", "-shared", "-fPIC", "-std=c11")
COMPILERS = ("cc", "gcc", "clang")


class BuildError(RuntimeError):
    """No library could be built. The message says why, with the compiler's last lines, and the mend."""


@functools.cache
def load_c(name: str) -> ctypes.CDLL:
    """The library compiled from op/csrc/<name>.c, built now if it isn't in the cache. Raises BuildError.

    The compiler is $CC, or the first of cc, gcc and clang on the path.
    """
    source = SOURCES / f"{name}.c"
    compiler = find_compiler()
    machine_flag, macros = _target(compiler)
    command = [*compiler, *FLAGS, *machine_flag]
    key = hashlib.sha256(b"\0".join([source.read_bytes(), " ".join(command).encode(), macros])).hexdigest()
    library = cache_folder() / f"{name}-{key[:16]}.so"
    try:
        if not library.exists():
            _compile(command, source, library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(f"cannot write or load {library}: {error}. Set XDG_CACHE_HOME to a folder that may "
                         "hold programs (writable, not mounted noexec)") from error


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


def cache_folder() -> Path:
    """Where compiled libraries are kept; it may not exist yet."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "cn-stylegan"


def _target(compiler: list[str]) -> tuple[list[str], bytes]:
    """The flag for this machine's processor, where the compiler knows it, and the macros that it defines then.

    The macros tell the compiler's version and the processor's features: all that decides what a library becomes.
    """
    for flag in (["-march=native"], []):
        run = subprocess.run([*compiler, *flag, "-dM", "-E", "-x", "c", os.devnull], capture_output=True)
        if run.returncode == 0:
            return flag, run.stdout
    raise BuildError(f"{' '.join(compiler)} does not work:\n{_last_lines(run.stderr)}")


def _compile(command: list[str], source: Path, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        run = subprocess.run([*command, str(source), "-o", str(built)], capture_output=True)
        if run.returncode != 0:
            raise BuildError(f"{' '.join(command)} {source.name} failed:\n{_last_lines(run.stderr)}")
        built.replace(library)


def _last_lines(text: bytes, count: int = 8) -> str:
    return "\n".join(text.decode(errors="replace").strip().splitlines()[-count:])
