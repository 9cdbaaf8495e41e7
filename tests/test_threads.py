"""Images shared out to threads of one thread each: what comes out is the same, and nobody else has fewer threads."""

from __future__ import annotations

import multiprocessing
import threading

import pytest
import torch

from op import threads as op_threads
from op.threads import in_batches


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count, batch", [(1, 4), (5, 1), (7, 4), (7, 100)])
def test_parts_come_back_in_order_and_at_most_a_batch_is_in_work(threads, count, batch, two_threads):
    torch.set_num_threads(threads)
    at_work, most, lock = [0], [0], threading.Lock()
    x = torch.arange(count * 2.0).reshape(count, 2)

    def run(a, b):
        with lock:
            at_work[0] += len(a)
            most[0] = max(most[0], at_work[0])
        found = a * 10 + b
        with lock:
            at_work[0] -= len(a)
        return found

    assert torch.equal(in_batches(run, batch, x, -x), x * 9)
    assert most[0] <= batch


def test_threads_of_the_pool_have_one_thread_each_and_all_others_keep_theirs(two_threads):
    together = threading.Barrier(2)

    def run(part):
        together.wait(10)                                # in two threads at once, or not at all
        (part @ part.T).sum()                            # some work that PyTorch would share out
        return torch.tensor([torch.get_num_threads()])

    assert in_batches(run, 8, torch.zeros(4, 3)).tolist() == [1, 1]
    assert torch.get_num_threads() == 2
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [2]


def test_within_a_part_all_stays_in_its_thread(two_threads):
    def run(part):
        inner = in_batches(lambda one: torch.full((len(one),), threading.get_ident()), 8, part)
        return (inner == threading.get_ident()).float()

    assert in_batches(run, 8, torch.zeros(4)).tolist() == [1, 1, 1, 1]


def test_no_gradient_is_kept_in_any_thread(two_threads):
    weight = torch.ones(1, requires_grad=True)
    assert not in_batches(lambda part: part * weight, 8, torch.ones(4)).requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("count", [1, 4])
def test_no_part_sees_autocast_or_inference_mode_of_the_caller(two_threads, count):
    """Of one image, which stays in the caller's thread, it did."""
    def run(part):
        seen = torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()
        return torch.tensor([seen]).expand(len(part), 2)

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert in_batches(run, 8, torch.zeros(count, 1)).tolist() == count * [[False, False]]
        assert torch.is_autocast_enabled("cpu") and torch.is_inference_mode_enabled()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_shares_are_in_order_and_all_there_is(two_threads, threads):
    torch.set_num_threads(threads)
    found = op_threads.spread(lambda thread, first, last: (thread, first, last), 7, threads)
    assert found == {1: [(0, 0, 7)], 2: [(0, 0, 3), (1, 3, 7)], 3: [(0, 0, 2), (1, 2, 4), (2, 4, 7)]}[threads]


def test_an_error_of_a_part_is_raised(two_threads):
    def run(part):
        raise ValueError("of this part")

    with pytest.raises(ValueError, match="of this part"):
        in_batches(run, 8, torch.zeros(4))


def test_few_images_share_all_threads(two_threads):
    torch.set_num_threads(4)
    seen = []
    in_batches(lambda part: seen.append((threading.get_ident(), torch.get_num_threads())) or part, 8, torch.zeros(2, 1))
    assert seen == [(threading.get_ident(), 4)]


def test_other_numbers_of_images_begin_no_further_threads(two_threads):
    torch.set_num_threads(4)
    in_batches(lambda part: part, 99, torch.zeros(8, 1))
    before = threading.active_count()
    for count in (3, 4, 5, 9):
        in_batches(lambda part: part, 99, torch.zeros(count, 1))
    assert threading.active_count() == before


def test_where_threads_cannot_begin_none_is_left_waiting(two_threads, monkeypatch):
    begin, begun = threading.Thread.start, []

    def third_fails(thread):
        if thread.name.startswith("op.threads.single"):
            begun.append(thread)
            if len(begun) == 3:
                raise RuntimeError("can't start new thread")
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", third_fails)
    torch.set_num_threads(5)                             # of which there is no pool yet
    with pytest.raises(RuntimeError, match="can't start new thread"):
        in_batches(lambda part: part, 99, torch.zeros(5, 1))
    for thread in begun[:2]:
        thread.join(10)
        assert not thread.is_alive()
    assert torch.get_num_threads() == 5 and 5 not in op_threads._singles


def test_a_fork_has_threads_of_its_own(two_threads):
    assert len(in_batches(lambda part: part, 8, torch.zeros(4))) == 4
    child = multiprocessing.get_context("fork").Process(target=in_batches, args=(torch.neg, 8, torch.zeros(4)))
    child.start()
    child.join(30)
    assert child.exitcode == 0
