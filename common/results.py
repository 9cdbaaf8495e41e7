"""What a command that writes results of its own leaves alone: a folder of projector.py's."""

from __future__ import annotations

import contextlib
from pathlib import Path

from common.files import read_object

BY_HASH = "scans"                        # with --part, scans' folders lie in folders by hash in this one
RESULTS = ("*/result.json", f"{BY_HASH}/??/*/result.json")


def refuse_projected(out: Path) -> None:
    """ValueError where projector.py has results: a scan's result.json, or a run.json with settings.

    HealthyGAN's run.json has none, and a damaged one may be anyone's.
    """
    made = next((path for found in RESULTS for path in out.glob(found)), None)
    with contextlib.suppress(FileNotFoundError, ValueError):
        if made is None and "settings" in read_object(out / "run.json"):
            made = out / "run.json"
    if made is not None:
        raise ValueError(f"--out {out}: holds results of projector.py ({made.relative_to(out)}); choose another --out")
