"""Wording shared by messages."""

from __future__ import annotations

from collections.abc import Sequence


def some(names: Sequence[str], most: int = 5, between: str = ", ") -> str:
    """The first of several names, and how many more there are: 'a, b, c and 4 more'."""
    return between.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
