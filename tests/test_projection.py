import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage

from bundling import build
from ct.window import decode, encode
from detect.bundle import load_bundle, save_bundle
from detect.latent import LatentStats
from detect.projection import project_frame
from detect.residual import MaskSettings
from detect.search import Search, SearchSettings, ramp
from detect.settings import Settings
from detect.surprise import Surprise
from detect.votes import Votes, VotesSettings
from gan.inpainting import open_noise
from model import Discriminator, Encoder, Generator, ModelConfig

TINY = ModelConfig(size=32, style_dim=16, n_mlp=2, channel_max=16)
FEW = SearchSettings(steps_latent=4, steps_noise=3)
POSITIONS = np.arange(20.0, -1, -5)                        # five slices, inferior to superior
BRAIN = torch.zeros(5, 32, 32, dtype=torch.bool)
BRAIN[:, 4:28, 4:28] = True


class AlwaysThese:
    """An encoder that answers with the same codes, whatever it is shown."""

    def __init__(self, codes):
        self.codes = codes

    def invert(self, images, generator):
        return self.codes, generator.noise_maps("const")


def make_bundle(encoder=None):
    """A random model that draws soft tissue: HU about 30, the same in all windows (widths 50, 80, 200 HU)."""
    torch.manual_seed(0)
    generator, discriminator = Generator(TINY), Discriminator(TINY)
    for to_rgb in (generator.to_rgb1, *generator.to_rgbs):
        to_rgb.conv.weight.data = to_rgb.conv.weight.data[:, :1] * torch.tensor([0.12, 0.075, 0.03]).view(1, 3, 1, 1, 1)
    # In the last layer: upsampling pads with 0, which is another HU in each window.
    generator.to_rgbs[-1].bias.data += encode(torch.full((1, 1), 30.0)).view(1, 3, 1, 1)
    for conv in (generator.conv1, *generator.convs):
        conv.noise.weight.data += 0.3                      # 0 before training: noise would do nothing
    networks = (generator, discriminator, encoder or Encoder(TINY).eval().requires_grad_(False))
    for net in (generator, discriminator):
        net.eval().requires_grad_(False)
    codes = torch.nn.functional.leaky_relu(torch.randn(200, TINY.n_latent, TINY.style_dim), 0.2)
    latent = LatentStats.fit(codes, torch.linspace(0, 25, 200), [0.0, 10.0, 20.0], components=6, min_codes=32,
                             max_reach_mm=20.0)
    generator, discriminator, encoder = networks
    return Search(SearchSettings(), generator, encoder, latent, discriminator)


def codes_like_healthy(slices=5, seed=1):
    codes = torch.randn(slices, TINY.n_latent, TINY.style_dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.leaky_relu(codes, 0.2)


def tissue(slices=5, seed=2):
    rng = torch.Generator().manual_seed(seed)
    return 30 + 8 * torch.randn(slices, 32, 32, generator=rng)


def run(search, hu, settings=FEW, brain=BRAIN, positions=POSITIONS, batch=32, votes=None):
    settings = dataclasses.replace(settings, batch=batch)
    found, seen, findings, _ = project_frame(search.with_settings(settings), Votes(votes, MaskSettings()), hu, brain,
                                             positions)
    return SimpleNamespace(reconstruction=found.normal_hu, seconds=found.seconds, residual=seen.residual,
                           votes=seen.votes, steps=seen.steps, predicted=findings.predicted, lesion=findings.mask,
                           slice_scores=findings.slice_scores)


@torch.no_grad()
def drawn(bundle, w_plus):
    return decode(bundle.generator.synthesis(w_plus, noise="const"))


@pytest.fixture(scope="module")
def bundle():
    return make_bundle()


# ---- schedule

@pytest.mark.parametrize("t, factor", [(0, 0), (0.025, 0.5), (0.05, 1), (0.5, 1), (0.75, 1), (0.875, 0.5), (1, 0)])
def test_ramp(t, factor):
    assert ramp(t) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_gets_the_same_search(bundle, tmp_path, mode):
    """It was an error of torch's: a search takes gradients."""
    save_bundle(tmp_path, bundle, Settings("search", FEW), dict(preprocessing=None, calibration=None, provenance=None))
    expected = run(bundle, tissue())
    with mode():
        found = run(bundle, tissue())
        loaded = load_bundle(tmp_path, precision="fp32").with_settings(Settings("search", FEW)).reconstructor
        inside = run(loaded, tissue())
    assert torch.equal(found.reconstruction, expected.reconstruction) and torch.equal(found.votes, expected.votes)
    assert torch.equal(run(loaded, tissue()).votes, inside.votes)


def test_every_step_votes(bundle):
    result = run(bundle, tissue())
    assert result.steps == 7 and set(result.seconds) == {"encode", "latent", "noise"}
    assert 0 < result.votes.max() <= 14
    assert not result.votes[~BRAIN].any() and not result.residual[~BRAIN].any()
    torch.testing.assert_close(result.predicted, result.votes > 7)


# ---- the published search, written out plainly

def plain_median(slices):
    return torch.from_numpy(np.stack([ndimage.median_filter(one, 3, mode="constant") for one in slices.numpy()]))


def plain_adam(values, moments, gradients, step, rate):
    """Adam's step number `step`, from 1, of each tensor in place (Kingma and Ba 2015, algorithm 1)."""
    for value, (first, second), gradient in zip(values, moments, gradients):
        first.mul_(0.9).add_(0.1 * gradient)
        second.mul_(0.999).add_(0.001 * gradient.square())
        value -= rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)


def plain_search(search, hu, settings):
    """Lee et al. 2022 step by step, all slices at once: the reconstruction and the votes."""
    stats, query = search.latent.at(torch.as_tensor(POSITIONS.copy())), encode(hu)
    with torch.no_grad():
        p_encoder = stats.to_p(search.encoder(query))
    p, maps = p_encoder.clone(), [m.repeat(5, 1, 1, 1) for m in search.generator.noise_maps("const")]
    votes, seen = torch.zeros(5, 32, 32, dtype=torch.int32), search.perceptual.features(query)

    def draw(p, maps):
        return search.generator.synthesis(stats.to_w(p), maps)

    def vote(image):
        away = (plain_median((decode(query) - decode(image)) * BRAIN) * BRAIN).abs() > 5
        for i in range(5):
            near = sum(away[j].int() for j in (i - 1, i, i + 1) if 0 <= j < 5)
            votes[i] += away[i].int() + (near >= 2).int()

    def advance(values, loss, count, peak, casts):
        moments = [(torch.zeros_like(v), torch.zeros_like(v)) for v in values]
        for step in range(count):
            leaves = [v.clone().requires_grad_() for v in values]
            image, total = loss(leaves)
            gradients = torch.autograd.grad(total, leaves)
            casts(image.detach())
            t = step / count
            down = 0.5 - 0.5 * np.cos(np.pi * min(1, (1 - t) / 0.25))
            plain_adam(values, moments, gradients, step + 1, peak * min(1, t / 0.05) * down)

    def by_code(leaves):
        image = draw(leaves[0], maps)
        away = (leaves[0] - p_encoder).square() * (leaves[0].abs() > p_encoder.abs())
        distance = search.perceptual.distance(seen, search.perceptual.features(image))
        return image, (distance + settings.domain * away.mean((1, 2))).sum()

    advance([p], by_code, settings.steps_latent, settings.lr_latent, vote)
    normal = draw(p, [m.clone().requires_grad_() for m in maps]).detach()      # by the kernels that the steps draw with
    done = [settings.steps_latent]

    def by_noise(leaves):
        image = draw(p, leaves)
        target = torch.where((votes > done[0])[:, None], normal, query)
        done[0] += 1
        return image, sum((image[i] - target[i]).abs().mean() for i in range(5))

    advance(maps, by_noise, settings.steps_noise, settings.lr_noise, vote)
    with torch.no_grad():
        return decode(draw(p, maps)), votes


def test_the_search_is_the_published_one(bundle):
    hu = tissue()
    hu[1:4, 12:20, 12:20] += 25                              # predicted anomalous: the target of some of the noise
    settings = SearchSettings(steps_latent=5, steps_noise=5, domain=3.0, lr_noise=0.5)
    found, expected = run(bundle, hu, settings), plain_search(bundle.with_settings(settings), hu, settings)
    assert 0 < found.predicted.float().mean() < 0.5
    # Where a gradient is near 0 rounding decides which way Adam goes, and so of some pixels of noise
    assert (found.reconstruction - expected[0]).abs().mean() < 0.002
    assert (found.votes != expected[1]).float().mean() < 0.001
    away = plain_median((decode(encode(hu)) - expected[0]) * BRAIN).abs()
    scores = (expected[1] / 10 * away * BRAIN).sum((1, 2)) / BRAIN.sum((1, 2))
    torch.testing.assert_close(found.slice_scores, scores, rtol=0.005, atol=0.005)


# ---- what a result may depend on

@pytest.mark.parametrize("batch", [1, 2])
def test_same_in_chunks(bundle, batch):
    whole, chunked = run(bundle, tissue()), run(bundle, tissue(), batch=batch)
    assert torch.equal(chunked.votes, whole.votes)                     # neighbours vote across the chunks' edges
    torch.testing.assert_close(chunked.slice_scores, whole.slice_scores, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(chunked.reconstruction, whole.reconstruction, rtol=0, atol=0.01)


def test_what_is_to_stay_as_it_is_drawn_stays(bundle, monkeypatch):
    """Where all is predicted anomalous the noise's target is the drawn normal, whatever kernels draw it elsewhere."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")

    def everything(query_hu, normal_hu):
        return torch.ones_like(query_hu, dtype=torch.bool)

    still, moved = (bundle.with_settings(dataclasses.replace(FEW, steps_noise=steps)).closest_normal(
        tissue(), BRAIN, POSITIONS, everything).normal_hu for steps in (0, 4))
    torch.testing.assert_close(moved, still, rtol=0, atol=0.01)


def test_a_slice_far_from_others_is_on_its_own(bundle):
    together = run(bundle, tissue(), positions=np.array([100.0, 50, 45, 40, 35]))
    alone = run(bundle, tissue()[:1], brain=BRAIN[:1], positions=np.array([100.0]))
    assert torch.equal(alone.votes[0], together.votes[0])
    torch.testing.assert_close(alone.reconstruction[0], together.reconstruction[0], rtol=0, atol=0.01)
    assert together.votes[0].max() == together.steps                   # nobody seconds it: one vote a step at most
    assert together.votes[1:].max() > together.steps


def test_thick_slices_have_neighbours_too(bundle):
    assert run(bundle, tissue(), positions=np.arange(40.0, -1, -10)).votes.max() > run(bundle, tissue()).steps


def test_order_of_slices_does_not_matter(bundle):
    up, down = run(bundle, tissue()), run(bundle, tissue().flip(0), positions=POSITIONS[::-1])
    assert torch.equal(up.votes, down.votes.flip(0))
    torch.testing.assert_close(up.slice_scores, down.slice_scores.flip(0), rtol=1e-4, atol=1e-4)


def test_only_what_the_windows_show_counts(bundle):
    dense, denser = tissue(), tissue()
    dense[:, 10:14, 10:14], denser[:, 10:14, 10:14] = 180, 2000        # both are the top of the widest window
    torch.testing.assert_close(run(bundle, dense).residual, run(bundle, denser).residual, rtol=0, atol=0)


# ---- the search on the code

def test_starts_at_the_encoders_code(bundle):
    # The first step's rate is 0, so after one step the reconstruction is still the encoder's, with the model's noise.
    result = run(bundle, tissue(), dataclasses.replace(FEW, steps_latent=1, steps_noise=0))
    with torch.no_grad():
        start = drawn(bundle, bundle.encoder(encode(tissue())))
    torch.testing.assert_close(result.reconstruction, start, rtol=0, atol=0.01)
    assert result.steps == 1


def test_finds_an_image_the_generator_can_draw():
    true = codes_like_healthy()
    start = true + 0.3 * torch.randn(true.shape, generator=torch.Generator().manual_seed(3))
    bundle = make_bundle(encoder=AlwaysThese(start))
    hu = drawn(bundle, true)
    errors = {}
    for steps in (1, 25):
        settings = SearchSettings(steps_latent=steps, steps_noise=0)
        perceptual = bundle.with_settings(settings).perceptual
        result = run(bundle, hu, settings)
        features = [perceptual.features(encode(x)) for x in (hu, result.reconstruction)]
        errors[steps] = perceptual.distance(*features)
    assert (errors[25] < 0.5 * errors[1]).all()


def test_the_code_pays_for_leaving_the_normal(bundle):
    free, held = (run(bundle, tissue(), SearchSettings(steps_latent=12, steps_noise=0, domain=domain))
                  for domain in (0.0, 1e4))
    error = [(decode(encode(tissue())) - one.reconstruction).abs()[BRAIN].mean() for one in (free, held)]
    assert not torch.allclose(free.reconstruction, held.reconstruction, atol=0.5)
    assert error[0] < error[1]


# ---- the search on the noise

def lesion_scan():
    """A scan the generator can draw but for texture of 2 HU and, in slices 1 to 3, a lesion of +25 HU; its mask."""
    codes = codes_like_healthy()
    bundle = make_bundle(encoder=AlwaysThese(codes))
    lesion = torch.zeros(5, 32, 32, dtype=torch.bool)
    lesion[1:4, 12:20, 12:20] = True
    texture = 2 * torch.randn(5, 32, 32, generator=torch.Generator().manual_seed(4))
    return bundle, drawn(bundle, codes) + texture + 25 * lesion, lesion


def test_noise_copies_texture_but_not_the_lesion():
    bundle, hu, lesion = lesion_scan()
    settings = SearchSettings(steps_latent=2, steps_noise=30, lr_latent=1e-4, lr_noise=0.3)
    before = run(bundle, hu, dataclasses.replace(settings, steps_noise=0))
    after = run(bundle, hu, settings)
    blind = run(bundle, hu, settings, votes=VotesSettings(threshold_hu=1000.0))          # nothing is ever predicted

    core = torch.zeros_like(lesion)
    core[1:4, 14:18, 14:18] = True
    elsewhere = BRAIN & ~torch.nn.functional.max_pool2d(lesion.float(), 5, 1, 2).bool()
    query = decode(encode(hu))

    def error(result, where):
        return (query - result.reconstruction).abs()[where].mean()

    assert after.predicted[core].all() and after.lesion[core].all() and not after.predicted[elsewhere].any()
    assert error(after, elsewhere) < 0.7 * error(before, elsewhere)
    assert after.residual[core].mean() > 0.8 * before.residual[core].mean()
    assert blind.residual[core].mean() < 0.5 * before.residual[core].mean()
    assert after.slice_scores[2] > 5 * after.slice_scores[0]


def test_a_rate_on_maps_that_hold_their_strength_is_the_published_one_times_that():
    """Of heads-128 every step threw the maps, of a strength of 1, as far as those of a strength of hundredths may go:
    the noise stage came no closer than the code, and half of its votes were cast on ruins."""
    bundle, hu, _ = lesion_scan()
    for i, conv in enumerate((bundle.generator.conv1, *bundle.generator.convs)):
        conv.noise.weight.data.fill_(0.01)
        buffer = getattr(bundle.generator.noises, f"noise_{i}")
        buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(i)))
    settings = SearchSettings(steps_latent=0, steps_noise=12)
    assert settings.lr_noise == 2
    plain = run(bundle, hu, settings)
    open_noise(bundle.generator)
    found = run(bundle, hu, dataclasses.replace(settings, lr_noise=build.OPEN_NOISE_RATE))
    assert (found.reconstruction - plain.reconstruction).abs().mean() < 0.05      # but for rounding, through L1's signs
    thrown = run(bundle, hu, settings)
    query = decode(encode(hu))
    errors = [float((query - one.reconstruction).abs()[:, BRAIN[0]].mean()) for one in (plain, found, thrown)]
    assert errors[2] > 2 * errors[1], errors


def test_how_close_the_normal_comes_is_said_before_texture_is_copied():
    """As the calibration does: by the noise stage's error no normal was too far."""
    bundle, hu, _ = lesion_scan()
    found = bundle.with_settings(SearchSettings(steps_latent=2, steps_noise=30, lr_latent=1e-4, lr_noise=0.3)
                                 ).closest_normal(hu, BRAIN, POSITIONS)
    assert found.error_in(BRAIN) == pytest.approx(found.error_hu["latent"], rel=1e-5) == found.error
    assert found.error_hu["noise"] < 0.9 * found.error_in(BRAIN)
    assert found.error_in(BRAIN & False) == found.error
    part = torch.zeros_like(BRAIN)
    part[2, 12:20, 12:20] = True
    expected = (found.query_hu - found.drawn_hu).abs()[part].mean()
    assert found.error_in(part) == pytest.approx(float(expected), rel=1e-5)


def test_no_noise_steps_leave_the_noise_alone():
    bundle, hu, _ = lesion_scan()
    buffers = [m.clone() for m in bundle.generator.noise_maps("const")]
    quiet = run(bundle, hu, SearchSettings(steps_latent=2, steps_noise=0, lr_noise=1e6))
    run(bundle, hu, SearchSettings(steps_latent=0, steps_noise=3))
    assert all(torch.equal(a, b) for a, b in zip(buffers, bundle.generator.noise_maps("const")))   # the model's own
    assert set(quiet.seconds) == {"encode", "latent", "noise"} and quiet.steps == 2
    assert quiet.reconstruction.isfinite().all()


# ---- wrong use

@pytest.mark.parametrize("hu, brain, positions", [
    (torch.zeros(5, 64, 64), torch.zeros(5, 64, 64, dtype=torch.bool), POSITIONS),
    (torch.zeros(5, 32, 32), BRAIN[:4], POSITIONS),
    (torch.zeros(5, 32, 32), BRAIN, POSITIONS[:4]),
])
def test_refuses_shapes_that_do_not_fit(bundle, hu, brain, positions):
    with pytest.raises(ValueError, match=r"expected hu and brain \[S, 32, 32\] and S positions"):
        run(bundle, hu, brain=brain, positions=positions)


def test_refuses_slices_out_of_order(bundle):
    with pytest.raises(ValueError, match="sort the slices"):
        run(bundle, tissue(), positions=POSITIONS[[0, 2, 1, 3, 4]])


def test_refuses_a_search_without_steps():
    with pytest.raises(ValueError, match="needs one at least"):
        SearchSettings(steps_latent=0, steps_noise=0)
    with pytest.raises(ValueError, match="negative"):
        SearchSettings(steps_latent=-1)


def test_surprise_needs_to_know_the_healthy(bundle):
    with pytest.raises(ValueError, match="measure surprise: this model holds no statistics"):
        project_frame(bundle.with_settings(FEW), Surprise(), tissue(), BRAIN, POSITIONS)


def test_predicted_noise_is_used_unless_told_otherwise():
    bundle = make_bundle()

    def marked(images, generator):
        return codes_like_healthy(), [m + 1 for m in generator.noise_maps("const")]

    bundle.encoder.invert = marked
    own, predicted = (run(bundle, tissue(), dataclasses.replace(FEW, predicted_noise=on)).reconstruction
                      for on in (False, True))
    assert (own - predicted).abs().max() > 1
