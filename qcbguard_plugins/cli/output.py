"""What the verbs share: where output goes, and how progress looks."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import BaseModel
from rich.console import Console

from qcbguard_plugins.errors import TargetExistsError, UsageError

if TYPE_CHECKING:
    pass

json_option = click.option(
    "--json",
    "json_target",
    metavar="PATH",
    help="Write the report as JSON to this file, or to standard output with '-'.",
)


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
    with contextlib.suppress(ImportError):  # an install without models is quiet
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
