"""``qcbguard bom``: a guarded folder as a CycloneDX bill of materials."""

from __future__ import annotations

from pathlib import Path

import click

from qcbguard_plugins.cli.evidence import evidence_options
from qcbguard_plugins.cli.output import refuse_existing, write_new


@click.command("bom")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@evidence_options
@click.option("--out", type=click.Path(path_type=Path), help="File to make; standard output by default.")
def command(
    folder: Path, report_paths: tuple[Path, ...], claims_path: Path | None, base_model: str, out: Path | None
) -> int:
    """Describe DIR, a folder that 'qcbguard guard' made, as a CycloneDX 1.7 bill of materials in JSON.

    Its base is its ancestor, one property per tensor type says how many tensors are of it, and each report is an
    annotation.
    """
    from qcbguard_plugins.cli.render.evidence.bom import to_bom
    from qcbguard_plugins.cli.render.evidence.facts import collect_evidence

    refuse_existing(out)
    text = to_bom(collect_evidence(folder, report_paths, claims_path), base_model)
    if out is None:
        click.echo(text, nl=False)
    else:
        write_new(out, text)
    return 0
