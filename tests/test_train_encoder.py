"""train_encoder.py: to the end, over an interruption without a trace, and its own augmentations by hand."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import checkpoint
import distributed
import latent_stats
import train_encoder
import train_reader
from bundling import origins
from common.weights import CheckpointError, write_json
from ct.settings import PreprocessSettings, StandardiseSettings
from ct.window import decode, encode
from ct.write import write_nifti
from dataset import SliceDataset
from gan import quality
from gan.augment import coarse_noise, erase, random_rotation
from gan.encoding import EncoderTrainer
from gan.inpainting import InpaintingTrainer
from gan.run_folder import start_run
from gan.settings import EncoderConfig
from gan.snapshots import load_snapshot, save_snapshot, snapshot_steps
from tests.helpers import GradientRecorder, synthetic_scan, write_heads
from tests.reader_data import with_meta

FLAGS = ["--preset", "smoke32", "--device", "cpu", "--precision", "fp32", "--batch", "4", "--epochs", "2",
         "--perceptual-epochs", "0.5", "--r1-every", "2"]
RANGE = (-20.0, 180.0)                   # of slices32


def run_encoder(data, gan, out, *flags) -> int:
    begin = ["--gan", str(gan)] if gan else []
    return train_encoder.main(["--data", str(data), *begin, "--out", str(out), *FLAGS, *map(str, flags)])


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def encoder_run(slices32, gan_run, tmp_path_factory) -> Path:
    """Two epochs of 16 images, the first half of the first with the perceptual loss alone."""
    out = tmp_path_factory.mktemp("runs") / "encoder"
    assert run_encoder(slices32, gan_run, out) == 0
    return out


@pytest.fixture(scope="module")
def half_run(slices32, gan_run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "half"
    assert run_encoder(slices32, gan_run, out, "--epochs", 1) == 0
    return out


@pytest.fixture
def half(half_run, tmp_path) -> Path:
    return Path(shutil.copytree(half_run, tmp_path / "run"))


# ---- A run

def test_a_run_leaves_what_it_promises(encoder_run, gan_run):
    assert snapshot_steps(encoder_run) == [16, 32]
    stats = rows(encoder_run)
    assert [(row["step"], row["epoch"]) for row in stats] == [(16, 1), (32, 2)]
    assert all(set(row) == {"step", "epoch", "perceptual", "adversarial", "domain", "loss_d", "val_psnr_db",
                            "val_error_hu", "seconds", "memory_gb", "img_per_s", "s_per_kimg"} for row in stats)
    assert all(0 < row["val_error_hu"] < 200 and row["val_psnr_db"] > 0 for row in stats)
    assert (encoder_run / "reconstructions-002.png").is_file()
    config = json.loads((encoder_run / "config.json").read_text())
    assert config["kind"] == "encoder" and config["gan"]["step"] == 32


def test_the_generator_stays_and_the_discriminator_goes_on(encoder_run, gan_run):
    gan, ours = load_snapshot(gan_run).weights, load_snapshot(encoder_run).weights
    assert set(ours) == {"encoder", "discriminator", "generator"}
    assert all(torch.equal(ours["generator"][name], t) for name, t in gan["generator_ema"].items())
    assert not torch.equal(ours["discriminator"]["convs.0.0.weight"], gan["discriminator"]["convs.0.0.weight"])


def test_a_resumed_run_is_bit_identical(slices32, gan_run, encoder_run, half):
    assert run_encoder(slices32, gan_run, half) == 0
    whole, resumed = (load_snapshot(run) for run in (encoder_run, half))
    for network, weights in whole.weights.items():
        assert all(torch.equal(resumed.weights[network][name], t) for name, t in weights.items()), network
    assert torch.equal(whole.state["rng"][0], resumed.state["rng"][0])
    assert rows(encoder_run)[-1]["val_error_hu"] == rows(half)[-1]["val_error_hu"]


def test_a_run_of_so_many_hours_ends_by_the_clock_and_another_goes_on(slices32, gan_run, half):
    """The first half took longer than this: what goes on has nothing left to do."""
    before = load_snapshot(half).state["seconds"]
    assert before > 0
    assert run_encoder(slices32, gan_run, half, "--epochs", 100, "--hours", before / 3600 / 2) == 0
    assert snapshot_steps(half) == [16]
    assert run_encoder(slices32, gan_run, half, "--epochs", 100, "--hours", (before + 0.5) / 3600) == 0
    last = load_snapshot(half)
    assert 16 < last.step < 1600 and last.state["seconds"] > before + 0.5
    assert rows(half)[-1]["step"] == last.step and "val_error_hu" in rows(half)[-1]


def test_snapshots_come_as_often_as_asked(slices32, gan_run, tmp_path):
    assert run_encoder(slices32, gan_run, tmp_path, "--epochs", 2.5, "--snapshot-epochs", 2) == 0
    assert [(row["step"], row["epoch"]) for row in rows(tmp_path)] == [(32, 2), (40, 2.5)]
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == ["reconstructions-001", "reconstructions-002"]


def test_snapshots_within_an_epoch_have_pictures_of_their_own(slices32, gan_run, tmp_path):
    """They were all of epoch 0, and each replaced the one before."""
    assert run_encoder(slices32, gan_run, tmp_path, "--epochs", 1, "--snapshot-epochs", 0.5) == 0
    assert [(row["step"], row["epoch"]) for row in rows(tmp_path)] == [(8, 0.5), (16, 1)]
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == ["reconstructions-001", "reconstructions-002"]


def test_a_run_that_goes_on_within_an_epoch_keeps_its_pictures(slices32, gan_run, tmp_path):
    """That of one epoch and a half was replaced by that of two: a picture has the number of its row of statistics."""
    assert run_encoder(slices32, gan_run, tmp_path, "--epochs", 1.5) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert sorted(before) == ["reconstructions-001.png", "reconstructions-002.png"]
    assert run_encoder(slices32, gan_run, tmp_path, "--epochs", 2) == 0
    assert [(row["step"], row["epoch"]) for row in rows(tmp_path)] == [(16, 1), (24, 1.5), (32, 2)]
    after = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert after.keys() - before.keys() == {"reconstructions-003.png"} and before.items() <= after.items()


def test_a_run_from_before_databases_told_their_held_out_slices_goes_on(slices32, gan_run, tmp_path, monkeypatch):
    """Its database, prepared anew, was taken for another; one with other scans held out is another."""
    with monkeypatch.context() as earlier:
        earlier.setattr("dataset.FACTS", ("digest", "counts"))
        assert run_encoder(slices32, gan_run, tmp_path, "--epochs", 0.5) == 0
    assert load_snapshot(tmp_path).meta["data"].keys() == {"digest", "counts", "settings"}
    assert run_encoder(slices32, gan_run, tmp_path, "--epochs", 1) == 0
    now = load_snapshot(tmp_path).meta
    assert now["data"]["val_digest"] == SliceDataset(slices32).manifest["val_digest"]
    with pytest.raises(CheckpointError, match="the run there has another held_out"):
        start_run(tmp_path, now | {"held_out": ["another"]}, {})


def test_a_run_from_before_a_setting_of_its_networks_goes_on(slices32, gan_run, half_run, tmp_path, capsys):
    """Its model does not tell it, and has the default; one that tells of a setting that is not known is another."""
    known = load_snapshot(half_run).meta["model"]
    before = {key: known[key] for key in known if key != "code_channels"}
    earlier = with_meta(half_run, tmp_path / "earlier", model=before)
    assert run_encoder(slices32, gan_run, earlier, "--epochs", 1) == 0
    later = with_meta(half_run, tmp_path / "later", model=known | {"encoder_later": True})
    assert run_encoder(slices32, gan_run, later, "--epochs", 1) == 2
    assert "has another model (model.encoder_later" in capsys.readouterr().err


@pytest.mark.parametrize("n, objective, networks", [(1, EncoderTrainer, {}), (4, InpaintingTrainer, {"hide": 0.9})])
def test_no_more_held_out_slices_are_read_than_measure_a_training(n, objective, networks, slices32, gan_run,
                                                                  monkeypatch, tmp_path):
    """All were, of 1,250 scans of 512 pixels for half an hour: by then the other ranks had given up waiting."""
    dataset, read, one = SliceDataset(slices32, "all"), [], SliceDataset.__getitem__
    assert len(dataset) == 24
    trainer = objective(EncoderConfig(precision="fp32", **networks), load_snapshot(gan_run), RANGE, torch.device("cpu"))
    monkeypatch.setattr(SliceDataset, "__getitem__", lambda self, i: read.append(i) or one(self, i))
    found = trainer.validate(dataset, tmp_path, 0)
    assert read == list(range(0, 24, n))                                 # few: as many as ever, by scan
    measured = quality.Measured(dataset, n)
    assert measured.scan_ids == dataset.scan_ids
    for s in range(3):
        assert all(torch.equal(t, dataset.scan(s)[key][::n]) for key, t in measured.scan(s).items())
    monkeypatch.setattr(quality, "MOST_HELD_OUT", 2)                     # of three scans one is left out
    read.clear()
    few = trainer.validate(dataset, tmp_path, 1)
    assert read == [0, 12] and few.keys() == found.keys() and few != found
    assert (tmp_path / "reconstructions-001.png").is_file()


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")                # the grid of pictures of nothing
def test_divergence_exits_4_and_keeps_the_last_good_snapshot(slices32, gan_run, half, capsys):
    assert run_encoder(slices32, gan_run, half, "--lr", 1e30) == 4
    assert "diverged at step 32" in capsys.readouterr().err
    snapshot = load_snapshot(half)
    assert snapshot.step == 16
    assert all(torch.isfinite(t).all() for t in snapshot.weights["encoder"].values())


def test_what_cannot_be_trained_exits_2(slices32, gan_run, encoder_run, tmp_path, capsys):
    assert run_encoder(slices32, gan_run, tmp_path, "--perceptual", "lpips") == 2
    assert "--vgg16 FILE" in capsys.readouterr().err
    for flags in (("--vgg16", "vgg16.pth"), ("--lpips", "vgg.pth"),       # were passed over
                  ("--perceptual", "lpips", "--vgg16", "vgg16.pth", "--hide", 0.5)):
        assert run_encoder(slices32, gan_run, tmp_path, *flags) == 2
        assert "weights of --perceptual lpips" in capsys.readouterr().err
    assert run_encoder(slices32, encoder_run, tmp_path) == 2
    assert "not a run of train.py (kind 'encoder')" in capsys.readouterr().err
    reader = tmp_path / "reader"                               # its meta know nothing of a size
    save_snapshot(reader, 1, {}, {}, {"kind": "reader", "model": {"widths": [24]}})
    assert run_encoder(slices32, reader, tmp_path) == 2
    assert "--gan" in (said := capsys.readouterr().err) and "not a run of train.py (kind 'reader')" in said
    assert run_encoder(slices32, tmp_path / "absent", tmp_path) == 2
    assert "absent: holds no run of train.py" in capsys.readouterr().err
    assert run_encoder(slices32, gan_run, gan_run) == 2
    assert "has another kind" in capsys.readouterr().err


def test_the_loss_falls_on_a_batch_seen_again_and_again(gan_run):
    config = EncoderConfig(lr=3e-3, erase=0, rotate=0, flip=False, precision="fp32")
    trainer = EncoderTrainer(config, load_snapshot(gan_run), RANGE, torch.device("cpu"))
    real = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5
    first, *_, last = (trainer.step(real, i, full=False)["perceptual"].item() for i in range(12))
    assert last < 0.9 * first


# ---- What a step learns from

def perceptual_by_hand(x: torch.Tensor, y: torch.Tensor, knee: float) -> torch.Tensor:
    return (((x - y).square() + knee**2).sqrt() - knee).mean()


@pytest.fixture(scope="module")
def recorded(gan_run) -> SimpleNamespace:
    """A full step of an encoder whose input is erased, with all that went through the networks; weights unchanged."""
    config = EncoderConfig(perceptual="pixels", knee=0.05, adversarial=0.3, domain=2.0, r1_gamma=6.0, r1_every=16,
                           erase=1.0, rotate=0, flip=False, precision="fp32")
    trainer = EncoderTrainer(config, load_snapshot(gan_run), RANGE, torch.device("cpu"))
    trainer.e_opt, trainer.d_opt = GradientRecorder(trainer.e_opt), GradientRecorder(trainer.d_opt)
    real = 0.2 + 0.8 * torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = SimpleNamespace(trainer=trainer, config=config, real=real, encoder=[], discriminator=[])
    invert, judge = trainer.e.invert, trainer.d.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.e, "invert", lambda images, g: seen.encoder.append(images) or invert(images, g))
        patch.setattr(trainer.d, "forward", lambda images: seen.discriminator.append(images.detach()) or judge(images))
        seen.stats = trainer.step(real, 0, full=True)
    return seen


def test_the_encoder_sees_erased_images(recorded):
    corrupted, real = recorded.encoder[0], recorded.real
    erased = (corrupted == 0) & (real != 0)
    assert 0.02 < erased.float().mean() < 0.4 and erased.flatten(1).any(1).all()
    assert torch.equal(corrupted[~erased], real[~erased])


def test_what_it_shall_draw_is_whole(recorded):
    """Denoising: the distance is that to the image before it was erased; the discriminator sees no hole, either."""
    fake = recorded.discriminator[0]
    wanted = perceptual_by_hand(recorded.real, fake, knee=0.05)
    assert recorded.stats["perceptual"].item() == pytest.approx(wanted.item(), rel=1e-4)
    assert recorded.stats["perceptual"].item() != pytest.approx(
        perceptual_by_hand(recorded.encoder[0], fake, knee=0.05).item(), rel=1e-2)
    assert torch.equal(recorded.discriminator[1], recorded.real)
    assert torch.equal(recorded.encoder[1], recorded.real)       # nor does the discriminator's opponent


def test_the_encoders_loss_is_the_weighted_sum_of_its_terms(recorded):
    """distance + 0.3 adversarial + 2 in-domain: the encoder's gradient by hand."""
    trainer = recorded.trainer
    code, fake = trainer.reconstruct(recorded.encoder[0])
    adversarial = F.softplus(-trainer.d(fake)).mean()
    domain = (code - trainer.e(fake)).square().mean()
    loss = perceptual_by_hand(recorded.real, fake, knee=0.05) + 0.3 * adversarial + 2.0 * domain
    parameters = [p for group in trainer.e_opt.param_groups for p in group["params"]]
    expected = torch.autograd.grad(loss, parameters, materialize_grads=True)
    torch.testing.assert_close(trainer.e_opt.steps[0], list(expected), rtol=1e-3, atol=1e-6)
    assert recorded.stats["domain"].item() == pytest.approx(domain.item(), rel=1e-4)


def test_r1_weighs_half_gamma_times_its_interval(recorded):
    trainer, x = recorded.trainer, recorded.real.clone().requires_grad_()
    (slope,) = torch.autograd.grad(trainer.d(x).sum(), x, create_graph=True)
    penalty = 6.0 / 2 * 16 * slope.square().sum((1, 2, 3)).mean()
    expected = torch.autograd.grad(penalty, list(trainer.d.parameters()), materialize_grads=True)
    for found, wanted in zip(trainer.d_opt.steps[1], expected):
        torch.testing.assert_close(torch.zeros_like(wanted) if found is None else found, wanted, rtol=1e-3, atol=1e-6)


def test_the_first_epochs_know_the_distance_alone(gan_run):
    trainer = EncoderTrainer(EncoderConfig(precision="fp32"), load_snapshot(gan_run), RANGE, torch.device("cpu"))
    assert set(trainer.step(torch.zeros(2, 3, 32, 32), 0, full=False)) == {"perceptual"}


# ---- Augmentation

def test_erased_rectangles_keep_their_bounds():
    """2 to 33 % of the area, sides up to 3.3 : 1, give or take the pixels at the edges."""
    images = torch.ones(300, 3, 96, 96)
    holes = erase(images, 1.0, torch.Generator().manual_seed(0)) == 0
    assert torch.equal(holes, holes[:, :1].expand_as(holes))                           # in all windows alike
    holes = holes[:, 0]
    heights, widths = holes.any(2).sum(1), holes.any(1).sum(1)
    assert torch.equal(holes.sum((1, 2)), heights * widths)                            # one solid rectangle each
    area, slack = heights * widths / 96**2, (heights + widths + 1) / 96**2
    assert (area - slack <= 0.33).all() and (area + slack >= 0.02).all()
    assert area.min() < 0.05 and area.max() > 0.28
    stretched = heights / widths
    assert ((heights - 1) / (widths + 1)).max() < 3.3 and ((widths - 1) / (heights + 1)).max() < 3.3
    assert stretched.max() > 2 and stretched.min() < 1 / 2


def test_erasing_hits_its_share_of_the_images():
    images = torch.rand(400, 3, 32, 32) + 1
    erased = erase(images, 0.25, torch.Generator().manual_seed(0))
    hit = (erased != images).flatten(1).any(1)
    assert 0.18 < hit.float().mean() < 0.32
    assert torch.equal(erased[~hit], images[~hit])
    assert torch.equal(erase(images, 0.0, torch.Generator().manual_seed(0)), images)
    assert ((erased == images) | (erased == 0)).all()


def test_rotations_turn_either_way_about_the_centre_up_to_their_limit():
    images = torch.full((200, 3, 33, 33), -1.0)
    images[:, :, 16, 26] = 1                                                           # 10 pixels right of the centre
    turned = random_rotation(images, 0.5, 45, torch.Generator().manual_seed(0))
    assert turned.min() >= -1 and turned.max() <= 1
    hit = (turned != images).flatten(1).any(1)
    assert 0.4 < hit.float().mean() < 0.6
    weight = (turned[hit, 0] + 1).square()
    offset = torch.arange(33.0) - 16
    total = weight.sum((1, 2))
    y, x = (weight.sum(2) * offset).sum(1) / total, (weight.sum(1) * offset).sum(1) / total
    degrees = torch.rad2deg(torch.atan2(y, x))
    torch.testing.assert_close(torch.hypot(x, y), torch.full_like(x, 10.0), atol=0.3, rtol=0)
    assert 38 < degrees.max() < 47 and -47 < degrees.min() < -38 and degrees.mean().abs() < 8


@pytest.mark.parametrize("values", [{"batch": 0}, {"lr": 0}, {"lr_trunk": 0}, {"epochs": 0},
                                    {"epochs": float("nan")}, {"seed": -1}])
def test_settings_that_train_nothing_are_refused(values):
    with pytest.raises(ValueError, match=f"--{next(iter(values))}".replace("_", "-")):
        EncoderConfig(**values)


@pytest.mark.parametrize("flag", ["--gan", "--init"])
def test_a_run_does_not_go_on_from_other_weights_of_the_same_description(slices32, gan_run, half_run, tmp_path, capsys,
                                                                         flag):
    """All that they told of themselves was the same: the weights come from other first ones, or another machine."""
    given = {"--gan": gan_run, "--init": half_run}
    out, other = tmp_path / "run", tmp_path / "other"
    shared = ["--init", given["--init"], "--epochs", 0.5]
    assert run_encoder(slices32, gan_run, out, *shared) == 0
    first = load_snapshot(given[flag])
    networks = {name: torch.nn.ParameterDict() for name in first.weights}
    for name, weights in first.weights.items():
        networks[name].state_dict = lambda weights=weights: {key: one * 1.001 for key, one in weights.items()}
    save_snapshot(other, first.step, networks, first.state, first.meta)
    given[flag] = other
    assert run_encoder(slices32, given["--gan"], out, "--init", given["--init"], "--epochs", 1) == 2
    assert "the run there has another began_with" in capsys.readouterr().err
    assert run_encoder(slices32, gan_run, out, *shared[:2], "--epochs", 1) == 0


# ---- coarse noise

def test_coarse_noise_changes_soft_tissue_alone():
    rng = torch.Generator().manual_seed(0)
    hu = torch.full((32, 64, 64), 30.0)
    hu[:, :8], hu[:, 8:16] = -20.0, 150.0                            # air and bone
    images = encode(hu)
    noisy = coarse_noise(images, 1.0, rng)
    changed = (decode(noisy) - decode(images)).abs()
    assert not changed[:, :16].gt(1e-3).any()
    assert changed[:, 16:].amax((1, 2)).gt(5).sum() > 16              # most images have blobs that can be seen
    assert changed[:, 16:].max() < 151


def test_coarse_noise_leaves_the_others_as_they_are():
    images = encode(torch.full((64, 16, 16), 30.0))
    assert coarse_noise(images, 0.0, torch.Generator().manual_seed(0)) is images
    noisy = coarse_noise(images, 0.5, torch.Generator().manual_seed(0))
    untouched = (noisy - images).abs().amax((1, 2, 3)) < 1e-6
    assert 16 < untouched.sum() < 56


# ---- rates

@pytest.mark.parametrize("code, fast", [(0, {"final_linear"}), (8, {"final_linear.0", "final_linear.1"})])
def test_what_makes_the_code_has_a_rate_of_its_own(code, fast, gan_run):
    """With --encoder-code an equalised layer, too: shipped weights were trained so, and --lr's help says it."""
    config = EncoderConfig(encoder_code=code, lr=0.3, lr_trunk=0.2, lr_generator=0.1, precision="fp32")
    trainer = EncoderTrainer(config, load_snapshot(gan_run), RANGE, torch.device("cpu"))
    rates = {id(p): group["lr"] for group in trainer.e_opt.param_groups for p in group["params"]}
    by_layer = {name.rpartition(".")[0]: rates[id(p)] for name, p in trainer.e.named_parameters()}
    assert {name for name, rate in by_layer.items() if rate == 0.3} == fast
    assert {rate for name, rate in by_layer.items() if name not in fast} == {0.2}
    assert {rates[id(p)] for p in trainer.g.parameters()} == {0.1}


def test_other_ranks_draw_other_numbers(gan_run, monkeypatch):
    """A run that goes on with another number of ranks drew those of its first steps again."""
    def going_on(images: int, ranks: int, seed: int = 0, rank: int = 0) -> torch.Tensor:
        monkeypatch.setattr(distributed, "get_rank", lambda: rank)
        trainer = EncoderTrainer(EncoderConfig(seed=seed, precision="fp32"), load_snapshot(gan_run), RANGE,
                                 torch.device("cpu"))
        saved = trainer.state() | {"images_seen": images, "rng": [trainer.rng.get_state()] * ranks}
        trainer.rng.manual_seed(7)
        trainer.load_state(saved)
        return trainer.rng.get_state()

    first, again = going_on(16, ranks=1), going_on(16, ranks=2)           # the state as saved; a new stream
    assert torch.equal(again, going_on(16, ranks=2))
    states = [first, again, going_on(24, ranks=2), going_on(16, ranks=3, seed=1), going_on(16, ranks=3, rank=1)]
    assert len({tuple(state.tolist()) for state in states}) == len(states)


def test_rates_fall_evenly_over_the_last_part(gan_run):
    config = EncoderConfig(decay=0.5, lr=1e-4, lr_trunk=1e-3, lr_discriminator=1e-5, precision="fp32")
    trainer = EncoderTrainer(config, load_snapshot(gan_run), RANGE, torch.device("cpu"))
    for done, factor in ((0.0, 1.0), (0.5, 1.0), (0.75, 0.5), (1.0, 0.0)):
        trainer.set_rates(done)
        rates = [group["lr"] for group in (*trainer.e_opt.param_groups, *trainer.d_opt.param_groups)]
        assert rates == pytest.approx([1e-3 * factor, 1e-4 * factor, 1e-5 * factor])


def test_decay_is_a_part():
    with pytest.raises(ValueError, match="--decay must be at least 0 and at most 1"):
        EncoderConfig(decay=2)


@pytest.mark.parametrize(("epochs", "told"), [(0.5, True), (0.6, False)])
def test_a_run_without_an_adversary_says_so(epochs, told, slices32, gan_run, tmp_path, capsys):
    assert run_encoder(slices32, gan_run, tmp_path, "--epochs", epochs, "--perceptual-epochs", 0.5) == 0
    assert ("No adversary in this run: --epochs 0.5" in capsys.readouterr().out) == told


def test_a_run_whose_adversary_has_no_weight_says_so(slices32, gan_run, tmp_path, capsys):
    assert run_encoder(slices32, gan_run, tmp_path, "--epochs", 0.5, "--perceptual-epochs", 0, "--adversarial", 0,
                       "--domain", 0) == 0
    assert "No adversary in this run: --adversarial 0\n" in capsys.readouterr().out


def test_the_adversary_comes_when_it_is_due_and_weighs_something():
    config = EncoderConfig(epochs=60, perceptual_epochs=40)
    assert [config.has_adversary(done) for done in (0, 0.66, 0.67, 1)] == [False, False, True, True]
    without = replace(config, adversarial=0, domain=0)
    assert not without.has_adversary(1) and replace(without, domain=1).has_adversary(1)
    hiding = replace(config, adversarial=0, hide=0.5)                  # of which --domain is no part
    assert not hiding.has_adversary(1) and replace(hiding, gated=0.5).has_adversary(1)
    coding = replace(config, adversarial=0, code_channels=4, lr_generator=1e-3)        # nor here
    assert not coding.has_adversary(1) and replace(coding, adversarial=0.1).has_adversary(1)
    halves = train_encoder.PRESETS["half128"]
    assert not any(replace(halves, epochs=epochs).has_adversary(1) for epochs in (10, 60, 600))


@pytest.mark.parametrize("batch, changes, told", [
    (2, {}, "note: --batch 2: the discriminator compares 2 at a time, not 4"), (8, {}, ""),
    (2, {"adversarial": 0, "domain": 0}, "")])
def test_an_adversary_that_does_not_compare_4_images_at_a_time_is_told_of(batch, changes, told, gan_run, capsys):
    config = EncoderConfig(batch=batch, precision="fp32", **changes)
    EncoderTrainer(config, load_snapshot(gan_run), RANGE, torch.device("cpu"))
    assert capsys.readouterr().out.partition(";")[0] == told


# ---- Predicted noise, and another run's weights

@pytest.fixture(scope="module")
def noise_run(slices32, gan_run, encoder_run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "noise"
    assert run_encoder(slices32, gan_run, out, "--noise", "--init", encoder_run, "--epochs", 1) == 0
    return out


def test_a_run_starts_from_another_runs_weights(gan_run, encoder_run):
    trainer = EncoderTrainer(EncoderConfig(noise=True), load_snapshot(gan_run), RANGE, torch.device("cpu"))
    first = load_snapshot(encoder_run)
    trainer.start_from(origins.open_first_networks(encoder_run))
    for name, module in trainer.modules().items():
        state = module.state_dict()
        assert all(torch.equal(state[key], t) for key, t in first.weights[name].items()), name
    assert {key.split(".")[0] for key in trainer.e.state_dict()} - {"convs", "final_conv", "final_linear"} == {
        "noise_head"}


def test_the_noise_head_is_trained_and_kept(noise_run, encoder_run):
    weights = load_snapshot(noise_run).weights["encoder"]
    assert any(weights[f"noise_head.maps.{i}.weight"].abs().max() > 0 for i in range(3))
    meta = load_snapshot(noise_run).meta
    assert meta["model"]["encoder_noise"] and meta["init"]["step"] == 32


def test_images_alone_are_drawn_with_the_generators_own_noise(gan_run, noise_run):
    trainer = EncoderTrainer(EncoderConfig(noise=True), load_snapshot(gan_run), RANGE, torch.device("cpu"))
    trainer.start_from(origins.open_first_networks(noise_run))
    for layer in trainer.g.convs:
        layer.noise.weight.data += 1                       # what the GAN has not learnt to use would change nothing
    images = 0.5 * torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        code, mixed = trainer.reconstruct(images, torch.tensor([True, False]))
        own = trainer.g.synthesis(code, "const")
    assert torch.allclose(mixed[0], own[0], atol=1e-5)
    assert not torch.allclose(mixed[1], own[1], atol=1e-3)


def test_first_weights_that_do_not_fit_are_refused(slices32, gan_run, noise_run, tmp_path, capsys):
    assert run_encoder(slices32, gan_run, tmp_path / "a", "--init", noise_run) == 2
    assert "(encoder_noise True, here False); give --noise, or the --preset" in capsys.readouterr().err
    assert run_encoder(slices32, gan_run, tmp_path / "b", "--init", gan_run) == 2
    assert "--init" in capsys.readouterr().err


# ---- A model's weights

def bundle_of(data, run, out, *flags) -> Path:
    command = ["--data", data, "--encoder", run, "--out", out, "--preset", "smoke32", "--passes", 4, "--calibrate",
               "none", "--set", "measure=votes", "scan_score=mean", *(flags or ["method=inversion"])]
    assert latent_stats.main([str(word) for word in command]) == 0
    return out


@pytest.mark.parametrize("flags", [(), ("--hide", 0.9, "--encoder-code", 8, "--lr-generator", 1e-3),
                                   ("--code-channels", 2, "--lr-generator", 1e-3)])
def test_a_run_starts_from_a_models_weights(flags, slices32, gan_run, tmp_path, capsys):
    """Rounded, as a bundle holds them; discriminator and mapping network, which it does not hold, are the GAN's."""
    assert run_encoder(slices32, gan_run, tmp_path / "theirs", *flags) == 0
    how = {"--hide": ("method=inpainting",), "--code-channels": ("method=search", "perceptual=pixels")}
    model = bundle_of(slices32, tmp_path / "theirs", tmp_path / "model", *how.get(flags[0] if flags else None, ()))
    rates = ("--lr", 1e-30, "--lr-trunk", 1e-30, "--lr-discriminator", 0, "--epochs", 0.25)
    rates += ("--lr-generator", 1e-30) if flags else ()
    capsys.readouterr()
    assert run_encoder(slices32, gan_run, tmp_path / "ours", *flags, *rates, "--init", model) == 0
    assert f"too much where {model} was trained on scans that --data holds out" in capsys.readouterr().out
    theirs, ours, gan = (load_snapshot(run).weights for run in (tmp_path / "theirs", tmp_path / "ours", gan_run))
    for name in ours.keys() - {"discriminator"}:
        kept = theirs.get(f"{name.removesuffix('_ema')}_ema", theirs[name.removesuffix("_ema")])
        for key, t in ours[name].items():
            own = ".prior." in f".{key}" or key.startswith("style.")
            assert own or torch.equal(t, kept[key].half().float()), (name, key)
    assert all(torch.equal(t, gan["discriminator"][key]) for key, t in ours["discriminator"].items())


def test_a_model_with_a_discriminator_gives_that_too(slices32, gan_run, encoder_run, tmp_path):
    model = bundle_of(slices32, encoder_run, tmp_path / "model", "method=search")
    trainer = EncoderTrainer(EncoderConfig(), load_snapshot(gan_run), RANGE, torch.device("cpu"))
    trainer.start_from(origins.open_first_networks(model))
    kept = load_snapshot(encoder_run).weights["discriminator"]
    assert all(torch.equal(t, kept[key].half().float()) for key, t in trainer.d.state_dict().items())


def test_a_model_that_does_not_fit_is_refused(slices32, gan_run, encoder_run, tmp_path, capsys):
    model = bundle_of(slices32, encoder_run, tmp_path / "model")
    assert run_encoder(slices32, gan_run, tmp_path / "a", "--init", model, "--encoder-code", 8) == 2
    assert (f"--init {model}: its networks are not those of this run (encoder_code 0, here 8); give --encoder-code 0, "
            "or the --preset that has these\n") in capsys.readouterr().err
    meta = json.loads((model / "model.json").read_text())
    write_json(model / "model.json", meta | {"provenance": None})
    assert run_encoder(slices32, gan_run, tmp_path / "b", "--init", model) == 2
    assert f"--init {model}: a model that holds no networks of train_encoder.py" in capsys.readouterr().err


# ---- First networks without a GAN

HIDING = ("--hide", 0.9, "--encoder-code", 8, "--lr-generator", 1e-3)


@pytest.fixture(scope="module")
def hiding_model(slices32, hiding_run, tmp_path_factory) -> Path:
    return bundle_of(slices32, hiding_run, tmp_path_factory.mktemp("models") / "model", "method=inpainting")


def test_a_run_is_begun_with_a_gan_or_first_networks(slices32, tmp_path, capsys):
    assert run_encoder(slices32, None, tmp_path / "run") == 2
    assert "error: --gan: expected a run folder of train.py to begin with; only with --init" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_models_networks_need_no_gan(slices32, gan_run, hiding_model, tmp_path, capsys):
    """All that is drawn with is the model's, the discriminator is new; the run goes on, and its weights are a model's
    and those of a further run."""
    rates = ("--lr", 1e-30, "--lr-trunk", 1e-30, "--lr-generator", 1e-30, "--lr-discriminator", 0)
    out = tmp_path / "run"
    assert run_encoder(slices32, None, out, *HIDING, *rates, "--epochs", 0.25, "--init", hiding_model) == 0
    assert "no GAN, new discriminator" in capsys.readouterr().out
    weights, meta = load_snapshot(out).weights, json.loads((out / "config.json").read_text())
    for name in ("encoder", "generator"):
        kept = load_file(hiding_model / f"{name}.safetensors")
        assert all(torch.equal(weights[name][key], t.float()) for key, t in kept.items()), name
    assert meta["gan"] is None and meta["began_with"]["gan"] is None and meta["new_discriminator"]
    assert run_encoder(slices32, None, out, *HIDING, "--epochs", 1, "--init", hiding_model) == 0
    assert load_snapshot(out).step == 16
    assert run_encoder(slices32, gan_run, out, *HIDING, "--epochs", 2, "--init", hiding_model) == 2
    said = capsys.readouterr().err
    assert 'the run there has another gan (gan null, now {"step": 32, "kind": "gan", "conf' in said and len(said) < 400

    model = bundle_of(slices32, out, tmp_path / "model", "method=inpainting")
    known = json.loads((model / "model.json").read_text())["provenance"]
    assert known["gan"] is None and known["init"]["images_seen"] == 8 and known["encoder"]["images_seen"] == 16
    assert checkpoint.main(["show", str(model)]) == 0
    assert "begun with" in (said := capsys.readouterr().out) and "  gan  " not in said
    for first in (model, out):
        assert run_encoder(slices32, None, first / "next", *HIDING, "--epochs", 0.25, "--init", first) == 0


def test_a_reader_is_taught_beside_networks_without_a_gan(slices32, hiding_model, tmp_path):
    out, reader = tmp_path / "run", tmp_path / "reader"
    assert run_encoder(slices32, None, out, *HIDING, "--epochs", 0.25, "--init", hiding_model) == 0
    command = ["--data", slices32, "--encoder", out, "--out", reader, "--preset", "smoke32", "--epochs", 0.25]
    assert train_reader.main([str(word) for word in command]) == 0
    beside = origins.open_beside(out, torch.device("cpu"), "fp32").digest
    assert origins.open_reader(reader, beside).meta["encoder"]["gan"] is None


def test_without_a_gan_slices_are_those_of_the_first_networks(hiding_model, tmp_path, capsys):
    narrow = write_heads(tmp_path / "narrow.lmdb", ("train", "val"), hu_clip=(0, 70))
    assert run_encoder(narrow, None, tmp_path / "run", *HIDING, "--init", hiding_model) == 2
    assert (f"--data {narrow}: its slices were prepared in another way than those that the networks of --init "
            f"{hiding_model} have learnt from (hu_clip (0.0, 70.0), there (-20.0, 180.0)); prepare it with --size 32 "
            "--hu-clip -20 180, or give --gan") in capsys.readouterr().err


def test_the_hu_of_a_models_networks_are_asked_for_not_those_of_its_scans(gan_run, tmp_path, capsys):
    """As of models/head-128: calibrated by scans of more HU than its networks learnt to draw."""
    narrow = write_heads(tmp_path / "narrow.lmdb", ("train", "train", "val"), hu_clip=(0, 70))
    whole = write_heads(tmp_path / "whole.lmdb", ("train", "train", "val"), hu_clip=(-20, 100))
    assert run_encoder(narrow, gan_run, tmp_path / "theirs", *HIDING, "--epochs", 0.25) == 0
    model = bundle_of(narrow, tmp_path / "theirs", tmp_path / "model", "method=inpainting", "--calibrate", "val",
                      "--held-out", whole)
    meta = json.loads((model / "model.json").read_text())
    assert meta["preprocessing"]["standardise"]["hu_clip"] == [-20, 100]
    del meta["config"]["range_hu"]                       # no other method has it
    assert origins.taught_with(meta) == PreprocessSettings.from_json(SliceDataset(narrow).manifest["settings"])
    short = (*HIDING, "--epochs", 0.25, "--init", model)
    assert run_encoder(whole, None, tmp_path / "a", *short) == 2
    assert "hu_clip (-20.0, 100.0), there (0.0, 70.0)); prepare it with --size 32 --hu-clip 0 70" in (
        capsys.readouterr().err)
    assert run_encoder(narrow, None, tmp_path / "b", *short) == 0


def test_a_folder_of_scans_is_prepared_as_the_first_networks_slices_were(hiding_model, tmp_path, monkeypatch):
    (tmp_path / "scans").mkdir()
    for seed in range(2):
        scan, _ = synthetic_scan(slices=14, size=64, spacing_mm=(10.0, 3.6, 3.6), seed=seed)
        write_nifti(tmp_path / "scans" / f"{seed}.nii.gz", scan.hu, scan)
    first = replace(origins.open_first_networks(hiding_model), prepared=PreprocessSettings(
        StandardiseSettings(size=32, hu_clip=(0.0, 70.0), bone_apart=True), min_brain_fraction=0.01))
    monkeypatch.setattr(origins, "open_first_networks", lambda folder, *_: first)
    begin = (*HIDING, "--init", hiding_model, "--epochs", 0.25)
    assert run_encoder(tmp_path / "scans", None, tmp_path / "run", *begin) == 0
    made = SliceDataset(tmp_path / "run" / "data.lmdb", "all").manifest["settings"]
    assert PreprocessSettings.from_json(made) == first.prepared


def test_a_new_discriminator_measures_no_distance(slices32, gan_run, tmp_path, capsys):
    """Neither in a training nor in a search, nor in a run that begins with it, until it has learnt something."""
    assert run_encoder(slices32, gan_run, tmp_path / "theirs", "--epochs", 0.25) == 0
    model = bundle_of(slices32, tmp_path / "theirs", tmp_path / "model")
    assert run_encoder(slices32, None, tmp_path / "run", "--epochs", 0.25, "--init", model) == 2
    assert f"--init {model}: holds no discriminator" in capsys.readouterr().err
    pixels = ("--perceptual", "pixels", "--epochs", 0.25)
    assert run_encoder(slices32, None, tmp_path / "run", *pixels, "--init", model) == 0
    assert run_encoder(slices32, None, tmp_path / "next", "--epochs", 0.25, "--init", tmp_path / "run") == 2
    assert "holds no discriminator" in capsys.readouterr().err
    command = ["--data", slices32, "--encoder", tmp_path / "run", "--out", tmp_path / "search", "--preset", "smoke32",
               "--passes", 4, "--calibrate", "none", "--set", "method=search"]
    assert latent_stats.main([str(word) for word in command]) == 2
    assert "new discriminator, which has learnt nothing; use perceptual=pixels" in capsys.readouterr().err
    assert run_encoder(slices32, None, tmp_path / "run", *pixels[:2], "--epochs", 1, "--init", model) == 0
    assert latent_stats.main([str(word) for word in command]) == 0
    trainer = EncoderTrainer(EncoderConfig(), None, RANGE, torch.device("cpu"),
                             first=(first := origins.open_first_networks(tmp_path / "run")))
    taught = load_snapshot(tmp_path / "run").weights["discriminator"]
    assert first.weights.keys() == {"encoder", "generator", "discriminator"}
    assert all(torch.equal(t, taught[key]) for key, t in trainer.perceptual.discriminator.state_dict().items())


@pytest.mark.parametrize("alone", [False, True])
def test_what_taught_a_model_is_known_for_ever(alone, gan_run, tmp_path, capsys):
    """Of the scans of a database with others of them held out: through a model, and through one that began with it."""
    theirs, ours = (write_heads(tmp_path / f"{splits[0]}.lmdb", splits)
                    for splits in (("train", "train", "val"), ("val", "train", "train")))
    assert run_encoder(theirs, gan_run, tmp_path / "first", "--epochs", 0.25) == 0
    model = bundle_of(theirs, tmp_path / "first", tmp_path / "model")
    capsys.readouterr()
    begin = (None, tmp_path / "run", "--perceptual", "pixels") if alone else (gan_run, tmp_path / "run")
    assert run_encoder(ours, *begin, "--init", model, "--epochs", 0.25) == 0
    assert f"warning: --init {model}, or a run that it began with, did not hold out head0" in capsys.readouterr().out
    second = bundle_of(ours, tmp_path / "run", tmp_path / "second")
    assert "a run of --init, was trained on another database" in capsys.readouterr().out
    known = json.loads((second / "model.json").read_text())["provenance"]
    assert known["init"]["images_seen"] == 4 and known["init"]["held_out"] == 1 and known["init"]["init"] is None
    assert not re.search(r"head\d", json.dumps(known))
    own = write_heads(tmp_path / "own.lmdb", ("train", "val", "val"))
    assert origins.learnt_by_networks(SliceDataset(own, "val"), known | {"data": None}) == []
    assert origins.learnt_by_networks(SliceDataset(own, "val"), known) == ["head1", "head2"]
