"""train_reader.py: a reader learns, goes on from where it was, and gets into a model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import latent_stats
import train_encoder
import train_reader
from dataset import SliceDataset
from detect.bundle import load_bundle
from detect.inversion import bone_mask
from detect.reader import Reader
from gan import reading
from gan.lineage import not_held_out
from gan.snapshots import load_snapshot, save_snapshot
from tests import processes
from tests.reader_data import run, with_held_out, with_meta


@pytest.fixture(scope="module")
def reader_run(hiding_run, slices32, tmp_path_factory):
    out = tmp_path_factory.mktemp("reader")
    assert run(slices32, hiding_run, out) == 0
    return out


def test_a_run_goes_on_as_if_it_had_not_been_stopped(reader_run, hiding_run, slices32, tmp_path, monkeypatch):
    whole = load_snapshot(reader_run)
    assert whole.step == 32 and whole.meta["kind"] == "reader"
    assert {"reader", "reader_ema"} == set(whole.weights)
    learn, steps = reading.ReadingTrainer.learn, []

    def three(self, *args):
        if len(steps) == 5:                                            # killed in the second epoch, after a snapshot
            raise KeyboardInterrupt
        steps.append(1)
        return learn(self, *args)

    monkeypatch.setattr(reading.ReadingTrainer, "learn", three)
    assert run(slices32, hiding_run, tmp_path) == 130
    monkeypatch.setattr(reading.ReadingTrainer, "learn", learn)
    assert load_snapshot(tmp_path).step == 16
    assert run(slices32, hiding_run, tmp_path) == 0
    again = load_snapshot(tmp_path)
    for name, weights in whole.weights.items():
        for key, value in weights.items():
            assert torch.equal(value, again.weights[name][key]), (name, key)
    rows = [[{k: v for k, v in json.loads(line).items() if k.startswith(("loss", "val"))}
             for line in (folder / "stats.jsonl").read_text().splitlines()] for folder in (reader_run, tmp_path)]
    assert rows[0] == rows[1] and 0 <= rows[0][-1]["val_ap"] <= 1
    assert (tmp_path / "read-002.png").is_file()


def test_the_average_follows_the_weights_and_only_the_reader_learns(reader_run, hiding_run):
    found = load_snapshot(reader_run)
    last = {name: found.weights[name]["last.weight"] for name in ("reader", "reader_ema")}
    assert 0 < last["reader_ema"].abs().sum() and not torch.equal(last["reader"], last["reader_ema"])
    assert found.meta["encoder"]["step"] == load_snapshot(hiding_run).step


def test_another_run_gives_the_first_weights(reader_run, hiding_run, slices32, tmp_path):
    assert run(slices32, hiding_run, tmp_path, "--init", reader_run, "--epochs", 0.25, "--lr", 1e-9) == 0
    mine, first = (load_snapshot(folder).weights["reader_ema"] for folder in (tmp_path, reader_run))
    assert all(torch.allclose(mine[key], first[key], atol=1e-6) for key in first)


def test_a_run_does_not_go_on_from_other_weights_of_the_same_description(reader_run, hiding_run, slices32, tmp_path,
                                                                         capsys):
    out, other, first = tmp_path / "run", tmp_path / "other", load_snapshot(reader_run)
    networks = {name: Reader([24, 32]) for name in first.weights}
    save_snapshot(other, first.step, networks, first.state, first.meta)
    assert run(slices32, hiding_run, out, "--init", reader_run, "--epochs", 0.25) == 0
    assert run(slices32, hiding_run, out, "--init", other, "--epochs", 0.5) == 2
    assert "the run there has another began_with" in capsys.readouterr().err
    assert run(slices32, hiding_run, out, "--init", reader_run, "--epochs", 0.5) == 0


@pytest.mark.parametrize("flags", (("--width", 48), ("--depth", 3)))
def test_first_weights_of_another_width_or_depth_are_refused(flags, reader_run, hiding_run, slices32, tmp_path, capsys):
    assert run(slices32, hiding_run, tmp_path / "run", "--init", reader_run, *flags) == 2
    wanted = [48, 64] if "--width" in flags else [24, 32, 48]
    assert (f"--init {reader_run}: a reader of channels [24, 32], this one is to have {wanted}; "
            "give --width 24 --depth 2") in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_two_ranks_train_one_reader_and_one_goes_on(slices32, hiding_run, tmp_path):
    flags = ["--data", slices32, "--encoder", hiding_run, "--out", tmp_path / "run", "--preset", "smoke32", "--device",
             "cpu", "--precision", "fp32", "--batch", 2]
    ranks = processes.start_ranks("train_reader", [*flags, "--epochs", 1], tmp_path / "log")
    assert processes.codes(ranks) == [0, 0]
    both = load_snapshot(tmp_path / "run")
    assert both.step == both.state["images_seen"] == 16                  # 4 images a step
    assert train_reader.main([*map(str, flags), "--epochs", "1.125"]) == 0
    assert load_snapshot(tmp_path / "run").step == 18


def test_a_run_of_so_many_hours_ends_by_the_clock(slices32, hiding_run, tmp_path, capsys):
    hours = ("--epochs", 1000, "--hours", 0.5 / 3600)
    assert run(slices32, hiding_run, tmp_path, *hours) == 0
    step = load_snapshot(tmp_path).step
    assert 0 < step < 16000 and "val_ap" in (tmp_path / "stats.jsonl").read_text()
    assert "Resuming" not in capsys.readouterr().out
    assert run(slices32, hiding_run, tmp_path, *hours) == 0
    assert load_snapshot(tmp_path).step == step
    assert f"Resuming at {step} images, after 0.00 hours: the training is over" in capsys.readouterr().out


def test_runs_of_other_commands_are_refused(slices32, hiding_run, gan_run, reader_run, tmp_path, capsys):
    for encoder, flags, said in (
            (gan_run, (), "--encoder"), (reader_run, (), "not a run of train_encoder.py (kind 'reader')"),
            (hiding_run, ("--init", hiding_run), "not a run of train_reader.py (kind 'encoder')")):
        assert run(slices32, encoder, tmp_path / "run", *flags) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_runs_of_versions_that_told_less_are_refused(slices32, hiding_run, gan_run, reader_run, tmp_path, capsys):
    """They ended in a KeyError."""
    def train(*flags):
        return train_encoder.main([*map(str, ("--data", slices32, "--out", tmp_path / "run", "--preset", "smoke32",
                                              "--hide", 0.9, *flags))])

    without = {key: with_meta(one, tmp_path / key, **{key: None}) for one, key in (
        (gan_run, "model"), (hiding_run, "held_out"), (hiding_run, "gan"), (reader_run, "beside"))}
    for call, said in (
            (lambda: train("--gan", without["model"]), "does not tell its model; make it anew with train.py"),
            (lambda: train("--init", without["held_out"]), "--init"),
            (lambda: run(slices32, without["gan"], tmp_path / "run"), "tell its gan; make it anew with train_encoder"),
            (lambda: run(slices32, hiding_run, tmp_path / "run", "--init", without["beside"]), "not tell its beside")):
        assert call() == 2
        assert "was made by an older version" in (told := capsys.readouterr().err) and said in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("flags", "words"), ((("--width", 20), "--width 20: must be a multiple of 24"),
                                              (("--depth", 7), "--depth must be at most 6"),
                                              (("--shapes", 1.5), "shapes")))
def test_a_network_that_cannot_be_is_refused(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run("none.lmdb", "none", tmp_path, *flags)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_slices_that_cannot_be_halved_so_often_are_refused(slices32, hiding_run, tmp_path, capsys):
    assert run(slices32, hiding_run, tmp_path / "run", "--depth", 6) == 2
    assert "--depth 6: slices of 32 x 32 pixels cannot be halved" in capsys.readouterr().err
    assert run(slices32, hiding_run, tmp_path / "run", "--depth", 5, "--epochs", 0.1) == 0


def test_a_database_that_holds_out_what_the_encoder_may_have_seen_is_refused(hiding_run, slices32, tmp_path, capsys):
    assert run(slices32, with_held_out(hiding_run, ["another"], tmp_path / "encoder"), tmp_path / "r") == 2
    error = capsys.readouterr().err
    assert "hold out scans that it has not seen" in error and "make a model" not in error     # of the same database


@pytest.mark.parametrize("flag", ["init", "gan"])
def test_what_an_encoder_began_with_counts_for_its_run_as_for_its_model(flag, hiding_run, slices32, tmp_path, capsys):
    """The same scans had taught it, another of the three held out. Of a run nobody asked, of its model for --init."""
    first = load_snapshot(hiding_run).known()[flag] or load_snapshot(hiding_run).known() | {"gan": None}
    first |= {"data": first["data"] | {"val_digest": "0" * 64}, "held_out": ["head0"]}
    encoder, model = with_meta(hiding_run, tmp_path / "encoder", **{flag: first}), tmp_path / "model"
    made = ["--data", slices32, "--encoder", encoder, "--out", model, "--preset", "ct128", "--calibrate", "none",
            "--set", "measure=votes", "scan_score=mean"]
    assert latent_stats.main([str(word) for word in made]) == 0
    for beside in (encoder, model):
        assert run(slices32, beside, tmp_path / "r", "--epochs", 0.25) == 2
        assert f"holds out head2, which --encoder {beside} may have been trained on" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(("held_out", "told"), ((["another"], True), (["another", "head2"], False)))
def test_first_weights_that_may_have_seen_what_is_held_out_are_told_of(held_out, told, hiding_run, reader_run, gan_run,
                                                                       slices32, tmp_path, capsys):
    def warned(flag):
        return (f"warning: {flag} {tmp_path}/first, or a run that it began with, did not hold out head2, held out now"
                in capsys.readouterr().out)

    with_held_out(reader_run, held_out, tmp_path / "first")
    assert run(slices32, hiding_run, tmp_path / "r", "--init", tmp_path / "first", "--epochs", 0.25) == 0
    assert warned("--init") == told
    shutil.rmtree(tmp_path / "first")
    with_held_out(gan_run, held_out, tmp_path / "first")
    flags = ["--preset", "smoke32", "--hide", "0.9", "--batch", "4", "--epochs", "0.25", "--encoder-code", "8"]
    data = ["--data", str(slices32), "--gan", str(tmp_path / "first"), "--out", str(tmp_path / "e")]
    assert train_encoder.main([*data, *flags]) == 0
    assert warned("--gan") == told
    made = ["--data", slices32, "--encoder", tmp_path / "e", "--out", tmp_path / "m", "--preset", "ct128",
            "--calibrate", "none", "--set", "measure=votes", "scan_score=mean"]
    assert latent_stats.main([str(flag) for flag in made]) == 0
    assert ("its GAN, or a run of --init, was trained on another database, or another part of it"
            in capsys.readouterr().out) == told


def test_what_a_run_began_with_counts_through_any_number_of_runs():
    """C began with B, and B with A."""
    def meta(held_out, digest="here", **of):
        return {"data": {"digest": digest}, "held_out": held_out} | of

    scans = ["one", "two", "three"]
    a, b = meta(["one", "three"]), meta(["one", "two"], init=meta(["one", "three"]))
    c = meta(scans, init=b, gan=meta(scans, init=meta(["one"], "elsewhere")))
    assert not_held_out(scans, a) == ["two"] and not_held_out(scans, meta(scans)) == []
    assert not_held_out(scans, b) == ["three", "two"] and not_held_out(["one"], b) == []
    assert not_held_out(scans, c) == ["three", "two"] and not_held_out(["one", "three"], c) == ["three"]
    d = meta(scans, init=meta(scans), gan=meta(["one"], "elsewhere"))
    assert not_held_out(scans, d) == ["three", "two"] and not_held_out(scans, d, elsewhere=False) == []


def test_a_reader_gets_into_a_model(reader_run, hiding_run, slices32, tmp_path, capsys):
    flags = ["--data", slices32, "--encoder", hiding_run, "--out", tmp_path / "model", "--preset", "ct128",
             "--calibrate", "none", "--set", "measure=votes", "scan_score=mean", "--reader", reader_run]
    assert latent_stats.main([str(flag) for flag in flags]) == 0
    bundle = load_bundle(tmp_path / "model")
    assert bundle.reconstructor.reader.widths == (24, 32)
    assert bundle.meta["provenance"]["reader"]["images_seen"] == 32
    average = load_snapshot(reader_run).weights["reader_ema"]["last.bias"]
    assert torch.allclose(bundle.reconstructor.reader.last.bias, average, atol=2e-3)


def test_a_reader_reads_beside_an_encoder_that_was_trained_against_noise(gan_run, slices32, tmp_path):
    """What it is taught beside is what it reads beside in the model: the closest normal itself."""
    encoder, out = tmp_path / "encoder", tmp_path / "reader"
    flags = ["--preset", "smoke32", "--batch", "4", "--epochs", "0.25", "--noise"]
    assert train_encoder.main(["--data", str(slices32), "--gan", str(gan_run), "--out", str(encoder), *flags]) == 0
    assert run(slices32, encoder, out, "--epochs", 0.25) == 0
    made = ["--data", slices32, "--encoder", encoder, "--out", tmp_path / "model", "--preset", "ct128", "--calibrate",
            "none", "--set", "method=inversion", "measure=votes", "scan_score=mean", "--reader", out]
    assert latent_stats.main([str(flag) for flag in made]) == 0
    method, slices = load_bundle(tmp_path / "model").reconstructor, SliceDataset(slices32, "val").scan(0)
    hu, brain = slices["hu"].float(), slices["brain"]
    found = method.closest_normal(hu, brain, slices["below_vertex_mm"].numpy())
    bone = bone_mask(found.query_hu)
    assert (found.read[:, 0][brain & ~bone] != 0).float().mean() > 0.9
    assert torch.equal(found.read, method.reader.read(found.query_hu, found.normal_hu, brain, bone))
    assert torch.equal(method.expected(hu, bone), found.normal_hu)
    method.reader = None
    assert method.closest_normal(hu, brain, slices["below_vertex_mm"].numpy()).read is None


def test_readers_that_hold_the_same_scan_out_are_refused(reader_run, hiding_run, slices32, tmp_path, capsys):
    flags = ["--data", slices32, "--encoder", hiding_run, "--out", tmp_path / "model", "--preset", "ct128",
             *(["--reader", reader_run] * 2)]
    assert latent_stats.main([str(flag) for flag in flags]) == 2
    assert f"--reader {reader_run}, {reader_run}: head2 held out by more than one" in capsys.readouterr().err


def test_a_reader_of_another_encoder_or_method_is_refused(reader_run, hiding_run, slices32, gan_run, tmp_path, capsys):
    flags = ["--data", slices32, "--out", tmp_path / "model", "--preset", "ct128", "--reader", reader_run]
    other = tmp_path / "other"
    shutil.copytree(hiding_run, other)
    more = ["--preset", "smoke32", "--hide", "0.9", "--batch", "4", "--epochs", "0.75", "--encoder-code", "8"]
    assert train_encoder.main(["--data", str(slices32), "--gan", str(gan_run), "--out", str(other), *more]) == 0
    assert latent_stats.main([str(flag) for flag in (*flags, "--encoder", other)]) == 2
    assert "was taught beside other networks" in capsys.readouterr().err
    plain = tmp_path / "plain"
    assert train_encoder.main(["--data", str(slices32), "--gan", str(gan_run), "--out", str(plain), "--preset",
                               "smoke32", "--batch", "4", "--epochs", "0.25"]) == 0
    assert latent_stats.main([str(flag) for flag in (*flags, "--encoder", plain, "--set", "method=search")]) == 2
    assert "--reader: for method=inpainting or inversion" in capsys.readouterr().err


def test_every_training_tells_of_loose_slices_apart(gan_run, train_gan, hiding_run, reader_run, slices32, tmp_path,
                                                    monkeypatch, capsys):
    """What SliceDataset.told() says; of runs that are over, which take no step."""
    monkeypatch.setattr("dataset.SliceDataset.told", lambda self: "so many")
    gan, encoder, reader = (shutil.copytree(one, tmp_path / name) for one, name in (
        (gan_run, "gan"), (hiding_run, "encoder"), (reader_run, "reader")))
    flags = ["--preset", "smoke32", "--hide", "0.9", "--batch", "4", "--epochs", "0.5", "--encoder-code", "8"]
    for code in (train_gan(gan), run(slices32, hiding_run, reader),
                 train_encoder.main(["--data", str(slices32), "--gan", str(gan_run), "--out", str(encoder), *flags])):
        assert code == 0
    assert capsys.readouterr().out.count("so many, 8 held out; ") == 3
