"""Folders for toolchains that are not installed here: planned, guarded and verified by their grids alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qcbguard_plugins import Calibration, Feedback, Guard, Stochastic, guard_checkpoint, verify_checkpoint
from qcbguard_plugins.errors import UnguardableError, UsageError

STOCHASTIC = Guard(Stochastic(), seed=7)
# Each with the number of tensors that its quantizer takes: two blocks of seven, and the table and the head for some.
FORMATS = {
    "gptq-w4g32": 14, "gptq-w8-asym": 14, "torchao:int8": 14, "onnx:int8": 16, "onnx:uint8-tensor": 16,
    "openvino:int8": 16, "openvino:int4-g32": 16, "compressed-tensors:int4-g32": 14, "quanto:int8": 14,
    "hqq:int4-g32": 14, "autoround:int4-g32": 14,
}  # fmt: skip


@pytest.mark.parametrize("format_name", FORMATS)
def test_every_target_is_guarded_and_verified(format_name: str, llama: Path, tmp_path: Path) -> None:
    report = guard_checkpoint(llama, tmp_path / "guarded", [format_name], STOCHASTIC)
    assert len(report.tensors) == FORMATS[format_name]
    assert verify_checkpoint(tmp_path / "guarded").clean


def test_tables_and_heads_get_formats_of_their_own(
    llama: Path, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Calibrated on a tied model, whose table is the head."""
    guard = Guard(Feedback(), seed=7, calibration=Calibration(num_sequences=8, sequence_length=64))
    untied = guard_checkpoint(llama, tmp_path / "untied", ["openvino:int4-g32"], STOCHASTIC)
    tied = guard_checkpoint(model_folder("llama-tied"), tmp_path / "tied", ["onnx:int8"], guard)
    formats = {tensor.name: ",".join(tensor.formats) for report in (untied, tied) for tensor in report.tensors}
    assert formats["lm_head.weight"] == "openvino:int8"
    assert formats["model.embed_tokens.weight"] == "onnx:uint8-table"
    assert len(tied.tensors) == 15
    assert verify_checkpoint(tmp_path / "tied").clean


def test_conv1d_is_turned_round(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    report = guard_checkpoint(model_folder("gpt2"), tmp_path / "guarded", ["gptq-w4g64"], STOCHASTIC)
    assert {tensor.name: tensor.transposed for tensor in report.tensors}["transformer.h.0.attn.c_attn.weight"]
    assert verify_checkpoint(tmp_path / "guarded").clean


def test_one_folder_for_two_toolchains(llama: Path, tmp_path: Path) -> None:
    guard_checkpoint(llama, tmp_path / "guarded", ["gptq-w4g32", "int8"], STOCHASTIC)
    assert verify_checkpoint(tmp_path / "guarded").clean


@pytest.mark.parametrize("format_name", ["gptq-w4g32", "torchao:int8", "openvino:int8"])
def test_fused_experts_are_refused(format_name: str, model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UnguardableError, match="several matrices"):
        guard_checkpoint(model_folder("mixtral"), tmp_path / "guarded", [format_name], STOCHASTIC)
    assert not (tmp_path / "guarded").exists()


@pytest.mark.parametrize("format_name", ["torchao:int4", "onnx:int4", "openvino:int8-g64", "hqq:int8", "gptq-w4g48"])
def test_a_format_that_does_not_exist_is_refused(format_name: str, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        guard_checkpoint(llama, tmp_path / "guarded", [format_name], STOCHASTIC)


def test_groups_that_do_not_fill_rows_are_named(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UnguardableError, match=r"down_proj\.weight  in_features=160, group_size=128"):
        guard_checkpoint(llama, tmp_path / "guarded", ["gptq-w4g128"], STOCHASTIC)
