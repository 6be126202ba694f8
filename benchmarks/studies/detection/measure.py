"""Scan every model of the study and keep one line of figures for each; a second run goes on where the first stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import commit
from benchmarks.studies.detection.population import BASES, Base, Specimen, attacked_specimens, clean_specimens
from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.checkpoint.weight_source import SourceTensor, WeightSource
from qcbguard_plugins.detection.weights.measure import measure
from qcbguard_plugins.detection.weights.scan import DEFAULT_FORMATS
from qcbguard_plugins.detection.weights.thresholds import outlier_p
from qcbguard_plugins.detection.weights.verdict import conclude

_SEED = 20260


def run(results_path: Path) -> None:
    """Measure what is not yet in ``results_path``, a file of JSON lines."""
    torch.set_num_threads(1)
    done = {row["name"] for row in read(results_path)}
    for shape, seed in BASES:
        marker = f"{shape}-s{seed}/done"
        if marker in done:
            continue
        start = time.process_time()
        base = Base(shape, seed)
        for specimen in _specimens(base):
            if specimen.name not in done:
                _append(results_path, figures(specimen))
        _append(results_path, {"name": marker, "kind": "", "cpu_s": time.process_time() - start})


def read(results_path: Path) -> list[dict[str, Any]]:
    """The lines so far."""
    if not results_path.is_file():
        return []
    return [json.loads(line) for line in results_path.read_text(encoding="utf-8").splitlines()]


def figures(specimen: Specimen) -> dict[str, Any]:
    """Scan one model in memory."""
    tensors = [SourceTensor(name, tuple(w.shape), w.dtype) for name, w in specimen.weights.items()]
    source = WeightSource(specimen.name, Path(), "memory", tuple(tensors), 0, 0, lambda name: specimen.weights[name])
    measured = measure(source, {name: get_grid(name) for name in DEFAULT_FORMATS}, _SEED)
    report = conclude(source, measured, seed=_SEED, elapsed_s=0.0)
    return {
        "name": specimen.name,
        "commit": commit(),
        "kind": specimen.kind,
        "target": specimen.target,
        "switch": specimen.switch,
        "verdict": report.verdict,
        "p_value": report.p_value,
        "formats": list(report.likely_formats),
        "family": report.family,
        "outlier_p": outlier_p(measured.outliers),
        "outlier_share": max(e.share for e in measured.outliers),
        "tests": {f.format: _tests(f.format, report, measured) for f in report.formats},
    }


def _tests(name: str, report: Any, measured: Any) -> dict[str, Any]:
    found = next(f for f in report.formats if f.format == name)
    return {
        "p": found.p_value,
        "spectral_effect": found.spectral.effect,
        "spectral_p": found.spectral.raw_p_value,
        "residual_effect": found.residual.effect,
        "residual_p": found.residual.raw_p_value,
        "boundary": found.boundary_density,
        "margin": found.peak_margin,
        "on_grid": found.num_on_grid,
    }


def _specimens(base: Base) -> Iterator[Specimen]:
    yield from clean_specimens(base)
    yield from attacked_specimens(base)


def _append(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
