"""A command reads its command line before it imports what takes seconds: --help and --version answer at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.test_help import COMMANDS, ROOT

LARGE = {"torch", "scipy", "numpy", "pydicom", "highdicom", "nibabel", "skimage", "sklearn", "matplotlib", "PIL"}
RUN = """
import runpy, sys
command, sys.argv = sys.argv[1], sys.argv[1:]
try:
    runpy.run_path(command, run_name="__main__")
except SystemExit as ended:
    print("exit", ended.code, "modules", *{name.partition(".")[0] for name in sys.modules})
"""


def imported(*words: str) -> set[str]:
    """The modules at the top that `python WORDS...` has imported by its end, which must be a good one."""
    ran = subprocess.run([sys.executable, "-c", RUN, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "\nexit 0 modules " in ran.stdout, ran.stdout
    return set(ran.stdout.rpartition("modules ")[2].split())


@pytest.mark.parametrize("words", [(f"{name.partition('-')[0]}.py", *more, "--help") for name, more in COMMANDS.items()]
                         + [("projector.py", "merge", "--help"), ("projector.py", "--version")], ids=" ".join)
def test_the_command_line_is_read_before_anything_large_is_imported(words):
    found = imported(*words)
    assert "argparse" in found and not found & LARGE
