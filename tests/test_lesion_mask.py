"""The benchmark of the lesion mask: Dice and marked pixels counted by hand, its rows, and the command on a bundle."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

import latent_stats
from benchmarks import lesion_mask, pasted
from benchmarks.inversion import HeldOut
from benchmarks.lesion_mask import OWN, evaluate, settings_of, table
from ct.frame import PreprocessSettings
from ct.standardise import StandardiseSettings
from dataset import ScanRecord, SliceDataset, SliceWriter
from detect.bundle import load_bundle, save_bundle
from detect.projection import project_frame
from detect.reconstruct import Reconstruction
from detect.residual import Evidence, Findings
from detect.settings import Settings
from tests.helpers import tiny_bundle
from tests.test_cross_validation import MM, scan

SHOWN = slice(1, 2), slice(2, 6), slice(2, 10)             # 32 pixels
TRUE = slice(1, 2), slice(2, 6), slice(2, 6)               # 16 of them


def held_out(scan_id, spot=0):
    """Three slices of 32 HU; `spot` pixels of the lowest one are 60 HU denser."""
    hu = torch.full((3, 12, 12), 32.0)
    hu[0, 0, :spot] += 60
    return HeldOut(scan_id, hu, torch.ones(3, 12, 12, dtype=torch.bool), np.array([10.0, 5.0, 0.0]))


def paste_each(scan_id, hu, brain, below_vertex_mm, side_mm):
    """A lesion of 40 HU in SHOWN, of which TRUE is the truth; and in b a second kind that is all marked."""
    def lesion(kind, shown, true):
        ill, truth = hu.copy(), np.zeros(hu.shape, bool)
        ill[shown] += 40
        truth[true] = True
        return pasted.Pasted(kind, ill, truth)

    found = [lesion("intraparenchymal", SHOWN, TRUE)]
    return found + ([lesion("infarct", TRUE, TRUE)] if scan_id == "b" else []), [f"{scan_id}: no room for epidural"]


class Flat:
    """32 HU everywhere; counts how often it is asked."""

    asked = 0

    def closest_normal(self, hu, brain, below_vertex_mm, watch):
        assert watch == "watched"
        self.asked += 1
        return Reconstruction(hu, torch.full_like(hu, 32), {}, {})


class Above:
    """Marks what is more than `level` HU away."""

    def __init__(self, level):
        self.level = level

    def watch(self, brain, below_vertex_mm):
        return "watched"

    def evidence(self, found, brain, below_vertex_mm, watch):
        return Evidence(found.difference_hu, brain, below_vertex_mm, brain)

    def assess(self, seen):
        mask = seen.residual.abs() > self.level
        return Findings(seen.residual, mask, mask, mask.sum((1, 2)).float())


def figures(monkeypatch, reconstructor=None):
    monkeypatch.setattr(pasted, "paste_each", paste_each)
    return evaluate(reconstructor or Flat(), {"30": Above(30), "50": Above(50), "70": Above(70)},
                    [held_out("a", spot=3), held_out("b")], 4.0)


def test_figures_by_hand(monkeypatch):
    rows = figures(monkeypatch)
    # Of 16 true pixels all are marked among the 32 shown; in a with the 3 of its spot, which are marked healthy, too.
    bleed = (2 * 16 / (16 + 35) + 2 * 16 / (16 + 32)) / 2
    assert rows["30"]["dice_by_kind"]["intraparenchymal"] == pytest.approx(bleed)
    assert rows["30"]["dice_by_kind"]["infarct"] == 1 and rows["30"]["dice_by_kind"]["epidural"] is None
    assert rows["30"]["dice"] == pytest.approx((bleed + 1) / 2)             # kinds weigh alike: one has a lesion more
    assert rows["30"]["healthy_pixels"] == [3, 0] and rows["30"]["healthy_marked"] == 1
    assert rows["50"]["dice"] == 0 and rows["50"]["healthy_pixels"] == [3, 0]
    assert rows["70"]["healthy_pixels"] == [0, 0] and rows["70"]["healthy_marked"] == 0
    for row in rows.values():
        assert row["lesions"] == dict.fromkeys(pasted.KINDS, 0) | {"intraparenchymal": 2, "infarct": 1}
        assert row["scans"] == 2 and row["left_out"] == ["a: no room for epidural", "b: no room for epidural"]


def test_every_case_is_reconstructed_once_whatever_the_rows(monkeypatch):
    counted = Flat()
    figures(monkeypatch, counted)
    assert counted.asked == 2 + 3


def test_table(monkeypatch):
    lines = table(figures(monkeypatch)).splitlines()
    assert lines[0] == ("| mask | mean | intraparenchymal | subdural | epidural | subarachnoid | intraventricular | "
                        "infarct | healthy: pixels a scan | healthy scans with any |")
    assert lines[2:] == ["| 30 | 0.82 | 0.65 | - | - | - | - | 1.00 | 2 | 1 of 2 |",
                         "| 50 | 0.00 | 0.00 | - | - | - | - | 0.00 | 2 | 1 of 2 |",
                         "| 70 | 0.00 | 0.00 | - | - | - | - | 0.00 | 0 | 0 of 2 |"]


def test_rows_are_the_bundles_own_and_those_that_change_its_mask():
    own = Settings(measure="surprise").replace(surprise_mask=3.5, filter="band")
    rows = settings_of(own, [["surprise_mask=3", "extent_hu=0"], ["component_at_512=300"]])
    assert rows == {OWN: own, "surprise_mask=3 extent_hu=0": own.replace(surprise_mask=3.0, extent_hu=0.0),
                    "component_at_512=300": own.replace(component_at_512=300)}


@pytest.mark.parametrize("row, complaint", [
    (["surprise_mask=3", "filter=median"], "--row surprise_mask=3 filter=median: expected what only draws the mask, "
                                           "surprise_mask, component_at_512, extent_hu; for the rest"),
    (["predicted_noise=false"], "--row predicted_noise=false: expected what only draws the mask"),
    (["scan_score=top3"], "--row scan_score=top3: expected what only draws the mask"),
    (["surprise_msk=3"], "--row: no setting surprise_msk; there are"),
    (["surprise_mask"], "--row surprise_mask: expected KEY=VALUE"),
    (["extent_hu=-1"], "--row: extent_hu must be at least 0"),
])
def test_what_a_row_must_not_hold(row, complaint):
    with pytest.raises(ValueError) as error:
        settings_of(Settings(measure="surprise"), [row])
    assert str(error.value).startswith(complaint)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four healthy heads of 32 x 32 pixels, all held out."""
    path = tmp_path_factory.mktemp("lesion-mask") / "scans.lmdb"
    settings = PreprocessSettings(StandardiseSettings(size=32), min_brain_fraction=0.01)            # tiny_bundle's
    with SliceWriter(path, settings.to_json()) as writer:
        for s in range(4):
            writer.add(ScanRecord.encode(f"head{s}", *scan(s), MM), "val", f"p{s}")
    return path


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    """A bundle that judges by surprise, calibrated on them; its mask is of its own kind."""
    folder = tmp_path_factory.mktemp("models")
    command = ["--encoder", str(tiny_bundle(folder / "votes")), "--data", str(data), "--out", str(folder / "surprise"),
               "--device", "cpu"]
    assert latent_stats.main([*command, "--set", "measure=surprise", "surprise_mask=1", "component_at_512=500"]) == 0
    return folder / "surprise"


def test_the_command(data, model, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["--model", str(model), "--data", str(data), "--out", str(out), "--device", "cpu", "--every", "3"]
    assert lesion_mask.main([*command, "--row", "surprise_mask=9", "--row", "surprise_mask=0", "extent_hu=0"]) == 0
    said = capsys.readouterr().out
    assert (out / "table.md").read_text() in said and "head3: paste: no room for intraventricular" in said
    rows = json.loads((out / "figures.json").read_text())
    assert list(rows) == [OWN, "surprise_mask=9", "surprise_mask=0 extent_hu=0"]
    nothing, most = list(rows.values())[1:]
    assert nothing["mask"] == {"surprise_mask": 9, "component_at_512": 500, "extent_hu": 8}     # none is above 8
    assert nothing["dice"] == 0 and nothing["healthy_pixels"] == [0, 0] and nothing["healthy_marked"] == 0
    assert most["healthy_marked"] == most["scans"] == 2 and most["lesions"]["subdural"] == 2
    # The bundle's own row is what its own measure finds in the first and in the fourth of the scans.
    bundle, held = load_bundle(model), SliceDataset(data, "val")
    assert dataclasses.asdict(bundle.settings.mask) == rows[OWN]["mask"]
    for place, index in enumerate((0, 3)):
        one = held.scan(index)
        marked = project_frame(bundle.reconstructor, bundle.measure, one["hu"].float(), one["brain"],
                               one["below_vertex_mm"].numpy())[2].mask.sum()
        assert rows[OWN]["healthy_pixels"][place] == marked > 0
        assert marked < most["healthy_pixels"][place]


def test_what_cannot_be_measured_is_told_before_anything_is(data, model, slices32, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lesion_mask, "evaluate", None)
    command = ["--out", str(tmp_path / "no"), "--device", "cpu"]

    def refused(*flags):
        assert lesion_mask.main([*command, *map(str, flags)]) == 2
        return capsys.readouterr().err

    assert "--every must be at least 1, got 0" in refused("--model", model, "--data", data, "--every", "0")
    assert "--row pool=area: expected what only" in refused("--model", model, "--data", data, "--row", "pool=area")
    assert f"--model {model}: made for slices prepared in another way" in refused("--model", model, "--data", slices32)
    assert "no such folder" in refused("--model", tmp_path / "none", "--data", data)
    bundle = load_bundle(model)
    save_bundle(tmp_path / "bare", bundle.reconstructor, bundle.settings, bundle.meta)
    assert "no statistics of healthy residuals" in refused("--model", tmp_path / "bare", "--data", data)
    assert not list((tmp_path / "no").iterdir())
