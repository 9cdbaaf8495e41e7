"""HealthyGAN end to end: 20 steps at 32 x 32, resume, the choice by AUCp, test, evaluate; what its users get wrong."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import evaluate
from common.weights import SEAL, CheckpointError, write_json
from ct.window import encode
from dataset import DatasetError
from healthygan import sets, train, trivial, weights
from healthygan import test as healthygan_test
from healthygan.data import ImageSettings, read_slices
from healthygan.model import Generator, ModelConfig, Translation
from healthygan.reconstruct import Translator, TranslatorSettings
from healthygan.scoring import aucp, difference, unit_scores
from healthygan.settings import PRESETS
from healthygan.training import Trainer
from healthygan.training_data import load_training
from tests.helpers import GradientRecorder

ROOT = Path(__file__).parent.parent
FOLDERS = {"train/healthy": 12, "train/mixed": 10, "test/healthy": 6, "test/diseased": 5}


@pytest.fixture(scope="module")
def xrays(tmp_path_factory) -> Path:
    """Smooth noise; in half of train/mixed and in all of test/diseased with a bright square."""
    data, rng = tmp_path_factory.mktemp("xrays"), np.random.default_rng(0)
    for folder, count in FOLDERS.items():
        (data / folder).mkdir(parents=True)
        for i in range(count):
            pixels = np.kron(rng.integers(40, 120, (5, 6)), np.ones((8, 8)))
            if folder == "test/diseased" or (folder == "train/mixed" and i % 2):
                pixels[16:28, 16:28] = 250
            Image.fromarray(pixels.astype(np.uint8)).save(data / folder / f"{i:02d}.png")
    return data


@pytest.fixture(scope="module")
def run_train(xrays):
    def run(out: Path, *more: object) -> int:
        flags = ["--preset", "smoke32", "--device", "cpu", "--precision", "fp32", *map(str, more)]
        return train.main(["--data", str(xrays), "--out", str(out), *flags])
    return run


@pytest.fixture(scope="module")
def finished(run_train, tmp_path_factory) -> Path:
    """A run of 20 steps, never interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert run_train(out) == 0
    return out


def rows(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def stats(run: Path) -> dict[int, dict]:
    lines = (run / "stats.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines)}


# ---------------------------------------------------------------------------------------------------------------
# Training

def test_a_run_goes_on_in_its_stream_with_other_batches(tmp_path, run_train, monkeypatch):
    """As with another number of ranks: the images used up were counted as if the batches had always been today's."""
    run_train(tmp_path, "--iterations", 10, "--decay", 0, "--batch", 4)
    starts, real = [], train.batches
    monkeypatch.setattr(train, "batches", lambda part, batch, seed, start, device: (
        starts.append(start), real(part, batch, seed, start, device))[1])
    run_train(tmp_path, "--iterations", 11, "--decay", 0, "--batch", 2)
    run_train(tmp_path, "--iterations", 12, "--decay", 0, "--batch", 2)
    assert starts == [40, 40, 42, 42]


def test_a_run_writes_what_it_promises(finished):
    row = stats(finished)[20]
    assert {"wasserstein", "d_b", "d_y", "penalty", "g_identity", "mask_a", "mask_b", "aucp"} <= row.keys()
    assert (finished / "samples-000010.png").is_file() and (finished / "config.json").is_file()
    grid = Image.open(finished / "samples-000020.png")
    assert grid.size == (6 * 32, 12 * 32)                         # six panels; six of each set


def test_resumed_equals_uninterrupted(finished, run_train, tmp_path):
    run_train(tmp_path, "--iterations", 10, "--decay", 0)  # the rate is constant up to step 15 in both
    assert run_train(tmp_path) == 0
    for name in ("generator", "generator_ema", "critic"):
        whole, resumed = (load_file(run / f"snapshot-00000020/{name}.safetensors") for run in (finished, tmp_path))
        assert whole.keys() == resumed.keys()
        for key in whole:
            torch.testing.assert_close(resumed[key], whole[key], rtol=0, atol=0)
    for step in (15, 20):
        assert stats(tmp_path)[step]["wasserstein"] == stats(finished)[step]["wasserstein"]


@pytest.mark.parametrize("flags", [("--seed", 1), ("--val-fraction", 0.5)])
def test_a_run_does_not_go_on_with_other_images_kept_aside(finished, run_train, tmp_path, capsys, flags):
    shutil.copytree(finished, tmp_path / "run")                   # the threshold would be of images it was trained on
    before = (tmp_path / "run/best/model.json").read_bytes()
    assert run_train(tmp_path / "run", "--iterations", 25, *flags) == 2
    assert "the run there has another d" in capsys.readouterr().err
    assert (tmp_path / "run/best/model.json").read_bytes() == before


def test_the_digest_tells_sets_apart_by_names_pixels_and_what_is_kept_aside(xrays):
    def digest(seed=0, healthy="train/healthy"):
        settings = ImageSettings("images", 32)
        return load_training([xrays / healthy], [xrays / "train/mixed"], settings, 0.25, seed).digest()

    assert digest() == digest() and digest().keys() == {"healthy", "mixed", "held_out"}
    assert digest(seed=1)["held_out"] != digest()["held_out"] and digest(seed=1)["mixed"] == digest()["mixed"]
    assert digest(healthy="test/healthy")["healthy"] != digest()["healthy"]


def test_the_generator_with_the_highest_aucp_is_kept_with_its_threshold(finished, xrays):
    measured = {step: row["aucp"] for step, row in stats(finished).items() if "aucp" in row}
    model = weights.load_model(finished / "best")
    best = max(measured, key=measured.get)
    assert measured.keys() == {10, 20} and model.meta["chosen"]["iteration"] == best
    assert model.meta["chosen"]["aucp"] == pytest.approx(measured[best], abs=1e-4)
    held_out = model.meta["validation_scores"]                    # a quarter of 12
    assert len(held_out) == 3 and model.meta["training"]["counts"]["healthy"]["images"] == 9
    assert np.sum(np.array(held_out) > model.meta["threshold"]) == 0   # 25 % of 3 is none


def test_no_label_or_test_image_can_reach_the_training(run_train, finished, xrays, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(xrays / "train", alone / "train")
    assert train.main(["--data", str(alone), "--out", str(tmp_path / "run"), "--preset", "smoke32", "--device", "cpu",
                       "--precision", "fp32", "--iterations", "10", "--decay", "0"]) == 0
    assert stats(tmp_path / "run")[10]["aucp"] == stats(finished)[10]["aucp"]


def test_no_generator_is_chosen_before_it_can_do_anything(run_train, tmp_path):
    assert run_train(tmp_path, "--choose", 5, "--choose-after", 0.75) == 0
    assert {step for step, row in stats(tmp_path).items() if "aucp" in row} == {5, 10, 15, 20}
    assert weights.load_model(tmp_path / "best").meta["chosen"]["iteration"] >= 15


def test_step_order_and_learning_rate():
    config = dataclasses.replace(PRESETS["smoke32"], precision="fp32")
    trainer = Trainer(config, torch.device("cpu"))
    a, b = torch.rand(2, 4, 3, 32, 32) * 2 - 1
    before = [p.clone() for p in trainer.g.parameters()]
    assert "g_identity" not in trainer.step(a, b)                 # the generator takes every second step only
    assert all(torch.equal(p, q) for p, q in zip(before, trainer.g.parameters()))
    assert "g_identity" in trainer.step(a, b)
    assert not torch.equal(before[0], next(trainer.g.parameters()))
    assert [config.learning_rate(i) for i in (0, 15, 16, 19)] == pytest.approx([1e-4, 1e-4, 8e-5, 2e-5])
    assert dataclasses.replace(config, decay=0).learning_rate(19) == 1e-4
    short = dataclasses.replace(PRESETS["full256"], iterations=5000)        # a part of whatever length there is
    assert [short.learning_rate(i) for i in (0, 3750, 4375)] == pytest.approx([1e-4, 1e-4, 5e-5])


def test_the_masks_weight_rises():
    config = dataclasses.replace(PRESETS["smoke32"], mask=0.2)
    assert config.mask_weight(0) == 0.2
    rising = dataclasses.replace(config, mask_rampup=0.5)
    assert [rising.mask_weight(i) for i in (0, 5, 10, 19)] == pytest.approx([0, 0.1, 0.2, 0.2])
    later = dataclasses.replace(rising, copy_first=10)            # then over half of the 10 that are left
    assert [later.mask_weight(i) for i in (9, 10, 12, 15)] == pytest.approx([0, 0, 0.08, 0.2])
    trainers = [Trainer(dataclasses.replace(c, critic_steps=1, flip=False, precision="fp32"),
                              torch.device("cpu")) for c in (rising, dataclasses.replace(config, mask=0))]
    a, b = torch.rand(2, 4, 3, 32, 32) * 2 - 1
    for trainer in trainers:
        trainer.step(a, b)
    for p, q in zip(*(trainer.g.parameters() for trainer in trainers)):
        assert torch.equal(p, q)


def test_before_all_else_the_translation_learns_to_copy():
    config = dataclasses.replace(PRESETS["smoke32"], precision="fp32", flip=False, copy_first=1, identity=7)
    trainer, other = (Trainer(config, torch.device("cpu")) for _ in range(2))
    a, b = torch.rand(2, 4, 3, 32, 32) * 2 - 1
    assert trainer.step(a, b).keys() == {"g_identity"} and trainer.iteration == 1
    (7 * (b - other.g(b).t).abs().mean()).backward()
    for p, q in zip(trainer.g.parameters(), other.g.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-3 * q.grad.abs().max().item())
    assert all(torch.equal(p, q) for p, q in zip(trainer.d.parameters(), other.d.parameters()))
    assert "wasserstein" in trainer.step(a, b)


def test_at_first_the_critic_sees_the_translation_itself():
    config = dataclasses.replace(PRESETS["smoke32"], precision="fp32", flip=False, critic_steps=1, identity=0,
                                 translate_first=1)
    trainer = Trainer(config, torch.device("cpu"))
    a, b = torch.rand(2, 4, 3, 32, 32) * 2 - 1
    of_a = trainer._translate(a)
    assert torch.equal(of_a.y, of_a.t) and torch.equal(of_a.m, trainer.g(a).m)
    pulls_at_mask = []
    for _ in range(2):                                            # the last layer's fourth channel is the mask
        trainer.step(a, b)
        pulls_at_mask.append(trainer.g.main[-1].weight.grad[3].abs().max().item())
    assert pulls_at_mask[0] == 0 < pulls_at_mask[1]
    assert all(state["step"] == 1 for state in trainer.g_opt.state.values())          # begun anew with the mask
    assert torch.equal(trainer._translate(a).y, trainer.g(a).y)


def test_images_are_moved_by_whole_pixels():
    trainer = Trainer(dataclasses.replace(PRESETS["smoke32"], shift=2), torch.device("cpu"))
    x = torch.rand(4, 3, 32, 32)
    moved, side, moves = trainer._shift(x, "shift a"), torch.arange(32), []
    for before, after in zip(x, moved):
        fits = [(i, j) for i in range(-2, 3) for j in range(-2, 3)
                if torch.equal(after, before[:, (side + i).clamp(0, 31)][:, :, (side + j).clamp(0, 31)])]
        moves += fits
        assert len(fits) == 1
    assert len(set(moves)) > 1
    assert torch.equal(moved, trainer._shift(x, "shift a")) and not torch.equal(moved, trainer._shift(x, "shift b"))


def test_the_generators_gradient_is_that_of_its_loss():
    config = dataclasses.replace(PRESETS["smoke32"], precision="fp32", flip=False, critic_steps=1, mask=0.3)
    trainer, other = (Trainer(config, torch.device("cpu")) for _ in range(2))
    a, b = torch.rand(2, 4, 3, 32, 32) * 2 - 1
    trainer.step(a, b)
    other.d.load_state_dict(trainer.d.state_dict())               # the critic moves first
    of_a, of_b = other.g(a), other.g(b)

    def focus(m):
        return m.mean() ** 2 + (1 / ((m - 0.5).abs() + 0.01)).mean() - 1 / 0.51

    loss = -other.d(of_a.y).mean() - other.d(of_b.y).mean() + (b - of_b.t).abs().mean()
    loss = loss + ((1 - of_a.m) * (a - of_a.t)).abs().mean() + 0.3 * (focus(of_a.m) + focus(of_b.m)) / 2
    loss.backward()
    for p, q in zip(trainer.g.parameters(), other.g.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-3 * q.grad.abs().max().item())


def test_the_critics_gradient_is_that_of_its_loss():
    """It raises D(b) - D(y_a), and pays 10 (|grad D| - 1)^2 between the two."""
    config = dataclasses.replace(PRESETS["smoke32"], precision="fp32", flip=False, critic_steps=2)
    trainer = Trainer(config, torch.device("cpu"))
    trainer.d_opt = GradientRecorder(trainer.d_opt)
    a, b = torch.rand(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = trainer.g(a).y.detach()
    share = trainer._draw("share", lambda g, n: torch.rand(n, generator=g)).reshape(-1, 1, 1, 1)
    trainer.step(a, b)
    mix = (share * b + (1 - share) * y).requires_grad_()
    (slope,) = torch.autograd.grad(trainer.d(mix).sum(), mix, create_graph=True)
    penalty = (slope.square().sum((1, 2, 3)).sqrt() - 1).square().mean()
    loss = trainer.d(y).mean() - trainer.d(b).mean() + 10 * penalty
    expected = torch.autograd.grad(loss, list(trainer.d.parameters()), materialize_grads=True)
    for found, wanted in zip(trainer.d_opt.steps[0], expected):
        torch.testing.assert_close(torch.zeros_like(wanted) if found is None else found, wanted, rtol=0,
                                   atol=1e-3 * max(wanted.abs().max().item(), 1e-3))


def test_the_faithful_preset_is_the_released_one():
    config = PRESETS["faithful"]
    assert (config.size, config.batch, config.iterations, config.lr) == (256, 16, 400_000, 1e-4)
    assert config.decay == 0 and config.ema_iterations == 0 and config.model() == ModelConfig()
    trainer = Trainer(dataclasses.replace(PRESETS["smoke32"], ema_iterations=0), torch.device("cpu"))
    assert trainer.best is trainer.g and trainer.modules().keys() == {"generator", "critic"}


@pytest.mark.parametrize("mean, side, change", [(0.96, "over 0.95", "raise --mask"),
                                                (0.0005, "under 0.001", "lower --mask")])
def test_a_collapsed_mask_is_reported_with_what_to_change(mean, side, change):
    trainer = Trainer(PRESETS["smoke32"], torch.device("cpu"))
    for _ in range(249):
        trainer._watch_mask(torch.tensor(mean))
    assert trainer.collapse() is None                             # 498 iterations
    trainer._watch_mask(torch.tensor(mean))
    assert side in trainer.collapse() and change in trainer.collapse() and "500 iterations" in trainer.collapse()
    trainer._watch_mask(torch.tensor(0.1))
    assert trainer.collapse() is None


def test_a_diverged_run_ends_with_4(run_train, tmp_path, capsys):
    assert run_train(tmp_path, "--lr", "1e30", "--ema-iterations", 0) == 4
    assert "diverged" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------
# Test

@pytest.fixture(scope="module")
def scored(finished, xrays, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("results")
    assert healthygan_test.main(["--data", str(xrays), "--model", str(finished), "--out", str(out), "--device", "cpu",
                                 "--precision", "fp32"]) == 0
    return out


def test_scores_are_the_mean_difference_and_evaluate_reads_them(scored, finished, xrays):
    table = rows(scored / "scores.csv")
    assert len(table) == 11 and [float(r["score"]) for r in table] == sorted(float(r["score"]) for r in table)[::-1]
    assert {r["scan_id"]: r["label"] for r in rows(scored / "labels.csv")}["diseased/00"] == "1"
    model = weights.load_model(finished / "best")
    for row in table:
        stored = np.asarray(Image.open(scored / f"maps/{row['scan_id']}.png")) / 65535
        assert stored.mean() == pytest.approx(float(row["score"]), abs=1e-5)
        assert row["flagged"] == str(int(float(row["score"]) > model.meta["threshold"]))
        assert 0 <= float(row["percentile"]) <= 75                # of 3 healthy: at most 3 / 4
        assert Image.open(scored / f"overlays/{row['scan_id']}.png").size == (192, 32)
    out = scored / "metrics"
    assert evaluate.main([str(scored / "scores.csv"), str(scored / "labels.csv"), "--out", str(out)]) == 0
    figures = json.loads((out / "metrics.json").read_text())["scan"]
    assert (figures["abnormal"], figures["normal"]) == (5, 6)


def test_a_second_run_leaves_nothing_of_the_first_ones_data(finished, xrays, tmp_path):
    out, own = tmp_path / "out", ["maps/mine.png", "overlays/healthy/notes.txt", "metrics.json", "x/maps/y.png"]
    flags = ["--model", str(finished), "--out", str(out), "--device", "cpu", "--precision", "fp32"]
    assert healthygan_test.main(["--data", str(xrays), *flags]) == 0
    for name in own:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch()
    (out / "slices.csv").write_text("scan_id,slice,score\nhead,0,0.5\n")
    assert healthygan_test.main(["--data", str(xrays / "train/mixed"), *flags]) == 0
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    pictures = {f"{kind}/mixed/{i:02d}.png" for kind in ("maps", "overlays") for i in range(10)}
    assert found == {"scores.csv", "run.json", *own, *pictures} and not (out / "maps/healthy").exists()


def test_a_run_that_is_killed_leaves_no_scores_beside_other_maps(finished, xrays, tmp_path, monkeypatch):
    """The scores of the data before stood beside the maps of these."""
    flags = ["--model", str(finished), "--out", str(tmp_path), "--device", "cpu", "--precision", "fp32"]
    assert healthygan_test.main(["--data", str(xrays), *flags]) == 0
    monkeypatch.setattr(healthygan_test, "score_rows", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert healthygan_test.main(["--data", str(xrays / "train/mixed"), *flags]) == 130
    assert {path.name for path in tmp_path.iterdir()} == {"maps", "overlays"}


@pytest.mark.parametrize("name, text", [
    ("labels.csv", "scan_id,label,types\nhealthy/0,0,\n"), ("labels.csv", "scan_id,label\nfolder/0,0\n"),
    ("labels.csv", "scan_id,label\nhealthy/0,1\n"), ("labels.csv", "scan_id,label\nhealthy/0,2\n"),
    ("labels.csv", "no table"), ("slices.csv", "scan_id,slice,score,position_mm\nhead,0,0.5,0\n")])
def test_tables_that_are_not_its_own_stay(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    healthygan_test.clear(tmp_path)
    assert (tmp_path / name).read_text() == text


def test_unreadable_images_are_rows_and_exit_3(finished, xrays, tmp_path, capsys):
    shutil.copytree(xrays / "test/healthy", tmp_path / "folder")
    (tmp_path / "folder/bad.png").write_bytes(b"no image")
    out = tmp_path / "out"
    assert healthygan_test.main(["--data", str(tmp_path / "folder"), "--model", str(finished), "--out", str(out)]) == 3
    last = rows(out / "scores.csv")[-1]
    assert (last["scan_id"], last["status"]) == ("folder/bad", "failed") and last["reason"]
    assert not (out / "labels.csv").exists() and "skipped: folder/bad" in capsys.readouterr().err


def test_white_of_16_bit_images_can_be_named(finished, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32))
    stored = {"eight": pixels.astype(np.uint8), "twelve": (pixels * 16).astype(np.uint16)}
    for name, scaled in stored.items():
        (tmp_path / name).mkdir()
        Image.fromarray(scaled).save(tmp_path / name / "x.png")
        more = ["--white-16bit", "4080"] if name == "twelve" else []
        assert healthygan_test.main(["--data", str(tmp_path / name), "--model", str(finished), "--device", "cpu",
                                     "--precision", "fp32", "--out", str(tmp_path / f"{name}-out"), *more]) == 0
    eight, twelve = (float(rows(tmp_path / f"{name}-out/scores.csv")[0]["score"]) for name in ("eight", "twelve"))
    assert twelve == pytest.approx(eight, rel=1e-5)


def test_slices_are_scored_by_scan(slices32, tmp_path):
    listed = tmp_path / "mixed.txt"
    listed.write_text("head1\n")
    run, out = tmp_path / "run", tmp_path / "out"
    assert train.main(["--healthy", str(slices32), "--mixed", str(slices32), "--mixed-scans", str(listed), "--out",
                       str(run), "--preset", "smoke32", "--device", "cpu", "--iterations", "2"]) == 0
    assert healthygan_test.main(["--data", str(slices32), "--model", str(run), "--out", str(out)]) == 0
    slices = rows(out / "slices.csv")
    for row in rows(out / "scores.csv"):
        own = [float(s["score"]) for s in slices if s["scan_id"] == row["scan_id"]]
        assert len(own) == int(row["slices"]) == 8 and float(row["score"]) == pytest.approx(np.mean(own), rel=1e-4)


def test_slices_are_shrunk_by_a_whole_factor(slices32):
    whole, half = (read_slices(slices32, "all", ImageSettings("slices", size)) for size in (32, 16))
    first = whole.pixels[3, 0, :2, 16:18].astype(float).mean()
    assert half.pixels.shape[1:] == (1, 16, 16) and abs(half.pixels[3, 0, 0, 8] - first) <= 0.5
    with pytest.raises(DatasetError, match="cannot be shrunk by a whole factor to the network's 24"):
        read_slices(slices32, "all", ImageSettings("slices", 24))


def test_what_a_shrunk_slice_changes_by_is_added_to_the_whole_one():
    """A generator that draws 30 HU everywhere: 50 HU become 30; 90 HU, of which it sees 70, 90 + 30 - 70."""
    class Flat(Generator):
        def forward(self, x):
            y = encode(torch.full_like(x[:, 0], 30.0))
            return Translation(y, torch.ones_like(x[:, :1]), y)

    translator = Translator(TranslatorSettings(), Flat(4, 1), ModelConfig(size=64), 128, (0.0, 70.0), "cpu")
    hu = torch.full((2, 128, 128), 50.0)
    hu[1] = 90
    found = translator.closest_normal(hu, torch.ones_like(hu, dtype=torch.bool), np.array([20.0, 25.0]))
    torch.testing.assert_close(found.query_hu, hu, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.normal_hu[0], torch.full((128, 128), 30.0), rtol=0, atol=1e-3)
    torch.testing.assert_close(found.normal_hu[1], torch.full((128, 128), 50.0), rtol=0, atol=1e-3)


def test_a_generator_that_changes_nothing_changes_nothing_beyond_its_windows_either():
    class Same(Generator):
        def forward(self, x):
            return Translation(x, torch.zeros_like(x[:, :1]), x)

    translator = Translator(TranslatorSettings(), Same(4, 1), ModelConfig(size=64), 64, (-100.0, 300.0), "cpu")
    hu = torch.full((1, 64, 64), 30.0)
    hu[0, 5:9], hu[0, 20:24] = 250, -80
    found = translator.closest_normal(hu, torch.ones_like(hu, dtype=torch.bool), np.array([50.0]))
    torch.testing.assert_close(found.normal_hu, found.query_hu, rtol=0, atol=1e-3)


def test_released_weights_can_be_tested(xrays, tmp_path):
    state = Generator().state_dict()
    state |= {"main.1.running_mean": torch.zeros(64), "main.1.num_batches_tracked": torch.tensor(3)}
    torch.save(state, tmp_path / "360000-G.ckpt")
    model = weights.find_model(tmp_path / "360000-G.ckpt")
    assert model.settings.size == 256 and not model.generator.training
    torch.save({**state, "main.0.weight": torch.zeros(3)}, tmp_path / "bad-G.ckpt")
    with pytest.raises(CheckpointError, match=r"main.0.weight is \[3\], expected \[64, 3, 7, 7\]"):
        weights.find_model(tmp_path / "bad-G.ckpt")
    torch.save({**state, "main.0.weight": 3}, tmp_path / "odd-G.ckpt")
    with pytest.raises(CheckpointError, match="found a int at 'main.0.weight', no tensor"):
        weights.find_model(tmp_path / "odd-G.ckpt")
    (tmp_path / "text-G.ckpt").write_text("hello")
    with pytest.raises(CheckpointError, match="text-G.ckpt: cannot be read as a state dict"):
        weights.find_model(tmp_path / "text-G.ckpt")


def test_released_weights_can_be_shipped(tmp_path):
    """Their model.json did not say what network it is, and so could not be read."""
    torch.manual_seed(0)
    released = Generator()
    torch.save(released.state_dict(), tmp_path / "360000-G.ckpt")
    assert weights.main([str(tmp_path / "360000-G.ckpt"), "--out", str(tmp_path / "model")]) == 0
    shipped = weights.find_model(tmp_path / "model")
    assert shipped.settings == weights.find_model(tmp_path / "360000-G.ckpt").settings
    torch.testing.assert_close(shipped.generator.main[0].weight, released.main[0].weight, atol=1e-3, rtol=0)


def test_a_shipped_model_is_half_precision_and_scores_alike(finished, tmp_path):
    assert weights.main([str(finished), "--out", str(tmp_path / "model"), "--note", "source=synthetic"]) == 0
    whole, shipped = weights.load_model(finished / "best"), weights.load_model(tmp_path / "model")
    assert shipped.meta["provenance"]["source"] == "synthetic" and shipped.meta["threshold"] == whole.meta["threshold"]
    assert all(t.dtype == torch.float16 for t in load_file(tmp_path / "model/generator.safetensors").values())
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(shipped.generator(x).y, whole.generator(x).y, atol=0.01, rtol=0)
    with open(tmp_path / "model/generator.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(CheckpointError, match="not the file that .*model.json was written for"):
        weights.load_model(tmp_path / "model")


def test_scores_by_hand():
    x = torch.zeros(1, 3, 1, 2)
    y = torch.tensor([[[[1.0, 0.0]], [[-1.0, 0.0]], [[0.0, 0.6]]]])
    torch.testing.assert_close(difference(x, y), torch.tensor([[[1 / 3, 0.1]]]))
    assert unit_scores([1, 2, 6], ["b", "a", "b"]) == {"b": 3.5, "a": 2}
    assert aucp(np.array([0.3, 0.1]), np.array([0.2, 0.1])) == 0.625


def test_trivial_baselines_find_a_bright_square(xrays, capsys):
    (first, logistic, _), (_, ridge, _), (third, pca, _), *larger = trivial.baselines(xrays, 2)
    assert first.endswith("8x8, C = 1") and third.startswith("PCA") and len(larger) == 2
    assert logistic == 1 and ridge == 1 and pca > 0.5
    assert trivial.main(["--data", str(xrays / "train")]) == 2
    assert "diseased" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------
# What users get wrong

@pytest.mark.parametrize("flags, message", [
    (["--data", "nowhere"], "nowhere/healthy: no such folder"),
    (["--healthy", "a"], "give --data FOLDER, or --healthy and --mixed"),
    (["--healthy", "a", "--mixed", "b"], "a: no such file or folder"),
    ([], "give --data FOLDER"),
])
def test_train_names_what_is_missing(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main([*flags, "--preset", "smoke32"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--batch=0", "--size=30", "--critic-layers=7", "--val-fraction=1",
                                  "--white-16bit=0", "--copy-first=20", "--mask-rampup=1", "--translate-first=-1",
                                  "--indecision=-1", "--shift=-1", "--fpr=5", "--fpr=nan", "--lr=nan", "--penalty=-1",
                                  "--identity=nan", "--indecision=nan", "--decay=2", "--ema-iterations=-1",
                                  "--translate-first=20", "--reconstruction=-1", "--mask=inf", "--seed=-1",
                                  "--shift=32", "--critic-steps=21", "--copy-first=18 --critic-steps=3"])
def test_train_refuses_values_that_cannot_be_meant(flag, xrays, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--data", str(xrays), "--preset", "smoke32", *flag.split()])
    assert stop.value.code == 2 and flag.split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("copy_first, rampup, half_life", [(4, 0, 8), (0, 0, 8), (4, 0.5, None)])
def test_the_average_forgets_half_in_its_half_life_of_iterations(copy_first, rampup, half_life):
    """While it copies, too, where the generator takes a step at each: it forgot critic_steps times as fast."""
    config = dataclasses.replace(PRESETS["smoke32"], copy_first=copy_first, ema_iterations=8, ema_rampup=rampup,
                                 precision="fp32", batch=1)
    trainer = Trainer(config, torch.device("cpu"))
    kept = 1.0
    lerp, torch_lerp = [], torch._foreach_lerp_
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_foreach_lerp_", lambda *given: lerp.append(1 - given[-1]) or torch_lerp(*given))
        for _ in range(4):
            trainer.step(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32))
    for i, share in enumerate(lerp):
        kept *= share
        assert half_life or share == pytest.approx(0.5 ** (1 / (0.5 * (i + 1))))
    if half_life:
        assert kept == pytest.approx(0.5 ** (4 / half_life))


@pytest.mark.parametrize("flags, message", [
    (["--above", "nan"], "--above must be a number, got nan"), (["--bright", "-1"], "--bright must be a number of"),
    (["--bright", "inf"], "--bright must be a number of"), (["--seed", "-1"], "--seed must be a number of at least 0")])
def test_sets_by_what_is_no_number_are_refused(flags, message, capsys):
    """No pixel is above NaN: every half passed for the better one."""
    with pytest.raises(SystemExit) as stop:
        sets.main(["halves", "--data", "a", "--mixed", "b", "--healthy", "c", *flags])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_pca_of_no_components_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        trivial.main(["--data", "x", "--components", "0"])
    assert stop.value.code == 2 and "--components must be at least 1" in capsys.readouterr().err


def test_test_names_what_is_wrong(finished, xrays, slices32, tmp_path, capsys):
    def error(data, model):
        assert healthygan_test.main(["--data", str(data), "--model", str(model), "--out", str(tmp_path)]) == 2
        return capsys.readouterr().err

    assert "no such file or folder" in error(xrays, tmp_path / "nothing")
    assert "give a folder that healthygan.train has written" in error(xrays, tmp_path)
    assert "holds slices, but the model was trained on images" in error(slices32, finished)
    for name in ("healthy", "diseased"):
        (tmp_path / "half/test" / name).mkdir(parents=True)
    assert "no images in it" in error(tmp_path / "half", finished)
    (tmp_path / "half/test/diseased").rmdir()
    shutil.copytree(xrays / "test/healthy", tmp_path / "half/test/healthy", dirs_exist_ok=True)
    assert "diseased: no such folder" in error(tmp_path / "half", finished)


def test_a_run_with_other_data_is_not_gone_on_with(finished, slices32, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train.main(["--healthy", str(slices32), "--mixed", str(slices32), "--out", str(copy), "--preset",
                           "smoke32", "--device", "cpu"]) == 2
    assert "the run there has another data" in capsys.readouterr().err


def test_a_run_of_an_older_version_with_other_settings_is_not_gone_on_with(finished, run_train, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for folder in tmp_path.glob("snapshot-*"):
        content = json.loads((folder / "meta.json").read_text())
        content["meta"]["config"]["decay_iterations"] = 5
        write_json(folder / "meta.json", {key: value for key, value in content.items() if key != SEAL})
    assert run_train(tmp_path) == 2
    assert "older version, with settings that this one does not know (decay_iterations)" in capsys.readouterr().err


def test_a_run_that_does_not_tell_what_it_kept_aside_is_not_gone_on_with(finished, run_train, tmp_path, capsys):
    """With another --seed it went on, and its threshold was of images that it had been trained on."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for folder in tmp_path.glob("snapshot-*"):
        content = json.loads((folder / "meta.json").read_text())
        del content["meta"]["digest"]
        write_json(folder / "meta.json", {key: value for key, value in content.items() if key != SEAL})
    assert run_train(tmp_path, "--iterations", 25, "--seed", 1) == 2
    assert "older version and does not tell its digest" in capsys.readouterr().err


def test_the_script_leaves_no_metrics_of_other_data(tmp_path):
    script, results = tmp_path / "healthygan/test_covid.sh", tmp_path / "healthygan/results/covid"
    python = tmp_path / ".venv/bin/python"                        # tests nothing, writes nothing
    for folder in (results / "metrics", python.parent):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "healthygan/test_covid.sh", script)
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    for name in ("labels.csv", "metrics/metrics.json", "notes.txt"):
        (results / name).touch()
    subprocess.run(["bash", str(script), "a folder without classes"], check=True, timeout=60)
    assert [path.name for path in results.iterdir()] == ["notes.txt"]


def test_scripts_run_from_their_folder():
    folder = ROOT / "healthygan"
    usage = subprocess.run(["bash", "test_covid_pretrained.sh"], cwd=folder, capture_output=True, text=True)
    assert usage.returncode == 2 and "name a folder of chest X-rays" in usage.stderr
    dry = subprocess.run(["bash", "train_covid.sh", "datasets/covid", "--dry-run", "--preset", "cpu128"], cwd=folder,
                         capture_output=True, text=True)
    assert dry.returncode == 0 and json.loads(dry.stdout)["size"] == 128
