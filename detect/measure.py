"""The measures of how unusual a scan is beside its closest normal: what one is says Measure, in residual.py.

A new one is a file of its own and an entry here. What it needs of a scan beyond the others is a field of Evidence.
"""

from __future__ import annotations

from detect.residual import Measure
from detect.surprise import Surprise
from detect.votes import Votes

VERSION = 1                     # of everything that a score hangs on: calibrations of another are not comparable

MEASURES: dict[str, type[Measure]] = {cls.name: cls for cls in (Votes, Surprise)}
