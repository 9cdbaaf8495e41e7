"""The report: what it says, which pictures it holds, that it is one safe file, and what it refuses."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

import evaluate
from ct.picture import pack_overlay
from detect.outputs import SCORE_COLUMNS
from detect.report import ReportError, read_json, tables, words, write_report
from detect.report.__main__ import main
from detect.report.page import _slices_json
from evaluation import cohort

RUN = {"weights_sha256": "f00d", "model": {"name": "tiny"},
       "settings": {"method": "search", "measure": "votes", "scoring": {"threshold_hu": 5.0}, "scan_score": "mean"},
       "device": "cpu", "precision": "float32", "threads": 1, "processes": 1, "seconds": 3.0,
       "seconds_per_scan_by_stage": {"encode": 0.5}, "versions": {"python": "3.11"}}
CALIBRATION = {"scans": 4, "scan_scores": {"mean": [4.0, 1.0, 3.0, 2.0]},
               "threshold": {"fpr": 0.2, "mean": 3.5, "reason": None},
               "slice_scores": [{"scan": 0, "below_vertex_mm": mm, "score": 9.0 if mm > 35 else 1.0}
                                for mm in (40, 30, 20, 10)]}
SLICES = (98, 99, 100, 101)                                     # overlay names of two and of three digits
SLICE_SCORES = (8.0, 2.0, 6.0, 4.0)                             # the highest lies where healthy slices score 9


def write_csv(path, columns, rows):
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([columns, *rows])


@pytest.fixture
def results(tmp_path):
    """make(scores, ...) -> a results folder: scans of 4 slices by descending score, then one that failed."""
    def make(scores=(5.0, 2.5), names="ab", notes="", calibration=CALIBRATION, failed="c", side=24):
        folder = tmp_path / "results"
        below = [sum(score > h for h in (1, 2, 3, 4)) for score in scores]
        rows = [[name, score, 100 * n / 5, int(score > 3.5), "ok", "", 4, 4, 5.5, 12.3, notes]
                for name, score, n in zip(names, scores, below)]
        rows += [[name, "", "", "", "failed", "no brain <found>", "", "", "", "", ""] for name in failed]
        slices = []
        rng = np.random.default_rng(0)
        for name in names:
            (folder / name / "overlay").mkdir(parents=True)
            for number, score, mm in zip(SLICES, SLICE_SCORES, (40, 30, 20, 10)):
                slices.append([name, number, mm, 1, score])
                noise = rng.integers(0, 255, (side, 4 * side, 3), np.uint8)
                Image.fromarray(noise).save(folder / name / "overlay" / f"{number:02d}.png")
        write_csv(folder / "scores.csv", SCORE_COLUMNS, rows)
        write_csv(folder / "slices.csv", tables.SLICE_COLUMNS, slices)
        (folder / "run.json").write_text(json.dumps(RUN | {"calibration": calibration}))
        return folder
    return make


def page_of(folder, **options) -> str:
    return write_report(folder, folder / "report.html", **options).read_text(encoding="utf-8")


def scans_in(page: str) -> dict[str, dict]:
    """What the page's script sees of each scan."""
    pattern = r'<section class="scan" data-scan="(.*?)" hidden>.*?<script type="application/json">(.*?)<'
    sections = re.findall(pattern, page, re.DOTALL)
    return {html.unescape(name): json.loads(data) for name, data in sections}


def text_of(page: str) -> str:
    """What a reader sees of the markup, in one line."""
    body = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


@pytest.mark.parametrize(("model", "read", "said"), (
    ({"reader": {"images_seen": 9}}, 0.4, True), ({"name": "a"}, 0.4, False), (None, 0.4, False),
    ({"reader": {"images_seen": 9}}, 0.0, False)))
def test_a_reader_that_has_a_say_is_named(model, read, said, results, tmp_path):
    folder = results()
    settings = {"method": "inpainting", "measure": "surprise", "scoring": {"read": read}, "scan_score": "mean"}
    run = RUN | {"calibration": CALIBRATION, "settings": settings, "model": model}
    (folder / "run.json").write_text(json.dumps(run))
    page = write_report(folder, tmp_path / "page.html").read_text()
    assert ("has 40 % of the say in it" in page) == said and page.count("of the say") == said


def test_every_scan_with_its_slices_in_order_and_pictures_that_open(results):
    scans = scans_in(page_of(results()))
    assert list(scans) == ["a", "b", "c"]
    assert [number for number, _ in scans["a"]["pictures"]] == [98, 99, 100, 101]      # not 100, 101, 98, 99
    assert scans["a"]["slices"][1] == [99, 30.0, 2.0, 1, 30]
    for _, packed in scans["b"]["pictures"]:
        picture = Image.open(io.BytesIO(base64.b64decode(packed)))
        assert (picture.format, picture.size) == ("JPEG", (96, 24))
    assert scans["c"] == {"slices": [], "pictures": [], "aspect": 1.0, "total": 0, "key": [], "compared": False}


def test_key_slices_rise_above_healthy_ones_at_their_level(results):
    folder = results()
    assert scans_in(page_of(folder))["a"]["key"] == [100, 101, 99]           # 6 - 1, 4 - 1, 2 - 1; 8 - 9 is last
    (folder / "run.json").write_text(json.dumps(RUN | {"calibration": None}))
    assert scans_in(page_of(folder))["a"]["key"] == [98, 100, 101]           # by score alone


def test_a_calibration_without_the_runs_scan_score_is_none(results):
    """One made before there was that score: the page failed, after all scans were done."""
    folder = results(calibration=CALIBRATION | {"scan_scores": {"max": [1.0, 2.0]},
                                                "threshold": {"fpr": 0.2, "max": 1.0, "reason": None}})
    page = text_of(page_of(folder))
    assert "Highest: a, score 5." in page and "healthy scans: none can" not in page
    assert tables.read_calibration(RUN | {"calibration": CALIBRATION | {"scan_scores": {}}, "threshold": 3.0}
                                   ) == tables.HealthyScores([], 3.0, None, None, [])


def test_a_threshold_of_the_run_takes_the_place_of_the_models():
    levels = [(10.0, 1.0, 1.0), (20.0, 1.0, 1.0), (30.0, 1.0, 1.0), (40.0, 9.0, 9.0)]
    run = RUN | {"calibration": CALIBRATION}
    assert tables.read_calibration(run) == tables.HealthyScores([1.0, 2.0, 3.0, 4.0], 3.5, 0.2, None, levels)
    given = tables.read_calibration(run | {"threshold": 2.0})
    assert given == tables.HealthyScores([1.0, 2.0, 3.0, 4.0], 2.0, None, None, levels)


def test_it_says_what_was_found_where_and_how_sure(results):
    text = text_of(page_of(results()))
    for told in ("1 of 2 scans flagged", "Highest: a, score 5, above 4 of 4 healthy scans.",
                 "1 scan failed: it stands last", "a: slice 100, 20 mm below the top.",
                 "4 healthy scans: none can be called rarer than one in 5.",
                 "with a chance of at most 20%", "Without labels it is not known", "Not a diagnosis.",
                 "failed: no brain <found>", "SHA-256 f00d"):
        assert told in text
    assert "To stay within" not in text


def test_slices_above_the_top_are_said_to_be(results):
    """They were -5 mm below it."""
    assert [words.level_of(mm) for mm in (-4.7, -0.3, 0, 30.4)] == [
        "5 mm above the top", "0 mm below the top", "0 mm below the top", "30 mm below the top"]
    folder = results()
    text = (folder / "slices.csv").read_text()
    (folder / "slices.csv").write_text(text.replace("a,100,20", "a,100,-20").replace("a,101,10", "a,101,-30"))
    assert "a: slice 100, 20 mm above the top." in text_of(page_of(folder))


def test_a_slice_has_one_level_and_one_score_on_a_page(results):
    """The viewer's own rounding made 13 mm of what the sentence called 12; scores from 1000 on lost digits there."""
    folder = results()
    text = (folder / "slices.csv").read_text()
    (folder / "slices.csv").write_text(text.replace("a,100,20", "a,100,12.5").replace("a,101,10", "a,101,-12.46"))
    page = page_of(folder)
    assert "a: slice 100, 12 mm below the top." in text_of(page)
    data = next(json.loads(found) for found in re.findall(r'<script type="application/json">(.*?)</script>', page, re.S)
                if json.loads(found)["slices"])
    assert {s[0]: s[4] for s in data["slices"] if s[0] >= 100} == {100: 12, 101: -12}
    assert "Math.round" not in page                                      # words.py has done it
    assert [words.digits(score) for score in (1234.5, 999.6, 999.4, 12.345)] == ["1234", "1000", "999", "12.3"]
    entry = replace(entry_of("ok"), slices=[tables.Slice(0, 12.5, True, 1234.5)])
    assert _slices_json(entry) == [[0, 12.5, 1234.0, 1, 12]]


def test_pictures_are_reached_by_keys(results):
    """They were enlarged by the mouse alone."""
    page = page_of(results())
    assert len(re.findall(r'<img alt="" tabindex="0" role="button" aria-pressed="false"', page)) == 4


def test_a_rate_is_never_said_to_be_lower_than_it_is(results):
    """3.45% was said to be 3%."""
    for rate, said in ((0.0345, "3.45%"), (1 / 29, "3.45%"), (0.03454, "3.46%"), (0.05, "5%")):
        calibrated = CALIBRATION | {"threshold": CALIBRATION["threshold"] | {"fpr": rate}}
        folder = results(calibration=calibrated)
        assert f"with a chance of at most {said}." in text_of(page_of(folder))
        shutil.rmtree(folder)


def test_scans_not_to_be_trusted_are_shown_with_pictures_and_notes(results):
    """Their reason asks to look at them."""
    folder = results(notes="a gap of 10 mm | too much differs: check the window")
    rows = (folder / "scores.csv").read_text()
    reason = "too much differs: check the window"
    (folder / "scores.csv").write_text(rows.replace("b,2.5,40.0,0,ok,,", f"b,2.5,,,unreliable,{reason},"))
    page = page_of(folder)
    shown = scans_in(page)
    assert list(shown) == ["a", "b", "c"] and [n for n, _ in shown["b"]["pictures"]] == list(SLICES)
    assert shown["b"]["key"] == [100, 101, 99] and not shown["c"]["pictures"]
    section = text_of(re.search(r'<section class="scan" data-scan="b".*?</section>', page, re.DOTALL)[0])
    assert f"Unreliable: {reason}" in section and section.count(reason) == 1
    assert "a gap of 10 mm" in section and "slices compared 4 of 4" in section


def test_what_is_marked_is_said_in_a_sentence(results, tmp_path):
    folder = results()
    assert "Marked is what differs by more than 5 HU, steadily" in text_of(page_of(folder))
    settings = {"method": "inpainting", "measure": "surprise", "mask": {"surprise_mask": 2.5}, "scan_score": "mean"}
    (folder / "run.json").write_text(json.dumps(RUN | {"calibration": CALIBRATION, "settings": settings}))
    assert ("Marked is what differs by more than 315 of 316 places of healthy brain at that position if denser, more "
            "than 14,677 of 14,678 if less dense, and what adjoins it with at least half of that difference."
            ) in text_of(page_of(folder))
    (folder / "run.json").write_text(json.dumps(RUN | {"calibration": None, "settings": settings}))
    assert "Marked is" not in text_of(page_of(folder))       # other settings: what healthy brain has by them is unknown


def test_without_a_threshold_or_a_calibration_it_says_so(results):
    few = CALIBRATION | {"threshold": {"fpr": 0.05, "mean": None, "reason": "needs 19 healthy scans"}}
    folder = results(calibration=few)
    rows = (folder / "scores.csv").read_text().replace(",1,ok", ",,ok").replace(",0,ok", ",,ok")
    (folder / "scores.csv").write_text(rows)
    text = text_of(page_of(folder))
    for told in ("1 of 2 scans scored above all 4 healthy scans.", "too few for a threshold", "needs 19 healthy scans"):
        assert told in text
    (folder / "run.json").write_text(json.dumps(RUN))                        # of a projector that wrote no calibration
    assert "does not tell how many there are" in text_of(page_of(folder))
    (folder / "scores.csv").write_text(rows.replace("80.0", "").replace("40.0", ""))
    assert "No percentiles" in text_of(page_of(folder))


def test_names_and_notes_cannot_become_markup(results):
    name, note = "<b onclick=x>&'\"", "</script><script>alert(1)</script>"
    page = page_of(results(scores=(5.0,), names=[name], notes=note, failed=()))
    assert list(scans_in(page)) == [name] and note in text_of(page)
    assert "<b onclick" not in page and "<script>alert" not in page
    assert f'href="#scan={quote(name)}"' in page
    assert len(re.findall(r"<script\b", page)) == 3                          # the scan's data, the levels, the program


def test_nothing_is_fetched(results):
    page = page_of(results())
    assert "default-src 'none'" in page
    assert set(re.findall(r"https?://[^\s\"')]*", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r'<(link|iframe|object|embed)\b|\bsrc="|url\(|@import', page)


def test_the_page_keeps_its_limit_and_says_what_it_lacks(results):
    folder = results(scores=range(12, 0, -1), names="abdefghijklm", side=60)
    whole = page_of(folder)
    text_alone = len(re.sub(r'"pictures": \[.*?\]\]', "", whole))
    one = (len(whole) - text_alone) / 12                                     # bytes of a scan with all its pictures
    page = page_of(folder, megabytes=(text_alone + 8.5 * one) / 1e6)
    assert len(page.encode()) <= text_alone + 8.5 * one
    held = [len(scan["pictures"]) for name, scan in scans_in(page).items() if name != "c"]
    assert held == sorted(held, reverse=True) and set(held) <= {4, 3, 0}     # all, key slices, none
    assert held.count(4) >= 4                                                # half the room is for the first scans
    assert f"all slices of the {held.count(4)} scans with the highest scores" in text_of(page)
    assert held.count(3) == 0 or f"the key slices of {held.count(3)} further scan" in text_of(page)
    assert held.count(0) == 0 or f"none of the other {held.count(0)} scan" in text_of(page)
    page = page_of(folder, megabytes=1e-6)
    assert not any(scan["pictures"] for scan in scans_in(page).values())
    assert "this page holds none of the other 12 scans" in text_of(page)


def test_pictures_that_are_absent_damaged_or_strange_are_named(results):
    folder = results()
    (folder / "a" / "overlay" / "100.png").write_bytes(b"no picture")
    (folder / "a" / "overlay" / "7.png").write_bytes(b"")
    for path in (folder / "b" / "overlay").iterdir():
        path.unlink()
    page = page_of(folder)
    scans, text = scans_in(page), text_of(page)
    assert [n for n, _ in scans["a"]["pictures"]] == [98, 99, 101] and scans["a"]["key"] == [101, 99]
    assert text.count("overlay/100.png cannot be read as a picture") == 1
    assert "overlay/7.png is left out" in text and "no pictures: its overlay folder is empty" in text


def test_a_damaged_header_of_a_picture_does_not_end_the_page(results):
    """Pillow raises ValueError for a header of another length, and SyntaxError for one of another checksum."""
    folder = results()
    for name, place in (("98", 11), ("100", 29)):
        path = folder / "a" / "overlay" / f"{name}.png"
        content = bytearray(path.read_bytes())
        content[place] ^= 8
        path.write_bytes(content)
    Image.new("RGB", (2, 1000)).save(folder / "a" / "overlay" / "101.png")   # its panels are of no width
    page = page_of(folder)
    assert [n for n, _ in scans_in(page)["a"]["pictures"]] == [99]
    for number in (98, 100, 101):
        assert text_of(page).count(f"overlay/{number}.png cannot be read as a picture") == 1


def test_large_pictures_are_reduced_and_panels_keep_their_shape(tmp_path):
    Image.new("RGB", (4 * 500, 1000)).save(tmp_path / "00.png")
    packed, aspect = pack_overlay(tmp_path / "00.png", side=250, quality=60)
    assert aspect == 0.5 and Image.open(io.BytesIO(base64.b64decode(packed))).size == (4 * 125, 250)


@pytest.mark.parametrize("size", [(2, 1000), (3, 100), (7, 1000)], ids=["tall", "small", "once reduced"])
def test_a_picture_of_panels_without_a_pixel_is_none(tmp_path, size):
    """A small one was packed, its panels 0 times as wide as high."""
    Image.new("RGB", size).save(tmp_path / "00.png")
    with pytest.raises(OSError, match="00.png: cannot be read as a picture"):
        pack_overlay(tmp_path / "00.png", side=250, quality=60)


@pytest.mark.parametrize("name, old, new, message", [
    ("scores.csv", "a,5.0", "a,", "status 'ok' and no score"),
    ("scores.csv", "a,5.0", "a,nan", "score must be a number, found 'nan'"),
    ("scores.csv", "scan_id", "scan", "has no scan_id"),
    ("scores.csv", "failed,", "done,", "c has status 'done'; expected 'ok', 'unreliable' or 'failed'"),
    ("slices.csv", "b,98", "stranger,98", "stranger is not in scores.csv"),
    ("slices.csv", "b,98,40", "b,98,", "b has a slice without number, position or score"),
    ("run.json", '"weights_sha256"', '"weights"', "has no weights_sha256"),
    ("run.json", "{", "", "cannot be read as JSON"),
    ("run.json", "{", "[" * 100_000, "cannot be read as JSON"),
    ("run.json", '"seconds": 3.0', '"seconds": NaN', "cannot be read as JSON (NaN is no number of JSON)"),
    ("run.json", '"seconds": 3.0', '"seconds": null', "has no seconds"),
    ("run.json", '"scoring": {"threshold_hu": 5.0}', '"scoring": [5]', "settings or calibration are not as"),
    ("run.json", '"scan_scores": {', '"scan_scores": 5, "others": {', "settings or calibration are not as")])
def test_an_unfit_results_folder_is_refused(results, capsys, name, old, new, message):
    folder = results()
    (folder / name).write_text((folder / name).read_text().replace(old, new, 1))
    with pytest.raises(ReportError, match=re.escape(message)):
        page_of(folder)
    assert main([str(folder)]) == 2
    told = capsys.readouterr().err
    assert name in told and message in told and not (folder / "report.html").exists()


def test_scans_beyond_the_page_count_by_their_status(results):
    folder = results(failed="cd")
    lines = (folder / "scores.csv").read_text().splitlines()
    lines[3:3] = ["e,9.0,,,unreliable,too much,4,4,5.5,12.3,"]
    (folder / "scores.csv").write_text("\n".join(lines) + "\n")
    entries, _, others = tables.read_results(folder, most=1)
    assert [entry.scan_id for entry in entries] == ["a"]
    assert others == {"total": 4, "flagged": 0, "unreliable": 1, "failed": 2}
    (sentence,) = words.unshown(entries, others)
    assert sentence == ("This page shows the first 1 of 5 rows of scores.csv; of all 5 scans 1 are flagged, 1 "
                        "unreliable and 2 failed.")


def entry_of(status, **values):
    """An Entry; of one that is ok score and flag are given, unless they are here."""
    scored = dict(score=2.0, percentile=40.0, flagged=False) if status == "ok" else dict.fromkeys(
        ("score", "percentile", "flagged"))
    return tables.Entry(**dict(scan_id="a", status=status, reason="", count=4, projected=4, error_hu=5.0,
                               anomalous_ml=1.0, notes=[]) | scored | values)


def test_a_cut_among_the_failed_scans_counts_them_all():
    """500 rows 'with the highest scores' held 20 without one, and the failed ones above the cut were not counted."""
    shown = [entry_of("ok")] * 480 + [entry_of("unreliable")] * 15 + [entry_of("failed")] * 5
    assert words.unshown(shown, Counter(total=15, flagged=0, failed=15)) == [
        "This page shows the first 500 of 515 rows of scores.csv; of all 515 scans none are flagged, 15 unreliable and "
        "20 failed."]


HEALTHY = tables.HealthyScores([1.0, 2.0, 3.0], 2.5, 0.25, None, [])


@pytest.mark.parametrize("flags, said", [
    ([False, False], "None of 2 scans flagged: no score is above the threshold."),
    ([False], "Not flagged: the score is not above the threshold."),
    ([True, False], "1 of 2 scans flagged: the score is above the threshold."),
    ([True, True], "2 of 2 scans flagged: the score is above the threshold."),
    ([True], "1 of 1 scan flagged: the score is above the threshold.")])
def test_the_headline_tells_flagged_from_not_flagged(flags, said):
    """'None of 1 scan flagged: the score is above the threshold.' reads as its opposite."""
    assert words.found([entry_of("ok", flagged=flag) for flag in flags], HEALTHY)[0] == said


def test_unreliable_scans_are_compared_and_failed_ones_lie_nowhere():
    """'0 scans compared' of two with pictures, and 'each scan opens at' of none that does."""
    assert "2 scans compared, slice by slice" in " ".join(words.found([entry_of("unreliable")] * 2, HEALTHY))
    failed = [entry_of("failed")] * 2
    assert "0 scans compared" in " ".join(words.found(failed, HEALTHY))
    assert words.where(failed, HEALTHY) == []
    found = entry_of("ok", key=[tables.Slice(7, 30.0, True, 2.0)])
    assert words.where([*failed, found], HEALTHY)[0] == "a: slice 7, 30 mm below the top."


NONE_COMPARED = "No scan here could be compared with the model's 3 healthy scans: see the notes."
COMPARED = "Scores are compared with 3 healthy scans: none can be called rarer than one in 4."


@pytest.mark.parametrize("entries, given, said", [
    ([entry_of("failed")], False, [NONE_COMPARED]), ([entry_of("unreliable")] * 2, False, [NONE_COMPARED]),
    ([entry_of("ok", percentile=None, flagged=None)], False, [NONE_COMPARED]),
    ([entry_of("ok", percentile=None, flagged=True)], True, [NONE_COMPARED, "The threshold was given for this run."]),
    ([entry_of("ok", percentile=None, flagged=True)], False,                       # as of a part of a head
     [COMPARED, "A healthy scan passes the threshold with a chance of at most 25%."]),
    ([entry_of("failed"), entry_of("ok")], True,
     [COMPARED, "The threshold was given for this run; 1 of these healthy scans pass it."])])
def test_scores_are_said_to_be_compared_only_where_one_is(entries, given, said):
    calibration = replace(HEALTHY, fpr=None) if given else HEALTHY
    assert words.sure(entries, calibration, None)[:-1] == said


def test_a_row_that_is_not_compared_shows_neither_healthy_range_nor_threshold(results):
    folder = results()
    rows = (folder / "scores.csv").read_text()
    assert "b,2.5,40.0,0,ok" in rows
    (folder / "scores.csv").write_text(rows.replace("b,2.5,40.0,0,ok", "b,2.5,,,ok"))
    page = page_of(folder)
    listed = {name: re.search(f'<tr data-scan="{name}".*?</tr>', page, re.DOTALL)[0] for name in "ab"}
    assert [(("<u " in row), ("<s " in row)) for row in listed.values()] == [(True, True), (False, False)]
    assert text_of(page).count("against the threshold not compared") == 1 and 'class="key-healthy"' in page
    # Nor does the plot of its slices show the band
    assert {name: scan["compared"] for name, scan in scans_in(page).items()} == {"a": True, "b": False, "c": False}
    assert re.findall(r".{16}levels\.filter", page) == ["data.compared ? levels.filter"]
    rows = rows.replace("b,2.5,40.0,0,ok", "b,2.5,,,ok").replace("a,5.0,80.0,1,", "a,5.0,,,")
    (folder / "scores.csv").write_text(rows)
    page = page_of(folder)
    assert not re.search(r'<u |<s |class="key-(healthy|threshold)"', page)


def test_a_page_of_failed_scans_says_where_of_none(results):
    assert "<h2>Where</h2>" in page_of(folder := results())
    (folder / "slices.csv").write_text(",".join(tables.SLICE_COLUMNS) + "\n")
    write_csv(folder / "scores.csv", SCORE_COLUMNS, [["c", "", "", "", "failed", "no brain", "", "", "", "", ""]])
    page = page_of(folder)
    assert "<h2>Where</h2>" not in page and "Each scan opens at" not in page


@pytest.mark.parametrize("n, said", [(250, "99.6"), (200, "99.5"), (30, "96.7")])
def test_the_top_scan_is_not_above_what_its_healthy_scans_allow(results, n, said):
    """Above 200 of 200 healthy scans, 99.5025 %, it was 100 on the page; the report rounds by the same helper."""
    folder = results(scores=(5.0,), names="a", failed=())
    rows = (folder / "scores.csv").read_text()
    assert "a,5.0,80.0,1" in rows
    (folder / "scores.csv").write_text(rows.replace("a,5.0,80.0,1", f"a,5.0,{100 * n / (n + 1):.6g},1"))
    calibrated = CALIBRATION | {"scan_scores": {"mean": [k / n for k in range(n)]}}
    (folder / "run.json").write_text(json.dumps(RUN | {"calibration": calibrated}))
    text = text_of(page_of(folder))
    assert text.count(said) == 2 and f"(above {n} of {n})" in text
    assert not re.search(r"percentile 100|\b100\.0\b", text)


def test_a_folder_without_results_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "scores.csv: cannot be read" in capsys.readouterr().err


def evaluated(folder, *flags):
    write_csv(folder.parent / "labels.csv", ["scan_id", "label", "types"], [["a", 1, "tumour|infarct"], ["b", 0, ""]])
    command = [folder / "scores.csv", folder.parent / "labels.csv", "--out", folder.parent / "metrics",
               "--bootstrap", 100, "--missing", "exclude", *flags]
    return evaluate.main([str(word) for word in command])


def test_evaluate_writes_the_report_with_labels_and_roc(results, capsys):
    folder = results()
    assert evaluated(folder, "--report", folder / "report.html", "--level", 0.999) == 0
    text = text_of(page := (folder / "report.html").read_text(encoding="utf-8"))
    for told in ("AUC against the labels: 1.00.", "99.9% interval undefined", "from 1 abnormal and 1 normal scans",
                 "labelled infarct, tumour", "labelled normal", "Against the labels"):
        assert told in text
    assert 'points="0.00,100.00 0.00,0.00 100.00,0.00 "' in page             # up, then right
    again = folder.parent / "again.html"
    flags = ["--out", again, "--evaluation", folder.parent / "metrics" / "metrics.json"]
    assert main([str(folder), *map(str, flags)]) == 0
    assert again.read_text(encoding="utf-8") == page


def test_an_evaluation_of_other_scores_is_refused(results, capsys):
    folder = results()
    assert evaluated(folder) == 0
    (folder / "scores.csv").write_text((folder / "scores.csv").read_text().replace("5.0", "6.0", 1))
    flags = ["--evaluation", str(folder.parent / "metrics" / "metrics.json")]
    assert main([str(folder), *flags]) == 2
    assert "made from another scores.csv" in capsys.readouterr().err
    with pytest.raises(ReportError, match="run it again"):
        page_of(folder, evaluation={"scan": {}})
    with pytest.raises(ReportError, match="has no labels; expected"):
        page_of(folder, evaluation=read_json(folder.parent / "metrics" / "metrics.json") | {"labels": []})


@pytest.mark.parametrize("change, told", [
    ({"seconds": None}, "--report: {path} is of a run that has not ended, and the scores beside it may be an earlier"),
    ({"device": 3}, "{path}: has no device; run projector.py again")])
def test_evaluate_refuses_a_report_that_cannot_be_before_any_work(results, capsys, monkeypatch, change, told):
    """After all bootstraps it was told that an unfinished run has no seconds."""
    folder = results()
    path = folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    monkeypatch.setattr(cohort, "read_labels", None)
    assert evaluated(folder, "--report", folder / "report.html") == 2
    assert told.format(path=path) in capsys.readouterr().err


def test_evaluate_refuses_a_report_of_what_is_no_results_folder(results, capsys):
    folder = results()
    (folder / "run.json").unlink()
    assert evaluated(folder, "--report", folder / "report.html") == 2
    assert "run.json" in capsys.readouterr().err
