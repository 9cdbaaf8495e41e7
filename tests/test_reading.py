"""What a reader in training is shown, and what counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dataset import SliceDataset
from detect.inpainting import InpaintingSettings
from gan import corrupt, reading
from gan.encoding import method_of
from gan.reading import Examples, reading_loss, targets
from gan.settings import ReaderConfig
from gan.snapshots import load_snapshot
from op.banded import dilated

RANGE = (-20.0, 100.0)


def head(batch: int = 2, size: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """HU with grain, soft brain and bone [B, N, N]: a disc in a ring."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    radius = torch.from_numpy(np.hypot(x, y)).expand(batch, size, size) / size
    bone = (radius >= 0.36) & (radius < 0.42)
    grain = 4 * torch.randn(batch, size, size, generator=torch.Generator().manual_seed(0))
    return torch.where(bone, 95.0, torch.where(radius < 0.36, 32 + grain, 0.0)).float(), radius < 0.36, bone


def test_a_pixel_is_to_be_found_where_it_clearly_changed_and_in_between_it_does_not_count():
    change, soft = torch.zeros(1, 64, 64), torch.ones(1, 64, 64, dtype=torch.bool)
    for column, hu in enumerate((0.0, 1.0, 3.0, 9.0, -3.0, -9.0)):
        change[0, :, 10 * column:10 * column + 10] = hu
    soft[0, :5] = False
    present, counted = targets(change, soft)
    middle = [10 * column + 5 for column in range(6)]
    assert present[0, 0, 30, middle].tolist() == [0, 0, 0, 1, 0, 0]
    assert present[0, 1, 30, middle].tolist() == [0, 0, 0, 0, 0, 1]
    assert counted[0, 0, 30, middle].tolist() == [1, 1, 0, 1, 0, 1]
    assert not counted[0, 0, :5].any()


def test_what_a_scanner_does_is_nothing_to_be_found():
    """Gain, shift, rim and noise change a slice by many HU; without shapes nothing of it is a target."""
    hu, soft, bone = head()
    slices = {"hu": hu.to(torch.int16), "brain": soft | bone}
    drawn = Examples(ReaderConfig(shapes=0.0), RANGE)(slices, torch.Generator().manual_seed(1))
    assert (drawn["query_hu"] - hu).abs()[soft].max() > 3
    assert not drawn["change_hu"].any()
    drawn = Examples(ReaderConfig(shapes=1.0), RANGE)(slices, torch.Generator().manual_seed(1))
    assert targets(drawn["change_hu"], drawn["brain"] & ~drawn["bone"])[0].any()
    assert not drawn["change_hu"][~drawn["brain"]].any()


def test_a_scanner_leaves_bone_and_air_and_hangs_on_the_seed():
    hu, soft, bone = head(8)
    first, again, other = (corrupt.scanner(hu, soft, bone, torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first[~soft], hu[~soft])


def test_a_rim_is_under_the_skull(monkeypatch):
    """By 10 HU times exp(-depth / 2), with every other part of a scanner at nothing."""
    for name, value in (("GAIN", 0.0), ("SHIFT_HU", 0.0), ("NOISE_HU", 0.0), ("SHARED_HU", 0.0), ("HARD", 0.0),
                        ("RIM_HU", (10, 10)), ("RIM_LENGTH", (2, 2)), ("SHADED", 1.0)):
        monkeypatch.setattr(corrupt, name, value)
    hu, soft, bone = head(32, 128)
    added = (corrupt.scanner(hu, soft, bone, torch.Generator().manual_seed(0)) - hu).abs()
    edge = soft & dilated(~soft, 1)
    with_rim = added[:, 64, 64 - 46:64].amax(1) > 1
    assert 10 < with_rim.sum() < 32                                    # 0.7 of them
    even = [i for i in range(32) if with_rim[i] and added[i][edge[i]].std() < 0.7]
    assert even and added[even][edge[even]].mean() == pytest.approx(10 * np.exp(-0.5), rel=0.15)
    assert added[even, 64, 64].max() < 0.01


def test_the_grain_of_the_slice_stays_in_most_shapes(monkeypatch):
    """With OWN_GRAIN at 1 what is drawn has the slice's grain, with 0 the shape's own, which a filling may lack."""
    hu, soft, _ = head(24)

    def grain(own):
        monkeypatch.setattr(corrupt, "OWN_GRAIN", own)
        drawn = corrupt.draw_grained(hu, soft, 1.0, np.random.default_rng(5))
        return drawn, (drawn - hu).abs() > 8

    (kept, where), (lost, _) = grain(1.0), grain(0.0)

    def along(x):
        fine = [one - corrupt.smoothed(one, soft, 1.0) for one in (x, hu)]
        return np.corrcoef(fine[0][where], fine[1][where])[0, 1]

    assert along(kept) > along(lost) + 0.2
    assert torch.equal(kept[~soft], hu[~soft])


def test_some_shapes_hardly_differ(monkeypatch):
    hu, soft, _ = head(16)
    changes = []
    for hardly in (0.0, 1.0):
        monkeypatch.setattr(corrupt, "HARDLY", hardly)
        monkeypatch.setattr(corrupt, "OWN_GRAIN", 0.0)
        changes.append((corrupt.draw_grained(hu, soft, 1.0, np.random.default_rng(2)) - hu).abs().amax((1, 2)))
    assert (changes[1] <= corrupt.HARDLY_SHARE * changes[0] + 1e-4).all() and changes[0].min() > 1


def test_the_loss_by_hand():
    """One pixel to be found, at log odds 0, one that is not, and one that does not count."""
    found, present = torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 3)
    counted = torch.tensor([[[[1.0, 1.0, 0.0]]]])
    found[0, 0, 0, 2], present[0, 0, 0, 0] = 50.0, 1.0
    entropy = (2 * np.log(2) + 3 * np.log(2)) / 2 / 2                  # of two sides and two pixels
    overlap = [(2 * 0.5 + 20) / (1 + 1 + 20), 20 / (1 + 20)]
    assert reading_loss(found, present, counted).item() == pytest.approx(entropy + 0.3 * (1 - np.mean(overlap)))


def test_the_loss_falls_on_slices_seen_again_and_again(hiding_run, slices32):
    cpu = torch.device("cpu")
    method = method_of(load_snapshot(hiding_run), InpaintingSettings(), cpu, torch.float32)
    config = ReaderConfig(batch=4, width=24, depth=2, precision="fp32", warm_up=0, lr=5e-3)
    trainer, data = reading.ReadingTrainer(config, method, RANGE, cpu), SliceDataset(slices32, "train")
    slices = {key: torch.stack([data[i][key] for i in (2, 3, 4, 5)]) for key in ("hu", "brain")}
    batch = trainer.prepare(slices, torch.Generator().manual_seed(0))
    trainer.set_rates(0.0)
    first, *_, last = (trainer.learn(batch, i, 0.0)["loss"].item() for i in range(40))
    assert last < 0.8 * first and trainer.images_seen == 160
    assert not any(p.requires_grad for net in (method.generator, method.encoder) for p in net.parameters())


def test_the_second_step_is_on_the_mirror_images():
    shown = []
    for mirrored in (True, False):
        config = ReaderConfig(batch=2, width=24, depth=1, mirrored=mirrored, precision="fp32")
        trainer = reading.ReadingTrainer(config, None, RANGE, torch.device("cpu"))
        hu, soft, bone = head()
        images, change = torch.randn(2, 6, 64, 64), torch.zeros(2, 64, 64)
        change[:, 20:30, 20:30] = 9.0
        trainer.images = lambda _, images=images: images
        trainer._step = lambda *parts: shown.append(parts) or torch.tensor(1.0)
        trainer.learn({"change_hu": change, "brain": soft | bone, "bone": bone}, 0, 0.0)
    assert len(shown) == 3
    assert all(torch.equal(one.flip(-1), other) for one, other in zip(shown[0], shown[1]))
    assert torch.equal(shown[0][1], shown[2][1]) and shown[0][1][:, 0, 25, 25].all()


def test_the_rate_rises_and_falls():
    trainer = reading.ReadingTrainer(ReaderConfig(batch=4, warm_up=40, lr=1.0, width=24, depth=1), None, RANGE,
                                     torch.device("cpu"))
    rates = []
    for seen, done in ((0, 0.0), (36, 0.0), (400, 0.5), (400, 1.0)):
        trainer.images_seen = seen
        trainer.set_rates(done)
        rates.append(trainer.optimiser.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 1.0, 0.51, 0.02])
