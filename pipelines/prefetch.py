"""Work ahead: what a loop wants next is made in threads while it computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(makers: Iterable[Callable[[], T]], threads: int) -> Generator[T, None, None]:
    """What each of `makers` makes, in their order, whatever the number of threads.

    For work that leaves the interpreter free, such as decoding and resizing. An error in a thread is raised here, when
    its turn comes. When the iteration ends or is closed, no thread is left.

    Args:
        threads: how many results are made at once; beside them one more is kept ready. 0 makes each when it is asked
            for, in the thread that asks.
    """
    if not threads:
        for make in makers:
            yield make()
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ahead")
    waiting: deque[Future[T]] = deque()
    try:
        for make in makers:
            waiting.append(pool.submit(make))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
