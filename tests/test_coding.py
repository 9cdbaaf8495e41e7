"""Codes in space: what a Coder makes of slices, the prior over codes, and the training of both with the generator."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import pytest
import torch

import latent_stats
import train_encoder
from benchmarks import samples as benchmark
from ct.window import encode
from dataset import SliceDataset
from detect.bundle import load_bundle
from gan import coding
from gan.coding import CodeTrainer
from gan.prior import fit, group
from gan.settings import EncoderConfig
from gan.snapshots import load_snapshot
from model import CodePrior, Generator, ModelConfig, SpatialEncoder, SpatialGenerator, build_generator

TINY = ModelConfig(size=64, style_dim=16, n_mlp=2, channel_max=16, encoder_width=0.5, code_channels=4)
FLAGS = ["--preset", "smoke32", "--device", "cpu", "--precision", "fp32", "--batch", "4", "--epochs", "2",
         "--perceptual-epochs", "1", "--code-channels", "4", "--lr-generator", "1e-3", "--rotate", "0"]


def networks() -> tuple[SpatialGenerator, SpatialEncoder]:
    torch.manual_seed(0)
    generator = SpatialGenerator(TINY).eval().requires_grad_(False)
    for layer in [generator.conv1, *generator.convs]:
        layer.noise.weight.fill_(1)
    return generator, SpatialEncoder(TINY).eval().requires_grad_(False)


# ---- The networks

def test_a_code_has_a_place(monkeypatch):
    """Half of the code changed: the other half of the maps of 8 pixels stays, but for the filters' reach."""
    generator, encoder = networks()
    mean, log_variance = encoder.distribution(torch.rand(3, 3, 64, 64) - 0.5)
    assert mean.shape == log_variance.shape == (3, *TINY.code_shape) == (3, 4, 64)
    code = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(1))
    other = code.clone()
    other.unflatten(2, (8, 8))[..., :2] += 1
    drawn = []
    monkeypatch.setattr(Generator, "synthesis", lambda self, w, maps: drawn.append(maps))
    for one in (code, other):
        generator.synthesis(one, "const")
    maps, changed = drawn
    assert [list(m.shape) for m in maps] == [[1, 1, 4, 4], *[[1, 16, r, r] for r in (8, 8, 16, 16)],
                                             *[[1, 1, r, r] for r in (32, 32, 64, 64)]]
    for a, b in zip(maps[1:3], changed[1:3]):
        assert not torch.equal(a[..., :2], b[..., :2]) and torch.equal(a[..., 4:], b[..., 4:])
    own = generator.noise_maps("const")
    assert all(a is b for a, b in zip(maps[5:], own[5:])) and maps[0] is own[0]


def test_only_the_finest_maps_are_noise_each_with_its_strength():
    generator, _ = networks()
    generator.fine_noise.copy_(torch.tensor([0.0, 1.0, 0.0, 2.0]))
    own, maps = generator.noise_maps("const"), generator.random_maps(2, torch.Generator().manual_seed(1))
    assert all(a is b for a, b in zip(maps[:5], own[:5]))
    added = [(m - mine).std().item() for m, mine in zip(maps[5:], own[5:])]
    assert added == [0, pytest.approx(1, rel=0.1), 0, pytest.approx(2, rel=0.1)]
    assert not torch.equal(maps[6][0], maps[6][1])


def test_noise_adds_to_what_the_code_says():
    """Own maps, new ones, none: three images of one code; the same list of maps, the same image."""
    generator, encoder = networks()
    code = encoder(torch.rand(1, 3, 64, 64) - 0.5)
    const, none = generator.synthesis(code, "const"), generator.synthesis(code, None)
    generator.fine_noise.fill_(0)
    assert torch.equal(generator.synthesis(code), const) and not torch.equal(none, const)
    assert torch.equal(generator.synthesis(code, generator.noise_maps("const")), const)
    with pytest.raises(ValueError, match=r"code must be \[B, 4, 64\]"):
        generator.synthesis(code[:, :2])


def test_codes_start_with_the_same_small_variance():
    _, encoder = networks()
    encoder.to_code.weight.zero_()
    mean, log_variance = encoder.distribution(torch.rand(1, 3, 64, 64))
    assert mean.abs().max() == 0 and (log_variance == -3).all()


def test_samples_hang_on_the_seed_alone_and_on_psi():
    generator, _ = networks()
    three = generator.sample(3, seed=1)
    assert three.shape == (3, 3, 64, 64) and torch.equal(three, generator.sample(3, seed=1))
    assert not torch.equal(three, generator.sample(3, seed=2)) and not torch.equal(three, generator.sample(3, 0.5, 1))


def test_too_few_channels_are_refused():
    with pytest.raises(ValueError, match="code_channels at least 0"):
        ModelConfig(code_channels=-1)
    with pytest.raises(ValueError, match="leave out --hide and --noise"):
        EncoderConfig(code_channels=8, hide=0.5)


def test_a_generator_that_would_not_learn_to_read_codes_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train_encoder.main(["--data", "none.lmdb", "--gan", "none", "--out", str(tmp_path), "--code-channels", "8"])
    assert stop.value.code == 2 and "--lr-generator 0; give a rate above 0" in (said := capsys.readouterr().err)
    assert "--code-channels 8: " in said
    assert EncoderConfig(code_channels=8, lr_generator=1e-3).code_channels == 8


# ---- The prior

def test_two_clouds_are_told_apart_and_drawn_again():
    rng = torch.Generator().manual_seed(0)
    codes = torch.randn(3000, 6, generator=rng) * torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 2.0])
    codes[:1000, 0] += 10
    labels = group(codes, 2)
    assert labels[:1000].unique().numel() == 1 and labels[1000:].unique().numel() == 1 and labels[0] != labels[-1]
    prior = CodePrior(6, 2)
    fit(prior, codes, torch.full_like(codes, 0.01))
    drawn = prior.draw(4000, torch.Generator().manual_seed(1))
    assert (drawn[:, 0] > 5).float().mean().item() == pytest.approx(1 / 3, abs=0.03)
    inside = drawn[drawn[:, 0] < 5]
    assert inside.std(0)[:5] == pytest.approx([(0.1**2 + 0.01) ** 0.5] * 5, rel=0.1)    # with a code's own
    assert inside.std(0)[5].item() == pytest.approx(2, rel=0.1)
    towards = prior.draw(4000, torch.Generator().manual_seed(1), psi=0.5)
    assert torch.allclose(towards - prior.draw(4000, torch.Generator().manual_seed(1), psi=0), (drawn - prior.draw(
        4000, torch.Generator().manual_seed(1), psi=0)) / 2, atol=1e-5)


def test_a_component_of_a_few_codes_gets_no_share_and_few_codes_give_one():
    codes = torch.randn(500, 4, generator=torch.Generator().manual_seed(2))
    codes[:10] += 100
    prior = CodePrior(4, 2)
    fit(prior, codes, torch.zeros_like(codes))
    assert sorted(prior.share.tolist()) == [0, 1]
    assert prior.draw(200, torch.Generator().manual_seed(3)).max() < 10
    fit(prior, codes[10:40], torch.zeros(30, 4))
    assert prior.share.tolist() == [1, 0]
    assert prior.draw(2000, torch.Generator().manual_seed(3)).mean(0) == pytest.approx(codes[10:40].mean(0), abs=0.15)


# ---- Its training

def trainer(gan_run, **changes) -> CodeTrainer:
    config = EncoderConfig(**{"code_channels": 4, "knee": 0.05, "lr_generator": 2e-3, "lr_trunk": 2e-3,
                              "precision": "fp32", "batch": 4, "rotate": 0, "flip": False, "jitter_hu": 0, **changes})
    return CodeTrainer(config, load_snapshot(gan_run), (-20.0, 180.0), torch.device("cpu"))


def examples(one, slices32) -> dict[str, torch.Tensor]:
    data = SliceDataset(slices32, "train")
    slices = {key: torch.stack([data[i][key] for i in (2, 3, 4, 5)]) for key in ("hu", "brain")}
    return one.prepare(slices, torch.Generator().manual_seed(0))


def test_the_loss_falls_on_slices_seen_again_and_again(gan_run, slices32):
    one = trainer(gan_run)
    batch = examples(one, slices32)
    first, *_, last = (one.learn(batch, i, full=False)["distance"].item() for i in range(15))
    assert last < 0.8 * first and one.images_seen == 60 and one.recent.shape == (2, 60, 4 * 64)


@pytest.mark.parametrize("nats, rises", [(1e-3, True), (1e6, False)])
def test_information_costs_more_while_the_code_holds_too_much(gan_run, slices32, nats, rises):
    one = trainer(gan_run, code_nats=nats)
    one.learn(examples(one, slices32), 0, full=False)
    assert one.rate == pytest.approx(5e-6 * (1.01005 if rises else 0.99005), rel=1e-5)


def test_the_averages_follow_the_weights_and_keep_no_history(gan_run, slices32):
    """With a history, some 80 kB a step, a training of hours filled the memory."""
    one = trainer(gan_run)
    before = [p.clone() for p in one.g_ema.parameters()]
    one.images_seen = 3196                                        # after the step 3200: a half-life of 160 images
    one.learn(examples(one, slices32), 0, full=False)
    keep = 0.5 ** (4 / 160)
    for averaged, old, new in zip(one.g_ema.parameters(), before, one.g.parameters()):
        torch.testing.assert_close(averaged, keep * old + (1 - keep) * new.detach())
    assert all(p.is_leaf and not p.requires_grad for net in (one.g_ema, one.e_ema) for p in net.parameters())


def test_beyond_a_cut_value_nothing_is_wrong(gan_run):
    """Air and bone drawn beyond the ends of the range are met; short of them, or beyond where the slice is not, not."""
    one = trainer(gan_run)
    low, high = one.range_hu
    real = encode(torch.tensor([[low, low, high, high, 30.0]])[None])
    fake = real + torch.tensor([-0.3, 0.3, 0.3, -0.3, -2.0])
    met = (one.reached(real, fake) == fake).all(1).flatten().tolist()
    assert met == [True, False, True, False, False]
    assert torch.equal(one.reached(real, fake)[..., [1, 3, 4]], real[..., [1, 3, 4]])


def test_the_adversary_looks_at_reconstructions_with_new_noise(gan_run, slices32, monkeypatch):
    one = trainer(gan_run)
    batch = examples(one, slices32)
    one.learn(batch, 0, full=False)
    drawn, looked_at = [], []
    synthesis, judge = one.g.synthesis, one.d.forward
    monkeypatch.setattr(one.g, "synthesis", lambda code, noise: drawn.append(noise) or synthesis(code, noise))
    monkeypatch.setattr(one.d, "forward", lambda x: looked_at.append(x.detach()) or judge(x))
    stats = one.learn(batch, 1, full=True)
    assert set(stats) == {"distance", "nats", "adversarial", "features", "loss_d"}
    own = one.g.noise_maps("const")
    assert len(drawn) == 1 and [m is mine for m, mine in zip(drawn[0], own)] == [True] * 5 + [False] * (len(own) - 5)
    slices_first, fakes = looked_at
    assert torch.allclose(slices_first, encode(batch["hu"].float()), atol=1e-5) and not torch.equal(slices_first, fakes)


def test_features_are_of_the_adversary_as_it_is_now(gan_run):
    """Those of slices were of its first weights for ever, once an optimiser changed them without counting that up."""
    one = trainer(gan_run)
    real, fake = torch.rand(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5
    before = one._looked_at(real, fake)[1]
    for p in one.d.parameters():
        version = p._version
        p.data.mul_(1.5)
        assert p._version == version
    apart = [(mine - theirs).abs().mean() for mine, theirs in zip(one.d.features(fake)[1:4], one.d.features(real)[1:4])]
    found = one._looked_at(real, fake)[1]
    torch.testing.assert_close(found, torch.stack(apart).mean())
    assert found > 1.1 * before and all(p.requires_grad for p in one.d.parameters())


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_stopped_before_an_epoch_ends_keeps_the_prior_of_its_codes(steps, slices32, gan_run, tmp_path,
                                                                         monkeypatch):
    """It was the standard normal distribution until held-out scans were looked at, and that of an epoch ago later."""
    learn = CodeTrainer.learn

    def stopped(self, *args):
        if self.images_seen == 4 * (steps - 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(self, *args)
    monkeypatch.setattr(CodeTrainer, "learn", stopped)
    assert train_encoder.main(["--data", str(slices32), "--gan", str(gan_run), "--out", str(tmp_path), *FLAGS]) == 143
    snapshot, prior = load_snapshot(tmp_path), CodePrior(4 * 64)
    assert snapshot.step == 4 * steps and snapshot.state["recent"].shape == (2, 4 * steps, 4 * 64)
    fit(prior, *snapshot.state["recent"])
    assert prior.share[0] == 1 and prior.mean[0].any()                             # few codes: one component
    for name, t in prior.state_dict().items():
        assert torch.equal(snapshot.weights["generator_ema"][f"prior.{name}"], t), name


def test_a_prior_is_fitted_where_codes_are_enough_and_finite(gan_run, monkeypatch):
    """One code has no spread; of codes that are no numbers the run tells at its next tick, and goes back."""
    one = trainer(gan_run)
    before = {name: t.clone() for name, t in one.g_ema.prior.state_dict().items()}
    for codes in (torch.empty(2, 0, 256), torch.ones(2, 1, 256), torch.full((2, 60, 256), torch.nan)):
        one.recent = codes
        assert one.state()["recent"] is codes
        assert all(torch.equal(t, before[name]) for name, t in one.g_ema.prior.state_dict().items())
    one.recent = torch.rand(2, 2, 256, generator=torch.Generator().manual_seed(0))
    one.state()
    torch.testing.assert_close(one.g_ema.prior.mean[0], one.recent[0].mean(0))
    monkeypatch.setattr(coding, "fit", None)
    one.state()                                                      # of the same codes it is fitted, which takes long


def test_a_run_resumes_to_the_bit_and_draws_the_same_heads(slices32, gan_run, tmp_path, capsys):
    def run(out, *flags):
        return train_encoder.main(["--data", str(slices32), "--gan", str(gan_run), "--out", str(out), *FLAGS, *flags])

    assert run(tmp_path / "whole") == 0
    assert run(tmp_path / "parts", "--epochs", "1") == 0 and run(tmp_path / "parts") == 0
    whole, parts = (load_snapshot(tmp_path / name) for name in ("whole", "parts"))
    assert set(whole.weights) == {"encoder", "generator", "discriminator", "generator_ema", "encoder_ema"}
    for network, weights in whole.weights.items():
        assert all(torch.equal(parts.weights[network][name], t) for name, t in weights.items()), network
    row = json.loads((tmp_path / "whole/stats.jsonl").read_text().splitlines()[-1])
    assert 0 < row["val_error_hu"] < 200 and row["swd"] > 0 and (tmp_path / "whole/samples-002.png").is_file()
    gan = ModelConfig(**load_snapshot(gan_run).meta["model"])
    assert ModelConfig(**whole.meta["model"]) == dataclasses.replace(gan, code_channels=4)
    generator = build_generator(ModelConfig(**whole.meta["model"]))
    whole.restore({"generator_ema": generator})
    assert generator.prior.share.sum().item() == pytest.approx(1) and generator.prior.mean.any()      # fitted
    assert benchmark.main(["--run", str(tmp_path / "whole"), "--data", str(slices32), "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "figures.json").read_text())["slices"] == 8
    # Its search: codes as they are, and a rate for noise maps that hold their strength
    made = ["--data", str(slices32), "--encoder", str(tmp_path / "whole"), "--calibrate", "none", "--components", "4"]
    for name, more, rate in (("own", [], 0.02), ("told", ["lr_noise=0.5"], 0.5)):
        assert latent_stats.main([*made, "--out", str(tmp_path / name), "--set", "method=search", "measure=votes",
                                  "perceptual=pixels", *more]) == 0
        bundle = load_bundle(tmp_path / name)
        assert bundle.reconstructor.latent.slope == 1 and bundle.settings.reconstruction.lr_noise == rate
        assert bundle.published().reconstruction.lr_noise == rate
    assert ("note: lr_noise=0.02, the published rate of 2" in capsys.readouterr().out)
