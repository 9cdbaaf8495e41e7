"""The CT-ICH benchmark: its figures by hand, what it refuses, and all stages with a stand-in for the projector."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import shutil
import struct
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import latent_stats
from benchmarks import baselines, compare, ct_ich
from benchmarks.ct_ich import Case
from bundling.build import Target, build
from common import files
from common.weights import write_json
from ct.frame import preprocess_scan
from ct.standardise import StandardiseSettings
from dataset import DatasetError, ScanRecord, SliceDataset, SliceWriter
from detect.bundle import load_bundle
from detect.options import StatsConfig
from detect.reconstruct import Reconstruction
from detect.settings import Settings
from detect.surprise import Surprise, SurpriseSettings
from evaluation import metrics
from evaluation.cohort import InputError, Label
from tests.benchmark_data import (
    FAILS,
    MM,
    OURS,
    SETTINGS,
    head,
    prepared,
    stand_in,
    write_database,
    write_fits,
    write_otherwise,
    write_rows,
)
from tests.writers import write_slice_folder


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return write_database(tmp_path_factory.mktemp("data") / "healthy.lmdb")


@pytest.fixture(scope="module")
def fits(database, tmp_path_factory):
    return write_fits(tmp_path_factory.mktemp("fits") / "baselines", database)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two ill and two healthy scans and one that fails; the slices of ill2 have no labels."""
    folder, scans, slices = tmp_path_factory.mktemp("ct-ich"), [], []
    for seed, (name, ill) in enumerate((("ill1", 1), ("ill2", 1), ("well1", 0), ("well2", 0), (FAILS, 0))):
        scan, truth = head(seed, bool(ill))
        write_slice_folder(folder / "test" / name, scan.hu, slice_spacing_mm=MM[0], pixel_spacing_mm=MM[1])
        scans.append({"scan_id": name, "split": "test", "label": ill, "types": "Epidural" * ill})
        slices += [{"scan_id": name, "slice": i, "label": int(marked), "types": "Epidural" * int(marked)}
                   for i, marked in enumerate(truth.any((1, 2))) if name != "ill2"]
    write_rows(folder / "scans.csv", scans)
    write_rows(folder / "slices.csv", slices)
    return folder


# ---- figures by hand

def case(scan_id, label, score, slices, labels, types=(), other=0.0, unseen=()):
    own = {i: Label(one, types if one else (), scan_id) for i, one in enumerate(labels)}
    return Case(scan_id, "test", Label(label, types, scan_id), own,
                {"ours": np.array(slices, float), "hu": np.full(len(slices), other)},
                {"ours": score, "hu": other}, {"ours": 4.0 + label, "hu": 1.0},
                np.array([number not in unseen for number in range(len(slices))]))


@pytest.fixture
def cases():
    """Scans: 3 and 1 abnormal against 2 and 0. Slices: 9, 1 abnormal against 0, 2, 5; b's slices have no labels."""
    return [case("a", 1, 3.0, [9, 1, 0], [1, 1, 0], ("Epidural",), 1.0),
            case("b", 1, 1.0, [50, 50], [], ("Epidural", "Subdural"), 2.0),
            case("c", 0, 2.0, [2, 5], [0, 0], (), 3.0), case("d", 0, 0.0, [], [], (), 4.0)]


@pytest.fixture(autouse=True)
def short_bootstrap(monkeypatch):
    monkeypatch.setattr(metrics, "bootstrap_interval", functools.partial(metrics.bootstrap_interval, repeats=50))


def test_figures_by_hand(cases):
    found = ct_ich.report(cases, ["ours", "hu"])
    ours, hu = found["methods"]["ours"], found["methods"]["hu"]
    assert (ours["scan"]["auc"], ours["scan"]["abnormal"], ours["scan"]["normal"]) == (3 / 4, 2, 2)
    assert ours["slice"]["auc"] == pytest.approx(4 / 6) and ours["slice"]["normal"] == 3     # 9 over all; 1 over 0
    assert hu["scan"]["auc"] == 0 and ours["seconds_a_scan"] == 4.5
    low, high = ours["scan"]["auc_delong"]
    assert low < 3 / 4 < high and 0 < hu["scan"]["p"] < 1 and "p" not in ours["scan"]
    assert hu["scan"]["p_holm"] == hu["scan"]["p"]                                          # one test alone
    subdural, epidural = (found["types"][kind] for kind in ("Subdural", "Epidural"))
    assert subdural["ours"]["scan"]["auc"] == 1 / 2                                         # b alone: over d, not c
    assert subdural["ours"]["slice"]["auc"].startswith("undefined: only one class")
    assert epidural["ours"]["slice"]["auc"] == pytest.approx(4 / 6) and epidural["hu"]["scan"]["auc"] == 0
    assert epidural["hu"]["scan"]["p_holm"] == epidural["hu"]["scan"]["p"]      # the other type's is undefined
    assert found["no_slice_abnormal"] == []
    assert found["without_slice_labels"] == ["b", "d"] and found["scans"]["b"]["ours"] == 1.0


def test_slices_that_no_method_has_seen_are_told_apart_unless_blood_was_missed_there():
    cases = [case("a", 1, 3.0, [9, 0, 0], [1, 1, 0], unseen=(1, 2)),
             case("b", 0, 2.0, [5, 0, 0], [0, 0, 0], unseen=(1, 2))]
    of = ct_ich.report(cases, ["ours", "hu"])["methods"]["ours"]
    assert of["slice"]["auc"] == pytest.approx((4 + 0 + 3 / 2) / 8) and of["slice"]["normal"] == 4
    assert of["projected"]["auc"] == pytest.approx((1 + 0) / 2)
    assert (of["projected"]["abnormal"], of["projected"]["normal"]) == (2, 1)


def test_the_table_shows_undefined_figures_as_a_dash_and_names_what_is_left_out(cases):
    figures = ct_ich.report(cases, ["ours", "hu"]) | {"splits": ["test"], "failed": {"e": "no head"},
                                                      "settings": {"scan_score": "top3"}}
    text = ct_ich.table(figures)
    assert text.startswith("2 scans with haemorrhage and 2 without, 2 slices with and 3 without (test).")
    assert "| this project | 0.75 |" in text and "| HU above 55 | 0.00 |" in text
    assert "| type | scans | slices | this project | HU above 55 |" in text
    assert "| Subdural | 1 | 0 | 0.50 / - | 0.00 / - |" in text and "slice scores: top3." in text
    assert "among scans alone: b, d." in text and "e (no head)" in text
    assert "Holm's correction for 1 methods" in text


def test_without_another_method_the_notes_tell_of_no_tests(cases):
    """They told of Holm's correction for 0 methods."""
    figures = ct_ich.report(cases, ["ours"]) | {"splits": ["test"], "failed": {}, "settings": {"scan_score": "top3"}}
    assert [line for line in ct_ich.table(figures).splitlines() if line.startswith("- ")] == [
        "- Scan score from slice scores: top3.",
        "- Of projected slices: without 0 normal ones that were not, and have the score 0 by every method.",
        "- Without slice labels, so among scans alone: b, d."]


def test_an_abnormal_scan_without_an_abnormal_slice_is_named(cases):
    cases += [case("e", 1, 5.0, [1, 0], [0, 0])]
    figures = ct_ich.report(cases, ["ours", "hu"]) | {"splits": ["test"], "failed": {},
                                                      "settings": {"scan_score": "top3"}}
    assert figures["no_slice_abnormal"] == ["e"]
    assert "every slice is labelled, none of them abnormal: e." in ct_ich.table(figures)


def test_one_class_is_undefined_and_no_crash(cases):
    ill = ct_ich.report(cases[:2], ["ours", "hu"])["methods"]["hu"]["scan"]
    assert all(ill[figure].startswith("undefined") for figure in ("auc", "p", "p_holm"))
    assert ct_ich.report(cases[1:2], ["ours"])["methods"]["ours"]["slice"]["auc"].startswith("undefined")


def test_slices_of_a_patient_belong_together():
    """Ten equal slices of a patient tell no more than two do."""
    units = np.array([3.0, 1.0, 2.0, 0.0]), np.array([1, 1, 0, 0]), np.array(list("abcd"))
    repeated = [[np.repeat(column, n) for column in units] for n in (2, 10)]
    two, ten = (ct_ich.ranking(*columns) for columns in repeated)
    assert ten["auc"] == two["auc"] and ten["auc_delong"] == pytest.approx(two["auc_delong"])
    assert ct_ich.bootstrap(*repeated[1]) == pytest.approx(ct_ich.bootstrap(*repeated[0]))


def test_a_paired_test_of_slices_counts_patients():
    def units(n):
        rng = np.random.default_rng(0)
        labels, patients = np.tile([0, 1], 12), np.repeat(np.arange(6), 4)
        return [(np.repeat(labels + rng.normal(0, 1, 24), n), np.repeat(labels, n), np.repeat(patients, n))
                for _ in range(2)]

    one, ten = (ct_ich.against_ours(*units(n)) for n in (1, 10))
    assert 0 < one < 1 and ten == pytest.approx(one)


# ---- what is refused

def test_tables_and_folders_must_match(data, tmp_path):
    with pytest.raises(InputError, match="no row has split=mixed"):
        ct_ich.read_split(data, "mixed")
    rows = list(csv.DictReader((data / "scans.csv").open()))
    write_rows(tmp_path / "scans.csv", rows)
    with pytest.raises(InputError, match="no folder test, which --split test"):
        ct_ich.read_split(tmp_path, "test")
    (tmp_path / "test").symlink_to(data / "test")
    assert len(ct_ich.read_split(tmp_path, "test")[1]) == 5
    write_rows(tmp_path / "scans.csv", rows[1:])
    with pytest.raises(InputError, match=r"scans\.csv: expected a row of split test; 1 are missing: ill1"):
        ct_ich.read_split(tmp_path, "test")
    write_rows(tmp_path / "scans.csv", [*rows, rows[0] | {"scan_id": "more"}])
    with pytest.raises(InputError, match="a scan for every row of split test; 1 are missing: more"):
        ct_ich.read_split(tmp_path, "test")


def test_a_slice_labelled_abnormal_of_a_healthy_scan_is_refused(data, tmp_path, capsys):
    rows = list(csv.DictReader((data / "slices.csv").open()))
    first = next(row for row in rows if row["scan_id"] == "well1")
    write_rows(tmp_path / "slices.csv", [row | {"label": 1} if row is first else row for row in rows])
    for name in ("scans.csv", "test"):
        (tmp_path / name).symlink_to(data / name)
    assert ct_ich.main(["--data", str(tmp_path), "--database", "none", "--model", "m", "--out",
                        str(tmp_path / "o")]) == 2
    assert "slices.csv: 1 slices have label 1 though their scan has label 0 (well1 slice 0)" in capsys.readouterr().err


def test_a_scan_of_the_database_is_not_reported_on(database):
    held_out = SliceDataset(database, "train")
    ct_ich.refuse_seen({"ill1": Label(1, (), "ill1")}, held_out)
    with pytest.raises(ValueError, match=r"holds 1 of the scans to be reported on, or others of .* \(h3\)"):
        ct_ich.refuse_seen({"ill1": Label(1, (), "ill1"), "h3": Label(0, (), "someone")}, held_out)
    patient = next(scan["patient"] for scan in held_out.manifest["scans"] if scan["scan_id"] == "h3")
    with pytest.raises(ValueError, match=r"holds 1 of .*, or others of their patients \(h3-again\); choose another"):
        ct_ich.refuse_seen({"ill1": Label(1, (), "ill1"), "h3-again": Label(0, (), patient)}, held_out)


def test_all_slices_of_a_scan_are_labelled_or_none():
    ours = {"ours": {"a": {"slices": np.zeros(3), "projected": np.ones(3, bool), "score": 0.0, "seconds": 1.0}}}
    labels = {"a": Label(1, (), "a")}
    for own, told in ((range(4), "labels slices 3 of a, which has 3 slices"), ((0, 2), "lacks slices 1 of a, which")):
        with pytest.raises(InputError, match=rf"slices.csv: {told}.*; label every slice of a scan, or none"):
            ct_ich.collect("test", labels, {"a": dict.fromkeys(own, labels["a"])}, ours, {"a": {}}, [])
    for own in ((), range(3)):
        (case,) = ct_ich.collect("test", labels, {"a": dict.fromkeys(own, labels["a"])}, ours, {"a": {}}, [])
        assert list(case.slice_labels) == list(own)


def test_a_model_of_other_data_is_refused(database, capsys):
    data = SliceDataset(database)
    prepared_anew = {"data": {"digest": "0" * 64, "counts": {}}, "held_out": {"digest": "1" * 64,
                                                                               "counts": data.manifest["counts"]}}
    compare.refuse_other_data({"provenance": prepared_anew}, "model", data, "--database")
    assert "was trained or calibrated on, prepared anew" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--database .*healthy\.lmdb.*trained on 123456789012; give that database"):
        compare.refuse_other_data({"provenance": {"data": {"digest": "1234567890123", "counts": {}}}}, "model", data,
                                  "--database")
    with pytest.raises(ValueError, match="holds other scans out than the database that --model model was trained on"):
        compare.refuse_other_data({"provenance": {"data": data.facts() | {"counts": {}}}}, "model", data, "--database")


# ---- methods

class Biased:
    """Draws everything 10 HU too low on the right half of the frame: a plain residual lights up there."""

    precision = torch.float32

    def closest_normal(self, hu, brain, below_vertex_mm, watch=None):
        bias = torch.zeros_like(hu)
        bias[..., hu.shape[-1] // 2:] = 10.0
        noise = torch.randn(hu.shape, generator=torch.Generator().manual_seed(len(hu))) * 2
        query = torch.full_like(hu, 30.0) + bias + noise + 40.0 * (hu > 60)
        return Reconstruction(torch.where(brain, query, hu), torch.full_like(hu, 30.0), {"reconstruct": 0.0},
                              {"reconstruct": 0.0})


def test_calibration_forgives_what_healthy_scans_have_too(database):
    pre = prepared(head(1, True)[0], SETTINGS)
    score_scan = compare.calibrated(Biased(), SliceDataset(database, "val"), Settings("search"))
    hu, brain, mm = baselines.kept_slices(pre)
    shown = score_scan(pre)
    healthy = score_scan(prepared(head(2, False)[0], SETTINGS))
    truth = head(1, True)[1]
    inside = pre.brain & shown.shown[:, None, None]
    assert np.abs(healthy.anomaly).mean() < 1 < np.abs(shown.anomaly[truth & inside]).mean()
    assert shown.scan_score("mean") > 3 * healthy.scan_score("mean")
    measure = Surprise(SurpriseSettings(filter="median"))
    plain = measure.evidence(Biased().closest_normal(hu, brain, mm), brain, mm).scales[:, 0]
    right = brain & (torch.arange(32) > 17)
    assert plain[right].median() > 5                                      # where the plain residual is of no use


@pytest.fixture(scope="module")
def bundle(database, fits, tmp_path_factory):
    """A bundle of the small PCA, calibrated on the held-out heads."""
    out = tmp_path_factory.mktemp("bundles") / "another"
    settings = Settings("pca", measure="surprise", scan_score="top3")
    return build(StatsConfig(), settings, database, fits / "pca.safetensors", Target(out, torch.device("cpu")))


def test_a_bundle_beside_is_scored_as_ours_is(bundle, database, fits):
    pre, device = prepared(head(1, True)[0], SETTINGS), torch.device("cpu")
    ours = Settings("search", measure="surprise", scoring=SurpriseSettings(pool="area", surprise_above=1.0))
    score_scan, _ = compare.beside(bundle, ours, SETTINGS, device)
    fitted = compare.calibrated(baselines.load(fits / "pca.safetensors"), SliceDataset(database, "val"), ours)
    found, expected = score_scan(pre), fitted(pre)
    assert found.slice_scores == pytest.approx(expected.slice_scores, abs=0.02) and found.slice_scores.max() > 0.5
    other = dataclasses.replace(ours, scoring=SurpriseSettings(filter="median"))
    with pytest.raises(ValueError, match="--beside .*another: is calibrated for other residuals .* than --model"):
        compare.beside(bundle, other, SETTINGS, device)
    larger = dataclasses.replace(SETTINGS, standardise=StandardiseSettings(size=64, hu_clip=(-20.0, 100.0)))
    with pytest.raises(ValueError, match="--beside .*another: takes slices of another size"):
        compare.beside(bundle, ours, larger, device)


def test_a_bundle_beside_sees_its_own_hu_range(bundle, database, tmp_path):
    """Its networks are shown slices as they were trained, though ours are clipped elsewhere."""
    narrow = dataclasses.replace(SETTINGS, standardise=StandardiseSettings(size=32, hu_clip=(0.0, 30.0)))
    score_scan, _ = compare.beside(bundle, Settings("search", measure="surprise"), narrow, torch.device("cpu"))
    scan = head(1, True)[0]
    assert (score_scan(preprocess_scan(scan, narrow)).anomaly == score_scan(prepared(scan, SETTINGS)).anomaly).all()


def test_recalibration_is_by_the_scans_and_settings_given(bundle, database, tmp_path, capsys):
    out = tmp_path / "anew"
    command = ["--encoder", str(bundle), "--data", str(database), "--out", str(out), "--device", "cpu"]
    assert latent_stats.main([*command, "--set", "pool=area", "scan_score=mean"]) == 0
    before, anew = (load_bundle(folder) for folder in (bundle, out))
    assert (anew.settings.scoring.pool, anew.settings.scan_score) == ("area", "mean")
    for name in ("mean", "std"):                                         # the same scans: the same statistics
        assert torch.allclose(getattr(anew.measure.normal.stats, name), getattr(before.measure.normal.stats, name),
                              atol=0.1)
    assert anew.meta["calibration"]["scan_scores"] != before.meta["calibration"]["scan_scores"]
    compare.refuse_other_data(anew.meta, out, SliceDataset(database), "--database")
    assert latent_stats.main(command) == 2 and "holds a model bundle" in capsys.readouterr().err


def test_without_baselines_a_database_that_calibrates_will_do(bundle, database, tmp_path, monkeypatch):
    """They alone learn from its training part."""
    own = tmp_path / "own.lmdb"
    with SliceWriter(own, SliceDataset(database).manifest["settings"]) as writer:
        writer.add(ScanRecord.encode("one", np.zeros((2, 32, 32), np.float32), np.ones((2, 32, 32), bool),
                                     np.array([5.0, 0])), "val", "p")
    monkeypatch.setattr(compare, "refuse_other_data", lambda *_: None)
    args = SimpleNamespace(model=bundle, baselines=[], beside=[])
    assert compare.open_database(own, "--data", args).scan_ids == ["one"]
    args.baselines = ["hu"]
    with pytest.raises(DatasetError, match="no slices in split 'train'"):
        compare.open_database(own, "--data", args)


def with_hole(whole: bytes) -> bytes:
    """Zeros where the compressed array begins, 20 bytes of zip64 behind its name."""
    start = whole.index(b"mm.npy") + len("mm.npy") + 20
    return whole[:start] + bytes(8) + whole[start + 8:]


def encrypted(whole: bytes) -> bytes:
    """The flags of every entry say so in the zip's directory."""
    first, *entries = whole.split(b"PK\1\2")
    return b"PK\1\2".join([first, *(entry[:4] + b"\1" + entry[5:] for entry in entries)])


def of_one_entry(content: bytes) -> bytes:
    """An .npz of one array, mm, of these bytes, and no key."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as file:
        file.writestr("mm.npy", content)
    return written.getvalue()


def array(header: bytes, values: bytes = b"") -> bytes:
    """An array in the .npy format."""
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + values


@pytest.mark.parametrize("damage", [
    lambda whole: b"", lambda whole: whole[:len(whole) // 2], lambda whole: bytes(len(whole)), with_hole, encrypted,
    lambda whole: of_one_entry(array(b"{" + bytes(100))),
    lambda whole: of_one_entry(array(b"{'descr': '|u1', 'fortran_order': False, 'shape': (1,)}\n", b"\3"))],
    ids=["empty", "short", "zeros", "with a hole", "encrypted", "half a header", "without a key"])
def test_a_measure_that_cannot_be_read_is_made_anew(damage, tmp_path):
    """As a power cut leaves it: every later run ended with a traceback."""
    path = tmp_path / "measures" / "one.npz"

    def take(key="k", value=3.0):
        kept, fresh = compare.remembered(path, key, lambda: {"mm": np.arange(50) + value})
        return kept["mm"][0], fresh

    assert take() == (3, True) and take(value=4.0) == (3, False)
    path.write_bytes(damage(path.read_bytes()))
    assert take(value=5.0) == (5, True) and take() == (5, False) and take("other", 6.0) == (6, True)
    assert [*path.parent.iterdir()] == [path]


def test_a_measure_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(files, "flush", lambda path: flushed.append((path, path.is_file() and path.stat().st_size)))
    compare.remembered(tmp_path / "one.npz", "k", lambda: {"mm": np.zeros(3)})
    assert flushed[0][1] == (tmp_path / "one.npz").stat().st_size and flushed[1][0] == tmp_path


def test_the_projector_gets_the_flags_and_its_failure_is_told(tmp_path, monkeypatch):
    write_slice_folder(tmp_path / "scans" / "one", head(1, False)[0].hu)
    (tmp_path / "projector.py").write_text(
        "import json, sys, pathlib\nout = pathlib.Path(sys.argv[5])\nout.mkdir()\n"
        "(out / 'run.json').write_text(json.dumps(sys.argv[6:]))\n"
        "print('1/1 one: score 1')\nsys.exit(2 if 'wrong' in sys.argv else 3)\n")
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(compare, "sys", SimpleNamespace(executable=sys.executable))
    ended = compare.project(tmp_path / "scans", "m", tmp_path / "out", "cpu", ct_ich.ROWS["published"])
    assert ended == ["--device", "cpu", "--preset", "published"]
    with pytest.raises(ValueError, match="projector.py ended with 2"):
        compare.project(tmp_path / "scans", "m", tmp_path / "again", "wrong")


# ---- all stages

def test_every_stage_and_going_on(data, database, fits, bundle, tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, database)
    out = tmp_path / "out"
    command = ["--data", str(data), "--database", str(database), "--model", "model", "--out", str(out), "--fits",
               str(fits), "--baselines", "hu", "pca", "--beside", str(bundle), "--device", "cpu"]
    assert ct_ich.main([*command, "--rows", "published"]) == 3            # one scan failed
    found, printed = json.loads((out / "metrics.json").read_text()), capsys.readouterr().out
    assert list(found["methods"]) == ["ours", "published", "hu", "pca", "another"]
    assert found["failed"] == {FAILS: "no head"} and list(found["scans"]) == ["ill1", "ill2", "well1", "well2"]
    ours, published = found["methods"]["ours"], found["methods"]["published"]
    assert ours["scan"]["auc"] == 1 and ours["slice"]["auc"] > 0.9 and ours["seconds_a_scan"] == 3
    assert published["slice"]["auc"] == ours["slice"]["auc"]              # the same map: the same figures
    assert found["methods"]["pca"]["scan"]["auc"] == 1 and "| another |" in printed
    assert found["without_slice_labels"] == ["ill2"] and f"{FAILS} (no head)" in printed
    assert (out / "table.md").read_text() in printed

    monkeypatch.setattr(ct_ich, "measure", lambda *_: pytest.fail("measured again"))
    assert ct_ich.main(command) == 3
    again = json.loads((out / "metrics.json").read_text())
    assert "published" not in again["methods"] and again["methods"]["pca"] == found["methods"]["pca"]


def test_scans_whose_maps_lie_otherwise_are_measured_and_one_slice_without_a_label_is_not(
        data, database, fits, tmp_path, monkeypatch, capsys):
    """One that was resampled or put upright stopped the whole benchmark, as if its mask had changed."""
    stand_in(monkeypatch, database)
    truths = write_otherwise(tmp_path / "test")
    (tmp_path / "test" / "well1").symlink_to(data / "test" / "well1")
    write_rows(tmp_path / "scans.csv", [{"scan_id": name, "split": "test", "label": int(name in truths)}
                                        for name in (*truths, "well1")])
    slices = [{"scan_id": name, "slice": i, "label": int(marked)} for name, truth in truths.items()
              for i, marked in enumerate(truth.any((1, 2)))]
    write_rows(tmp_path / "slices.csv", slices)
    command = ["--data", str(tmp_path), "--database", str(database), "--model", "model", "--out", str(tmp_path / "out"),
               "--fits", str(fits), "--baselines", "hu", "--device", "cpu"]
    assert ct_ich.main(command) == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(found["scans"]) == ["gap", "reversed", "well1"]
    assert all(found["methods"][name]["slice"]["auc"] > 0.9 for name in ("ours", "hu"))
    assert found["methods"]["hu"]["slice"]["normal"] == 11 + 12 - 2 * 5                     # each ball lies in 5 slices
    write_rows(tmp_path / "slices.csv", slices[:3] + slices[4:])
    capsys.readouterr()
    assert ct_ich.main(command) == 2
    assert "slices.csv: lacks slices 3 of gap, which has 11 slices" in capsys.readouterr().err


def test_too_few_held_out_scans_are_told_before_the_projection(data, slices32, tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, slices32)
    monkeypatch.setattr(compare, "project", lambda *_: pytest.fail("projected"))
    command = ["--data", str(data), "--database", str(slices32), "--model", "m", "--out", str(tmp_path)]
    assert ct_ich.main([*command, "--baselines", "pca"]) == 2
    assert "holds 1 held-out scans, but calibrating the baselines pca needs 3" in capsys.readouterr().err


def refused(data, database, out, monkeypatch, capsys, *more: str) -> str:
    """What ct_ich.py says as it ends with 2, before any scan was projected."""
    monkeypatch.setattr(compare, "project", lambda *_: pytest.fail("projected"))
    command = ["--data", str(data), "--database", str(database), "--model", "m", "--out", str(out), "--device", "cpu"]
    assert ct_ich.main([*command, *more]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("ours, told", [
    ({"settings": dataclasses.replace(OURS, scoring=SurpriseSettings(filter="median")).to_json()},
     "another: is calibrated for other residuals (measure, filter, median) than --model"),
    ({"settings": Settings("search", measure="votes").to_json()}, "another: is calibrated for other residuals"),
    ({"preprocessing": dataclasses.replace(SETTINGS, slab_mm=6.0).to_json()},
     "another: takes slices of another size or frame than --model")], ids=["filter", "measure", "slabs"])
def test_a_bundle_that_cannot_stand_beside_is_told_before_the_projection(ours, told, data, database, bundle, tmp_path,
                                                                         monkeypatch, capsys):
    """It was told after it, 25 minutes of 300 phantoms."""
    stand_in(monkeypatch, database)
    meta = compare.read_bundle_meta("m")[0] | ours
    monkeypatch.setattr(compare, "read_bundle_meta", lambda folder: (meta, "0"))
    assert told in refused(data, database, tmp_path, monkeypatch, capsys, "--baselines", "--beside", str(bundle))


@pytest.mark.parametrize("lost, told", [
    ("normal", "measure surprise: this model holds no statistics of healthy residuals"),
    ("preprocessing", "does not tell how its slices were prepared, as an imported bundle; calibrate it")])
def test_a_bundle_beside_that_lacks_what_scores_it_is_told_by_its_flag(lost, told, data, database, bundle, tmp_path,
                                                                       monkeypatch, capsys):
    """One that was imported ended with a traceback, after the projection."""
    stand_in(monkeypatch, database)
    folder = shutil.copytree(bundle, tmp_path / "bare")
    meta = json.loads((folder / "model.json").read_text()) | {lost: None}
    meta["files"].pop(f"{lost}.safetensors", None)
    write_json(folder / "model.json", meta)
    said = refused(data, database, tmp_path / "out", monkeypatch, capsys, "--baselines", "--beside", str(folder))
    assert f"error: --beside {folder}: {told}" in said


def test_a_model_without_a_search_has_no_published_row_and_that_is_told_before_the_projection(
        data, database, tmp_path, monkeypatch, capsys):
    """head-128 was projected first, and what it said was of a Python constructor."""
    stand_in(monkeypatch, database)
    meta = json.loads((compare.ROOT / "models" / "head-128" / "model.json").read_text())
    meta["provenance"]["data"] = SliceDataset(database).facts()
    monkeypatch.setattr(compare, "read_bundle_meta", lambda folder: (meta, "0"))
    said = refused(data, database, tmp_path, monkeypatch, capsys, "--rows", "published")
    assert "--rows published: --model m holds no search (it lacks latent.safetensors" in said and "__init__" not in said
    monkeypatch.setattr(compare, "project", lambda *_: (_ for _ in ()).throw(ValueError("projected")))
    command = ["--data", str(data), "--database", str(database), "--model", "m", "--out", str(tmp_path)]
    assert ct_ich.main(command) == 2 and "error: projected" in capsys.readouterr().err         # its own row is


def test_baselines_of_other_data_are_told_before_the_projection(data, database, slices32, tmp_path, monkeypatch,
                                                                capsys):
    stand_in(monkeypatch, database)
    other = baselines.HuThresholds()
    other.fit(SliceDataset(slices32))
    (tmp_path / "baselines").mkdir()
    other.save(tmp_path / "baselines" / "hu.safetensors")
    said = refused(data, database, tmp_path, monkeypatch, capsys, "--baselines", "hu")
    assert "hu.safetensors: fitted to another database than" in said and "remove the file" in said


def test_two_methods_of_one_name_are_refused(data, database, bundle, tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, database)
    command = ["--data", str(data), "--database", str(database), "--model", "m", "--out", str(tmp_path)]
    assert ct_ich.main([*command, "--beside", str(bundle), f"{bundle}/"]) == 2
    assert "--beside: another is the name of two methods" in capsys.readouterr().err
    published = str(tmp_path / "published")                 # its figures took the place of the published search's
    assert ct_ich.main([*command, "--rows", "published", "--beside", published]) == 2
    assert ("--beside: published is the name of two methods; give the folder another name, and any other method once"
            in capsys.readouterr().err)


def test_wrong_files_are_wrong_usage(data, tmp_path, capsys):
    for name in ("scans.csv", "slices.csv", "test"):
        (tmp_path / name).symlink_to(data / name)
    assert ct_ich.main(["--data", str(tmp_path), "--database", str(tmp_path / "x.lmdb"), "--model", "m", "--out",
                        str(tmp_path / "o")]) == 2
    assert "x.lmdb: no such file" in capsys.readouterr().err
