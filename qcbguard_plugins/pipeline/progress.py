"""Progress bars: on a terminal a bar with an estimate of the time left, elsewhere a line every 30 seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

from qcbguard_plugins._util.progress import Progress

_SECONDS_BETWEEN_LINES = 30.0


class _Lines:
    """A stream for a progress bar where there is no terminal: whole lines instead of a line that redraws itself."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text:
            self._stream.write(text + "\n")

    def flush(self) -> None:
        self._stream.flush()


@contextmanager
def progress_bar(total: int, what: str, *, unit: str = " weights", shown: bool = True) -> Iterator[Progress]:
    """A bar with an estimate of the time left on a terminal, a line every 30 seconds elsewhere; on standard error."""
    terminal = sys.stderr.isatty()
    with tqdm(
        total=total,
        desc=what,
        unit=unit,
        unit_scale=True,
        file=sys.stderr if terminal else _Lines(sys.stderr),
        mininterval=0.1 if terminal else _SECONDS_BETWEEN_LINES,
        leave=not terminal,
        disable=not shown,
    ) as bar:
        yield bar.update
