"""A model that is read block by block, and one that several processes calibrate, are guarded to the same bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from qcbguard_plugins import Calibration, Feedback, Guard, guard_checkpoint
from qcbguard_plugins.errors import MemoryBudgetError
from qcbguard_plugins.pipeline.budget import MemoryPlan
from qcbguard_plugins.pipeline.guard import guard_planned
from qcbguard_plugins.pipeline.plan import make_plan
from tests.helpers.killed_runs import contents

GUARD = Guard(Feedback(), seed=3, calibration=Calibration(num_sequences=4, sequence_length=32))


@pytest.mark.parametrize(
    ("shape", "formats"),
    [
        ("llama-fp32", "nf4"),
        ("llama-bf16", "int8"),
        ("llama-sharded", "gptq-w4g32"),
        ("llama-tied", "onnx:int8"),
        ("gpt2", "nf4"),
    ],
)
def test_a_model_read_block_by_block(
    shape: str, formats: str, model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard_checkpoint(model_folder(shape), tmp_path / "whole", [formats], GUARD)
    monkeypatch.setattr("qcbguard_plugins.pipeline.guard.plan_memory", lambda *_: MemoryPlan(0, streamed=True))
    monkeypatch.setattr("qcbguard_plugins.models.loading.load_full_precision", None)
    guard_checkpoint(model_folder(shape), tmp_path / "streamed", [formats], GUARD)
    assert contents(tmp_path / "streamed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("method", ["feedback", "stochastic", "quantguard"])
def test_a_budget_that_cannot_be_kept_is_refused_before_the_run(method: str, llama: Path, tmp_path: Path) -> None:
    from qcbguard_plugins.defenses import get_defense

    guard = dataclasses.replace(GUARD, method=get_defense(method))
    with pytest.raises(MemoryBudgetError, match=r"needs about .* and --max-memory is 10.0 MiB(.|\n)*Raise"):
        guard_planned(make_plan(llama, "nf4"), tmp_path / "out", guard, budget_bytes=10 << 20)
    assert not list(tmp_path.glob("*out*"))
