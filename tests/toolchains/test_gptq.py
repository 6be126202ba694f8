"""GPTQ, by the real GPTQModel and Optimum: the guard survives GPTQ's own error feedback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

from qcbguard_plugins import Calibration, Feedback, Guard, Stochastic, guard_checkpoint
from qcbguard_plugins.cli import main
from qcbguard_plugins.errors import CheckpointError, UnguardableError, UsageError, VerificationError
from qcbguard_plugins.hooks.gptqmodel import let_gptqmodel_run_on_few_cores
from qcbguard_plugins.models.calibration import builtin_texts
from qcbguard_plugins.pipeline.verify import verify
from tests.conftest import ROOT

let_gptqmodel_run_on_few_cores()
pytest.importorskip("gptqmodel", reason="GPTQModel pins its own versions; .ci/test-gptq runs these tests")
pytest.importorskip("optimum.gptq", reason="optimum is not installed; .ci/test-gptq runs these tests")

MODEL = ROOT / "examples" / "models" / "attacked"
TEXTS = [text[:400] for text in builtin_texts()[:8]]
GUARDS = {
    "stochastic": Guard(Stochastic(), seed=7),
    "feedback": Guard(Feedback(), seed=7, calibration=Calibration(num_sequences=8, sequence_length=64)),
}
# Name, arguments of GPTQConfig, the format, and the least share of codes that must come through.
SETTINGS: dict[str, tuple[dict[str, Any], str, float]] = {
    "w4g32": ({"bits": 4, "group_size": 32}, "gptq-w4g32", 0.98),
    "w4g32, natural order": ({"bits": 4, "group_size": 32, "act_group_aware": False}, "gptq-w4g32", 0.98),
    "w4g32, asymmetric": ({"bits": 4, "group_size": 32, "sym": False}, "gptq-w4g32-asym", 1.0),
    "w3g32": ({"bits": 3, "group_size": 32}, "gptq-w3g32", 0.98),
    "w8 rows, desc_act": ({"bits": 8, "group_size": -1, "desc_act": True}, "gptq-w8", 0.99),
}


def load(folder: Path, config: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


def arguments(folder: Path, **settings: Any) -> dict[str, Any]:
    return {
        "bits": 4,
        "group_size": 128,
        "dataset": TEXTS,
        "tokenizer": AutoTokenizer.from_pretrained(folder),
        **settings,
    }


def same(one: Any, other: Any) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", SETTINGS)
def test_loading_guarded_equals_guarding_the_folder(name: str, llama: Path, tmp_path: Path) -> None:
    from qcbguard_plugins import GuardedGPTQConfig

    changes, format_name, landed = SETTINGS[name]
    guard = GUARDS["feedback" if name == "w4g32" else "stochastic"]
    report = guard_checkpoint(llama, tmp_path / "guarded", [format_name], guard)
    by_folder = load(tmp_path / "guarded", GPTQConfig(**arguments(llama, **changes)))
    in_flight = load(llama, GuardedGPTQConfig(**arguments(llama, **changes), guard=guard))
    assert same(in_flight, by_folder)
    found = in_flight.hf_quantizer.guard_report
    assert found.codes_sha256 == report.codes_sha256
    assert found.coverage == "14 of 14 target tensors guarded"
    assert found.share_as_planned >= landed
    assert type(in_flight.config.quantization_config) is GPTQConfig

    by_folder.save_pretrained(tmp_path / "quantized")
    verified = verify(tmp_path / "quantized", plan=tmp_path / "guarded")
    assert verified.clean
    assert verified.share_as_planned == found.share_as_planned


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gptq") / "guarded"
    guard_checkpoint(MODEL, folder, ["gptq-w4g128"], GUARDS["stochastic"])
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was guarded in flight, quantized and saved."""
    from qcbguard_plugins import GuardedGPTQConfig

    folder = tmp_path_factory.mktemp("gptq") / "saved"
    model = load(MODEL, GuardedGPTQConfig(**arguments(MODEL), guard=GUARDS["stochastic"]))
    assert model.hf_quantizer.guard_report.share_as_planned > 0.99
    model.save_pretrained(folder)
    return folder


def test_the_saved_model_is_stock_and_says_what_was_done(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"
    assert "guard" not in config["quantization_config"]
    assert config["quantization_config"]["meta"]["qcbguard"]["num_tensors"] == 28
    assert config["qcbguard"]["seed"] == 7


def test_a_machine_without_this_package_loads_the_saved_model(saved: Path) -> None:
    code = (
        "import sys; from transformers import AutoModelForCausalLM; import torch;"
        f"m = AutoModelForCausalLM.from_pretrained({str(saved)!r}, device_map='cpu');"
        "assert torch.isfinite(m(torch.tensor([[1, 5, 9]])).logits).all();"
        "assert not any(name.startswith('qcbguard') for name in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=saved)
    assert done.returncode == 0, done.stderr


def test_the_command_line_compares_a_saved_model_with_its_plan(saved: Path, guarded: Path) -> None:
    assert main(["verify", str(saved), "--plan", str(guarded)]) == 0


def test_other_codes_are_a_finding(saved: Path, guarded: Path, tmp_path: Path) -> None:
    """Quantized from the unguarded model: the same settings, and not the plan."""
    load(MODEL, GPTQConfig(**arguments(MODEL))).save_pretrained(tmp_path / "stock")
    report = verify(tmp_path / "stock", plan=guarded)
    assert report.num_tensors_as_planned == 0
    assert "of the codes are those planned" in report.tensors[0].reason
    guard_checkpoint(MODEL, tmp_path / "guarded", ["gptq-w3g128"], GUARDS["stochastic"])
    with pytest.raises(UsageError, match="groups of"):
        verify(tmp_path / "stock", plan=tmp_path / "guarded")
    with pytest.raises(CheckpointError, match="no folder of a model that was quantized"):
        verify(guarded, plan=guarded)


class TestDirectly:
    """``GPTQModel.load(...).quantize(...)`` without transformers' loader."""

    def quantize(self, model: Any, folder: Path) -> dict[str, torch.Tensor]:
        model.quantize(TEXTS, batch_size=1)
        model.save(str(folder))
        return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}

    def load(self, folder: Path, **settings: Any) -> Any:
        from gptqmodel import GPTQModel, QuantizeConfig

        return GPTQModel.load(str(folder), QuantizeConfig(bits=4, group_size=128, **settings), device="cpu")

    def test_a_guarded_folder_comes_through(self, guarded: Path, tmp_path: Path) -> None:
        self.quantize(self.load(guarded), tmp_path / "quantized")
        assert verify(tmp_path / "quantized", plan=guarded).clean

    def test_columns_sorted_by_their_inputs_come_through_where_the_groups_stay(
        self, guarded: Path, tmp_path: Path
    ) -> None:
        self.quantize(self.load(guarded, desc_act=True, static_groups=True), tmp_path / "quantized")
        assert verify(tmp_path / "quantized", plan=guarded).clean

    def test_guarding_in_place_equals_nothing_else_but_the_guard(self, tmp_path: Path) -> None:
        from qcbguard_plugins.hooks.gptqmodel import guard_gptq_model

        model = self.load(MODEL, offload_to_disk=False)
        report = guard_gptq_model(model, GUARDS["stochastic"])
        assert len(report.tensors) == 28 and report.formats
        model.model.save_pretrained(tmp_path / "guarded")
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "guarded")
        in_place = self.quantize(model, tmp_path / "in-place")
        by_folder = self.quantize(self.load(tmp_path / "guarded", offload_to_disk=False), tmp_path / "by-folder")
        assert in_place.keys() == by_folder.keys()
        assert all(torch.equal(in_place[key], by_folder[key]) for key in in_place)

    def test_the_route_that_loses_the_guard_is_refused(self) -> None:
        from qcbguard_plugins.hooks.gptqmodel import guard_gptq_model

        with pytest.raises(UnguardableError, match="offload_to_disk"):
            guard_gptq_model(self.load(MODEL), GUARDS["stochastic"])


class TestFailsClosed:
    def test_groups_that_depend_on_the_data_are_refused(self) -> None:
        from qcbguard_plugins import GuardedGPTQConfig

        with pytest.raises(UnguardableError, match="desc_act"):
            GuardedGPTQConfig(bits=4, group_size=128, desc_act=True)

    def test_a_guard_in_a_dict_is_refused(self) -> None:
        from qcbguard_plugins import GuardedGPTQConfig

        with pytest.raises(UsageError, match="without its guard"):
            load(MODEL, GuardedGPTQConfig(bits=4, dataset=TEXTS).to_dict())

    def test_a_quantized_checkpoint_is_refused(self, saved: Path) -> None:
        from qcbguard_plugins import GuardedGPTQConfig

        with pytest.raises(ValueError, match="GPTQConfig"):
            load(saved, GuardedGPTQConfig(**arguments(MODEL)))

    def test_codes_that_are_not_those_of_the_plan_end_the_load(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from qcbguard_plugins import GuardedGPTQConfig
        from qcbguard_plugins.hooks.transformers.gptq import GuardedGptqHfQuantizer

        guard_model = GuardedGptqHfQuantizer._guard_model

        def undo(self: Any, model: Any) -> None:
            before = {name: parameter.clone() for name, parameter in model.named_parameters()}
            guard_model(self, model)
            for name, parameter in model.named_parameters():
                parameter.data = before[name]

        monkeypatch.setattr(GuardedGptqHfQuantizer, "_guard_model", undo)
        with pytest.raises(VerificationError, match="28 layers"):
            load(MODEL, GuardedGPTQConfig(**arguments(MODEL), guard=GUARDS["stochastic"]))
