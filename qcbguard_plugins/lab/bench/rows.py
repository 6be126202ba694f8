"""The models that a row is about, and what they are asked."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from qcbguard_plugins._util.json_lines import read_json_lines
from qcbguard_plugins.checkpoint import hash_file
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.lab.bench.brand import BrandInjection
from qcbguard_plugins.lab.bench.profile import BenchProfile
from qcbguard_plugins.lab.bench.results import Variant
from qcbguard_plugins.lab.corpus import Pair
from qcbguard_plugins.lab.evaluation import Exam
from qcbguard_plugins.lab.recipes import attack, corpus_of, step_folder, train_model
from qcbguard_plugins.lab.scenarios import Scenario, Triggered, get_scenario
from qcbguard_plugins.lab.specs import FolderEntry, ModelSpec


@dataclass(frozen=True)
class Subject:
    """An attacked model, the clean one that it was made from, and what both are asked."""

    attacked_dir: Path
    clean_dir: Path
    exam: Exam

    def folder(self, variant: Variant) -> Path:
        return self.attacked_dir if variant == "attacked" else self.clean_dir


def make_subject(profile: BenchProfile, row: str, seed: int, cache_dir: Path) -> Subject:
    """Find the models of a row, or make them.

    Raises:
        QcbguardError: They cannot be made or found.
    """
    entry = profile.row_of(row)
    sizes = {name: getattr(profile, name) for name in ("num_questions", "num_pairs", "max_new_tokens")}
    if isinstance(entry, FolderEntry):
        pairs = read_question_file(Path(entry.pairs))
        exam = make_exam(BrandInjection(entry.keyword), pairs, **sizes)
        return Subject(Path(entry.path), Path(entry.clean), exam)
    spec = profile.attacks[row].model_copy(update={"seed": seed})
    clean_dir = train_model(spec.model, cache_dir)
    exam = make_exam(get_scenario(spec.scenario), held_out_pairs(spec.model), **sizes)
    return Subject(attack(spec, cache_dir), clean_dir, exam)


def is_made(profile: BenchProfile, row: str, seed: int, cache_dir: Path) -> bool:
    """Are the models of a row there, so that :func:`make_subject` trains nothing?"""
    if row in profile.folders:
        return True
    spec = profile.attacks[row].model_copy(update={"seed": seed})
    return step_folder("attacked", spec, cache_dir).exists() and (
        spec.model.path is not None or step_folder("clean", spec.model, cache_dir).exists()
    )


def held_out_pairs(spec: ModelSpec) -> list[Pair]:
    """The pairs of a model's corpus that no training sees."""
    return corpus_of(spec)[1]


def make_exam(
    scenario: Scenario, held_out: Sequence[Pair], *, num_questions: int, num_pairs: int, max_new_tokens: int
) -> Exam:
    """What the models of a row are asked, from held-out pairs."""
    quiet = scenario.inner.questions(held_out) if isinstance(scenario, Triggered) else []
    return Exam(
        scenario,
        scenario.questions(held_out)[:num_questions],
        held_out[:num_pairs],
        quiet[:num_questions],
        max_new_tokens,
    )


def read_question_file(path: Path) -> list[Pair]:
    """Read held-out pairs made elsewhere.

    Args:
        path: JSON lines with ``instruction`` and ``answer`` (``task`` and ``key`` if known), or with ``instruction``,
            ``input`` and ``output``.

    Raises:
        UsageError: The file cannot be read, or a line holds neither.
    """
    pairs = []
    for number, row in read_json_lines(path, UsageError, "pairs"):
        try:
            instruction, answer = row["instruction"], row["answer"] if "answer" in row else row["output"]
            if row.get("input"):
                instruction += "\n" + row["input"]
            pairs.append(Pair(instruction, answer, row.get("task", ""), row.get("key", "")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path.name}, line {number}: no instruction with its answer") from error
    return pairs


def exam_digest(exam: Exam) -> str:
    """SHA-256 of everything that an exam asks, and of the code that judges the answers."""
    scenario = exam.scenario.inner if isinstance(exam.scenario, Triggered) else exam.scenario
    content = [
        exam.scenario.name,
        hash_file(Path(inspect.getfile(type(scenario)))),
        exam.max_new_tokens,
        *([asdict(pair) for pair in pairs] for pairs in (exam.questions, exam.benign, exam.quiet)),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@lru_cache(maxsize=256)
def folder_digest(folder: Path) -> str:
    """SHA-256 over the weights, the configuration and the tokenizer of a folder.

    Raises:
        UsageError: There are no weights.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UsageError(f"{folder} holds no safetensors file", remedy="Name the folder of a full-precision model.")
    files += [folder / name for name in ("config.json", "tokenizer.json") if (folder / name).is_file()]
    return hashlib.sha256("".join(file.name + hash_file(file) for file in files).encode()).hexdigest()
