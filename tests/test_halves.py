"""What surroundings call for, drawn by networks of half the size: bone stays apart, and runs and bundles hold both."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import latent_stats
import train_encoder
import train_reader
from bundling import origins
from common.weights import CheckpointError
from ct.halves import doubled, halved
from dataset import SliceDataset
from detect.bundle import load_bundle
from detect.inpainting import Inpainting, InpaintingSettings
from detect.inversion import load_networks
from detect.painter import Painter, blocks
from gan.inpainting import InpaintingTrainer, hide_blocks
from gan.settings import EncoderConfig
from gan.snapshots import load_snapshot
from model import Encoder, Generator, ModelConfig, has_mapping
from tests.reader_data import with_held_out, with_meta

SHAPE = dict(style_dim=16, n_mlp=2, channel_max=16, encoder_noise=True, noise_channels=True, encoder_masks=True,
             encoder_width=0.5, encoder_code=8)


def painter(size: int, range_hu=(0.0, 70.0)) -> Painter:
    torch.manual_seed(0)
    config = ModelConfig(size=size, **SHAPE)
    return Painter(Generator(config).eval(), Encoder(config).eval(), range_hu)


# ---- Half the size and back

def test_what_shares_a_pixel_with_bone_is_no_brighter():
    """Four places by hand: all brain, one of four bone, three of four bone, all bone."""
    hu = torch.tensor([[[10.0, 20, 10, 70], [30, 40, 30, 50], [70, 70, 70, 60], [70, 12, 70, 60]]])
    bone = hu >= 60
    small, small_bone = halved(hu, bone)
    assert small.tolist() == [[[25.0, 30.0], [12.0, 65.0]]]
    assert small_bone.tolist() == [[[False, False], [False, True]]]


def test_twice_the_size_is_linear_between_pixels_and_no_bone_shines_into_its_rim():
    row = torch.tensor([[[10.0, 20.0, 70.0, 70.0]]]).expand(1, 4, 4)
    bone = row >= 70
    assert torch.allclose(doubled(row, torch.zeros_like(bone))[0, 3],
                          torch.tensor([10, 12.5, 17.5, 32.5, 57.5, 70, 70, 70]))
    assert torch.allclose(doubled(row, bone)[0, 3], torch.tensor([10, 12.5, 17.5, 20, 20, 70, 70, 70]))


def test_halves_of_what_was_doubled_are_its_own():
    flat = torch.full((2, 8, 8), 31.0)
    nothing = torch.zeros(2, 16, 16, dtype=torch.bool)
    assert torch.allclose(halved(doubled(flat, nothing[:, ::2, ::2]), nothing)[0], flat)


# ---- A method with networks of half the size

class Filling(Painter):
    """Draws 30 HU where something is hidden, and what it sees elsewhere; remembers how large what it saw was."""

    def draw(self, images, hidden, bone, batch):
        self.seen = images.shape[-1]
        return torch.where(hidden & ~bone, 30.0, 0.0)


def test_surroundings_are_drawn_at_half_the_size_and_bone_stays():
    whole, half = painter(32), painter(16)
    half.__class__ = Filling
    method = Inpainting(InpaintingSettings(), whole.generator, whole.encoder, (0, 70), surroundings=half)
    hu = torch.full((1, 32, 32), 20.0)
    hu[:, :, :5] = 100.0
    found = method.from_surroundings(hu, hu > 90)
    assert half.seen == 16 and method.size == 32
    assert (found[:, :, 5:] == 30).all() and (found[:, :, :5] == 100).all()


@pytest.mark.parametrize("other", [painter(32), painter(16, (-20.0, 100.0))])
def test_networks_of_another_size_or_range_are_refused(other):
    whole = painter(32)
    with pytest.raises(CheckpointError, match="expected half the pixels and the same HU"):
        Inpainting(InpaintingSettings(), whole.generator, whole.encoder, (0, 70), surroundings=other)


# ---- Their training

def test_they_learn_from_slices_at_half_their_size(gan_run, slices32):
    """The networks are new, of half the channels; shapes and hidden parts are drawn into the halved slices."""
    config = EncoderConfig(hide=1.0, halved=True, lr_generator=2e-3, lr_trunk=2e-3, encoder_code=8, knee=0.05,
                           precision="fp32", batch=4, rotate=0, flip=False, jitter_hu=0, shapes=0)
    gan = load_snapshot(gan_run)
    one = InpaintingTrainer(config, gan, (-20.0, 180.0), torch.device("cpu"))
    assert (one.model.size, one.model.channel_max) == (16, gan.meta["model"]["channel_max"] // 2)
    data = SliceDataset(slices32, "train")
    slices = {key: torch.stack([data[i][key] for i in range(4)]) for key in ("hu", "brain")}
    batch = one.prepare(slices, torch.Generator().manual_seed(0))
    hu = slices["hu"].float().clamp(-20, 180)
    small, bone = halved(hu, hu >= 95)
    assert torch.allclose(batch["hu"], small, atol=1e-3) and torch.equal(batch["bone"], bone)
    assert batch["hidden"].shape == batch["brain"].shape == (4, 16, 16)
    first, *_, last = (one.learn(batch, i, full=False)["distance"].item() for i in range(15))
    assert last < 0.8 * first


def test_blocks_are_hidden_as_they_will_be():
    """At 64 pixels 20 x 20, every 32 pixels to both sides, anywhere; in as many images as said."""
    hidden = hide_blocks(40, 64, 0.5, torch.Generator().manual_seed(0))
    some = hidden[hidden.any(2).any(1)]
    assert 10 < len(some) < 30 and (some.sum((1, 2)) == 40 * 40).all()
    used = {tuple(one.flatten().tolist()) for one, _ in blocks(64, 40)}
    for one in some:
        assert torch.equal(one, one.roll(32, 0)) and torch.equal(one, one.roll(32, 1))
        rolled = {tuple(one.roll((y, x), (0, 1)).flatten().tolist()) for y in range(32) for x in range(32)}
        assert used <= rolled


def test_what_is_held_out_is_halved_to_be_measured(gan_run, slices32, tmp_path, monkeypatch):
    """Networks that draw 5 HU too much everywhere are 5 HU off, hidden or not."""
    config = EncoderConfig(hide=1.0, halved=True, lr_generator=1e-3, encoder_code=8, precision="fp32")
    one = InpaintingTrainer(config, load_snapshot(gan_run), (0.0, 70.0), torch.device("cpu"))
    held_out, shown = SliceDataset(slices32, "val"), []
    monkeypatch.setattr("gan.inpainting.hide_blocks", lambda *args: shown.append(args[1]) or hide_blocks(*args))
    monkeypatch.setattr("gan.inpainting.decode", lambda images: images[:, 1] * 40 + 45)
    one.draw = lambda images, hidden, bone: images
    found = one.validate(held_out, tmp_path, 0)
    assert shown == [16] and found["val_error_hu"] == pytest.approx(5, abs=1e-3)


@pytest.mark.parametrize("changes", [{"hide": 0}, {"lr_generator": 0}])
def test_new_networks_that_would_never_learn_are_refused(changes):
    with pytest.raises(ValueError, match="--halved: its networks are new"):
        EncoderConfig(**{"hide": 0.9, "lr_generator": 1e-3, "halved": True, **changes})


# ---- Runs and bundles

FLAGS = ["--preset", "smoke32", "--hide", "0.9", "--halved", "--batch", "4", "--encoder-code", "8", "--epochs", "0.5",
         "--lr-generator", "1e-3", "--precision", "fp32", "--device", "cpu"]


def halves(slices: Path, out: Path, *flags) -> int:
    return train_encoder.main(["--data", str(slices), "--out", str(out), *FLAGS, *map(str, flags)])


def reader(slices: Path, encoder: Path, out: Path, *flags) -> int:
    return train_reader.main([*map(str, ("--data", slices, "--encoder", encoder, "--out", out, "--preset", "smoke32",
                                         "--epochs", 0.25, "--batch", 4, "--device", "cpu", *flags))])


def stats(slices: Path, encoder: Path, out: Path, *flags) -> int:
    return latent_stats.main([*map(str, ("--data", slices, "--encoder", encoder, "--out", out, "--preset", "smoke32",
                                         "--precision", "fp32", "--device", "cpu", *flags))])


@pytest.fixture(scope="module")
def halves_run(slices32, gan_run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "halves"
    assert halves(slices32, out, "--gan", gan_run) == 0
    return out


@pytest.fixture(scope="module")
def model(slices32, hiding_run, halves_run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("models") / "model"
    assert stats(slices32, hiding_run, out, "--surroundings", halves_run, "--set", "method=inpainting") == 0
    return out


def test_a_bundle_holds_both(model, hiding_run, halves_run, slices32):
    loaded, meta = load_bundle(model, "cpu", "fp32"), json.loads((model / "model.json").read_text())
    assert sorted(path.stem for path in model.glob("*.safetensors")) == [
        "encoder", "generator", "surroundings_encoder", "surroundings_generator"]
    assert meta["provenance"]["surroundings"]["config"]["halved"] and meta["config"]["surroundings"]["size"] == 16
    method = loaded.reconstructor
    assert method.size == 32 and method.surroundings.size == 16
    trained = load_snapshot(halves_run).weights["generator"]
    kept = method.halves.generator.state_dict()
    assert all(torch.allclose(t, trained[key], atol=1e-2, rtol=1e-2) for key, t in kept.items())
    scan = SliceDataset(slices32, "val").scan(0)
    found = method.closest_normal(scan["hu"].float(), scan["brain"], scan["below_vertex_mm"].numpy())
    alone = Inpainting(method.settings, method.generator, method.encoder, method.range_hu)
    other = alone.closest_normal(scan["hu"].float(), scan["brain"], scan["below_vertex_mm"].numpy())
    assert found.normal_hu.isfinite().all() and not torch.equal(found.normal_hu, other.normal_hu)
    method.set_precision(torch.bfloat16)
    assert method.halves.encoder.compute_dtype == method.encoder.compute_dtype == torch.bfloat16


def test_a_reader_reads_beside_both_or_not_at_all(slices32, hiding_run, halves_run, model, tmp_path, capsys):
    assert reader(slices32, hiding_run, tmp_path / "both", "--surroundings", halves_run) == 0
    assert reader(slices32, hiding_run, tmp_path / "one") == 0
    assert reader(slices32, model, tmp_path / "model") == 0
    beside = [load_snapshot(tmp_path / name).meta["beside"] for name in ("both", "one", "model")]
    assert beside[0] == beside[2] != beside[1]
    of_model = origins.digest_of(load_bundle(model).reconstructor)
    assert origins.open_reader(tmp_path / "both", of_model).meta["beside"] == of_model
    with pytest.raises(ValueError, match="was taught beside other networks"):
        origins.open_reader(tmp_path / "one", of_model)


def test_networks_that_learnt_from_other_slices_are_refused(slices32, hiding_run, halves_run, tmp_path, capsys):
    other = with_held_out(halves_run, ["another"], tmp_path / "other")
    assert stats(slices32, hiding_run, tmp_path / "m", "--surroundings", other, "--set", "method=inpainting") == 2
    assert "has other held-out scans than" in capsys.readouterr().err


@pytest.mark.parametrize("older", ["encoder", "surroundings"])
def test_a_run_from_before_databases_told_their_held_out_slices_has_the_same(older, slices32, hiding_run, halves_run,
                                                                             tmp_path):
    """One of the two was said to be on another database."""
    runs = {"encoder": hiding_run, "surroundings": halves_run}
    earlier = {key: value for key, value in load_snapshot(runs[older]).meta["data"].items() if key != "val_digest"}
    runs[older] = with_meta(runs[older], tmp_path / "older", data=earlier)
    beside = origins.open_encoder_run(runs["encoder"])
    assert origins.open_surroundings(runs["surroundings"], beside).meta["held_out"] == ["head2"]


def test_networks_of_another_version_are_refused(slices32, hiding_run, halves_run, tmp_path, capsys):
    """A setting that this one does not know ended in a TypeError."""
    encoder, half = (with_meta(run, tmp_path / name, model=load_snapshot(run).meta["model"] | {"encoder_later": False})
                     for name, run in (("encoder", hiding_run), ("half", halves_run)))
    for call in (lambda: reader(slices32, encoder, tmp_path / "m"),
                 lambda: reader(slices32, hiding_run, tmp_path / "m", "--surroundings", half),
                 lambda: halves(slices32, tmp_path / "out", "--init", half)):
        assert call() == 2
        assert "not as this version knows them" in capsys.readouterr().err


def test_what_networks_for_the_surroundings_began_with_is_told_of(slices32, hiding_run, halves_run, tmp_path, capsys):
    """Of the encoder alone it was; their GAN, whose shape alone they have, teaches them nothing."""
    known = load_snapshot(halves_run).known()
    elsewhere = known | {"data": known["data"] | {"digest": "f" * 64, "val_digest": "e" * 64}}
    for name, changes, told in (("init", {"init": elsewhere}, True), ("gan", {"gan": elsewhere}, False)):
        half = with_meta(halves_run, tmp_path / name, **changes)
        assert stats(slices32, hiding_run, tmp_path / f"m-{name}", "--surroundings", half, "--calibrate", "none",
                     "--set", "method=inpainting", "measure=votes", "scan_score=mean") == 0
        said = capsys.readouterr().out
        assert (f"warning: {half}: its GAN, or a run of --init, was trained on another database" in said) == told
        assert f"warning: {hiding_run}" not in said


def test_what_is_known_to_have_taught_the_surroundings_calibrates_nothing(slices32, hiding_run, halves_run, tmp_path,
                                                                          capsys):
    """It held another scan of the same database out; there was no more than a warning."""
    first = load_snapshot(halves_run).known() | {"held_out": ["head0"]}
    half = with_meta(halves_run, tmp_path / "half", init=first)
    assert stats(slices32, hiding_run, tmp_path / "m", "--surroundings", half, "--set", "method=inpainting") == 2
    assert (f"--surroundings {half}: its GAN, or a run of --init, was trained on {slices32}, with other scans held "
            "out: head2 may be among its training scans") in capsys.readouterr().err


def test_a_bundle_tells_the_data_of_its_surroundings_where_these_are_others(slices32, hiding_run, halves_run):
    """A run on other scans, beside networks that were taught on these, with none held out."""
    meta, dataset, half = load_snapshot(hiding_run).meta, SliceDataset(slices32, "val"), load_snapshot(halves_run)
    meta = meta | {"gan": None, "data": meta["data"] | {"digest": "f" * 64, "val_digest": "e" * 64}}
    half = dataclasses.replace(half, meta=half.meta | {"held_out": []})
    known = origins.provenance(1, meta, half)
    assert known["data"]["digest"] == "f" * 64 and origins.learnt_by_networks(dataset, known) == ["head2"]
    assert origins.learnt_by_networks(dataset, origins.provenance(1, meta)) == []


def test_a_gan_of_which_nothing_goes_on_but_its_shape_has_seen_nothing(slices32, gan_run, tmp_path, capsys):
    other = with_held_out(gan_run, ["another"], tmp_path / "gan")
    assert halves(slices32, tmp_path / "halves", "--gan", other, "--epochs", 0.25) == 0
    assert "warning: --gan" not in capsys.readouterr().out
    whole = [flag for flag in FLAGS if flag != "--halved"]
    assert train_encoder.main([*map(str, ("--data", slices32, "--out", tmp_path / "whole", "--gan", other)), *whole,
                               "--epochs", "0.25"]) == 0
    assert f"warning: --gan {other}, or a run that it began with, did not hold out head2" in capsys.readouterr().out


def test_a_run_says_what_of_it_is_new(slices32, gan_run, halves_run, tmp_path, capsys):
    """Of a run with a GAN nothing was said to be, and with --init as well the GAN to go on."""
    for flags, begun in ((("--gan", gan_run), "held out; shape of the GAN, new networks;"),
                         (("--init", halves_run), "held out; no GAN, new discriminator;"),
                         (("--gan", gan_run, "--init", halves_run), "held out; shape of the GAN, new discriminator;")):
        assert halves(slices32, tmp_path / "".join(flags[::2]), *flags, "--epochs", 0.25) == 0
        assert begun in capsys.readouterr().out


def test_each_run_has_its_flag(slices32, hiding_run, halves_run, model, tmp_path, capsys):
    for call, said in (
            (lambda: stats(slices32, halves_run, tmp_path / "m"), "give it as --surroundings"),
            (lambda: reader(slices32, halves_run, tmp_path / "r"), "give it as --surroundings"),
            (lambda: stats(slices32, hiding_run, tmp_path / "m", "--surroundings", hiding_run,
                           "--set", "method=inpainting"), "give a run of train_encoder.py --halved"),
            (lambda: stats(slices32, hiding_run, tmp_path / "m", "--surroundings", halves_run,
                           "--set", "method=inversion"), "--surroundings: for method=inpainting, not inversion"),
            (lambda: stats(slices32, hiding_run, tmp_path / "m", "--set", "method=search"),
             "a run of train_encoder.py --hide, which is for method=inpainting; leave method=search out"),
            (lambda: stats(slices32, model, tmp_path / "m", "--surroundings", halves_run), "which has its own"),
            (lambda: reader(slices32, model, tmp_path / "r", "--surroundings", halves_run), "which has its own")):
        assert call() == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "m").exists() and not (tmp_path / "r").exists()


def test_a_run_and_a_models_halves_give_first_weights(slices32, gan_run, hiding_run, halves_run, model, tmp_path,
                                                      capsys):
    slow = ("--lr", 1e-30, "--lr-trunk", 1e-30, "--lr-generator", 1e-30)
    for first, tolerance in ((halves_run, 1e-6), (model, 1e-2)):                # a bundle's are float16
        out = tmp_path / first.name
        assert halves(slices32, out, "--init", first, *slow) == 0
        mine, theirs = (load_snapshot(run).weights["encoder"] for run in (out, halves_run))
        assert all(torch.allclose(mine[key], theirs[key], atol=tolerance, rtol=tolerance) for key in theirs)
    capsys.readouterr()
    assert halves(slices32, tmp_path / "other", "--init", hiding_run, "--gan", gan_run, "--hide", 0.5) == 2
    said = capsys.readouterr().err                                              # any --hide makes the same networks
    assert "its networks are not those of this run" in said and "--no-halved" in said and "--hide" not in said
    assert stats(slices32, hiding_run, tmp_path / "plain", "--set", "method=inpainting") == 0
    assert halves(slices32, tmp_path / "none", "--init", tmp_path / "plain") == 2
    assert "a model without networks of half the size" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="--halved"):
        origins.open_encoder_run(halves_run)


def test_a_reader_beside_halves_outlives_the_other_networks(slices32, gan_run, hiding_run, halves_run, tmp_path):
    """It reads beside what surroundings call for alone: another encoder's closest normals leave it as it is."""
    other = tmp_path / "encoder"
    assert train_encoder.main([*map(str, ("--data", slices32, "--gan", gan_run, "--out", other, "--preset", "smoke32",
                                          "--hide", 0.9, "--batch", 4, "--epochs", 0.25, "--encoder-code", 8))]) == 0
    pair = [origins.open_beside(run, torch.device("cpu"), "fp32", halves_run) for run in (hiding_run, other)]
    alone = [origins.open_beside(run, torch.device("cpu"), "fp32") for run in (hiding_run, other)]
    assert pair[0].digest == pair[1].digest and alone[0].digest != alone[1].digest
    assert pair[0].digest not in [one.digest for one in alone]


# ---- Without a mapping network

def test_bundles_hold_no_weights_that_random_codes_alone_go_through(model, hiding_run):
    """The generator of a method that draws from an encoder's codes keeps none of them, and says so when asked."""
    generator = load_bundle(model).reconstructor.generator
    assert has_mapping(load_snapshot(hiding_run).weights["generator"]) and not has_mapping(generator.state_dict())
    assert not any(has_mapping(load_file(path)) for path in model.glob("*generator.safetensors"))
    with pytest.raises(ValueError, match="kept without its mapping network"):
        generator(torch.zeros(1, 8))


def test_a_bundle_with_a_mapping_network_is_read_as_before(model, hiding_run, tmp_path):
    """Bundles of earlier versions hold it; a reader beside the one is at home beside the other."""
    networks = {name: t for name, t in load_snapshot(hiding_run).weights.items() if name in ("generator", "encoder")}
    for name, tensors in networks.items():
        save_file({key: t.half().contiguous() for key, t in tensors.items()}, tmp_path / f"{name}.safetensors")
    now = load_bundle(model).reconstructor
    before = load_networks(tmp_path, dataclasses.asdict(now.encoder.config), ("generator", "encoder"), now.device)
    assert before["generator"].mapping(torch.zeros(1, 8)).shape == (1, 8)
    earlier = Inpainting(now.settings, **before, range_hu=now.range_hu)
    assert origins.digest_of(earlier) == origins.digest_of(Inpainting(now.settings, now.generator, now.encoder,
                                                                      now.range_hu))
