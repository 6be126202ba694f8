"""What a pipeline and a commit hook do with the exit codes."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qcbguard_plugins.cli.scan_files import scan_files
from tests.conftest import ROOT
from tests.helpers.detection_models import attacked_folder, clean_folder, random_weight

pytestmark = pytest.mark.slow

ACTION = ROOT / "integrations" / "github_action"


def _incomplete(folder: Path) -> Path:
    folder.mkdir()
    tensors = {"a.weight": torch.full((64, 64), float("nan")), "b.weight": random_weight(0)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


def _malformed(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"junk")
    return folder


@pytest.mark.parametrize(
    ("make", "allow", "code"),
    [
        (clean_folder, "false", 0),
        (attacked_folder, "false", 1),
        (attacked_folder, "true", 1),
        (_malformed, "true", 2),
        (_incomplete, "false", 3),
        (_incomplete, "true", 0),
    ],
)
def test_the_action_fails_as_the_exit_code_says(tmp_path: Path, make: object, allow: str, code: int) -> None:
    model = make(tmp_path / "m")
    command = tmp_path / "bin" / "qcbguard"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qcbguard_plugins.cli "$@"\n', encoding="utf-8")
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    environment = {
        **os.environ,
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MODEL": str(model),
        "FORMATS": "nf4",
        "SARIF": str(tmp_path / "q.sarif"),
        "HTML": str(tmp_path / "q.html"),
        "ALLOW_INCOMPLETE": allow,
        "GITHUB_OUTPUT": str(tmp_path / "output"),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
    }
    bash = shutil.which("bash")
    assert bash
    finished = subprocess.run([bash, str(ACTION / "scan.sh")], env=environment, capture_output=True, text=True)
    assert finished.returncode == code, finished.stderr
    recorded = (tmp_path / "output").read_text(encoding="utf-8")
    assert recorded == f"exit-code={3 if make is _incomplete else code}\n"
    if code != 2:
        assert (tmp_path / "q.sarif").is_file() and (tmp_path / "q.html").is_file()
        assert "## Scan for" in (tmp_path / "summary").read_text(encoding="utf-8")


def test_the_hook_returns_the_worst_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    makers = {"clean": clean_folder, "attacked": attacked_folder, "incomplete": _incomplete, "malformed": _malformed}
    files = {kind: str(make(tmp_path / kind) / "model.safetensors") for kind, make in makers.items()}
    assert scan_files([files["clean"]]) == 0
    assert scan_files([files["clean"], files["incomplete"]]) == 3
    assert scan_files([files["incomplete"], files["malformed"]]) == 2
    assert scan_files([files["malformed"], files["attacked"], files["clean"]]) == 1
    assert scan_files([]) == 0


def test_the_hooks_file_names_an_installed_command() -> None:
    hooks = (ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "entry: qcbguard-scan-files" in hooks
    assert 'qcbguard-scan-files = "qcbguard_plugins.cli.scan_files:run"' in project
