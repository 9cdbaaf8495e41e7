"""latent_stats.py: from a database and runs of trainings to a model bundle."""

import dataclasses
import json
import math
import os
import shutil
import signal
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import latent_stats
from benchmarks import cross_validation
from bundling import build, origins
from common.weights import CheckpointError
from ct.frame import PreprocessSettings
from dataset import ScanRecord, SliceDataset, SliceWriter
from detect.bundle import load_bundle
from detect.calibration import Trained
from detect.options import StatsConfig
from detect.reconstruct import METHODS
from detect.search import SearchSettings
from detect.settings import Settings
from gan.run_folder import load_run
from gan.snapshots import load_snapshot, save_snapshot
from latent_stats import read_notes, report_size
from model import Discriminator, Encoder, Generator
from tests.calibration_data import PREPROCESSING, SETTINGS, TINY, command, write_inputs, write_run, write_slices
from tests.reader_data import with_meta


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def test_end_to_end(inputs, tmp_path, capsys):
    out = tmp_path / "mine"
    assert command(*inputs, out, "--positions", "12", "--set", "steps_latent=2", "steps_noise=1",
                   "--provenance", "made by a test") == 0

    bundle = load_bundle(out)
    latent = bundle.reconstructor.latent
    assert latent.components.shape[-1] == 4
    # 25 training slices, three passes: 75 codes, 15 at each of 0, 5, .. 20 mm; 32 of them within 20 mm
    # up to 30 mm below the vertex (10, 15 and 20 mm: 45 codes), not at 35 (15 and 20 mm: 30 codes).
    assert latent.positions_mm.tolist() == [0, 5, 10, 15, 20, 25, 30]
    assert "35 mm below the vertex: left out, 30 codes within 20 mm, 32 needed" in capsys.readouterr().out

    meta = bundle.meta
    assert PreprocessSettings.from_json(meta["preprocessing"]) == PREPROCESSING
    assert bundle.settings == Settings("search", SearchSettings(steps_latent=2, steps_noise=1))
    assert meta["provenance"]["name"] == "mine" and meta["provenance"]["notes"] == "made by a test"
    assert meta["provenance"]["encoder"]["images_seen"] == 50 and meta["provenance"]["gan"]["config"] == {"kimg": 0.007}
    assert meta["provenance"]["latent_stats"]["components"] == 4
    assert "steps_latent" not in meta["provenance"]["latent_stats"]

    calibration = meta["calibration"]
    assert calibration["split"] == "val" and calibration["scans"] == 1 and calibration["precision"] == "float32"
    scores = [one["score"] for one in calibration["slice_scores"]]
    assert [one["below_vertex_mm"] for one in calibration["slice_scores"]] == [20, 15, 10, 5, 0]
    assert calibration["scan_scores"]["max"] == [pytest.approx(max(scores))]
    assert calibration["scan_scores"]["top3"] == [pytest.approx(sum(sorted(scores)[-3:]) / 3)]
    assert calibration["scan_scores"]["mean"] == [pytest.approx(sum(scores) / 5)]
    assert min(scores) > 0
    threshold = calibration["threshold"]
    assert threshold["max"] is None and "needs 19 healthy scans, found 1" in threshold["reason"]
    assert all(0 < error < 200 for error in calibration["error_hu"].values())
    scan = SliceDataset(inputs[0], "val").scan(0)
    assert calibration["healthy"]["brain_hu"] == [pytest.approx(np.median(scan["hu"][scan["brain"]]), abs=1)]
    assert calibration["healthy"]["error_hu"] == [calibration["error_hu"]["latent"]]


def test_without_calibration_and_overwriting(inputs, tmp_path, capsys):
    out = tmp_path / "mine"
    assert command(*inputs, out, "--calibrate", "none", "--name", "first") == 0
    assert load_bundle(out).meta["calibration"] is None
    assert "mine: 0." in capsys.readouterr().out                                    # MB

    assert command(*inputs, out, "--calibrate", "none", "--name", "second") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert load_bundle(out).meta["provenance"]["name"] == "first"

    assert command(*inputs, out, "--calibrate", "none", "--name", "second", "--overwrite") == 0
    assert load_bundle(out).meta["provenance"]["name"] == "second"


def test_calibrates_the_weights_it_stores(inputs, tmp_path, monkeypatch):
    projected = []

    def remember(folds, *rest):
        projected.extend(fold.reconstructor.encoder.final_linear.weight.clone() for fold in folds)
        return real(folds, *rest)

    real = build.calibrate
    monkeypatch.setattr(build, "calibrate", remember)
    assert command(*inputs, tmp_path / "mine") == 0
    stored = load_bundle(tmp_path / "mine").reconstructor.encoder.final_linear.weight
    assert len(projected) == 1 and torch.equal(projected[0], stored) and torch.equal(stored, stored.half().float())


def refused(capsys, *args):
    code = command(*args)
    return code, capsys.readouterr().err


def test_refuses_a_run_of_another_kind(inputs, tmp_path, capsys):
    run = write_run(tmp_path / "gan", SliceDataset(inputs[0]).manifest, kind="gan")
    code, message = refused(capsys, inputs[0], run, tmp_path / "mine")
    assert code == 2 and "--encoder" in message and "train_encoder.py" in message
    run = tmp_path / "reader"                                  # its meta know nothing of a size
    save_snapshot(run, 1, {}, {}, {"kind": "reader", "model": {"widths": [24]}})
    code, message = refused(capsys, inputs[0], run, tmp_path / "mine")
    assert code == 2 and "--encoder" in message and "train_encoder.py" in message


def test_refuses_another_database(inputs, tmp_path, capsys):
    # Same slices, other split: what is held out here was trained on there.
    other = write_slices(tmp_path / "other.lmdb", held_out=(4, 5))
    code, message = refused(capsys, other, inputs[1], tmp_path / "mine")
    assert code == 2 and "--data" in message and "counts" in message


def test_refuses_to_calibrate_on_nothing(tmp_path, capsys):
    data = write_slices(tmp_path / "healthy.lmdb", held_out=())
    run = write_run(tmp_path / "encoder", SliceDataset(data).manifest)
    code, message = refused(capsys, data, run, tmp_path / "mine")
    assert code == 2 and "--calibrate none" in message
    assert command(data, run, tmp_path / "mine", "--calibrate", "none") == 0


@pytest.mark.parametrize("flags, expected", [
    (("--components", "17"), "--components 17: the codes of this encoder have 16 numbers"),
    (("--passes", "1"), "raise --passes"),
    (("--provenance", "missing.json"), "--provenance missing.json"),
    (("--set", "perceptual=lpips"), "vgg16"),
    (("--device", "tpu"), "--device tpu"),
])
def test_errors_name_the_flag(inputs, tmp_path, capsys, flags, expected):
    # 25 codes in one pass are fewer than the 32 that any position needs.
    code, message = refused(capsys, *inputs, tmp_path / "mine", *flags)
    assert code == 2 and expected in message and not (tmp_path / "mine").exists()


def test_a_database_of_another_preprocessing_calibrates_nothing(inputs, tmp_path, capsys, monkeypatch):
    """The bundle said that it was calibrated by today's, and gave percentiles among scans of other brain masks."""
    monkeypatch.setattr("ct.frame.VERSION", 2)
    assert command(*inputs, tmp_path / "mine") == 2
    error = capsys.readouterr().err
    assert "healthy.lmdb: was prepared by version 1 of the preprocessing, and new scans are by version 2" in error
    assert command(*inputs, tmp_path / "mine", "--calibrate", "none") == 0


def test_a_stopped_calibration_leaves_no_weights_behind(inputs, tmp_path, monkeypatch):
    """SIGTERM, a time limit's, ended it on the spot, and a copy of the networks stayed in the temporary folder."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def stop(*args):
        assert list(temporary.rglob("generator.safetensors"))
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL             # or the tests would end here
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(build, "calibrate", stop)
    try:
        with pytest.raises(SystemExit) as stopped:
            command(*inputs, tmp_path / "mine")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 143 and not any(temporary.iterdir()) and not (tmp_path / "mine").exists()


def test_a_scan_that_cannot_be_judged_is_named(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("detect.inversion.draw", lambda *args: torch.full((5, 3, 32, 32), torch.nan))
    assert command(*inputs, tmp_path / "mine", "--set", "method=inversion") == 2
    assert "healthy.lmdb: head5: median2d: the input holds NaN" in capsys.readouterr().err


def test_missing_run_and_data(inputs, tmp_path, capsys):
    assert command(inputs[0], tmp_path / "nowhere", tmp_path / "mine") == 2
    assert "nowhere" in capsys.readouterr().err
    assert command(tmp_path / "nothing.lmdb", inputs[1], tmp_path / "mine") == 2
    assert "nothing.lmdb" in capsys.readouterr().err


def test_options_must_be_positive(inputs, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        command(*inputs, tmp_path / "mine", "--passes", "0")
    assert "--passes" in capsys.readouterr().err


def test_refuses_torchrun(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, message = refused(capsys, *inputs, tmp_path / "mine")
    assert code == 2 and "torchrun" in message


def test_notes(tmp_path):
    path = tmp_path / "notes.json"
    path.write_text(json.dumps({"machine": "one core"}))
    assert read_notes(str(path)) == {"machine": "one core"}
    assert read_notes("two hours on one core") == "two hours on one core"
    assert read_notes(None) is None
    path.write_text("not json")
    with pytest.raises(ValueError, match="notes.json"):
        read_notes(str(path))


def test_size_warns_when_large(tmp_path):
    (tmp_path / "model.json").write_bytes(b"0" * 500_000)
    (tmp_path / "latent.safetensors").write_bytes(b"0" * 24_000_000)
    assert "24.5 MB" in report_size(tmp_path, 16) and "warning" not in report_size(tmp_path, 16)
    (tmp_path / "latent.safetensors").write_bytes(b"0" * 26_000_000)
    assert "fewer --components than 16" in report_size(tmp_path, 16)


def test_presets():
    assert {name: preset.components for name, preset in latent_stats.PRESETS.items()} == {
        "paper512": 512, "ct256": 16, "ct128": 16, "noise128": 16, "smoke32": 4}
    of = {name: Settings().changed(texts) for name, texts in latent_stats.SETTINGS.items()}
    assert of["paper512"] == Settings("search")
    assert of["ct128"] == Settings("inpainting", measure="surprise", scan_score="top3")
    assert latent_stats.SETTINGS.keys() == latent_stats.PRESETS.keys()
    assert math.isclose(latent_stats.PRESETS["paper512"].spacing_mm * 31, 155)


@pytest.mark.parametrize("method", METHODS)
def test_batch_is_a_setting_of_the_method(method, capsys):
    """--batch 4 was for the search's codes alone, and a GPU too small for 32 slices stayed too small."""
    settings = build.changed_settings(Settings(), [f"method={method}"], batch=4)
    noted = "note: --batch: of no use to method=" in capsys.readouterr().out
    assert getattr(settings.reconstruction, "batch", None) == (None if noted else 4) and noted == (method == "pca")
    assert settings.to_json() == Settings(method).to_json()
    if not noted:
        named = [f"method={method}", "batch=8"]
        assert build.changed_settings(Settings(), named, batch=4).reconstruction.batch == 8
    assert build.changed_settings(Settings(), [f"method={method}"]) == Settings(method)


def fold_inputs(folder):
    """The same six scans twice; heads 4 and 5 held out in one database, 0 and 1 in the other; a run for each."""
    folds = []
    for name, held_out in (("a", (4, 5)), ("b", (0, 1))):
        path = write_slices(folder / f"{name}.lmdb", held_out)
        folds.append((path, write_run(folder / f"run-{name}", SliceDataset(path).manifest)))
    return folds


def test_folds_add_their_held_out_scans(tmp_path):
    one, other = fold_inputs(tmp_path)
    flags = ["--set", "method=inversion", "measure=surprise", "filter=band", "pool=peak", "scale=sides",
             "surprise_above=0.5", "--fold", *map(str, other)]
    assert command(*one, tmp_path / "mine", *flags) == 0
    meta = load_bundle(tmp_path / "mine").meta
    assert meta["calibration"]["scans"] == 4
    assert [fold["held_out"] for fold in meta["provenance"]["folds"]] == [2, 2]
    assert all(score > 0 for score in meta["calibration"]["scan_scores"]["top3"])


def test_a_fold_may_be_of_before_a_setting_of_its_networks(inputs, tmp_path):
    """It does not tell of the setting, and has the default."""
    data, run = inputs
    told = load_snapshot(run).meta["model"]
    earlier = with_meta(run, tmp_path / "run", model={key: told[key] for key in told if key != "code_channels"})
    target = build.Target(tmp_path / "model", torch.device("cpu"))
    one, other = (build.open_encoder(data, folder, "--encoder", StatsConfig(), Settings("inversion"), target)
                  for folder in (run, earlier))
    assert one.networks == other.networks


def test_the_first_of_several_is_the_model_and_each_calibrates_by_its_own_scans(tmp_path, monkeypatch):
    """As readers of folds do: of one database, but not of the same held-out scans."""
    saved, judged = [], []
    monkeypatch.setattr(build, "check_held_out", lambda *_: None)
    monkeypatch.setattr(build, "save_bundle", lambda out, method, *_, **__: saved.append((out, method)) or out)
    monkeypatch.setattr(build, "load_bundle", lambda *_: SimpleNamespace(
        with_settings=lambda _, method=saved[-1][1]: SimpleNamespace(reconstructor=method + ", as saved")))
    monkeypatch.setattr(build, "SliceDataset", lambda path, split, check, scans=None: (path, split, scans))
    monkeypatch.setattr(build, "calibration_of", lambda folds, settings: judged.extend(folds) or ({}, None))
    data, out = SimpleNamespace(manifest={"settings": {}}), tmp_path / "model"
    several = [Trained(data, tmp_path, {}, {}, lambda name=name: name, [scan])
               for name, scan in (("a", "x"), ("b", "y"))]
    assert build.write(several, Settings(), {}, build.Target(out, torch.device("cpu"))) == out
    assert [(one.reconstructor, one.held_out) for one in judged] == [
        ("a, as saved", (tmp_path, "val", ["x"])), ("b, as saved", (tmp_path, "val", ["y"]))]
    assert saved[-1] == (out, "a") and [method for _, method in saved] == ["a", "b", "a"]


def test_a_fold_of_another_split_is_refused(tmp_path, capsys):
    (one, run), (other, _) = fold_inputs(tmp_path)
    snapshot = load_snapshot(run)
    meta = {**snapshot.meta, "held_out": ["head4", "head5"]}
    networks = {"generator": Generator(TINY), "discriminator": Discriminator(TINY), "encoder": Encoder(TINY)}
    save_snapshot(tmp_path / "told", 50, networks, {}, meta)
    assert command(other, tmp_path / "told", tmp_path / "mine") == 2
    assert "holds other scans out than the database" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["init", "gan"])
def test_what_is_known_to_have_taught_a_run_calibrates_and_judges_nothing(flag, inputs, tmp_path, capsys):
    """Its model was refused, and the run, which knows more, was taken with a warning or without a word. With a run on
    another database, of which nothing is known, and without a calibration there is the warning alone."""
    data, run = inputs
    meta, cpu = load_snapshot(run).meta, torch.device("cpu")
    first = {key: value for key, value in meta.items() if key != "gan"} | {"step": 7, "held_out": ["head0"]}
    first["data"] = first["data"] | {"val_digest": "0" * 64}
    encoder, model = with_meta(run, tmp_path / "encoder", **{flag: first}), tmp_path / "model"
    elsewhere = first | {"data": first["data"] | {"digest": "f" * 64}}
    other = with_meta(run, tmp_path / "other", **{flag: elsewhere})
    for one, out, more in ((encoder, model, ("--calibrate", "none")), (other, tmp_path / "warned", ())):
        assert command(data, one, out, *more) == 0
        assert f"warning: {one}: its GAN, or a run of --init, was trained on another" in capsys.readouterr().out
    for one in (encoder, model):
        assert command(data, one, tmp_path / "no") == 2 and not (tmp_path / "no").exists()
        assert "other scans held out: head5 may be among its training scans; give" in capsys.readouterr().err
    for opened, one in ((cross_validation.open_fold, encoder), (cross_validation.open_model, model)):
        with pytest.raises(ValueError, match="other scans held out, and may have learnt from head5; give"):
            opened(data, one, cpu)
    assert cross_validation.open_fold(data, other, cpu)[0].scan_ids == ["head5"]


def test_a_scan_held_out_twice_is_refused(tmp_path, capsys):
    one, _ = fold_inputs(tmp_path)
    assert command(*one, tmp_path / "mine", "--fold", *map(str, one)) == 2
    assert "head4, head5 held out in" in capsys.readouterr().err


def test_a_reader_that_has_seen_all_is_named(inputs, monkeypatch):
    """Beside readers of all folds it was taken for a database that holds nothing out."""
    data = SliceDataset(inputs[0])
    trained = Trained(data, inputs[0], {}, {}, lambda: None)
    unseen = {"one": ["head5"], "all": []}
    monkeypatch.setattr(build, "digest_of", lambda method: "")
    monkeypatch.setattr(build, "with_reader", lambda trained, run, *rest: dataclasses.replace(
        trained, scans=unseen[run], provenance={"reader": run}))
    settings, device = Settings("inversion", measure="surprise"), torch.device("cpu")
    with pytest.raises(ValueError, match="--reader all: may have been trained on all scans that are to calibrate"):
        build.with_readers(trained, ["one", "all"], settings, device)
    assert [one.scans for one in build.with_readers(trained, ["one"], settings, device)] == [["head5"]]


@pytest.fixture(scope="module")
def bundle(inputs, tmp_path_factory):
    """A model bundle of the run, not calibrated."""
    out = tmp_path_factory.mktemp("bundle") / "mine"
    assert command(*inputs, out, "--calibrate", "none") == 0
    return out


def test_a_bundle_and_a_run_share_no_folder(inputs, bundle, tmp_path, capsys):
    """Every later call took the bundle's old weights in place of the run's that went on."""
    for more in ((), ("--overwrite",)):
        code, message = refused(capsys, *inputs, inputs[1], "--calibrate", "none", *more)
        assert code == 2 and message == f"error: --out {inputs[1]}: holds a training run; choose another --out\n"
    assert not (inputs[1] / "model.json").exists()
    both = shutil.copytree(inputs[1], tmp_path / "both")
    shutil.copytree(bundle, both, dirs_exist_ok=True)
    code, message = refused(capsys, inputs[0], both, tmp_path / "mine")
    assert code == 2 and f"--encoder {both}: holds a training run and a model bundle" in message
    for flag, opened in (("--encoder", lambda: origins.open_beside(both, torch.device("cpu"), "fp32")),
                         ("--init", lambda: origins.open_first_networks(both)),
                         ("--init", lambda: origins.open_first_reader(both))):
        with pytest.raises(CheckpointError, match=f"^{flag} {both}: holds a training run and a model bundle"):
            opened()


def test_what_is_no_run_is_told_by_its_flag(bundle, tmp_path):
    """It was told of without a flag, and a bundle was asked to be trained anew."""
    (tmp_path / "model.json").write_text("{}")                                    # as HealthyGAN's runs have one
    for flag, command_of, opened in (
            ("--gan", "train.py", lambda folder: load_run(folder, "--gan", "gan", "train.py")),
            ("--encoder", "train_encoder.py", origins.open_encoder_run),
            ("--surroundings", "train_encoder.py", lambda folder: origins.open_surroundings(folder, None)),
            ("--reader", "train_reader.py", lambda folder: origins.open_reader(folder, ""))):
        with pytest.raises(CheckpointError) as said:
            opened(bundle)
        assert str(said.value) == f"{flag} {bundle}: a model bundle; a run folder of {command_of} is expected"
        for folder in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(CheckpointError, match=f"^{flag} {folder}: holds no run of {command_of}; "):
                opened(folder)
    for command_of, opened in (("train_encoder.py", origins.open_first_networks),
                               ("train_reader.py", origins.open_first_reader)):
        with pytest.raises(CheckpointError, match=f"^--init {tmp_path}: holds no run of {command_of}; "):
            opened(tmp_path)


BY_SURPRISE = ("--set", "method=inversion", "measure=surprise", "filter=band", "pool=peak", "scale=sides",
               "surprise_above=0.5")


def test_held_out_scans_alone_calibrate_as_those_of_the_database(tmp_path):
    """The database of --held-out had to have a side to train on, of which nothing is read."""
    data = write_slices(tmp_path / "all.lmdb", held_out=(2, 3, 4, 5))
    run = write_run(tmp_path / "run", SliceDataset(data).manifest)
    held_out, alone = SliceDataset(data, "val"), tmp_path / "alone.lmdb"
    with SliceWriter(alone, SETTINGS) as writer:
        for s, (scan_id, patient) in enumerate(zip(held_out.scan_ids, held_out.patients)):
            scan = held_out.scan(s)
            writer.add(ScanRecord.encode(scan_id, *(scan[key].numpy() for key in ("hu", "brain", "below_vertex_mm"))),
                       "val", patient)
    assert command(data, run, tmp_path / "one", *BY_SURPRISE) == 0
    assert command(data, run, tmp_path / "other", *BY_SURPRISE, "--held-out", str(alone)) == 0
    one, other = (load_bundle(tmp_path / name).meta["calibration"] for name in ("one", "other"))
    assert one["scan_scores"] == other["scan_scores"] and one["slice_scores"] == other["slice_scores"]


@pytest.mark.parametrize("patients", [range(6), (0, 1, 3, 3, 4, 4)])
def test_held_out_scans_grouped_otherwise_are_refused(tmp_path, capsys, patients):
    """Prepared without --patients, two scans of a patient counted as two independent ones."""
    data = write_slices(tmp_path / "one.lmdb", held_out=(2, 3, 4, 5), patients=(0, 1, 2, 3, 4, 4))
    run = write_run(tmp_path / "run", SliceDataset(data).manifest)
    other = write_slices(tmp_path / "other.lmdb", held_out=(2, 3, 4, 5), patients=patients)
    named = write_slices(tmp_path / "named.lmdb", held_out=(2, 3, 4, 5), patients=(5, 4, 3, 2, 1, 1))
    code, message = refused(capsys, data, run, tmp_path / "no", *BY_SURPRISE, "--held-out", str(other))
    whose = "head4, head5" if patients == range(6) else "head2, head3"
    assert code == 2 and (f"--held-out {other}: does not say as {data} does whose scans are {whose}: "
                          "prepare it with the same --patients") in message
    assert command(data, run, tmp_path / "mine", *BY_SURPRISE, "--held-out", str(named)) == 0    # the same, by any name
