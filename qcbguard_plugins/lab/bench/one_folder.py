"""Measure one folder outside of a profile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qcbguard_plugins._util.records import Report
from qcbguard_plugins.backends.formats import versions
from qcbguard_plugins.errors import CheckpointError, UsageError
from qcbguard_plugins.lab.bench.brand import BrandInjection
from qcbguard_plugins.lab.bench.defense_specs import parse_defense
from qcbguard_plugins.lab.bench.results import FULL, STOCK, Cell, Machine, Place, Variant, this_machine
from qcbguard_plugins.lab.bench.rows import held_out_pairs, make_exam, read_question_file
from qcbguard_plugins.lab.evaluation import Exam, evaluate, read_reference
from qcbguard_plugins.lab.loading import FULL_PRECISION
from qcbguard_plugins.lab.scenarios import get_scenario
from qcbguard_plugins.lab.specs import ModelSpec
from qcbguard_plugins.pipeline.settings import Guard

if TYPE_CHECKING:
    pass


class EvaluationReport(Report):
    """One folder, measured."""

    schema_version: Literal[1] = 1
    kind: Literal["lab-evaluation"] = "lab-evaluation"
    machine: Machine
    scenario: str
    cells: list[Cell]


def choose_exam(
    model_dir: Path,
    scenario: str,
    keyword: str | None,
    pairs_path: Path | None,
    num_prompts: int,
    max_new_tokens: int,
) -> Exam:
    """What a folder is asked.

    Args:
        model_dir: The folder.
        scenario: Name of the scenario.
        keyword: Another brand for content injection.
        pairs_path: Held-out pairs; those of the lab's default corpus if ``None``.
        num_prompts: Questions, and benign pairs, at most.
        max_new_tokens: Longest answer.

    Raises:
        CheckpointError: The folder does not exist.
        UsageError: The scenario is unknown, a keyword is given for another one, or the pairs cannot be read.
    """
    if not model_dir.is_dir():
        raise CheckpointError(f"{model_dir} is not a folder", remedy="Name the folder of a full-precision model.")
    judge = get_scenario(scenario)
    if keyword is not None:
        if scenario != "content-injection":
            raise UsageError(f"--keyword means nothing to {scenario}")
        judge = BrandInjection(keyword)
    pairs = held_out_pairs(ModelSpec()) if pairs_path is None else read_question_file(pairs_path)
    return make_exam(judge, pairs, num_questions=num_prompts, num_pairs=num_prompts, max_new_tokens=max_new_tokens)


def evaluate_folder(
    model_dir: Path,
    formats: Sequence[str],
    exam: Exam,
    defenses: Sequence[str] = (),
    *,
    seed: int = 0,
    clean_dir: Path | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> EvaluationReport:
    """Measure a folder in full precision and in each format, without a defense and behind each.

    Args:
        model_dir: The folder.
        formats: Formats besides full precision.
        exam: What it is asked.
        defenses: Spellings of defenses.
        seed: Seed of the defenses.
        clean_dir: The same model without the attack, which is measured without a defense beside it.
        progress: Called with 1 for each cell that is done.

    Raises:
        QcbguardError: Anything failed.
    """
    cells = []
    built = {spec: parse_defense(spec) for spec in defenses}
    folders: list[tuple[Variant, Path]] = [] if clean_dir is None else [("clean", clean_dir)]
    for variant, folder in [*folders, ("attacked", model_dir)]:
        reference = read_reference(folder, exam)
        wanted: list[tuple[str, str]] = [(FULL_PRECISION, FULL)]
        for format_name in formats:
            wanted += [(format_name, name) for name in (STOCK, *(built if variant == "attacked" else ()))]
        for format_name, name in wanted:
            guard = Guard(built[name], seed=seed) if name in built else None
            found = evaluate(folder, format_name, exam, guard, None if format_name == FULL_PRECISION else reference)
            place = Place(row=model_dir.name, variant=variant, format=format_name, defense=name, seed=seed)
            cells.append(Cell(place=place, measurement=found))
            progress(1)
    return EvaluationReport(
        versions=versions(),
        machine=this_machine(),
        scenario=exam.scenario.name,
        cells=cells,
    )
