import dataclasses
import json
import math
import os
import signal
import tempfile

import numpy as np
import pytest
import torch
from torchvision.models import vgg16

import checkpoint
import latent_stats
from bundling import build, origins
from bundling.build import augmented
from ct.frame import PreprocessSettings
from ct.standardise import StandardiseSettings
from dataset import ScanRecord, SliceDataset, SliceWriter
from detect.autoencoder import Autoencoder, AutoencoderFit
from detect.bundle import load_bundle
from detect.calibration import Trained, at_rate, thresholds
from detect.codes import encode_slices, fit
from detect.options import StatsConfig
from detect.pca import PcaFit, PositionPca
from detect.projection import Projector, project_frame
from detect.scores import scan_score
from detect.search import SearchSettings
from detect.settings import Settings
from detect.votes import Votes
from gan.snapshots import load_snapshot, save_snapshot
from healthygan import model as healthygan_model
from healthygan.weights import save_model
from latent_stats import read_notes, report_size
from model import Discriminator, Encoder, Generator, ModelConfig

TINY = ModelConfig(size=32, style_dim=16, n_mlp=2, channel_max=16)
PREPROCESSING = PreprocessSettings(StandardiseSettings(size=32))
SETTINGS = PREPROCESSING.to_json()
PLAIN = ("filter=median", "scale=both", "pool=area", "surprise_above=0.5")      # few pixels: no peaks, no bands


def write_slices(path, held_out=(5,), patients=range(6), seed=0):
    """Six scans of five slices, 0 to 20 mm below the vertex; those numbered in held_out are the val split."""
    rng = np.random.default_rng(seed)
    brain = np.zeros((5, 32, 32), bool)
    brain[:, 8:24, 8:24] = True
    with SliceWriter(path, SETTINGS) as writer:
        for s in range(6):
            hu = np.where(brain, 30 + 5 * rng.standard_normal(brain.shape), -20).astype(np.float32)
            record = ScanRecord.encode(f"head{s}", hu, brain, np.arange(20.0, -1, -5))
            writer.add(record, "val" if s in held_out else "train", f"patient{patients[s]}")
    return path


def write_run(folder, manifest, kind="encoder"):
    torch.manual_seed(0)
    networks = {"generator": Generator(TINY), "discriminator": Discriminator(TINY), "encoder": Encoder(TINY)}
    data = {key: manifest[key] for key in ("digest", "counts", "settings")}
    model = dataclasses.asdict(TINY)
    gan = {"kind": "gan", "step": 7, "model": model, "config": {"kimg": 0.007}, "data": data}
    meta = {"kind": kind, "model": model, "config": {"epochs": 2}, "data": data, "gan": gan}
    save_snapshot(folder, 50, networks, {}, meta)
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    data = write_slices(folder / "healthy.lmdb")
    return data, write_run(folder / "encoder", SliceDataset(data).manifest)


def command(data, run, out, *flags):
    return latent_stats.main(["--data", str(data), "--encoder", str(run), "--out", str(out), "--preset", "smoke32",
                              "--device", "cpu", "--precision", "fp32", *flags])


# ---- the whole command

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


# ---- wrong usage: exit code 2, the flag and the mend named

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


# ---- parts

def test_codes_and_positions_stay_together(inputs):
    dataset = SliceDataset(inputs[0])
    torch.manual_seed(0)
    encoder = Encoder(TINY)
    rng = torch.Generator().manual_seed(0)

    def augment(images):
        return augmented(images, rng)

    plain, mm = encode_slices(encoder, dataset, 1, 7, augment)
    again, mm3 = encode_slices(encoder, dataset, 3, 25, augment)
    assert plain.shape == (25, 8, 16) and again.shape == (75, 8, 16)
    assert mm.tolist() == [20, 15, 10, 5, 0] * 5 and mm3.tolist() == mm.tolist() * 3
    torch.testing.assert_close(again[:25], plain, rtol=1e-4, atol=1e-5)             # the first pass: as they are
    assert not torch.allclose(again[25:50], again[50:], atol=1e-3)                  # the others: drawn anew


def test_augmented_flips_and_turns_within_limits():
    # A bright spot on the x axis, 10 pixels right of the centre: where it goes tells flip and angle.
    images = torch.full((200, 3, 33, 33), -1.0)
    images[:, :, 15:18, 25:28] = 1
    moved = augmented(images, torch.Generator().manual_seed(0))
    assert moved.min() >= -1 and moved.max() <= 1
    weight = (moved[:, 0] + 1) / (moved[:, 0] + 1).sum((1, 2), keepdim=True)
    axis = torch.arange(33.0) - 16
    x, y = (weight.sum(1) * axis).sum(1), (weight.sum(2) * axis).sum(1)
    torch.testing.assert_close(torch.hypot(x, y), torch.full((200,), 10.0), atol=0.1, rtol=0)
    angle = torch.rad2deg(torch.atan2(y, x.abs())).abs()
    assert 20 < angle.max() <= 30.5
    assert 70 <= (x < 0).sum() <= 130 and 70 <= (angle < 1e-3).sum() <= 130         # about half of 200 each


def test_fit_needs_codes_within_reach():
    codes = torch.randn(40, 8, 16, generator=torch.Generator().manual_seed(0))
    config = StatsConfig(components=4, positions=4, spacing_mm=25)
    # All codes at 30 mm: 0 and 75 mm are too far, 25 and 50 mm (exactly 20 away) are not.
    assert fit(codes, torch.full((40,), 30.0), config).positions_mm.tolist() == [25, 50]
    with pytest.raises(ValueError, match="--components 4: needs 32 codes within 20 mm of a position, found 31"):
        fit(codes[:31], torch.full((31,), 30.0), config)


def test_thresholds():
    healthy = [float(i) for i in range(1, 20)]                                      # 19 scans: one in 20 may exceed
    found = thresholds({"max": healthy, "mean": [10 * score for score in healthy]}, 0.05)
    assert found == {"fpr": 0.05, "max": 19.0, "mean": 190.0, "reason": None}
    few = thresholds({"max": healthy[:18]}, 0.05)
    assert few["max"] is None and "needs 19" in few["reason"]


def test_twenty_scans_of_one_head_are_no_threshold():
    """They were: what one healthy head in 20 exceeds was told by the scans of however few."""
    scores = {"max": [float(i) for i in range(1, 21)]}
    assert thresholds(scores, 0.05, 19) == thresholds(scores, 0.05) == {"fpr": 0.05, "max": 20.0, "reason": None}
    few = thresholds(scores, 0.05, 18)
    assert few["max"] is None and "needs healthy scans of 19 patients, found those of 18" in few["reason"]
    assert thresholds(scores, 0.2, 4)["max"] == 17.0                       # of 21 scans four may exceed it
    calibration = {"scans": 20, "patients": 3, "scan_scores": scores}
    with pytest.raises(ValueError, match="0.2: 20 healthy scans of 3 patients cannot tell it; the lowest .* is 0.25,"):
        at_rate(calibration, 0.2)
    assert at_rate(calibration, 0.25)["threshold"]["max"] == 16.0


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


# ---- surprise

def test_a_patients_other_scan_does_not_judge_his_first(tmp_path, capsys):
    scores = []
    for name, patients in (("own", range(6)), ("shared", (0, 1, 2, 3, 4, 2))):
        data = write_slices(tmp_path / f"{name}.lmdb", held_out=(2, 3, 4, 5), patients=patients)
        run = write_run(tmp_path / name, SliceDataset(data).manifest)
        assert command(data, run, tmp_path / f"{name}-model", "--set", "measure=surprise", "surprise_above=0", *PLAIN,
                       "steps_noise=0", "--components", "2", "--passes", "4") == 0
        calibration = load_bundle(tmp_path / f"{name}-model").meta["calibration"]
        of_fewer = "note: 4 scans of 3 patients" in capsys.readouterr().out
        assert (calibration["patients"], of_fewer) == ((4, False) if name == "own" else (3, True))
        found = calibration["slice_scores"]
        scores.append([[one["score"] for one in found if one["scan"] == scan] for scan in range(4)])
    assert not any(own == shared for own, shared in zip(*scores))      # others by the tails, which come of all


def test_surprise_is_calibrated_on_the_others(tmp_path):
    data = write_slices(tmp_path / "healthy.lmdb", held_out=(2, 3, 4, 5))
    run = write_run(tmp_path / "encoder", SliceDataset(data).manifest)
    out = tmp_path / "mine"
    assert command(data, run, out, "--set", "measure=surprise", *PLAIN, "steps_noise=0", "--components",
                   "2", "--passes", "4") == 0
    bundle = load_bundle(out, precision="fp32")
    assert bundle.measure.normal is not None and "normal.safetensors" in bundle.meta["files"]
    assert len(bundle.meta["calibration"]["scan_scores"]["mean"]) == 4
    # A slice of the healthy, seen again as a new scan, scores; one with a hyperdense blob scores more.
    scan = SliceDataset(data, "val").scan(0)

    def score(hu):
        _, seen, findings, _ = project_frame(bundle.reconstructor, bundle.measure, hu, scan["brain"],
                                             scan["below_vertex_mm"].numpy())
        assert not findings.anomaly[~scan["brain"]].any() and seen.votes is None
        return scan_score(findings.slice_scores, "mean")

    plain = score(scan["hu"].float())
    dense = scan["hu"].float().clone()
    dense[:, 12:16, 12:16] += 60
    assert score(dense) > plain > 0


def test_surprise_needs_three_scans(inputs, tmp_path, capsys):
    assert command(*inputs, tmp_path / "mine", "--set", "measure=surprise") == 2
    error = capsys.readouterr().err
    assert "measure=surprise: needs held-out healthy scans of 3 patients" in error and "has those of 1" in error


# ---- folds

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


def test_a_fold_of_another_split_is_refused(tmp_path, capsys):
    (one, run), (other, _) = fold_inputs(tmp_path)
    snapshot = load_snapshot(run)
    meta = {**snapshot.meta, "held_out": ["head4", "head5"]}
    networks = {"generator": Generator(TINY), "discriminator": Discriminator(TINY), "encoder": Encoder(TINY)}
    save_snapshot(tmp_path / "told", 50, networks, {}, meta)
    assert command(other, tmp_path / "told", tmp_path / "mine") == 2
    assert "holds other scans out than the database" in capsys.readouterr().err


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


# ---- other methods, by the same code

def test_a_method_with_a_file_of_its_own_is_calibrated_like_ours(tmp_path, capsys):
    data = write_slices(tmp_path / "healthy.lmdb", held_out=(2, 3, 4, 5))
    pca = PositionPca(PcaFit(components=2, step_mm=20.0))
    pca.fit(SliceDataset(data, "train"))
    pca.save(tmp_path / "pca.safetensors")
    flags = ["--set", "method=pca", "measure=surprise", *PLAIN, "scan_score=max"]
    assert command(data, tmp_path / "pca.safetensors", tmp_path / "mine", *flags) == 0
    bundle = load_bundle(tmp_path / "mine")
    assert sorted(bundle.meta["files"]) == ["normal.safetensors", "pca.safetensors"]
    assert bundle.meta["provenance"]["trained"] == {"size": 32, "components": 2, "step_mm": 20.0}
    assert len(bundle.meta["calibration"]["scan_scores"]["max"]) == 4
    assert Projector(bundle).calibration is not None
    scan = SliceDataset(data, "val").scan(0)
    hu, brain, mm = scan["hu"].float(), scan["brain"], scan["below_vertex_mm"].numpy()
    fitted = pca.closest_normal(hu, brain, mm)
    stored = bundle.reconstructor.closest_normal(hu, brain, mm)
    torch.testing.assert_close(stored.normal_hu, fitted.normal_hu, atol=0.5, rtol=0)          # kept as float16

    other = write_slices(tmp_path / "other.lmdb", held_out=(1, 2, 3))
    assert command(other, tmp_path / "pca.safetensors", tmp_path / "no", *flags) == 2
    assert "was trained on another database" in capsys.readouterr().err
    assert command(data, tmp_path / "nowhere.safetensors", tmp_path / "no", *flags) == 2
    assert "nowhere.safetensors: cannot be read" in capsys.readouterr().err


def autoencoder_file(data, folder):
    autoencoder = Autoencoder(AutoencoderFit(width=8, depth=1, noise_size=4, steps=2, batch=4))
    autoencoder.fit(SliceDataset(data, "train"))
    autoencoder.save(folder / "autoencoder.safetensors")
    return folder / "autoencoder.safetensors"


def healthygan_folder(data, folder):
    torch.manual_seed(0)
    config = healthygan_model.ModelConfig(size=16, width=4, blocks=1, critic_layers=2)          # of shrunk slices
    meta = {"model": vars(config), "image_settings": {"kind": "slices", "size": 16, "slices": SETTINGS}}
    save_model(folder / "healthygan", config.generator(), meta)
    return folder / "healthygan"


@pytest.mark.parametrize("method, trained", [("autoencoder", autoencoder_file), ("healthygan", healthygan_folder)])
def test_every_method_is_calibrated_stored_and_projected(tmp_path, capsys, method, trained):
    data = write_slices(tmp_path / "healthy.lmdb", held_out=(2, 3, 4, 5))
    flags = ["--set", f"method={method}", "measure=surprise", *PLAIN, "scan_score=max"]
    assert command(data, trained(data, tmp_path), tmp_path / "mine", *flags) == 0
    warned = "does not say which scans it was trained on" in capsys.readouterr().out
    assert warned == (method == "healthygan")
    bundle = load_bundle(tmp_path / "mine", precision="fp32")
    scan = SliceDataset(data, "val").scan(0)
    hu, brain, mm = scan["hu"].float(), scan["brain"], scan["below_vertex_mm"].numpy()
    found, seen, findings, _ = project_frame(bundle.reconstructor, bundle.measure, hu, brain, mm)
    assert found.normal_hu.shape == hu.shape and found.normal_hu.isfinite().all()
    assert found.error == pytest.approx((found.query_hu - found.normal_hu).abs()[brain].mean().item(), rel=1e-4)
    assert findings.slice_scores.shape == (5,) and not findings.anomaly[~brain].any()
    # By votes, too: a method without steps votes once.
    votes = Votes()
    _, seen, findings, _ = project_frame(bundle.reconstructor, votes, hu, brain, mm)
    assert seen.steps == 1 and torch.equal(findings.predicted, seen.votes > 1)


def test_a_healthygan_of_images_is_no_method_for_slices(inputs, tmp_path, capsys):
    config = healthygan_model.ModelConfig(size=32, width=4, blocks=1, critic_layers=2)
    save_model(tmp_path / "images", config.generator(), {"model": vars(config),
                                                         "image_settings": {"kind": "images", "size": 32}})
    assert command(inputs[0], tmp_path / "images", tmp_path / "no", "--set", "method=healthygan") == 2
    assert "images: learnt from images, not from the slices of a database" in capsys.readouterr().err


# ---- A bundle, by other scans

def calibrated_anew(model, data, out, *flags):
    return latent_stats.main(["--encoder", str(model), "--data", str(data), "--out", str(out), "--device", "cpu",
                              "--precision", "fp32", *flags])


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A bundle that judges by surprise, and another database, of scans that it has not seen."""
    folder = tmp_path_factory.mktemp("shipped")
    data = write_slices(folder / "theirs.lmdb", held_out=(2, 3, 4, 5))
    flags = ["--set", "method=autoencoder", "measure=surprise", *PLAIN, "scan_score=max"]
    assert command(data, autoencoder_file(data, folder), folder / "model", *flags) == 0
    return folder / "model", write_slices(folder / "own.lmdb", held_out=(0, 1, 2, 3, 4), seed=1), data


def test_a_model_is_calibrated_by_other_scans(shipped, tmp_path, capsys):
    model, own, _ = shipped
    assert calibrated_anew(model, own, tmp_path / "own", "--set", "hypodense=0.5", "--provenance", "here") == 0
    said = capsys.readouterr().out
    assert "healthy scores come out too low where" in said and "prepared in another way" not in said
    before, after = load_bundle(model), load_bundle(tmp_path / "own")
    assert after.settings == before.settings.changed(["hypodense=0.5"]) and after.preprocessing == before.preprocessing
    assert len(after.meta["calibration"]["scan_scores"]["max"]) == 5
    of, was = after.meta["provenance"], before.meta["provenance"]
    assert (of["name"], of["data"], of["calibration_notes"]) == ("own", was["data"], "here")
    assert of["calibration_data"]["digest"] == SliceDataset(own).manifest["digest"]
    for one, other in zip(after.reconstructor.tensors(torch.float16)["autoencoder"].items(),
                          before.reconstructor.tensors(torch.float16)["autoencoder"].items()):
        assert one[0] == other[0] and torch.equal(one[1], other[1])


def test_what_cannot_calibrate_a_model_is_refused(shipped, tmp_path, capsys):
    model, own, _ = shipped

    def refused(model, data, *flags):
        assert calibrated_anew(model, data, tmp_path / "no", *flags) == 2 and not (tmp_path / "no").exists()
        return capsys.readouterr().err

    for flags in (["--fold", "a", "b"], ["--held-out", "d"], ["--calibrate", "none"]):
        assert "leave out --fold, --held-out and --calibrate none" in refused(model, own, *flags)
    assert "--reader: for method=inpainting or inversion, not autoencoder" in refused(model, own, "--reader", "r")
    few = write_slices(tmp_path / "few.lmdb", held_out=(1, 2), seed=1)
    assert "needs held-out healthy scans of 3 patients, " in refused(model, few)
    assert "no setting" in refused(model, own, "--set", "nonsense=1")
    large = tmp_path / "large.lmdb"
    with SliceWriter(large, PreprocessSettings(StandardiseSettings(size=64)).to_json()) as writer:
        writer.add(ScanRecord.encode("one", np.zeros((2, 64, 64), np.float32), np.ones((2, 64, 64), bool),
                                     np.array([5.0, 0])), "val", "p")
    assert f"slices of 64 pixels, --encoder {model} takes 32; prepare them with --like" in refused(model, large)
    assert calibrated_anew(model, own, model) == 2 and "holds a model bundle" in capsys.readouterr().err
    for out in (own, own / "mine"):                              # before hours of calibration
        assert calibrated_anew(model, own, out) == 2
        said = capsys.readouterr()
        assert said.err == f"error: --out {out}: {own} is no folder that can be written to; choose another --out\n"
        assert not said.out


def test_scans_prepared_in_another_way_are_told_of(shipped, tmp_path, capsys):
    model, own, _ = shipped
    narrow = tmp_path / "narrow.lmdb"
    settings = PreprocessSettings(StandardiseSettings(size=32, hu_clip=(0.0, 70.0)))
    with SliceWriter(narrow, settings.to_json()) as writer:
        for scan in range(3):
            one = SliceDataset(own, "val").scan(scan)
            writer.add(ScanRecord.encode(f"n{scan}", one["hu"].float().clamp(0, 70).numpy(), one["brain"].numpy(),
                                         one["below_vertex_mm"].numpy()), "val", f"n{scan}")
    assert calibrated_anew(model, narrow, tmp_path / "narrow") == 0
    assert "prepared in another way than for" in capsys.readouterr().out
    assert load_bundle(tmp_path / "narrow").preprocessing == settings


def test_a_readers_own_scans_are_known_by_digest_or_by_number(shipped):
    data = SliceDataset(shipped[2])
    its, scans = data.facts(), data.held_out_ids()

    def seen(held_out=1, **other):
        return origins.seen_of(data, {"data": its | other, "held_out": held_out})

    assert seen() == seen(digest="of a later version") == scans and len(scans) == 4
    assert seen(held_out=4) == seen(held_out=4, digest="of a later version") == []
    counts = its["counts"] | {"val": {"scans": 4, "slices": 21, "loose": 0}}
    assert seen(counts=counts) == seen(held_out=4, counts=counts) == scans          # the same scans, split otherwise
    assert seen(digest="of others", counts=counts) == [] and origins.seen_of(data, None) == []
    # Of the networks' database what is held out is known as prepared for use, too: a reader of another has not seen it
    theirs, other = ({"digest": name, "counts": counts} for name in ("theirs", "another"))
    for learnt_from, expected in ((theirs, scans), (other, [])):
        reader = {"data": other, "held_out": 4, "init": {"data": learnt_from, "held_out": 1}}
        assert origins.learnt_by_reader(data, {"data": theirs, "held_out": its, "reader": reader}) == expected
    assert origins.learnt_by_reader(data, {"data": theirs, "held_out": its}) == []


def test_a_model_calibrated_by_lpips_has_percentiles_once_its_files_are_named(inputs, tmp_path):
    """A bundle holds their hashes: without them it could be neither calibrated nor loaded, and had no percentile."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in vgg16(weights=None).state_dict().items()}
    for name, value in (("vgg16", 0.01), ("other", 0.02)):
        state = {key: torch.full((1,), value).expand(shape) for key, shape in shapes.items()}
        torch.save(state, tmp_path / f"{name}.pth")
    given = f"vgg16={tmp_path / 'vgg16.pth'}"
    assert command(*inputs, tmp_path / "mine", "--set", "perceptual=lpips", given) == 0

    bundle = load_bundle(tmp_path / "mine")
    assert bundle.settings.reconstruction.perceptual == "lpips" and "vgg16=" in checkpoint.describe(tmp_path / "mine")
    with pytest.raises(ValueError, match="perceptual=lpips: .* give vgg16=FILE"):
        Projector(bundle)
    with pytest.raises(ValueError, match="vgg16=absent.pth: no such file"):
        Projector(bundle, bundle.settings.changed(["vgg16=absent.pth"]))
    projector = Projector(bundle, bundle.settings.changed([given]))
    assert projector.calibration["scans"] == 1 and projector.incomparable is None
    other = Projector(bundle, bundle.settings.replace(vgg16=tmp_path / "other.pth"))
    assert other.calibration is None and "(vgg16_sha256)" in other.incomparable
