"""Guarded exports to ONNX, by the real exporter and ONNX Runtime's real quantizer, from the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from qcbguard_plugins.cli import main
from qcbguard_plugins.errors import CheckpointError, UsageError
from qcbguard_plugins.pipeline.verify import verify

pytest.importorskip(
    "optimum.onnxruntime", reason="it pins transformers below 4.58; .ci/test-optimum-onnx runs these tests"
)

# The arguments of ``optimum-cli onnxruntime quantize`` that go with each format.
SETTINGS = {
    "onnx:int8": ["--avx512_vnni", "--per_channel"],
    "onnx:uint8": ["--avx2", "--per_channel"],
    "onnx:int8-tensor": ["--arm64"],
}


def optimum_cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("optimum-cli")), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def export(model: Path, output: Path, *arguments: object) -> None:
    task = ("--task", "text-generation-with-past")
    done = optimum_cli("export", "guarded-onnx", "-m", model, *task, "--guard-seed", 3, *arguments, output)
    assert done.returncode == 0, done.stderr


def quantize(exported: Path, output: Path, arguments: list[str]) -> Path:
    done = optimum_cli("onnxruntime", "quantize", "--onnx_model", exported, *arguments, "-o", output)
    assert done.returncode == 0, done.stderr
    return output / "model_quantized.onnx"


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("onnx") / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("format_name", SETTINGS)
def test_the_quantized_file_holds_the_planned_codes(format_name: str, untied: Path, tmp_path: Path) -> None:
    """Of the linear layers, the table and the output head."""
    method = "feedback" if format_name == "onnx:int8" else "stochastic"
    export(untied, tmp_path / "onnx", "--guard-for", format_name, "--guard-method", method)
    quantized = quantize(tmp_path / "onnx", tmp_path / "quantized", SETTINGS[format_name])
    report = verify(quantized, plan=tmp_path / "onnx")
    assert report.clean, [verdict for verdict in report.tensors if not verdict.as_planned]
    assert len(report.tensors) == 16
    assert main(["verify", str(quantized), "--plan", str(tmp_path / "onnx")]) == 0


def test_other_codes_are_a_finding(untied: Path, tmp_path: Path) -> None:
    export(untied, tmp_path / "onnx", "--guard-method", "stochastic")
    other = quantize(tmp_path / "onnx", tmp_path / "other", SETTINGS["onnx:uint8"])
    assert main(["verify", str(other), "--plan", str(tmp_path / "onnx")]) == 1
    with pytest.raises(CheckpointError, match="no quantized weight"):
        verify(tmp_path / "onnx" / "model.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="cannot be read"):
        verify(tmp_path / "broken.onnx", plan=tmp_path / "onnx")


def test_a_plan_for_something_else_is_refused(untied: Path, tmp_path: Path) -> None:
    done = optimum_cli("guard", "-m", untied, "--for", "openvino:int8", "--method", "stochastic", tmp_path / "guarded")
    assert done.returncode == 0, done.stderr
    assert "guarded for openvino:int8" in done.stdout
    with pytest.raises(UsageError, match="not for onnx"):
        verify(tmp_path / "model.onnx", plan=tmp_path / "guarded")


def test_the_commands_are_offered_and_errors_are_exit_codes(tmp_path: Path) -> None:
    assert "guarded-onnx" in optimum_cli("export", "--help").stdout
    assert "guarded-openvino" not in optimum_cli("export", "--help").stdout
    done = optimum_cli("guard", "-m", tmp_path / "nothing", "--for", "onnx:int8", tmp_path / "guarded")
    assert done.returncode == 2
    assert "error:" in done.stderr
    assert "Traceback" not in done.stderr
