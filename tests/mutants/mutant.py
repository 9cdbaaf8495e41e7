"""What a mutant is."""

from __future__ import annotations

from dataclasses import dataclass

BLEED = "tests/test_known_bleed.py"


@dataclass(frozen=True)
class Mutant:
    """In `file` the text `old`, found once, becomes `new`; `tests`, arguments of pytest, must notice."""

    defect: str
    file: str
    old: str
    new: str
    tests: str
