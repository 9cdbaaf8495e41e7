"""The phantom benchmark: its figures by hand, and all stages on synthetic heads with a stand-in for the projector."""

from __future__ import annotations

import csv
import functools
import json
import types

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import baselines, compare
from ct.frame import PreprocessSettings, preprocess_scan
from ct.read import find_scans, read_scan
from ct.standardise import StandardiseSettings
from ct.write import write_nifti
from dataset import ScanRecord, SliceDataset, SliceWriter
from demos import benchmark, figures
from demos.figures import LEVELS, OURS, STEP, Case, Cohort
from detect.settings import Settings
from evaluation import metrics
from evaluation.cohort import read_volume
from tests.helpers import synthetic_scan

SETTINGS = PreprocessSettings(StandardiseSettings(size=32), min_brain_fraction=0.01)
OURS_SETTINGS = Settings("search", measure="surprise")


def measured(values, truth, slices=(0.0,), truth_mm2=None, shown=None, score=0.0, outside=0) -> dict:
    """Measures of one scan whose brain pixels have these values and this truth; `outside` more truth lies elsewhere."""
    values, truth = np.asarray(values, float), np.asarray(truth, bool)
    levels = figures.count_levels(values, truth, np.ones(len(values), bool))
    slices = np.asarray(slices, float)
    return {f"{m}_levels": levels for m in (OURS, "hu")} | {f"{m}_slices": slices for m in (OURS, "hu")} | {
        "truth_mm2": np.zeros(len(slices)) if truth_mm2 is None else np.asarray(truth_mm2, float),
        "shown": np.ones(len(slices), bool) if shown is None else np.asarray(shown, bool),
        "truth_pixels": truth.sum() + outside, "voxel_ml": 1.0, "mask_pixels": 4, "mask_hits": 1,
        f"{OURS}_score": score, "hu_score": score, f"{OURS}_seconds": 2.0, "hu_seconds": 1.0}


# ---- figures of pixels

def test_levels_count_absolute_values_in_the_brain():
    values = np.array([0.0, -0.051, 0.051, 0.2, 500.0, 7.0])
    truth = np.array([False, False, True, False, True, True])
    brain = np.array([True, True, True, True, True, False])
    normal, lesion = figures.count_levels(values, truth, brain)
    assert {i: n for i, n in enumerate(normal) if n} == {0: 1, 1: 1, 4: 1}
    assert {i: n for i, n in enumerate(lesion) if n} == {1: 1, LEVELS - 1: 1}


def test_dice_at_a_level_counts_the_truth_outside_the_brain_as_missed():
    m = measured([1.0, 1.0, 3.0, 3.0], [False, True, True, True], outside=2)
    curve = figures.dice_curve(m[f"{OURS}_levels"], m["truth_pixels"])
    assert curve[0] == pytest.approx(2 * 3 / (4 + 5))
    assert curve[round(2 / STEP)] == pytest.approx(2 * 2 / (2 + 5))
    assert curve[-1] == 0


def test_pixel_ap_is_that_of_all_pixels_together():
    rng = np.random.default_rng(0)
    values, truth = np.rint(rng.normal(5, 3, (2, 40))), rng.random((2, 40)) < 0.3
    together = figures.pixel_ap([measured(v, t) for v, t in zip(values, truth)], OURS)
    assert together == pytest.approx(metrics.average_precision(np.abs(values).ravel(), truth.ravel()))


# ---- figures of slices and scans

def test_slices_that_are_not_shown_or_hold_a_little_truth_are_no_units():
    first = measured([1.0], [True], slices=[1, 2, 3, 4], truth_mm2=[0, 10, 25, 80], shown=[True, True, True, False])
    second = measured([1.0], [False], slices=[5.0])
    scores, labels, scans = figures.slice_units(Cohort([Case("a", "tumour"), Case("b", None)], [first, second]), OURS)
    assert (scores.tolist(), labels.tolist(), scans.tolist()) == ([1, 3, 5], [0, 1, 0], [0, 0, 1])


@pytest.fixture
def small() -> Cohort:
    """Three large bleeds, three tumours, three healthy; ours ranks all right, hu mistakes a bleed for healthy."""
    cases = [Case(f"{kind}{i}", kind) for kind in ("epidural", "tumour", None) for i in range(3)]
    found = []
    for number, case in enumerate(cases):
        truth = [False] * 4 + [case.kind is not None] * (6 if case.kind == "epidural" else 2)
        values = np.where(truth, 10.0, 1.0)
        m = measured(values, truth, slices=[5.0 if case.kind else 1.0, 0.5],
                     truth_mm2=[100 * (case.kind is not None), 0], score=float(10 - number))
        found.append(m | ({"hu_slices": np.array([0.2, 0.2]), "hu_score": 0.2} if number == 0 else {}))
    return Cohort(cases, found)


def test_report_and_table_by_hand(small):
    found = figures.report(small, [OURS, "hu"], "mean", 5.0)
    ours, hu = found["methods"][OURS], found["methods"]["hu"]
    assert ours["all"]["scan_auc"] == 1 and ours["all"]["slice_auc"] == 1 and ours["all"]["pixel_ap"] == 1
    assert hu["all"]["scan_auc"] == pytest.approx(15 / 18)                 # one of six below all three
    assert hu["kinds"]["epidural"]["scan_auc"] == pytest.approx(6 / 9) and hu["kinds"]["tumour"]["scan_auc"] == 1
    assert ours["all"]["dice_large_haemorrhage"] == 1                      # its 10 above 5, the brain's 1 below
    assert ours["kinds"]["tumour"]["dice_large_haemorrhage"].startswith("undefined")
    assert found["shipped_mask_dice"] == pytest.approx(2 * 1 / (4 + 6))
    assert 0 < hu["all"]["p"] == hu["all"]["p_holm"] < 1 and "p" not in ours["all"]
    epidural, tumour = (hu["kinds"][kind] for kind in ("epidural", "tumour"))
    assert epidural["p_holm"] == epidural["p"] < 1 and tumour["p"].startswith("undefined")     # a family of one
    text = figures.table(found | {"failed": {"healthy-0002": "no head"}})
    assert text.startswith("6 emergencies and 3 healthy")
    assert "| epidural | 3 | 1.00 / 1.00 | 0.67 / 1.00 |" in text and "| HU above 55 | 0.83" in text
    assert "healthy-0002" in text and "Holm's correction for 1 methods" in text
    alone = figures.table(figures.report(small, [OURS], "mean", 5.0) | {"failed": {}})         # there is no test then
    assert "Holm" not in alone and "Dice: surprise above 5." in alone
    assert json.loads(json.dumps(found))["scans"]["epidural0"]["kind"] == "epidural"


def test_the_binary_map_is_cut_at_the_threshold_given(small):
    found = figures.report(small, [OURS, "hu"], "mean", 0.5)["methods"]["hu"]
    assert found["all"]["dice_large_haemorrhage"] == pytest.approx(2 * 6 / (10 + 6))     # all the brain is above 0.5


def test_the_example_of_a_kind_has_the_median_score_and_a_truth(small):
    assert figures.typical(small) == {"epidural": "epidural1", "tumour": "tumour1"}


def test_the_example_sheet_has_room_for_every_kind():
    picture = Image.fromarray(np.zeros((20, 80, 3), np.uint8))
    sheet = figures.example_sheet({"epidural": picture, "infarct_early": picture, "tumour": picture})
    assert [ax.get_title(loc="left") for ax in sheet.axes].count("") == 1
    assert any("infarct early" in ax.get_title(loc="left") for ax in sheet.axes)


# ---- phantoms never seen

def test_a_seed_of_the_training_cohort_is_refused(slices32, tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text("scan_id,label,seed\nhead0,0,7\nhead1,0,8\nhead2,0,9\n")
    data = SliceDataset(slices32)
    jobs = [types.SimpleNamespace(seed=seed) for seed in (10, 8)]
    benchmark.refuse_seen(jobs[:1], labels, data)
    with pytest.raises(ValueError, match="1 of its phantoms are in this benchmark.*--seed"):
        benchmark.refuse_seen(jobs, labels, data)
    labels.write_text("scan_id,label,seed\nhead0,0,7\n")
    with pytest.raises(ValueError, match="no row for 2 scans"):
        benchmark.refuse_seen(jobs[:1], labels, data)


# ---- all stages

def head(seed: int, kind: str | None):
    spacing = dict(slices=14, size=64, spacing_mm=(10.0, 3.6, 3.6), angle_deg=3 * (seed % 4), seed=seed)
    scan, brain = synthetic_scan(**spacing)
    if kind is None:
        return scan, np.zeros(brain.shape, bool)
    ill = synthetic_scan(**spacing, lesion=(5, 10, 25, 22, 75))[0]
    return ill, np.abs(ill.hu - scan.hu) > 20


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """A database of two healthy heads, and three held out."""
    path = tmp_path_factory.mktemp("data") / "healthy.lmdb"
    with SliceWriter(path, SETTINGS.to_json()) as writer:
        for seed, split in zip(range(901, 906), ("train", "train", "val", "val", "val")):
            pre = preprocess_scan(head(seed, None)[0], SETTINGS)
            kept, standard = pre.kept, pre.standardised
            writer.add(ScanRecord.encode(f"h{seed}", standard.hu[kept], standard.brain[kept],
                                         standard.below_vertex_mm[kept]), split, f"h{seed}")
    return path


def make_cohort(healthy, emergency, seed, folder, **_):
    """Synthetic heads in the places of phantoms."""
    for name in ("scans", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for job in benchmark.plan(healthy, emergency, seed, folder):
        if not (folder / "scans" / f"{job.scan_id}.nii.gz").exists():
            scan, truth = head(job.seed % 1000, job.kind)
            write_nifti(folder / "scans" / f"{job.scan_id}.nii.gz", scan.hu, scan, np.int16)
            write_nifti(folder / "masks" / f"{job.scan_id}.nii.gz", truth, scan)


def project(folder, model, device, fails="healthy-0002"):
    """What projector.py writes, with HU thresholds in its place and one scan that fails."""
    ours, scans, slices = baselines.HuThresholds(), [], []
    for source in find_scans(folder / "scans"):
        if source.scan_id == fails:
            scans.append({"scan_id": source.scan_id, "status": "failed", "reason": "no head"})
            continue
        results, scan = folder / "results" / source.scan_id, read_scan(source)
        results.mkdir(parents=True, exist_ok=True)
        pre = preprocess_scan(scan, SETTINGS)
        scored = baselines.score_scan(ours, pre)
        maps = {"anomaly": scored.anomaly, "mask": scored.anomaly > 3, "brain": pre.slabs.from_slabs(pre.brain),
                "reconstruction": scan.hu - scored.anomaly}
        for name, volume in maps.items():
            write_nifti(results / f"{name}.nii.gz", volume, scan)
        scans.append({"scan_id": source.scan_id, "score": scored.scan_score("mean"), "status": "ok"})
        slices += [{"scan_id": source.scan_id, "slice": i, "score": s} for i, s in enumerate(scored.slice_scores)]
    timed = [{"scan_id": row["scan_id"], "seconds": 3} for row in scans if row["status"] == "ok"]
    for name, rows in (("scores", scans), ("slices", slices), ("seconds", timed)):
        with open(folder / "results" / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, ["scan_id", "slice", "score", "status", "reason", "seconds"])
            table.writeheader()
            table.writerows(rows)
    return {"weights_sha256": "0", "model": {}, "versions": {},
            "settings": OURS_SETTINGS.to_json(), "preprocessing": SETTINGS.to_json()}


@pytest.fixture
def patched(healthy, monkeypatch):
    """The stand-ins in place, with a model whose provenance names the database."""
    bundle = {"provenance": {"data": SliceDataset(healthy).facts()}, "settings": OURS_SETTINGS.to_json(),
              "preprocessing": SETTINGS.to_json()}
    monkeypatch.setattr(benchmark, "make_cohort", make_cohort)
    monkeypatch.setattr(benchmark, "project", project)
    monkeypatch.setattr(compare, "read_bundle_meta", lambda folder: (bundle, "0"))
    return bundle


def command(data, out, *more):
    return ["--model", "model", "--data", str(data), "--out", str(out), "--healthy", "3", "--emergency", "2",
            "--baselines", "hu", "--device", "cpu", *more]


def test_every_stage_going_on_and_another_mask(patched, healthy, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert benchmark.main(command(healthy, out)) == 3            # one phantom failed
    printed = capsys.readouterr().out
    found = json.loads((out / "metrics.json").read_text())
    ours, hu = (found["methods"][m]["all"] for m in (OURS, "hu"))
    assert found["failed"] == {"healthy-0002": "no head"}
    assert (ours["emergencies"], ours["healthy"]) == (2, 2)
    for method in (ours, hu):
        assert method["scan_auc"] == 1 and method["dice"] > 0.5 and method["pixel_ap"] > 0.5
    assert (out / "table.md").read_text() in printed and "min left" in printed
    assert Image.open(out / "examples.png").width > 400
    assert found["seed"] == 1_000_000

    own = benchmark.measure
    monkeypatch.setattr(benchmark, "project", lambda folder, *_: json.loads((out / "run.json").read_text()))
    (out / "run.json").write_text(json.dumps({key: found[key] for key in (
        "weights_sha256", "model", "settings", "versions")} | {"preprocessing": SETTINGS.to_json()}))
    monkeypatch.delattr(benchmark, "measure")                        # a finished scan is not measured again
    assert benchmark.main(command(healthy, out)) == 3
    assert json.loads((out / "metrics.json").read_text()) == found

    monkeypatch.setattr(benchmark, "measure", own, raising=False)
    maps = out / "test" / "results" / "emergency-0001"               # a scan that was projected anew is
    scan = read_scan(find_scans(out / "test" / "scans")[0])
    for name in ("anomaly", "mask"):
        write_nifti(maps / f"{name}.nii.gz", np.zeros(scan.hu.shape, np.float32), scan)
        before, found = found, json.loads((out / "metrics.json").read_text()) if (
            benchmark.main(command(healthy, out)) == 3) else None
        assert found["shipped_mask_dice" if name == "mask" else "methods"] != before[
            "shipped_mask_dice" if name == "mask" else "methods"]
    path = out / "test" / "masks" / "emergency-0001.nii.gz"                # a scan whose truth is another now is, too
    truth, before = read_volume(path)[0], found
    write_nifti(path, np.roll(truth, 3, axis=2), scan)
    assert benchmark.main(command(healthy, out)) == 3
    assert json.loads((out / "metrics.json").read_text())["methods"] != before["methods"]
    (out / "test" / "measures" / "emergency-0001.npz").unlink()
    brain = out / "test" / "results" / "emergency-0001" / "brain.nii.gz"
    scan = read_scan(find_scans(out / "test" / "scans")[0])
    write_nifti(brain, ~(read_volume(brain)[0] > 0), scan)
    assert benchmark.main(command(healthy, out)) == 2
    assert "not the mask that the baselines get" in capsys.readouterr().err


def test_where_no_phantom_failed_all_is_done(patched, healthy, tmp_path, monkeypatch):
    """With one that failed it ends with 3, as the other benchmarks do: the test above."""
    monkeypatch.setattr(benchmark, "project", functools.partial(project, fails=None))
    assert benchmark.main(command(healthy, tmp_path / "out")) == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["failed"] == {}


def test_a_phantom_taken_for_upside_down_has_its_truth_on_its_slices(tmp_path):
    """Its maps and truth lie as the file does, while scores by slice count from the head's lower end."""
    healthy, ill = (synthetic_scan(slices=12, size=64, spacing_mm=(10.0, 3.6, 3.6), lesion=lesion)[0]
                    for lesion in (None, (5, 10, 25, 22, 75)))           # in 5 slices about the one 4 above the lowest
    truth, results = np.abs(ill.hu - healthy.hu) > 20, tmp_path / "results" / "one"
    results.mkdir(parents=True)
    for name, volume in (("scans", ill.hu), ("masks", truth)):
        (tmp_path / name).mkdir()
        write_nifti(tmp_path / name / "one.nii.gz", volume[::-1], ill)
    source, = find_scans(tmp_path / "scans")
    scan = read_scan(source)
    assert "upside down" in scan.notes[0]
    pre = preprocess_scan(scan, SETTINGS)
    scored = baselines.score_scan(baselines.HuThresholds(), pre)
    for name, volume in (("anomaly", scored.anomaly), ("mask", scored.anomaly > 3),
                         ("brain", pre.slabs.from_slabs(pre.brain))):
        write_nifti(results / f"{name}.nii.gz", volume, scan)
    found = benchmark.measure(source, tmp_path, SETTINGS, {"hu": lambda pre: scored},
                              {("one", i): float(s) for i, s in enumerate(scored.slice_scores)}, "mean")
    assert np.flatnonzero(found["truth_mm2"]).tolist() == [2, 3, 4, 5, 6]
    assert found["mask_hits"] > 0.8 * truth.sum()
    assert (found["hu_levels"] == found[f"{OURS}_levels"]).all() and found["hu_levels"][1, 1:].sum() > 0.8 * truth.sum()


def test_a_model_of_other_data_is_refused_before_the_work(patched, healthy, tmp_path, capsys):
    patched["provenance"]["data"] |= {"digest": "f" * 64, "counts": {}}
    assert benchmark.main(command(healthy, tmp_path / "out")) == 2
    assert "trained on ffffffffffff" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_baselines_of_another_database_are_refused(healthy, slices32, tmp_path):
    other = baselines.HuThresholds()
    other.fit(SliceDataset(slices32))
    other.save(tmp_path / "hu.safetensors")
    with pytest.raises(ValueError, match=r"fitted to another database .*\(another digest\)"):
        compare.fitted(["hu"], SliceDataset(healthy), tmp_path, torch.device("cpu"))
    other.fit(SliceDataset(healthy))
    other.trained_on["held_out"] = other.trained_on["held_out"][1:]         # it has learnt from one held out now
    other.save(tmp_path / "hu.safetensors")
    with pytest.raises(ValueError, match=r"\(another held_out\)"):
        compare.fitted(["hu"], SliceDataset(healthy), tmp_path, torch.device("cpu"))


@pytest.mark.parametrize("wrong", [["--healthy", "1"], ["--workers", "0"], ["--seed", "-1"]])
def test_values_that_cannot_be_meant_are_wrong_usage(tmp_path, capsys, wrong):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(command("healthy.lmdb", tmp_path, *wrong))
    assert stopped.value.code == 2 and wrong[0] in capsys.readouterr().err
