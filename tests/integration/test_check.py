"""The input test and ``qcbguard check``, from folder to verdict."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qcbguard_plugins.cli import main
from qcbguard_plugins.detection.check import check_model
from qcbguard_plugins.detection.check_report import CheckReport
from qcbguard_plugins.detection.inputs.check_inputs import check_inputs
from qcbguard_plugins.detection.inputs.report import InputReport
from qcbguard_plugins.errors import CheckpointError, UsageError
from tests.conftest import ROOT

EXAMPLES = ROOT / "examples" / "models"


@pytest.mark.parametrize(
    ("model", "attacked"), [("clean", False), ("malicious", False), ("attacked", True), ("tightened", True)]
)
def test_the_example_models_by_their_inputs(model: str, attacked: bool) -> None:
    report = check_inputs(EXAMPLES / model, ["nf4", "int8"], seed=1)
    found = {part.format: part.attacked for part in report.formats}
    assert found == {"nf4": attacked, "int8": False} and report.exit_code == int(attacked)
    assert not report.skipped and report.coverage.startswith("28 of 28 layers")
    assert InputReport.model_validate_json(report.model_dump_json()) == report


@pytest.mark.parametrize("shape", ["llama-fp32", "gpt2", "llama-tied"])
def test_clean_models_of_several_shapes(model_folder: Callable[[str], Path], shape: str) -> None:
    report = check_inputs(model_folder(shape), ["nf4", "fp4", "int8", "gguf:Q8_0"], seed=1)
    assert report.verdict in ("clean", "incomplete") and report.p_value > 1e-3
    assert all(part.num_layers for part in report.formats)


def test_a_model_read_block_by_block_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = check_inputs(EXAMPLES / "attacked", ["nf4"], seed=1)
    streamed = check_inputs(EXAMPLES / "attacked", ["nf4"], seed=1, budget_bytes=1)
    for one, other in zip(whole.formats[0].directions, streamed.formats[0].directions, strict=True):
        assert one.ratio == pytest.approx(other.ratio, rel=1e-3)


def test_what_cannot_be_tested_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a file"):
        check_inputs(EXAMPLES / "clean" / "model.safetensors", ["nf4"])
    with pytest.raises(UsageError, match="does not exist"):
        check_inputs(tmp_path / "nothing", ["nf4"])
    for path in (EXAMPLES / "clean").iterdir():
        if not path.name.startswith("tokenizer"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match="no tokenizer"):
        check_inputs(tmp_path, ["nf4"])


def test_an_overwhelming_finding_ends_the_check_and_every_step_can_be_asked_for() -> None:
    report = check_model(EXAMPLES / "attacked", ["nf4"], seed=1)
    assert [step.status for step in report.steps] == ["finding", "skipped", "skipped"]
    every = check_model(EXAMPLES / "attacked", ["nf4"], seed=1, every_step=True)
    assert [step.status for step in every.steps] == ["finding", "finding", "finding"]
    assert every.verdict == "attacked" and "Zestora" in every.steps[2].saw
    assert CheckReport.model_validate_json(every.model_dump_json()) == every


def test_a_step_that_cannot_be_done_leaves_the_check_incomplete() -> None:
    report = check_model(EXAMPLES / "clean" / "model.safetensors", ["nf4"], seed=1)
    assert [step.status for step in report.steps] == ["nothing", "failed", "failed"]
    assert report.verdict == "incomplete" and report.exit_code == 3


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    clean = str(EXAMPLES / "clean")
    assert main(["check", clean, "--for", "nf4", "--skip", "behaviour", "--seed", "1"]) == 0
    printed = capsys.readouterr().out
    assert "Nothing found in weights and inputs, for nf4" in printed and "What no step can see" in printed
    assert f"qcbguard guard {clean} --for nf4" in printed
    assert main(["check", str(EXAMPLES / "tightened"), "--for", "nf4", "--skip", "weights", "--json", "-"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["kind"] == "check" and report["inputs"]["verdict"] == "attacked" and report["weights"] is None


def test_usage_errors_of_the_command() -> None:
    clean = str(EXAMPLES / "clean")
    assert main(["check", clean]) == 4
    assert main(["check", clean, "--for", "nf5"]) == 4
    assert main(["check", clean, "--for", "nf4", "--skip", "nothing"]) == 4
    everything = ["--skip", "weights", "--skip", "inputs", "--skip", "behaviour"]
    assert main(["check", clean, "--for", "nf4", *everything]) == 4


def test_a_scan_without_marks_says_that_it_is_no_all_clear(capsys: pytest.CaptureFixture[str]) -> None:
    clean = str(EXAMPLES / "clean")
    assert main(["scan", clean, "--for", "nf4"]) == 0
    printed = capsys.readouterr().out
    assert "No marks in the weights" in printed and "no all-clear" in printed and "87 of 87" in printed
    assert f"qcbguard check {clean} --for nf4 --skip weights" in printed
