"""Everything that trains or projects takes its steps: on the CPU, and on the GPU where there is one."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import train
import train_encoder
from benchmarks import timed
from detect.projection import project_frame
from detect.search import SearchSettings
from detect.votes import Votes
from gan.coding import CodeTrainer
from gan.inpainting import InpaintingTrainer
from gan.snapshots import Snapshot
from healthygan.settings import PRESETS as HEALTHYGAN_PRESETS
from healthygan.training import Trainer as HealthyganTrainer
from model import Discriminator, Generator, ModelConfig
from op import bias_act, layers, styled_act

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
TINY = ModelConfig(size=32, style_dim=8, channel_base=128, channel_max=16)
PRECISIONS = ("fp32", "bf16")


def assert_finite(stats: dict[str, torch.Tensor]) -> None:
    assert stats and {name for name, value in stats.items() if not torch.isfinite(value).all()} == set()


@pytest.mark.parametrize("device, precision, slope, most", [
    ("cpu", torch.bfloat16, 1.0, 0.1), pytest.param("cuda", torch.float32, 0.2, 1e-3, marks=needs_gpu),
    pytest.param("cuda", torch.bfloat16, 1.0, 0.1, marks=needs_gpu)])
def test_networks_and_their_gradients_are_those_of_float32_on_the_cpu(device, precision, slope, most, monkeypatch):
    """Gradients of one kind (biases, noise strengths, ...) of all layers of a network are compared as one vector.

    In bfloat16 with a slope of 1: rounding may put a value on the other side of the leaky ReLU's kink, where a
    derivative is another by a factor of 5. With the slope of 0.2 five of the generator's kinds were off by 0.27 to 0.36
    in the one run on an H200 (PyTorch 2.11); float32 was within 1e-3, and every kernel right by itself (op.doctor).
    Plain PyTorch on a CPU does that, too: over eight changes of the codes by a thousandth it is off by 0.06 at most in
    seven, and by 0.31 in one. Slopes in bfloat16 are the doctor's, off the kink.

    Without kinks only rounding is left: some 150 tensors one after the other, each rounded by 0.0011 in root mean
    square, which adds up to 0.014. On a CPU, over 150 such changes, with the kernels emulated and without, a kind was
    off by 0.055 at most. Wrong kernels are off by more: the sums of factor and bias, or the strength's, 20 % short by
    0.2, gradients of the styled layers 5 % too large by 0.23, a row, a pack of channels or the noise left out by 0.5 to
    1.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for op in (styled_act, bias_act):
        monkeypatch.setattr(layers, op.__name__, partial(op, slope=slope))
    exact, found = by_kind("cpu", torch.float32), by_kind(device, precision)
    errors = {kind: ((found[kind] - exact[kind]).norm() / exact[kind].norm()).item() for kind in exact}
    assert len(errors) == 9 and {kind: error for kind, error in errors.items() if not error <= most} == {}


def by_kind(device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The image of tiny networks, and by kind all gradients of the discriminator's verdict on it."""
    torch.manual_seed(0)
    networks = {"generator": Generator(TINY), "discriminator": Discriminator(TINY)}
    for layer in [networks["generator"].conv1, *networks["generator"].convs]:
        torch.nn.init.constant_(layer.noise.weight, 0.3)
    codes = torch.randn(4, TINY.n_latent, TINY.style_dim).to(device).requires_grad_()
    wanted, kinds = [codes], ["codes"]
    for name, net in networks.items():
        net.to(device).compute_dtype = dtype
        for parameter_name, parameter in net.named_parameters():
            if name == "discriminator" or parameter_name.startswith("convs."):
                wanted.append(parameter)
                parts = [part for part in parameter_name.split(".")[-2:] if not part.isdigit()]
                kinds.append(" ".join([name, *parts]))
    image = networks["generator"].synthesis(codes, "const")
    gradients = torch.autograd.grad(networks["discriminator"](image).square().sum(), wanted)
    found = {"image": [image.detach()]}
    for kind, gradient in zip(kinds, gradients):
        found.setdefault(kind, []).append(gradient)
    return {kind: torch.cat([t.flatten().float().cpu() for t in parts]) for kind, parts in found.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_of_every_phase(device, precision):
    config = dataclasses.replace(train.PRESETS["smoke32"], style_dim=8, channel_base=128, channel_max=16, batch=4,
                                 precision=precision)
    trainer = timed.make_trainer(config, torch.device(device))
    assert_finite(trainer.step(torch.rand(4, 3, 32, 32, device=device) * 2 - 1, 0))
    trainer.load_state(trainer.state())
    assert_finite(trainer.step(torch.rand(4, 3, 32, 32, device=device) * 2 - 1, 1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind, preset", [(InpaintingTrainer, "ct128"), (CodeTrainer, "heads128")])
def test_a_step_of_the_encoders(device, precision, kind, preset):
    torch.manual_seed(0)
    networks = {"generator_ema": Generator(TINY), "discriminator": Discriminator(TINY)}
    weights = {name: net.state_dict() for name, net in networks.items()}
    gan = Snapshot(0, Path(), weights, {}, {"model": dataclasses.asdict(TINY)})
    config = dataclasses.replace(train_encoder.PRESETS[preset], batch=4, precision=precision)
    trainer = kind(config, gan, (-20.0, 100.0), torch.device(device))
    brain = torch.zeros(4, 32, 32, dtype=torch.bool)
    brain[:, 4:-4, 4:-4] = True
    slices = {"hu": torch.where(brain, 30 + 5 * torch.randn(brain.shape), -20.0), "brain": brain}
    examples = trainer.prepare(slices, torch.Generator().manual_seed(0))
    assert_finite(trainer.learn(examples, 0, True))
    trainer.load_state(trainer.state())
    assert_finite(trainer.learn(examples, 1, True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_of_healthygan(device, precision):
    config = dataclasses.replace(HEALTHYGAN_PRESETS["smoke32"], precision=precision, critic_steps=1)
    trainer = HealthyganTrainer(config, torch.device(device))
    a, b = (torch.rand(4, 3, 32, 32, device=device) * 2 - 1 for _ in range(2))
    assert_finite(trainer.step(a, b))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_search_of_a_scan(device, precision):
    search = timed.random_search(TINY, torch.device(device))
    search.set_precision(precision)
    search = search.with_settings(SearchSettings(steps_latent=2, steps_noise=2, batch=2))
    hu, brain = torch.rand(3, 32, 32) * 80, torch.zeros(3, 32, 32, dtype=torch.bool)
    brain[:, 8:-8, 8:-8] = True
    found, _, findings, _ = project_frame(search, Votes(), hu, brain, 5.0 * np.arange(3)[::-1])
    assert torch.isfinite(found.normal_hu).all() and torch.isfinite(findings.slice_scores).all()
