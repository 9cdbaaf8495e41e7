"""The measures of how unusual a scan is beside its closest normal. A new one is a file of its own and an entry here.

They have the same methods: watch a reconstruction, take the evidence (residual.py), be fitted to healthy scans, assess.
"""

from __future__ import annotations

from detect.surprise import Surprise
from detect.votes import Votes

VERSION = 1                     # of everything that a score hangs on: calibrations of another are not comparable

Measure = Votes | Surprise
MEASURES: dict[str, type[Measure]] = {cls.name: cls for cls in (Votes, Surprise)}
