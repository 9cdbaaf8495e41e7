"""Wording shared by messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def some(names: Sequence[str], most: int = 5, between: str = ", ") -> str:
    """The first of several names, and how many more there are: 'a, b, c and 4 more'."""
    return between.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def differing(before: Any, now: Any, name: str) -> list[str]:
    """Where two values differ that JSON can hold, in words; of objects each key. Long values are cut short."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [line for key in {**before, **now} for line in differing(before.get(key), now.get(key), f"{name}.{key}")]
    values = (text if len(text) <= 60 else f"{text[:57]}..." for text in map(json.dumps, (before, now)))
    return [] if before == now else [f"{name} " + ", now ".join(values)]
