"""The page: its parts put together by the template beside this file."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.files import replace_text, sha256
from ct.picture import PANELS, RESIDUAL_FULL_HU
from detect.measure import MEASURES
from detect.report.pictures import add_pictures
from detect.report.tables import Entry, ReportError, attach_labels, read_calibration, read_results
from detect.report.words import coverage, digits, facts, found, healthy_below, level_mm, sure, unshown, where
from detect.scores import SCAN_SCORES, rounded_down
from detect.settings import Settings

MEGABYTES = 40.0


def _slices_json(entry: Entry) -> list:
    """By slice: number, mm below the vertex for the plot, score as told, projected or not, level as told."""
    return [[s.number, round(s.below_vertex_mm, 1), float(digits(s.score)), int(s.projected),
             level_mm(s.below_vertex_mm)] for s in entry.slices]


def write_report(results: Path, out: Path, evaluation: dict | None = None, megabytes: float = MEGABYTES) -> Path:
    """Write the page for a finished results folder of projector.py; returns `out`.

    evaluation: evaluate.py's metrics.json of these results; labels, ROC and figures are then shown. megabytes: of the
    whole page; pictures of lower scores give way first, the text never. Raises ReportError, OSError.
    """
    entries, run, others = read_results(results)
    try:
        chosen, calibration = Settings.from_json(run["settings"]), read_calibration(run)
    except (AttributeError, KeyError, TypeError, ValueError) as error:          # as changed by hand
        raise ReportError(f"{results / 'run.json'}: settings or calibration are not as projector.py writes them "
                          f"({error}); run it again") from error
    measure = MEASURES[chosen.measure](chosen.scoring, chosen.mask)
    hashes = {name: sha256(results / name) for name in ("scores.csv", "slices.csv")}
    if evaluation is not None:
        attach_labels(entries, evaluation, hashes["scores.csv"])
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"digits": digits, "slices": _slices_json,
                            "pretty": partial(json.dumps, indent=2, ensure_ascii=False),
                            "below": lambda entry: healthy_below(entry, calibration),
                            "percentile": lambda entry: "–" if entry.percentile is None
                            else f"{rounded_down(entry.percentile):.1f}"}
    template = environment.get_template("page.html.jinja")
    end = max([*(e.score for e in entries if e.ok), *calibration.scores, calibration.threshold or 0, 1e-9])
    common = set.intersection(*(set(e.notes) for e in entries if e.ok)) if sum(e.ok for e in entries) > 1 else set()

    # Of healthy brain it tells by residuals as the calibration had them: other settings may give others
    said_of_marks = measure.criterion() if run.get("calibration") or not measure.least_patients else ""

    def render() -> str:
        return template.render(
            entries=entries, run=run, calibration=calibration, evaluation=evaluation, common=common, end=end,
            compared=any(map(calibration.compares, entries)), judged=any(e.flagged is not None for e in entries),
            found=unshown(entries, others) + found(entries, calibration), where=where(entries, calibration),
            sure=sure(entries, calibration, evaluation), coverage=coverage(entries, megabytes),
            facts=facts(run, hashes), panels=PANELS, full_hu=RESIDUAL_FULL_HU,
            settings={k: v for k, v in run.items() if k != "calibration"},
            score_words=f"{measure.words}, {SCAN_SCORES[chosen.scan_score].words}",
            criterion=said_of_marks, marked=measure.marked,
            read=getattr(chosen.scoring, "read", 0) if (run["model"] or {}).get("reader") else 0)

    # 2 kB for what is yet to be said about pictures that did not fit or could not be read.
    add_pictures(entries, calibration, int(megabytes * 1e6) - len(render().encode()) - 2000)
    replace_text(out, render())
    return out
