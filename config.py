"""Presets and flags: one frozen dataclass a job, every field a flag, the resolved values written to the run."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Callable
from typing import Any, TypeVar

C = TypeVar("C")


def option(default: Any, help: str, choices: tuple | None = None) -> Any:
    """A dataclass field with the help text (and choices) of its flag."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def parse(
    description: str,
    presets: dict[str, C],
    add_arguments: Callable[[argparse.ArgumentParser], None],
    argv: list[str] | None = None,
) -> tuple[C, argparse.Namespace]:
    """The preset of --preset with the given flags laid over it, and the other arguments.

    Flags are the field names with dashes (`--r1-gamma`); the first preset is the default. argparse ends the
    program with exit code 2 on wrong usage; a ValueError of the dataclass becomes the same.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--preset", choices=list(presets), default=next(iter(presets)),
                        help="where the values of all other options come from")
    group = parser.add_argument_group("options of the preset")
    kind = type(next(iter(presets.values())))
    types = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        flag = "--" + f.name.replace("_", "-")
        if types[f.name] is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
                               help=f.metadata["help"])
        else:
            group.add_argument(flag, type=types[f.name], default=argparse.SUPPRESS, choices=f.metadata["choices"],
                               help=f.metadata["help"])
    args = parser.parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(kind) if hasattr(args, f.name)}
    try:
        return dataclasses.replace(presets[args.preset], **given), args
    except ValueError as error:
        parser.error(str(error))
