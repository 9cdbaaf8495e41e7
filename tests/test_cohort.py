"""Who is evaluated: tables of scores and labels, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation import cohort, metrics
from tests.evaluation_data import write_csv
from tests.writers import png_of_16_bits


def label(value, *types, patient="p"):
    return cohort.Label(value, types, patient)


def test_missing_scans_are_refused_excluded_or_counted_worst():
    scores = {("a",): 3.0, ("b",): 1.0, ("failed",): "failed", ("stray",): 9.0}
    labels = {("a",): label(1), ("b",): label(0), ("failed",): label(1), ("absent",): label(0)}
    with pytest.raises(cohort.InputError) as error:
        cohort.join(scores, labels, "error")
    for told in ("1 scans failed (failed)", "1 scans labelled without a score (absent)", "label (stray)"):
        assert told in str(error.value)

    units = cohort.join(scores, labels, "exclude")
    assert units.keys == [("a",), ("b",)]
    assert units.left_out == {"failed": 1, "labelled without a score": 1, "scored without a label": 1}

    units = cohort.join(scores, labels, "worst")
    assert dict(zip(units.keys, units.scores)) == {("a",): 3, ("b",): 1, ("failed",): 0, ("absent",): 4}
    assert units.counted_worst == 2 and units.left_out == {"scored without a label": 1}
    assert metrics.auc(units.scores, units.labels) == 0.25                   # only a > b is right
    for threshold in (-9.0, 2.0, 9.0):                                       # called wrongly at any threshold
        counts = metrics.confusion(units.scores, units.labels, threshold, units.worst)
        called = units.scores[:2] > threshold
        assert counts == {"tp": called[0], "fp": 1 + called[1], "tn": not called[1], "fn": 1 + (not called[0])}


@pytest.mark.parametrize("header, rows, message", [
    ("scan_id,status", [["a", "ok"]], "has no score"),
    ("scan_id,score,status", [["a", "1", "ok"], ["a", "2", "ok"]], "csv, line 3: a is there twice"),
    ("scan_id,score,status", [["a", "1", "ok"], ["", "", ""]], "csv, line 3: has no scan_id"),
    ("scan_id,score,status", [["a\u00a0", "1", "ok"]] * 2, r"line 3: 'a\\xa0' is there twice"),
    ("scan_id,score,status", [["a", "nan", "ok"]], "csv, line 2: score must be a finite number"),
    ("scan_id,score,status", [["two\nlines", "1", "ok"], ["a", "0,5", "ok"]], "csv, line 4: score .* found '0,5'"),
    ("scan_id,score,status", [["a", "1", "done"]], "csv, line 2: .*'ok' or 'failed'"),
    ("scan_id,score,status", [["a", "1", "ok", "", "x"]], "csv, line 2: has 5 cells, the header 3"),
])
def test_unfit_scores_are_refused(tmp_path, header, rows, message):
    with pytest.raises(cohort.InputError, match=message):
        cohort.read_scores(write_csv(tmp_path / "scores.csv", header, rows))


def test_labels_are_checked_and_chosen(tmp_path):
    path = write_csv(tmp_path / "labels.csv", "scan_id,split,label,types",
                     [["a", "test", "1", "Subdural|Epidural"], ["b", "train", "0", ""]])
    labels, not_chosen = cohort.read_labels(path, ["split=test"])
    assert labels == {("a",): cohort.Label(1, ("Epidural", "Subdural"), cohort.alone("a"))} and not_chosen == {("b",)}
    everything = cohort.read_labels(path)[0]
    for where in (["split=test", "split=train"], ["split=train", "split=test", "label=0", "label=1"]):
        assert cohort.read_labels(path, where) == (everything, set())            # any value of a column will do
    assert cohort.read_labels(path, ["split=train", "split=test", "label=0"])[1] == {("a",)}
    with pytest.raises(cohort.InputError, match="no labels where split=test, label=0"):
        cohort.read_labels(path, ["split=test", "label=0"])
    for label, types, message in (("0", "Epidural", "label 0 and types 'Epidural'; expected no types beside label 0"),
                                  ("0", "none", "leave that cell empty"), ("", "", "label ''; expected 0 or 1"),
                                  ("0.0", "", "label '0.0'; expected 0 or 1"), ("yes", "", "expected 0 or 1")):
        with pytest.raises(cohort.InputError, match=f"line 2: c has .*{message}"):
            cohort.read_labels(write_csv(path, "scan_id,split,label,types", [["c", "test", label, types]]))
    spaced = cohort.read_labels(write_csv(path, "scan_id,split,label,types", [["c", "test", " 1", " Epidural "]]))[0]
    assert spaced == {("c",): cohort.Label(1, ("Epidural",), cohort.alone("c"))}


@pytest.mark.parametrize("column, meant", [(" patient", "patient"), ("Patient", "patient"), ("types ", "types")])
def test_an_optional_column_in_another_spelling_is_refused(tmp_path, column, meant):
    """' patient' was none: scans of one patient counted as many, and the intervals came out too narrow."""
    path = write_csv(tmp_path / "labels.csv", f"scan_id,label,{column}", [["a", 1, "p"], ["b", 0, ""]])
    with pytest.raises(cohort.InputError, match=f"column '{column}', which would not be read; name it '{meant}'"):
        cohort.read_labels(path)


def test_a_condition_that_no_row_meets_is_refused(tmp_path):
    """A slip in one of two values of --where cost its scans without a word."""
    path = write_csv(tmp_path / "labels.csv", "scan_id,split,label", [["a", "test", 1], ["b", "train", 0]])
    with pytest.raises(cohort.InputError, match="labels.csv: no row has split=tets; split has 'test', 'train' there; "
                                                "correct --where"):
        cohort.read_labels(path, ["split=train", "split=tets"])


def test_a_row_is_chosen_whatever_spaces_are_around_its_cell(tmp_path):
    """'test ' was no row of split=test, and left out as if on purpose."""
    rows = [["a", "test ", 1], ["b", " test", 0], ["c", "train", 0]]
    path = write_csv(tmp_path / "labels.csv", "scan_id,split,label", rows)
    for where in ("split=test", "split= test"):
        labels, not_chosen = cohort.read_labels(path, [where])
        assert set(labels) == {("a",), ("b",)} and not_chosen == {("c",)}


@pytest.mark.parametrize("types, message", [
    (["Subdural", "subdural"], "has the types 'Subdural' and 'subdural'; expected one spelling of each"),
    (["Sub  dural", "Sub dural"], "expected one spelling"),
    (["Subdural;Epidural", ""], "has the type 'Subdural;Epidural'; expected '|' between types")])
def test_types_that_would_be_categories_of_their_own_are_refused(tmp_path, types, message):
    """'Subdural' and 'subdural' were two, each of half the scans."""
    path = write_csv(tmp_path / "labels.csv", "scan_id,label,types", [["a", 1, types[0]], ["b", 1, types[1]]])
    with pytest.raises(cohort.InputError, match=f"labels.csv: .*{re.escape(message)}"):
        cohort.read_labels(path)


def test_composed_letters_are_told_apart_from_single_ones():
    """The message named two ids that looked alike."""
    with pytest.raises(cohort.InputError, match=r"1 scans labelled without a score \('a\\u0308'\); 1 scans scored "
                                                r"without a label \(ä\)"):
        cohort.join({("ä",): 1.0}, {("a\u0308",): label(1)}, "error")


def test_slices_counted_from_1_are_refused():
    """With --missing exclude every label was that of the slice below."""
    scores = [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("c", 0)]
    from_1 = [("a", 1), ("a", 2), ("b", 1), ("b", 2), ("other", 1)]
    with pytest.raises(cohort.InputError, match="slice_labels.csv: counts slices from 1"):
        cohort.refuse_counted_from_1(from_1, scores, Path("slice_labels.csv"))
    for labels in ([*from_1, ("b", 0)], [("a", 1), ("b", 1)], [("a", 1), ("a", 2), ("b", 1)], [("other", 1)]):
        cohort.refuse_counted_from_1(labels, scores, Path("slice_labels.csv"))


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    """Of two merged tables' labels the last counted."""
    path = write_csv(tmp_path / "labels.csv", "scan_id,label,note,label,", [["a", 1, "", 0, ""]])
    with pytest.raises(cohort.InputError, match="labels.csv: has the column label more than once"):
        cohort.read_labels(path)


def test_a_patient_is_one_whatever_spaces_are_around(tmp_path):
    """'p1' and 'p1 ' counted as two, and intervals came out too narrow."""
    rows = [["a", 1, "p1 "], ["b", 0, " p1"], ["c", 0, " "]]
    path = write_csv(tmp_path / "labels.csv", "scan_id,label,patient", rows)
    assert [label.patient for label in cohort.read_labels(path)[0].values()] == ["p1", "p1", cohort.alone("c")]


def test_a_scan_without_a_patient_is_not_of_the_patient_of_its_name(tmp_path):
    """Six scans without a patient and six of patients called as these scans are were six clusters."""
    rows = [[i, i % 2, "" if i <= 6 else i - 6] for i in range(1, 13)]
    labels, _ = cohort.read_labels(write_csv(tmp_path / "labels.csv", "scan_id,label,patient", rows))
    units = cohort.join({(str(i),): float(i) for i in range(1, 13)}, labels, "error")
    assert len(np.unique(units.clusters)) == 12


@pytest.mark.parametrize("content, message", [
    ("20\n\n30,5\n", "line 3: expected seconds above 0, one number a line, with a decimal point, found '30,5'"),
    ("1 2\n3 4\n", "line 1: .*found '1 2'"), ("3\n0\n", "line 2: .*found '0'"), ("1\ninf\n", "line 2: .*found 'inf'"),
    ("\n", "expected seconds above 0, .*found none")])
def test_what_is_no_list_of_seconds_is_named(tmp_path, content, message):
    """Two numbers a line were a traceback, or other sessions than meant."""
    (tmp_path / "seconds.txt").write_text(content)
    with pytest.raises(cohort.InputError, match=f"seconds.txt(, |: ){message}"):
        cohort.read_seconds(tmp_path / "seconds.txt")


def test_transparent_pixels_of_a_mask_are_none(tmp_path):
    """White behind full transparency marked the whole slice."""
    picture = np.full((2, 2, 4), 255, np.uint8)
    picture[1, :, 3] = 0
    picture[0, 0] = (0, 0, 0, 255)
    (tmp_path / "a").mkdir()
    Image.fromarray(picture).save(tmp_path / "a" / "0.png")
    truth, counted = cohort.read_truth(tmp_path, "a", (1, 2, 2), np.eye(4), "error")
    assert truth.tolist() == [[[False, True], [False, False]]] and counted.all()


def test_dark_colours_of_a_mask_are_marked(tmp_path):
    """As grey, (1, 0, 0) and (0, 0, 3) are rounded to 0: the mask was empty without a word."""
    colours = np.zeros((4, 100, 3), np.uint8)
    colours[:3] = np.array([(1, 0, 0), (0, 0, 3), (1, 1, 1)], np.uint8)[:, None]
    alpha = np.full((4, 100, 1), 255, np.uint8)
    alpha[2, :50] = 0
    pictures = {"RGB": (colours, 300), "RGBA": (np.concatenate([colours, alpha], -1), 250),
                "LA": (np.concatenate([colours.max(-1, keepdims=True), alpha], -1), 250),
                "L": (colours[..., 0], 200), "I;16": (colours[..., 2] * np.uint16(256), 200)}
    for mode, (pixels, marked) in pictures.items():
        Image.fromarray(pixels).save(tmp_path / "0.png")
        with Image.open(tmp_path / "0.png") as image:
            assert image.mode == mode
        assert cohort.marked_pixels(tmp_path / "0.png").sum() == marked, mode
    for transparent, marked in ({}, 300), ({"transparency": 2}, 200):        # place 2 of the palette: (0, 0, 3)
        palette = Image.fromarray(np.arange(4, dtype=np.uint8).repeat(100).reshape(4, 100))
        palette.putpalette([0, 0, 0, 1, 0, 0, 0, 0, 3, 1, 1, 1])
        palette.save(tmp_path / "0.png", **transparent)
        assert cohort.marked_pixels(tmp_path / "0.png").sum() == marked


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_mask_of_which_pillow_gives_the_upper_bits_alone_is_refused(tmp_path, channels):
    """What lies below 256 of 65535 was not marked: the mask was empty without a word."""
    pixels = np.zeros((2, 3, channels), int)
    pixels[0] = 200
    (tmp_path / "0.png").write_bytes(png_of_16_bits(pixels))
    if channels == 1:
        assert cohort.marked_pixels(tmp_path / "0.png").tolist() == [[True] * 3, [False] * 3]
        return
    with pytest.raises(cohort.InputError, match="0.png: .* found 16-bit colour or .* save it as 16-bit grey"):
        cohort.marked_pixels(tmp_path / "0.png")


def test_a_scan_that_is_there_twice_is_refused_whichever_row_is_chosen(tmp_path):
    path = tmp_path / "labels.csv"
    for twice in ([1, "a", 0], [2, "a", 0]):                                 # one that is not chosen, one that is
        write_csv(path, "scan_id,split,label", [[1, "b", 0], [2, "a", 0], twice])
        with pytest.raises(cohort.InputError, match=f"line 4: {twice[0]} is there twice"):
            cohort.read_labels(path, ["split=a"])
