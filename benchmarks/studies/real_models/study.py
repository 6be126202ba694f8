"""Test clean and attacked real models with the weight tests and the input test, a line of figures for each run."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import commit
from benchmarks.studies.real_models.attack import ATTACKS
from benchmarks.studies.real_models.catalogue import MODELS
from benchmarks.studies.real_models.fetch import model_dir
from benchmarks.studies.real_models.population import ATTACK_SPECS, Subject, clean_subjects
from qcbguard_plugins.detection.inputs.check_inputs import check_inputs
from qcbguard_plugins.detection.weights.scan import scan_model


@dataclass(frozen=True)
class Run:
    """One model with one seed."""

    subject: Subject
    seed: int

    @property
    def name(self) -> str:
        return f"{self.subject.name}/s{self.seed}"


def run_study(results_path: Path, *, only: str = "") -> None:
    """Measure every model that is at hand and not yet in ``results_path``, a file of JSON lines.

    Args:
        results_path: The file.
        only: Measure only models whose name contains this.
    """
    torch.set_num_threads(1)
    done = {row["name"] for row in read(results_path)}
    for run in _runs():
        if run.name in done or only not in run.name:
            continue
        with tempfile.TemporaryDirectory(dir=ATTACKS) as scratch:
            row = _figures(run, run.subject.folder(Path(scratch)))
        with results_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read(results_path: Path) -> list[dict[str, Any]]:
    """The lines so far."""
    if not results_path.is_file():
        return []
    return [json.loads(line) for line in results_path.read_text(encoding="utf-8").splitlines()]


def attacked_subjects() -> Iterator[Subject]:
    """The attacks that were made on this machine."""
    for spec in ATTACK_SPECS.values():
        facts_path = spec.folder / "attack.json"
        if facts_path.is_file():
            facts = json.loads(facts_path.read_text())
            yield Subject(spec.name, "attacked", (spec.format,), spec.folder, facts=facts)


def _runs() -> Iterator[Run]:
    subjects = [*attacked_subjects(), *clean_subjects([name for name in MODELS if model_dir(name).is_dir()])]
    for subject in subjects:
        for seed in range(subject.num_seeds):
            yield Run(subject, seed)


def _figures(run: Run, folder: Path) -> dict[str, Any]:
    formats = run.subject.formats
    start = time.process_time()
    inputs = check_inputs(folder, formats, seed=run.seed)
    middle = time.process_time()
    row: dict[str, Any] = {
        "name": run.name,
        "model": run.subject.name,
        "kind": run.subject.kind,
        "commit": commit(),
        "facts": run.subject.facts,
        "inputs_cpu_s": round(middle - start, 1),
        "inputs": {found.format: json.loads(found.model_dump_json()) for found in inputs.formats},
        "inputs_verdict": inputs.verdict,
    }
    if run.subject.kind == "attacked":
        scan = scan_model(folder, formats, seed=run.seed, max_weights=1 << 19)
        row["scan_cpu_s"] = round(time.process_time() - middle, 1)
        row["scan"] = {
            found.format: {
                "attacked": found.attacked,
                "p_value": found.p_value,
                "spectral": found.spectral.effect,
                "residual": found.residual.effect,
            }
            for found in scan.formats
        }
    return row
