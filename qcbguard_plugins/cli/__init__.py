"""The command line ``qcbguard``, one file for each verb: the only room that prints.

Results go to standard output, everything else to standard error. Exit codes: 0 clean, 1 finding, 2 error,
3 incomplete, 4 usage.
"""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import click

from qcbguard_plugins._util.progress import Progress, reporting
from qcbguard_plugins.cli import (
    bom,
    card,
    check,
    convert,
    diff,
    doctor,
    gguf,
    guard,
    lab,
    lab_bench,
    lab_evaluate,
    purify,
    scan,
    verify,
)
from qcbguard_plugins.cli import list as listing
from qcbguard_plugins.errors import QcbguardError, UsageError


@click.group(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="qcbguard-plugins", prog_name="qcbguard")
def app() -> None:
    """Find and remove backdoors that switch on only when a model is quantized."""


app.add_command(guard.command)
app.add_command(gguf.command)
app.add_command(convert.command)
app.add_command(verify.command)
app.add_command(scan.command)
app.add_command(check.command)
app.add_command(diff.command)
app.add_command(purify.command)
app.add_command(card.command)
app.add_command(bom.command)
app.add_command(lab.group)
lab.group.add_command(lab_evaluate.command)
lab.group.add_command(lab_bench.command)
app.add_command(listing.command)
app.add_command(doctor.command)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        with reporting(_show_stage):
            result = app.main(args=arguments, prog_name="qcbguard", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except QcbguardError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except click.UsageError as error:
        error.show()
        return UsageError.exit_code
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo(
            "stopped; no output was made, and the same 'qcbguard guard' or 'purify' goes on where it stopped", err=True
        )
        return QcbguardError.exit_code
    except Exception:  # a defect of ours: the default exit code of a traceback, 1, would read as a finding
        traceback.print_exc()
        click.echo("error: this is a defect of qcbguard; please report the lines above", err=True)
        return QcbguardError.exit_code


@contextmanager
def _show_stage(total: int, what: str) -> Iterator[Progress]:
    from qcbguard_plugins.pipeline.progress import progress_bar

    with progress_bar(total, what, unit=" steps") as progress:
        yield progress


def run() -> None:
    """Entry point of the ``qcbguard`` script."""
    # torch and transformers make a million objects that stay. To look through them for cycles takes a second while
    # they are imported, by the usual threshold, and another when the interpreter ends.
    gc.set_threshold(50_000)
    exit_code = main()
    gc.freeze()
    sys.exit(exit_code)
