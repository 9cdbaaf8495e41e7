import argparse
import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import checkpoint
from common.weights import CheckpointError, load_tensors, read_json, save_tensors, to_json, write_json
from detect.bundle import load_bundle, load_released, read_bundle_meta, save_bundle, versions
from detect.inversion import Inversion, InversionSettings
from detect.latent import LatentStats
from detect.released import infer_config, read_statistics
from detect.search import Search, SearchSettings
from detect.settings import Settings
from gan.snapshots import load_snapshot, save_snapshot, snapshot_steps
from model import Discriminator, Encoder, Generator, ModelConfig

ROOT = Path(__file__).resolve().parents[1]
TINY = ModelConfig(size=32, style_dim=8, n_mlp=2, channel_base=128, channel_max=16)
META = dict(preprocessing={"size": 32}, calibration=None, provenance={"data": "phantoms"})


def networks(config=TINY, seed=0):
    torch.manual_seed(seed)
    parts = Generator(config), Discriminator(config), Encoder(config)
    for part in parts:                                     # zeros at the start would hide a weight that is not loaded
        for parameter in part.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return tuple(part.eval() for part in parts)


def latent_stats(config=TINY):
    codes = torch.randn(60, config.n_latent, config.style_dim, generator=torch.Generator().manual_seed(0))
    return LatentStats.fit(codes, torch.zeros(60), [0.0, 5.0], components=3)


def save(folder, parts, latent, meta=META, **options):
    """A bundle of the published search, which uses all files."""
    generator, discriminator, encoder = parts
    search = Search(SearchSettings(), generator, encoder, latent, discriminator)
    return save_bundle(folder, search, Settings("search"), meta, **options)


def load(folder):
    """The search of a bundle, in float32."""
    return load_bundle(folder, precision="fp32").reconstructor


def outputs(generator, discriminator, encoder):
    rng = torch.Generator().manual_seed(1)
    w_plus = torch.randn(2, generator.config.n_latent, generator.config.style_dim, generator=rng)
    images = torch.randn(2, 3, generator.config.size, generator.config.size, generator=rng)
    with torch.no_grad():
        return generator.synthesis(w_plus, noise="const"), discriminator(images), encoder(images)


# ---- run folders

def save_one(run, step, value=0.0, **kwargs):
    module = nn.Linear(2, 2)
    nn.init.constant_(module.weight, value)
    state = {"optimiser": torch.optim.Adam(module.parameters()).state_dict(), "rng": torch.get_rng_state()}
    return save_snapshot(run, step, {"net": module}, state, {"images": step * 16}, **kwargs)


def test_snapshot_round_trip(tmp_path):
    run = tmp_path / "runs" / "gan"
    module = nn.Linear(3, 2).to(memory_format=torch.contiguous_format)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.1)
    module(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    state = {"optimiser": optimiser.state_dict(), "rng": np.random.default_rng(3).bit_generator.state, "ada_p": 0.25,
             "order": (1, [2, None, "x", b"y"])}
    save_snapshot(run, 7, {"net": module}, state, {"preset": "smoke32"})
    snapshot = load_snapshot(run)
    assert snapshot.step == 7 and snapshot.meta == {"preset": "smoke32"}
    assert {k: snapshot.state[k] for k in ("rng", "ada_p", "order")} == {k: state[k] for k in ("rng", "ada_p", "order")}
    other = nn.Linear(3, 2)
    snapshot.restore({"net": other})
    torch.testing.assert_close(other.weight, module.weight, atol=0, rtol=0)
    resumed = torch.optim.Adam(other.parameters())
    resumed.load_state_dict(snapshot.state["optimiser"])
    torch.testing.assert_close(resumed.state[other.weight]["exp_avg"], optimiser.state[module.weight]["exp_avg"])
    with pytest.raises(CheckpointError, match="no network 'ema', only"):
        snapshot.restore({"ema": other})
    with pytest.raises(CheckpointError, match=r"weight is \[2, 3\], expected \[2, 4\]"):
        snapshot.restore({"net": nn.Linear(4, 2)})


def test_the_last_two_and_the_best_are_kept(tmp_path):
    for step, distance in ((1, 9.0), (2, 3.0), (3, None), (4, 3.5), (5, None)):
        save_one(tmp_path, step, value=step, distance=distance)
    assert snapshot_steps(tmp_path) == [2, 4, 5]
    assert load_snapshot(tmp_path, 2).weights["net"]["weight"][0, 0] == 2
    with pytest.raises(CheckpointError, match=r"no snapshot of step 3; there are \[2, 4, 5\]"):
        load_snapshot(tmp_path, 3)
    (tmp_path / "snapshot-00000002/meta.json").write_text("{")
    save_one(tmp_path, 6)
    assert snapshot_steps(tmp_path) == [4, 5, 6]                          # of what can be read


def test_without_a_measure_the_last_two_are_kept(tmp_path):
    for step in range(1, 5):
        save_one(tmp_path, step)
    assert snapshot_steps(tmp_path) == [3, 4]


def test_a_step_saved_again_replaces_the_first(tmp_path):
    save_one(tmp_path, 1, value=1)
    save_one(tmp_path, 1, value=2)
    assert load_snapshot(tmp_path).weights["net"]["weight"][0, 0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot-00000001"]


def test_a_step_whose_saving_again_breaks_off_stays(tmp_path, monkeypatch):
    """Between the two moves."""
    save_one(tmp_path, 1, value=1)
    rename = Path.rename

    def stopped(path, to):
        if path.suffix == ".writing":
            raise KeyboardInterrupt
        return rename(path, to)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", stopped)
        save_one(tmp_path, 1, value=2)
    with pytest.warns(UserWarning, match="half-written"):
        assert load_snapshot(tmp_path).weights["net"]["weight"][0, 0] == 1


def test_a_run_killed_while_saving_keeps_the_snapshot_before(tmp_path, monkeypatch):
    save_one(tmp_path, 1, value=1)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", killed)
        save_one(tmp_path, 2, value=2)
    with pytest.warns(UserWarning, match="half-written"):
        assert load_snapshot(tmp_path).step == 1
    save_one(tmp_path, 2, value=2)                                       # clears what was left
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_snapshot(tmp_path).step == 2


@pytest.mark.parametrize("name", ["net.safetensors", "state.pt", "meta.json"])
def test_a_damaged_snapshot_is_passed_over(tmp_path, name):
    save_one(tmp_path, 1)
    path = save_one(tmp_path, 2) / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(UserWarning, match="falling back"):
        assert load_snapshot(tmp_path).step == 1
    with pytest.raises(CheckpointError, match=name):
        load_snapshot(tmp_path, 2)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name}: no such file"):
        load_snapshot(tmp_path, 2)


def test_state_that_would_need_unpickling_is_refused(tmp_path):
    for bad in (np.float64(1), argparse.Namespace(), {"deep": [nn.Linear(1, 1)]}):
        with pytest.raises(CheckpointError, match=r"state\['x'\].*cannot be saved"):
            save_snapshot(tmp_path, 1, {}, {"x": bad}, {})
    assert list(tmp_path.iterdir()) == []


# ---- bundles

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
        save_one(tmp_path / "run", 1)
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
                                              "give one that does .*latent.safetensors: no such file"):
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
    with pytest.raises(CheckpointError, match="head-128: is a model of method inpainting and does not hold what"):
        bundle.with_settings(bundle.published())
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
    """100 flipped bits and 100 lengths of each file: refused, or (white space in model.json) without effect."""
    parts, latent = bundle_parts
    whole, meta = save(tmp_path / "whole", parts, latent), read_bundle_meta(tmp_path / "whole")
    rng = np.random.default_rng(0)
    for path in sorted(whole.iterdir()):
        content = path.read_bytes()
        for _ in range(100):
            altered = bytearray(content)
            if change == "flip":
                altered[rng.integers(len(content))] ^= 1 << rng.integers(8)
            else:
                del altered[rng.integers(len(content)):]
            path.write_bytes(altered)
            try:
                found = read_bundle_meta(whole)
            except CheckpointError as error:
                assert path.name in str(error)
            else:
                assert path.name == "model.json" and found == meta
        path.write_bytes(content)
    assert read_bundle_meta(whole) == meta


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


# ---- released files

RELEASED = ModelConfig(size=32, style_dim=8, n_mlp=3, channel_base=128, channel_max=16, encoder_stddev=True)


def released_checkpoint(path, parts, prefix="", **extra):
    states = {key: {prefix + name: t for name, t in part.state_dict().items()} for key, part in zip("gde", parts)}
    torch.save({"g_ema": states["g"], "d": states["d"], "e": states["e"], "args": argparse.Namespace(size=32)} | extra,
               path)
    return path


def statistics_file(path, protocol=4, positions=3, **extra):
    rng = np.random.default_rng(0)
    shape = (positions, RELEASED.n_latent, RELEASED.style_dim)
    basis = np.linalg.qr(rng.normal(size=(*shape, RELEASED.style_dim)))[0]
    arrays = {"mean": rng.normal(size=shape), "std": rng.random(shape), "pca_components": basis,
              "pca_explained_variance": rng.random(shape) + 0.5}
    path.write_bytes(pickle.dumps(arrays | extra, protocol=protocol))
    return arrays


@pytest.mark.parametrize("prefix", ["", "module."])
def test_released_checkpoint_gives_the_same_outputs(tmp_path, prefix):
    parts = networks(RELEASED)
    loaded = load_released(released_checkpoint(tmp_path / "c.pth", parts, prefix))
    for found, expected in zip(outputs(*loaded), outputs(*parts)):
        torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert loaded[2].config.encoder_stddev and (loaded[0].config.size, loaded[0].config.n_mlp) == (32, 3)


def test_released_channels_are_inferred_at_512():
    for multiplier in (1, 2):
        config = ModelConfig(size=512, channel_multiplier=multiplier)
        with torch.device("meta"):
            state = Generator(config).state_dict()
        inferred = infer_config(state, "c.pth")
        assert [inferred.channels(r) for r in config.resolutions] == [config.channels(r) for r in config.resolutions]
        assert (inferred.size, inferred.n_mlp, inferred.style_dim, inferred.n_latent) == (512, 8, 512, 16)


def test_released_checkpoint_must_fit_strictly(tmp_path):
    parts = networks(RELEASED)
    states = parts[2].state_dict() | {"final_linear.extra": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"c.pth \(e\): .*final_linear.extra is not known"):
        load_released(released_checkpoint(tmp_path / "c.pth", parts, e=states))
    torch.save({"g_ema": {}}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="no d, e in it"):
        load_released(tmp_path / "c.pth")
    torch.save({"g_ema": {}, "d": {}, "e": {}}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="not a StyleGAN2 generator"):
        load_released(tmp_path / "c.pth")
    for text in (b"not a checkpoint", b"hello", b"U"):        # two more of what the unpickler may raise
        (tmp_path / "c.pth").write_bytes(text)
        with pytest.raises(CheckpointError, match="or damaged .*fetch it again"):
            load_released(tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="no such file"):
        load_released(tmp_path / "d.pth")


class Command:
    """Unpickling this runs a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class Codec:
    def __reduce__(self):
        import _codecs
        return _codecs.encode, ("text", "rot13")


def test_nothing_in_a_released_file_is_executed(tmp_path):
    proof = tmp_path / "executed"
    for protocol in range(6):
        statistics_file(tmp_path / "s.pkl", protocol, evil=Command(f"touch {proof}"))
        with pytest.raises(CheckpointError, match=r"asks for (posix|nt)\.system"):
            read_statistics(tmp_path / "s.pkl")
    statistics_file(tmp_path / "s.pkl", evil=Codec())
    with pytest.raises(CheckpointError, match="codec 'rot13'"):
        read_statistics(tmp_path / "s.pkl")
    # A dotted name reaches through an allowed module in protocol 4.
    (tmp_path / "s.pkl").write_bytes(b"\x80\x04\x8c\x05numpy\x8c\x0ef2py.os.system\x93.")
    with pytest.raises(CheckpointError, match="asks for numpy.f2py.os.system"):
        read_statistics(tmp_path / "s.pkl")
    released_checkpoint(tmp_path / "c.pth", networks(RELEASED), evil=Command(f"touch {proof}"))
    with pytest.raises(CheckpointError, match=r"asks for (posix|nt)\.system, not executed"):
        load_released(tmp_path / "c.pth")
    assert not proof.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_released_statistics_are_read_from_every_pickle_protocol(tmp_path, protocol):
    arrays = statistics_file(tmp_path / "s.pkl", protocol, scalar=np.float32(2))
    found = read_statistics(tmp_path / "s.pkl")
    assert sorted(found) == sorted([*arrays, "scalar"])
    np.testing.assert_array_equal(found["pca_components"], arrays["pca_components"])


def test_pickles_that_hold_no_arrays_are_refused(tmp_path):
    path = tmp_path / "s.pkl"
    for content, message in [(pickle.dumps([1]), "expected a dict of arrays, found a list"),
                             (pickle.dumps({"mean": "x"}), "'mean' is not an array of numbers"),
                             (b"", "not a pickle of arrays"), (b"\x80\x04}q", "not a pickle of arrays")]:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_statistics(path)


def test_import_released_command(tmp_path, capsys):
    parts = networks(RELEASED)
    released_checkpoint(tmp_path / "c.pth", parts)
    arrays = statistics_file(tmp_path / "s.pkl")
    command = ["import-released", "--ckpt", str(tmp_path / "c.pth"), "--latent-statistics", str(tmp_path / "s.pkl"),
               "--out", str(tmp_path / "bundle")]
    assert checkpoint.main([*command, "--fp32"]) == 0
    search = load(tmp_path / "bundle")
    for found, expected in zip(outputs(search.generator, search.discriminator, search.encoder), outputs(*parts)):
        torch.testing.assert_close(found, expected, atol=0, rtol=0)
    np.testing.assert_array_equal(search.latent.components, arrays["pca_components"].astype(np.float32))

    assert checkpoint.main(["show", str(tmp_path / "bundle")]) == 0
    shown = capsys.readouterr().out
    assert "3 positions, 0 to 10 mm below the vertex; 8 of 8 components" in shown and "4251 (2022)" in shown
    assert checkpoint.main(["show", str(tmp_path / "bundle"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["weights_sha256"] == read_bundle_meta(tmp_path / "bundle")[1] and "calibration" not in shown
    assert "4251 (2022)" in shown["provenance"]["source"]
    assert str(tmp_path) not in (tmp_path / "bundle" / "model.json").read_text()
    assert checkpoint.main(command) == 2                                   # a bundle is there
    assert "overwrite" in capsys.readouterr().err
    assert checkpoint.main([*command, "--overwrite"]) == 0
    statistics_file(tmp_path / "s.pkl", std=0, pca_explained_variance=np.zeros((3, 8, 8)))
    assert checkpoint.main([*command, "--overwrite"]) == 2
    assert "s.pkl: variance: every variance must be" in capsys.readouterr().err


def test_where_a_bundle_comes_from_is_shown_in_short(tmp_path, bundle_parts):
    """It was one line of kilobytes of JSON. Whatever the provenance holds, the whole is in model.json."""
    shown = checkpoint.describe(ROOT / "models" / "head-128").partition("\n  versions")[2]
    lines = shown.splitlines()
    assert "{" not in shown and len(lines) < 30 and max(map(len, lines[:-1])) <= 120
    for expected in ("28 healthy scans; thresholds, exceeded by 5% of such scans at most: max 0.689, top3 0.598, mean",
                     "gan                  50384 images of database 228332711f900338\n",
                     "data                 database 6e4c8ca28f8c3b4d: 80 scans to train on, 28 held out\n",
                     "reader taught by     98 of the 108 scans of database 6e4c8ca28f8c3b4d, 3744 images\n",
                     "note: use            non-commercial research: trained on CT-ICH",
                     "note: how            9 entries\n",
                     "in full              " + str(ROOT / "models" / "head-128" / "model.json")):
        assert expected in shown
    known = {"notes": "two\nlines", "folds": [{"held_out": 3}] * 2, "whatever": [1, 2], "encoder": None}
    save(tmp_path / "bundle", *bundle_parts, {"preprocessing": None, "calibration": None, "provenance": known})
    shown = checkpoint.describe(tmp_path / "bundle")
    for expected in ("notes                two lines\n", "folds                2 entries\n",
                     "whatever             [1, 2]\n", "calibration          none: scores without percentiles\n"):
        assert f"\n  {expected}" in shown


def test_a_bundle_that_cannot_be_written_is_told_so(tmp_path, capsys, monkeypatch):
    released_checkpoint(tmp_path / "c.pth", networks(RELEASED))
    statistics_file(tmp_path / "s.pkl")

    def said(out: Path) -> str:
        assert checkpoint.main(["import-released", "--ckpt", str(tmp_path / "c.pth"), "--latent-statistics",
                                str(tmp_path / "s.pkl"), "--out", str(out)]) == 2
        return capsys.readouterr().err

    assert f"--out {tmp_path / 'c.pth'}: cannot be written (File exists); give" in said(tmp_path / "c.pth")
    assert "cannot be written (Not a directory)" in said(tmp_path / "c.pth" / "bundle")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("detect.bundle.save_tensors", full)
    assert "bundle: cannot be written (the disk is full: " in said(tmp_path / "bundle")


def test_a_folder_that_may_not_be_read_is_told_so(tmp_path, capsys, monkeypatch):
    def closed(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    monkeypatch.setattr("common.weights.sha256", closed)
    for more in ((), ("--json",)):
        assert checkpoint.main(["show", str(ROOT / "models" / "heads-128"), *more]) == 2
        assert "heads-128: cannot be read (Permission denied); give" in capsys.readouterr().err


def test_a_reader_that_leaves_early_gets_no_traceback():
    """`checkpoint.py show MODEL | head -1`: the pipe is closed before anything is written."""
    command = [sys.executable, str(ROOT / "checkpoint.py"), "show", str(ROOT / "models" / "heads-128")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == -signal.SIGPIPE
