"""healthygan.train: runs go on as if never stopped, choose by AUCp, and refuse what they are not."""

from __future__ import annotations

import functools
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from common.weights import SEAL, write_json
from healthygan import train, weights
from healthygan.data import ImageSettings
from healthygan.training_data import load_training
from tests.healthygan_runs import stats, train_on, write_xrays


@pytest.fixture(scope="module")
def xrays(tmp_path_factory) -> Path:
    return write_xrays(tmp_path_factory.mktemp("xrays"))


@pytest.fixture(scope="module")
def run_train(xrays):
    return functools.partial(train_on, xrays)


@pytest.fixture(scope="module")
def finished(xrays, tmp_path_factory) -> Path:
    """A run of 20 steps, never interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train_on(xrays, out) == 0
    return out


def test_a_run_goes_on_in_its_stream_with_other_batches(tmp_path, run_train, monkeypatch):
    """As with another number of ranks: the images used up were counted as if the batches had always been today's."""
    run_train(tmp_path, "--iterations", 10, "--decay", 0, "--batch", 4)
    starts, real = [], train.batches
    monkeypatch.setattr(train, "batches", lambda part, batch, seed, start, device: (
        starts.append(start), real(part, batch, seed, start, device))[1])
    run_train(tmp_path, "--iterations", 11, "--decay", 0, "--batch", 2)
    run_train(tmp_path, "--iterations", 12, "--decay", 0, "--batch", 2)
    assert starts == [40, 40, 42, 42]


def test_a_run_writes_what_it_promises(finished):
    row = stats(finished)[20]
    assert {"wasserstein", "d_b", "d_y", "penalty", "g_identity", "mask_a", "mask_b", "aucp"} <= row.keys()
    assert (finished / "samples-000010.png").is_file() and (finished / "config.json").is_file()
    grid = Image.open(finished / "samples-000020.png")
    assert grid.size == (6 * 32, 12 * 32)                         # six panels; six of each set


def test_resumed_equals_uninterrupted(finished, run_train, tmp_path):
    run_train(tmp_path, "--iterations", 10, "--decay", 0)  # the rate is constant up to step 15 in both
    assert run_train(tmp_path) == 0
    for name in ("generator", "generator_ema", "critic"):
        whole, resumed = (load_file(run / f"snapshot-00000020/{name}.safetensors") for run in (finished, tmp_path))
        assert whole.keys() == resumed.keys()
        for key in whole:
            torch.testing.assert_close(resumed[key], whole[key], rtol=0, atol=0)
    for step in (15, 20):
        assert stats(tmp_path)[step]["wasserstein"] == stats(finished)[step]["wasserstein"]


@pytest.mark.parametrize("flags", [("--seed", 1), ("--val-fraction", 0.5)])
def test_a_run_does_not_go_on_with_other_images_kept_aside(finished, run_train, tmp_path, capsys, flags):
    shutil.copytree(finished, tmp_path / "run")                   # the threshold would be of images it was trained on
    before = (tmp_path / "run/best/model.json").read_bytes()
    assert run_train(tmp_path / "run", "--iterations", 25, *flags) == 2
    assert "the run there has another d" in capsys.readouterr().err
    assert (tmp_path / "run/best/model.json").read_bytes() == before


def test_the_digest_tells_sets_apart_by_names_pixels_and_what_is_kept_aside(xrays):
    def digest(seed=0, healthy="train/healthy"):
        settings = ImageSettings("images", 32)
        return load_training([xrays / healthy], [xrays / "train/mixed"], settings, 0.25, seed).digest()

    assert digest() == digest() and digest().keys() == {"healthy", "mixed", "held_out"}
    assert digest(seed=1)["held_out"] != digest()["held_out"] and digest(seed=1)["mixed"] == digest()["mixed"]
    assert digest(healthy="test/healthy")["healthy"] != digest()["healthy"]


def test_the_generator_with_the_highest_aucp_is_kept_with_its_threshold(finished, xrays):
    measured = {step: row["aucp"] for step, row in stats(finished).items() if "aucp" in row}
    model = weights.load_model(finished / "best")
    best = max(measured, key=measured.get)
    assert measured.keys() == {10, 20} and model.meta["chosen"]["iteration"] == best
    assert model.meta["chosen"]["aucp"] == pytest.approx(measured[best], abs=1e-4)
    held_out = model.meta["validation_scores"]                    # a quarter of 12
    assert len(held_out) == 3 and model.meta["training"]["counts"]["healthy"]["images"] == 9
    assert np.sum(np.array(held_out) > model.meta["threshold"]) == 0   # 25 % of 3 is none


def test_no_label_or_test_image_can_reach_the_training(run_train, finished, xrays, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(xrays / "train", alone / "train")
    assert train.main(["--data", str(alone), "--out", str(tmp_path / "run"), "--preset", "smoke32", "--device", "cpu",
                       "--precision", "fp32", "--iterations", "10", "--decay", "0"]) == 0
    assert stats(tmp_path / "run")[10]["aucp"] == stats(finished)[10]["aucp"]


def test_no_generator_is_chosen_before_it_can_do_anything(run_train, tmp_path):
    assert run_train(tmp_path, "--choose", 5, "--choose-after", 0.75) == 0
    assert {step for step, row in stats(tmp_path).items() if "aucp" in row} == {5, 10, 15, 20}
    assert weights.load_model(tmp_path / "best").meta["chosen"]["iteration"] >= 15


def test_a_diverged_run_ends_with_4(run_train, tmp_path, capsys):
    assert run_train(tmp_path, "--lr", "1e30", "--ema-iterations", 0) == 4
    assert "diverged" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["--data", "nowhere"], "nowhere/healthy: no such folder"),
    (["--healthy", "a"], "give --data FOLDER, or --healthy and --mixed"),
    (["--healthy", "a", "--mixed", "b"], "a: no such file or folder"),
    ([], "give --data FOLDER"),
])
def test_train_names_what_is_missing(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main([*flags, "--preset", "smoke32"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--batch=0", "--size=30", "--critic-layers=7", "--val-fraction=1",
                                  "--white-16bit=0", "--copy-first=20", "--mask-rampup=1", "--translate-first=-1",
                                  "--indecision=-1", "--shift=-1", "--fpr=5", "--fpr=nan", "--lr=nan", "--penalty=-1",
                                  "--identity=nan", "--indecision=nan", "--decay=2", "--ema-iterations=-1",
                                  "--translate-first=20", "--reconstruction=-1", "--mask=inf", "--seed=-1",
                                  "--shift=32", "--critic-steps=21", "--copy-first=18 --critic-steps=3"])
def test_train_refuses_values_that_cannot_be_meant(flag, xrays, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--data", str(xrays), "--preset", "smoke32", *flag.split()])
    assert stop.value.code == 2 and flag.split("=")[0] in capsys.readouterr().err


def test_a_run_with_other_data_is_not_gone_on_with(finished, slices32, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train.main(["--healthy", str(slices32), "--mixed", str(slices32), "--out", str(copy), "--preset",
                           "smoke32", "--device", "cpu"]) == 2
    assert "the run there has another data" in capsys.readouterr().err


def test_a_run_of_an_older_version_with_other_settings_is_not_gone_on_with(finished, run_train, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for folder in tmp_path.glob("snapshot-*"):
        content = json.loads((folder / "meta.json").read_text())
        content["meta"]["config"]["decay_iterations"] = 5
        write_json(folder / "meta.json", {key: value for key, value in content.items() if key != SEAL})
    assert run_train(tmp_path) == 2
    assert "older version, with settings that this one does not know (decay_iterations)" in capsys.readouterr().err


def test_a_run_that_does_not_tell_what_it_kept_aside_is_not_gone_on_with(finished, run_train, tmp_path, capsys):
    """With another --seed it went on, and its threshold was of images that it had been trained on."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for folder in tmp_path.glob("snapshot-*"):
        content = json.loads((folder / "meta.json").read_text())
        del content["meta"]["digest"]
        write_json(folder / "meta.json", {key: value for key, value in content.items() if key != SEAL})
    assert run_train(tmp_path, "--iterations", 25, "--seed", 1) == 2
    assert "older version and does not tell its digest" in capsys.readouterr().err
