"""``qcbguard card``: what was guarded, verified and measured, in the model card of a guarded folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qcbguard_plugins.cli.evidence import evidence_options, replace_file
from qcbguard_plugins.cli.output import refuse_existing
from qcbguard_plugins.errors import CheckpointError

if TYPE_CHECKING:
    from qcbguard_plugins.cli.render.evidence.facts import Evidence

_CARD = "README.md"


@click.command("card")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@evidence_options
@click.option("--out", type=click.Path(path_type=Path), help="File to make; README.md of DIR is added to by default.")
def command(
    folder: Path, report_paths: tuple[Path, ...], claims_path: Path | None, base_model: str, out: Path | None
) -> int:
    """Add front matter and a section to the README.md of DIR, a folder that 'qcbguard guard' made.

    Every byte that is there stays; only the section of an earlier run is replaced. The card is a file of the folder, so
    the claims about it in --claims get the digest that the folder has with it. Sign afterwards.
    """
    from qcbguard_plugins.cli.render.evidence.card import to_card
    from qcbguard_plugins.cli.render.evidence.facts import collect_evidence

    refuse_existing(out)
    evidence = collect_evidence(folder, report_paths, claims_path)
    path = folder / _CARD
    try:
        original = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    card = to_card(evidence, original, base_model)
    if out is not None:
        replace_file(out, card)
        click.echo(f"{out}: {path} with the evidence in it; {folder} is as it was")
        return 0
    replace_file(path, card)
    moved = 0 if claims_path is None else _move_claims(evidence, claims_path)
    follow = f"; {moved} claims are about the folder with it" if claims_path is not None else ""
    click.echo(f"{path}: {len(evidence.reports)} reports in it{follow}")
    return 0


def _move_claims(evidence: Evidence, claims_path: Path) -> int:
    """Give the claims about a folder the digest that it has with its card, which is all that changed."""
    from qcbguard_plugins.checkpoint.subject import subject_of
    from qcbguard_plugins.cli.render.evidence.intoto import moved, to_line

    before, after = evidence.subject, subject_of(evidence.folder)
    others = sorted(n for n in before.files.keys() | after.files if before.files.get(n) != after.files.get(n))
    if others not in ([], [_CARD]):
        raise CheckpointError(
            f"{evidence.folder} changed while its card was written", details=others, remedy="Make the claims again."
        )
    lines = [moved(statement, before.sha256, after.sha256) for statement in evidence.statements]
    replace_file(claims_path, "".join(map(to_line, lines)).encode())
    return sum(line["subject"][0]["digest"]["sha256"] == after.sha256 for line in lines)
