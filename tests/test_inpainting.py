"""Inpainting: what is hidden stays hidden, what is anomalous is drawn anew, and the rest stays as it is."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import distributed
import latent_stats
import train_encoder
from common.weights import CheckpointError
from ct.frame import PreprocessSettings
from ct.standardise import StandardiseSettings
from ct.window import decode, encode
from dataset import ScanRecord, SliceDataset, SliceWriter
from detect.bundle import load_bundle
from detect.inpainting import Inpainting, InpaintingSettings
from detect.inversion import bone_mask
from detect.painter import Painter, blocks
from gan import corrupt, encoder_loop, inpainting
from gan.corrupt import hide
from gan.inpainting import Corruption, InpaintingTrainer, open_noise, weighted_distance
from gan.settings import EncoderConfig
from gan.snapshots import load_snapshot
from model import Encoder, Generator, ModelConfig
from tests.helpers import synthetic_head

TINY = ModelConfig(size=32, style_dim=16, n_mlp=2, channel_max=16, encoder_noise=True, noise_channels=True,
                   encoder_masks=True, encoder_width=0.5, encoder_code=8)


def networks() -> tuple[Generator, Encoder]:
    torch.manual_seed(0)
    return Generator(TINY).eval().requires_grad_(False), Encoder(TINY).eval().requires_grad_(False)


# ---- The networks

def test_maps_have_their_layers_channels_and_the_encoder_half_as_many():
    generator, encoder = networks()
    images, nothing = torch.randn(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.bool)
    w_plus, noise = encoder.invert(encoder.masked(images, nothing, nothing), generator)
    assert w_plus.shape == (2, TINY.n_latent, 16)
    assert [list(m.shape) for m in noise[1:]] == [[2, 16, r, r] for r in generator.noise_sizes[1:]]
    assert encoder.convs[0][0].weight.shape[:2] == (8, 5) and generator.convs[0].conv.weight.shape[1] == 16
    assert generator.synthesis(w_plus, noise).shape == (2, 3, 32, 32)


def test_what_is_hidden_cannot_be_seen_but_bone_can():
    generator, encoder = networks()
    torch.nn.init.normal_(encoder.noise_head.maps[-1].weight)
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    hidden, bone = torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    hidden[:, 8:16, 8:16] = bone[:, 8:10] = True
    other = torch.where((hidden & ~bone)[:, None], -images, images)
    bony = torch.where(bone[:, None], -images, images)

    def drawn(x):
        return generator.synthesis(*encoder.invert(encoder.masked(x, hidden, bone), generator))

    assert torch.equal(drawn(images), drawn(other))
    assert not torch.equal(drawn(images), drawn(bony))


def test_a_network_of_no_width_is_refused():
    with pytest.raises(ValueError, match="encoder_width must be above 0"):
        ModelConfig(encoder_width=0)


def test_open_noise_leaves_the_images_and_lets_maps_in():
    generator = Generator(TINY)
    for i, layer in enumerate([generator.conv1, *generator.convs]):
        layer.noise.weight.data.fill_(0.1 * i - 0.2)
    w = torch.randn(1, 16, generator=torch.Generator().manual_seed(2))
    before = generator.synthesis(w, "const")
    open_noise(generator)
    assert torch.allclose(generator.synthesis(w, "const"), before, atol=1e-5)
    assert all(layer.noise.weight.item() == 1 for layer in [generator.conv1, *generator.convs])


# ---- Its training

def test_hidden_parts_hang_on_seed_and_probability():
    first, again = (hide(64, 64, 0.5, torch.Generator().manual_seed(3)) for _ in range(2))
    share = first.float().mean((1, 2))
    assert torch.equal(first, again) and 16 < (share > 0).sum() < 48 and share.max() < 0.85
    assert not hide(8, 64, 0.0, torch.Generator().manual_seed(3)).any()
    assert (hide(8, 64, 1.0, torch.Generator().manual_seed(3)).float().mean((1, 2)) > 0.02).all()


@pytest.mark.parametrize("size", [128, 256])
def test_every_second_block_of_a_chess_board(monkeypatch, size):
    """Blocks of half a period touch at their corners: half of the image is hidden, and half a period on the rest.

    A period of 32 pixels of 128 is one of 64 at 256.
    """
    for name, value in (("GRID_SHARE", 1), ("CHESS", 1), ("CHESS_PERIOD", (32, 32)), ("CHESS_BLOCK", (0.5, 0.5))):
        monkeypatch.setattr(corrupt, name, value)
    hidden, half = hide(16, size, 1.0, torch.Generator().manual_seed(5)), size // 8
    straight = [h for h in hidden if all(len({tuple(r) for r in side.int().tolist()}) == 2 for side in (h, h.T))]
    assert len(straight) > 3
    for one in straight:
        assert one.float().mean() == 0.5 and torch.equal(one[half:], ~one[:-half])


def test_the_distance_by_hand():
    """0.3 off in one channel of one pixel that weighs 2 among 3 x 4, the others 1; both gradients to its neighbours.

    The mean weight is 1.25, so it counts 1.6 times.
    """
    real = torch.zeros(1, 3, 2, 2)
    fake, weight = real.clone(), torch.ones(1, 2, 2)
    fake[0, 1, 0, 0], weight[0, 0, 0] = 0.3, 2.0
    off = (0.3**2 + 0.4**2) ** 0.5 - 0.4
    assert weighted_distance(real, fake, weight, 0.4, 0.0).item() == pytest.approx(1.6 * off / 12)
    assert weighted_distance(real, fake, weight, 0.4, 0.5).item() == pytest.approx(1.6 * off / 12 + 0.5 * 1.6 * off / 6)


def trainer(gan_run, **changes) -> InpaintingTrainer:
    config = EncoderConfig(hide=1.0, knee=0.05, lr_generator=2e-3, lr_trunk=2e-3, encoder_width=0.5, encoder_code=8,
                           precision="fp32", batch=4, rotate=0, flip=False, jitter_hu=0, **changes)
    return InpaintingTrainer(config, load_snapshot(gan_run), (-20.0, 180.0), torch.device("cpu"))


def examples(one, slices, which=(2, 3, 4, 5)) -> dict[str, torch.Tensor]:
    data = SliceDataset(slices, "train")
    slices = {key: torch.stack([data[i][key] for i in which]) for key in ("hu", "brain")}
    return one.prepare(slices, torch.Generator().manual_seed(0))


def test_a_shift_is_of_hu_above_0_and_a_gain_of_all():
    """What is drawn: of each image whether it turns, then shifts and gains."""
    config = EncoderConfig(hide=1.0, rotate=0, flip=False, jitter_hu=2.0)
    hu = torch.tensor([[-10.0, 30.0], [30.0, -10.0]]).repeat(3, 1, 1)
    rng, again = (torch.Generator().manual_seed(0) for _ in range(2))
    found = inpainting.Augmentation(config, (-20.0, 180.0))({"hu": hu, "brain": hu > 0}, again)
    torch.rand(3, generator=rng)
    shift, gain = 2 * torch.randn(2, 3, 1, 1, generator=rng)
    assert shift.abs().min() > 0.2
    wanted = torch.where(hu > 0, 30 * (1 + gain / 100) + shift, -10 * (1 + gain / 100))
    torch.testing.assert_close(found["hu"], wanted, atol=1e-4, rtol=0)


def test_bone_is_found_in_slices_cut_otherwise_than_the_gans(gan_run, tmp_path, monkeypatch):
    """A GAN of -20..180 HU, an encoder's database of 0..70, where all that reaches 70 is bone."""
    settings = PreprocessSettings(StandardiseSettings(size=32, hu_clip=(0.0, 70.0)))
    with SliceWriter(tmp_path / "narrow.lmdb", settings.to_json()) as writer:
        for name in ("train", "val"):
            hu, brain = (x[5:8] for x in synthetic_head(slices=12, size=32, spacing_mm=(10.0, 7.0, 7.0)))
            writer.add(ScanRecord.encode(name, hu.clip(0, 70), brain, np.array([30.0, 20.0, 10.0])), name, name)
    trainers = []

    def end(out, meta, one, *_):
        trainers.append(one)
        raise KeyboardInterrupt

    monkeypatch.setattr(encoder_loop, "Run", end)
    with pytest.raises(KeyboardInterrupt):
        encoder_loop.train(EncoderConfig(hide=0.9, rotate=0), tmp_path / "narrow.lmdb", gan_run, tmp_path,
                           torch.device("cpu"))
    hu = examples(trainers[0], tmp_path / "narrow.lmdb", range(3))
    assert trainers[0].range_hu == (0.0, 70.0) and hu["bone"].any((1, 2)).all()


def test_the_loss_falls_on_slices_seen_again_and_again(gan_run, slices32):
    one = trainer(gan_run, shapes=0)
    batch = examples(one, slices32)
    first, *_, last = (one.learn(batch, i, full=False)["distance"].item() for i in range(15))
    assert last < 0.8 * first
    assert one.images_seen == 60


def test_hidden_changed_and_bone_weigh_as_said(gan_run):
    one = trainer(gan_run, hidden=2.0, changed=3.0)
    brain = torch.tensor([[[True, True, True, False, True]]])
    hidden = torch.tensor([[[False, True, False, False, True]]])
    bone = torch.tensor([[[False, False, False, False, True]]])
    changed = torch.tensor([[[0.0, 0.0, 0.5, 0.0, 0.0]]])
    expected = torch.tensor([1.1, 3.1, 2.6, 0.1, 0.1])
    assert torch.allclose(one.weight(brain, hidden, bone, changed)[0, 0], expected)


def test_shapes_are_drawn_in_soft_brain_and_end_where_slices_do():
    """Bone within the mask of the brain stays as it is, and counts as unchanged."""
    config = EncoderConfig(hide=1.0, shapes=1.0, rotate=0, flip=False, jitter_hu=0)
    hu, brain = torch.full((16, 32, 32), 50.0), torch.ones(16, 32, 32, dtype=torch.bool)
    hu[:, :, 12:20] = 200
    found = Corruption(config, (0.0, 60.0))({"hu": hu, "brain": brain}, torch.Generator().manual_seed(0))
    query, changed, bone = (found[key] for key in ("query", "changed", "bone"))
    assert torch.equal(bone, hu == 200) and (query[bone] == 60).all() and not changed[bone].any()
    assert changed.any(2).any(1).sum() > 4 and query.min() >= 0 and query.max() == 60
    assert (query[~bone] == 60).any()                                         # by a shape that would have been denser


def test_what_is_to_be_drawn_is_the_slice_as_it_was(gan_run, slices32):
    """Drawn so in place of the query with its shapes it is at no distance: the adversary's part of the loss is left."""
    one = trainer(gan_run, adversarial=0.25)
    batch, losses = examples(one, slices32), []
    assert not torch.equal(batch["query"], batch["hu"])
    one.draw = lambda images, hidden, bone: encode(batch["hu"])
    one._update = lambda optimiser, loss: losses.append(loss.item())
    stats = one.learn(batch, 1, full=True)
    assert stats["distance"] == 0 and losses[0] == pytest.approx(0.25 * stats["adversarial"].item()) and losses[0] > 0


def test_of_some_images_what_is_found_anomalous_is_hidden(gan_run, slices32):
    """With the adversary, of half of the batch; the gate's own answer for the queries, lesions and all."""
    one = trainer(gan_run, gated=0.5)
    batch, seen = examples(one, slices32), []
    one.method.gate = lambda difference_hu, soft: (None, difference_hu.abs() > 5)
    draw = one.draw
    one.draw = lambda images, hidden, bone: seen.append((hidden, bone)) or draw(images, hidden, bone)
    first = {name: t[:2] for name, t in batch.items()}
    expected = one.method.from_surroundings(first["query"], first["bone"])
    for full in (True, False):
        one.learn(batch, 1, full)
    (hidden, bone), (without, _) = seen
    assert torch.equal(hidden[:2], (first["query"] - expected).abs() > 5) and hidden[:2].any()
    assert torch.equal(hidden[2:], batch["hidden"][2:]) and torch.equal(bone, batch["bone"])
    assert torch.equal(without, batch["hidden"])


@pytest.mark.parametrize("part, ranks, batch", [(0.5, 16, 1), (0.5, 1, 16), (0.5, 2, 3), (0.1, 1, 4), (0.3, 4, 5)])
def test_over_ranks_and_steps_the_part_that_is_gated_is_as_said(gan_run, monkeypatch, part, ranks, batch):
    """Of 160 images or a few less, whatever a rank's share of a batch is; it was rounded on each, to none of one."""
    one, steps, counts = trainer(gan_run, gated=part), 160 // (ranks * batch), []
    for step in range(steps):
        one.images_seen = step * ranks * batch
        for rank in range(ranks):
            monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
            counts.append(one._gated(batch))
    assert sum(counts) == math.floor(part * steps * ranks * batch + 1e-6) and max(counts) <= math.ceil(part * batch)


def test_the_adversary_sees_what_was_drawn(gan_run, slices32):
    one = trainer(gan_run, adversarial=0.5)
    batch = examples(one, slices32)
    before = {name: p.clone() for name, p in one.d.named_parameters()}
    stats = one.learn(batch, 1, full=True)
    assert {"distance", "adversarial", "loss_d"} <= stats.keys()
    assert any(not torch.equal(p, before[name]) for name, p in one.d.named_parameters())


def test_errors_on_held_out_scans_by_hand(slices32, tmp_path, monkeypatch):
    """Drawn 3 HU off, 10 HU where hidden, 50 HU in bone: 3 with nothing hidden, and 10 in what is, of soft brain."""
    monkeypatch.setattr(inpainting, "bone_mask", lambda hu, top_hu: (torch.arange(32) < 14).expand(hu.shape))

    def draw(images, hidden, bone):
        return encode(decode(images) + torch.where(bone, 50.0, torch.where(hidden, 10.0, 3.0)))

    one = SimpleNamespace(config=EncoderConfig(hide=1.0), range_hu=(-20.0, 180.0), device="cpu", draw=draw)
    found = InpaintingTrainer.validate(one, SliceDataset(slices32, "val"), tmp_path, 0)
    assert found == {"val_error_hu": pytest.approx(3, abs=1e-3), "val_hidden_hu": pytest.approx(10, abs=1e-3)}


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_held_out_brain_that_is_hidden_nowhere_counts_for_what_is_seen_alone(gan_run, slices32, tmp_path, monkeypatch):
    one, held_out = trainer(gan_run), SliceDataset(slices32, "val")
    both = one.validate(held_out, tmp_path, 0)
    monkeypatch.setattr(inpainting, "hide", lambda count, size, *_: torch.zeros(count, size, size, dtype=torch.bool))
    assert one.validate(held_out, tmp_path, 0) == {"val_error_hu": both["val_error_hu"]}
    one.draw = lambda images, hidden, bone: images * torch.nan
    found = one.validate(held_out, tmp_path, 0)
    assert found.keys() == both.keys() and np.isnan(list(found.values())).all()


def test_the_picture_of_held_out_scans_has_an_end(gan_run, slices32, tmp_path, monkeypatch):
    """A row of pictures of every scan was kept until the end: gigabytes with thousands of scans."""
    one, drawn = trainer(gan_run), []
    everything = SliceDataset(slices32, "all")
    monkeypatch.setattr(inpainting, "save_hu_grid", lambda path, hu, columns: drawn.append(len(hu)))
    found = one.validate(everything, tmp_path, 0)
    monkeypatch.setattr(inpainting, "MOST_HELD_OUT", 8)
    assert one.validate(everything, tmp_path, 0) == found and drawn == [4 * 3, 8]


@pytest.mark.parametrize("objective", [("--hide", 0.9), ("--code-channels", 4, "--lr-generator", 1e-3)])
def test_weights_of_a_distance_that_has_no_part_are_not_asked_for(gan_run, slices32, tmp_path, objective):
    """--perceptual lpips without --vgg16 was refused, though nothing would have read the file."""
    flags = ["--data", slices32, "--gan", gan_run, "--out", tmp_path, "--preset", "smoke32", "--device", "cpu",
             "--epochs", 0.25, "--batch", 4, "--perceptual", "lpips", *objective]
    assert train_encoder.main([*map(str, flags)]) == 0


# ---- From a scan to its closest normal

@pytest.mark.parametrize("size, side", [(128, 24), (128, 40), (256, 40), (32, 40), (128, 56)])
def test_every_place_is_kept_once_while_its_neighbours_are_hidden(size, side):
    """Blocks of the side, each with a rim of a tenth that is not kept: at 32 pixels 40 are 10, and the rim is 1."""
    kept, longest = torch.zeros(size, size, dtype=torch.int), 0
    for hidden, centre in blocks(size, side):
        kept += centre
        rim = size * side // (10 * 128) or 1
        around = torch.nn.functional.max_pool2d(centre.float()[None, None], 2 * rim + 1, 1, rim)[0, 0] > 0
        assert (hidden | ~around).all()
        rows = "".join("x" if row else " " for row in hidden.any(1).tolist())
        longest = max(longest, *(len(run) for run in rows.split()))
    assert (kept == 1).all() and longest == side * size // 128


def test_bone_is_what_blood_cannot_be():
    hu = torch.tensor([[[30.0, 75.0, 94.0, 99.0, 60.0]]])
    assert bone_mask(hu).tolist() == [[[False, False, False, True, False]]]
    clipped = torch.tensor([[[30.0, 70.0, 69.0, 70.0]]])
    assert bone_mask(clipped).tolist() == [[[False, True, False, True]]]


def test_a_bleed_that_is_the_densest_of_all_is_no_bone():
    """What lay within 0.5 HU of the highest value was, also where nothing was clipped. A skull cut off at 70 HU is a
    ring of 368 of 4096 pixels; the bleed has 25 pixels from 58 HU to 70, one of them 70 and one 69.5."""
    hu = torch.normal(30.0, 2.0, (4, 64, 64), generator=torch.Generator().manual_seed(0))
    hu[2, 30:35, 30:35] = torch.linspace(58, 70, 25).view(5, 5)
    assert not bone_mask(hu).any() and bone_mask(hu, 70.0).sum() == 2       # where 70 is known to be the end of all
    head = hu.clone()
    head[:, 8:56, 8:56] = 70.0
    head[:, 10:54, 10:54] = hu[:, 10:54, 10:54]
    skull = torch.ones(64, 64, dtype=torch.bool)
    skull[10:54, 10:54] = skull[:8] = skull[56:] = skull[:, :8] = skull[:, 56:] = False
    for mask in (bone_mask(head), bone_mask(head, 70.0)):
        assert (mask[:2] == skull).all() and skull.sum() == 48 * 48 - 44 * 44
    head[0, 8, 8] = 900.0                                      # of a whole head blood is no bone, whatever it reaches
    for mask in (bone_mask(head), bone_mask(head, 180.0)):
        assert mask.sum() == 1 and mask[0, 8, 8]


class FillingPainter(Painter):
    """Draws 30 HU where something is hidden, and what it sees elsewhere."""

    def draw(self, images, hidden, bone, batch):
        return torch.where(hidden & ~bone, 30.0, decode(images)).clamp(*self.range_hu)


class Filler(Inpainting):
    def __init__(self, *args):
        super().__init__(*args)
        self.painter = self.surroundings = FillingPainter(self.generator, self.encoder, self.range_hu)


@pytest.fixture
def filler() -> Filler:
    return Filler(InpaintingSettings(), *networks(), (0.0, 70.0))


def test_a_bleed_is_drawn_anew_and_the_rest_stays(filler):
    """A square of 85 HU in brain of 30 +- 1, inside bone: gone from the closest normal, bone and brain as they are."""
    hu = 30 + torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(0))
    brain = torch.zeros(1, 32, 32, dtype=torch.bool)
    brain[:, 4:28, 4:28] = True
    hu[~brain] = 100.0
    hu[:, 12:18, 12:18] = 85.0
    found = filler.closest_normal(hu, brain, np.zeros(1))
    drawn = found.normal_hu[:, 12:18, 12:18]
    assert torch.allclose(drawn[:, 1:-1, 1:-1], torch.tensor(30.0), atol=1e-3)
    assert (drawn - 30).abs().max() < 3.001                                          # no more than grain comes back
    untouched = brain.clone()
    untouched[:, 9:21, 9:21] = False
    assert (found.normal_hu[untouched] - hu[untouched]).abs().max() < 0.01
    assert torch.equal(found.normal_hu[~brain], found.query_hu[~brain])
    assert found.query_hu.max() == 95 and (found.query_hu[:, 12:18, 12:18] == 85).all()
    assert list(found.error_hu) == ["surroundings", "reconstruct"]
    assert found.error_hu["surroundings"] > found.error_hu["reconstruct"] > 0


def test_what_is_drawn_anew_is_judged_by_its_surroundings(filler):
    """20 HU in brain of 30: expected 30 by its surroundings; as it is drawn (here 10 HU off them) only if asked for."""
    hu = torch.full((1, 32, 32), 30.0)
    hu[:, 12:18, 12:18], hu[:, 0] = 20.0, 100.0
    brain, drawn = torch.ones(1, 32, 32, dtype=torch.bool), filler.painter.draw
    filler.from_surroundings = lambda hu, bone: torch.full_like(hu, 30)
    filler.painter.draw = lambda *shown: drawn(*shown) - 10.0 * shown[1]
    found = filler.closest_normal(hu, brain, np.zeros(1))
    assert torch.allclose(found.normal_hu[:, 13:17, 13:17], torch.tensor(20.0), atol=1e-3)
    assert torch.allclose(found.difference_hu[:, 13:17, 13:17], torch.tensor(-10.0), atol=1e-3)
    assert torch.allclose(found.difference_hu[:, :10], torch.tensor(0.0), atol=1e-3)
    filler.settings = dataclasses.replace(filler.settings, judged="normal")
    as_drawn = filler.closest_normal(hu, brain, np.zeros(1))
    assert as_drawn.expected_hu is None and as_drawn.difference_hu[:, 13:17, 13:17].abs().max() < 0.01


def test_specks_and_what_is_faint_are_no_anomaly():
    """At 128 pixels: 10 HU in a place is anomalous, 6 HU is not, nor are 20 HU in 2 x 2 pixels."""
    one = Filler(InpaintingSettings(gate_hu=8), *networks(), (0.0, 70.0))
    one.size = 128
    soft, difference = torch.ones(3, 128, 128, dtype=torch.bool), torch.zeros(3, 128, 128)
    difference[0, 40:80, 40:80] = -10
    difference[1, 40:80, 40:80] = 6
    difference[2, 40:42, 40:42] = 20                     # 8 HU and more in 4 pixels after the Gaussian of 1
    found, _ = one.gate(difference, soft)
    assert found[0, 40:80, 40:80].all() and not found[0, :36].any()
    assert not found[1:].any()
    difference[2, 40:44, 40:44] = 20
    assert one.gate(difference, soft)[0][2, 40:44, 40:44].all()


def test_one_bright_pixel_is_no_lesion():
    """Of 1000 HU counts 40: 6.4 after the Gaussian of 1. As it is, 21 pixels around it would have 8 and more.

    Of 3 x 3 such pixels together 21 have, too: their own 9, and 3 on each side.
    """
    one, soft = Filler(InpaintingSettings(), *networks(), (0.0, 70.0)), torch.ones(3, 128, 128, dtype=torch.bool)
    one.size, difference = 128, torch.zeros(3, 128, 128)
    difference[0, 40, 40], difference[1, 40, 40], difference[2, 40:43, 40:43] = 1000, -1000, 1000
    found, hidden = one.gate(difference, soft)
    assert not found[:2].any() and not hidden[:2].any() and found[2, 40:43, 40:43].all()


def test_lengths_of_the_gate_scale_with_the_image():
    """At 256 pixels the Gaussian is of 2, what has less than 48 pixels is a speck, and rims are twice as wide.

    18 HU in a line 2 pixels wide are 6.8 after it. 20 HU in 6 x 6 pixels are 8 and more in all but the 4 corners, 32
    pixels; in 8 x 8, in all but these, 60, and the rim is 6 to a side.
    """
    one, soft = Filler(InpaintingSettings(), *networks(), (0.0, 70.0)), torch.ones(3, 256, 256, dtype=torch.bool)
    one.size, difference = 256, torch.zeros(3, 256, 256)
    difference[0, 80:160, 80:82], difference[1, 80:86, 80:86], difference[2, 80:88, 80:88] = -18, 20, 20
    found, hidden = one.gate(difference, soft)
    assert not found[:2].any() and not hidden[:2].any()
    assert torch.equal(found[2], hidden[2]) and found[2].any(1).sum() == found[2].any(0).sum() == 8 + 2 * 6


def test_what_shifts_a_slice_as_a_whole_is_no_anomaly():
    """A slice 9 HU denser than expected; in it a bleed, and a place 2 HU less dense than expected: these two are found.

    As if no slice were shifted it is all but the second. A bleed over most of a slice is found all the same.
    """
    soft, difference = torch.ones(2, 128, 128, dtype=torch.bool), torch.full((2, 128, 128), 9.0)
    soft[:, :, :10], difference[:, :, :10] = False, -40                       # what is no soft brain has no say
    difference[0, 40:60, 40:60], difference[0, 80:100, 40:60], difference[1, 40:] = 40, -2, 40
    bleed, rest = difference[0] == 40, slice(10, 30)
    for level in (True, False):
        one = Filler(InpaintingSettings(level=level), *networks(), (0.0, 70.0))
        one.size = 128
        found, _ = one.gate(difference, soft)
        assert found[0][bleed].all() and found[1, 45:, 20:].all()
        assert found[0, 85:95, 45:55].all() if level else not found[0, 85:95, 45:55].any()
        assert not found[0, rest, 20:].any() if level else found[0, rest, 20:].all()


def test_around_what_is_bright_more_is_hidden():
    """A square of 10 x 10 pixels; the Gaussian adds one to a side, the rim 1 where it is dark and 3 where bright."""
    difference = torch.zeros(2, 128, 128)
    difference[0, 60:70, 60:70], difference[1, 60:70, 60:70] = -30, 30

    def rows(spared):
        one = Filler(InpaintingSettings(spared=spared, grow_hu=8), *networks(), (0.0, 70.0))
        one.size = 128
        return [mask.any(2).sum(1).tolist() for mask in one.gate(difference, torch.ones(2, 128, 128) > 0)]

    assert rows(spared=0) == 2 * [[10 + 2 + 2, 10 + 2 + 6]]
    assert rows(spared=0.5) == [[10 + 2 + 2, 10 + 2 + 6], [10 + 2, 10 + 2 + 6]]     # the rim is not dark by itself


def test_what_is_not_dark_by_itself_is_spared():
    """A septum two pixels wide between two ventricles; in a bleed, nothing is."""
    difference, soft = torch.zeros(2, 128, 128), torch.ones(2, 128, 128, dtype=torch.bool)
    difference[:, 40:60, 40:50] = difference[:, 40:60, 52:62] = torch.tensor([-20.0, 20.0])[:, None, None]

    def gate(spared):
        one = Filler(InpaintingSettings(gate_hu=8, grow_hu=8, spared=spared), *networks(), (0.0, 70.0))
        one.size = 128
        return one.gate(difference, soft)

    (found, hidden), (whole, same) = gate(0.5), gate(0)
    assert torch.equal(found, whole) and torch.equal(same, whole)                    # what is judged hangs not on it
    assert whole[0, 45:55, 40:62].all() and hidden[:, 45:55, 40:50].all() and hidden[:, 45:55, 52:62].all()
    assert not hidden[0, 45:55, 50:52].any() and hidden[1, 45:55, 50:52].all()
    assert not (hidden & ~whole).any() and torch.equal(hidden[1], whole[1])


def test_a_hypodense_place_is_drawn_anew_as_far_as_it_goes_on():
    """20 HU off in a square, 6 HU in what adjoins it and in a place apart: 8 HU are looked for, and grow over 5."""
    difference, soft = torch.zeros(2, 128, 128), torch.ones(2, 128, 128, dtype=torch.bool)
    difference[:, 40:60, 40:60], difference[:, 40:60, 60:80], difference[:, 90:110, 40:80] = -20, -6, -6
    difference[1] *= -1
    gate = {}
    for grow_hu in (8, 5):
        one = Filler(InpaintingSettings(grow_hu=grow_hu), *networks(), (0.0, 70.0))
        one.size = 128
        gate[grow_hu] = one.gate(difference, soft)
    (found, hidden), (same, grown) = gate[8], gate[5]
    assert torch.equal(found, same) and not (hidden & ~grown).any()                  # what is judged hangs not on it
    assert grown[0, 42:58, 40:80].all() and not hidden[0, :, 64:].any()
    assert not grown[0, 84:].any() and torch.equal(grown[1], hidden[1])


def test_what_is_drawn_anew_only_since_it_goes_on_is_not_judged(filler):
    """Its closest normal is drawn, 6 HU denser, and itself is what it is judged against, as where nothing is found."""
    hu, brain = torch.full((1, 32, 32), 30.0), torch.ones(1, 32, 32, dtype=torch.bool)
    hu[:, 8:24, 8:16], hu[:, 8:24, 16:28], hu[:, 0] = 10, 24, 100
    filler.from_surroundings = lambda hu, bone: torch.full_like(hu, 30)
    filler.painter.draw = lambda images, hidden, bone, batch: torch.where(hidden, 30.0, decode(images))
    found = filler.closest_normal(hu, brain, np.zeros(1))
    assert torch.allclose(found.normal_hu[:, 10:22, 20:26], torch.tensor(30.0), atol=0.05)
    assert torch.allclose(found.difference_hu[:, 10:22, 10:14], torch.tensor(-20.0), atol=0.05)
    assert found.difference_hu[:, 10:22, 20:26].abs().max() == 0


def test_grain_comes_back_whole_where_all_is_normal_and_up_to_3_hu_elsewhere():
    """A pattern of +-6 HU from pixel to pixel, which all Gaussians take for grain, over a shift of 20 HU."""
    fine = 6.0 * (1 - 2 * (torch.arange(128) + torch.arange(128)[:, None]).remainder(2))[None]
    one, soft = Filler(InpaintingSettings(), *networks(), (0.0, 70.0)), torch.ones(1, 128, 128, dtype=torch.bool)
    one.size = 128
    hidden = torch.zeros_like(soft)
    hidden[:, 64:] = True
    grown = torch.zeros_like(soft)
    grown[:, :, 64:] = True                                          # of no place is the other side as it is
    detail = one.detail(fine + 20, soft, hidden, hidden & grown)
    assert torch.allclose(detail[:, 8:56, 8:120], fine[:, 8:56, 8:120], atol=0.02)
    assert torch.equal(detail[:, 72:120, 8:64], fine[:, 72:120, 8:64] * 3 / 6)
    assert torch.equal(detail[:, 72:120, 64:120], fine[:, 72:120, 64:120] * 5 / 6)
    assert not one.detail(fine, ~soft, hidden, grown).any()


def test_what_is_drawn_anew_has_the_grain_of_the_other_side():
    """+-6 HU from pixel to pixel on the left, and +-12 HU on the right, of which no more than 8 come.

    What is hidden on both sides has its own, up to 3 HU, and so has all that is judged as it is drawn.
    """
    sign = 1.0 - 2 * (torch.arange(128) + torch.arange(128)[:, None]).remainder(2)
    fine = torch.where(torch.arange(128) < 64, 6 * sign, 12 * sign)[None]
    soft, hidden = torch.ones(1, 128, 128, dtype=torch.bool), torch.zeros(1, 128, 128, dtype=torch.bool)
    hidden[:, 20:40, :64], hidden[:, 60:80], hidden[:, 100:120, 64:] = True, True, True
    one, nothing = Filler(InpaintingSettings(), *networks(), (0.0, 70.0)), torch.zeros_like(soft)
    one.size = 128
    detail, mirrored = one.detail(fine, soft, hidden, nothing), sign.flip(-1)
    inside = slice(16, 48)
    assert torch.equal(detail[0, 26:34, inside], 8 * mirrored[26:34, inside])
    assert torch.allclose(detail[0, 106:114, 80:112], 6 * mirrored[106:114, 80:112], atol=0.02)
    assert torch.equal(detail[0, 66:74, inside], 3 * sign[66:74, inside])
    one.settings = dataclasses.replace(one.settings, judged="normal")
    assert torch.equal(one.detail(fine, soft, hidden, nothing)[0, 26:34, inside], 3 * sign[26:34, inside])


def test_what_is_no_soft_brain_is_no_anomaly_of_what_is():
    """20 HU off up to column 20, 6 HU in the brain beside it: no 8 HU are found, up to the edge."""
    one, soft = Filler(InpaintingSettings(level=False), *networks(), (0.0, 70.0)), torch.ones(1, 128, 128) > 0
    one.size, soft[:, :, :20] = 128, False
    assert not any(mask.any() for mask in one.gate(torch.where(soft, 6.0, 20.0), soft))


def test_a_lesion_leaves_no_trace_in_the_detail_around_it():
    """20 HU where it is drawn anew, and the networks exact elsewhere: there is nothing to bring back."""
    one, soft = Filler(InpaintingSettings(), *networks(), (0.0, 70.0)), torch.ones(1, 128, 128, dtype=torch.bool)
    one.size, hidden = 128, torch.zeros_like(soft)
    hidden[:, :, 64:] = True
    detail = one.detail(torch.where(hidden, 20.0, 0.0), soft, hidden, ~soft)
    assert not detail[~hidden].any()


def test_air_is_not_drawn(filler):
    """Networks that draw 30 HU everywhere: scalp is as they draw it, air around it as it is."""
    hu, brain = torch.full((1, 32, 32), 30.0), torch.zeros(1, 32, 32, dtype=torch.bool)
    brain[:, 8:24], hu[:, :4], hu[:, 4:6], hu[:, 24:26] = True, -200.0, 20.0, 100.0
    filler.from_surroundings = lambda hu, bone: hu
    filler.painter.draw = lambda images, hidden, bone, batch: torch.full_like(hu, 30)
    normal = filler.closest_normal(hu, brain, np.zeros(1)).normal_hu
    assert (normal[:, :4] == 0).all() and (normal[:, 4:6] == 30).all() and (normal[:, 24:26] == 95).all()


def test_settings_and_networks_that_do_not_fit_are_refused():
    for changes, said in (({"gate_hu": 0}, "gate_hu must be above 0"), ({"batch": 0}, "batch must be at least 1"),
                          ({"grow_hu": 9}, "grow_hu must be above 0 and at most gate_hu, 8, got 9"),
                          ({"spared": 1}, "spared must be from 0 to below 1, got 1"),
                          ({"hidden": 7}, "hidden must be from 8 to 64 pixels"), ({"hidden": 65}, "got 65"),
                          ({"bright_rim": 0}, "bright_rim must be at least 1, got 0"),
                          ({"judged": "surounding"}, "judged must be one of surroundings, normal, got 'surounding'")):
        with pytest.raises(ValueError, match=said):
            InpaintingSettings(**changes)
    plain = dataclasses.replace(TINY, encoder_masks=False)
    with pytest.raises(CheckpointError, match="trained with --hide"):
        Inpainting(InpaintingSettings(), Generator(plain), Encoder(plain), (0, 70))


# ---- From a database to a bundle

def test_a_trained_bundle_holds_what_it_needs(gan_run, slices32, tmp_path, capsys):
    run = tmp_path / "run"
    flags = ["--preset", "smoke32", "--hide", "0.9", "--batch", "4", "--epochs", "1", "--perceptual-epochs", "0.5",
             "--lr-generator", "1e-3", "--encoder-code", "8", "--precision", "fp32", "--device", "cpu"]
    command = ["--data", str(slices32), "--gan", str(gan_run), "--out", str(run), *flags]
    assert train_encoder.main(command) == 0
    row = json.loads((run / "stats.jsonl").read_text().splitlines()[-1])
    assert row["val_hidden_hu"] > 0 and row["val_error_hu"] > 0 and row["adversarial"] > 0
    assert (run / "reconstructions-001.png").is_file()
    bundle = tmp_path / "bundle"
    made = ["--data", str(slices32), "--encoder", str(run), "--out", str(bundle), "--set", "method=inpainting",
            "--precision", "fp32", "--device", "cpu", "--preset", "smoke32"]
    assert latent_stats.main(made) == 0
    loaded = load_bundle(bundle, "cpu", "fp32").reconstructor
    assert sorted(path.name for path in bundle.glob("*.safetensors"))[:2] == ["encoder.safetensors",
                                                                            "generator.safetensors"]
    assert loaded.range_hu == tuple(SliceDataset(slices32).manifest["settings"]["standardise"]["hu_clip"])
    scan = SliceDataset(slices32, "val").scan(0)
    found = loaded.closest_normal(scan["hu"].float(), scan["brain"], scan["below_vertex_mm"].numpy())
    assert torch.isfinite(found.normal_hu).all() and found.normal_hu.shape == scan["hu"].shape
    assert latent_stats.main([*made, "--overwrite", "--held-out", str(slices32)]) == 0
    capsys.readouterr()
    folds = ["--held-out", str(slices32), "--fold", str(slices32), str(run)]
    assert latent_stats.main([*made, "--overwrite", *folds]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_images_in_the_range_come_back_from_the_windows():
    """What the networks are shown is what the scan holds: encode and decode are inverse in their range."""
    hu = torch.linspace(0, 70, 50)[None, None]
    assert torch.allclose(decode(encode(hu)), hu, atol=1e-4)
