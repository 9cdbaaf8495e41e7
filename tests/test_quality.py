"""Distances between sets of slices: nothing for equal sets, and known figures for known differences."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from ct.window import decode
from dataset import SliceDataset
from gan import loop
from gan import quality as measures
from gan.quality import InceptionFeatures, errors_hu, frechet_distance, laplacian_pyramid, means, sliced_wasserstein
from gan.reading import ReadingTrainer
from op import binomial_kernel, upfirdn2d


def slices(count=12, size=32, seed=0):
    return 30 + 20 * torch.randn(count, size, size, generator=torch.Generator().manual_seed(seed))


def test_equal_sets_are_at_distance_zero():
    real = slices()
    assert sliced_wasserstein(real, real.clone()) == 0
    assert sliced_wasserstein(real, slices(seed=1)) > 0


def test_a_shift_of_all_hu_counts_in_proportion():
    """At 16 pixels the pyramid is the picture: a shift of d moves the projections on a unit vector u by d sum(u).

    sum(u) over random directions is close to standard normal (49 values), so that its mean size is sqrt(2 / pi).
    """
    real = slices(size=16)
    distances = [sliced_wasserstein(real, real + shift, projections=2000) for shift in (1.0, 3.0, -3.0)]
    assert distances[0] == pytest.approx(math.sqrt(2 / math.pi), rel=0.05)
    assert distances[1] == pytest.approx(3 * distances[0], rel=1e-4)
    assert distances[2] == pytest.approx(3 * distances[0], rel=1e-4)


def test_a_blurred_set_is_farther_the_more_it_is_blurred():
    real = slices()
    kernel = binomial_kernel((1, 2, 1))
    once = upfirdn2d(real[:, None], kernel, pad=(1, 1))
    twice = upfirdn2d(once, kernel, pad=(1, 1))
    assert 1 < sliced_wasserstein(real, once[:, 0]) < sliced_wasserstein(real, twice[:, 0])


def test_sets_of_different_shape_are_refused():
    with pytest.raises(ValueError, match=r"same shape, got \[12, 32, 32\], \[4, 32, 32\]"):
        sliced_wasserstein(slices(), slices(4))


def test_the_pyramid_rebuilds_the_picture():
    hu = slices(2, 64)
    levels = laplacian_pyramid(hu)
    assert [level.shape[-1] for level in levels] == [64, 32, 16]
    x = levels[-1]
    for level in reversed(levels[:-1]):
        up = upfirdn2d(x[:, None], 4 * binomial_kernel((1, 4, 6, 4, 1)), up=2, pad=(2, 2))[:, 0]
        assert up.shape == level.shape
        x = level + up
    torch.testing.assert_close(x, hu, atol=1e-3, rtol=0)


def test_a_flat_picture_has_nothing_in_its_bands():
    band, low = laplacian_pyramid(torch.full((1, 32, 32), 40.0))
    torch.testing.assert_close(band[:, 4:-4, 4:-4], torch.zeros(1, 24, 24), atol=1e-4, rtol=0)
    torch.testing.assert_close(low[:, 2:-2, 2:-2], torch.full((1, 12, 12), 40.0), atol=1e-4, rtol=0)


def test_frechet_distance_of_gaussians_by_formula():
    """Independent features: |m_a - m_b|^2 + sum (s_a - s_b)^2; correlated: tr(A + B - 2 sqrt(A B))."""
    # The four corners (+-1, +-1) have mean 0 and covariance 4/3 I.
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    other = corners * torch.tensor([2.0, 3.0]) + torch.tensor([3.0, -4.0])
    assert frechet_distance(corners, other) == pytest.approx(25 + 4 / 3 * (1 + 4), rel=1e-6)
    assert frechet_distance(corners, corners) == pytest.approx(0, abs=1e-6)
    mixing = torch.tensor([[2.0, 1], [1, 2]])                # symmetric: the covariance is 4/3 of its square
    assert frechet_distance(corners, corners @ mixing) == pytest.approx(4 / 3 * (2 + 10 - 2 * 4), rel=1e-6)


def test_the_mean_of_nothing_is_left_out_and_what_is_not_finite_is_not():
    hu, where = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.bool)
    assert means({"all": errors_hu(hu + 3, hu, ~where), "none": errors_hu(hu + 3, hu, where)}) == {"all": 3.0}
    drawn = torch.tensor([[[math.nan, 0.0], [0.0, 0.0]]])
    assert math.isnan(means({"none": errors_hu(drawn, hu, where)})["none"])


@pytest.mark.parametrize(("content", "said"), [(b"hello", "cannot be read as a state dict"),
                                               (b"no weights", "cannot be read as a state dict"),
                                               ({"bias": torch.zeros(1)}, "not the state dict of torchvision's inc"),
                                               ([1, 2], "expected a state dict, found a list")])
def test_a_file_that_is_not_inceptions_is_refused(content, said, tmp_path):
    path = tmp_path / "inception.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=f"--inception {path}: {said}"):
        InceptionFeatures(path, torch.device("cpu"))


def test_inception_takes_no_random_numbers(tmp_path):
    """They are those of the noise maps: a run with --inception went on with others than if it had not been stopped."""
    torch.save({"bias": torch.zeros(1)}, tmp_path / "inception.pth")
    before = torch.get_rng_state()
    with pytest.raises(ValueError):
        InceptionFeatures(tmp_path / "inception.pth", torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)


class Held:
    """Held-out slices whose HU are their numbers, and no others are read."""

    def __init__(self, count: int):
        self.count, self.read = count, []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict:
        self.read.append(i)
        return {"hu": torch.full((32, 32), i, dtype=torch.int16)}


@pytest.mark.parametrize(("count", "expected"), [(40, list(range(40))), (200, list(range(0, 200, 2)))])
def test_of_many_held_out_slices_evenly_spaced_ones_are_measured(count, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(loop, "MOST_HELD_OUT", 100)
    drawn = []

    def draw(z, noise):
        drawn.append(torch.rand(len(z), 3, 32, 32, generator=torch.Generator().manual_seed(len(drawn))) * 2 - 1)
        return drawn[-1]

    held_out = Held(count)
    quality = loop.Quality(held_out, None, None, "cpu")
    assert held_out.read == expected and quality.val_hu.dtype == torch.int16
    trainer = SimpleNamespace(config=SimpleNamespace(seed=0, style_dim=8), g_ema=draw, device="cpu", images_seen=0)
    found = quality.measure(trainer, tmp_path)
    samples = decode(torch.cat(drawn))
    assert len(samples) == len(expected)
    assert found == {"swd": sliced_wasserstein(quality.val_hu.float(), samples)}


def test_the_frechet_distance_is_to_evenly_spaced_training_slices_of_which_few_are_held_at_once(monkeypatch):
    """At 4,095 slices of 512 pixels all were, in 2 GB."""
    monkeypatch.setattr(loop, "MOST_REAL", 100)
    held, seen = [], []

    def features(images):
        held.append(len(images))
        seen.extend(decode(images)[:, 0, 0].round().int().tolist())
        return torch.zeros(len(images), 4)

    monkeypatch.setattr(loop, "InceptionFeatures", lambda weights, device: features)
    train = Held(150)                                             # as many as 150 // 100 = 1 made all of them
    quality = loop.Quality(Held(40), train, "weights", "cpu")
    assert train.read == [i * 150 // 100 for i in range(100)] and max(held) <= 32 and len(quality.real) == 100
    assert seen == train.read


def test_every_fourth_slice_of_each_scan_evenly_spaced_where_they_are_many(slices32, monkeypatch):
    held_out, both = SliceDataset(slices32, "val"), SliceDataset(slices32, "all")
    assert measures.every_fourth(held_out) == [0, 4] and measures.every_fourth(both) == [0, 4, 8, 12, 16, 20]
    three = SliceDataset(slices32, "all", scans={"head0", "head2"})
    assert measures.every_fourth(three) == [0, 4, 8, 12] and both[8]["scan"] == 1
    monkeypatch.setattr(measures, "MOST_HELD_OUT", 3)
    assert measures.every_fourth(both) == [0, 8, 16]


def test_a_reader_keeps_as_many_held_out_slices_and_no_more(slices32, monkeypatch):
    """All of every fourth slice of every scan stayed in memory, and what is drawn into them, to the end."""
    trainer = SimpleNamespace(prepare=lambda slices, rng: slices, images=lambda examples: None, device="cpu")
    dataset = SliceDataset(slices32, "all")
    before = ReadingTrainer._examples(trainer, dataset)
    for s, (examples, _) in enumerate(before):
        assert torch.equal(examples["hu"], dataset.scan(s)["hu"][::4])
        assert torch.equal(examples["brain"], dataset.scan(s)["brain"][::4])
    monkeypatch.setattr(measures, "MOST_HELD_OUT", 3)
    assert len(before) == 3 and sum(len(one["hu"]) for one, _ in ReadingTrainer._examples(trainer, dataset)) == 3
