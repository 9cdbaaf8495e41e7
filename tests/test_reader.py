"""The reader: what it sees, and what becomes of what it says, to the score and through a bundle."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from common.weights import CheckpointError, write_json
from detect.bundle import load_bundle, save_bundle
from detect.inpainting import Inpainting, InpaintingSettings
from detect.normative import Normal, fit_normal
from detect.reader import SCALE, Reader, reader_input
from detect.reconstruct import Reconstruction
from detect.settings import Settings
from detect.surprise import Surprise, SurpriseSettings
from model import Encoder, Generator, ModelConfig

N, WIDTHS = 32, (8, 16)
TINY = ModelConfig(size=N, style_dim=16, n_mlp=2, channel_max=16, encoder_noise=True, noise_channels=True,
                   encoder_masks=True, encoder_width=0.5, encoder_code=8)
MM = np.array([20.0, 15.0, 10.0, 5.0])


def reader(seed: int = 0) -> Reader:
    """With a last layer that says something: an untrained one says RARE everywhere."""
    torch.manual_seed(seed)
    network = Reader(WIDTHS)
    torch.nn.init.normal_(network.last.weight)
    return network.eval().requires_grad_(False)


def head(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """HU, brain and bone [4, N, N]: a disc of brain in a ring of bone."""
    y, x = np.mgrid[:N, :N] - (N - 1) / 2
    radius = torch.from_numpy(np.hypot(x, y)).expand(len(MM), N, N)
    grain = 3 * torch.randn(len(MM), N, N, generator=torch.Generator().manual_seed(seed))
    bone = (radius >= 12) & (radius < 14)
    return torch.where(bone, 95.0, torch.where(radius < 12, 32 + grain, 0.0)).float(), radius < 12, bone


def method(with_reader: bool = True) -> Inpainting:
    torch.manual_seed(0)
    networks = [network.eval().requires_grad_(False) for network in (Generator(TINY), Encoder(TINY))]
    return Inpainting(InpaintingSettings(), *networks, (0, 70), reader() if with_reader else None)


# ---- What it sees

def test_a_reader_sees_the_slice_its_mirror_image_and_the_difference_in_soft_brain():
    brain, bone = torch.ones(2, 1, N, N, dtype=torch.bool)
    bone = torch.zeros_like(brain)
    brain[:, :, :2], bone[:, 5, 5] = False, True
    query, expected = torch.full((1, N, N), 50.0), torch.full((1, N, N), 30.0)
    query[:, 20, 4] = 90.0                                             # one pixel: grain, and denser than TOP_HU
    images = reader_input(query, expected, brain, bone)
    assert images.shape == (1, 6, N, N)
    assert torch.equal(images[:, 1], images[:, 0].flip(-1))
    assert images[0, [0, 2], 9, 9].tolist() == pytest.approx([1, 1])   # (50 - 30) / 20
    assert not images[0, 2, :, :2].any() and images[0, 2, 5, 5] == 0   # no brain; bone
    assert (images[0, 3] == 0).all()
    assert torch.equal(images[0, 4].bool(), bone[0]) and torch.equal(images[0, 5].bool(), brain[0])
    assert images[0, 0].max() < 2.001                                   # 70 HU


def test_grain_is_smoothed_away_before_it_is_read():
    hu, brain, bone = head()
    soft = brain & ~bone
    size = 4 * N                                                       # at 128 pixels the Gaussian is 0.7 of one
    hu, soft, bone = (t.repeat_interleave(4, 1).repeat_interleave(4, 2) for t in (hu, soft, bone))
    grain = 6 * torch.randn(hu.shape, generator=torch.Generator().manual_seed(2))
    plain, rough = (reader_input(q, torch.full_like(hu, 30), soft, bone) for q in (hu, hu + grain * soft))
    assert plain.shape[-1] == size
    for channel in (0, 2):
        assert 20 * (rough - plain)[:, channel][soft].std() < 0.6 * 6


def test_the_size_is_kept_and_only_soft_brain_is_spoken_of():
    hu, brain, bone = head()
    bone[:, 14:16, 14:16] = True                                       # a calcification
    found = reader().read(hu, torch.full_like(hu, 30), brain, bone)
    assert found.shape == (4, 2, N, N)
    assert not found[~(brain & ~bone)[:, None].expand_as(found)].any()
    silent = (brain & ~bone)[:, None] & (found == 0)
    assert (silent.sum((2, 3)) == 1).all()                             # of each slice and side the median alone


def test_the_second_side_is_turned_so_that_below_0_is_not_dense_enough():
    network = Reader(WIDTHS).eval()
    with torch.no_grad():
        network.last.bias.copy_(torch.tensor([3.0] * 4 + [1.0] * 4))
    hu, brain, bone = head()
    soft = brain & ~bone
    found = network.read(hu, hu, brain, bone)
    assert not found.any()                                  # the same everywhere: nothing stands out
    spot = torch.zeros(N, N, dtype=torch.bool)
    spot[N // 2, N // 2] = True
    network.forward = lambda images: torch.where(spot, torch.tensor([3.0, 1.0])[:, None, None], -4.0).expand(
        len(images), 2, N, N)
    found = network.read(hu, hu, brain, bone)
    assert torch.equal(found[:, :, spot][..., 0], SCALE * torch.tensor([[7.0, -5.0]]).expand(4, 2))
    assert not found[(soft & ~spot)[:, None].expand_as(found)].any()


def test_bfloat16_says_the_same_but_for_its_rounding():
    hu, brain, bone = head()
    network = reader()
    exact = network.read(hu, hu.flip(0), brain, bone)
    network.compute_dtype = torch.bfloat16
    rounded = network.read(hu, hu.flip(0), brain, bone)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_slices_do_not_hang_on_each_other():
    hu, brain, bone = head()
    network = reader()
    whole = network.read(hu, hu.flip(0), brain, bone)
    alone = network.read(hu[2:3], hu.flip(0)[2:3], brain[2:3], bone[2:3])
    assert torch.allclose(whole[2:3], alone, atol=1e-4)


# ---- What the measure makes of it

def test_what_it_says_is_judged_by_what_it_says_of_the_healthy_and_weighs_as_told():
    measure, rng = Surprise(SurpriseSettings(filter="band", hypodense=0)), torch.Generator().manual_seed(0)
    hu, brain, bone = head()

    def found(seed, spot=0.0):
        difference = torch.randn(hu.shape, generator=rng)
        read = torch.randn(4, 2, N, N, generator=rng)
        read[2, 0, 15:18, 15:18] += spot
        difference[2, 15:18, 15:18] += spot / 10
        return Reconstruction(hu, hu - difference, {}, {}, None, read)

    fitted, _ = measure.fit([measure.evidence(found(s), brain, MM) for s in range(8)])
    assert fitted.normal.stats.mean.shape[1] == 4
    evidence = fitted.evidence(found(9, spot=20.0), brain, MM)
    assert evidence.scales.shape == (4, 4, N, N)
    surprise = fitted.normal.surprise(evidence.scales, evidence.searched, MM)

    def at_the_spot(read):
        weighed = Surprise(SurpriseSettings(filter="band", hypodense=0, read=read), None, fitted.normal)
        return weighed.assess(evidence).anomaly[2, 16, 16]

    assert surprise[2, 2, 16, 16] > 4 and surprise[2, 0, 16, 16] > 0.5
    assert at_the_spot(0.0) == surprise[2, 0, 16, 16]
    assert at_the_spot(1.0) == surprise[2, 2, 16, 16]
    assert at_the_spot(0.25) == pytest.approx(0.75 * surprise[2, 0, 16, 16].item() + surprise[2, 2, 16, 16].item() / 4)


def test_both_sides_of_what_it_says_join_their_sides_of_the_residual():
    surprise = torch.zeros(1, 4, 2, 2)
    surprise[0, 0, 0, 0], surprise[0, 2, 0, 0] = 2.0, 4.0              # hyperdense: fine scale and first side
    surprise[0, 1, 1, 1], surprise[0, 3, 1, 1] = -1.0, -3.0            # hypodense: coarse scale and second side
    measure = Surprise(SurpriseSettings(hypodense=0.5, read=0.5))
    nothing = measure.evidence(Reconstruction(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), {}, {}),
                               torch.ones(1, 2, 2, dtype=torch.bool), MM[:1])
    anomaly = measure.findings(surprise, nothing).anomaly
    assert torch.equal(anomaly, torch.tensor([[[3.0, 0.0], [0.0, -1.0]]]))


def test_healthy_residuals_without_a_reader_do_not_judge_one():
    residuals, brain = [torch.randn(4, 2, N, N) for _ in range(4)], torch.ones(4, N, N, dtype=torch.bool)
    normal, _ = fit_normal(residuals, [brain] * 4, [MM] * 4)
    with pytest.raises(ValueError, match="of 2 kinds, these of 4; calibrate anew"):
        normal.surprise(torch.zeros(4, 4, N, N), brain, MM)
    tensors = normal.to_tensors() | {"tails": torch.zeros(4, 2, 17)}
    with pytest.raises(ValueError, match="of 2 kinds, tails of 4"):
        Normal.from_tensors(tensors)


@pytest.mark.parametrize("weight", (-0.1, 1.1))
def test_a_weight_beyond_0_to_1_is_refused(weight):
    with pytest.raises(ValueError, match="read must be at least 0 and at most 1"):
        SurpriseSettings(read=weight)


# ---- In a method and its bundle

def test_the_closest_normal_comes_with_what_the_reader_says_and_is_the_same_without():
    hu, brain, _ = head()
    with_one, without = (method(one).closest_normal(hu, brain, MM) for one in (True, False))
    assert without.read is None and with_one.read.shape == (4, 2, N, N) and with_one.read.any()
    assert torch.equal(with_one.normal_hu, without.normal_hu)


META = {"preprocessing": None, "calibration": None, "provenance": None}


def test_a_bundle_keeps_its_reader(tmp_path):
    hu, brain, _ = head()
    inpainting = method()
    folder = save_bundle(tmp_path / "model", inpainting, Settings("inpainting", measure="surprise"), META,
                         dtype=torch.float32)
    bundle = load_bundle(folder, precision="fp32")
    assert "reader.safetensors" in bundle.meta["files"]
    expected = inpainting.closest_normal(hu, brain, MM).read
    assert torch.allclose(bundle.reconstructor.closest_normal(hu, brain, MM).read, expected, atol=1e-4)


def test_a_bundle_whose_reader_does_not_fit_is_refused_by_name(tmp_path):
    folder = save_bundle(tmp_path / "model", method(), Settings("inpainting", measure="surprise"), META)
    content = json.loads((folder / "model.json").read_text())
    of = content["config"]["reader"]
    for reader, words in ((of | {"widths": [8, 32]}, "reader.safetensors"),
                          (of | {"widths": ["a"]}, "model.json: config: reader: expected channels"),
                          (of | {"widths": [7, 16]}, "model.json: config: reader: expected channels"),
                          (of | {"version": 1}, "config: reader: of another version .* latent_stats.py --reader"),
                          (list(WIDTHS), "config: reader: of another version")):
        content["config"]["reader"] = reader
        write_json(folder / "model.json", content)
        with pytest.raises(CheckpointError, match=words):
            load_bundle(folder)
