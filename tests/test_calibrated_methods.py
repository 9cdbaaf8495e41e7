"""Methods other than ours are calibrated, stored and projected by the same code."""

import shutil
from pathlib import Path

import pytest
import torch
from torchvision.models import vgg16

import checkpoint
import latent_stats
from bundling import build
from dataset import SliceDataset
from detect.bundle import load_bundle
from detect.pca import PcaFit, PositionPca
from detect.projection import Projector, project_frame
from detect.settings import Settings
from detect.votes import Votes
from healthygan import model as healthygan_model
from healthygan.weights import save_model
from tests.calibration_data import PLAIN, SETTINGS, autoencoder_file, command, write_inputs, write_slices


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def test_a_bundle_does_not_replace_the_file_that_it_is_made_of(tmp_path, capsys):
    """The fit was gone: the bundle's file of that name does not say what it was fitted to. Nor that of a --fold, nor
    another fit that is there, which went without --overwrite."""
    (tmp_path / "fits").mkdir()
    data = write_slices(tmp_path / "healthy.lmdb")
    fit, before = autoencoder_file(data, tmp_path / "fits"), (tmp_path / "fits/autoencoder.safetensors").read_bytes()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/autoencoder.safetensors").symlink_to(fit)
    flags = ["--set", "method=autoencoder", "measure=votes"]
    other = Path(shutil.copy(fit, tmp_path / "dae.safetensors"))

    def refused(run, out, *more, name="autoencoder"):
        assert command(data, run, out, *more, *flags) == 2
        assert capsys.readouterr().err == (
            f"error: --out {out}: holds {name}.safetensors, of no bundle there, which the new one would replace; "
            "choose another --out, or move that file\n")

    for out, run, more in (("fits", fit, ()), ("fits", fit, ("--overwrite",)), ("linked", fit, ()), ("fits", other, ()),
                           ("fits", tmp_path / "none", ("--fold", str(data), str(fit)))):
        refused(run, tmp_path / out, *more)
    assert fit.read_bytes() == before and not (tmp_path / "fits/model.json").exists()

    # A file of another name stays, and the bundle's own make way; not for one that was put in their place
    mine = tmp_path / "dae.safetensors"
    assert command(data, mine, tmp_path, *flags) == 0 == command(data, mine, tmp_path, "--overwrite", *flags)
    assert mine.read_bytes() == before and load_bundle(tmp_path).reconstructor.name == "autoencoder"
    shutil.copy(fit, tmp_path / "autoencoder.safetensors")
    refused(tmp_path / "autoencoder.safetensors", tmp_path, "--overwrite")
    (tmp_path / "normal.safetensors").write_bytes(b"of no bundle")
    flags[-1] = "measure=surprise"
    refused(mine, tmp_path, "--overwrite", name="normal")
    (tmp_path / "model.json").write_text("{")                        # damaged: what it may have listed is taken for its
    build.refuse_bundle(tmp_path, True, Settings().changed(flags[1:]))


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
    assert command(data, tmp_path, tmp_path / "no", *flags) == 2
    assert (f"{tmp_path}: a folder; method=pca takes the file that benchmarks/baselines.py fit writes"
            in capsys.readouterr().err)


@pytest.fixture
def in_parts(monkeypatch):
    """How many slices at a time the method takes that calibrates."""
    sizes = []

    def remember(folds, *rest):
        sizes.extend(getattr(fold.reconstructor.settings, "batch", None) for fold in folds)
        return real(folds, *rest)

    real = build.calibrate
    monkeypatch.setattr(build, "calibrate", remember)
    return sizes


def test_batch_is_that_of_the_method(tmp_path, capsys, in_parts):
    """Of another method than the search it stayed 32, whatever --batch said."""
    data = write_slices(tmp_path / "healthy.lmdb", held_out=(2, 3, 4, 5))
    network, same = autoencoder_file(data, tmp_path), ["--overwrite", "--set", "method=autoencoder"]
    for flags in ([], ["--batch", "2"], ["--batch", "2", "--set", "batch=3"], ["--seed", "1", "--passes", "3"]):
        assert command(data, network, tmp_path / "mine", *same, *flags) == 0
    assert in_parts == [32, 2, 3, 32]
    said = capsys.readouterr().out
    assert said.count("note: --passes, --seed: of the codes' statistics, which only method=search makes; of no use to "
                      "method=autoencoder") == said.count("of no use to") == 1
    first = load_bundle(tmp_path / "mine").meta["calibration"]
    anew = ["--data", str(data), "--encoder", str(tmp_path / "mine"), "--out", str(tmp_path / "anew"), "--device",
            "cpu", "--precision", "fp32"]
    assert latent_stats.main([*anew, "--batch", "2", "--components", "3"]) == 0 and in_parts[4:] == [2]
    assert "note: --components: of the codes'" in capsys.readouterr().out
    scores = load_bundle(tmp_path / "anew").meta["calibration"]["scan_scores"]["mean"]
    assert scores == pytest.approx(first["scan_scores"]["mean"], abs=1e-3)                        # memory, not results


def test_batch_of_a_method_without_batches_is_told_of(tmp_path, capsys, in_parts):
    data = write_slices(tmp_path / "healthy.lmdb", held_out=(2, 3, 4, 5))
    pca = PositionPca(PcaFit(components=2, step_mm=20.0))
    pca.fit(SliceDataset(data, "train"))
    pca.save(tmp_path / "pca.safetensors")
    assert command(data, tmp_path / "pca.safetensors", tmp_path / "mine", "--set", "method=pca", "--batch", "4") == 0
    assert "note: --batch: of no use to method=pca" in capsys.readouterr().out and in_parts == [None]


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
