"""``qcbguard lab evaluate``: one folder, measured."""

from __future__ import annotations

from pathlib import Path

import click

from qcbguard_plugins.cli.output import json_option, print_report, quieten_libraries
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.pipeline.progress import progress_bar


@click.command("evaluate")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--as", "formats", multiple=True, required=True, help="fp, nf4, fp4, int8, gguf:Q4_K_M, ... (repeatable)")
@click.option("--scenario", default="content-injection", show_default=True, help="What counts as a success.")
@click.option("--keyword", help="For content injection with another brand than the lab's.")
@click.option("--pairs", "pairs_path", type=click.Path(path_type=Path), help="JSON lines of held-out pairs.")
@click.option("--clean", "clean_dir", type=click.Path(path_type=Path), help="The same model without the attack.")
@click.option("--defense", "specs", multiple=True, help="As in feedback or 'flipguard(share=0.1)' (repeatable).")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the defense.")
@click.option("--prompts", "num_prompts", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=80, show_default=True)
@json_option
def command(
    model: Path,
    formats: tuple[str, ...],
    scenario: str,
    keyword: str | None,
    pairs_path: Path | None,
    clean_dir: Path | None,
    specs: tuple[str, ...],
    seed: int,
    num_prompts: int,
    max_new_tokens: int,
    json_target: str | None,
) -> int:
    """Measure MODEL, the folder of a full-precision model: attack success, unparsed answers, utility.

    Each format is measured without a defense and behind each --defense; full precision always stands beside them.
    """
    from qcbguard_plugins.cli.render.lab_text import evaluation_table
    from qcbguard_plugins.lab.bench.one_folder import choose_exam, evaluate_folder
    from qcbguard_plugins.lab.loading import FULL_PRECISION

    quieten_libraries()
    exam = choose_exam(model, scenario, keyword, pairs_path, num_prompts, max_new_tokens)
    wanted = [name for name in dict.fromkeys(formats) if name != FULL_PRECISION]
    if specs and not wanted:
        raise UsageError("--defense needs a format to guard for", remedy="Name one with --as, such as --as nf4.")
    num_steps = (1 + len(wanted)) * (1 if clean_dir is None else 2) + len(wanted) * len(specs)
    with progress_bar(num_steps, f"measuring {model.name}", unit=" steps") as progress:
        report = evaluate_folder(model, wanted, exam, specs, seed=seed, clean_dir=clean_dir, progress=progress)
    print_report(report, evaluation_table(report), json_target)
    return 0
