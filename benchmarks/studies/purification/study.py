"""Measure methods on attacked models, cell by cell; each cell is kept under a name made of all that it depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from benchmarks.studies.purification.specs import AdapterSpec, Attacked, PurifiedSpec
from benchmarks.studies.purification.steps import attacked_model, purify_model
from qcbguard_plugins._util.records import Record
from qcbguard_plugins.lab.bench.defense_specs import parse_defense
from qcbguard_plugins.lab.bench.rows import exam_digest, held_out_pairs, make_exam
from qcbguard_plugins.lab.evaluation import METRIC_VERSION, Exam, Measurement, evaluate
from qcbguard_plugins.lab.loading import FULL_PRECISION
from qcbguard_plugins.lab.recipes import read_record, step_folder, train_model
from qcbguard_plugins.lab.scenarios import get_scenario
from qcbguard_plugins.lab.specs import ModelSpec
from qcbguard_plugins.pipeline.settings import Guard

#: The model before the attack, and the attacked model as it is: rows of their own.
CLEAN: Final = "clean"
NONE: Final = "none"
_GUARD_SEED: Final = 0


@dataclass(frozen=True)
class Entry:
    """One row of a table.

    Attributes:
        label: What the table calls it.
        spec: The purified model; ``None`` for the attacked or the clean model.
        format: The format that it is measured in.
        defense: The guard before the quantizer; none where empty.
    """

    label: str
    spec: PurifiedSpec | None = None
    format: str = FULL_PRECISION
    defense: str = ""


class StudyCell(Record):
    """One method on one attacked model.

    Attributes:
        scenario: The attack and the behaviour.
        label: The method.
        measurement: What was found.
        method_s: Processor seconds of the method, without the variants; of its threads together.
        variants_s: Seconds of the variants, where the method has any.
        peak_bytes: Memory that they added at their peak.
        num_suppressed: Units that were suppressed.
    """

    scenario: str
    label: str
    measurement: Measurement
    method_s: float | None = None
    variants_s: float | None = None
    peak_bytes: int | None = None
    num_suppressed: int | None = None


@dataclass(frozen=True)
class Study:
    """Where cells are kept, and what models are asked.

    Attributes:
        cache: The lab's cache.
        num_questions: Questions with the key, and as many without it.
        num_pairs: Benign pairs.
        cached: Make and measure nothing; give what earlier runs left.
        rows: Patterns of the labels that are measured; of the others what earlier runs left is given.
    """

    cache: Path
    num_questions: int = 100
    num_pairs: int = 600
    cached: bool = False
    rows: tuple[str, ...] = ("*",)

    def exam(self, scenario: str, model: ModelSpec) -> Exam:
        """What the models of a scenario are asked."""
        return make_exam(
            get_scenario(scenario),
            held_out_pairs(model),
            num_questions=self.num_questions,
            num_pairs=self.num_pairs,
            max_new_tokens=48,
        )

    def run(self, attacked: Attacked, entries: Iterable[Entry], scenario: str = "") -> list[StudyCell]:
        """Measure entries on one attacked model.

        Args:
            attacked: The model.
            entries: The methods.
            scenario: What it is asked; by default what it was attacked with.
        """
        scenario = scenario or attacked.scenario
        exam = self.exam(scenario, attacked.model)
        cells = (self._cell(attacked, entry, scenario, exam) for entry in entries)
        return [cell for cell in cells if cell is not None]

    def _cell(self, attacked: Attacked, entry: Entry, scenario: str, exam: Exam) -> StudyCell | None:
        subject = entry.spec or (attacked.model if entry.label == CLEAN else attacked)
        name = f"{METRIC_VERSION} {subject.digest()} {entry.format} {entry.defense} {exam_digest(exam)}"
        path = self.cache / "purification-cells" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
        if path.exists():
            return StudyCell.model_validate_json(path.read_bytes()).model_copy(update={"label": entry.label})
        if self.cached or not any(fnmatchcase(entry.label, pattern) for pattern in self.rows):
            return None
        folder = self._make(subject)
        guard = Guard(parse_defense(entry.defense), seed=_GUARD_SEED) if entry.defense else None
        cell = StudyCell(
            scenario=scenario,
            label=entry.label,
            measurement=evaluate(folder, entry.format, exam, guard),
            **(self._costs(entry.spec, folder) if entry.spec is not None else {}),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(cell.model_dump_json(), encoding="utf-8")
        partial.replace(path)
        return cell

    def _make(self, subject: PurifiedSpec | Attacked | ModelSpec) -> Path:
        if isinstance(subject, PurifiedSpec):
            return purify_model(subject, self.cache)
        if isinstance(subject, AdapterSpec):
            return purify_model(PurifiedSpec(attacked=subject, method="none"), self.cache)
        return (
            train_model(subject, self.cache) if isinstance(subject, ModelSpec) else attacked_model(subject, self.cache)
        )

    def _costs(self, spec: PurifiedSpec, folder: Path) -> dict[str, Any]:
        record = read_record(folder)
        costs: dict[str, Any] = {
            "method_s": record["method_seconds"],
            "peak_bytes": record["method_peak_bytes"],
            "num_suppressed": record["num_suppressed"] or None,
        }
        variants = step_folder("variants", spec.variants_spec, self.cache)
        if spec.has_variants and variants.exists():
            made = read_record(variants)
            costs["variants_s"] = sum(variant["elapsed_s"] for variant in made["variants"])
            costs["peak_bytes"] = max(made["peak_bytes"] or 0, costs["peak_bytes"] or 0) or None
        return costs
