"""Readers of folds, and of another hospital's scans: each calibrates by what it has not seen."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
import torch

import checkpoint
import latent_stats
import train_encoder
from benchmarks import cross_validation
from bundling import origins
from dataset import SliceDataset
from detect.bundle import load_bundle
from detect.pca import PcaFit, PositionPca
from detect.reader import Reader
from gan import reader_loop
from gan.run_folder import load_run
from gan.settings import EveryNth, ReaderConfig
from gan.snapshots import load_snapshot
from tests.helpers import write_heads
from tests.reader_data import run


@pytest.fixture(scope="module")
def reader_run(hiding_run, slices32, tmp_path_factory):
    out = tmp_path_factory.mktemp("reader")
    assert run(slices32, hiding_run, out) == 0
    return out


@pytest.fixture(scope="module")
def in_thirds(gan_run, tmp_path_factory):
    """(database, encoder, readers): a scan to train on and three that are held out, each by one of three readers."""
    folder = tmp_path_factory.mktemp("folds")
    data = write_heads(folder / "four.lmdb", ("train", "val", "val", "val"))
    flags = ["--preset", "smoke32", "--hide", "0.9", "--batch", "4", "--epochs", "1", "--encoder-code", "8"]
    assert train_encoder.main(["--data", str(data), "--gan", str(gan_run), "--out", str(folder / "encoder"), *flags]
                              ) == 0
    readers = [folder / f"reader-{number}" for number in (1, 2, 3)]
    for number, out in enumerate(readers, 1):
        assert run(data, folder / "encoder", out, "--fold", f"{number}:3", "--epochs", 0.5) == 0
    return data, folder / "encoder", readers


def test_a_fold_learns_from_what_others_hold_out_in_half_of_what_it_sees(in_thirds, tmp_path, monkeypatch, capsys):
    data, encoder, readers = in_thirds
    assert [load_snapshot(one).meta["held_out"] for one in readers] == [["head1"], ["head2"], ["head3"]]
    shown = []
    batches = reader_loop.slice_batches

    def watched(slices, *args, **kwargs):
        shown.append(Counter(slices.datasets[d].scan_ids[slices.datasets[d][i]["scan"]]
                             for d in range(len(slices.datasets)) for i in range(len(slices.datasets[d]))))
        return batches(slices, *args, **kwargs)

    monkeypatch.setattr(reader_loop, "slice_batches", watched)
    assert run(data, encoder, tmp_path / "a", "--fold", "3:3", "--epochs", 0.1) == 0
    assert shown == [{"head0": 4, "head1": 5, "head2": 6}]               # 11 slices once: no fewer than the 4
    few = SliceDataset(data, "val", scans=["head1"])
    assert len(few) == 5 and few.scan_ids == ["head1"]
    assert "4 slices of 1 scans and again and again the 11 of 2 others, 7 held out" in capsys.readouterr().out


@pytest.mark.parametrize(("fold", "words"), (("0:3", "expected K:N"), ("4:3", "expected K:N"), ("1:1", "expected K:N"),
                                             ("1", "expected K:N"), ("a:b", "expected K:N")))
def test_a_fold_that_is_none_is_refused(fold, words, capsys):
    with pytest.raises(SystemExit) as stop:
        run("none.lmdb", "none", "none", "--fold", fold)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_folds_are_of_patients():
    """A patient's other scan would teach the reader that calibrates by the first."""
    scans, patients = ["a", "b", "c", "d", "e"], ["P", "Q", "P", "R", "Q"]
    assert [EveryNth(number, 2).of(scans, patients) for number in (1, 2)] == [["a", "c", "d"], ["b", "e"]]
    assert EveryNth(3, 3).of(scans, scans) == ["c"]


def test_no_fold_shares_a_patient_with_what_it_learns_from(in_thirds, monkeypatch):
    dataset = SliceDataset(in_thirds[0], "train")
    for scan in dataset.manifest["scans"]:
        scan["patient"] = {"head2": "patient1"}.get(scan["scan_id"], scan["patient"])
    monkeypatch.setattr("dataset.read_manifest", lambda path: dataset.manifest)
    found = [[part.scan_ids for part in reader_loop.in_folds(dataset, EveryNth(n, 2))] for n in (1, 2)]
    assert found == [[["head1", "head2"], ["head3"]], [["head3"], ["head1", "head2"]]]


def test_a_fold_of_too_few_scans_is_refused(hiding_run, slices32, tmp_path, capsys):
    assert run(slices32, hiding_run, tmp_path / "r", "--fold", "1:3") == 2
    assert "holds scans of 1 patients out, too few" in capsys.readouterr().err


def test_each_reader_calibrates_by_what_it_has_not_seen(in_thirds, tmp_path, capsys, monkeypatch):
    data, encoder, readers = in_thirds
    asked, read = [], Reader.read

    def watched(self, query_hu, *args):
        asked.append((len(query_hu), float(self.last.bias.sum())))
        return read(self, query_hu, *args)

    monkeypatch.setattr(Reader, "read", watched)
    flags = ["--data", data, "--encoder", encoder, "--preset", "ct128",
             *(flag for one in readers for flag in ("--reader", one))]
    assert latent_stats.main([*map(str, flags), "--out", str(tmp_path / "m")]) == 0
    biases = [float(load_snapshot(one).weights["reader_ema"]["last.bias"].half().float().sum()) for one in readers]
    assert asked == [(slices, pytest.approx(bias)) for slices, bias in zip((5, 6, 7), biases)]
    meta = load_bundle(tmp_path / "m").meta
    assert meta["calibration"]["scans"] == 3
    assert [one["held_out"] for one in meta["provenance"]["readers"]] == [1, 1, 1]
    assert meta["provenance"]["reader"] == meta["provenance"]["readers"][0]
    assert not re.search(r"head\d", json.dumps(meta["provenance"]))                 # no ids
    assert latent_stats.main([*map(str, flags[:-2]), "--out", str(tmp_path / "two")]) == 2
    assert "may all have been trained on head3, which are to calibrate" in capsys.readouterr().err
    assert run(data, encoder, tmp_path / "again", "--fold", "3:3", "--init", readers[0], "--epochs", 0.1) == 0
    assert "did not hold out head3" in capsys.readouterr().out
    assert run(data, encoder, tmp_path / "third", "--fold", "3:3", "--init", tmp_path / "again", "--epochs", 0.1) == 0
    assert "did not hold out head3" in capsys.readouterr().out
    assert latent_stats.main([*map(str, flags[:-1]), str(tmp_path / "third"), "--out", str(tmp_path / "three")]) == 2
    assert "may all have been trained on head3, which are to calibrate" in capsys.readouterr().err


def test_a_reader_goes_on_beside_other_networks(hospital, hiding_run, slices32, tmp_path, capsys):
    """As after train_encoder.py --init: the run is beside those, and says what it began with."""
    (model, own, readers), other = hospital, tmp_path / "other"
    plain = ("--preset", "ct128", "--calibrate", "none", "--set", "measure=votes", "scan_score=mean")
    assert calibrated(hiding_run, slices32, other, *plain) == 0
    was = load_run(readers[0], "--reader", "reader", "train_reader.py").meta
    for first in (model, readers[0]):
        assert run(own, other, out := tmp_path / first.name, "--init", first, "--fold", "1:3", "--epochs", "0.1") == 0
        assert (f"note: the reader of --init {first} was taught beside other networks than those of --encoder {other}"
                in capsys.readouterr().out)
        kept = load_run(out, "--reader", "reader", "train_reader.py").meta
        assert kept["beside"] != was["beside"] and kept["began_with"] and kept["init"]


def test_benchmarks_on_what_a_reader_has_learnt_from_leave_it_out(in_thirds, reader_run, tmp_path, capsys):
    data, encoder, readers = in_thirds
    given = [str(flag) for one in readers for flag in ("--reader", one)]
    flags = ["--data", str(data), "--encoder", str(encoder), "--preset", "ct128", *given, "--out", str(tmp_path / "m")]
    assert latent_stats.main(flags) == 0
    model, out = ["--model", str(data), str(tmp_path / "m")], ["--out", str(tmp_path / "cv")]
    tables = []
    for flags in ([], given):
        assert cross_validation.main([*model, *out, *flags]) == 0
        tables.append((tmp_path / "cv" / "table.md").read_text())
    assert "reader" not in tables[0] and "with what a reader says" in tables[1] and tables[1].startswith(tables[0])
    capsys.readouterr()
    assert cross_validation.main([*model, *out, "--reader", str(reader_run)]) == 2
    assert "was taught beside other networks" in capsys.readouterr().err
    part = ["--model", str(data), str(tmp_path / "m"), "--out", str(tmp_path / "part")]
    assert cross_validation.main([*part, *given[:2]]) == 2          # before the work, and says what is missing
    said = capsys.readouterr()
    assert "left out, since no --reader has held them out: head2, head3" in said.out
    assert "3 different held-out scans at least are needed, found head1" in said.err
    assert cross_validation.main([*out, *given]) == 2
    assert "give it with one --model" in capsys.readouterr().err
    anew = ["--encoder", str(tmp_path / "m"), "--data", str(data), "--out", str(tmp_path / "n")]
    assert latent_stats.main(anew) == 2
    assert "leave it out with --set read=0" in capsys.readouterr().err
    assert latent_stats.main([*anew, "--set", "read=0"]) == 0
    without = load_bundle(tmp_path / "n")
    assert without.reconstructor.reader is None and not {"reader", "readers"} & without.meta["provenance"].keys()


def calibrated(encoder, data, out, *flags) -> int:
    command = ["--encoder", encoder, "--data", data, "--out", out, *flags]
    return latent_stats.main([str(word) for word in command])


def given(readers) -> list:
    return [flag for one in readers for flag in ("--reader", one)]


@pytest.fixture(scope="module")
def hospital(in_thirds, tmp_path_factory):
    """(model, own, readers): a model with a reader; other scans, all held out; three readers that these have taught."""
    folder = tmp_path_factory.mktemp("hospital")
    data, encoder, readers = in_thirds
    model, own = folder / "model", write_heads(folder / "own.lmdb", ("val",) * 4, first=10)
    assert calibrated(encoder, data, model, "--preset", "ct128", *given(readers), "--set", "read=0.5") == 0
    taught = [folder / f"own-{number}" for number in (1, 2, 3)]
    for number, out in enumerate(taught, 1):
        assert run(own, model, out, "--init", model, "--fold", f"{number}:3", "--epochs", 0.5) == 0
    return model, own, taught


def test_a_hospital_teaches_a_model_readers_of_its_own(in_thirds, hospital, tmp_path, capsys, monkeypatch):
    """Each scan calibrates by the reader that has not seen it, beside the model's networks; the first one is kept."""
    model, own, readers = hospital
    asked, read = [], Reader.read

    def watched(self, query_hu, *args):
        asked.append((len(query_hu), float(self.last.bias.sum())))
        return read(self, query_hu, *args)

    monkeypatch.setattr(Reader, "read", watched)
    assert calibrated(model, own, tmp_path / "own", *given(readers)) == 0
    bias = [float(load_snapshot(one).weights["reader_ema"]["last.bias"].half().float().sum()) for one in readers]
    assert asked == [(count, pytest.approx(bias[r])) for r, count in ((0, 4), (0, 7), (1, 5), (2, 6))]
    before, after = load_bundle(model), load_bundle(tmp_path / "own")
    assert after.settings == before.settings and after.settings.scoring.read == 0.5
    assert origins.digest_of(after.reconstructor) == origins.digest_of(before.reconstructor)
    assert float(after.reconstructor.reader.last.bias.sum()) == pytest.approx(bias[0])
    assert after.meta["calibration"]["scans"] == 4

    known, theirs = after.meta["provenance"], before.meta["provenance"]
    of_own = SliceDataset(own, "val").facts()
    assert known["reader"] == known["readers"][0] and [one["held_out"] for one in known["readers"]] == [2, 1, 1]
    assert known["reader"]["data"] == known["calibration_data"] == of_own
    assert known["reader"]["init"] == theirs["reader"] and theirs["reader"]["init"] is None
    assert known["data"] == theirs["data"] and not re.search(r"head\d", json.dumps(known))
    assert checkpoint.main(["show", str(tmp_path / "own")]) == 0
    shown = capsys.readouterr().out
    images = [load_snapshot(one).step for one in (readers[0], in_thirds[2][0])]
    assert (f"  reader taught by     2 of the 4 scans of database {of_own['digest'][:16]}, {images[0]} images\n"
            f"  having begun with    3 of the 4 scans of database {theirs['data']['digest'][:16]}, {images[1]} images\n"
            ) in shown


def test_a_reader_is_taught_beside_a_model_as_beside_its_run(in_thirds, hospital, hiding_run, tmp_path):
    """Its networks, rounded, are those of the run by their digest, and a reader of one reads beside the other."""
    data, encoder, readers = in_thirds
    model, cpu = hospital[0], torch.device("cpu")
    of_run, of_model, of_other = (origins.open_beside(one, cpu, "fp32") for one in (encoder, model, hiding_run))
    assert of_run.digest == of_model.digest != of_other.digest
    assert of_run.prepared == of_model.prepared
    assert calibrated(model, data, tmp_path / "again", *given(readers)) == 0
    again, first = (load_bundle(one).meta for one in (tmp_path / "again", model))
    assert again["provenance"]["readers"] == first["provenance"]["readers"]
    assert again["calibration"]["scan_scores"] == first["calibration"]["scan_scores"]


def test_what_a_reader_of_a_model_sees_ends_where_its_slices_do(hospital):
    """Training slices of a shipped model end at 70 HU, scans of a hospital do not: what is denser is no bone."""
    beside = origins.open_beside(hospital[0], torch.device("cpu"), "fp32")
    assert beside.range_hu((-20, 180)) == (-20, 180)
    beside.method.range_hu = (0.0, 70.0)
    assert beside.range_hu((-20, 180)) == (0, 180) and beside.range_hu((0, 70)) == (0, 70)


def test_slices_as_those_that_taught_a_models_networks_teach_a_reader_too(hospital, tmp_path):
    """Loose slices end at 70 HU, and so did all that the networks of a shipped model have seen."""
    beside = origins.open_beside(hospital[0], torch.device("cpu"), "fp32")
    beside.method.range_hu = (0.0, 70.0)
    data = write_heads(tmp_path / "loose.lmdb", ("train", "train", "val"), first=10, hu_clip=(0, 70))
    config = ReaderConfig(epochs=0.1, width=24, depth=2, workers=0)
    reader_loop.train(config, data, beside, tmp_path / "r", torch.device("cpu"))
    assert load_snapshot(tmp_path / "r").meta["data"]["settings"]["standardise"]["hu_clip"] == [0, 70]


def test_scans_that_are_all_held_out_are_for_folds(hospital, tmp_path, capsys):
    model, own, readers = hospital
    assert [load_snapshot(one).meta["held_out"] for one in readers] == [["head10", "head13"], ["head11"], ["head12"]]
    assert run(own, model, tmp_path / "r") == 2
    assert "holds all of its scans out, which leaves none to learn from: give --fold 1:3" in capsys.readouterr().err
    assert run(own, model, tmp_path / "r", "--fold", "2:3", "--epochs", 0.1) == 0
    assert "17 slices of 3 scans, 5 held out" in capsys.readouterr().out


@pytest.mark.parametrize(("other", "words"), (({"size": 64}, "size 64, there 32"),
                                              ({"hu_clip": (0, 70)}, "hu_clip (0.0, 70.0), there (-20.0, 180.0)")))
def test_scans_prepared_for_another_model_are_refused(other, words, hospital, tmp_path, capsys):
    data = write_heads(tmp_path / "other.lmdb", ("val",) * 3, first=10, **other)
    assert run(data, hospital[0], tmp_path / "r", "--fold", "1:3") == 2
    assert f"in another way than those of --encoder {hospital[0]} ({words}); prepare" in capsys.readouterr().err


def test_models_that_no_reader_reads_beside_are_refused(in_thirds, hospital, hiding_run, slices32, tmp_path, capsys):
    data, encoder, _ = in_thirds
    model, own, readers = hospital
    plain = ("--preset", "ct128", "--calibrate", "none", "--set", "measure=votes", "scan_score=mean")
    pca = PositionPca(PcaFit(components=2, step_mm=20.0))
    pca.fit(SliceDataset(data, "train"))
    pca.save(tmp_path / "pca.safetensors")
    assert calibrated(tmp_path / "pca.safetensors", data, tmp_path / "pca", *plain, "method=pca") == 0
    assert calibrated(encoder, data, tmp_path / "bare", *plain) == 0
    assert calibrated(hiding_run, slices32, tmp_path / "other", *plain) == 0
    capsys.readouterr()
    for encoder, first, words in (
            (tmp_path / "pca", None, "a model of method pca, beside which no reader reads"),
            (model, tmp_path / "bare", "a model that holds no reader")):
        assert run(own, encoder, tmp_path / "r", "--fold", "1:3", *(("--init", first) if first else ())) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "r").exists()
    assert calibrated(tmp_path / "other", own, tmp_path / "no", "--set", "measure=surprise", *given(readers)) == 2
    assert "was taught beside other networks" in capsys.readouterr().err
    assert calibrated(model, own, tmp_path / "no", "--set", "read=0", *given(readers)) == 2
    assert "--reader: read=0 gives a reader no weight" in capsys.readouterr().err


def test_a_models_training_scans_teach_and_calibrate_nothing(in_thirds, hospital, tmp_path, capsys):
    """They are known by the digest of their database, with others of its scans held out."""
    model, _, readers = hospital
    data = write_heads(tmp_path / "all.lmdb", ("val",) * 4)
    assert SliceDataset(data, "val").manifest["digest"] == SliceDataset(in_thirds[0]).manifest["digest"]
    assert run(data, model, tmp_path / "r", "--fold", "1:3") == 2
    assert f"which --encoder {model} may have been trained on: hold out scans" in capsys.readouterr().err
    assert calibrated(model, data, tmp_path / "m", "--set", "read=0") == 2
    assert "head0, head1, head2 and 1 more may be among its training scans" in capsys.readouterr().err


def test_first_weights_of_a_model_that_own_scans_have_taught_are_told_of(hospital, tmp_path, capsys):
    """A model does not tell which of them have taught its reader: what began with it can be calibrated by none."""
    model, own, readers = hospital
    assert calibrated(model, own, tmp_path / "own", *given(readers)) == 0
    capsys.readouterr()
    assert run(own, model, tmp_path / "r", "--init", model, "--fold", "1:3", "--epochs", 0.1) == 0
    assert "did not hold out" not in capsys.readouterr().out
    again = tmp_path / "again"
    assert run(own, model, again, "--init", tmp_path / "own", "--fold", "1:3", "--epochs", 0.1) == 0
    assert "did not hold out head10, head13, held out now" in capsys.readouterr().out
    assert calibrated(model, own, tmp_path / "no", "--reader", again, *given(readers[1:])) == 2
    assert "may all have been trained on head10, head13, which are to calibrate" in capsys.readouterr().err


def test_a_hospital_calibrates_once_more(in_thirds, hospital, tmp_path, capsys):
    """Scans that calibrated a model have taught its reader nothing; those that taught it, or the one that it began
    with, are known for ever."""
    model, own, readers = hospital
    theirs, more = in_thirds[0], write_heads(tmp_path / "more.lmdb", ("val",) * 3, first=20)
    assert calibrated(model, own, tmp_path / "first") == 0
    assert calibrated(tmp_path / "first", own, tmp_path / "second") == 0
    assert calibrated(tmp_path / "second", more, tmp_path / "third") == 0
    capsys.readouterr()
    for one in ("first", "third"):
        assert calibrated(tmp_path / one, theirs, tmp_path / "no") == 2
        assert "its reader has learnt from some of the scans" in capsys.readouterr().err
    assert calibrated(tmp_path / "third", own, tmp_path / "taught", *given(readers)) == 0
    assert calibrated(tmp_path / "taught", more, tmp_path / "fourth") == 0
    capsys.readouterr()
    for one in ("taught", "fourth"):
        for data in (own, theirs):
            assert calibrated(tmp_path / one, data, tmp_path / "no") == 2
            assert "its reader has learnt from some of the scans" in capsys.readouterr().err
    assert calibrated(tmp_path / "fourth", own, tmp_path / "fifth", *given(readers)) == 0


def test_a_run_that_cannot_tell_of_anothers_scans_says_what_can(in_thirds, hospital, tmp_path, capsys):
    """Beside its model the same scans teach a reader (hospital)."""
    assert run(hospital[1], in_thirds[1], tmp_path / "r", "--fold", "1:3") == 2
    error = capsys.readouterr().err
    assert "holds out head10, head11, head12 and 1 more, which --encoder" in error
    assert "if these are, make a model of it (latent_stats.py), and give that" in error


@pytest.mark.parametrize(("method", "words"), (
    ("search", "of method inpainting, without latent.safetensors, discriminator.safetensors; leave the method as"),
    ("pca", "of method inpainting, without pca.safetensors; leave the method as"),
    ("inversion", "of method inpainting, made for that alone; leave the method as")))
def test_a_method_that_a_model_cannot_be_is_refused(method, words, hospital, tmp_path, capsys):
    """What Python says of a call with a reader too many was what was said."""
    assert calibrated(hospital[0], hospital[1], tmp_path / "no", "--set", f"method={method}") == 2
    error = capsys.readouterr().err
    assert f"--set method={method}: {hospital[0]} is a model {words}" in error and "__init__" not in error
