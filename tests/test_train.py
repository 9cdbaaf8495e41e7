"""train.py: to the end, over an interruption without a trace, and the same step however it is divided."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import distributed
import train
from gan import loop, training
from gan.settings import EncoderConfig, ReaderConfig
from gan.snapshots import load_snapshot, snapshot_steps
from gan.training import lazy_adam
from healthygan.settings import TrainConfig as HealthyConfig
from tests.helpers import GradientRecorder, assert_identical, without_clock

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def half_run(train_gan, tmp_path_factory) -> Path:
    """The first half of gan_run."""
    out = tmp_path_factory.mktemp("runs") / "half"
    assert train_gan(out, "--kimg", 0.016) == 0
    return out


@pytest.fixture
def half(half_run, tmp_path) -> Path:
    return Path(shutil.copytree(half_run, tmp_path / "run"))


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]


# ---- A run

def test_a_run_leaves_what_it_promises(gan_run):
    assert snapshot_steps(gan_run) == [16, 32]
    every = {"step", "loss_d", "real", "fake", "real_sign", "r1", "loss_g", "path_length", "ada_p", "r_t", "seconds",
             "memory_gb", "img_per_s", "s_per_kimg"}
    stats = rows(gan_run)
    assert [row["step"] for row in stats] == [8, 16, 24, 32]
    assert [set(row) for row in stats] == [every, every, every, every | {"swd"}]
    assert stats[-1]["ada_p"] > 0 and stats[-1]["swd"] > 0 and stats[-1]["memory_gb"] > 0
    config = json.loads((gan_run / "config.json").read_text())
    assert config["kind"] == "gan" and config["config"]["r1_every"] == 2 and config["model"]["size"] == 32
    assert config["data"]["counts"]["train"]["slices"] == 16
    grid = np.asarray(Image.open(gan_run / "samples-000000.png"))
    assert grid.shape[:2] == (4 * 32, 8 * 32) and grid.std() > 0
    assert (gan_run / "real.png").is_file()


def test_training_changes_what_it_should(gan_run):
    networks = ("generator", "generator_ema", "discriminator")
    first, last = ({name: load_file(gan_run / f"snapshot-{step:08}/{name}.safetensors") for name in networks}
                   for step in (16, 32))
    for network in networks:
        assert not torch.equal(next(iter(first[network].values())), next(iter(last[network].values())))
    for i in range(7):
        name = f"noises.noise_{i}"                     # released defect: the averaged copy had noise of its own
        assert torch.equal(last["generator"][name], last["generator_ema"][name])
        assert torch.equal(last["generator"][name], first["generator"][name])


def test_a_run_that_is_over_says_so_and_which_settings_are_others(train_gan, gan_run, tmp_path, capsys):
    run = shutil.copytree(gan_run, tmp_path / "run")
    assert train_gan(run, "--seed", 3, "--lr", 0.5) == 0
    assert (run / "config.json").read_bytes() == (gan_run / "config.json").read_bytes()  # nothing was trained so
    said = capsys.readouterr().out
    assert "Resuming at 0.032 kimg: the training is over\n" in said
    before = load_snapshot(run).meta["config"]
    assert f"goes on with other settings: config.lr {before['lr']}, now 0.5; config.seed 0, now 3\n" in said
    assert train_gan(shutil.copytree(gan_run, tmp_path / "same")) == 0
    assert "other settings" not in capsys.readouterr().out


def test_a_file_in_place_of_the_run_is_named(train_gan, tmp_path, capsys):
    (tmp_path / "healthy.lmdb").write_bytes(b"slices")
    assert train_gan(tmp_path / "healthy.lmdb") == 2
    said = capsys.readouterr().err
    assert said == f"error: --out {tmp_path / 'healthy.lmdb'}: cannot be made a folder (File exists); choose another\n"
    assert (tmp_path / "healthy.lmdb").read_bytes() == b"slices"


def test_a_resumed_run_is_bit_identical(train_gan, gan_run, half):
    """Random noise maps, augmentation, sampler, optimisers and running means all go on where they were."""
    assert train_gan(half) == 0
    whole, resumed = (load_snapshot(run) for run in (gan_run, half))
    assert_identical(whole.weights, resumed.weights)
    assert_identical(without_clock(whole.state), without_clock(resumed.state))
    assert without_clock(rows(gan_run)[-1]) == without_clock(rows(half)[-1])


def test_config_json_tells_what_the_last_snapshot_was_trained_with(train_gan, half):
    assert train_gan(half, "--lr", 0.003) == 0
    assert json.loads((half / "config.json").read_text()) == load_snapshot(half).meta
    assert load_snapshot(half).meta["config"]["lr"] == 0.003


def test_a_finished_run_has_nothing_to_do(train_gan, half):
    before = rows(half)
    assert train_gan(half, "--kimg", 0.016) == 0
    assert rows(half) == before


def test_the_best_snapshot_is_kept_besides_the_last_two(train_gan, tmp_path, monkeypatch):
    distances = iter((2.0, 1.0, 4.0, 5.0, 3.0, 6.0, 7.0, 8.0))
    monkeypatch.setattr(loop, "sliced_wasserstein", lambda *_: next(distances))
    assert train_gan(tmp_path, "--tick-kimg", 0.004, "--grid-kimg", 0.004, "--snapshot-kimg", 0.004) == 0
    assert snapshot_steps(tmp_path) == [8, 28, 32]


def test_samples_are_measured_when_asked_whenever_rows_are_written(train_gan, tmp_path):
    """Only where a row was due as well: of 20 and 32, at the end alone."""
    assert train_gan(tmp_path, "--tick-kimg", 0.012, "--grid-kimg", 0.02) == 0
    assert [(row["step"], "swd" in row) for row in rows(tmp_path)] == [(12, False), (20, True), (24, False), (32, True)]


@pytest.mark.parametrize("flags, noticed", [((), 24), (("--tick-kimg", 1, "--snapshot-kimg", 0.004), 20)])
def test_divergence_exits_4_and_keeps_the_last_good_snapshot(train_gan, half, flags, noticed, capsys):
    """At a tick by the losses, at a snapshot between ticks by the weights.

    The learning rate of the flags holds for a resumed run too, not that of the saved optimiser.
    """
    assert train_gan(half, "--lr", 1e30, *flags) == 4
    assert f"diverged at step {noticed}" in capsys.readouterr().err
    snapshot = load_snapshot(half)
    assert snapshot.step == 16
    assert all(torch.isfinite(t).all() for network in snapshot.weights.values() for t in network.values())


@pytest.mark.parametrize("flags, message", [
    (("--size", 64), "holds 32x32 slices but --size is 64"),
    (("--style-dim", 16), "has another model"),
    (("--data", "absent.lmdb"), "absent.lmdb: no such file"),
    (("--device", "tpu"), "--device tpu"),
])
def test_what_cannot_be_trained_exits_2(train_gan, half, flags, message, capsys):
    assert train_gan(half, *flags) == 2
    assert message in capsys.readouterr().err


def test_a_batch_that_does_not_divide_exits_2(train_gan, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        train_gan(tmp_path, "--accumulate", 3)
    assert end.value.code == 2 and "--batch 4 must be divisible by --accumulate 3" in capsys.readouterr().err


# ---- A step

def one_step(config: train.TrainConfig) -> dict:
    """Weights and scalars after step 0 on this rank's share of eight fixed images.

    Plain gradient descent: Adam's first step is the gradient's sign, which rounding decides where it is near zero.
    """
    trainer = training.Trainer(config, CPU)
    for name in ("g", "d"):
        setattr(trainer, f"{name}_opt", torch.optim.SGD(getattr(trainer, name).parameters(), lr=0.01))
    real = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    stats = trainer.step(real[trainer.rank::trainer.world], 0)
    return {"weights": {name: net.state_dict() for name, net in trainer.modules().items()},
            "path_mean": trainer.path_mean, "stats": distributed.reduce_mean(stats)}


def rank_step(rank: int, port: int, config: train.TrainConfig, out: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    torch.set_num_threads(1)
    distributed.init(CPU, timeout_minutes=5)
    torch.save(one_step(config), f"{out}/{rank}.pt")
    distributed.barrier()
    distributed.cleanup()
    os._exit(0)              # torch's threads now and then abort a process on its way out; the step is what is tested


def assert_same_step(ours: dict, reference: dict) -> None:
    torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)
    assert set(ours["stats"]) == {"loss_d", "real", "fake", "real_sign", "r1", "loss_g", "path_length"}


@pytest.fixture(scope="module")
def whole_step(tiny_gan_config) -> dict:
    return one_step(tiny_gan_config)


def test_two_ranks_take_the_step_of_one(tiny_gan_config, whole_step, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(rank_step, (port, dataclasses.replace(tiny_gan_config, batch=4), str(tmp_path)), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert_identical(*results)
    assert_same_step(results[0], whole_step)


def test_accumulated_micro_batches_take_the_step_of_one_batch(tiny_gan_config, whole_step):
    assert_same_step(one_step(dataclasses.replace(tiny_gan_config, accumulate=2)), whole_step)


def test_that_step_depends_on_every_phase(tiny_gan_config, whole_step):
    """Or the two tests above would prove little."""
    for phase, network in ((dict(r1_every=0), "discriminator"), (dict(path_every=0), "generator"),
                           (dict(flip=False), "discriminator"), (dict(mixing=0.0), "generator")):
        other = one_step(dataclasses.replace(tiny_gan_config, **phase))["weights"][network]
        largest = max((t - whole_step["weights"][network][name]).abs().max() for name, t in other.items())
        assert largest > 1e-4, phase


@pytest.mark.parametrize("rampup, half_life", [(0.0, 10.0), (0.05, 0.4)])
def test_the_averaged_generator_follows_its_formula(tiny_gan_config, rampup, half_life):
    """Half-life 10 images, or 5 % of the 8 images seen."""
    config = dataclasses.replace(tiny_gan_config, ema_kimg=0.01, ema_rampup=rampup, r1_every=0, path_every=0)
    trainer = training.Trainer(config, CPU)
    before = trainer.g_ema.conv1.conv.weight.clone()
    trainer.step(torch.zeros(8, 3, 32, 32), 0)
    after, keep = trainer.g.conv1.conv.weight, 0.5 ** (8 / half_life)
    assert (after - before).abs().max() > 1e-4
    torch.testing.assert_close(trainer.g_ema.conv1.conv.weight, keep * before + (1 - keep) * after, atol=1e-6, rtol=0)


def test_adam_is_corrected_for_the_regulariser():
    optimiser = lazy_adam(torch.nn.Linear(1, 1), lr=0.002, every=4)
    assert optimiser.defaults["lr"] == pytest.approx(0.0016)
    assert optimiser.defaults["betas"] == (0.0, pytest.approx(0.99**0.8))
    assert lazy_adam(torch.nn.Linear(1, 1), lr=0.002, every=0).defaults["betas"] == (0.0, 0.99)


# ---- Random numbers, and the size of a batch

def streams(trainer: training.Trainer) -> tuple[tuple, tuple]:
    """The next of augmentation's numbers and of the noise maps'."""
    return tuple(torch.rand(4, generator=trainer.rng).tolist()), tuple(torch.rand(4).tolist())


def test_noise_maps_and_augmentation_draw_apart(tiny_gan_config):
    """On a CPU both drew the same numbers."""
    augmentation, noise = streams(training.Trainer(tiny_gan_config, CPU))
    assert not set(augmentation) & set(noise)


@pytest.mark.parametrize("other", ["ranks", "device"])
def test_other_ranks_or_another_device_draw_other_numbers(tiny_gan_config, other):
    """They drew those of the run's first steps again; the same ranks go on as they were."""
    def going_on(images: int, changed: bool, seed: int = 0) -> tuple[tuple, tuple]:
        trainer = training.Trainer(dataclasses.replace(tiny_gan_config, seed=seed), CPU)
        (rng, default, none), = (state := trainer.state())["rng"]
        there = {"ranks": [(rng, default, none)] * 2, "device": [(rng, default, rng)]}[other]     # as of a GPU
        streams(trainer)
        trainer.load_state(state | {"images_seen": images, "rng": there if changed else state["rng"]})
        return streams(trainer)

    first = streams(training.Trainer(tiny_gan_config, CPU))
    assert going_on(16, changed=False) == first
    found = [first, going_on(16, True), going_on(24, True), going_on(16, True, seed=1)]
    assert len({stream for both in found for stream in both}) == 8
    assert going_on(16, True) == found[1]


@pytest.mark.parametrize("batch, accumulate, told", [
    (5, 1, "compares none: its minibatch statistic is off"), (2, 1, "compares 2 at a time, not 4"),
    (6, 1, "compares 3 at a time, not 4"), (8, 1, None), (8, 2, None)])
def test_a_batch_that_is_not_compared_4_at_a_time_is_told_of(tiny_gan_config, batch, accumulate, told, capsys):
    training.Trainer(dataclasses.replace(tiny_gan_config, batch=batch, accumulate=accumulate), CPU)
    said = capsys.readouterr().out
    assert said == (f"note: --batch {batch}: the discriminator {told}; give a multiple of 4, or the training is "
                    "another\n" if told else "")


# ---- What each phase weighs

def recorded_step(config: train.TrainConfig, index: int = 0, **changes) -> tuple[training.Trainer, dict]:
    """A step on eight fixed images of a trainer whose optimisers record gradients; without flips."""
    trainer = training.Trainer(dataclasses.replace(config, flip=False, **changes), CPU)
    trainer.d_opt, trainer.g_opt = GradientRecorder(trainer.d_opt), GradientRecorder(trainer.g_opt)
    return trainer, trainer.step(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(5)), index)


def test_r1_weighs_half_gamma_times_its_interval(tiny_gan_config):
    """L = gamma / 2 * E |grad D(x)|^2, taken every 16 steps and 16 times as strong (Karras 2020, B)."""
    trainer, stats = recorded_step(tiny_gan_config, r1_gamma=6.0, r1_every=16)
    main, regularised = trainer.d_opt.steps
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(5)).requires_grad_()
    (slope,) = torch.autograd.grad(trainer.d(x).sum(), x, create_graph=True)
    r1 = slope.square().sum((1, 2, 3)).mean()
    expected = torch.autograd.grad(6.0 / 2 * 16 * r1, list(trainer.d.parameters()), materialize_grads=True)
    assert stats["r1"].item() == pytest.approx(r1.item(), rel=1e-5)
    assert max(g.abs().max() for g in expected) > 1e-2
    for found, wanted in zip(regularised, expected):
        torch.testing.assert_close(torch.zeros_like(wanted) if found is None else found, wanted, rtol=1e-4, atol=1e-6)


def test_path_length_weighs_its_interval_too(tiny_gan_config):
    """L = weight * (|J^T y| - a)^2, taken every 4 steps and 4 times as strong."""
    once, stats = recorded_step(tiny_gan_config, path_weight=1.0, path_every=1)
    lazy, _ = recorded_step(tiny_gan_config, path_weight=2.0, path_every=4)
    moved = [(one, eight) for one, eight in zip(once.g_opt.steps[1], lazy.g_opt.steps[1]) if one is not None]
    for one, eight in moved:
        torch.testing.assert_close(8 * one, eight, rtol=1e-4, atol=1e-7)
    assert max(one.abs().max() for one, _ in moved) > 1e-4
    assert once.path_mean.item() == pytest.approx(0.01 * stats["path_length"].item())     # from 0, by path_decay
    # Of one row, the penalty is told by the length itself.
    loss, scalars = lazy.g_reg(torch.zeros(2, 3, 32, 32), slice(0, 2), "g_reg")
    away = scalars["path_length"] - lazy.path_mean
    assert loss.item() == pytest.approx(8 * away.item() ** 2, rel=1e-4)


def test_path_lengths_are_taken_of_a_part_of_the_batch(tiny_gan_config, monkeypatch):
    sizes, original = [], training.path_lengths
    monkeypatch.setattr(training, "path_lengths", lambda x, *rest: sizes.append(len(x)) or original(x, *rest))
    recorded_step(tiny_gan_config, path_shrink=4)
    assert sizes == [2]


def test_generator_and_discriminator_pull_apart(tiny_gan_config):
    """The main phases by hand: D raises real and lowers fake logits, G raises fake ones; no regulariser at index 1."""
    trainer, stats = recorded_step(tiny_gan_config, index=1)
    assert len(trainer.d_opt.steps) == len(trainer.g_opt.steps) == 1
    real = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        trainer.images_seen = 0                                  # the same draws again
        fake = trainer.g.synthesis(trainer._w_plus(slice(None), "d"), "const")
    loss = F.softplus(-trainer.d(real)).mean() + F.softplus(trainer.d(fake)).mean()
    expected = torch.autograd.grad(loss, list(trainer.d.parameters()), materialize_grads=True)
    assert stats["loss_d"].item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(trainer.d_opt.steps[0], list(expected), rtol=1e-4, atol=1e-6)
    fake = trainer.g.synthesis(trainer._w_plus(slice(None), "g"), "const")
    loss = F.softplus(-trainer.d(fake)).mean()
    expected = torch.autograd.grad(loss, list(trainer.g.parameters()), materialize_grads=True)
    assert stats["loss_g"].item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(trainer.g_opt.steps[0], list(expected), rtol=1e-4, atol=1e-6)


def test_real_and_fake_images_are_augmented_alike(tiny_gan_config, monkeypatch):
    """In every phase that looks through the discriminator, or it would tell them apart by the augmentation."""
    trainer = training.Trainer(tiny_gan_config, CPU)
    seen, discriminate = [], trainer.d.forward
    monkeypatch.setattr(trainer, "_augment", lambda images: images * 0 + 0.25)
    monkeypatch.setattr(trainer.d, "forward", lambda images: seen.append(images.unique().tolist())
                        or discriminate(images))
    trainer.step(torch.zeros(8, 3, 32, 32), 0)
    assert seen == [[0.25]] * 4                                  # real and fake, R1, generator


def test_styles_are_mixed_as_often_as_told(tiny_gan_config):
    def mixed(probability: float) -> float:
        """Part of the codes whose last layer is not the first one's."""
        trainer = training.Trainer(dataclasses.replace(tiny_gan_config, mixing=probability), CPU)
        w_plus = trainer._w_plus(slice(None), "g")
        return (w_plus[:, 0] != w_plus[:, -1]).any(1).float().mean().item()
    assert (mixed(0.0), mixed(1.0)) == (0.0, 1.0)


def test_half_of_the_images_are_mixed_from_any_layer_on_but_the_first(tiny_gan_config):
    trainer = training.Trainer(dataclasses.replace(tiny_gan_config, mixing=0.5, batch=400), CPU)
    w_plus, layers = trainer._w_plus(slice(None), "g"), tiny_gan_config.model().n_latent
    own = (w_plus == w_plus[:, :1]).all(2).sum(1)                # layers of the first style; all of them: not mixed
    assert (own < layers).float().mean().item() == pytest.approx(0.5, abs=0.08)
    assert set(own.tolist()) == set(range(1, layers + 1))


@pytest.mark.parametrize("values", [{"batch": 0}, {"accumulate": 0}, {"batch": 8, "accumulate": 3},
                                    {"batch": 16, "accumulate": 8}, {"batch": 12, "accumulate": 2}])
def test_batches_that_cannot_be_are_refused(values):
    with pytest.raises(ValueError, match="--batch|--accumulate"):
        train.TrainConfig(**values)
    assert train.TrainConfig(batch=16, accumulate=4).accumulate == 4


@pytest.mark.parametrize("config", [train.TrainConfig, ReaderConfig, EncoderConfig, HealthyConfig])
def test_a_seed_that_would_be_that_of_a_run_gone_back_is_refused(config):
    """Or more than a random generator takes."""
    assert config(seed=2**32 - 1)
    with pytest.raises(ValueError, match="--seed must be at least 0 and at most"):
        config(seed=2**32)


def test_how_far_augmentation_goes_is_a_setting(tiny_gan_config):
    ada = training.Trainer(dataclasses.replace(tiny_gan_config, ada_target=0.6, ada_max=0.3, ada_kimg=0.001), CPU).ada
    for _ in range(ada.interval):
        ada.observe(torch.ones(4))
        ada.step(lambda counts: counts)
    assert ada.p == 0.3
