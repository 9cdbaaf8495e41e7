"""Presets and flags: one frozen dataclass a job, every field a flag, the resolved values written to the run."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import typing
from collections.abc import Callable
from typing import Any, TypeVar

C = TypeVar("C")
MOST_SEED = 2**32 - 1                   # what is above these bits tells how often a run has gone back (gan/run.py)


def option(default: Any, help: str, choices: tuple | None = None, stored: bool = True) -> Any:
    """A dataclass field with the help text (and choices) of its flag; stored=False: what no result depends on."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "stored": stored})


def flag(name: str, value: Any) -> str:
    """A field and its value as given on a command line."""
    dashed = name.replace("_", "-")
    return f"--{dashed} {value}" if not isinstance(value, bool) else f"--{dashed}" if value else f"--no-{dashed}"


def check_range(config: Any, names: tuple[str, ...], low: float, high: float = math.inf,
                above: bool = False, flags: bool = True) -> None:
    """ValueError unless the fields lie from `low` (above: beyond it) to `high`, and are finite; it names them as flags
    or, as of settings that are given by KEY=VALUE, as they are.
    """
    for name in names:
        value = getattr(config, name)
        if not (low < value if above else low <= value) or not value <= high or math.isinf(value):
            limit = f" and at most {high:.10g}" if math.isfinite(high) else ""
            least = "above" if above else "at least"
            shown = f"--{name.replace('_', '-')}" if flags else name
            raise ValueError(f"{shown} must be {least} {low:g}{limit}, got {value:.10g}")


def check_choices(config: Any) -> None:
    """ValueError naming a field whose value is none of its choices; of flags argparse sees to that."""
    for f in dataclasses.fields(config):
        choices, value = f.metadata["choices"], getattr(config, f.name)
        if choices and value not in choices:
            raise ValueError(f"{f.name} must be one of {', '.join(choices)}, got {value!r}")


def add_options(parser: argparse.ArgumentParser, kind: type, title: str) -> None:
    """A flag for every field of the dataclass `kind`, with dashes (`--r1-gamma`); none has a value until given."""
    group, types = parser.add_argument_group(title), typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        name = "--" + f.name.replace("_", "-")
        if types[f.name] is bool:
            group.add_argument(name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
                               help=f.metadata["help"])
        else:
            group.add_argument(name, type=types[f.name], default=argparse.SUPPRESS, choices=f.metadata["choices"],
                               help=f.metadata["help"])


def given(args: argparse.Namespace, base: C) -> C:
    """base with the fields replaced whose flags were given. Raises ValueError as the dataclass does."""
    fields = {f.name: getattr(args, f.name) for f in dataclasses.fields(base) if hasattr(args, f.name)}
    return dataclasses.replace(base, **fields)


def parse(
    description: str,
    presets: dict[str, C],
    add_arguments: Callable[[argparse.ArgumentParser], None],
    argv: list[str] | None = None,
) -> tuple[C, argparse.Namespace]:
    """The preset of --preset with the given flags laid over it, and the other arguments.

    The first preset is the default. argparse ends the program with exit code 2 on wrong usage; a ValueError of the
    dataclass becomes the same.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--preset", choices=list(presets), default=next(iter(presets)),
                        help="where the values of all other options come from (default: %(default)s)")
    add_options(parser, type(next(iter(presets.values()))), "options of the preset")
    args = parser.parse_args(argv)
    try:
        return given(args, presets[args.preset]), args
    except ValueError as error:
        parser.error(str(error))


RESUMES = "stopped; the same command goes on from here"       # what only commands may say that keep what they did


def exit_code(command: Callable[[argparse.Namespace], int | None], args: argparse.Namespace,
              stopped: str = "stopped") -> int:
    """The exit code of command(args), where None is 0; 2, and the reason, for what is wrong in files or flags.

    stopped: what is said when it is interrupted, with exit code 130.
    """
    try:
        return command(args) or 0
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
