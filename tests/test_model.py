"""The networks: names of the released checkpoint, and the same numbers as its plain, published forward pass."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from gan.losses import path_lengths, r1_penalty
from model import Discriminator, Encoder, Generator, ModelConfig, minibatch_stddev
from op import modulated_conv

TINY = ModelConfig(size=32, style_dim=8, n_mlp=2, channel_base=64, channel_multiplier=1, channel_max=8)
PAPER = ModelConfig(size=512)
close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
NETWORKS = (Generator, Discriminator, Encoder)


def build(network, config=TINY, seed=0):
    """With noise strengths and biases away from zero, where they would hide what they multiply."""
    torch.manual_seed(seed)
    net = network(config)
    for parameter in net.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return net.requires_grad_(False)


def rand(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on_meta(network, config):
    with torch.device("meta"):
        return network(config)


# ---- Names and shapes of the released checkpoint, 512 pixels, channel multiplier 2

CHANNELS = {4: 512, 8: 512, 16: 512, 32: 512, 64: 512, 128: 256, 256: 128, 512: 64}
RESOLUTIONS = [8, 16, 32, 64, 128, 256, 512]
BLUR = [4, 4]


def modulated(name, in_ch, out_ch, kernel):
    return {f"{name}.weight": [1, out_ch, in_ch, kernel, kernel], f"{name}.modulation.weight": [in_ch, 512],
            f"{name}.modulation.bias": [in_ch]}


def styled(name, in_ch, out_ch):
    return {**modulated(f"{name}.conv", in_ch, out_ch, 3), f"{name}.noise.weight": [1],
            f"{name}.activate.bias": [out_ch]}


def to_rgb(name, in_ch):
    return {**modulated(f"{name}.conv", in_ch, 3, 1), f"{name}.bias": [1, 3, 1, 1]}


def released_generator():
    names = {"input.input": [1, 512, 4, 4], **styled("conv1", 512, 512), **to_rgb("to_rgb1", 512),
             "noises.noise_0": [1, 1, 4, 4]}
    for i in range(1, 9):
        names |= {f"style.{i}.weight": [512, 512], f"style.{i}.bias": [512]}
    for i, r in enumerate(RESOLUTIONS):
        below, here = CHANNELS[r // 2], CHANNELS[r]
        names |= styled(f"convs.{2 * i}", below, here) | styled(f"convs.{2 * i + 1}", here, here)
        names |= to_rgb(f"to_rgbs.{i}", here)
        names |= {f"convs.{2 * i}.conv.blur.kernel": BLUR, f"to_rgbs.{i}.upsample.kernel": BLUR}
        names |= {f"noises.noise_{2 * i + 1}": [1, 1, r, r], f"noises.noise_{2 * i + 2}": [1, 1, r, r]}
    return names


def released_trunk(final_in):
    names = {"convs.0.0.weight": [64, 3, 1, 1], "convs.0.1.bias": [64],
             "final_conv.0.weight": [512, final_in, 3, 3], "final_conv.1.bias": [512]}
    for i, r in enumerate(reversed(RESOLUTIONS), 1):
        here, below = CHANNELS[r], CHANNELS[r // 2]
        names |= {f"convs.{i}.conv1.0.weight": [here, here, 3, 3], f"convs.{i}.conv1.1.bias": [here],
                  f"convs.{i}.conv2.0.kernel": BLUR, f"convs.{i}.conv2.1.weight": [below, here, 3, 3],
                  f"convs.{i}.conv2.2.bias": [below],
                  f"convs.{i}.skip.0.kernel": BLUR, f"convs.{i}.skip.1.weight": [below, here, 1, 1]}
    return names


RELEASED = {
    "generator": (Generator, PAPER, released_generator()),
    "discriminator": (Discriminator, PAPER, released_trunk(513) | {
        "final_linear.0.weight": [512, 8192], "final_linear.0.bias": [512],
        "final_linear.1.weight": [1, 512], "final_linear.1.bias": [1]}),
    "released encoder": (Encoder, replace(PAPER, encoder_stddev=True), released_trunk(513) | {
        "final_linear.weight": [8192, 8192], "final_linear.bias": [8192]}),
    "encoder": (Encoder, PAPER, released_trunk(512) | {
        "final_linear.weight": [8192, 8192], "final_linear.bias": [8192]}),
}


@pytest.mark.parametrize("which", RELEASED)
def test_names_and_shapes_are_those_of_the_released_checkpoint(which):
    network, config, expected = RELEASED[which]
    assert {k: list(v.shape) for k, v in on_meta(network, config).state_dict().items()} == expected


@pytest.mark.parametrize("size", [32, 64, 128, 256, 512, 1024])
def test_output_shapes_at_every_size(size):
    config = ModelConfig(size=size)
    layers = 2 * int(math.log2(size)) - 2
    with torch.device("meta"):
        w_plus, images = torch.empty(4, layers, 512), torch.empty(4, 3, size, size)
    assert config.n_latent == layers
    assert on_meta(Generator, config).synthesis(w_plus).shape == (4, 3, size, size)
    assert on_meta(Discriminator, config)(images).shape == (4, 1)
    assert on_meta(Encoder, config)(images).shape == (4, layers, 512)


# ---- The published forward pass, written out plainly

TAPS = torch.tensor([1.0, 3, 3, 1])
FILTER = TAPS[:, None] * TAPS / 64


def plain_filter(x, pad, kernel):
    b, c, h, w = x.shape
    x = F.pad(x, (pad[0], pad[1], pad[0], pad[1])).reshape(b * c, 1, h + sum(pad), w + sum(pad))
    y = F.conv2d(x, kernel.to(x)[None, None])                                      # the filter is symmetric
    return y.reshape(b, c, *y.shape[2:])


def plain_activation(x, bias):
    return F.leaky_relu(x + bias.reshape(1, -1, *[1] * (x.ndim - 2)), 0.2) * math.sqrt(2)


def plain_mapping(state, z, layers):
    x = z / (z.square().mean(1, keepdim=True) + 1e-8).sqrt()
    for i in range(1, layers + 1):
        weight = state[f"style.{i}.weight"] * 0.01 / math.sqrt(x.shape[1])
        x = plain_activation(x @ weight.T, state[f"style.{i}.bias"] * 0.01)
    return x


def plain_modulated(state, name, x, w, demodulate=True, upsample=False):
    weight = state[f"{name}.weight"]                                           # (1, O, I, k, k)
    (b, i, h, width), (_, o, _, k, _) = x.shape, weight.shape
    style = w @ state[f"{name}.modulation.weight"].T / math.sqrt(w.shape[1]) + state[f"{name}.modulation.bias"]
    weight = weight / math.sqrt(i * k * k) * style.reshape(b, 1, i, 1, 1)
    if demodulate:
        weight = weight / (weight.square().sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()
    x = x.reshape(1, b * i, h, width)
    if not upsample:
        y = F.conv2d(x, weight.reshape(b * o, i, k, k), padding=k // 2, groups=b)
        return y.reshape(b, o, h, width)
    y = F.conv_transpose2d(x, weight.transpose(1, 2).reshape(b * i, o, k, k), stride=2, groups=b)
    return plain_filter(y.reshape(b, o, *y.shape[2:]), (1, 1), 4 * FILTER)


def plain_styled(state, name, x, w, noise, upsample=False):
    y = plain_modulated(state, f"{name}.conv", x, w, upsample=upsample) + state[f"{name}.noise.weight"] * noise
    return plain_activation(y, state[f"{name}.activate.bias"])


def plain_to_rgb(state, name, x, w, skip=None):
    y = plain_modulated(state, f"{name}.conv", x, w, demodulate=False) + state[f"{name}.bias"]
    if skip is None:
        return y
    spread = skip.new_zeros(*skip.shape[:2], 2 * skip.shape[2], 2 * skip.shape[3])
    spread[:, :, ::2, ::2] = skip
    return y + plain_filter(spread, (2, 1), 4 * FILTER)


def plain_generator(state, w_plus, noise):
    x = state["input.input"].repeat(len(w_plus), 1, 1, 1)
    x = plain_styled(state, "conv1", x, w_plus[:, 0], noise[0])
    image = plain_to_rgb(state, "to_rgb1", x, w_plus[:, 1])
    for i in range((len(noise) - 1) // 2):
        x = plain_styled(state, f"convs.{2 * i}", x, w_plus[:, 2 * i + 1], noise[2 * i + 1], upsample=True)
        x = plain_styled(state, f"convs.{2 * i + 1}", x, w_plus[:, 2 * i + 2], noise[2 * i + 2])
        image = plain_to_rgb(state, f"to_rgbs.{i}", x, w_plus[:, 2 * i + 3], image)
    return image


def plain_conv(state, name, x, **kwargs):
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight / math.sqrt(weight[0].numel()), **kwargs)


def plain_trunk(state, x, blocks):
    x = plain_activation(plain_conv(state, "convs.0.0", x), state["convs.0.1.bias"])
    for i in range(1, blocks + 1):
        name = f"convs.{i}"
        y = plain_activation(plain_conv(state, f"{name}.conv1.0", x, padding=1), state[f"{name}.conv1.1.bias"])
        y = plain_conv(state, f"{name}.conv2.1", plain_filter(y, (2, 2), FILTER), stride=2)
        y = plain_activation(y, state[f"{name}.conv2.2.bias"])
        x = (y + plain_conv(state, f"{name}.skip.1", plain_filter(x, (1, 1), FILTER), stride=2)) / math.sqrt(2)
    return x


def plain_stddev(x, group):
    channel = x.new_empty(len(x), 1, *x.shape[2:])
    step = len(x) // group
    for j in range(step):
        members = x[j::step]
        std = ((members - members.mean(0)).square().mean(0) + 1e-8).sqrt()
        channel[j::step] = std.mean()
    return torch.cat([x, channel], 1)


def plain_discriminator(state, x, blocks, group):
    x = plain_stddev(plain_trunk(state, x, blocks), group)
    x = plain_activation(plain_conv(state, "final_conv.0", x, padding=1), state["final_conv.1.bias"]).flatten(1)
    x = plain_activation(x @ state["final_linear.0.weight"].T / math.sqrt(x.shape[1]), state["final_linear.0.bias"])
    return x @ state["final_linear.1.weight"].T / math.sqrt(x.shape[1]) + state["final_linear.1.bias"]


def test_generator_is_the_published_forward_pass():
    g = build(Generator)
    z, w_plus = rand(3, 8), rand(3, TINY.n_latent, 8, seed=2)
    state = g.state_dict()
    close(g.mapping(z), plain_mapping(state, z, TINY.n_mlp))
    buffers = [state[f"noises.noise_{i}"] for i in range(len(g.noise_sizes))]
    close(g.synthesis(w_plus, "const"), plain_generator(state, w_plus, buffers))
    own = [rand(3, 1, r, r, seed=r) for r in g.noise_sizes]
    close(g.synthesis(w_plus, own), plain_generator(state, w_plus, own))
    silent = [torch.zeros_like(n) for n in own]
    close(g.synthesis(w_plus, None), plain_generator(state, w_plus, silent))


@pytest.mark.parametrize("batch, group", [(4, 4), (8, 4), (12, 4), (3, 3), (5, 1), (6, 3), (2, 2), (1, 1)])
def test_discriminator_is_the_published_forward_pass(batch, group):
    """Groups of 4 where the batch allows (as published), else of its largest divisor up to 4."""
    d, images = build(Discriminator), rand(batch, 3, 32, 32)
    expected = plain_discriminator(d.state_dict(), images, 3, group)
    close(d(images), expected)


@pytest.mark.parametrize("stddev", [False, True])
def test_encoder_is_the_published_forward_pass(stddev):
    e, images = build(Encoder, replace(TINY, encoder_stddev=stddev)), rand(6, 3, 32, 32)
    state = e.state_dict()
    x = plain_trunk(state, images, 3)
    x = plain_stddev(x, group=6) if stddev else x
    x = plain_activation(plain_conv(state, "final_conv.0", x, padding=1), state["final_conv.1.bias"]).flatten(1)
    x = F.leaky_relu(x @ state["final_linear.weight"].T + state["final_linear.bias"], 0.2)
    close(e(images), x.reshape(6, TINY.n_latent, 8))


WIDE = replace(TINY, channel_base=512, channel_max=32)       # convolutions of op/winograd.py have whole panels here


def doubles(net) -> dict[str, torch.Tensor]:
    """The state in double precision, parameters to be differentiated by."""
    return {name: value.double().requires_grad_() for name, value in net.state_dict().items()}


def assert_same_slopes(net, ours, state, published):
    """By every parameter, of a scalar of the network and of the published one in double precision."""
    names, parameters = zip(*net.named_parameters())
    found = torch.autograd.grad(ours, parameters, materialize_grads=True, allow_unused=True)
    wanted = torch.autograd.grad(published, [state[name] for name in names], materialize_grads=True, allow_unused=True)
    assert sum(bool(t.abs().max() > 0) for t in wanted) > len(names) / 2
    for name, one, other in zip(names, found, wanted):
        torch.testing.assert_close(one.double(), other, atol=1e-4 * other.abs().max().item() + 1e-9, rtol=0, msg=name)


def test_r1_pulls_at_the_discriminator_as_at_the_published_one():
    """Second derivatives through every op of the network: bias_act, upfirdn2d, convolutions, minibatch_stddev."""
    net, images = build(Discriminator, WIDE).requires_grad_(), rand(4, 3, 32, 32)
    state, exact, seen = doubles(net), images.double().requires_grad_(), images.clone().requires_grad_()
    penalty = r1_penalty(net(seen), seen)
    (slope,) = torch.autograd.grad(plain_discriminator(state, exact, 3, 4).sum(), exact, create_graph=True)
    published = slope.square().sum((1, 2, 3)).mean()
    torch.testing.assert_close(penalty.double(), published, atol=0, rtol=1e-4)
    assert_same_slopes(net, penalty, state, published)


def test_path_length_pulls_at_the_generator_as_at_the_published_one():
    net, w_plus, noise = build(Generator, WIDE).requires_grad_(), rand(4, WIDE.n_latent, 8), rand(4, 3, 32, 32, seed=2)
    state, exact, seen = doubles(net), w_plus.double().requires_grad_(), w_plus.clone().requires_grad_()
    penalty = (path_lengths(net.synthesis(seen, "const"), seen, noise) - 0.3).square().mean()
    image = plain_generator(state, exact, [state[f"noises.noise_{i}"] for i in range(len(net.noise_sizes))])
    (slope,) = torch.autograd.grad((image * noise.double() / 32).sum(), exact, create_graph=True)      # sqrt(H W) = 32
    published = (slope.square().sum(2).mean(1).sqrt() - 0.3).square().mean()
    torch.testing.assert_close(penalty.double(), published, atol=0, rtol=1e-4)
    assert_same_slopes(net, penalty, state, published)


def test_minibatch_stddev_by_hand():
    x = torch.tensor([0.0, 10, 2, 10, 4, 16, 6, 24]).reshape(8, 1, 1, 1)
    y = minibatch_stddev(x, 4)                       # groups 0 2 4 6 (std sqrt 5) and 10 10 16 24 (std sqrt 33)
    assert y.shape == (8, 2, 1, 1) and torch.equal(y[:, :1], x)
    close(y[:, 1, 0, 0], torch.tensor([5.0, 33.0] * 4).sqrt())


# ---- Behaviour

def test_a_code_depends_on_its_batch_only_in_the_released_encoder():
    """Released defect, kept for imported checkpoints: the statistic spans the batch."""
    images = rand(4, 3, 32, 32)
    e = build(Encoder)
    close(e(images)[:1], e(images[:1]))
    released = build(Encoder, replace(TINY, encoder_stddev=True))
    assert (released(images)[:1] - released(images[:1])).abs().max() > 1e-3


def test_noise_const_repeats_and_random_does_not():
    g, w = build(Generator), rand(2, 8)
    first = g.synthesis(w, "const")
    assert torch.equal(first, g.synthesis(w, "const"))
    torch.manual_seed(0)
    one, two = g.synthesis(w, "random"), g.synthesis(w, "random")
    assert (one - two).abs().max() > 1e-3
    assert (g.synthesis(w[:1].expand(2, -1), "random").diff(dim=0)).abs().max() > 1e-3     # each sample has its own
    g.noises.noise_3 += 1
    assert (g.synthesis(w, "const") - first).abs().max() > 1e-3


def test_gradients_reach_codes_and_every_noise_map():
    g = build(Generator)
    w_plus = rand(2, TINY.n_latent, 8).requires_grad_()
    maps = [rand(1, 1, r, r, seed=r).requires_grad_() for r in g.noise_sizes]
    grads = torch.autograd.grad(g.synthesis(w_plus, maps).square().sum(), [w_plus, *maps])
    assert grads[0].abs().sum((0, 2)).min() > 0
    assert all(grad.abs().max() > 0 for grad in grads[1:])


def test_a_single_code_serves_all_layers_and_mixing_switches_at_the_crossover():
    g, w = build(Generator), rand(2, 8)
    close(g.synthesis(w, "const"), g.synthesis(w[:, None].repeat(1, TINY.n_latent, 1), "const"))
    mixed = g.mix_styles(w, -w, torch.tensor([3, TINY.n_latent]))
    assert torch.equal(mixed[0], torch.cat([w[:1].expand(3, -1), -w[:1].expand(TINY.n_latent - 3, -1)]))
    assert torch.equal(mixed[1], w[1].expand(TINY.n_latent, -1))


def test_truncation_draws_codes_towards_the_mean():
    g, z = build(Generator), rand(2, 8)
    half, again = (g(z, truncation_psi=0.5, noise="const") for _ in range(2))
    assert torch.equal(half, again)                              # the mean was over other codes each time
    mean = g.mean_latent(generator=torch.Generator().manual_seed(0))
    close(half, g.synthesis(0.5 * (mean + g.mapping(z)), "const"))
    none = g(z, truncation_psi=0.0, noise="const")
    close(none[0], none[1])
    assert (g(z, noise="const").diff(dim=0)).abs().max() > 1e-2


def test_mean_latent_is_the_mean_over_many_codes():
    g = build(Generator)
    codes = g.mapping(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
    ours = g.mean_latent(64, torch.Generator().manual_seed(0))
    close(ours, codes.mean(0, keepdim=True))


@pytest.mark.parametrize("network", NETWORKS)
def test_bfloat16_stays_close_and_hands_out_float32(network):
    net = build(network)
    given = rand(4, 8) if network is Generator else rand(4, 3, 32, 32)
    run = (lambda: net.synthesis(given, "const")) if network is Generator else (lambda: net(given))
    exact = run()
    net.compute_dtype = torch.bfloat16
    rough = run()
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).square().mean().sqrt() < 0.03 * exact.square().mean().sqrt()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_made_of_weights_is_made_anew_when_they_change(network, frozen):
    """Also by a fused optimiser, which does not count their versions up, in networks that are trained."""
    net = build(network).requires_grad_(not frozen)
    given = rand(4, 8) if network is Generator else rand(4, 3, 32, 32)
    run = (lambda: net.synthesis(given, "const")) if network is Generator else (lambda: net(given))

    def change():
        if frozen:
            for parameter in net.parameters():
                parameter.mul_(1.1)
        else:
            optimiser = torch.optim.Adam(net.parameters(), 0.1, fused=True)
            with torch.enable_grad():
                run().square().mean().backward()
            optimiser.step()

    with torch.no_grad():
        before = run()
        assert torch.equal(run(), before)
        change()
        after = run()
        fresh = build(network)
        fresh.load_state_dict(net.state_dict())
        net = fresh
        assert not torch.equal(after, before)
        torch.testing.assert_close(after, run())


@pytest.mark.parametrize("network", [Generator, Encoder])
def test_networks_made_and_used_in_inference_mode(network):
    """Their weights have no versions, by which a change would be seen."""
    given = rand(4, 8) if network is Generator else rand(4, 3, 32, 32)
    results = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            net = build(network).requires_grad_(False)
            for _ in range(2):
                results.append(net.synthesis(given, "const") if network is Generator else net(given))
                for parameter in net.parameters():
                    parameter.mul_(1.1)
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


def test_with_a_matrix_unit_the_generator_folds_and_comes_to_the_same(monkeypatch):
    """In bfloat16, every layer from 8 pixels on, where no gradient is asked for."""
    net, codes = build(Generator).requires_grad_(False), rand(4, 8)
    net.compute_dtype = torch.bfloat16

    def draw(has_unit):
        monkeypatch.setattr(modulated_conv, "has_matrix_unit", lambda: has_unit)
        with torch.no_grad():
            image = net.synthesis(codes, "const")
        return image, [net.convs[i].conv.kept.found[1].folded for i in range(0, len(net.convs), 2)]

    folded, folds = draw(True)
    plain, does_not = draw(False)
    assert folds == [False, True, True] and not any(does_not)
    assert 0 < (folded - plain).square().mean().sqrt() < 0.03 * plain.square().mean().sqrt()


def test_redrawing_is_inverting_and_drawing():
    config = replace(TINY, encoder_noise=True, noise_channels=True)
    e, g, images = Encoder(config), Generator(config), rand(2, 3, 32, 32)
    for maps in e.noise_head.maps:
        torch.nn.init.normal_(maps.weight)
    close(e.redraw(images, g), g.synthesis(*e.invert(images, g)))
    e, g = Encoder(TINY), Generator(TINY)
    close(e.redraw(images, g), g.synthesis(*e.invert(images, g)))


def test_wrong_sizes_raise():
    g, e = build(Generator), build(Encoder)
    with pytest.raises(ValueError, match="power of two from 16 to 1024, got 48"):
        ModelConfig(size=48)
    with pytest.raises(ValueError, match=r"w_plus must be \[B, 8, 8\], got \[2, 7, 8\]"):
        g.synthesis(rand(2, 7, 8))
    with pytest.raises(ValueError, match="noise must be 'const', 'random', None"):
        g.synthesis(rand(2, 8), "fixed")
    with pytest.raises(ValueError, match=r"noise maps must have sides \[4, 8, 8, 16, 16, 32, 32\]"):
        g.synthesis(rand(2, 8), [rand(1, 1, 4, 4)] * 7)
    with pytest.raises(ValueError, match=r"images must be \[B, 3, 32, 32\], got \[2, 3, 64, 64\]"):
        e(rand(2, 3, 64, 64))


def test_an_encoder_without_a_noise_head_leaves_the_noise_to_the_generator():
    e, g = build(Encoder), build(Generator)
    code, maps = e.invert(rand(2, 3, 32, 32), g)
    close(code, e(rand(2, 3, 32, 32)))
    assert all(torch.equal(one, own) for one, own in zip(maps, g.noise_maps("const")))


def test_the_noise_head_starts_from_nothing_and_then_follows_the_image():
    torch.manual_seed(0)
    e, g = Encoder(replace(TINY, encoder_noise=True)), build(Generator)
    own = g.noise_maps("const")
    _, maps = e.invert(rand(2, 3, 32, 32), g)
    assert [m.shape[-1] for m in maps] == g.noise_sizes
    assert all(torch.equal(one.expand(2, -1, -1, -1), m.expand(2, -1, -1, -1)) for one, m in zip(own, maps))
    for layer in e.noise_head.maps:
        layer.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    images = rand(2, 3, 32, 32)
    _, maps = e.invert(images, g)
    assert all((m[0] - m[1]).abs().max() > 1e-3 for m in maps[1:])
    moved = images.clone()
    moved[:, :, :8, :8] += 3                                     # the finest map changes where the image did
    change = (e.invert(moved, g)[1][-1] - maps[-1]).abs().mean((0, 1))
    assert change[:8, :8].mean() > 3 * change[24:, 24:].mean()


# ---- Folded pixels

def folded(**changes):
    return ModelConfig(size=64, style_dim=8, n_mlp=1, channel_base=64, channel_multiplier=1, channel_max=8, fold=2,
                       encoder_noise=True, **changes)


def test_folded_networks_work_on_half_the_grid():
    config = folded()
    generator, encoder, discriminator = Generator(config), Encoder(config), Discriminator(config)
    assert config.grid == 32 and config.n_latent == 8 and generator.noise_sizes[-1] == 32
    images = generator(torch.randn(2, 8))
    w_plus, noise = encoder.invert(images, generator)
    assert images.shape == (2, 3, 64, 64) and w_plus.shape == (2, 8, 8) and noise[-1].shape == (2, 1, 32, 32)
    assert generator.synthesis(w_plus, noise).shape == (2, 3, 64, 64) and discriminator(images).shape == (2, 1)


def test_a_folded_generator_draws_each_pixel_of_its_square_by_a_channel_of_its_own():
    generator = Generator(folded())
    with torch.no_grad():
        for to_rgb in (generator.to_rgb1, *generator.to_rgbs, generator.to_fine):
            to_rgb.conv.weight.zero_()
        generator.to_fine.bias[:, :4] = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1)    # the first window
        image = generator.synthesis(torch.zeros(1, 8, 8))[0]
    assert image[0, :2, :2].tolist() == [[1, 2], [3, 4]] and image[0, 62:, 62:].tolist() == [[1, 2], [3, 4]]
    assert not image[1:].any()



def test_fold_is_checked():
    with pytest.raises(ValueError, match="fold must be 1 or 2, got 3"):
        ModelConfig(fold=3)
