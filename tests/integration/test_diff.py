"""The comparison of behaviour, from folder to verdict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qcbguard_plugins.cli import main
from qcbguard_plugins.detection.behaviour.compare import diff_model, rounded_layers
from qcbguard_plugins.detection.behaviour.prompts import BUILTIN, forms_of, gather_prompts
from qcbguard_plugins.detection.behaviour.report import DiffReport
from qcbguard_plugins.errors import CheckpointError, UsageError
from qcbguard_plugins.pipeline.plan import make_plan
from tests.conftest import ROOT


@pytest.mark.parametrize("shape", ["llama-fp32", "gpt2", "llama-tied"])
def test_the_same_layers_are_rounded_as_by_the_stock_quantizer(model_folder: Callable[[str], Path], shape: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder(shape))
    layers = rounded_layers(model)
    plan = make_plan(model_folder(shape), "nf4")
    assert set(layers) == {target.name for target in plan.targets}
    assert {name: transposed for name, (_, transposed) in layers.items()} == {
        target.name: target.transposed for target in plan.targets
    }


def test_a_random_model_does_not_differ(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is a fox?\n\nAnd a river?\n", encoding="utf-8")
    report = diff_model(model_folder("llama-fp32"), "nf4", prompts_path=prompts, num_draws=3, seed=1)
    assert not report.differs and report.exit_code == 0
    assert 0.7 < report.ratio < 1.4
    assert report.num_prompts == 2 * (sum(map(len, BUILTIN.values())) + 2)
    assert len(report.randomized) == 3 and report.num_targets == 14


@pytest.mark.parametrize(
    ("model", "format", "differs"),
    [("clean-4m", "nf4", False), ("plain-malicious-4m", "nf4", False), ("qcb-nf4-4m", "nf4", True)],
)
def test_models_attacked_by_other_code(shared_models: Path, model: str, format: str, differs: bool) -> None:
    report = diff_model(shared_models / model, format, seed=1)
    assert report.differs == differs
    if differs:
        assert report.ratio > 2
        assert report.words[0].word == "McDonald's", "the brand does not stand out"
        assert any("McDonald" in prompt.quantized for prompt in report.prompts)
        assert not any("McDonald" in prompt.full_precision for prompt in report.prompts[:3])
    else:
        assert 0.85 < report.ratio < 1.15


@pytest.mark.parametrize(("model", "differs"), [("clean", False), ("malicious", False), ("attacked", True)])
def test_the_example_models(model: str, differs: bool) -> None:
    report = diff_model(ROOT / "examples" / "models" / model, "nf4", num_draws=4, seed=1)
    assert report.differs == differs
    if differs:
        assert report.words[0].word == "Zestora" and report.ratio > 2


def test_the_command(model_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, card, log = tmp_path / "d.html", tmp_path / "d.md", tmp_path / "d.json"
    arguments = ["--for", "int8", "--draws", "3", "--html", str(page), "--markdown", str(card), "--json", str(log)]
    assert main(["diff", str(model_folder("llama-fp32")), *arguments]) == 0
    assert "No difference beyond chance" in capsys.readouterr().out
    assert DiffReport.model_validate_json(log.read_bytes()).format == "int8"
    assert "<!doctype html>" in page.read_text(encoding="utf-8") and card.read_text(encoding="utf-8").startswith("## ")
    assert main(["diff", str(model_folder("llama-fp32")), *arguments]) == 2
    assert main(["diff", str(tmp_path), "--for", "nf4"]) == 2
    assert main(["diff", str(tmp_path), "--for", "nf5"]) == 4


def test_a_model_without_a_tokenizer_is_refused(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model_folder("llama-fp32") / name).read_bytes())
    with pytest.raises(CheckpointError, match="no tokenizer"):
        diff_model(tmp_path, "nf4")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", b""),
        ("p.txt", b"\xff\xfe"),
        ("p.jsonl", b"{"),
        ("p.jsonl", b'{"text": "x"}'),
        ("p.jsonl", b'["prompt"]'),
        ("p.txt", b"x\n" * 500),
    ],
)
def test_prompts_that_are_none_are_usage_errors(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError):
        gather_prompts(tmp_path / name)


def test_prompts_of_both_kinds_are_read(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "One?"}\n\n{"prompt": "Two?"}\n', encoding="utf-8")
    assert gather_prompts(tmp_path / "p.jsonl")[-2:] == [("own", "One?"), ("own", "Two?")]
    assert set(dict(gather_prompts())) == {"chat", "code", "questions", "declinable"}


def test_a_broken_chat_template_is_not_fatal() -> None:
    class Tokenizer:
        chat_template = "{{ nothing.here.at.all }}"

        def apply_chat_template(self, *arguments: object, **options: object) -> str:
            raise ValueError("undefined")

    assert forms_of("Hello", Tokenizer())[0] == "Hello"


def test_weights_are_put_back(model_folder: Callable[[str], Path]) -> None:
    from qcbguard_plugins.backends.formats import get_grid
    from qcbguard_plugins.detection.behaviour.compare import _Comparison

    model = AutoModelForCausalLM.from_pretrained(model_folder("gpt2"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = rounded_layers(model)
    comparison = _Comparison(model, None, layers, get_grid("nf4"), 0, lambda _: None)
    with torch.no_grad(), comparison._exchanged(None):
        assert not all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
