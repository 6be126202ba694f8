"""Guarding inside from_pretrained equals guarding the folder and loading it with the stock tool, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import qcbguard_plugins
from qcbguard_plugins import (
    Calibration,
    Feedback,
    Guard,
    GuardedBitsAndBytesConfig,
    QuantGuard,
    Stochastic,
    guard_checkpoint,
)
from qcbguard_plugins.checkpoint.provenance import PROVENANCE_KEY
from qcbguard_plugins.errors import CalibrationError, CheckpointError, UnguardableError, UsageError, VerificationError
from qcbguard_plugins.hooks.transformers.on_the_fly import GuardedHfQuantizerMixin
from tests.conftest import SHAPES

MODES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
CALIBRATION = Calibration(num_sequences=8, sequence_length=64)
GUARDS = {
    "stochastic": Guard(Stochastic(), seed=7),
    "feedback": Guard(Feedback(), seed=7, calibration=CALIBRATION),
    "quantguard": Guard(QuantGuard(steps=2, harden=True), seed=7, calibration=CALIBRATION),
}


def load(folder: Path, config: Any, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **kwargs)


def same(one: Any, other: Any) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("method", GUARDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_loading_guarded_equals_guarding_the_folder(
    shape: str, mode: str, method: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    source, guard = model_folder(shape), GUARDS[method]
    report = guard_checkpoint(source, tmp_path / "guarded", [mode], guard)
    by_folder = load(tmp_path / "guarded", BitsAndBytesConfig(**MODES[mode]))
    in_flight = load(source, GuardedBitsAndBytesConfig(**MODES[mode], guard=guard))
    stock = load(source, BitsAndBytesConfig(**MODES[mode]))
    assert same(in_flight, by_folder)
    assert not same(in_flight, stock)
    assert in_flight.hf_quantizer.guard_report.codes_sha256 == report.codes_sha256
    assert type(in_flight.config.quantization_config) is BitsAndBytesConfig
    assert in_flight.quantization_method == stock.quantization_method


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_loading_in_another_dtype_is_guarded_on_its_grid(mode: str, dtype: torch.dtype, llama: Path) -> None:
    config = GuardedBitsAndBytesConfig(**MODES[mode], guard=GUARDS["stochastic"])
    report = load(llama, config, dtype=dtype).hf_quantizer.guard_report
    assert {tensor.read_dtype for tensor in report.tensors} == {str(dtype).removeprefix("torch.")}
    assert report.coverage == "14 of 14 target tensors guarded"


OPTIONS: dict[str, dict[str, Any]] = {
    "modules left out": MODES["nf4"] | {"llm_int8_skip_modules": ["lm_head", "o_proj"]},
    "packed into bfloat16": MODES["nf4"] | {"bnb_4bit_quant_storage": "bfloat16"},
    "computed in bfloat16": MODES["fp4"] | {"bnb_4bit_compute_dtype": "bfloat16"},
    "outlier columns": MODES["int8"] | {"llm_int8_threshold": 3.0},
    "int8 with modules left out": MODES["int8"] | {"llm_int8_skip_modules": ["down_proj"]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_the_options_of_bitsandbytes_keep_their_meaning(options: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    """What is left out is left alone, and the rest equals the guarded folder loaded with the same options."""
    stock_config = BitsAndBytesConfig(**options)
    mode = "int8" if stock_config.load_in_8bit else stock_config.bnb_4bit_quant_type
    stock = load(llama, stock_config)
    quantized = {name for name, module in stock.named_modules() if isinstance(module, (Linear4bit, Linear8bitLt))}
    in_flight = load(llama, GuardedBitsAndBytesConfig(**options, guard=GUARDS["stochastic"]))
    report = in_flight.hf_quantizer.guard_report
    assert {tensor.name.removesuffix(".weight") for tensor in report.tensors} == quantized
    left_out = [f"*{name}*" for name in stock_config.llm_int8_skip_modules or () if name != "lm_head"]
    guard_checkpoint(llama, tmp_path / "guarded", [mode], GUARDS["stochastic"], ignore=left_out)
    by_folder = load(tmp_path / "guarded", stock_config).state_dict()
    for name, value in in_flight.state_dict().items():
        if not name.startswith("lm_head"):  # a list of one's own takes the place of the default, which names it
            assert torch.equal(value.view(torch.uint8), by_folder[name].view(torch.uint8)), name


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_device_maps_change_nothing(device_map: Any, llama: Path) -> None:
    config = GuardedBitsAndBytesConfig(**MODES["nf4"], guard=GUARDS["stochastic"])
    assert same(load(llama, config, device_map=device_map), load(llama, config))


def _repack_as_a_forward_pass_does(model: Any) -> None:
    """On a processor where bitsandbytes repacks 4-bit weights; its kernel does not take all widths of this model."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False) and module.in_features % 64 == 0:
            weight = module.weight
            weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)


@pytest.mark.parametrize("mode", MODES)
def test_the_saved_model_is_stock(mode: str, llama: Path, tmp_path: Path) -> None:
    """Saved after a forward pass too, which repacks 4-bit weights on some processors."""
    guarded = load(llama, GuardedBitsAndBytesConfig(**MODES[mode], guard=GUARDS["stochastic"]))
    fresh = {key: value.clone() for key, value in guarded.state_dict().items()}
    guarded.save_pretrained(tmp_path / "before")
    _repack_as_a_forward_pass_does(guarded)
    guarded.save_pretrained(tmp_path / "after")
    for name in ("before", "after"):
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert saved.state_dict().keys() == fresh.keys()
        assert all(torch.equal(value, fresh[key]) for key, value in saved.state_dict().items()), name
        assert saved.config.qcbguard["num_tensors"] == 14
        assert saved.config.qcbguard["seed"] == 7
        assert "guard" not in saved.config.quantization_config.to_dict()
        with safe_open(tmp_path / name / "model.safetensors", framework="pt") as file:
            assert PROVENANCE_KEY in file.metadata()


def test_a_second_load_takes_the_calibrated_weights_from_the_cache(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a seed of the user's: the first load draws one, and the second finds the same result."""
    guard = Guard(Feedback(), calibration=CALIBRATION, cache_dir=tmp_path / "cache")
    first = load(llama, GuardedBitsAndBytesConfig(**MODES["nf4"], guard=guard))

    def no_calibration(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("calibrated twice")

    with monkeypatch.context() as patch:
        patch.setattr("qcbguard_plugins.hooks.transformers.calibrated_cache.guard_layers", no_calibration)
        second = load(llama, GuardedBitsAndBytesConfig(**MODES["nf4"], guard=guard))
    assert same(first, second)
    assert first.config.qcbguard["seed"] == second.config.qcbguard["seed"] is not None
    other = load(llama, GuardedBitsAndBytesConfig(**MODES["int8"], guard=guard))
    assert other.config.qcbguard["seed"] != first.config.qcbguard["seed"]


def test_the_cache_notices_a_changed_checkpoint(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    guard = Guard(Feedback(), calibration=CALIBRATION, cache_dir=tmp_path / "cache")
    config = GuardedBitsAndBytesConfig(**MODES["nf4"], guard=guard)
    folder = tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama-fp32"))
    model.save_pretrained(folder)
    before = load(folder, config).config.qcbguard["codes_sha256"]
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    model.save_pretrained(folder)
    assert load(folder, config).config.qcbguard["codes_sha256"] != before


@pytest.mark.parametrize("damage", ["record", "weights", "half a weight file"])
def test_a_damaged_cache_entry_is_made_again(damage: str, llama: Path, tmp_path: Path) -> None:
    guard = Guard(Feedback(), seed=7, calibration=CALIBRATION, cache_dir=tmp_path / "cache")
    config = GuardedBitsAndBytesConfig(**MODES["nf4"], guard=guard)
    expected = load(llama, config)
    (record,) = (tmp_path / "cache").glob("*/guarded.json")
    weights = record.with_name("guarded.safetensors")
    if damage == "record":
        record.write_text("{")
    elif damage == "weights":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:1000])
    assert same(load(llama, config), expected)
    assert same(load(llama, config), expected)


def test_a_cache_that_cannot_be_written_to_is_done_without(llama: Path, tmp_path: Path) -> None:
    """A file in the place of the folder: the tests may run as a user whom no permission stops."""
    (tmp_path / "file").write_text("")
    guard = Guard(Feedback(), seed=7, calibration=CALIBRATION, cache_dir=tmp_path / "file" / "cache")
    with pytest.warns(UserWarning, match="not kept for the next load"):
        model = load(llama, GuardedBitsAndBytesConfig(**MODES["nf4"], guard=guard))
    assert not model.hf_quantizer.guard_report.data_free
    own = replace(guard, cache_dir=tmp_path / "own")
    assert same(model, load(llama, GuardedBitsAndBytesConfig(**MODES["nf4"], guard=own)))


def test_activate_guards_stock_configurations_and_dicts(llama: Path) -> None:
    expected = load(llama, GuardedBitsAndBytesConfig(**MODES["nf4"], guard=GUARDS["stochastic"]))
    with qcbguard_plugins.activate(GUARDS["stochastic"]):
        by_object = load(llama, BitsAndBytesConfig(**MODES["nf4"]))
        by_dict = load(llama, dict(MODES["nf4"]))
    assert same(by_object, expected)
    assert same(by_dict, expected)
    assert not same(load(llama, BitsAndBytesConfig(**MODES["nf4"])), expected)


def test_a_state_dict_is_guarded_without_data(llama: Path) -> None:
    from transformers import LlamaForCausalLM

    source = LlamaForCausalLM.from_pretrained(llama)
    config = GuardedBitsAndBytesConfig(**MODES["nf4"], guard=GUARDS["stochastic"])
    model = LlamaForCausalLM.from_pretrained(
        None, config=source.config, state_dict=source.state_dict(), quantization_config=config
    )
    assert same(model, load(llama, config))


def test_a_state_dict_cannot_be_calibrated_on_and_is_guarded_without_data(llama: Path) -> None:
    from transformers import LlamaForCausalLM

    source = LlamaForCausalLM.from_pretrained(llama)
    with pytest.warns(UserWarning, match="14 of 14 tensors are guarded by stochastic rounding.*no checkpoint files"):
        model = LlamaForCausalLM.from_pretrained(
            None,
            config=source.config,
            state_dict=source.state_dict(),
            quantization_config=GuardedBitsAndBytesConfig(**MODES["nf4"], guard=Guard(Feedback(), seed=7)),
        )
    report = model.hf_quantizer.guard_report
    assert report.method == "stochastic"
    assert all("no checkpoint files" in tensor.why_data_free for tensor in report.tensors)
    assert same(model, load(llama, GuardedBitsAndBytesConfig(**MODES["nf4"], guard=GUARDS["stochastic"])))


class TestFailsClosed:
    """Nothing is ever loaded unguarded in silence."""

    @pytest.mark.parametrize(
        "extra", [{"guard": "stochastic"}, {"quant_method": "qcbguard_bitsandbytes_4bit"}], ids=str
    )
    def test_a_guard_in_a_dict_is_refused(self, extra: dict[str, str], llama: Path) -> None:
        with pytest.raises(UsageError, match="without its guard"):
            load(llama, {**MODES["nf4"], **extra})

    def test_a_guarded_configuration_turned_into_a_dict_is_refused(self, llama: Path) -> None:
        with pytest.raises(UsageError, match="without its guard"):
            load(llama, GuardedBitsAndBytesConfig(**MODES["nf4"]).to_dict())

    def test_a_quantized_checkpoint_is_refused(self, llama: Path, tmp_path: Path) -> None:
        load(llama, BitsAndBytesConfig(**MODES["nf4"])).save_pretrained(tmp_path / "quantized")
        with pytest.raises(ValueError, match="quantized with BitsAndBytesConfig"):
            load(tmp_path / "quantized", GuardedBitsAndBytesConfig(**MODES["nf4"]))
        with qcbguard_plugins.activate("stochastic"), pytest.raises(CheckpointError, match="quantized already"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")

    def test_no_tokenizer_for_a_source_that_needs_one(self, llama: Path, tmp_path: Path) -> None:
        AutoModelForCausalLM.from_pretrained(llama).save_pretrained(tmp_path / "bare")
        guard = Guard(Feedback(), calibration=Calibration(source="builtin"))
        with pytest.raises(CalibrationError, match="tokenizer"):
            load(tmp_path / "bare", GuardedBitsAndBytesConfig(**MODES["nf4"], guard=guard))

    def test_a_weight_that_cannot_be_guarded_is_named(self, llama: Path, tmp_path: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(llama)
        model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
        model.save_pretrained(tmp_path / "nan")
        with pytest.raises(UnguardableError, match=r"1 tensors.*\n.*layers\.1\.mlp\.down_proj\.weight"):
            load(tmp_path / "nan", GuardedBitsAndBytesConfig(**MODES["nf4"], guard="stochastic"))

    def test_a_quantizer_that_stores_other_codes_is_found_out(
        self, llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A quantizer with another rounding rule, as a future release might have."""
        from transformers.integrations.bitsandbytes import Bnb4bitQuantize

        convert = Bnb4bitQuantize.convert

        def nudged(self: Any, input_dict: dict[str, Any], **kwargs: Any) -> Any:
            return convert(
                self,
                {name: [value[0] * 1.0 + value[0].abs().max() * 0.1] for name, value in input_dict.items()},
                **kwargs,
            )

        monkeypatch.setattr(Bnb4bitQuantize, "convert", nudged)
        with pytest.raises(VerificationError, match="other codes than planned"):
            load(llama, GuardedBitsAndBytesConfig(**MODES["nf4"], guard="stochastic"))

    def test_a_tensor_that_bypasses_the_guard_is_found_out(self, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A transformers that stopped asking us for some tensors must not go unnoticed."""
        compare = GuardedHfQuantizerMixin.compare_with_plan

        def forgetful(self: Any, parameter: Any, record: Any) -> None:
            if "layers.1.mlp" not in record.name:
                compare(self, parameter, record)

        monkeypatch.setattr(GuardedHfQuantizerMixin, "compare_with_plan", forgetful)
        with pytest.raises(UnguardableError, match=r"3 tensors were quantized without passing the guard"):
            load(llama, GuardedBitsAndBytesConfig(**MODES["nf4"], guard="stochastic"))

    def test_nothing_to_quantize_is_refused(self) -> None:
        with pytest.raises(UnguardableError, match="quantizes nothing"):
            GuardedBitsAndBytesConfig()
        with pytest.raises(UsageError, match="unknown method"):
            GuardedBitsAndBytesConfig(**MODES["nf4"], guard="guard")
        with pytest.raises(UsageError, match="got int"):
            GuardedBitsAndBytesConfig(**MODES["nf4"], guard=3)


_LOAD_WITHOUT_THE_PACKAGE = """
import sys
sys.modules["qcbguard_plugins"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model.state_dict(), sys.argv[2])
"""


def test_a_machine_without_this_package_loads_the_same_model(llama: Path, tmp_path: Path) -> None:
    guarded = load(llama, GuardedBitsAndBytesConfig(**MODES["nf4"], guard=GUARDS["feedback"]))
    guarded.save_pretrained(tmp_path / "saved")
    command = [sys.executable, "-c", _LOAD_WITHOUT_THE_PACKAGE, str(tmp_path / "saved"), str(tmp_path / "state.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    expected = guarded.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)
