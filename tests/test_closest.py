"""Closest normals drawn at half the size, by networks that see what surroundings call for where something is hidden."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import train_encoder
from bundling import origins
from common.weights import CheckpointError
from ct.window import decode, encode
from dataset import SliceDataset
from detect.bundle import load_bundle
from detect.inpainting import Inpainting, InpaintingSettings
from detect.painter import FilledPainter, Found, Painter
from gan import closest
from gan.closest import ClosestTrainer
from gan.settings import EncoderConfig
from gan.snapshots import load_snapshot
from model import Encoder, Generator, ModelConfig
from tests.reader_data import with_meta
from tests.test_halves import SHAPE, halves, reader, stats


def networks(filled: bool, size: int = 16) -> tuple[Generator, Encoder]:
    torch.manual_seed(0)
    config = ModelConfig(size=size, encoder_filled=filled, **SHAPE)
    return Generator(config).eval(), Encoder(config).eval()


def found(hidden: torch.Tensor, denser: torch.Tensor, expected_hu: float = 30.0) -> Found:
    return Found(torch.full(hidden.shape, expected_hu), hidden, hidden, denser)


# ---- A painter

def test_what_is_hidden_is_filled_and_its_side_is_told():
    """20 HU; hidden are 2 x 2 denser pixels, one less dense one and two beside bone: of half the size 1, -1/4 and 0."""
    hu, bone = torch.full((1, 32, 32), 20.0), torch.zeros(1, 32, 32, dtype=torch.bool)
    hidden, denser = torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    hidden[0, 4:6, 4:6] = denser[0, 4:6, 4:6] = hidden[0, 8, 8] = True
    bone[0, 12:14, 12:14] = hidden[0, 12, 12:14] = denser[0, 12, 12:14] = True
    hu[bone] = 90.0
    images, small_bone = FilledPainter(*networks(True), (0, 70)).filled(hu, found(hidden, denser), bone)
    small = decode(images[:, :3])
    assert images.shape == (1, 5, 16, 16) and small_bone.sum() == images[:, 4].sum() == 1 and small_bone[0, 6, 6]
    assert [small[0, at, at].item() for at in (2, 4, 6, 0)] == pytest.approx([30, 22.5, 70, 20], abs=1e-3)
    told = images[0, 3]
    assert told[2, 2] == 1 and told[4, 4] == -0.25 and told.count_nonzero() == 2


def test_they_are_drawn_at_half_the_size_a_few_at_a_time(monkeypatch):
    """Networks that draw what they see, and 5 HU more: what is hidden is 35 HU, the rest 25."""
    painter = FilledPainter(*networks(True), (0, 70))
    monkeypatch.setattr(painter.encoder, "redraw", lambda images, generator: encode(decode(images[:, :3]) + 5))
    hu, nothing = torch.full((3, 32, 32), 20.0), torch.zeros(3, 32, 32, dtype=torch.bool)
    hidden = nothing.clone()
    hidden[:, :16] = True
    drawn = painter.closest(hu, found(hidden, nothing), nothing, batch=2)
    assert painter.slice_size == 32 and drawn.shape == hu.shape
    assert torch.allclose(drawn[:, :14], torch.tensor(35.0), atol=1e-3)
    assert torch.allclose(drawn[:, 18:], torch.tensor(25.0), atol=1e-3)


def test_each_kind_of_networks_has_its_part():
    half, filled = networks(False), networks(True)
    beside = Inpainting(InpaintingSettings(), *filled, (0, 70), surroundings=Painter(*half, (0, 70)))
    assert beside.size == 32 and beside.surroundings.size == 16
    with pytest.raises(CheckpointError, match="need others beside them"):
        Inpainting(InpaintingSettings(), *filled, (0, 70))
    for kind, one in ((FilledPainter, half), (Painter, filled)):
        with pytest.raises(CheckpointError, match="in the place of those"):
            kind(*one, (0, 70))


# ---- Their training

@pytest.fixture(scope="module")
def halves_run(slices32, gan_run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "halves"
    assert halves(slices32, out, "--gan", gan_run) == 0
    return out


CONFIG = EncoderConfig(hide=0.5, halved=True, closest=True, adversarial=0, lr_generator=2e-3, lr_trunk=2e-3, knee=0.05,
                       encoder_code=8, precision="fp32", batch=4, rotate=0, flip=False, jitter_hu=0)


@pytest.fixture
def trainer(halves_run) -> ClosestTrainer:
    first = origins.open_first_networks(halves_run, True, "--surroundings")
    return ClosestTrainer(CONFIG, None, (-20.0, 180.0), torch.device("cpu"), surroundings=first)


def examples(trainer, slices32) -> dict[str, torch.Tensor]:
    data = SliceDataset(slices32, "train")
    slices = {key: torch.stack([data[i][key] for i in range(4)]) for key in ("hu", "brain")}
    return trainer.prepare(slices, torch.Generator().manual_seed(0))


def test_they_begin_as_the_networks_beside_them_and_learn_alone(trainer, slices32):
    fixed = trainer.method.halves
    before = {name: t.clone() for name, t in fixed.encoder.state_dict().items()}
    assert all(torch.equal(t, before[name]) for name, t in trainer.e.state_dict().items())
    batch = examples(trainer, slices32)
    assert batch["query"].shape == batch["hidden"].shape == (4, 32, 32)
    first, *_, last = (trainer.learn(batch, i, full=False)["distance"].item() for i in range(15))
    assert last < 0.8 * first and trainer.images_seen == 60
    assert all(torch.equal(t, before[name]) for name, t in fixed.encoder.state_dict().items())
    assert not all(torch.equal(t, before[name]) for name, t in trainer.e.state_dict().items())
    assert not any(p.requires_grad for network in fixed.networks().values() for p in network.parameters())


def test_what_is_hidden_besides_has_a_side_too(trainer):
    """What the gate finds has the side it was found by; elsewhere the query's own value tells."""
    hu, brain = torch.full((1, 32, 32), 30.0), torch.ones(1, 32, 32, dtype=torch.bool)
    hu[:, 8:16, 8:16], hu[:, 24:28] = 60.0, 31.0
    hidden = torch.zeros_like(brain)
    hidden[:, 20:28] = True
    trainer.method.from_surroundings = lambda query, bone: torch.full_like(query, 30.5)
    now = trainer.found({"query": hu, "brain": brain, "bone": ~brain, "hidden": hidden}, 1.0)
    assert now.hidden[:, 8:16, 8:16].all() and now.denser[:, 8:16, 8:16].all() and now.hidden[:, 20:28].all()
    assert not now.denser[:, 20:24].any() and now.denser[:, 24:28].all() and not now.anomalous[:, 20:].any()


def test_the_gate_lies_anywhere_in_its_range(trainer, monkeypatch):
    seen = []
    monkeypatch.setattr(Inpainting, "find_anomalous", lambda self, *_: seen.append(self.settings) or 1 / 0)
    for _ in range(50):
        with pytest.raises(ZeroDivisionError):
            trainer.found({"query": None, "brain": torch.ones(1) > 0, "bone": torch.ones(1) > 0}, trainer._gate())
    gates = [settings.gate_hu / 8 for settings in seen]
    assert closest.GATES[0] <= min(gates) < 0.8 and 0.95 < max(gates) <= closest.GATES[1]
    assert all(settings.grow_hu == pytest.approx(settings.gate_hu * 5 / 8) for settings in seen)


def test_errors_on_held_out_scans_by_hand(trainer, slices32, tmp_path, monkeypatch):
    """Drawn 3 HU off, 10 HU where something is hidden, here the upper half."""
    trainer.method.from_surroundings = lambda query, bone: query
    upper = torch.arange(32)[:, None] < 16

    def drawn(hu, found, bone, batch):
        return hu + torch.where(found.hidden, 10.0, 3.0)

    def gate(self, difference_hu, soft):
        return (upper.expand(soft.shape),) * 3

    monkeypatch.setattr(Inpainting, "gate", gate)
    monkeypatch.setattr(closest, "halved", None)
    monkeypatch.setattr(closest.Differing, "with_shapes", lambda self, found, rng, shares: found | {
        "query": found["hu"] + 1, "changed": (~upper).float().expand(found["hu"].shape)})
    trainer.method.painter.closest = drawn
    assert trainer.validate(SliceDataset(slices32, "val"), tmp_path, 1) == {
        "val_error_hu": pytest.approx(6.5, abs=2), "val_hidden_hu": pytest.approx(10, abs=1e-3),
        "val_changed_hu": pytest.approx(4, abs=1e-3)}
    assert (tmp_path / "reconstructions-001.png").is_file()


@pytest.mark.parametrize("changes, said", [({"halved": False}, "--closest: its networks begin as"),
                                           ({"adversarial": 0.1}, "--closest: has no adversary"),
                                           ({"gated": 0.5}, "--closest: has no adversary")])
def test_flags_of_no_part_in_it_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        EncoderConfig(**{"hide": 0.5, "halved": True, "closest": True, "lr_generator": 1e-3, "adversarial": 0}
                      | changes)


# ---- Runs and bundles

def closest_run(slices: Path, out: Path, *flags) -> int:
    return train_encoder.main([*map(str, ("--data", slices, "--out", out, "--preset", "smoke32", "--hide", 0.2,
                                          "--halved", "--closest", "--adversarial", 0, "--batch", 4, "--encoder-code",
                                          8, "--epochs", 0.5, "--lr-generator", 1e-3, "--precision", "fp32",
                                          "--device", "cpu", *flags))])


@pytest.fixture(scope="module")
def run(slices32, halves_run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "closest"
    assert closest_run(slices32, out, "--surroundings", halves_run) == 0
    return out


@pytest.fixture(scope="module")
def model(slices32, run, halves_run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("models") / "model"
    assert stats(slices32, run, out, "--surroundings", halves_run, "--set", "method=inpainting") == 0
    return out


def test_a_bundle_draws_as_its_runs_do(model, run, halves_run, slices32):
    method, scan = load_bundle(model, "cpu", "fp32").reconstructor, SliceDataset(slices32, "val").scan(0)
    assert type(method.painter) is FilledPainter and method.size == 32 == 2 * method.generator.config.size
    taught = load_snapshot(run).weights["encoder"]
    assert all(torch.allclose(t, taught[key], atol=1e-2, rtol=1e-2) for key, t in method.encoder.state_dict().items())
    drawn = method.closest_normal(scan["hu"].float(), scan["brain"], scan["below_vertex_mm"].numpy())
    assert drawn.normal_hu.isfinite().all() and drawn.normal_hu.shape == scan["hu"].shape
    known = json.loads((model / "model.json").read_text())["provenance"]
    assert known["encoder"]["config"]["closest"] and known["init"]["config"]["halved"]
    assert not known["surroundings"]["config"].get("closest")


def test_a_reader_and_further_training_have_their_networks(slices32, run, halves_run, model, tmp_path, capsys):
    assert reader(slices32, run, tmp_path / "reader", "--surroundings", halves_run) == 0
    assert load_snapshot(tmp_path / "reader").meta["beside"] == load_snapshot(run).meta["surroundings"]
    slow = ("--lr", 1e-30, "--lr-trunk", 1e-30, "--lr-generator", 1e-30)
    for surroundings, first in ((halves_run, run), (model, model)):
        out = tmp_path / first.name
        assert closest_run(slices32, out, "--surroundings", surroundings, "--init", first, *slow) == 0
        mine, theirs = (load_snapshot(one).weights["encoder"] for one in (out, run))
        assert all(torch.allclose(mine[key], theirs[key], atol=1e-2, rtol=1e-2) for key in theirs)


def test_each_run_has_its_flag(slices32, run, halves_run, gan_run, tmp_path, capsys):
    other = with_meta(run, tmp_path / "other", surroundings="0" * 64)
    out = tmp_path / "m"
    for call, said in (
            (lambda: stats(slices32, run, out, "--set", "method=inpainting"), "was --surroundings there"),
            (lambda: stats(slices32, run, out, "--set", "method=inversion"), "was --surroundings there"),
            (lambda: reader(slices32, run, out), "was --surroundings there"),
            (lambda: stats(slices32, run, out, "--surroundings", run, "--set", "method=inpainting"),
             "--halved without --closest"),
            (lambda: stats(slices32, other, out, "--surroundings", halves_run, "--set", "method=inpainting"),
             "were taught beside others"),
            (lambda: closest_run(slices32, out, "--init", halves_run), "--surroundings: expected with --closest"),
            (lambda: closest_run(slices32, out, "--gan", gan_run, "--surroundings", halves_run),
             "--surroundings: expected with --closest"),
            (lambda: halves(slices32, out, "--surroundings", halves_run), "--surroundings: expected with --closest"),
            (lambda: halves(slices32, out, "--init", run), "its networks are not those of this run")):
        assert call() == 2
        assert said in capsys.readouterr().err
    assert not out.exists()


def test_a_run_of_before_there_were_such_networks_goes_on(slices32, gan_run, halves_run, tmp_path):
    """Its model does not say that its encoder is not of this kind."""
    known = load_snapshot(halves_run).meta["model"]
    known = {key: known[key] for key in known if key != "encoder_filled"}
    earlier = with_meta(halves_run, tmp_path / "run", model=known)
    assert halves(slices32, earlier, "--gan", gan_run, "--epochs", 0.75) == 0
