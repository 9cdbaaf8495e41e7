"""docs/help/*.txt is what --help says; python tests/test_help.py writes it anew."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "help"
COMMANDS = {"prepare": [], "train": [], "train_encoder": [], "train_reader": [], "latent_stats": [], "projector": [],
            "evaluate": [], "evaluate-triage": ["triage"], "checkpoint": []}
MOST_OPTIONS = 20                     # of projector.py; what is rarer goes through --set


def help_text(name: str) -> str:
    """What the command prints with --help, 100 columns wide."""
    module = importlib.import_module(name.partition("-")[0])
    argv, columns, said = sys.argv, os.environ.get("COLUMNS"), io.StringIO()
    sys.argv, os.environ["COLUMNS"] = [f"{module.__name__}.py"], "100"
    try:
        with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as stopped:
            module.main([*COMMANDS[name], "--help"])
    finally:
        sys.argv = argv
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns
    assert stopped.value.code == 0
    return said.getvalue()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_that_is_kept_is_the_help_that_is_given(name):
    kept = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    # Word by word: Python's versions break the lines of the usage in other places.
    assert kept.split() == help_text(name).split(), "run: python tests/test_help.py"


def test_every_help_that_is_kept_is_of_a_command():
    assert {path.stem for path in FOLDER.glob("*.txt")} == COMMANDS.keys()


def test_projector_shows_few_options():
    options = re.findall(r"^  (?:-\w, )?(--[\w-]+)", help_text("projector"), re.M)
    assert 10 < len(options) <= MOST_OPTIONS


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    FOLDER.mkdir(exist_ok=True)
    for command in COMMANDS:
        (FOLDER / f"{command}.txt").write_text(help_text(command), encoding="utf-8")
