"""The reader's training: what it is shown, what counts, that it learns and goes on, and the way into a model."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

import checkpoint
import latent_stats
import train_encoder
import train_reader
from benchmarks import cross_validation
from bundling import origins
from common.weights import write_json
from dataset import SliceDataset
from detect.bundle import load_bundle
from detect.inpainting import InpaintingSettings
from detect.inversion import bone_mask
from detect.pca import PcaFit, PositionPca
from detect.reader import Reader
from gan import corrupt, reader_loop, reading
from gan.encoding import method_of
from gan.reading import Examples, reading_loss, targets
from gan.runlog import load_run, not_held_out
from gan.settings import EveryNth, ReaderConfig
from gan.snapshots import load_snapshot, save_snapshot
from op.banded import dilated
from tests import processes
from tests.helpers import write_heads

RANGE = (-20.0, 100.0)


def head(batch: int = 2, size: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """HU with grain, soft brain and bone [B, N, N]: a disc in a ring."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    radius = torch.from_numpy(np.hypot(x, y)).expand(batch, size, size) / size
    bone = (radius >= 0.36) & (radius < 0.42)
    grain = 4 * torch.randn(batch, size, size, generator=torch.Generator().manual_seed(0))
    return torch.where(bone, 95.0, torch.where(radius < 0.36, 32 + grain, 0.0)).float(), radius < 0.36, bone


# ---- What it is shown

def test_a_pixel_is_to_be_found_where_it_clearly_changed_and_in_between_it_does_not_count():
    change, soft = torch.zeros(1, 64, 64), torch.ones(1, 64, 64, dtype=torch.bool)
    for column, hu in enumerate((0.0, 1.0, 3.0, 9.0, -3.0, -9.0)):
        change[0, :, 10 * column:10 * column + 10] = hu
    soft[0, :5] = False
    present, counted = targets(change, soft)
    middle = [10 * column + 5 for column in range(6)]
    assert present[0, 0, 30, middle].tolist() == [0, 0, 0, 1, 0, 0]
    assert present[0, 1, 30, middle].tolist() == [0, 0, 0, 0, 0, 1]
    assert counted[0, 0, 30, middle].tolist() == [1, 1, 0, 1, 0, 1]
    assert not counted[0, 0, :5].any()


def test_what_a_scanner_does_is_nothing_to_be_found():
    """Gain, shift, rim and noise change a slice by many HU; without shapes nothing of it is a target."""
    hu, soft, bone = head()
    slices = {"hu": hu.to(torch.int16), "brain": soft | bone}
    drawn = Examples(ReaderConfig(shapes=0.0), RANGE)(slices, torch.Generator().manual_seed(1))
    assert (drawn["query_hu"] - hu).abs()[soft].max() > 3
    assert not drawn["change_hu"].any()
    drawn = Examples(ReaderConfig(shapes=1.0), RANGE)(slices, torch.Generator().manual_seed(1))
    assert targets(drawn["change_hu"], drawn["brain"] & ~drawn["bone"])[0].any()
    assert not drawn["change_hu"][~drawn["brain"]].any()


def test_a_scanner_leaves_bone_and_air_and_hangs_on_the_seed():
    hu, soft, bone = head(8)
    first, again, other = (corrupt.scanner(hu, soft, bone, torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first[~soft], hu[~soft])


def test_a_rim_is_under_the_skull(monkeypatch):
    """By 10 HU times exp(-depth / 2), with every other part of a scanner at nothing."""
    for name, value in (("GAIN", 0.0), ("SHIFT_HU", 0.0), ("NOISE_HU", 0.0), ("SHARED_HU", 0.0), ("HARD", 0.0),
                        ("RIM_HU", (10, 10)), ("RIM_LENGTH", (2, 2)), ("SHADED", 1.0)):
        monkeypatch.setattr(corrupt, name, value)
    hu, soft, bone = head(32, 128)
    added = (corrupt.scanner(hu, soft, bone, torch.Generator().manual_seed(0)) - hu).abs()
    edge = soft & dilated(~soft, 1)
    with_rim = added[:, 64, 64 - 46:64].amax(1) > 1
    assert 10 < with_rim.sum() < 32                                    # 0.7 of them
    even = [i for i in range(32) if with_rim[i] and added[i][edge[i]].std() < 0.7]
    assert even and added[even][edge[even]].mean() == pytest.approx(10 * np.exp(-0.5), rel=0.15)
    assert added[even, 64, 64].max() < 0.01


def test_the_grain_of_the_slice_stays_in_most_shapes(monkeypatch):
    """With OWN_GRAIN at 1 what is drawn has the slice's grain, with 0 the shape's own, which a filling may lack."""
    hu, soft, _ = head(24)

    def grain(own):
        monkeypatch.setattr(corrupt, "OWN_GRAIN", own)
        drawn = corrupt.draw_grained(hu, soft, 1.0, np.random.default_rng(5))
        return drawn, (drawn - hu).abs() > 8

    (kept, where), (lost, _) = grain(1.0), grain(0.0)

    def along(x):
        fine = [one - corrupt.smoothed(one, soft, 1.0) for one in (x, hu)]
        return np.corrcoef(fine[0][where], fine[1][where])[0, 1]

    assert along(kept) > along(lost) + 0.2
    assert torch.equal(kept[~soft], hu[~soft])


def test_some_shapes_hardly_differ(monkeypatch):
    hu, soft, _ = head(16)
    changes = []
    for hardly in (0.0, 1.0):
        monkeypatch.setattr(corrupt, "HARDLY", hardly)
        monkeypatch.setattr(corrupt, "OWN_GRAIN", 0.0)
        changes.append((corrupt.draw_grained(hu, soft, 1.0, np.random.default_rng(2)) - hu).abs().amax((1, 2)))
    assert (changes[1] <= corrupt.HARDLY_SHARE * changes[0] + 1e-4).all() and changes[0].min() > 1


# ---- The loss

def test_the_loss_by_hand():
    """One pixel to be found, at log odds 0, one that is not, and one that does not count."""
    found, present = torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 3)
    counted = torch.tensor([[[[1.0, 1.0, 0.0]]]])
    found[0, 0, 0, 2], present[0, 0, 0, 0] = 50.0, 1.0
    entropy = (2 * np.log(2) + 3 * np.log(2)) / 2 / 2                  # of two sides and two pixels
    overlap = [(2 * 0.5 + 20) / (1 + 1 + 20), 20 / (1 + 20)]
    assert reading_loss(found, present, counted).item() == pytest.approx(entropy + 0.3 * (1 - np.mean(overlap)))


# ---- Its training

def run(slices, encoder, out, *flags) -> int:
    command = ["--data", slices, "--encoder", encoder, "--out", out, "--preset", "smoke32", "--batch", 4, *flags]
    return train_reader.main([str(word) for word in command])


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


def test_the_loss_falls_on_slices_seen_again_and_again(reader_run, hiding_run, slices32):
    cpu = torch.device("cpu")
    method = method_of(load_snapshot(hiding_run), InpaintingSettings(), cpu, torch.float32)
    config = ReaderConfig(batch=4, width=24, depth=2, precision="fp32", warm_up=0, lr=5e-3)
    trainer, data = reading.ReadingTrainer(config, method, RANGE, cpu), SliceDataset(slices32, "train")
    slices = {key: torch.stack([data[i][key] for i in (2, 3, 4, 5)]) for key in ("hu", "brain")}
    batch = trainer.prepare(slices, torch.Generator().manual_seed(0))
    trainer.set_rates(0.0)
    first, *_, last = (trainer.learn(batch, i, 0.0)["loss"].item() for i in range(40))
    assert last < 0.8 * first and trainer.images_seen == 160
    assert not any(p.requires_grad for net in (method.generator, method.encoder) for p in net.parameters())


def test_the_second_step_is_on_the_mirror_images():
    shown = []
    for mirrored in (True, False):
        config = ReaderConfig(batch=2, width=24, depth=1, mirrored=mirrored, precision="fp32")
        trainer = reading.ReadingTrainer(config, None, RANGE, torch.device("cpu"))
        hu, soft, bone = head()
        images, change = torch.randn(2, 6, 64, 64), torch.zeros(2, 64, 64)
        change[:, 20:30, 20:30] = 9.0
        trainer.images = lambda _, images=images: images
        trainer._step = lambda *parts: shown.append(parts) or torch.tensor(1.0)
        trainer.learn({"change_hu": change, "brain": soft | bone, "bone": bone}, 0, 0.0)
    assert len(shown) == 3
    assert all(torch.equal(one.flip(-1), other) for one, other in zip(shown[0], shown[1]))
    assert torch.equal(shown[0][1], shown[2][1]) and shown[0][1][:, 0, 25, 25].all()


def test_the_rate_rises_and_falls():
    trainer = reading.ReadingTrainer(ReaderConfig(batch=4, warm_up=40, lr=1.0, width=24, depth=1), None, RANGE,
                                     torch.device("cpu"))
    rates = []
    for seen, done in ((0, 0.0), (36, 0.0), (400, 0.5), (400, 1.0)):
        trainer.images_seen = seen
        trainer.set_rates(done)
        rates.append(trainer.optimiser.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 1.0, 0.51, 0.02])


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


def with_meta(run, copy, change):
    """A copy of a run whose meta change(meta) has changed."""
    shutil.copytree(run, copy)
    path = copy / load_snapshot(run).path.name / "meta.json"
    content = json.loads(path.read_text())
    change(content["meta"])
    write_json(path, {key: value for key, value in content.items() if key != "digest"})
    return copy


def with_held_out(run, held_out, copy):
    """A copy of a run that says it held these scans out; None: an older run, which does not say."""
    def change(meta):
        del meta["held_out"]
        if held_out:
            meta["held_out"] = held_out

    return with_meta(run, copy, change)


@pytest.mark.parametrize("held_out", (["another"], None))
def test_a_database_that_holds_out_what_the_encoder_may_have_seen_is_refused(held_out, hiding_run, slices32, tmp_path,
                                                                             capsys):
    assert run(slices32, with_held_out(hiding_run, held_out, tmp_path / "encoder"), tmp_path / "r") == 2
    assert "hold out scans that it has not seen" in capsys.readouterr().err


@pytest.mark.parametrize(("held_out", "told"), ((["another"], True), (["another", "head2"], False), (None, False)))
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
        return {"data": {"digest": digest}} | ({"held_out": held_out} if held_out else {}) | of

    a, older = meta(["one", "three"]), meta(None)
    b = meta(["one", "two"], init=a)
    c = meta(["one", "two", "three"], init=b, gan=older | {"init": meta(["one"], "elsewhere")})
    scans = ["one", "two", "three"]
    assert not_held_out(scans, a) == ["two"] and not_held_out(scans, older) == []
    assert not_held_out(scans, b) == ["three", "two"] and not_held_out(["one"], b) == []
    assert not_held_out(scans, c) == ["three", "two"] and not_held_out(["one", "three"], c) == ["three"]
    d = meta(scans, init=meta(None), gan=meta(["one"], "elsewhere"))
    assert not_held_out(scans, d) == ["three", "two"] and not_held_out(scans, d, elsewhere=False) == []


# ---- In folds

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
    assert "head" not in json.dumps(meta["provenance"])
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


# ---- Of a model, by another hospital's scans

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
    assert known["data"] == theirs["data"] and "head" not in json.dumps(known)
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


# ---- Into a model

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
    assert latent_stats.main([str(flag) for flag in (*flags, "--encoder", hiding_run, "--set", "method=search")]) == 2
    assert "--reader: for method=inpainting or inversion" in capsys.readouterr().err


@pytest.mark.parametrize("change", (lambda meta: meta["config"].update(seed=1),
                                    lambda meta: meta["gan"]["config"].update(seed=1)))
def test_encoders_of_one_database_and_length_are_told_apart(change, reader_run, hiding_run, slices32, tmp_path, capsys):
    """Of an older reader's run, which has no digest: by their settings and their GAN's; what a later version's have
    besides is no difference."""
    def made(encoder, *more):
        return latent_stats.main([str(flag) for flag in ("--data", slices32, "--encoder", encoder, "--out", out,
                                                         "--preset", "ct128", "--reader", without, *more)])

    without, out = with_meta(reader_run, tmp_path / "reader", lambda meta: meta.pop("beside")), tmp_path / "model"
    assert made(with_meta(hiding_run, tmp_path / "other", change)) == 2
    assert "was taught beside other networks" in capsys.readouterr().err and not out.exists()
    older = with_meta(hiding_run, tmp_path / "older", lambda meta: meta["config"].pop("gated"))
    assert made(older, "--calibrate", "none", "--set", "measure=votes", "scan_score=mean") == 0
