"""benchmarks/cross_validation.py on tiny folds: who is told by whom, the figures by hand, the command."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import cross_validation, pasted
from benchmarks.cross_validation import (
    BAND,
    HEALTHY,
    PLAIN,
    Case,
    cases_of,
    change,
    closer,
    compared,
    figures,
    main,
    surprises,
    tables,
)
from ct.frame import PreprocessSettings
from ct.standardise import StandardiseSettings
from dataset import ScanRecord, SliceDataset, SliceWriter
from detect.reconstruct import Reconstruction
from gan.snapshots import save_snapshot
from model import Discriminator, Encoder, Generator, ModelConfig

TINY = ModelConfig(size=32, style_dim=16, n_mlp=2, channel_max=16)
MM = np.arange(40.0, -1, -5)


def scan(seed=0):
    rng = np.random.default_rng(seed)
    brain = np.zeros((len(MM), 32, 32), bool)
    brain[:, 3:29, 3:29] = True
    return np.where(brain, 32 + 3 * rng.standard_normal(brain.shape), -20).astype(np.float32), brain


def case(scan_id, kind, added=0.0, seed=0):
    hu, brain = (torch.from_numpy(x) for x in scan(seed))
    truth = torch.zeros_like(brain)
    query = hu.clone()
    if added:
        truth[3:6, 10:18, 10:18] = True
        query = query + added * truth
    return Case(scan_id, kind, Reconstruction(query, torch.full_like(hu, 32.0), {}, {}), brain, MM, truth)


def cohort():
    return [case(f"head{i}", HEALTHY, seed=i) for i in range(5)] + [
        case(f"head{i}", "intraparenchymal", 40.0, seed=i) for i in range(5)]


def test_a_plain_bleed_is_told_from_the_healthy_at_its_place():
    cases = cohort()
    told, where = surprises(cases, PLAIN)
    lesion = cases[7]
    assert told[7][:, 0][lesion.truth].mean() > 3 > told[2][:, 0][lesion.truth].mean() + 2
    assert all(torch.equal(one.searched, c.brain) for one, c in zip(where, cases))


def test_no_case_is_told_by_its_own_head():
    cases = cohort()
    odd = dataclasses.replace(cases[0].found, normal_hu=cases[0].found.normal_hu - 30)
    other = [dataclasses.replace(c, found=odd) if c.scan_id == "head0" else c for c in cases]
    before, after = surprises(cases, BAND)[0], surprises(other, BAND)[0]
    assert (after[0][:, 1] - before[0][:, 1]).mean() > 2          # head0 itself is odd among the others
    own = surprises([*other[:5], dataclasses.replace(other[0], kind="epidural")], BAND)[0]
    assert torch.allclose(own[0], own[5])                         # the same head with a lesion is told as it is


def test_no_case_is_told_by_another_scan_of_its_patient(monkeypatch):
    told, fit = [], cross_validation.normative.fit_leaving_out
    monkeypatch.setattr(cross_validation.normative, "fit_leaving_out",
                        lambda *args: told.append(args[-1]) or fit(*args))
    patients = ("ann", "ann", "", "bob", "")
    surprises([dataclasses.replace(c, patient=name) for c, name in zip(cohort(), patients)], BAND)
    assert told == [["ann", "ann", "head2", "bob", "head4"]]


def test_figures_by_hand():
    cases = cohort()
    scores = [torch.tensor([0.1, 0.2, 0.0, 0, 0, 0, 0, 0, 0]) for _ in range(5)]
    scores += [torch.tensor([0, 0, 0, 0.3, 0.15, 0.05, 0, 0, 0]) for _ in range(5)]
    found = figures(compared(cases, scores, "max"))
    assert found["intraparenchymal"] == 1 and np.isnan(found["epidural"]) and found["haemorrhage"] == 1
    # Lesion slices 0.3, 0.15, 0.05 against 0.1, 0.2 and seven 0: 9, 8 and 7 of 9 won.
    assert found["slices"] == pytest.approx(24 / 27)


def peaks(healthy, ill):
    """Slice scores of cohort(), all 0 but slice 4."""
    return [torch.tensor([0, 0, 0, 0, v, 0, 0, 0, 0]) for v in (*healthy, *ill)]


def test_a_cohort_of_some_heads_alone():
    pairs = compared(cohort(), peaks((1.0, 2, 3, 4, 5), (1.5, 2.5, 3.5, 3.5, 5)), "max")
    won, of = pairs["intraparenchymal"]
    assert won.tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0.5]]
    assert (of == 1).all() and pairs["epidural"][1].sum() == 0
    # Heads 3 (twice) and 4: 3.5 twice against 4, 4, 5 wins nothing; 5 against 4, 4, 5 wins 2.5 of 9.
    found = cross_validation.auc(pairs, np.array([[0, 0, 0, 2.0, 1]]))
    assert found["intraparenchymal"] == found["haemorrhage"] == pytest.approx(2.5 / 9)
    assert np.isnan(found["epidural"]).all()


def test_a_change_by_one_head_is_within_its_interval_and_one_in_all_is_not():
    cases, before = cohort(), compared(cohort(), peaks((1, 2, 3, 4, 5), (1, 2, 3, 4, 5)), "max")
    one = compared(cases, peaks((1, 2, 3, 4, 5), (1, 2, 9, 4, 5)), "max")
    low, high = change(before, one, list("abcde"))["intraparenchymal"]
    assert low == 0 < high
    of_one_patient = change(before, one, list("aaaaa"))["intraparenchymal"]
    assert of_one_patient == pytest.approx([figures(one)["intraparenchymal"] - 0.5] * 2)      # all heads, or none
    low, high = change(before, compared(cases, peaks((1, 2, 3, 4, 5), (6, 7, 8, 9, 9)), "max"), list("abcde")
                       )["intraparenchymal"]
    assert low == high == 0.5                                     # 1 against 1/2 in whatever cohort


def test_a_resample_without_the_one_head_of_a_kind_leaves_the_kind_out():
    """A third of the resamples lack head0's epidural: their 0 / 0 made every limit of it and of the mean NaN."""
    cases = [*cohort(), case("head0", "epidural", 40.0)]
    before, after = (compared(cases, peaks((1, 2, 3, 4, 5), (1, 2, 3, 4, 5, epidural)), "max") for epidural in (0, 9))
    limits = change(before, after, list("abcde"))
    assert limits["intraparenchymal"] == (0, 0) and limits["epidural"] == (1, 1)      # it lost to all, and wins
    assert limits["haemorrhage"] == (0, 0.5)                      # without it, and as one kind of two
    assert np.isfinite(limits["slices"]).all() and np.isnan(limits["subdural"]).all()


def test_what_a_reader_says_has_a_row_of_its_own():
    """One that finds every lesion, which the residual cannot see, raises its rows alone."""
    def with_reader(one):
        healthy = torch.randn(9, 2, 32, 32, generator=torch.Generator().manual_seed(int(one.scan_id[-1]))) - 3
        said = torch.where(one.truth[:, None], 9.0, healthy) * torch.tensor([1.0, -1])[:, None, None]
        return dataclasses.replace(one, found=dataclasses.replace(one.found, read=said))

    cases = [case(one.scan_id, one.kind, 1e-9 * (one.kind != HEALTHY), seed=int(one.scan_id[-1])) for one in cohort()]
    without, heard = tables(cases)[0].splitlines(), tables([*map(with_reader, cases)])[0].splitlines()
    of_reader = sum(settings.read > 0 for settings, _ in cross_validation.ROWS.values())
    assert len(without) == 2 + 1 + len(cross_validation.ROWS) - of_reader == len(heard) - of_reader
    assert of_reader == 2 and heard[:-2] == without and "reader" in heard[-2]
    before, *after = (float(line.split(" | ")[1]) for line in heard[-3:])
    assert before == 0.5 and min(after) > 0.9


def test_a_closest_normal_as_if_it_were_closer():
    cases = cohort()
    drawn = dataclasses.replace(cases[5].found, normal_hu=cases[5].found.normal_hu + 20.0 * cases[5].truth)
    cases[5] = dataclasses.replace(cases[5], found=drawn)         # half of the lesion is in the closest normal
    near = closer(cases, 0.25)
    residual = [c.found.query_hu - c.found.normal_hu for c in near]
    assert torch.allclose(residual[0], 0.25 * (cases[0].found.query_hu - 32), atol=1e-4)
    assert torch.allclose(residual[5], residual[0] + 40.0 * cases[5].truth, atol=1e-4)


def folds(folder, model=TINY):
    made = []
    for name, held_out in (("a", (0, 1)), ("b", (2, 3))):
        path = folder / f"{name}.lmdb"
        with SliceWriter(path, PreprocessSettings().to_json()) as writer:
            for s in range(4):
                hu, brain = scan(s)
                writer.add(ScanRecord.encode(f"head{s}", hu, brain, MM), "val" if s in held_out else "train", f"p{s}")
        manifest = SliceDataset(path).manifest
        torch.manual_seed(0)
        networks = {"generator": Generator(model), "discriminator": Discriminator(model), "encoder": Encoder(model)}
        meta = {"kind": "encoder", "config": {}, "gan": None, "model": dataclasses.asdict(model),
                "data": {key: manifest[key] for key in ("digest", "counts", "settings")},
                "held_out": [f"head{s}" for s in held_out]}
        save_snapshot(folder / f"run-{name}", 8, networks, {}, meta)
        made.append((path, folder / f"run-{name}"))
    return made


def test_the_networks_of_a_fold_are_used_as_they_were_trained(tmp_path):
    """One trained with --hide was shown slices without what is hidden in them, and refused them."""
    hiding = dataclasses.replace(TINY, encoder_noise=True, noise_channels=True, encoder_masks=True)
    for name, model in (("inversion", TINY), ("inpainting", hiding)):
        (tmp_path / name).mkdir()
        held_out, method = cross_validation.open_fold(*folds(tmp_path / name, model)[0], torch.device("cpu"))
        found = held_out.scan(0)
        normal = method.closest_normal(found["hu"].float(), found["brain"], found["below_vertex_mm"].numpy())
        assert method.name == name and normal.normal_hu.shape == found["hu"].shape


class Copy:
    def closest_normal(self, hu, brain, below_vertex_mm):
        return Reconstruction(hu, hu, {}, {})


def with_patients(path, patients):
    """Held-out scans head0, head1, ... of these patients, and another to train on."""
    with SliceWriter(path, PreprocessSettings(StandardiseSettings(size=32)).to_json()) as writer:
        for s, patient in enumerate((*patients, "t")):
            writer.add(ScanRecord.encode(f"head{s}", *scan(s), MM), "train" if patient == "t" else "val", patient)
    return SliceDataset(path, "val")


@pytest.mark.parametrize("held_out, reads", [(3, True), (1, False)])
def test_a_reader_of_one_fold_alone_is_left_out_as_well(tmp_path, monkeypatch, held_out, reads):
    """Only of a model with several was it known that it has learnt from the others' scans."""
    data = with_patients(tmp_path / "a.lmdb", "abc")
    known = {key: data.manifest[key] for key in ("digest", "counts")}
    provenance = {"data": known, "reader": {"data": known, "held_out": held_out, "init": None}}
    bundle = SimpleNamespace(meta={"provenance": provenance}, reconstructor=SimpleNamespace(reader="its own"),
                             preprocessing=PreprocessSettings.from_json(data.manifest["settings"]))
    monkeypatch.setattr(cross_validation, "load_bundle", lambda *_: bundle)
    _, reconstructor = cross_validation.open_model(data.path, tmp_path, torch.device("cpu"))
    assert (reconstructor.reader == "its own") == reads
    provenance["data"] = known | {"counts": known["counts"] | {"val": {"scans": 1, "slices": 6, "loose": 0}}}
    with pytest.raises(ValueError, match="with other scans held out, and may have learnt from head0, head1, head2;"):
        cross_validation.open_model(data.path, tmp_path, torch.device("cpu"))


def test_who_has_taught_a_reader_is_left_out_with_all_scans(tmp_path, monkeypatch):
    """Of a patient it has learnt from one scan, which the run did not hold out; another one it read all the same."""
    data = with_patients(tmp_path / "a.lmdb", "aabc")
    meta = {"data": {"digest": data.manifest["digest"]}, "held_out": ["head1", "head2"]}
    monkeypatch.setattr(cross_validation, "open_model", lambda *_: (data, SimpleNamespace(name="inpainting")))
    for name, value in (("digest_of", ""), ("reader_of", "reader"), ("open_reader", SimpleNamespace(meta=meta))):
        monkeypatch.setattr(cross_validation, name, lambda *_, value=value: value)

    def opened():
        return cross_validation.open_readers(data.path, tmp_path, [tmp_path / "run"], torch.device("cpu"))

    (scans, _), = opened()
    assert scans.scan_ids == ["head2"]
    meta["held_out"] = ["head1"]
    with pytest.raises(ValueError, match=r"--reader .*run: has held out none of the patients"):
        opened()


def test_the_lesions_are_those_of_the_numbers(tmp_path):
    held_out = SliceDataset(folds(tmp_path)[0][0], "val")
    side_mm = pasted.pixel_mm(32, PreprocessSettings().standardise.head_fraction)
    found = cases_of(held_out, Copy(), range(3, 4))
    for s, scan_id in enumerate(("head0", "head1")):
        hu, brain = (held_out.scan(s)[name].numpy() for name in ("hu", "brain"))
        three, _ = pasted.paste_each(scan_id, hu.astype(np.float32), brain, MM, side_mm, 3)
        third = [one for one in three if one.kind == "intraparenchymal"][2]
        ill, = (c for c in found if (c.scan_id, c.kind) == (scan_id, "intraparenchymal"))
        assert np.array_equal(ill.found.query_hu, third.hu) and np.array_equal(ill.truth, third.truth)
    assert sum(c.kind == HEALTHY for c in found) == 2


@pytest.mark.parametrize("text", ["2", "3:2", "0:1", "1:", "a:b", "1:2:3", "-1:2"])
def test_lesions_are_numbered_from_first_to_last(text, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([f"--lesions={text}"])
    assert stopped.value.code == 2
    assert "argument --lesions: expected FIRST:LAST, counted from 1, such as 2:3" in capsys.readouterr().err


def test_the_command(tmp_path, capsys):
    (a, run_a), (b, run_b) = folds(tmp_path)
    fold = ["--fold", str(a), str(run_a), "--fold", str(b), str(run_b)]
    assert main([*fold, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    rows = 1 + len(cross_validation.ROWS) - 2                     # the residual itself, too; none of a reader
    assert len(lines) == 2 + rows
    assert all(line.count("|") == 4 + len(pasted.KINDS) for line in lines)
    changes = (tmp_path / "out" / "changes.md").read_text().splitlines()
    assert len(changes) == 2 + rows - 1 and " to " in changes[-1]
    assert main([*fold, "--out", str(tmp_path / "near"), "--residual", "0.5", "--device", "cpu"]) == 0
    assert (tmp_path / "near" / "table.md").read_text() != (tmp_path / "out" / "table.md").read_text()
    assert main([*fold, "--out", str(tmp_path / "others"), "--lesions", "2:3", "--device", "cpu"]) == 0
    assert (tmp_path / "others" / "table.md").read_text() != (tmp_path / "out" / "table.md").read_text()
    capsys.readouterr()
    assert main([*fold, "--out", str(tmp_path / "no"), "--residual", "0"]) == 2
    assert "--residual must be above 0" in capsys.readouterr().err
    assert main(["--fold", str(a), str(run_b), "--out", str(tmp_path / "no")]) == 2
    assert "not one of train_encoder.py on this database" in capsys.readouterr().err
    assert main(["--fold", str(a), str(run_a), "--out", str(tmp_path / "no")]) == 2
    assert "3 different held-out scans at least" in capsys.readouterr().err


def test_each_row_of_the_score_changes_one_thing_of_the_row_before():
    """The later ones begin with the defaults: other defaults would change two things at once, under the name of one."""
    rows = [dataclasses.asdict(settings) | {"scan_score": how} for settings, how in cross_validation.ROWS.values()]
    changed = [[key for key in one if one[key] != before[key]] for before, one in zip(rows, rows[1:])]
    assert changed == [["filter"], ["pool"], ["surprise_above"], ["scale"], ["hypodense"], ["scan_score"], ["filter"],
                       ["read"], ["hypodense"]]
