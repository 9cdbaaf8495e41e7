"""detect/pipeline.py: three stages at a time, in order, and what becomes of the jobs when one raises."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest

from detect.pipeline import overlapped


class Stages:
    """Records what is called with what; `at`: what a call waits for, or raises, by (stage, item)."""

    def __init__(self, at=None, nothing=(), large=()):
        self.at, self.nothing, self.large = at or {}, nothing, large
        self.calls: list[tuple[str, int]] = []

    def call(self, stage: str, item: int) -> None:
        self.calls.append((stage, item))
        if act := self.at.get((stage, item)):
            act()
        self.calls.append((f"{stage} done", item))

    def read(self, item: int) -> int | None:
        self.call("read", item)
        return None if item in self.nothing else item

    def run(self, count: int, until: int | None = None) -> int:
        """The number of times it yields."""
        jobs = overlapped(range(count), self.read, lambda job: self.call("work", job),
                          lambda job: self.call("write", job), lambda job: self.call("drop", job),
                          lambda job: job in self.large, self.within)
        yields = 0
        for _ in jobs:
            yields += 1
            if yields == until:
                jobs.close()
        return yields

    @contextlib.contextmanager
    def within(self):
        self.calls.append(("within", self.large[0]))
        yield
        self.calls.append(("left", self.large[0]))

    def items(self, stage: str) -> list[int]:
        return [item for name, item in self.calls if name == stage]


def raises(error: BaseException):
    def act():
        raise error
    return act


def test_reading_working_and_writing_go_on_at_the_same_time():
    together = threading.Barrier(3)                            # nobody passes before all three are there

    def meet():
        together.wait(timeout=20)
    stages = Stages({("read", 2): meet, ("work", 1): meet, ("write", 0): meet})
    assert stages.run(4) == 4
    for stage in ("read", "work", "write"):
        assert stages.items(stage) == [0, 1, 2, 3]
    assert stages.calls.index(("read", 3)) > stages.calls.index(("work done", 1))          # one ahead, no more
    assert stages.items("drop") == []


def test_what_reading_leaves_out_is_passed_over():
    stages = Stages(nothing=(0, 2))
    assert stages.run(4) == 4
    assert stages.items("work") == stages.items("write") == [1, 3]


def test_a_large_job_is_alone():
    def nap():
        time.sleep(0.1)                                        # time enough to begin what must not be begun
    stages = Stages({("write", 0): nap, ("write", 1): nap}, large=(1,))
    assert stages.run(3) == 3
    order = [stages.calls.index(call) for call in (
        ("write done", 0), ("within", 1), ("work", 1), ("write done", 1), ("left", 1), ("read", 2))]
    assert order == sorted(order) and stages.items("within") == [1]


@pytest.mark.parametrize("stage", ["read", "work", "write"])
def test_an_error_ends_it_and_nothing_that_was_read_is_forgotten(stage):
    """Each job is handed to write, or dropped: a claim would else stay."""
    stages = Stages({(stage, 2): raises(KeyboardInterrupt())})
    with pytest.raises(KeyboardInterrupt):
        stages.run(6)
    assert set(stages.items("read done")) == set(stages.items("write")) ^ set(stages.items("drop"))
    assert max(stages.items("read")) < 5


def test_nobody_wants_more():
    stages = Stages()
    assert stages.run(6, until=2) == 2
    assert set(stages.items("read done")) == set(stages.items("write")) ^ set(stages.items("drop"))
    assert set(stages.items("write")) >= {0, 1} and 5 not in stages.items("read")
    assert stages.run(0) == 0
