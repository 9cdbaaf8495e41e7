"""A results folder of projector.py as one HTML file that opens offline: worklist, pictures, how sure, settings.

    python -m detect.report RESULTS [--out FILE] [--evaluation metrics.json] [--megabytes 40]

RESULTS holds scores.csv, slices.csv, run.json and <scan>/overlay/NN.png. Pictures are packed as JPEG up to the limit:
first the key slices of every scan, reduced, then all slices of as many scans as fit, highest score first. The page
says what it lacks. Exit 0 done, 2 unfit input.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from detect.report.page import MEGABYTES, write_report
from detect.report.tables import ReportError, read_json


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m detect.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results folder of projector.py")
    parser.add_argument("--out", type=Path, help="the page (default: RESULTS/report.html)")
    parser.add_argument("--evaluation", type=Path, help="metrics.json of evaluate.py for these results")
    parser.add_argument("--megabytes", type=float, default=MEGABYTES, help="limit of the page (default %(default)g)")
    args = parser.parse_args(argv)
    if not 0 < args.megabytes < math.inf:
        parser.error(f"--megabytes must be above 0, got {args.megabytes:g}")
    try:
        evaluation = read_json(args.evaluation) if args.evaluation else None
        page = write_report(args.results, args.out or args.results / "report.html", evaluation, args.megabytes)
    except (OSError, ReportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
