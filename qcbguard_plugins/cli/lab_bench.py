"""``qcbguard lab bench``: a table of attacks, formats, defenses and seeds."""

from __future__ import annotations

from pathlib import Path

import click

from qcbguard_plugins.cli.lab import cache_dir, cache_option
from qcbguard_plugins.cli.output import quieten_libraries
from qcbguard_plugins.errors import QcbguardError, VerificationError
from qcbguard_plugins.pipeline.progress import progress_bar


@click.command("bench")
@click.argument("profile_name", metavar="PROFILE")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder for results.json, results.md, plots."
)
@cache_option
@click.option("--only", default="*", show_default=True, help="Pattern of the attacks to run, as in 'nf4-*'.")
@click.option("--cached", is_flag=True, help="Measure nothing; write what earlier runs have measured.")
def command(profile_name: str, out: Path, cache: Path | None, only: str, cached: bool) -> int:
    """Run PROFILE, a YAML file or the name of one that ships with the package.

    A run that was stopped goes on where it was; what is in the cache is not measured again. Exits 1 where an
    expectation of the profile does not hold, 2 where a cell failed.
    """
    from rich.console import Console

    from qcbguard_plugins.cli.render.lab_text import summary_table
    from qcbguard_plugins.lab.bench.output import require_own_folder, write_results
    from qcbguard_plugins.lab.bench.profile import read_profile
    from qcbguard_plugins.lab.bench.runner import num_cells, run_bench

    profile = read_profile(profile_name)
    require_own_folder(out, profile)
    quieten_libraries()
    with progress_bar(num_cells(profile, only), profile.name, unit=" cells") as update:
        report = run_bench(profile, cache_dir(cache), only=only, cached=cached, progress=lambda _: update(1))
    write_results(report, profile, out)
    console = Console(highlight=False, soft_wrap=True)
    console.print(summary_table(report, profile))
    for notice in report.notices:
        console.print(notice, markup=False)
    for check in report.checks:
        if not check.held:
            line = f"{check.row}, {check.format}, {check.defense}: {check.what}; found {check.found}"
            console.print("[red]MISSED[/red]", line)
    for cell in report.cells:
        if cell.measurement is None:
            console.print("[red]FAILED[/red]", f"{cell.place.title}: {cell.error}")
    num_held = len(report.checks) - report.num_missed
    console.print(f"{num_held} of {len(report.checks)} expectations hold; written to {out}", markup=False)
    if report.num_failed:
        return QcbguardError.exit_code
    return VerificationError.exit_code if report.num_missed else 0
