"""A step of HealthyGAN's training: its order, weights and gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from healthygan.model import ModelConfig
from healthygan.settings import PRESETS
from healthygan.training import Trainer
from tests.helpers import GradientRecorder


def test_step_order_and_learning_rate():
    config = dataclasses.replace(PRESETS["smoke32"], precision="fp32")
    trainer = Trainer(config, torch.device("cpu"))
    a, b = torch.rand(2, 4, 3, 32, 32) * 2 - 1
    before = [p.clone() for p in trainer.g.parameters()]
    assert "g_identity" not in trainer.step(a, b)                 # the generator takes every second step only
    assert all(torch.equal(p, q) for p, q in zip(before, trainer.g.parameters()))
    assert "g_identity" in trainer.step(a, b)
    assert not torch.equal(before[0], next(trainer.g.parameters()))
    assert [config.learning_rate(i) for i in (0, 15, 16, 19)] == pytest.approx([1e-4, 1e-4, 8e-5, 2e-5])
    assert dataclasses.replace(config, decay=0).learning_rate(19) == 1e-4
    short = dataclasses.replace(PRESETS["full256"], iterations=5000)        # a part of whatever length there is
    assert [short.learning_rate(i) for i in (0, 3750, 4375)] == pytest.approx([1e-4, 1e-4, 5e-5])


def test_the_masks_weight_rises():
    config = dataclasses.replace(PRESETS["smoke32"], mask=0.2)
    assert config.mask_weight(0) == 0.2
    rising = dataclasses.replace(config, mask_rampup=0.5)
    assert [rising.mask_weight(i) for i in (0, 5, 10, 19)] == pytest.approx([0, 0.1, 0.2, 0.2])
    later = dataclasses.replace(rising, copy_first=10)            # then over half of the 10 that are left
    assert [later.mask_weight(i) for i in (9, 10, 12, 15)] == pytest.approx([0, 0, 0.08, 0.2])
    trainers = [Trainer(dataclasses.replace(c, critic_steps=1, flip=False, precision="fp32"),
                              torch.device("cpu")) for c in (rising, dataclasses.replace(config, mask=0))]
    a, b = torch.rand(2, 4, 3, 32, 32) * 2 - 1
    for trainer in trainers:
        trainer.step(a, b)
    for p, q in zip(*(trainer.g.parameters() for trainer in trainers)):
        assert torch.equal(p, q)


def test_before_all_else_the_translation_learns_to_copy():
    config = dataclasses.replace(PRESETS["smoke32"], precision="fp32", flip=False, copy_first=1, identity=7)
    trainer, other = (Trainer(config, torch.device("cpu")) for _ in range(2))
    a, b = torch.rand(2, 4, 3, 32, 32) * 2 - 1
    assert trainer.step(a, b).keys() == {"g_identity"} and trainer.iteration == 1
    (7 * (b - other.g(b).t).abs().mean()).backward()
    for p, q in zip(trainer.g.parameters(), other.g.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-3 * q.grad.abs().max().item())
    assert all(torch.equal(p, q) for p, q in zip(trainer.d.parameters(), other.d.parameters()))
    assert "wasserstein" in trainer.step(a, b)


def test_at_first_the_critic_sees_the_translation_itself():
    config = dataclasses.replace(PRESETS["smoke32"], precision="fp32", flip=False, critic_steps=1, identity=0,
                                 translate_first=1)
    trainer = Trainer(config, torch.device("cpu"))
    a, b = torch.rand(2, 4, 3, 32, 32) * 2 - 1
    of_a = trainer._translate(a)
    assert torch.equal(of_a.y, of_a.t) and torch.equal(of_a.m, trainer.g(a).m)
    pulls_at_mask = []
    for _ in range(2):                                            # the last layer's fourth channel is the mask
        trainer.step(a, b)
        pulls_at_mask.append(trainer.g.main[-1].weight.grad[3].abs().max().item())
    assert pulls_at_mask[0] == 0 < pulls_at_mask[1]
    assert all(state["step"] == 1 for state in trainer.g_opt.state.values())          # begun anew with the mask
    assert torch.equal(trainer._translate(a).y, trainer.g(a).y)


def test_images_are_moved_by_whole_pixels():
    trainer = Trainer(dataclasses.replace(PRESETS["smoke32"], shift=2), torch.device("cpu"))
    x = torch.rand(4, 3, 32, 32)
    moved, side, moves = trainer._shift(x, "shift a"), torch.arange(32), []
    for before, after in zip(x, moved):
        fits = [(i, j) for i in range(-2, 3) for j in range(-2, 3)
                if torch.equal(after, before[:, (side + i).clamp(0, 31)][:, :, (side + j).clamp(0, 31)])]
        moves += fits
        assert len(fits) == 1
    assert len(set(moves)) > 1
    assert torch.equal(moved, trainer._shift(x, "shift a")) and not torch.equal(moved, trainer._shift(x, "shift b"))


def test_the_generators_gradient_is_that_of_its_loss():
    config = dataclasses.replace(PRESETS["smoke32"], precision="fp32", flip=False, critic_steps=1, mask=0.3)
    trainer, other = (Trainer(config, torch.device("cpu")) for _ in range(2))
    a, b = torch.rand(2, 4, 3, 32, 32) * 2 - 1
    trainer.step(a, b)
    other.d.load_state_dict(trainer.d.state_dict())               # the critic moves first
    of_a, of_b = other.g(a), other.g(b)

    def focus(m):
        return m.mean() ** 2 + (1 / ((m - 0.5).abs() + 0.01)).mean() - 1 / 0.51

    loss = -other.d(of_a.y).mean() - other.d(of_b.y).mean() + (b - of_b.t).abs().mean()
    loss = loss + ((1 - of_a.m) * (a - of_a.t)).abs().mean() + 0.3 * (focus(of_a.m) + focus(of_b.m)) / 2
    loss.backward()
    for p, q in zip(trainer.g.parameters(), other.g.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-3 * q.grad.abs().max().item())


def test_the_critics_gradient_is_that_of_its_loss():
    """It raises D(b) - D(y_a), and pays 10 (|grad D| - 1)^2 between the two."""
    config = dataclasses.replace(PRESETS["smoke32"], precision="fp32", flip=False, critic_steps=2)
    trainer = Trainer(config, torch.device("cpu"))
    trainer.d_opt = GradientRecorder(trainer.d_opt)
    a, b = torch.rand(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = trainer.g(a).y.detach()
    share = trainer._draw("share", lambda g, n: torch.rand(n, generator=g)).reshape(-1, 1, 1, 1)
    trainer.step(a, b)
    mix = (share * b + (1 - share) * y).requires_grad_()
    (slope,) = torch.autograd.grad(trainer.d(mix).sum(), mix, create_graph=True)
    penalty = (slope.square().sum((1, 2, 3)).sqrt() - 1).square().mean()
    loss = trainer.d(y).mean() - trainer.d(b).mean() + 10 * penalty
    expected = torch.autograd.grad(loss, list(trainer.d.parameters()), materialize_grads=True)
    for found, wanted in zip(trainer.d_opt.steps[0], expected):
        torch.testing.assert_close(torch.zeros_like(wanted) if found is None else found, wanted, rtol=0,
                                   atol=1e-3 * max(wanted.abs().max().item(), 1e-3))


def test_the_faithful_preset_is_the_released_one():
    config = PRESETS["faithful"]
    assert (config.size, config.batch, config.iterations, config.lr) == (256, 16, 400_000, 1e-4)
    assert config.decay == 0 and config.ema_iterations == 0 and config.model() == ModelConfig()
    trainer = Trainer(dataclasses.replace(PRESETS["smoke32"], ema_iterations=0), torch.device("cpu"))
    assert trainer.best is trainer.g and trainer.modules().keys() == {"generator", "critic"}


@pytest.mark.parametrize("mean, side, change", [(0.96, "over 0.95", "raise --mask"),
                                                (0.0005, "under 0.001", "lower --mask")])
def test_a_collapsed_mask_is_reported_with_what_to_change(mean, side, change):
    trainer = Trainer(PRESETS["smoke32"], torch.device("cpu"))
    for _ in range(249):
        trainer._watch_mask(torch.tensor(mean))
    assert trainer.collapse() is None                             # 498 iterations
    trainer._watch_mask(torch.tensor(mean))
    assert side in trainer.collapse() and change in trainer.collapse() and "500 iterations" in trainer.collapse()
    trainer._watch_mask(torch.tensor(0.1))
    assert trainer.collapse() is None


@pytest.mark.parametrize("copy_first, rampup, half_life", [(4, 0, 8), (0, 0, 8), (4, 0.5, None)])
def test_the_average_forgets_half_in_its_half_life_of_iterations(copy_first, rampup, half_life):
    """While it copies, too, where the generator takes a step at each: it forgot critic_steps times as fast."""
    config = dataclasses.replace(PRESETS["smoke32"], copy_first=copy_first, ema_iterations=8, ema_rampup=rampup,
                                 precision="fp32", batch=1)
    trainer = Trainer(config, torch.device("cpu"))
    kept = 1.0
    lerp, torch_lerp = [], torch._foreach_lerp_
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_foreach_lerp_", lambda *given: lerp.append(1 - given[-1]) or torch_lerp(*given))
        for _ in range(4):
            trainer.step(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32))
    for i, share in enumerate(lerp):
        kept *= share
        assert half_life or share == pytest.approx(0.5 ** (1 / (0.5 * (i + 1))))
    if half_life:
        assert kept == pytest.approx(0.5 ** (4 / half_life))
