"""The inversion benchmark: its three figures on arrays counted by hand, and what it does with the query; the method."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import baselines, inversion, pasted
from benchmarks.inversion import HeldOut, erasure, evaluate, sharpness
from ct.window import decode, encode
from dataset import SliceDataset
from detect.bundle import save_bundle
from detect.inversion import Inversion, InversionSettings, draw
from detect.pca import PcaFit
from detect.reconstruct import error_hu
from detect.settings import Settings
from tests.bundle_data import TINY, networks
from tests.test_pasted import MM, SIDE, head

CLIP = (0.0, 70.0)


def square(low=2, high=12, size=14):
    """One slice: a ramp of 3 HU a column, and a brain that is a square of 10 pixels a side."""
    ramp = 3.0 * torch.arange(size).float().expand(1, size, size)
    brain = torch.zeros(1, size, size, dtype=torch.bool)
    brain[:, low:high, low:high] = True
    return ramp.clone(), brain


def held_out():
    hu, brain = head()
    return HeldOut("head", torch.from_numpy(hu), torch.from_numpy(brain), MM)


def test_surroundings_are_drawn_where_the_networks_are():
    """A GPU's part is played by a device that holds no numbers."""
    class Networks:
        device = torch.device("meta")

        @staticmethod
        def from_surroundings(hu, bone):
            assert hu.device == bone.device == Networks.device and bone.dtype == torch.bool
            return torch.ones(hu.shape)

    hu, brain = square()
    assert (inversion.from_surroundings(Networks())(hu, brain, MM) == 1).all()


def test_error_counts_in_the_brain_alone():
    query, brain = square()
    normal = torch.where(brain, query - 2, query + 500)
    normal[0, 5, 5] += 102                          # 100 instead of 2 in one of 100 pixels
    assert error_hu(query, normal, brain) == pytest.approx((99 * 2 + 100) / 100)


def test_sharpness_is_a_ratio_of_gradients_three_pixels_inside_the_brain():
    query, brain = square()
    normal = query / 4                              # a gradient of 0.75 instead of 3 HU a pixel
    normal[:, :5] = normal[:, :, :4] = 1e3          # not inside the eroded brain of rows and columns 5 to 8, nor
    normal[:, 4] = normal[:, 5]                     # what its central differences reach
    normal[:, :, 4] = query[:, :, 4] / 4
    assert sharpness(query, normal, brain) == pytest.approx(0.25)


def test_no_brain_left_for_sharpness_is_an_error():
    query, brain = square(2, 7)
    with pytest.raises(ValueError, match="no brain is left after an erosion by 3 pixels"):
        sharpness(query, query, brain)
    with pytest.raises(ValueError, match="the query is the same everywhere"):
        sharpness(torch.zeros_like(query), query, square()[1])


def test_erasure_is_the_part_of_the_contrast_that_is_not_drawn():
    change = torch.tensor([[[20.0, -10.0], [100.0, 999.0]]])       # 100 counts as 60; the last lies outside
    truth = torch.tensor([[[True, True], [True, False]]])
    drawn = torch.tensor([[[5.0, -4.0], [18.0, 777.0]]])
    assert erasure(change, drawn, truth) == pytest.approx(1 - (5 + 4 + 18) / (20 + 10 + 60))
    assert erasure(change, torch.zeros_like(drawn), truth) == 1
    assert erasure(change, -drawn, truth) > 1                      # drawn with the wrong sign: more than erased
    with pytest.raises(ValueError, match="does not change the query"):
        erasure(torch.zeros_like(change), drawn, truth)


def test_a_copy_has_no_error_and_erases_nothing_but_what_exceeds_the_clip():
    row = evaluate(lambda hu, brain, mm: hu, [held_out()], SIDE, CLIP)
    assert (row["error"], row["sharpness"]) == (0, 1)
    assert all(value == pytest.approx(0, abs=1e-6) for value in row["erasure_by_kind"].values())
    assert row["lesions"] == dict.fromkeys(pasted.KINDS, 1) and row["scans"] == 1 and not row["left_out"]


def test_what_does_not_look_at_the_query_erases_everything():
    row = evaluate(lambda hu, brain, mm: torch.full_like(hu, 30), [held_out()], SIDE, CLIP, lesions=2)
    assert row["erasure"] == 1 and row["sharpness"] == 0
    assert row["lesions"] == dict.fromkeys(pasted.KINDS, 2)


def test_queries_and_lesions_are_clipped_before_they_are_reconstructed():
    seen = []
    scan = held_out()
    scan.hu[0, 0, 0] = 900
    evaluate(lambda hu, brain, mm: seen.append(hu) or hu, [scan], SIDE, (10, 50))
    assert len(seen) == 1 + len(pasted.KINDS)
    assert all((hu.min(), hu.max()) == (10, 50) for hu in seen)
    assert scan.hu[0, 0, 0] == 900                                 # the caller's scan is left as it is


def test_a_lesion_without_room_is_told_and_leaves_no_figure():
    scan = held_out()
    solid = HeldOut("solid", scan.hu.clamp(min=32) + torch.linspace(0, 5, 64), scan.brain, MM)
    row = evaluate(lambda hu, brain, mm: hu, [solid], SIDE, CLIP)
    assert [reason for reason in row["left_out"] if "solid: paste: no room for intraventricular" in reason]
    assert row["lesions"]["intraventricular"] == 0 and row["erasure_by_kind"]["intraventricular"] is None
    assert "| - |" in inversion.table({"copy": row})


def test_command_on_a_baseline(slices32, tmp_path, capsys):
    baseline = baselines.KINDS["pca"](PcaFit(components=2, step_mm=20.0))
    baseline.fit(SliceDataset(slices32, "train"))
    baseline.save(tmp_path / "pca.safetensors")
    out = tmp_path / "out"
    command = ["--data", str(slices32), "--out", str(out), "--baseline", str(tmp_path / "pca.safetensors")]
    assert inversion.main(command) == 0
    row = json.loads((out / "figures.json").read_text())["PCA by position"]
    scan, = inversion.held_out_scans(SliceDataset(slices32, "val"))
    normal = baseline.closest_normal(scan.hu, scan.brain, scan.below_vertex_mm).normal_hu
    assert row["error"] == pytest.approx((scan.hu - normal).abs()[scan.brain].mean().item(), abs=1e-3)
    assert f"| PCA by position | {row['error']:.2f} |" in (out / "table.md").read_text()
    assert "| goal | at most 3.4 |" in capsys.readouterr().out


def test_command_on_a_bundle_measures_its_code_alone_as_well(slices32, tmp_path):
    data = SliceDataset(slices32, "val")
    generator, _, encoder = networks(dataclasses.replace(TINY, encoder_noise=True))
    for name, strength in generator.named_parameters():
        if "noise" in name:
            torch.nn.init.ones_(strength)                              # so that the noise maps show in the figures
    meta = {"preprocessing": data.manifest["settings"], "calibration": None, "provenance": None}
    save_bundle(tmp_path / "tiny", Inversion(InversionSettings(), generator, encoder), Settings("inversion"), meta,
                dtype=torch.float32)
    out = tmp_path / "out"
    assert inversion.main(["--data", str(slices32), "--out", str(out), "--model", str(tmp_path / "tiny"), "--device",
                           "cpu"]) == 0
    rows = json.loads((out / "figures.json").read_text())
    scan, = inversion.held_out_scans(data)
    with torch.no_grad():
        code, noise = encoder.invert(encode(scan.hu), generator)
        for name, maps in (("tiny", noise), ("tiny, code alone", "const")):
            drawn = decode(generator.synthesis(code, maps))
            assert rows[name]["error"] == pytest.approx(error_hu(scan.hu, drawn, scan.brain), rel=0.02)   # bfloat16
            assert rows[name]["sharpness"] == pytest.approx(sharpness(scan.hu, drawn, scan.brain), rel=0.03)
    assert rows["tiny"]["sharpness"] > rows["tiny, code alone"]["sharpness"] + 0.1


def test_command_refuses_what_cannot_be_measured(slices32, tmp_path, capsys):
    assert inversion.main(["--data", str(slices32)]) == 2
    assert "give --model or --baseline" in capsys.readouterr().err
    hu = baselines.KINDS["hu"]()
    hu.save(tmp_path / "hu.safetensors")
    assert inversion.main(["--data", str(slices32), "--baseline", str(tmp_path / "hu.safetensors")]) == 2
    assert "hu draws no closest normal" in capsys.readouterr().err
    pca = baselines.KINDS["pca"](PcaFit(components=2, step_mm=20.0))
    pca.fit(SliceDataset(slices32, "train"))
    pca.save(tmp_path / "pca.safetensors")
    twice = ["--baseline", str(tmp_path / "pca.safetensors")] * 2                       # one row was lost
    assert inversion.main(["--data", str(slices32), *twice]) == 2
    assert "a second row with the name 'PCA by position'" in capsys.readouterr().err
    pca.trained_on["data"]["settings"] = {**pca.trained_on["data"]["settings"], "slab_mm": 7.0}
    pca.save(tmp_path / "pca.safetensors")
    assert inversion.main(["--data", str(slices32), "--baseline", str(tmp_path / "pca.safetensors")]) == 2
    assert "prepared in another way" in capsys.readouterr().err


# ---- The method

def test_the_closest_normal_by_hand():
    """30 HU drawn everywhere; brain of 33 in bone of 900 in air: 3 HU off in the brain, within the windows' -20..180.

    A reader is asked about just that, and told of the bone.
    """
    generator, _, encoder = networks()
    asked = []
    reader = SimpleNamespace(read=lambda *given: asked.extend(given) or torch.ones(1, 2, 32, 32))
    one = Inversion(InversionSettings(), generator, encoder, reader)
    one.invert = lambda query: encode(torch.full(query[:, 0].shape, 30.0))
    hu, brain = torch.full((1, 32, 32), -1000.0), torch.zeros(1, 32, 32, dtype=torch.bool)
    hu[:, 4:28, 4:28] = 900.0
    hu[:, 8:24, 8:24], brain[:, 8:24, 8:24] = 33.0, True
    found = one.closest_normal(hu, brain, np.zeros(1))
    assert found.error_hu == {"reconstruct": pytest.approx(3.0, abs=1e-4)} and found.read.all()
    assert torch.allclose(found.query_hu, hu.clamp(-20, 180), atol=1e-4)
    assert torch.allclose(found.normal_hu, torch.full_like(hu, 30.0), atol=1e-4)
    assert all(torch.equal(*pair) for pair in zip(asked, (found.query_hu, found.normal_hu, brain, hu == 900)))
    assert len(asked) == 4


@pytest.mark.parametrize("batch", [2, 5])
def test_each_slice_is_drawn_with_its_own_noise_in_any_batch(batch):
    """By a generator whose images are the sum of code and maps, one of which is for all."""
    generator = SimpleNamespace(synthesis=lambda w_plus, noise: w_plus[..., None] + sum(noise))
    w_plus = torch.arange(1.0, 6.0).view(5, 1, 1)
    drawn = draw(generator, w_plus, [10 * w_plus[..., None], torch.full((1, 1, 1, 1), 100.0)], batch)
    assert drawn.flatten().tolist() == [111, 122, 133, 144, 155]
