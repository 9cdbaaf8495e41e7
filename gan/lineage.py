"""Whose scans may judge what a run has taught: those that it, and every run that it began with, held out."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import distributed
from common.wording import some
from dataset import is_same


def lineage(meta: dict) -> Iterator[dict]:
    """The meta of a run and of all whose weights its first ones come from, through --init and --gan: of a run with
    --halved no GAN, whose shape alone it has."""
    yield meta
    for flag in ("init",) if (meta.get("config") or {}).get("halved") else ("init", "gan"):
        if meta.get(flag):
            yield from lineage(meta[flag])


def not_held_out(scans: Collection[str], meta: dict, elsewhere: bool = True) -> list[str]:
    """Of scans those that a run, or one that it began with, did not hold out: it may have been trained on them.

    A run knows what it held out, not by name what it was trained on. elsewhere: count also runs that the first one
    began with and that were trained on another database, which may never have held these scans. What it began with may
    be of a model bundle, which tells how many scans were held out, not which: then it is all of them or none
    (has_learnt_from).
    """
    seen: set[str] = set()
    for one in lineage(meta):
        held_out = one["held_out"]
        if isinstance(held_out, int):
            held_out = () if has_learnt_from(one, meta["data"]) else scans
        elif not elsewhere and one["data"]["digest"] != meta["data"]["digest"]:
            continue
        seen |= set(scans) - set(held_out)
    return sorted(seen)


def has_learnt_from(known: dict, data: dict) -> bool:
    """Whether what a bundle tells of a training has learnt from scans that a database holds out, by all that is told.

    known: data, facts() of its database, and held_out, how many scans of that it did not learn from.
    """
    its = known["data"]
    if its["digest"] == data["digest"] and not is_same(its, data):
        return True                                        # the same scans, and others of them held out
    return is_same(its, data, "val") and known["held_out"] < its["counts"]["val"]["scans"]


def tell_of_seen(held_out: Collection[str], flag: str, folder: Path, meta: dict) -> None:
    """Print a warning where scans that are held out now may have been trained on by the run of a flag."""
    if seen := not_held_out(held_out, meta):
        distributed.print0(f"warning: {flag} {folder}, or a run that it began with, did not hold out "
                           f"{some(seen, 3)}, held out now. If one of them was "
                           "trained on these, what is calibrated or measured on them says too much")
