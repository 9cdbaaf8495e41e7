"""train.main whose rank 1 gets SIGTERM in the middle of its third step."""

from __future__ import annotations

import os
import signal

import distributed
import train
from gan import training


def main(argv: list[str]) -> int:
    step, count = training.Trainer.step, iter(range(1, 10**6))

    def watched(self, *args):
        if next(count) == 3 and distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)
    training.Trainer.step = watched
    return train.main(argv)
