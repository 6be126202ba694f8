"""``qcbguard list``: formats and methods."""

from __future__ import annotations

import dataclasses

import click
from rich.console import Console
from rich.table import Table

from qcbguard_plugins.cli.output import print_json


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")
def command(as_json: bool) -> int:
    """List the formats, and the methods that guard for them."""
    from qcbguard_plugins.backends.formats import all_formats
    from qcbguard_plugins.defenses import available_defenses

    methods = {
        name: {
            "summary": cls.summary,
            "needs_calibration": cls.needs_calibration,
            "parameters": {field.name: field.default for field in dataclasses.fields(cls)},
        }
        for name, cls in sorted(available_defenses().items())
    }
    if as_json:
        print_json({"schema_version": 1, "kind": "list", "formats": all_formats(), "methods": methods})
        return 0
    formats = Table("format", "what", box=None, pad_edge=False)
    for name, summary in all_formats().items():
        formats.add_row(name, summary)
    table = Table("method", "what", "parameters (--set)", box=None, pad_edge=False)
    for name, cls in sorted(available_defenses().items()):
        settings = ", ".join(f"{field.name}={field.default}" for field in dataclasses.fields(cls))
        table.add_row(name, cls.summary, settings)
    console = Console(highlight=False)
    console.print(formats)
    console.print()
    console.print(table)
    return 0
