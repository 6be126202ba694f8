"""The converter for llm-compressor equals guarding the folder first, bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qcbguard_plugins import Guard, Stochastic, guard_checkpoint
from qcbguard_plugins.errors import UnguardableError, UsageError
from tests.conftest import ROOT

llmcompressor = pytest.importorskip("llmcompressor", reason="it pins transformers; .ci/test-recipes runs these tests")
sys.path.insert(0, str(ROOT / "integrations" / "llm_compressor"))

MODEL = ROOT / "examples" / "models" / "attacked"
FORMAT = "compressed-tensors:int4-g128"
GUARD = Guard(Stochastic(), seed=7)


def quantize(source: Path, target: Path, converter: Any = None) -> dict[str, torch.Tensor]:
    llmcompressor.model_free_ptq(
        str(source), str(target), scheme="W4A16", ignore=["lm_head", "model.embed_tokens"], converter=converter
    )
    return load_file(target / "model.safetensors")


def test_converting_equals_guarding_the_folder(tmp_path: Path) -> None:
    from guard_converter import GuardConverter

    guard_checkpoint(MODEL, tmp_path / "guarded", [FORMAT], GUARD)
    by_folder = quantize(tmp_path / "guarded", tmp_path / "by-folder")
    by_converter = quantize(MODEL, tmp_path / "by-converter", GuardConverter(MODEL, FORMAT, GUARD))
    stock = quantize(MODEL, tmp_path / "stock")
    assert by_folder.keys() == by_converter.keys()
    assert all(torch.equal(by_folder[key], by_converter[key]) for key in by_folder)
    assert any(not torch.equal(stock[key], by_converter[key]) for key in stock if key.endswith("_packed"))


def test_a_method_that_needs_a_model_is_refused() -> None:
    from guard_converter import GuardConverter

    with pytest.raises(UsageError, match="needs a model"):
        GuardConverter(MODEL, FORMAT, "feedback")


def test_a_weight_that_never_came_is_an_error() -> None:
    from guard_converter import GuardConverter

    with pytest.raises(UnguardableError, match="28 tensors were not among the files"):
        GuardConverter(MODEL, FORMAT, GUARD).update_config(None)
