"""latent_stats.py on a model bundle: calibrated by other scans, and who may not calibrate it."""

import dataclasses

import numpy as np
import pytest
import torch

import latent_stats
from bundling import origins
from ct.frame import PreprocessSettings
from ct.standardise import StandardiseSettings
from dataset import ScanRecord, SliceDataset, SliceWriter
from detect.bundle import load_bundle, save_bundle
from healthygan import data as healthygan_data
from healthygan import model as healthygan_model
from healthygan.weights import save_model
from tests.calibration_data import PLAIN, autoencoder_file, command, write_slices


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
    changes = ["hypodense=0.5", "filter=band"]                  # another filter's residuals are fitted anew
    assert calibrated_anew(model, own, tmp_path / "own", "--set", *changes, "--provenance", "here") == 0
    said = capsys.readouterr().out
    assert "healthy scores come out too low where" in said and "prepared in another way" not in said
    before, after = load_bundle(model), load_bundle(tmp_path / "own")
    assert after.settings == before.settings.changed(changes) and after.preprocessing == before.preprocessing
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


def test_training_scans_of_a_database_split_otherwise_calibrate_nothing(shipped, tmp_path, capsys):
    """As many scans and slices are held out, others of them: counts alone took them for the model's own."""
    model, _, theirs = shipped
    other = write_slices(tmp_path / "other.lmdb", held_out=(0, 1, 2, 3))
    assert SliceDataset(other).manifest["counts"] == SliceDataset(theirs).manifest["counts"]
    assert calibrated_anew(model, other, tmp_path / "no") == 2 and not (tmp_path / "no").exists()
    assert "with other scans held out: head0, head1, head2 and 1 more may be among" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["encoder", "gan", "surroundings"])
def test_scans_that_taught_what_any_of_the_networks_began_with_calibrate_nothing(part, shipped, tmp_path, capsys):
    """Of those for the surroundings nobody asked; a training had the same scans, four of the five held out now."""
    model, own, _ = shipped
    bundle, first = load_bundle(model), {"data": SliceDataset(own).facts(), "held_out": 1, "init": None}
    told = {"encoder": {"encoder": {}, "init": first}, "gan": {"encoder": {}, "gan": first},
            "surroundings": {"encoder": {}, "surroundings": {"init": first}}}[part]
    save_bundle(tmp_path / "model", bundle.reconstructor, bundle.settings, bundle.meta | {
        "provenance": bundle.meta["provenance"] | told}, bundle.measure.normal)
    assert calibrated_anew(tmp_path / "model", own, tmp_path / "no") == 2 and not (tmp_path / "no").exists()
    assert "may be among its training scans; give other scans" in capsys.readouterr().err


def test_what_the_encoder_began_with_is_not_what_its_surroundings_did(shipped):
    known = {"data": {"digest": "theirs", "counts": {"val": {"scans": 1, "slices": 5}}}, "init": {"held_out": 3},
             "encoder": {"images_seen": 8}, "gan": {"images_seen": 2}, "surroundings": {"images_seen": 4, "init": None}}
    assert origins.networks_known(known)["init"] == {"held_out": 3}
    assert origins.networks_known(known, "surroundings")["init"] is None
    assert origins.networks_known(known)["gan"] is None                     # an earlier version told too little of it


def test_a_healthygan_is_not_overwritten(shipped, tmp_path, capsys):
    """It was called a model bundle, and lost its threshold to --overwrite."""
    config = healthygan_model.ModelConfig(size=32, width=4, blocks=1, critic_width=4, critic_max=8, critic_layers=3)
    meta = {"model": dataclasses.asdict(config), "threshold": 0.25,
            "image_settings": dataclasses.asdict(healthygan_data.ImageSettings("images", 32))}
    save_model(tmp_path / "gan", config.generator(), meta)
    before = {path.name: path.read_bytes() for path in (tmp_path / "gan").iterdir()}
    for more in ((), ("--overwrite",)):
        assert calibrated_anew(*shipped[:2], tmp_path / "gan", *more) == 2
        assert capsys.readouterr().err == (f"error: --out {tmp_path / 'gan'}: holds a model of HealthyGAN; choose "
                                           "another folder\n")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "gan").iterdir()}


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
