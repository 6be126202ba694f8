"""The admission example: only a clean result admits a model, and the claims stay either way."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from qcbguard_plugins import guard_checkpoint
from tests.conftest import ROOT
from tests.helpers.detection_models import attacked_folder

ACTION = ROOT / "integrations" / "github_action"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Path:
    out = tmp_path_factory.mktemp("admission") / "guarded"
    guard_checkpoint(llama_folder, out, formats=["nf4"], guard="stochastic")
    return out


def admit(model: Path, place: Path, base: str = "") -> tuple[int, list[dict]]:
    """The exit code of the job's step, and the claims that it leaves."""
    command = place / "bin" / "qcbguard"
    command.parent.mkdir(exist_ok=True)
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qcbguard_plugins.cli "$@"\n', encoding="utf-8")
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    claims, bash = place / "claims.jsonl", shutil.which("bash")
    assert bash
    environment = {
        **os.environ,
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MODEL": str(model),
        "BASE": base,
        "FORMATS": "nf4",
        "CLAIMS": str(claims),
        "GITHUB_OUTPUT": str(place / "output"),
        "GITHUB_STEP_SUMMARY": str(place / "summary"),
    }
    finished = subprocess.run([bash, str(ACTION / "admit.sh")], env=environment, capture_output=True, text=True)
    lines = claims.read_text(encoding="utf-8").splitlines() if claims.exists() else []
    return finished.returncode, [json.loads(line)["predicate"] for line in lines if line.startswith('{"_type"')]


def test_a_guarded_model_is_admitted(guarded: Path, tmp_path: Path) -> None:
    code, (scan, verification) = admit(guarded, tmp_path)
    assert code == 0
    assert scan["failedTests"] == []
    assert verification["properties"][0] == "QCBGUARD_CODES_AS_PLANNED"
    assert (tmp_path / "output").read_text() == "exit-code=0\n"
    assert "admitted" in (tmp_path / "summary").read_text()


def test_a_changed_model_is_refused_with_a_claim_that_says_nothing(guarded: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(guarded, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].neg_()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    code, (_, verification) = admit(model, tmp_path)
    assert code == 1
    assert verification["properties"] == []
    assert "refused" in (tmp_path / "summary").read_text()


def test_an_attacked_model_without_a_plan_is_refused(tmp_path: Path) -> None:
    code, (scan,) = admit(attacked_folder(tmp_path / "model"), tmp_path)
    assert code == 1
    assert scan["result"] == "FAILED"


def test_what_cannot_be_verified_is_refused(guarded: Path, tmp_path: Path) -> None:
    # The plan of a folder that carries one itself is wrong usage.
    code, claims = admit(guarded, tmp_path, base=str(guarded))
    assert code == 4
    assert len(claims) == 1


def test_claims_of_another_run_admit_nothing(guarded: Path, tmp_path: Path) -> None:
    (tmp_path / "claims.jsonl").write_text("{}\n", encoding="utf-8")
    assert admit(guarded, tmp_path) == (2, [])


def test_the_workflow_signs_only_what_was_admitted() -> None:
    workflow = yaml.safe_load((ACTION / "admission.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["admit"]["steps"]
    run = [step.get("run", "") for step in steps]
    admitting = next(i for i, line in enumerate(run) if "admit.sh" in line)
    signing = next(i for i, line in enumerate(run) if "cosign attest-blob" in line)
    assert admitting < signing
    assert "continue-on-error" not in steps[admitting] and "if" not in steps[signing]
    assert steps[-1]["if"] == "always()" and "upload-artifact" in steps[-1]["uses"]
