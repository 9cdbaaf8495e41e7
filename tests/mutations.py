"""One-line defects that the tests must catch.

    make mutants                                     all of them, some 10 minutes of one CPU core
    python tests/mutations.py train.py percentile    those whose file or defect holds one of these words

A copy of the tree gets one mutant at a time, and the tests named for it must fail there; without it they must pass.
The mutants are in mutants/. One whose text is not found exactly once is an error: whoever changes such a line writes
its mutant anew.
Exit codes: 0 all caught; 1 a mutant survived, does not fit, or keeps its tests from running at all.
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import pytest
from mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("matplotlib.figure", "nibabel", "pydicom", "safetensors.torch", "scipy.ndimage", "skimage.morphology",
             "sklearn.metrics", "torch")   # take longer to import than most of these tests to run
TIMEOUT_S = 1800                           # of one run of tests
VERDICTS = {0: "SURVIVED", 1: "caught"}    # by pytest's exit code; others mean that the tests did not run


def misfits(root: Path) -> list[str]:
    """What keeps a mutant from being put in."""
    found = []
    for mutant in MUTANTS:
        path = root / mutant.file
        count = path.read_text(encoding="utf-8").count(mutant.old) if path.is_file() else 0
        if count != 1:
            found.append(f"{mutant.file}: expected once, found {count} times: {mutant.old!r} ({mutant.defect})")
    return found


def copy_tree(to: Path) -> None:
    """The files that git knows or would add, as they are now."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def run_tests(tree: Path, file: str, selected: str) -> tuple[int, str]:
    """pytest's exit code for the tests of a file, '' or an expression of -k, and what it said.

    In a fork of this process, which has the libraries and nothing of the program. No bytecode is kept: it would
    outlive a mutant of the same length. What tests keep in pytest's cache stays from run to run.
    """
    log = tree / ".said"
    child = os.fork()
    if not child:
        code = 3
        try:
            said = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            signal.alarm(TIMEOUT_S)
            os.chdir(tree)
            sys.dont_write_bytecode = True
            sys.path[:] = [entry for entry in sys.path if entry != str(ROOT / "tests")]
            arguments = ["-x", "-q", "--tb=line", file, *(["-k", selected] if selected else [])]
            code = int(pytest.main(arguments))
        finally:
            sys.stdout.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), log.read_text(encoding="utf-8", errors="replace")


def by_file(mutants: list[Mutant]) -> dict[str, str]:
    """The test files of the mutants, and what to select of each so that all of their tests run."""
    selections = defaultdict(set)
    for mutant in mutants:
        file, _, selected = mutant.tests.partition(" -k ")
        selections[file].add(selected)
    return {file: "" if "" in chosen else " or ".join(sorted(chosen)) for file, chosen in selections.items()}


def main(words: list[str]) -> int:
    if wrong := misfits(ROOT):
        print("\n".join(wrong), file=sys.stderr)
        return 1
    chosen = [m for m in MUTANTS if not words or any(word in f"{m.file}: {m.defect}" for word in words)]
    for name in LIBRARIES:
        importlib.import_module(name)
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        for file, selected in by_file(chosen).items():
            code, said = run_tests(tree, file, selected)
            if code:
                print(f"{file}: must pass without a mutant, but ended with {code}\n{said}", file=sys.stderr)
                return 1
            print(f"{file}: passes without a mutant", flush=True)
        for number, mutant in enumerate(chosen, 1):
            started = time.perf_counter()
            path = tree / mutant.file
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
            file, _, selected = mutant.tests.partition(" -k ")
            code, said = run_tests(tree, file, selected)
            path.write_text(text, encoding="utf-8")
            verdict = VERDICTS.get(code, f"NOT TESTED (pytest ended with {code})")
            print(f"{number}/{len(chosen)} {verdict}: {mutant.file}: {mutant.defect} "
                  f"({time.perf_counter() - started:.0f} s)", flush=True)
            if code != 1:
                survivors += 1
                print(said[-2000:], flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
