"""Command lines that recipes and pages name, held against the commands' own parsers; nothing is run."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import pytest

import config
from detect.settings import Settings

ROOT = Path(__file__).resolve().parents[1]


class Parsed(Exception):
    """The command line was understood: the arguments."""


def parse(words: list[str]) -> argparse.Namespace:
    """What `python WORDS...` makes of its arguments.

    Fails the test, with the parser's words, where a file, a flag, a value of it or a key of --set or --row does not
    exist.
    """
    if words[:2] == ["-m", "torch.distributed.run"]:
        words = words[next(i for i, word in enumerate(words) if word.endswith(".py")):]
    name, argv = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
    path = ROOT / (name if name.endswith(".py") else name.replace(".", "/") + ".py")
    if (ROOT / name.replace(".", "/") / "__main__.py").is_file():
        path = ROOT / name.replace(".", "/") / "__main__.py"
    assert path.is_file(), f"{' '.join(words)}: there is no {path.relative_to(ROOT)}"
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        raise Parsed(original(self, *args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        try:
            module.main(argv)
        except Parsed as parsed:
            args = parsed.args[0]
        except SystemExit:
            pytest.fail(f"{' '.join(words)}: not understood")
        else:
            pytest.fail(f"{' '.join(words)}: reads no command line")
    check_values(module, args)
    return args


def check_values(module, args: argparse.Namespace) -> None:
    """ValueError where a preset's dataclass refuses its flags, or no setting has the key of a --set or a --row."""
    if hasattr(module, "PRESETS"):
        config.given(args, module.PRESETS[args.preset])
    if changes := getattr(args, "changes", None):
        before = module.SETTINGS[args.preset] if hasattr(module, "SETTINGS") else ["measure=surprise"]
        Settings().changed(before).changed(changes)
    for row in getattr(args, "mask_rows", ()):
        Settings().changed(row, "--row")
