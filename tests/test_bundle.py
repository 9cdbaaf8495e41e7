"""Model bundles: what is written is what is read, and damage is named."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from common.files import sha256
from common.weights import CheckpointError, load_tensors, read_json, save_tensors, to_json, write_json
from detect.bundle import load_bundle, read_bundle_meta, save_bundle, versions
from detect.inversion import Inversion, InversionSettings
from detect.projection import Projector
from detect.search import Search, SearchSettings
from detect.settings import Settings
from gan.snapshots import save_snapshot
from model import Generator, ModelConfig
from tests.bundle_data import META, TINY, latent_stats, load, networks, outputs, save
from tests.helpers import assert_every_change_is_found

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def bundle_parts():
    return networks(), latent_stats()


def test_bundle_round_trip(tmp_path, bundle_parts):
    parts, latent = bundle_parts
    save(tmp_path / "m", parts, latent, dtype=torch.float32)
    bundle = load_bundle(tmp_path / "m", precision="fp32")
    found = bundle.reconstructor
    for one, expected in zip(outputs(found.generator, found.discriminator, found.encoder), outputs(*parts)):
        torch.testing.assert_close(one, expected, atol=0, rtol=0)
    torch.testing.assert_close(found.latent.components, latent.components, atol=0, rtol=0)
    assert found.encoder.config == TINY and {key: bundle.meta[key] for key in META} == META
    assert not found.generator.training and not any(p.requires_grad for p in found.encoder.parameters())
    assert bundle.settings == Settings("search") and bundle.meta["versions"] == versions()


def test_a_calibration_that_is_saved_once_more_is_no_newer(tmp_path, bundle_parts, monkeypatch):
    """Saved by a later version, a bundle's calibration passed for one of that: percentiles of other brain masks."""
    made = {"preprocessing": None, "calibration": {"scans": 1, "threshold": {}}, "provenance": None}
    save(tmp_path / "first", *bundle_parts, made)
    first = load_bundle(tmp_path / "first")
    monkeypatch.setattr("ct.frame.VERSION", first.meta["versions"]["preprocessing"] + 1)
    monkeypatch.setattr("detect.measure.VERSION", first.meta["versions"]["measure"] + 1)
    for calibration, expected in ((first.meta["calibration"], first.meta["versions"]), (None, versions())):
        save_bundle(tmp_path / "next", first.reconstructor, first.settings, first.meta | {"calibration": calibration},
                    overwrite=True)
        assert load_bundle(tmp_path / "next").meta["versions"] == expected


def test_a_group_may_read_what_one_of_it_has_written(tmp_path, bundle_parts):
    """Runs and bundles in a shared folder, as umask says."""
    before = os.umask(0o027)
    try:
        save(tmp_path / "m", *bundle_parts)
        save_snapshot(tmp_path / "run", 1, {"generator": bundle_parts[0][0]}, {}, {})
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {path.name: 0o640 for path in files}
    assert sum(path.suffix == ".safetensors" for path in files) >= 4


def test_half_precision_is_close_and_half_the_size(tmp_path, bundle_parts):
    parts, latent = bundle_parts
    half = save(tmp_path / "half", parts, latent)
    full = save(tmp_path / "full", parts, latent, dtype=torch.float32)
    found = load(half)
    for one, expected in zip(outputs(found.generator, found.discriminator, found.encoder), outputs(*parts)):
        assert (one - expected).abs().max() < 0.01 * expected.abs().max()
    # The fixed noise is part of the result: it must come from the file, not from the constructor.
    torch.testing.assert_close(found.generator.noises.noise_3, parts[0].noises.noise_3, atol=1e-3, rtol=1e-3)
    sizes = [(folder / "discriminator.safetensors").stat().st_size for folder in (half, full)]
    assert sizes[0] < 0.65 * sizes[1]
    assert load_bundle(half).weights_hash != load_bundle(full).weights_hash


def test_values_beyond_half_precision_stay_float32(tmp_path):
    generator, discriminator, encoder = networks()
    encoder.final_linear.bias.data[0] = 1e6
    save(tmp_path, (generator, discriminator, encoder), latent_stats())
    assert load(tmp_path).encoder.final_linear.bias[0] == 1e6
    encoder.final_linear.bias.data[0] = torch.nan
    with pytest.raises(CheckpointError, match="encoder: final_linear.bias is not finite"):
        save(tmp_path, (generator, discriminator, encoder), latent_stats(), overwrite=True)


def test_latent_statistics_that_are_no_numbers_are_neither_saved_nor_loaded(tmp_path, bundle_parts):
    """Only the networks' weights were looked at."""
    parts, latent = bundle_parts
    broken = latent_stats()
    broken.mean[0, 0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="new: latent: mean not finite as stored; fit or train it anew"):
        save(tmp_path / "new", parts, broken)
    assert not (tmp_path / "new").exists()
    path = save(tmp_path / "m", parts, latent) / "latent.safetensors"
    save_tensors(broken.to_tensors(), path)
    files = json.loads((tmp_path / "m" / "model.json").read_text())["files"]
    edit_json(tmp_path / "m" / "model.json", files=files | {path.name: sha256(path)})
    with pytest.raises(CheckpointError, match="latent.safetensors: mean: every number must be finite"):
        load_bundle(tmp_path / "m")


def test_a_bundle_judges_no_residuals_by_another_filter_than_its_calibrations(tmp_path):
    """It did, by the healthy statistics of another quantity, and said how many healthy places are less unusual."""
    bundle = load_bundle(ROOT / "models" / "phantom-128")
    for changes, asked in (({"filter": "hyperdense"}, "filter=hyperdense"),
                           ({"filter": "median"}, "filter=median median_at_512=19")):
        other = bundle.settings.replace(**changes)
        with pytest.raises(ValueError, match=f"are of filter=band, not of {asked}; .* --set {asked}"):
            Projector(bundle, other)
        with pytest.raises(CheckpointError, match=f"m: measure surprise: .* are of filter=band, not of {asked}"):
            save_bundle(tmp_path / "m", bundle.reconstructor, other, bundle.meta | {"calibration": None},
                        bundle.measure.normal)
    later = {"hypodense": 0.3, "pool": "area", "surprise_above": 0.7, "read": 0.0, "scale": "both",
             "median_at_512": 9, "surprise_mask": 2.0, "measure": "votes"}        # the median draws the mask alone
    for name, value in later.items():
        Projector(bundle, bundle.settings.replace(**{name: value}))


def test_a_bundle_holds_only_the_files_that_its_method_uses(tmp_path, bundle_parts):
    (generator, discriminator, encoder), latent = bundle_parts
    save(tmp_path, (generator, discriminator, encoder), latent)
    (tmp_path / "notes.safetensors").write_bytes(b"not of the bundle")
    inversion = Inversion(InversionSettings(), generator, encoder)
    save_bundle(tmp_path, inversion, Settings("inversion"), META, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "encoder.safetensors", "generator.safetensors", "model.json", "notes.safetensors"]
    bundle = load_bundle(tmp_path)
    assert bundle.settings.method == "inversion"
    with pytest.raises(CheckpointError, match="is a model of method inversion and does not hold what search needs; "
                                              r"give one that does \(it lacks latent.safetensors\)"):
        bundle.with_settings(Settings("search", SearchSettings(perceptual="pixels")))


def test_a_bundle_stays_until_another_is_written(tmp_path, bundle_parts, monkeypatch):
    """The earlier one was removed first: a full disk or a stop left neither."""
    parts, latent = bundle_parts
    save(tmp_path, parts, latent)
    (tmp_path / "notes").touch()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    written = []

    def full(state, path):
        written.append(path)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_tensors(state, path)

    monkeypatch.setattr("detect.bundle.save_tensors", full)
    with pytest.raises(OSError, match="the disk is full"):
        save(tmp_path, networks(seed=1), latent, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()

    def stopped(*_):                                       # between the moves: mixed, and known to be
        raise KeyboardInterrupt

    replace = os.replace
    moves = iter([replace, replace, stopped])
    monkeypatch.setattr(os, "replace", lambda *paths: next(moves, stopped)(*paths))
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, networks(seed=1), latent, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == sorted(before)
    with pytest.raises(CheckpointError, match="not the file the bundle was made with"):
        load_bundle(tmp_path)
    monkeypatch.undo()
    save(tmp_path, parts, latent, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("content", ["", "{", '{"format_version": 99}', "[" * 100_000])
def test_a_damaged_bundle_can_be_overwritten(tmp_path, bundle_parts, content):
    (tmp_path / "model.json").write_text(content)
    save(tmp_path, *bundle_parts, overwrite=True)
    load_bundle(tmp_path)


def test_what_is_no_file_of_a_bundle_is_named(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    header = b'{"a":{"dtype":"F32","shape":[0,9223372036854775808],"data_offsets":[0,0]}}'
    (tmp_path / "shape.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (tmp_path / "folder").mkdir()
    for read, name, told in (
        (read_meta, "deep.json", "cannot be read as JSON .*: fetch it again"),
        (read_meta, "folder", "cannot be read .*: fetch it again"),
        (load_tensors, "shape.safetensors", "has a tensor of a shape that torch cannot hold; fetch"),
        (load_tensors, "folder", "cannot be read .*; give a safetensors file"),
    ):
        with pytest.raises(CheckpointError, match=f"{name}: {told}"):
            read(tmp_path / name)


def read_meta(path):
    return read_json(path, "fetch it again", 2)


def test_the_published_search_needs_a_model_that_was_made_for_it():
    bundle = load_bundle(Path(__file__).resolve().parents[1] / "models" / "head-128")
    with pytest.raises(CheckpointError, match="head-128: is a model of method inpainting and does not hold what search "
                                              r"needs; give one that does \(it lacks latent.safetensors, disc\S+\)$"):
        bundle.with_settings(bundle.published())          # the message was of ModelConfig.__init__()
    bundle = load_bundle(Path(__file__).resolve().parents[1] / "models" / "phantom-128")       # holds the files of both
    search = bundle.with_settings(bundle.published())
    assert isinstance(search.reconstructor, Search) and search.settings.reconstruction.knee == 0.2   # its encoder's


def edit_json(path, **changes):
    write_json(path, json.loads(path.read_text()) | changes)


def test_bundle_errors_name_the_file_and_the_mend(tmp_path, bundle_parts):
    parts, latent = bundle_parts
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        load_bundle(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="model.json: no such file: not a model bundle"):
        load_bundle(tmp_path)
    save(tmp_path, parts, latent)
    with pytest.raises(CheckpointError, match="holds a model bundle; overwrite it"):
        save(tmp_path, parts, latent)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.json").write_text('{"format": "healthygan"}')
    with pytest.raises(CheckpointError, match="other: holds a model of HealthyGAN"):
        save(tmp_path / "other", parts, latent, overwrite=True)

    original = (tmp_path / "model.json").read_text()
    edit_json(tmp_path / "model.json", format_version=99)
    with pytest.raises(CheckpointError, match="format version 99.*update"):
        load_bundle(tmp_path)
    edit_json(tmp_path / "model.json", format_version=1)
    with pytest.raises(CheckpointError, match="format version 1, this program reads 2: not a model bundle; latent"):
        load_bundle(tmp_path)
    (tmp_path / "model.json").write_text(original)
    edit_json(tmp_path / "model.json", config=json.loads(original)["config"] | {"channel_max": 8})
    with pytest.raises(CheckpointError, match="generator.safetensors: does not fit this Generator"):
        load_bundle(tmp_path)
    for key, value in (("files", None), ("calibration", [1])):
        (tmp_path / "model.json").write_text(original)
        edit_json(tmp_path / "model.json", **{key: value})
        with pytest.raises(CheckpointError, match=f"model.json: must say {key}"):
            load_bundle(tmp_path)
    edit_json(tmp_path / "model.json", **json.loads(original))
    edit_json(tmp_path / "model.json", config={"size": 33})
    with pytest.raises(CheckpointError, match="model.json: config: size must be"):
        load_bundle(tmp_path)
    (tmp_path / "model.json").write_text(original)

    path = tmp_path / "encoder.safetensors"
    weights = bytearray(path.read_bytes())
    weights[-1] ^= 1
    path.write_bytes(weights)
    with pytest.raises(CheckpointError, match="encoder.safetensors: SHA-256 .* fetch the bundle again"):
        load_bundle(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match="encoder.safetensors: no such file"):
        load_bundle(tmp_path)


@pytest.mark.parametrize("change", ["flip", "cut"])
def test_every_change_of_a_bundles_files_is_found(tmp_path, bundle_parts, change):
    parts, latent = bundle_parts
    whole = save(tmp_path / "whole", parts, latent)
    assert_every_change_is_found(whole, change, lambda: read_bundle_meta(whole))


def test_meta_data_have_a_line_for_what_holds_no_lists(tmp_path):
    content = {"a": [1.5, 2.0], "b": {"c": [], "d": [{"e": 1}, {"e": None}]}, "f": [[1], [2, "x, [y]"]], "g": {}}
    text = to_json(content, tmp_path)
    assert json.loads(text) == content
    assert text == ('{\n "a": [1.5, 2.0],\n "b": {\n  "c": [],\n  "d": [\n   {"e": 1},\n   {"e": null}\n  ]\n },\n'
                    ' "f": [\n  [1],\n  [2, "x, [y]"]\n ],\n "g": {}\n}\n')


def test_parts_that_do_not_belong_together_are_refused(tmp_path, bundle_parts):
    parts, latent = bundle_parts
    other = ModelConfig(size=32, style_dim=8, n_mlp=2, channel_base=128, channel_max=8)
    with pytest.raises(CheckpointError, match="generator's .* is not the encoder's"):
        save(tmp_path, (Generator(other), parts[1], parts[2]), latent)
    wide = ModelConfig(size=32, style_dim=16, n_mlp=2, channel_base=128, channel_max=16)
    with pytest.raises(CheckpointError, match=r"\[8, 16\], but the networks have \[8, 8\]"):
        save(tmp_path, parts, latent_stats(wide))
    with pytest.raises(CheckpointError, match="must be plain JSON without NaN"):
        save(tmp_path, parts, latent, META | {"calibration": float("nan")})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="meta must say calibration"):
        save(tmp_path, parts, latent, {k: v for k, v in META.items() if k != "calibration"})
