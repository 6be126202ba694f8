"""The tutorial from install to report, as a reader runs it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="the tutorial needs nbclient: pip install 'qcbguard-plugins[docs]'")
pytest.importorskip("ipykernel", reason="the tutorial needs ipykernel: pip install 'qcbguard-plugins[docs]'")


@pytest.mark.slow
def test_the_tutorial_shows_the_attack_and_its_end(tmp_path: Path) -> None:
    from benchmarks.pages.notebook import execute, printed, shares

    start = time.process_time()
    notebook = execute(tmp_path)
    assert time.process_time() - start < 300
    assert "exit code 1" in printed(notebook, "scan")
    assert "stores the planned codes" in printed(notebook, "verify")
    measured = shares(notebook)
    assert measured["stock NF4"] >= 0.9
    assert abs(measured["guarded NF4"] - measured["full precision"]) <= 0.1
    assert (tmp_path / "report.html").stat().st_size > 10_000
