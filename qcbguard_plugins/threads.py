"""Work on the parts of a tensor side by side."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def map_over_threads(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Call ``work`` for every item, on as many threads as torch may use.

    Each thread keeps torch from splitting its operations further: with dozens of them for a part that fits the cache,
    the barriers would cost more than they bring, and very much more on a machine that is busy.

    Args:
        work: Must not depend on the order of the calls.
        items: What to call it with.

    Returns:
        The results, in the order of the items.
    """
    num_threads = torch.get_num_threads()
    workers = min(num_threads, len(items))
    if workers <= 1:
        return [work(item) for item in items]
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, items))
    finally:
        # The setting of this thread was never touched; this is for threads that the caller starts later.
        torch.set_num_threads(num_threads)


def stream_over_threads(work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Like :func:`map_over_threads`, but each result is handed over while the next ones are worked on.

    Args:
        work: Must not depend on the order of the calls.
        items: What to call it with.

    Yields:
        The results, in the order of the items. At most one a thread and one more wait for the caller.
    """
    num_threads = torch.get_num_threads()
    workers = min(num_threads, len(items))
    if workers <= 1:
        yield from map(work, items)
        return
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            started = deque(pool.submit(work, item) for item in items[: workers + 1])
            for item in items[workers + 1 :]:
                yield started.popleft().result()
                started.append(pool.submit(work, item))
            while started:
                yield started.popleft().result()
    finally:
        torch.set_num_threads(num_threads)
