"""Settings of the figures and of the simulated worklist. On their own: a command line is read before scipy is imported.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FigureSettings:
    level: float = 0.95                    # of the intervals
    bootstrap: int = 2000                  # resamples
    seed: int = 0                          # of these
    prevalence: float | None = None        # share of abnormal scans for the PPV at a prevalence; None: no such figure
    missing: str = "error"                 # scans without a mask: 'error'; otherwise left out of the pixels and counted


@dataclass(frozen=True)
class TriageSettings:
    scans: int = 60                        # scans in a session, drawn with replacement from the labelled ones
    arrival_s: float = 13.0                # mean interval of a Poisson process of arrivals
    reader_start_s: float = 150.0          # the reader comes this long after the first scan
    reading_median_s: float = 20.0         # log-normal reading time
    reading_sigma: float = 0.5             # of its logarithm
    latency_s: float = 10.0                # seconds a scan takes on one of the algorithm's machines
    machines: int = 1
    prevalence: float | None = None        # share of emergencies in a session; None: as in the labels
    repeats: int = 1000
    seed: int = 0
