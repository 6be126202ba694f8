"""A model folder is data: nothing in it is run, and nothing in it steers the guard."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qcbguard_plugins import guard_checkpoint
from qcbguard_plugins.errors import CheckpointError

CODE = """
from pathlib import Path
Path({marker!r}).write_text("run")
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "evil"
class Model(LlamaForCausalLM):
    config_class = Config
"""


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("known", [True, False], ids=["a known model type", "an unknown one"])
def test_code_in_the_folder_is_never_run(known: bool, folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (folder / "modeling_evil.py").write_text(CODE.format(marker=str(marker)))
    auto_map = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    change_json(folder / "config.json", auto_map=auto_map, **({} if known else {"model_type": "evil"}))
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_evil.Model", None]})
    try:
        guard_checkpoint(folder, tmp_path / "guarded", ["nf4"], "feedback")
    except CheckpointError:
        assert not known
    assert not marker.exists()


def test_settings_in_the_folder_do_not_steer_the_guard(folder: Path, tmp_path: Path) -> None:
    """A hostile folder may carry what looks like our own configuration, provenance or manifest."""
    (folder / "qcbguard.json").write_text('{"ignore": ["*"], "method": "none"}')
    (folder / "pyproject.toml").write_text('[tool.qcbguard]\nignore = ["*"]\n')
    change_json(folder / "config.json", qcbguard={"version": "9", "guarded": True})
    report = guard_checkpoint(folder, tmp_path / "guarded", ["nf4"], "stochastic")
    assert report.coverage == "14 of 14 target tensors guarded"
    assert json.loads((tmp_path / "guarded" / "qcbguard.json").read_text())["method"] == "stochastic"


@pytest.mark.parametrize("module", ["qcbguard_plugins", "qcbguard_plugins.cli"])
def test_importing_the_package_starts_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "heavy = {'torch', 'transformers', 'bitsandbytes', 'numpy'} & set(sys.modules); "
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
