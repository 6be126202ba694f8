"""``qcbguard doctor``: will guarding work on this machine?"""

from __future__ import annotations

import click
from rich.console import Console
from rich.table import Table

from qcbguard_plugins.cli.output import print_json, quieten_libraries


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")
def command(as_json: bool) -> int:
    """Check the installation: versions, hooks, and each grid against the real quantizer on this machine."""
    from qcbguard_plugins.cli.checks import run_checks

    checks = run_checks(before=quieten_libraries)
    if as_json:
        print_json({"schema_version": 1, "kind": "doctor", "checks": [check.__dict__ for check in checks]})
    else:
        table = Table("check", "", "what was found", box=None, pad_edge=False)
        for check in checks:
            table.add_row(check.name, check.status, check.detail)
        Console(highlight=False).print(table)
    return 2 if any(check.status == "FAILED" for check in checks) else 0
