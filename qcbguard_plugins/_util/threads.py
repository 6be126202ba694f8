"""Work on the parts of a tensor side by side."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache
from threading import Barrier
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def map_over_threads(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Call ``work`` for every item, on as many threads as torch may use.

    Args:
        work: Must not depend on the order of the calls.
        items: What to call it with.

    Returns:
        The results, in the order of the items.
    """
    if _num_workers(items) <= 1:
        return [work(item) for item in items]
    waiting, results = deque(enumerate(items)), dict[int, R]()

    def take() -> None:
        # Item after item in one task: with a task an item, the caller would be woken for each.
        while waiting:
            try:
                number, item = waiting.popleft()
            except IndexError:
                return
            try:
                results[number] = work(item)
            except BaseException:
                waiting.clear()
                raise

    pool = _pool(torch.get_num_threads())
    futures = [pool.submit(take) for _ in range(_num_workers(items))]
    try:
        for future in futures:
            future.result()
    finally:
        waiting.clear()
        _finish(futures)
    return [results[number] for number in range(len(items))]


def stream_over_threads(work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Like :func:`map_over_threads`, but each result is handed over while the next ones are worked on.

    Args:
        work: Must not depend on the order of the calls.
        items: What to call it with.

    Yields:
        The results, in the order of the items. At most one a thread and one more wait for the caller.
    """
    workers = _num_workers(items)
    if workers <= 1:
        yield from map(work, items)
        return
    pool = _pool(torch.get_num_threads())
    started = deque(pool.submit(work, item) for item in items[: workers + 1])
    try:
        for item in items[workers + 1 :]:
            yield started[0].result()
            started.popleft()
            started.append(pool.submit(work, item))
        while started:
            yield started[0].result()
            started.popleft()
    finally:
        _finish(started)


def _num_workers(items: Sequence[T]) -> int:
    return min(torch.get_num_threads(), len(items))


def _finish(futures: Sequence[Future[R]]) -> None:
    """Where one failed, no other may go on with memory that the caller takes back."""
    for future in futures:
        future.cancel()
    wait(futures)


@lru_cache(maxsize=2)
def _pool(num_threads: int) -> ThreadPoolExecutor:
    """Threads that stay for the next tensor: the memory that a new one works in has to be mapped page by page.

    Each keeps torch from splitting its operations further: with dozens of them for a part that fits the cache, the
    barriers would cost more than they bring, and very much more on a machine that is busy.
    """
    pool, all_started = ThreadPoolExecutor(num_threads), Barrier(num_threads)

    def start(_: int) -> None:
        # The first question in a thread gives it the setting of the process, so it has to come before its own.
        torch.get_num_threads()
        torch.set_num_threads(1)
        all_started.wait()

    try:
        list(pool.map(start, range(num_threads)))
    finally:
        # The setting of this thread was never touched; this is for threads that the caller starts later.
        torch.set_num_threads(num_threads)
    return pool


# A process that was forked has none of the threads.
os.register_at_fork(after_in_child=_pool.cache_clear)
