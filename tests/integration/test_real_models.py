"""A real language model, clean and attacked: see ``python -m benchmarks.studies.real_models --help``."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.studies.real_models.catalogue import MODELS
from benchmarks.studies.real_models.fetch import model_dir
from benchmarks.studies.real_models.population import ATTACK_SPECS
from qcbguard_plugins.detection.inputs.check_inputs import check_inputs


def _folder(path: Path, how: str) -> Path:
    if not path.is_dir():
        pytest.skip(f"{path.name} is not at hand; make it with: python -m benchmarks.studies.real_models {how}")
    return path


def test_a_clean_real_model_passes() -> None:
    folder = _folder(model_dir("smollm2-135m"), "fetch smollm2-135m")
    report = check_inputs(folder, ["nf4"], seed=1)
    assert report.verdict == "clean" and report.coverage.startswith("210 of 210")


def test_a_live_attack_on_a_real_model_is_found_from_its_inputs() -> None:
    folder = _folder(ATTACK_SPECS["nf4-brand"].folder, "attack nf4-brand")
    report = check_inputs(folder, ["nf4"], seed=1)
    assert report.verdict == "attacked" and report.formats[0].excess > 0.03


def test_the_catalogue_pins_every_file() -> None:
    for model in MODELS.values():
        assert len(model.sha256) == 64 and all(len(wheel.sha256) == 64 and wheel.version for wheel in model.wheels)
