"""The paper's released weights: read without running anything in them, and made into a bundle."""

import argparse
import errno
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
from common.weights import CheckpointError
from detect.bundle import load_released, read_bundle_meta
from detect.released import infer_config, read_statistics
from model import Generator, ModelConfig
from tests.bundle_data import load, networks, outputs

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


@pytest.mark.parametrize("generator, message", [
    (torch.zeros(1), r"c.pth \(g_ema\): expected a state dict, found a Tensor"),
    ([torch.zeros(1)], r"c.pth \(g_ema\): expected a state dict, found a list"),
    (None, r"c.pth \(g_ema\): expected a state dict, found a NoneType"),
    ({1: torch.zeros(1)}, r"c.pth \(g_ema\): expected a state dict, found a int, 1, for a name"),
    ({"style.1.weight": 3}, r"c.pth \(g_ema\): .* found a int at 'style.1.weight', no tensor"),
    ({"style.1.weight": torch.zeros(3)}, r"c.pth \(g_ema\): not a StyleGAN2 generator with the released names"),
])
def test_a_checkpoint_of_other_content_is_named(tmp_path, generator, message):
    """Each ended in a traceback."""
    whole = {"g_ema": {"a": torch.zeros(1)}, "d": {}, "e": {}}
    torch.save(whole | {"g_ema": generator}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=message):
        load_released(tmp_path / "c.pth")
    if "expected a state dict" in message:                                # the same of the others
        for key in "de":
            torch.save(whole | {key: generator}, tmp_path / "c.pth")
            with pytest.raises(CheckpointError, match=message.replace("g_ema", key)):
                load_released(tmp_path / "c.pth")


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


@pytest.mark.parametrize("protocol", range(6))
def test_released_arrays_come_in_their_layout_and_byte_order(tmp_path, protocol):
    whole = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    arrays = {"rows": whole, "columns": np.asfortranarray(whole), "turned": whole.transpose(1, 2, 0),
              "swapped": whole.astype(">f4"), "bytes": whole.astype(np.uint8), "number": np.float64(2.5)}
    (tmp_path / "s.pkl").write_bytes(pickle.dumps(arrays, protocol=protocol))
    found = read_statistics(tmp_path / "s.pkl")
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        np.testing.assert_array_equal(found[name], array, name)


def test_pickles_that_hold_no_arrays_are_refused(tmp_path):
    path = tmp_path / "s.pkl"
    for content, message in [(pickle.dumps([1]), "expected a dict of arrays, found a list"),
                             (pickle.dumps({"mean": "x"}), "'mean' is not an array of numbers"),
                             (pickle.dumps({"mean": [[1.0, 2.0]]}), "'mean' is not an array of numbers"),
                             (pickle.dumps({1: np.zeros(1)}), "expected the name of an array, found a int"),
                             (pickle.dumps({"mean": np.array(["a", None])}), "arrays of 'O8', which are no numbers"),
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
    statistics_file(tmp_path / "s.pkl", std=np.zeros(3), pca_explained_variance=np.zeros((3, 8, 8)))
    assert checkpoint.main([*command, "--overwrite"]) == 2
    assert "s.pkl: variance: every variance must be" in capsys.readouterr().err
    statistics_file(tmp_path / "s.pkl", mean=np.full((3, 8, 8), np.nan))
    assert checkpoint.main([*command, "--overwrite"]) == 2
    assert "s.pkl: mean: every number must be finite" in capsys.readouterr().err


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
