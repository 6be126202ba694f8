"""Measure methods on attacked models, cell by cell; each cell is kept under a name made of all that it depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from qcbguard_plugins.guard import Guard
from qcbguard_plugins.lab.bench.defense_specs import parse_defense
from qcbguard_plugins.lab.bench.subjects import exam_digest, held_out_pairs, make_exam
from qcbguard_plugins.lab.evaluation import METRIC_VERSION, Exam, Measurement, evaluate
from qcbguard_plugins.lab.purification.specs import AdapterSpec, Attacked, PurifiedSpec
from qcbguard_plugins.lab.purification.steps import attacked_model, purify_model
from qcbguard_plugins.lab.quantized import FULL_PRECISION
from qcbguard_plugins.lab.scenarios import get_scenario
from qcbguard_plugins.lab.specs import ModelSpec
from qcbguard_plugins.lab.steps import read_record, step_folder, train_model
from qcbguard_plugins.report.model import Record

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
        method_s: Seconds of the method, without the variants.
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


def table(cells: Sequence[StudyCell], scenarios: Sequence[str], labels: Sequence[str]) -> str:
    """A Markdown table: attack success by scenario, and means of it and of the utility; bare where not measured."""
    found = {(cell.scenario, cell.label): cell.measurement for cell in cells}
    measured = [name for name in scenarios if any((name, label) in found for label in labels)]
    head = ["method", *measured, "mean ASR", "without key", "perplexity", "right answers"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for label in labels:
        row = [found.get((name, label)) for name in measured]
        known = [measurement for measurement in row if measurement is not None]
        if not known:
            continue
        quiet = [m.quiet_asr.value for m in known if m.quiet_asr is not None]
        right = [m.task_accuracy.value for m in known if m.task_accuracy is not None]
        partly = "" if len(known) == len(row) else f" ({len(known)} of {len(row)})"
        lines.append(
            f"| {label} | "
            + " | ".join("" if m is None else _percent(m.asr.value) for m in row)
            + f" | {_percent(_mean([m.asr.value for m in known]))}{partly} | {_percent(_mean(quiet)) if quiet else ''}"
            + f" | {_mean([m.perplexity.value for m in known]):.3f} | {_percent(_mean(right)) if right else ''} |"
        )
    return "\n".join(lines) + "\n"


def costs(cells: Sequence[StudyCell], labels: Sequence[str]) -> str:
    """A Markdown table of what each method takes, means over the attacked models."""
    lines = ["| method | variants, s | suppression and training, s | memory, MB |", "|---|---|---|---|"]
    for label in labels:
        own = [cell for cell in cells if cell.label == label and cell.method_s is not None]
        if not own:
            continue
        variants = [cell.variants_s for cell in own if cell.variants_s is not None]
        method = _mean([cell.method_s for cell in own if cell.method_s is not None])
        peaks = [cell.peak_bytes / 1e6 for cell in own if cell.peak_bytes is not None]
        shown = (f"{_mean(variants):.0f}" if variants else "", f"{method:.0f}", f"{_mean(peaks):.0f}" if peaks else "")
        lines.append(f"| {label} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"
