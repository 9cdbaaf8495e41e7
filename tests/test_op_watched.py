"""Where PyTorch looks on, ops are such as it sees: dispatch modes, and the transforms of torch.func."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from model import Discriminator, Generator, ModelConfig
from op import bias_act, binomial_kernel, conv2d, enlarged_beside, scaled_sum, set_impl, upfirdn2d
from op.median import median2d

CONFIG = ModelConfig(size=32, channel_max=32, channel_base=512, style_dim=16, n_mlp=2)
NHWC = torch.channels_last


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=NHWC) if x.ndim == 4 else x


BIAS, WEIGHT, OTHER = rand(32, seed=1), rand(32, 32, 3, 3, seed=2), rand(2, 32, 16, 16, seed=3)
OPS = {
    "bias_act": lambda x: bias_act(x, BIAS),
    "upfirdn2d": lambda x: upfirdn2d(x, binomial_kernel(), up=2, pad=(2, 1)),
    "conv2d": lambda x: conv2d(x, WEIGHT, padding=1),
    "scaled_sum": lambda x: scaled_sum(x, x, 0.5),
    "enlarged_beside": lambda x: enlarged_beside(x, OTHER, binomial_kernel(gain=4)),
    "median2d": lambda x: median2d(x, 3),
}


@pytest.fixture
def network() -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(CONFIG).eval().requires_grad_(False)


def test_a_graph_is_that_of_the_network(network):
    """It held the memory that C was to fill: another number at each call."""
    graph = make_fx(network)(rand(1, 3, 32, 32))
    other = rand(1, 3, 32, 32, seed=1)
    torch.testing.assert_close(graph(other), network(other), atol=1e-4, rtol=1e-4)


def test_operations_are_counted(network):
    def count(run) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    torch.manual_seed(0)
    generator = Generator(CONFIG).eval().requires_grad_(False)
    runs = (lambda: network(rand(1, 3, 32, 32)),
            lambda: generator.synthesis(rand(1, CONFIG.n_latent, CONFIG.style_dim), "const"))
    found = [count(run) for run in runs]
    set_impl("ref")
    try:
        assert found == [count(run) for run in runs] and min(found) > 1e6
    finally:
        set_impl("auto")


def test_tensors_without_data_have_a_shape(network):
    """The process ended with a signal."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        assert network(mode.from_tensor(rand(1, 3, 32, 32))).shape == (1, 1)
        assert OPS["median2d"](mode.from_tensor(rand(2, 32, 8, 8))).shape == (2, 32, 8, 8)
    x = rand(1, 3, 32, 32)
    torch.testing.assert_close(network(x), network(x))                    # nothing of it is kept


@pytest.mark.filterwarnings("ignore:There is a performance drop")         # median2d goes plane by plane
@pytest.mark.parametrize("name", OPS)
def test_torch_func_goes_through(name):
    run, x = OPS[name], rand(2, 32, 8, 8)
    both = torch.stack([x, x + 1])
    torch.testing.assert_close(torch.func.vmap(run)(both), torch.stack([run(x), run(x + 1)]), atol=1e-3, rtol=1e-4)
    if name == "median2d":                                                # has no gradient
        return
    tracked = x.clone().requires_grad_()
    expected, = torch.autograd.grad(run(tracked).square().sum(), tracked)
    gradient = torch.func.grad(lambda x: run(x).square().sum())
    torch.testing.assert_close(gradient(x), expected, atol=1e-2, rtol=1e-4)
    torch.testing.assert_close(torch.func.vmap(gradient)(both)[0], expected, atol=1e-2, rtol=1e-4)
