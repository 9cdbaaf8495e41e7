"""The time zone that DICOM objects are dated in: the machine's, or the one that the environment's TZ names."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path
from zoneinfo import TZPATH, ZoneInfo

POSIX_ZONE = re.compile(r"([A-Za-z]{3,}|<[\w+-]+>)[+-]?(\d+(?::\d+)*)\S*")        # name and offset, such as KST-9
REVERSED = ("UTC", "GMT")                             # with a number behind it: read the other way round


def check_time_zone() -> None:
    """Raises ValueError for a TZ that dates results in another zone than meant, without a word.

    The C library takes UTC for a name that it does not find, and hours west of Greenwich for UTC+9, as POSIX has it.
    """
    zone = os.environ.get("TZ", "").removeprefix(":")
    if zone in ("", "UTC") or any(_is_zone(Path(folder, zone)) for folder in TZPATH):
        return
    posix = POSIX_ZONE.fullmatch(zone)
    if posix is None:
        raise ValueError(f"TZ={zone}: no time zone of this machine, so that results would be dated in UTC; expected a "
                         "name such as Asia/Seoul with nothing behind it, and the system's package tzdata")
    if posix[1].strip("<>").upper() in REVERSED and posix[2].strip("0:"):
        raise ValueError(f"TZ={zone}: a number behind {posix[1]} counts westward, so that UTC+9 means nine hours west "
                         "of Greenwich; write a name, such as Asia/Seoul")


def _is_zone(path: Path) -> bool:
    """Whether a file is a time zone's: beside them lie tables, such as zone.tab. No ZoneInfo(name): that also finds
    what Python alone has."""
    try:
        with open(path, "rb") as file:
            ZoneInfo.from_file(file)
    except (OSError, ValueError, struct.error):
        return False
    return True
