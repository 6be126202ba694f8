"""The memory that a dry run states is what a run takes, and a budget below it is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qcbguard_plugins.detection.weights.scan import scan_model
from qcbguard_plugins.errors import MemoryBudgetError
from tests.conftest import ROOT
from tests.helpers.gguf_files import write_model

pytestmark = pytest.mark.slow

_WITH_PEAK = (
    "import resource, subprocess, sys\n"
    "code = subprocess.run([sys.executable, *sys.argv[1:]], stdout=subprocess.DEVNULL).returncode\n"
    "print(1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    "sys.exit(code)\n"
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("method", ["stochastic", "feedback"])
def test_a_dry_run_states_the_peak_within_a_fifth(method: str, llama: Path, tmp_path: Path) -> None:
    command = ["-m", "qcbguard_plugins.cli", "guard", str(llama), "--for", "nf4", "--method", method, "--seed", "0"]
    stated = json.loads(run(*command, "--dry-run", "--json", "-").stdout)["peak_bytes"]
    done = run("-c", _WITH_PEAK, *command, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert stated == pytest.approx(int(done.stdout), rel=0.2)


def test_a_dry_run_on_a_gguf_file_does_too(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    source = write_model(tmp_path / "model.gguf", hidden=1024, ffn=4096, type_name="F16")
    command = ["-m", "qcbguard_plugins.cli", "gguf", str(source), "--for", "Q4_K_M", "--seed", "0"]
    stated = json.loads(run(*command, "--dry-run", "--json", "-").stdout)["peak_bytes"]
    done = run("-c", _WITH_PEAK, *command[:4], str(tmp_path / "out.gguf"), *command[4:])
    assert done.returncode == 0, done.stderr
    assert stated == pytest.approx(int(done.stdout), rel=0.2)


@pytest.mark.parametrize("size", ["0.1 GiB"])
def test_a_budget_below_it_is_refused(size: str, llama: Path, tmp_path: Path) -> None:
    command = ["-m", "qcbguard_plugins.cli", "guard", str(llama), "--for", "nf4", "--out", str(tmp_path / "out")]
    refused = run(*command, "--max-memory", size)
    assert refused.returncode == 2
    assert "--max-memory is" in refused.stderr and "Traceback" not in refused.stderr
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("size", ["6 apples", "-1GB"])
def test_what_is_no_size_is_a_usage_error(size: str, llama: Path) -> None:
    refused = run(
        "-m", "qcbguard_plugins.cli", "guard", str(llama), "--for", "nf4", "--dry-run", f"--max-memory={size}"
    )
    assert refused.returncode == 4
    assert "is not a size such as 6GiB" in refused.stderr


@pytest.mark.parametrize("formats", ["nf4,int8", "gguf:Q4_K_M"])
def test_a_scan_takes_what_is_planned_for_it(formats: str, tmp_path: Path) -> None:
    """The statement is made in the process that scans, when all is imported that the command line imports."""
    save_file({"model.layers.0.mlp.up_proj.weight": torch.randn(1024, 2048).half() * 0.02}, tmp_path / "m.safetensors")
    code = (
        "import sys\n"
        "import qcbguard_plugins.cli\n"
        "from qcbguard_plugins._util.memory_peak import peak_bytes\n"
        "from qcbguard_plugins.detection.weights import scan\n"
        "original = scan.require_room_for_scan\n"
        "def tell(*arguments):\n"
        "    print(original(*arguments))\n"
        "scan.require_room_for_scan = tell\n"
        "scan.scan_model(sys.argv[1], sys.argv[2].split(','), seed=0)\n"
        "print(peak_bytes())\n"
    )
    done = run("-c", code, str(tmp_path / "m.safetensors"), formats)
    assert done.returncode == 0, done.stderr
    stated, measured = map(int, done.stdout.split())
    assert stated == pytest.approx(measured, rel=0.2)


def test_a_scan_beyond_its_budget_is_refused(llama: Path) -> None:
    with pytest.raises(MemoryBudgetError, match=r"--max-memory is 50.0 MiB(.|\n)*--exhaustive"):
        scan_model(llama, ["nf4"], budget_bytes=50 << 20)
