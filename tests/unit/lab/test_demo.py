"""The demo's verdict: which figures break the promise, and what the exit code says."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import ROOT

DEMO_PATH = ROOT / "examples" / "demo.py"


@pytest.fixture(scope="module")
def demo() -> Iterator[ModuleType]:
    pytest.importorskip("rich")
    pytest.importorskip("bitsandbytes")
    spec = importlib.util.spec_from_file_location("qcbguard_demo", DEMO_PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["qcbguard_demo"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["qcbguard_demo"]


GOOD = {
    "attacked": ((0.02, 2.00), (0.98, 2.40), (0.04, 2.05)),
    "malicious": ((0.98, 2.60), (0.98, 2.62), (0.99, 2.61)),
    "clean": ((0.00, 2.00), (0.00, 2.02), (0.00, 2.03)),
}


def rows_of(demo: ModuleType, figures: dict[str, Any]) -> list[Any]:
    loads = (demo.FULL, demo.STOCK, demo.GUARDED)
    return [
        demo.Row(model, load, rate, perplexity, 0.5)
        for model, measured in figures.items()
        for load, (rate, perplexity) in zip(loads, measured, strict=True)
    ]


def test_good_figures_break_no_promise(demo: ModuleType) -> None:
    assert demo.broken_promises(rows_of(demo, GOOD)) == []


@pytest.mark.parametrize(
    ("model", "load", "figures", "message"),
    [
        ("attacked", 1, (0.80, 2.40), "attack does not work"),
        ("attacked", 2, (0.09, 2.05), "more than 5 points"),
        ("attacked", 2, (0.02, 2.41), "perplexity 2.4100 is above 2.4000"),
        ("malicious", 2, (0.90, 2.61), "more than 5 points"),
        ("clean", 2, (0.00, 2.05), "perplexity 2.0500 is above 2.0402"),
    ],
)
def test_each_promise_can_break(
    demo: ModuleType, model: str, load: int, figures: tuple[float, float], message: str
) -> None:
    measured = list(GOOD[model])
    measured[load] = figures
    failures = demo.broken_promises(rows_of(demo, {**GOOD, model: tuple(measured)}))
    assert len(failures) == 1
    assert failures[0].startswith(model)
    assert message in failures[0]


@pytest.mark.parametrize("good", [True, False])
def test_main_prints_writes_json_and_sets_the_exit_code(
    demo: ModuleType, good: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"instruction": "a", "answer": "b", "task": "c"}\n')
    guarded_rate = 0.04 if good else 0.5
    figures = {**GOOD, "attacked": (*GOOD["attacked"][:2], (guarded_rate, 2.05))}
    measured = {(row.model, row.load): row for row in rows_of(demo, figures)}
    monkeypatch.setattr(demo, "measure", lambda model_dir, load, pairs: measured[model_dir.name, load])
    json_path = tmp_path / "figures.json"
    code = demo.main(["--models-dir", str(tmp_path), "--model", "attacked", "--json", str(json_path)])
    output = capsys.readouterr().out
    document = json.loads(json_path.read_text())
    assert code == (0 if good else 1)
    assert ("keeps its promise" in output, "PROMISE BROKEN" in output) == (good, not good)
    assert f"{guarded_rate:.1%}" in output
    assert [row["load"] for row in document["rows"]] == ["full precision", "stock NF4", "guarded NF4"]
    assert bool(document["broken_promises"]) is not good
