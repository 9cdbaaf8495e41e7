"""A command reads its command line before it imports what takes seconds: --help and --version answer at once."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from common.imports import quick_imports
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


@pytest.fixture
def thawed():
    gc.unfreeze()
    yield
    gc.unfreeze()


def test_what_is_loaded_is_never_looked_through(thawed, tmp_path, monkeypatch):
    (tmp_path / "loaded_once.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with quick_imports():
        import loaded_once  # noqa: F401
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count()
    monkeypatch.delitem(sys.modules, "loaded_once")


def test_where_nothing_is_loaded_garbage_stays_garbage(thawed):
    with pytest.raises(KeyError), quick_imports():
        raise KeyError("of the block")
    assert gc.isenabled() and not gc.get_freeze_count()


def test_a_collector_that_was_off_stays_off(thawed):
    gc.disable()
    try:
        with quick_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
