"""Where the X-ray map looks: lungs found in drawn chests, and figures by hand with a stand-in for the generator."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from benchmarks import xray_map
from healthygan.data import ImageSettings

N = 64
Y, X = np.mgrid[:N, :N] / (N - 1)


def chest(cx=0.3, cy=0.45, a=0.12, b=0.3):
    """A bright chest with two dark lungs, and where these are."""
    lungs = sum(((X - x) / a) ** 2 + ((Y - cy) / b) ** 2 < 1 for x in (cx, 1 - cx)) > 0
    return np.where(lungs, 0.4, 0.8), lungs


def overlap(found, truth):
    return 2 * (found & truth).sum() / (found.sum() + truth.sum())


@pytest.mark.parametrize("where", [{}, {"cx": 0.25, "cy": 0.55, "b": 0.22}, {"a": 0.1, "cy": 0.4}])
def test_the_lungs_of_a_drawn_chest_are_found(where):
    image, truth = chest(**where)
    assert overlap(xray_map.lungs(image[None])[0], truth) > 0.85
    large = xray_map.lungs(image.repeat(2, 0).repeat(2, 1)[None])[0]
    assert large.shape == (2 * N, 2 * N) and overlap(large, truth.repeat(2, 0).repeat(2, 1)) > 0.85


def test_air_beside_the_patient_is_no_lung():
    image, truth = chest()
    image[:, :8] = image[:, -8:] = 0.02                                  # darker than the lungs
    assert overlap(xray_map.lungs(image[None])[0], truth) > 0.85


def test_figures_by_hand():
    """A generator that brightens by 0.2 where the image is darker than 0.5: the lungs of the ill ones alone."""
    ill, lungs = chest()
    images, labels = np.stack([np.where(lungs, 0.6, 0.8)] * 2 + [ill] * 2), np.array([0, 0, 1, 1])
    images = images + np.arange(4)[:, None, None] / 1000

    def generator(x):
        return SimpleNamespace(y=x + 0.4 * (x < 0) + 0.01)               # images are shown as -1..1

    found = xray_map.report(images, np.stack([lungs] * 4), labels, generator)
    assert found["auc"]["whole map"]["auc"] == found["auc"]["map inside the lungs"]["auc"] == 1
    assert found["auc"]["map outside the lungs"]["auc"] == 0.5 == found["auc"]["outer frame of the map"]["auc"]
    assert found["auc"]["mean grey, darker"]["auc"] == found["auc"]["mean grey of the lungs, darker"]["auc"] == 1
    share = lungs.mean()
    assert found["share"]["healthy"]["of the map"] == pytest.approx(share, abs=1e-4)
    assert found["share"]["diseased"]["of the map"] == pytest.approx(0.41 * share / (0.4 * share + 0.01), abs=1e-3)
    text = xray_map.table(found)
    assert text.startswith("2 diseased and 2 healthy.") and "| whole map | 1.00 |" in text


@pytest.mark.parametrize("sees, rises", [(lambda x: x > 0.3, 1), (lambda x: x < 0.3, 0)])
def test_an_opacity_pasted_into_the_healthy_by_hand(sees, rises):
    """Generators of the bright (above 0.65 of white) and of the dark: lungs at 0.6, so only the spot is bright."""
    _, lungs = chest()
    images, masks = np.stack([np.where(lungs, 0.6, 0.0)] * 3), np.stack([lungs] * 3)
    pasted, spots = xray_map.with_opacity(images, masks)
    assert np.ptp((pasted - images)[~masks]) == 0 and (pasted - images).max() == pytest.approx(xray_map.OPACITY)
    assert spots.any((1, 2)).all() and not spots[~masks].any()
    assert (pasted - images)[spots].min() > xray_map.OPACITY / 2 >= (pasted - images)[~spots].max()

    def generator(x):
        return SimpleNamespace(y=x + sees(x))

    found = xray_map.report(images, masks, np.array([0, 0, 1]), generator)["pasted"]
    assert found["auc"] == found["rises"] == rises
    assert found["of the frame"] == pytest.approx(spots[:2].mean())
    assert found["of the map"] > 0.3 if rises else found["of the map"] < found["of the frame"]


def test_command_writes_table_and_montage(tmp_path, monkeypatch, capsys):
    for group, dark in (("healthy", 0.6), ("diseased", 0.4)):
        (tmp_path / "test" / group).mkdir(parents=True)
        for i in range(2):
            image = np.where(chest()[1], dark, 0.8) + i / 100
            Image.fromarray((image * 255).astype(np.uint8)).save(tmp_path / "test" / group / f"{i}.png")
    settings = ImageSettings("images", N, crop_top=0.0)
    model = SimpleNamespace(settings=settings, generator=lambda x: SimpleNamespace(y=x + (x < 0)), weights_hash="0")
    monkeypatch.setattr(xray_map, "find_model", lambda path: model)
    command = ["--data", str(tmp_path), "--model", "m", "--out", str(tmp_path / "out")]
    assert xray_map.main(command) == 0
    assert (tmp_path / "out" / "table.md").read_text() == capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "lungs.png").size == (xray_map.COLUMNS * N, N)
    model.settings = ImageSettings("images", 48)
    assert xray_map.main(command) == 2 and "a multiple of 64" in capsys.readouterr().err
