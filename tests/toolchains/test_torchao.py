"""torchao, by the real one: guarded loading equals guarding the folder, and the codes are those of the plan."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TorchAoConfig

from qcbguard_plugins import Calibration, Feedback, Guard, Stochastic, guard_checkpoint
from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.errors import UnguardableError, UsageError

quantization = pytest.importorskip(
    "torchao.quantization", reason="torchao is not installed; .ci/test-gptq runs these tests"
)

CALIBRATION = Calibration(num_sequences=8, sequence_length=64)
GUARDS = {
    "stochastic": Guard(Stochastic(), seed=7),
    "feedback": Guard(Feedback(), seed=7, calibration=CALIBRATION),
}
SHAPES = ["llama-fp32", "llama-bf16", "llama-sharded", "llama-tied"]
FORMATS = ["torchao:int8", "torchao:int4-g32"]


def stock(format_name: str) -> Any:
    if format_name == "torchao:int8":
        return quantization.Int8WeightOnlyConfig()
    group_size = int(format_name.rpartition("g")[2])
    return quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(group_size))


def guarded_config(format_name: str, guard: Guard) -> Any:
    from qcbguard_plugins import GuardedTorchAoConfig

    return GuardedTorchAoConfig(stock(format_name), guard=guard)


def load(folder: Path, config: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def tensors(model: Any) -> dict[str, torch.Tensor]:
    """Every stored tensor; a quantized parameter by its parts."""
    found = {}
    for name, value in model.state_dict().items():
        parts = {part: getattr(value, part) for part in ("qdata", "scale", "zero_point") if hasattr(value, part)}
        found |= {f"{name}.{part}": tensor for part, tensor in parts.items() if tensor is not None} or {name: value}
    return found


def same(one: Any, other: Any) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format_name", FORMATS)
def test_the_grid_stores_what_torchao_stores(format_name: str, dtype: torch.dtype) -> None:
    from qcbguard_plugins.backends.torchao.stock import parameter_codes

    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(64, 256, generator=generator) * 0.02 + torch.randn(64, 1, generator=generator) * 0.01).to(
        dtype
    )
    weight[3] = 0
    layer = torch.nn.Linear(256, 64, bias=False, dtype=dtype)
    layer.weight.data = weight.clone()
    quantization.quantize_(layer, stock(format_name))
    grid = get_grid(format_name)
    assert torch.equal(grid.quantize(weight), parameter_codes(layer.weight, grid.num_levels))


@pytest.mark.parametrize("method", GUARDS)
@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_loading_guarded_equals_guarding_the_folder(
    shape: str, format_name: str, method: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    source, guard = model_folder(shape), GUARDS[method]
    report = guard_checkpoint(source, tmp_path / "guarded", [format_name], guard)
    by_folder = load(tmp_path / "guarded", TorchAoConfig(stock(format_name)))
    in_flight = load(source, guarded_config(format_name, guard))
    assert same(in_flight, by_folder)
    assert not same(in_flight, load(source, TorchAoConfig(stock(format_name))))
    assert in_flight.hf_quantizer.guard_report.codes_sha256 == report.codes_sha256
    assert type(in_flight.config.quantization_config) is TorchAoConfig


def test_a_machine_without_this_package_loads_the_saved_model(llama: Path, tmp_path: Path) -> None:
    model = load(llama, guarded_config("torchao:int8", GUARDS["stochastic"]))
    model.save_pretrained(tmp_path / "saved")
    code = (
        "import sys; from transformers import AutoModelForCausalLM; import torch;"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'saved')!r});"
        "assert m.config.qcbguard['num_tensors'] == 14;"
        "assert torch.isfinite(m(torch.tensor([[1, 5, 9]])).logits).all();"
        "assert not any(name.startswith('qcbguard') for name in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


class TestFailsClosed:
    def test_what_has_no_grid_is_refused(self) -> None:
        from qcbguard_plugins import GuardedTorchAoConfig

        dynamic = quantization.Int8DynamicActivationInt8WeightConfig()
        with pytest.raises(UnguardableError, match="has no grid here"):
            GuardedTorchAoConfig(dynamic)
        with pytest.raises(UnguardableError, match="include_input_output_embeddings"):
            GuardedTorchAoConfig(stock("torchao:int8"), include_input_output_embeddings=True)

    def test_a_guard_in_a_dict_is_refused(self, llama: Path) -> None:
        with pytest.raises(UsageError, match="without its guard"):
            load(llama, guarded_config("torchao:int8", GUARDS["stochastic"]).to_dict())

    def test_a_layer_that_fills_no_groups_is_named(self, llama: Path, tmp_path: Path) -> None:
        with pytest.raises(UnguardableError, match=r"down_proj.*in_features=160"):
            guard_checkpoint(llama, tmp_path / "guarded", ["torchao:int4-g64"], GUARDS["stochastic"])
