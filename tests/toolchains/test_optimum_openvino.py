"""Guarded exports to OpenVINO, by the real exporter and NNCF's real weight compression, from the command line."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from qcbguard_plugins.cli import main
from qcbguard_plugins.errors import CheckpointError, UsageError
from qcbguard_plugins.pipeline.verify import verify

pytest.importorskip(
    "optimum.intel.openvino", reason="it pins transformers below 5.6; .ci/test-optimum-openvino runs these tests"
)

SETTINGS = {
    "openvino:int8": ["--weight-format", "int8"],
    "openvino:int8-sym": ["--weight-format", "int8", "--sym"],
    "openvino:int4-g32": ["--weight-format", "int4", "--group-size", "32"],
    "openvino:int4-g32-sym": ["--weight-format", "int4", "--group-size", "32", "--sym"],
}


def optimum_cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("optimum-cli")), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module", params=["tied, float16", "untied, float32"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Path:
    tied = request.param.startswith("tied")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("openvino") / "model"
    made = AutoModelForCausalLM.from_config(config)
    (made.half() if tied else made).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def export(model: Path, output: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return optimum_cli(
        "export", "guarded-openvino", "-m", model, "--task", "text-generation-with-past", "--guard-seed", 3, *arguments,
        output,
    )  # fmt: skip


@pytest.mark.parametrize("format_name", SETTINGS)
def test_the_export_holds_the_planned_codes(format_name: str, model: Path, tmp_path: Path) -> None:
    """Of the linear layers, the table and the output head, which stays at 8 bits."""
    method = "feedback" if format_name == "openvino:int4-g32" else "stochastic"
    done = export(model, tmp_path / "export", *SETTINGS[format_name], "--guard-method", method)
    assert done.returncode == 0, done.stderr
    report = verify(tmp_path / "export")
    assert report.clean, [verdict for verdict in report.tensors if not verdict.as_planned]
    assert report.formats == (format_name,)
    assert len(report.tensors) >= 15


def test_a_stock_export_is_not_the_plan(model: Path, tmp_path: Path) -> None:
    done = optimum_cli(
        "export", "openvino", "-m", model, "--task", "text-generation-with-past", "--weight-format", "int8",
        tmp_path / "stock",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    guarded = tmp_path / "guarded"
    assert main(["guard", str(model), "--for", "openvino:int8", "--method", "stochastic", "--out", str(guarded)]) == 0
    assert main(["verify", str(tmp_path / "stock"), "--plan", str(guarded)]) == 1
    with pytest.raises(CheckpointError, match=r"no qcbguard\.json"):
        verify(tmp_path / "stock")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_format": "fp16"}, "quantizes nothing"),
        ({"weight_format": "int4", "awq": True}, "--awq"),
        ({"weight_format": "int4", "ratio": 0.8}, "--ratio"),
        ({"weight_format": "int4", "dataset": "wikitext2"}, "--dataset"),
    ],
    ids=["fp16", "awq", "mixed", "data-aware"],
)
def test_what_cannot_be_planned_is_refused(change: dict[str, object], message: str) -> None:
    from qcbguard_plugins.cli.optimum import openvino_format

    arguments = Namespace(sym=False, group_size=None, **change)
    with pytest.raises(UsageError, match=message):
        openvino_format(arguments)
    assert openvino_format(Namespace(weight_format="int4", sym=True, group_size=None)) == "openvino:int4-g128-sym"


def test_the_commands_are_offered() -> None:
    assert "guarded-openvino" in optimum_cli("export", "--help").stdout
    assert optimum_cli("guard", "--help").returncode == 0
