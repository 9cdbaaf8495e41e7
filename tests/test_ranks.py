"""The trainings by two gloo ranks: the step that one process takes on the same images. train.py's is in test_train.py.

Without what every rank draws for itself (the encoder's augmentation) and, as there, by plain gradient descent: Adam's
first step is the gradient's sign, which rounding decides where it is near zero.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

import distributed
import train_encoder
import train_reader
from gan.encoding import EncoderTrainer
from gan.inpainting import InpaintingTrainer
from gan.reading import ReadingTrainer
from gan.snapshots import Snapshot
from healthygan.settings import PRESETS as HEALTHYGAN
from healthygan.training import Trainer as HealthyTrainer
from model import Discriminator, Generator, ModelConfig
from tests.helpers import assert_identical
from tests.processes import free_port

CPU, BATCH, SIZE = torch.device("cpu"), 8, 32
TINY = ModelConfig(size=SIZE, style_dim=8, n_mlp=2, channel_base=64, channel_max=8)


def rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def own(images: torch.Tensor) -> torch.Tensor:
    """This rank's share of a batch."""
    return images[distributed.get_rank()::distributed.get_world_size()]


def share(config):
    return dataclasses.replace(config, batch=BATCH // distributed.get_world_size(), precision="fp32")


def plain(optimiser) -> torch.optim.SGD:
    return torch.optim.SGD([p for group in optimiser.param_groups for p in group["params"]], lr=0.01)


def healthygan():
    """A step of the critic and of the generator, with flips."""
    trainer = HealthyTrainer(share(dataclasses.replace(HEALTHYGAN["smoke32"], critic_steps=1, shift=1)), CPU)
    trainer.g_opt, trainer.d_opt = plain(trainer.g_opt), plain(trainer.d_opt)
    return trainer, trainer.step(*(own(2 * rand(BATCH, 3, SIZE, SIZE, seed=seed) - 1) for seed in (1, 2)))


def on_gan(objective, **changes) -> EncoderTrainer:
    """A trainer of an encoder on a generator and discriminator with random weights; without augmentation."""
    config = share(dataclasses.replace(train_encoder.PRESETS["smoke32"], flip=False, rotate=0.0, erase=0.0, **changes))
    torch.manual_seed(0)
    networks = {"generator_ema": Generator(TINY), "discriminator": Discriminator(TINY)}
    gan = Snapshot(0, Path("gan"), {name: net.state_dict() for name, net in networks.items()}, {},
                   {"model": dataclasses.asdict(TINY)})
    trainer = objective(config, gan, (-20.0, 180.0), CPU)
    trainer.e_opt, trainer.d_opt = plain(trainer.e_opt), plain(trainer.d_opt)
    return trainer


def encoder():
    """A step with the adversary and R1."""
    trainer = on_gan(EncoderTrainer)
    return trainer, trainer.step(own(2 * rand(BATCH, 3, SIZE, SIZE, seed=3) - 1), 0, full=True)


def brains() -> tuple[torch.Tensor, torch.Tensor]:
    """HU and brains of other sizes, bool: no two ranks have as many pixels of it. Each [B, N, N]."""
    brain = torch.zeros(BATCH, SIZE, SIZE, dtype=torch.bool)
    for i in range(BATCH):
        brain[i, 2:6 + 3 * i, 2:28] = True
    return 60 * rand(BATCH, SIZE, SIZE, seed=4), brain


def inpainting():
    """A step with the adversary on images of which parts are hidden, by chance or as anomalous."""
    trainer, (hu, brain) = on_gan(InpaintingTrainer, hide=1.0, gated=0.5, lr_generator=1e-3), brains()
    examples = {"hu": hu, "query": hu + 8, "brain": brain, "bone": torch.zeros_like(brain), "changed": brain.float(),
                "hidden": rand(BATCH, SIZE, SIZE, seed=6) < 0.5}
    return trainer, trainer.learn({name: own(t) for name, t in examples.items()}, 0, full=True)


class Surroundings:
    """A method that expects 30 HU everywhere."""

    def expected(self, hu: torch.Tensor, bone: torch.Tensor) -> torch.Tensor:
        return torch.full_like(hu, 30.0)


def reader():
    """Both steps, of the batch and of its mirror images."""
    trainer = ReadingTrainer(share(train_reader.PRESETS["smoke32"]), Surroundings(), (0.0, 70.0), CPU)
    hu, brain = brains()
    trainer.optimiser = plain(trainer.optimiser)
    torch.nn.init.normal_(trainer.reader.last.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    change = 12 * (rand(BATCH, SIZE, SIZE, seed=5) - 0.5)
    change[:, 4:9, 5:12] += 20
    examples = {"query_hu": hu, "brain": brain, "bone": torch.zeros_like(brain), "change_hu": change * brain}
    return trainer, trainer.learn({name: own(t) for name, t in examples.items()}, 0, 0.0)


STEPS = {"healthygan": healthygan, "encoder": encoder, "inpainting": inpainting, "reader": reader}


def step(which: str) -> dict:
    """Weights after a step, and the means of what it says."""
    trainer, stats = STEPS[which]()
    return {"weights": {name: net.state_dict() for name, net in trainer.modules().items()},
            "stats": distributed.reduce_mean({name: value.detach() for name, value in stats.items()})}


def ranks_steps(rank: int, port: int, out: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    torch.set_num_threads(1)
    distributed.init(CPU, timeout_minutes=5)
    torch.save({which: step(which) for which in STEPS}, f"{out}/{rank}.pt")
    distributed.barrier()
    distributed.cleanup()
    os._exit(0)              # torch's threads now and then abort a process on its way out; the step is what is tested


@pytest.fixture(scope="module")
def by_two(tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("ranks")
    mp.spawn(ranks_steps, (free_port(), str(out)), nprocs=2)
    return [torch.load(out / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("which", STEPS)
def test_two_ranks_take_the_step_of_one(which, by_two):
    first, second = (found[which] for found in by_two)
    assert_identical(first, second)
    torch.testing.assert_close(first, step(which), atol=1e-5, rtol=1e-5)
