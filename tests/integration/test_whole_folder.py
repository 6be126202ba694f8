"""From guarding to verifying, by the command line: what is added later is a finding, what is not covered is exit 3."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qcbguard_plugins import Guard, Stochastic, guard_checkpoint, verify_checkpoint
from qcbguard_plugins.checkpoint.manifest import read_manifest
from qcbguard_plugins.cli import main

ADDED = {
    "model.safetensors.index.json": "can change what is loaded",
    "other.safetensors": "holds weights",
    "adapter_config.json": "can change what is loaded",
    "adapter_model.safetensors": "holds weights",
    "pytorch_model.bin": "holds weights",
    "modeling_own.py": "can change what is loaded",
}


@pytest.fixture(scope="module")
def guarded_once(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "guarded"
    report = guard_checkpoint(model_folder("llama-fp32"), folder, ["nf4"], Guard(Stochastic(), seed=0))
    assert report.folder is not None and report.is_complete and report.uncovered == ()
    return folder


@pytest.fixture
def guarded(guarded_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(guarded_once, tmp_path / "copy"))


def test_an_untouched_copy(guarded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (guarded / "README.md").write_text("as you like")
    assert main(["verify", str(guarded)]) == 0
    assert "CHANGED" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ADDED)
def test_a_file_that_was_added(name: str, guarded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (guarded / name).write_text("{}")
    assert main(["verify", str(guarded)]) == 1
    assert f"CHANGED    {name}  {ADDED[name]}" in capsys.readouterr().out
    report = verify_checkpoint(guarded)
    assert report.changed_files == (name,) and report.num_tensors_as_planned == len(report.tensors)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("transformers_weights", "other.safetensors"),
        ("auto_map", {"AutoModelForCausalLM": "modeling.Own"}),
        ("quantization_config", {"quant_method": "awq"}),
        ("dtype", "bfloat16"),
        ("tie_word_embeddings", True),
    ],
)
def test_a_changed_configuration(key: str, value: object, guarded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((guarded / "config.json").read_text())
    (guarded / "config.json").write_text(json.dumps({**config, key: value}))
    assert main(["verify", str(guarded)]) == 1
    assert f"config.json  {key} is {value!r}" in capsys.readouterr().out


def test_a_manifest_of_the_first_schema_compares_the_weight_files(guarded: Path) -> None:
    content = json.loads((guarded / "qcbguard.json").read_text())
    del content["folder"], content["uncovered"]
    (guarded / "qcbguard.json").write_text(json.dumps(content))
    (guarded / "modeling_own.py").write_text("")
    assert verify_checkpoint(guarded).clean
    weights = guarded / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert verify_checkpoint(guarded).changed_files == ("model.safetensors",)


@pytest.mark.parametrize("name", ["../model.safetensors", "/dev/zero", "missing.safetensors"])
def test_a_manifest_that_names_other_files(name: str, guarded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads((guarded / "qcbguard.json").read_text())
    content["files"].append({"name": name, "sha256_in": "0", "sha256_out": "0"})
    (guarded / "qcbguard.json").write_text(json.dumps(content))
    assert main(["verify", str(guarded)]) == 2
    assert "1 weight files of qcbguard.json are missing" in capsys.readouterr().err


def test_experts_are_not_covered_and_make_exit_3(
    model_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before: "8 of 8 target tensors guarded", exit 0."""
    source, target = str(model_folder("mixtral")), str(tmp_path / "guarded")
    arguments = ["guard", source, "--for", "nf4", "--method", "stochastic", "--out", target]
    assert main([*arguments, "--dry-run"]) == 0
    assert "24 tensors (147,456 weights, 0.3 MB) not covered: experts" in capsys.readouterr().out
    assert main(arguments) == 3
    output = " ".join(capsys.readouterr().out.split())
    assert "8 of 8 target tensors guarded, 24 other tensors not covered" in output
    assert "24 tensors (147,456 weights, 0.3 MB) not covered" in output
    report = read_manifest(Path(target))
    assert sum(tensor.num_bytes for tensor in report.uncovered) == 2 * 147_456 and not report.is_complete
    assert main(["verify", target]) == 3
    assert "not covered" in capsys.readouterr().out
