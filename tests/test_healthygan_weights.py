"""A HealthyGAN on the disk: what is written is what is read, damage is named, and what is no number is no score."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from common.weights import CheckpointError, write_json
from healthygan import test as healthygan_test
from healthygan import weights
from healthygan.data import ImageSettings
from healthygan.model import Generator, ModelConfig
from tests.helpers import assert_every_change_is_found

CONFIG = ModelConfig(size=32, width=4, blocks=1, critic_width=4, critic_max=8, critic_layers=3)
META = {"model": dataclasses.asdict(CONFIG), "image_settings": dataclasses.asdict(ImageSettings("images", 32)),
        "threshold": 0.25, "validation_scores": [0.125, 0.25]}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    weights.save_model(tmp_path / "model", CONFIG.generator(), META)
    return tmp_path / "model"


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images/x.png")
    return tmp_path / "images"


def score(data, model, out) -> int:
    return healthygan_test.main(["--data", str(data), "--model", str(model), "--out", str(out), "--device", "cpu",
                                 "--precision", "fp32"])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("change", ["flip", "cut"])
def test_every_change_of_a_models_files_is_found(folder, change, monkeypatch):
    """A flipped bit in the threshold was another threshold. White space in model.json may change."""
    monkeypatch.setattr(weights, "load_generator", lambda *_: None)
    assert_every_change_is_found(folder, change, lambda: weights.load_model(folder).meta)
    content = (folder / "model.json").read_text()
    for name in ("files", "sha256"):                    # nor does one pass for an earlier version's
        (folder / "model.json").write_text(content.replace(f'"{name}"', f'"{name[:-1]}_"'))
        with pytest.raises(CheckpointError, match="model.json"):
            weights.load_model(folder)


def test_a_model_of_an_earlier_version_is_read_with_a_warning(folder):
    content = json.loads((folder / "model.json").read_text())
    files = content.pop("files")
    content["sha256"] = files["generator.safetensors"]
    (folder / "model.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="model.json: of an earlier version, .*healthygan.weights .* --out NEW"):
        assert weights.load_model(folder).meta["threshold"] == 0.25
    with pytest.warns(UserWarning, match="of an earlier version"):
        assert weights.main([str(folder), "--out", str(folder.parent / "new")]) == 0
    assert weights.load_model(folder.parent / "new").meta["threshold"] == 0.25


@pytest.mark.parametrize("part, key, value, message", [
    ("", "threshold", "0.25", r"a threshold in \[0, 1\], or none, found '0.25'"),
    ("", "threshold", 1.5, r"a threshold in \[0, 1\], or none, found 1.5"),
    ("", "threshold", True, r"a threshold in \[0, 1\]"),
    ("", "validation_scores", [0.5, None], r"validation_scores in \[0, 1\], or none, found \[0.5, None\]"),
    ("", "validation_scores", 0.5, r"validation_scores in \[0, 1\]"),
    ("model", "size", "32", "whole numbers for the network, found {'size': '32'}"),
    ("model", "width", 4.0, "whole numbers for the network, found {'width': 4.0}"),
    ("model", "width", 0, "must be at least 1"),
    ("image_settings", "size", 64, "images of the network's size, 32, found 64"),
    ("image_settings", "kind", "heads", "kind images or slices, found 'heads'"),
    ("image_settings", "kind", "slices", "the settings of the slices, found None"),
    ("image_settings", "crop_top", 1.0, r"crop_top in \[0, 1\), found 1.0"),
    ("image_settings", "white_16bit", 0, "white_16bit in 1..65535, found 0"),
])
def test_what_a_description_cannot_mean_is_named(folder, part, key, value, message):
    content = json.loads((folder / "model.json").read_text())
    (content[part] if part else content)[key] = value
    write_json(folder / "model.json", content)                            # sealed again
    with pytest.raises(CheckpointError, match=f"model.json: not the description of a HealthyGAN model .*{message}"):
        weights.load_model(folder)


def test_weights_that_are_no_numbers_give_no_scores(tmp_path, images, capsys):
    """Rows 'nan,,,ok', not flagged."""
    state = Generator().state_dict()
    state["main.0.weight"][0, 0, 0, 0] = torch.nan
    torch.save(state, tmp_path / "1-G.ckpt")
    assert score(images, tmp_path / "1-G.ckpt", tmp_path / "out") == 2
    assert "1-G.ckpt: main.0.weight is not finite" in capsys.readouterr().err
    assert not (tmp_path / "out/scores.csv").exists()


def test_scores_that_are_no_numbers_are_none(folder, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(healthygan_test, "difference", lambda x, y: (x - y).mean(1) * torch.nan)
    assert score(images, folder, tmp_path / "out") == 2
    assert "--model: what it makes of images/x is not finite" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_training_images_are_scored_only_where_they_are_named(folder, images, tmp_path, capsys):
    (tmp_path / "data/train").mkdir(parents=True)
    images.rename(tmp_path / "data/train/mixed")
    assert score(tmp_path / "data", folder, tmp_path / "out") == 2
    assert "has train/ but no test/" in (said := capsys.readouterr().err) and "data/train/..." in said
    assert not (tmp_path / "out").exists()
    assert score(tmp_path / "data/train/mixed", folder, tmp_path / "out") == 0
