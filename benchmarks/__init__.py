"""What is measured: detection, speed, and the baselines beside."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path


def new_file(text: str) -> Path:
    """A file of the command line that is written in the end: that it can be is tried before hours of work."""
    path = Path(text)
    try:
        if path.is_dir():
            raise OSError(0, "a folder is there")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") if path.exists() else tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path}: cannot be written ({error.strerror}); choose another") from error
    return path
