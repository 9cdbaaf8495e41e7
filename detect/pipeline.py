"""Three stages in parallel: while one job is worked on, the next is read and the previous one written."""

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

    Yields after each item, also where read returns None. Each stage takes the items in order. At most three jobs are
    held at a time, or a large one alone, within large(). Errors of a stage are raised here: then drop(job) is called
    for jobs read but not handed to write, and the write in progress is waited for.
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
