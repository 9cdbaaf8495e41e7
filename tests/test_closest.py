"""Closest normals drawn at half the size, by networks that see what surroundings call for where something is hidden."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bundling import build, origins
from common.weights import CheckpointError
from ct.window import decode, encode
from dataset import SliceDataset
from detect.bundle import load_bundle
from detect.inpainting import Inpainting, InpaintingSettings
from detect.options import StatsConfig
from detect.painter import FilledPainter, Found, Painter
from detect.settings import Settings
from gan import closest
from gan.closest import ClosestTrainer
from gan.settings import EncoderConfig
from gan.snapshots import load_snapshot
from model import Encoder, Generator, ModelConfig
from tests.halves_data import SHAPE, halves, reader, stats
from tests.halves_data import closest as closest_run
from tests.reader_data import with_meta


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


def test_what_is_healthy_is_what_counts(trainer, slices32, monkeypatch):
    """The goal is the slice without shapes; a pixel weighs by what of it is hidden and changed, hardly outside."""
    hu, nothing = torch.full((1, 32, 32), 30.0), torch.zeros(1, 32, 32, dtype=torch.bool)
    changed, hidden, brain = torch.zeros(1, 32, 32), nothing.clone(), ~nothing
    changed[:, :8], hidden[:, 4:12], brain[:, 24:] = 0.5, True, False
    seen = {}
    monkeypatch.setattr(closest, "weighted_distance", lambda real, fake, weight, knee, gradient: seen.update(
        real=decode(real), weight=weight) or (fake * 0).sum())
    trainer.found = lambda examples, gate: found(examples["hidden"], nothing)
    trainer.learn({"hu": hu, "query": hu + 20, "brain": brain, "bone": nothing, "changed": changed, "hidden": hidden},
                  0, False)
    assert torch.allclose(seen["real"], torch.tensor(30.0), atol=1e-3)
    h, c = CONFIG.hidden, CONFIG.changed
    assert seen["weight"][0, ::2, 0].tolist() == pytest.approx(
        [1.1 + c / 2, 1.1 + h + c / 2, 1.1 + h, 1.1, 1.1, 1.1, 0.1, 0.1], abs=1e-5)


def test_some_are_hidden_besides(trainer, slices32):
    """Of half of the slices something, by --hide."""
    data, rng = SliceDataset(slices32, "train"), torch.Generator().manual_seed(1)
    slices = {key: torch.stack([data[i % len(data)][key] for i in range(200)]) for key in ("hu", "brain")}
    assert 80 <= trainer.prepare(slices, rng)["hidden"].any(2).any(1).sum() <= 120


# ---- Runs and bundles

@pytest.fixture(scope="module")
def run(slices32, halves_run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "closest"
    assert closest_run(slices32, out, "--surroundings", halves_run) == 0
    return out


@pytest.fixture(scope="module")
def model(slices32, run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("models") / "model"
    assert stats(slices32, run, out, "--set", "method=inpainting") == 0
    return out


def same(mine, theirs, tolerance: float = 1e-2) -> bool:
    return all(torch.allclose(t, theirs[key].to(t), atol=tolerance, rtol=tolerance) for key, t in mine.items())


def test_a_bundle_draws_as_its_run_does(model, run, halves_run, slices32):
    """It holds the networks for the surroundings that the run was taught beside."""
    method, scan = load_bundle(model, "cpu", "fp32").reconstructor, SliceDataset(slices32, "val").scan(0)
    assert type(method.painter) is FilledPainter and method.size == 32 == 2 * method.generator.config.size
    assert same(method.encoder.state_dict(), load_snapshot(run).weights["encoder"])
    assert same(method.halves.encoder.state_dict(), load_snapshot(halves_run).weights["encoder"])
    drawn = method.closest_normal(scan["hu"].float(), scan["brain"], scan["below_vertex_mm"].numpy())
    assert drawn.normal_hu.isfinite().all() and drawn.normal_hu.shape == scan["hu"].shape
    known = json.loads((model / "model.json").read_text())["provenance"]
    assert known["encoder"]["config"]["closest"] and known["init"] is None
    assert known["surroundings"]["config"]["halved"] and not known["surroundings"]["config"].get("closest")


def test_a_run_goes_on_from_runs_and_models(slices32, run, halves_run, model, gan_run, tmp_path):
    """Of --init come the weights, of --surroundings what they are taught beside."""
    slow = ("--lr", 1e-30, "--lr-trunk", 1e-30, "--lr-generator", 1e-30)
    other = tmp_path / "halves"
    assert halves(slices32, other, "--gan", gan_run, "--epochs", 0.25) == 0
    for surroundings, first in ((other, run), (model, model)):
        out = tmp_path / first.name
        assert closest_run(slices32, out, "--surroundings", surroundings, "--init", first, *slow) == 0
        made = load_snapshot(out).weights
        beside = other if surroundings == other else halves_run
        assert same(made["encoder"], load_snapshot(run).weights["encoder"])
        assert same(made["surroundings_encoder"], load_snapshot(beside).weights["encoder"])
        assert not same(made["surroundings_encoder"], load_snapshot(run).weights["encoder"], 1e-4)
    assert stats(slices32, tmp_path / "model", tmp_path / "bundle", "--set", "method=inpainting") == 0


def test_a_reader_reads_beside_a_run_and_its_bundle(slices32, run, halves_run, model, tmp_path):
    assert reader(slices32, run, tmp_path / "reader") == 0
    beside = origins.digest_of(load_bundle(model).reconstructor)
    assert load_snapshot(tmp_path / "reader").meta["beside"] == beside


def test_what_taught_the_surroundings_has_taught_the_run(slices32, run, tmp_path, capsys):
    """They held another scan of the same database out."""
    first = load_snapshot(run).meta["surroundings"] | {"held_out": ["head0"]}
    copy = with_meta(run, tmp_path / "run", surroundings=first)
    assert stats(slices32, copy, tmp_path / "m", "--set", "method=inpainting") == 2
    assert "head2 may be among its training scans" in capsys.readouterr().err
    told = origins.taught(1, load_snapshot(copy).meta)
    assert told["surroundings"]["held_out"] == 1


def test_a_bundle_tells_the_data_of_its_surroundings_where_these_are_others(slices32, run):
    """A run on other scans, beside networks that were taught on these, with none held out."""
    meta, dataset = load_snapshot(run).meta, SliceDataset(slices32, "val")
    elsewhere = meta["data"] | {"digest": "f" * 64, "val_digest": "e" * 64}
    known = origins.provenance(1, meta | {"data": elsewhere, "surroundings": meta["surroundings"] | {"held_out": []}})
    assert known["data"]["digest"] == "f" * 64 and origins.learnt_by_networks(dataset, known) == ["head2"]
    own = origins.provenance(1, meta | {"data": elsewhere})
    assert origins.learnt_by_networks(dataset, own) == []


def test_each_run_has_its_flag(slices32, run, halves_run, hiding_run, gan_run, tmp_path, capsys):
    out = tmp_path / "m"
    for call, said in (
            (lambda: stats(slices32, run, out, "--surroundings", halves_run, "--set", "method=inpainting"),
             "holds the networks for that"),
            (lambda: reader(slices32, run, out, "--surroundings", halves_run), "holds the networks for that"),
            (lambda: stats(slices32, run, out, "--set", "method=inversion"), "for method=inpainting; leave"),
            (lambda: stats(slices32, hiding_run, out, "--set", "method=search"), "for method=inpainting; leave"),
            (lambda: stats(slices32, hiding_run, out, "--surroundings", run, "--set", "method=inpainting"),
             "--halved without --closest"),
            (lambda: closest_run(slices32, out, "--surroundings", run), "--halved without --closest"),
            (lambda: closest_run(slices32, out, "--surroundings", hiding_run), "--halved without --closest"),
            (lambda: closest_run(slices32, out, "--init", halves_run), "--surroundings: expected with --closest"),
            (lambda: closest_run(slices32, out, "--gan", gan_run, "--surroundings", halves_run),
             "--surroundings: expected with --closest"),
            (lambda: halves(slices32, out, "--surroundings", halves_run), "--surroundings: expected with --closest"),
            (lambda: halves(slices32, out, "--init", run), "its networks are not those of this run")):
        assert call() == 2
        assert said in capsys.readouterr().err
    assert not out.exists()
    wide = ("--encoder-width", 0.5)
    for flags, named in ((("--surroundings", halves_run), halves_run),
                         (("--surroundings", halves_run, "--init", hiding_run), hiding_run)):
        assert closest_run(slices32, out, *flags, *(wide if named == halves_run else ())) == 2
        said = capsys.readouterr().err
        assert f"{'--surroundings' if named == halves_run else '--init'} {named}: its networks are not" in said
        assert "closest" not in said.split("; give")[1] and "--gan" not in said


def test_folds_may_be_of_before_there_were_such_networks(slices32, hiding_run, tmp_path):
    """Runs from before do not say that their encoder is not of this kind."""
    told = load_snapshot(hiding_run).meta["model"]
    earlier = with_meta(hiding_run, tmp_path / "run", model={key: told[key] for key in told if key != "encoder_filled"})
    trained = [build.open_encoder(slices32, one, "--encoder", StatsConfig(), Settings().changed(["method=inpainting"]),
                                  build.Target(tmp_path / "m", torch.device("cpu"))) for one in (hiding_run, earlier)]
    assert trained[0].networks == trained[1].networks


def test_a_run_of_before_there_were_such_networks_goes_on(slices32, gan_run, halves_run, tmp_path):
    """Its model does not say that its encoder is not of this kind."""
    known = load_snapshot(halves_run).meta["model"]
    known = {key: known[key] for key in known if key != "encoder_filled"}
    earlier = with_meta(halves_run, tmp_path / "run", model=known)
    assert halves(slices32, earlier, "--gan", gan_run, "--epochs", 0.75) == 0


def test_a_run_of_networks_that_are_not_known_is_told_apart(slices32, gan_run, halves_run, tmp_path, capsys):
    known = load_snapshot(halves_run).meta["model"]
    later = with_meta(halves_run, tmp_path / "run", model=known | {"encoder_later": True})
    assert halves(slices32, later, "--gan", gan_run) == 2
    assert "has another model (model.encoder_later" in capsys.readouterr().err
