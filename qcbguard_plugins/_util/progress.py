"""How rooms below the command line tell how far they are, without knowing who shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

Progress = Callable[[int], Any]
"""Called with how much more is done."""

Reporter = Callable[[int, str], AbstractContextManager[Progress]]
"""Shows a stage: how much there is to do, and what it is."""

_reporter: ContextVar[Reporter | None] = ContextVar("reporter", default=None)


@contextmanager
def stage(total: int, what: str) -> Iterator[Progress]:
    """A stage of work that takes long; it is shown where somebody asked for that with :func:`reporting`."""
    reporter = _reporter.get()
    if reporter is None:
        yield lambda _: None
        return
    with reporter(total, what) as progress:
        yield progress


@contextmanager
def reporting(reporter: Reporter) -> Iterator[None]:
    """Have stages shown while the block runs."""
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)
