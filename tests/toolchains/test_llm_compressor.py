"""The converter for llm-compressor equals guarding the folder first, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qcbguard_plugins import Guard, Stochastic, guard_checkpoint
from qcbguard_plugins.checkpoint.manifest import read_manifest
from qcbguard_plugins.errors import UnguardableError, UsageError
from tests.conftest import ROOT

llmcompressor = pytest.importorskip("llmcompressor", reason="it pins transformers; .ci/test-recipes runs these tests")

MODEL = ROOT / "examples" / "models" / "attacked"
FORMAT = "compressed-tensors:int4-g128"
GUARD = Guard(Stochastic(), seed=7)


def quantize(source: Path, target: Path, converter: Any = None) -> dict[str, torch.Tensor]:
    llmcompressor.model_free_ptq(
        str(source), str(target), scheme="W4A16", ignore=["lm_head", "model.embed_tokens"], converter=converter
    )
    return load_file(target / "model.safetensors")


def test_converting_equals_guarding_the_folder(tmp_path: Path) -> None:
    from qcbguard_plugins.hooks.llm_compressor import GuardConverter

    guard_checkpoint(MODEL, tmp_path / "guarded", [FORMAT], GUARD)
    by_folder = quantize(tmp_path / "guarded", tmp_path / "by-folder")
    converter = GuardConverter(MODEL, FORMAT, GUARD, out_dir=tmp_path / "by-converter")
    by_converter = quantize(MODEL, tmp_path / "by-converter", converter)
    stock = quantize(MODEL, tmp_path / "stock")
    assert by_folder.keys() == by_converter.keys()
    assert all(torch.equal(by_folder[key], by_converter[key]) for key in by_folder)
    plan = read_manifest(tmp_path / "guarded")
    assert read_manifest(tmp_path / "by-converter").tensors == plan.tensors
    assert any(not torch.equal(stock[key], by_converter[key]) for key in stock if key.endswith("_packed"))


def test_a_method_that_needs_a_model_is_refused() -> None:
    from qcbguard_plugins.hooks.llm_compressor import GuardConverter

    with pytest.raises(UsageError, match="needs a model"):
        GuardConverter(MODEL, FORMAT, "feedback")


def test_a_weight_that_never_came_is_an_error() -> None:
    from qcbguard_plugins.hooks.llm_compressor import GuardConverter

    with pytest.raises(UnguardableError, match="28 tensors were not among the files"):
        GuardConverter(MODEL, FORMAT, GUARD).update_config(None)


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    from qcbguard_plugins.hooks.llm_compressor import GuardConverter

    converter = GuardConverter(MODEL, FORMAT, GUARD, ignore=["*down_proj"])
    quantize(MODEL, tmp_path / "quantized", converter)
    assert converter.report is not None
    assert len(converter.report.unguarded) == 4 and len(converter.report.tensors) == 24
