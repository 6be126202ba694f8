"""A scan builds no model class and runs nothing of the model's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.helpers.detection_models import clean_folder

_SCRIPT = """
import sys
from qcbguard_plugins.cli import main
code = main(["scan", sys.argv[1], "--for", "nf4"])
assert code == 0, code
loaded = {"transformers", "bitsandbytes", "accelerate"} & set(sys.modules)
assert not loaded, loaded
"""


def test_neither_transformers_nor_the_models_code_is_loaded(tmp_path: Path) -> None:
    folder = clean_folder(tmp_path / "m")
    (folder / "config.json").write_text(
        '{"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}', encoding="utf-8"
    )
    (folder / "modeling_mine.py").write_text("raise SystemExit('the model ran its code')\n", encoding="utf-8")
    finished = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
