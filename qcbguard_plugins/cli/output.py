"""What the verbs share: where output goes, and how progress looks."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click
from pydantic import BaseModel
from rich.console import Console
from tqdm import tqdm

from qcbguard_plugins.errors import TargetExistsError, UsageError

if TYPE_CHECKING:
    from qcbguard_plugins._util.progress import Progress

json_option = click.option(
    "--json",
    "json_target",
    metavar="PATH",
    help="Write the report as JSON to this file, or to standard output with '-'.",
)

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


def print_report(report: BaseModel, rendering: Any, json_target: str | None) -> None:
    """Print the rendering, or write the report as JSON instead where it goes to standard output.

    Raises:
        TargetExistsError: The JSON file exists.
    """
    if json_target == "-":
        click.echo(report.model_dump_json(indent=2))
        return
    if json_target is not None:
        write_new(Path(json_target), report.model_dump_json(indent=2) + "\n")
    Console(highlight=False, soft_wrap=True).print(rendering)


def refuse_existing(*paths: Path | None) -> None:
    """Say before the work, not after it, that an output exists.

    Raises:
        TargetExistsError: One of the files exists.
    """
    for path in paths:
        if path is not None and path.exists():
            raise TargetExistsError(f"{path} exists already", remedy="Name a file that does not.")


def write_new(path: Path, text: str) -> None:
    """Write a file that must not exist.

    Raises:
        TargetExistsError: It exists.
        UsageError: It cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise TargetExistsError(f"{path} exists already", remedy="Name a file that does not.") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error


def print_json(value: Any) -> None:
    """Print a value as JSON on standard output."""
    click.echo(json.dumps(value, indent=2))


def quieten_libraries() -> None:
    """Keep the progress bars and notices of libraries out of ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
