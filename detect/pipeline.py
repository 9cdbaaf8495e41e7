"""Three stages of successive jobs at the same time: while one is worked on, the next is read and the last written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

Item = TypeVar("Item")
Job = TypeVar("Job")


def overlapped(items: Iterable[Item], read: Callable[[Item], Job | None], work: Callable[[Job], None],
               write: Callable[[Job], None], drop: Callable[[Job], None], is_large: Callable[[Job], bool],
               large: Callable[[], AbstractContextManager] = nullcontext) -> Iterator[None]:
    """read(item) one item ahead, in a thread of its own; work(job) here; write(job) in another thread, one behind.

    Yields when an item is through, or read gives None. Each stage takes the items in their order. Three jobs are held
    at a time, or a large one alone, within large(). What a stage raises is raised here; drop(job) is then called for
    what was read but not handed to write, and what is being written is waited for.
    """
    items = iter(items)
    coming: deque[Future] = deque()
    writing: Future | None = None
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:

        def read_on() -> None:
            for item in items:
                coming.append(reader.submit(read, item))
                break

        try:
            read_on()
            while coming:
                job = coming[0].result()
                if job is None:
                    coming.popleft()
                    read_on()
                    yield
                    continue
                if is_large(job):
                    if writing:
                        writing.result()
                        writing = None
                        yield
                    with large():
                        work(job)
                        done = writer.submit(write, coming.popleft().result())
                        del job
                        done.result()
                    yield
                    read_on()
                    continue
                read_on()
                work(job)
                if writing:
                    writing.result()
                    yield
                writing = writer.submit(write, coming.popleft().result())
            if writing:
                writing.result()
                yield
        finally:
            for future in coming:
                if not future.cancel() and future.exception() is None and future.result() is not None:
                    drop(future.result())
