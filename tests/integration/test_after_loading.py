"""A promise holds as long as the weights do: merged, dequantized, cut and copied models, with real peft."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from bitsandbytes.nn.modules import has_avx512bf16
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qcbguard_plugins import GuardedBitsAndBytesConfig
from qcbguard_plugins.checkpoint.provenance import PROVENANCE_KEY
from qcbguard_plugins.errors import CheckpointError
from tests.conftest import VOCAB_SIZE

MODES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
TOKENS = torch.arange(3, 35).view(2, 16)

repacks = pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes repacks only with AVX512-BF16")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widths that bitsandbytes' kernel for AVX512-BF16 takes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
    )
    folder = tmp_path_factory.mktemp("source")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def load(source: Path) -> Callable[[str], Any]:
    def load_in(mode: str) -> Any:
        config = GuardedBitsAndBytesConfig(**MODES[mode], guard="stochastic")
        return AutoModelForCausalLM.from_pretrained(source, quantization_config=config).eval()

    return load_in


@torch.no_grad()
def run(model: Any) -> None:
    model(input_ids=TOKENS)


def weights(model: Any) -> dict[str, torch.Tensor]:
    """The 4-bit weights in full precision, read before any forward pass."""
    return {
        name: dequantize_4bit(module.weight.data, module.weight.quant_state).clone()
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }


def is_described_as_guarded(folder: Path) -> set[str]:
    """The places of a saved folder that say it was guarded."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        header = {"header"} if PROVENANCE_KEY in file.metadata() else set()
    return header | ({"config"} if f'"{PROVENANCE_KEY}"' in (folder / "config.json").read_text() else set())


def with_adapter(model: Any) -> Any:
    """An adapter that changes what it is put on."""
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    return adapted.eval()


@pytest.mark.parametrize("mode", MODES)
def test_an_untouched_model_is_saved_exactly_and_described(
    mode: str, load: Callable[[str], Any], tmp_path: Path
) -> None:
    model = load(mode)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    run(model)
    model.save_pretrained(tmp_path / "saved")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert is_described_as_guarded(tmp_path / "saved") == {"config", "header"}


def test_a_copy_that_was_run_is_saved_exactly(load: Callable[[str], Any], tmp_path: Path) -> None:
    model = load("nf4")
    expected = weights(model)
    twin = copy.deepcopy(model)
    run(twin)
    twin.save_pretrained(tmp_path / "saved")
    again = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_reading_the_state_between_running_and_saving_changes_nothing(
    load: Callable[[str], Any], tmp_path: Path
) -> None:
    """``state_dict`` puts the codes back and leaves the scales rounded, so nothing looks repacked any more."""
    model = load("nf4")
    expected = weights(model)
    run(model)
    model.state_dict()
    model.save_pretrained(tmp_path / "saved")
    again = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
    assert all(torch.equal(again[name], expected[name]) for name in expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_merged_model_is_saved_as_it_is_and_no_longer_described(
    mode: str, load: Callable[[str], Any], tmp_path: Path
) -> None:
    merged = with_adapter(load(mode)).merge_and_unload()
    expected = {key: value.clone() for key, value in merged.state_dict().items()}
    with pytest.warns(UserWarning, match="no longer described as guarded: 6 of its weights were changed"):
        merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(again[key], expected[key]) for key in expected)
    assert is_described_as_guarded(tmp_path / "merged") == set()


@repacks
def test_a_merged_model_that_was_run_cannot_be_saved_exactly(load: Callable[[str], Any], tmp_path: Path) -> None:
    merged = with_adapter(load("nf4")).merge_and_unload()
    run(merged)
    with pytest.raises(CheckpointError, match=r"6 layers were changed after loading.*\n.*q_proj"):
        merged.save_pretrained(tmp_path / "merged")


def test_a_dequantized_model_is_no_longer_described(load: Callable[[str], Any], tmp_path: Path) -> None:
    model = load("nf4")
    expected = weights(model)
    with pytest.warns(UserWarning, match="no longer quantized"):
        plain = model.dequantize()
    run(plain)
    plain.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    for name, weight in expected.items():
        assert torch.equal(again.get_submodule(name).weight.data, weight.to(again.dtype))
    assert is_described_as_guarded(tmp_path / "plain") == set()


def test_a_model_that_lost_a_block_keeps_its_scales_and_loses_its_claim(
    load: Callable[[str], Any], tmp_path: Path
) -> None:
    model = load("nf4")
    expected = weights(model)
    del model.model.layers[1]
    model.config.num_hidden_layers = 2
    for number, block in enumerate(model.model.layers):
        block.self_attn.layer_idx = number
    run(model)
    with pytest.warns(UserWarning, match="weights were changed after loading"):
        model.save_pretrained(tmp_path / "cut")
    again = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "cut"))
    moved = {name: expected[name.replace("layers.1.", "layers.2.")] for name in again}
    assert all(torch.equal(again[name], moved[name]) for name in again)
    assert is_described_as_guarded(tmp_path / "cut") == set()


def test_other_scales_beside_the_same_codes_end_the_claim(load: Callable[[str], Any], tmp_path: Path) -> None:
    model = load("nf4")
    model.model.layers[0].mlp.up_proj.weight.quant_state.absmax *= 2
    with pytest.warns(UserWarning, match=r"layers\.0\.mlp\.up_proj"):
        model.save_pretrained(tmp_path / "scaled")
    assert is_described_as_guarded(tmp_path / "scaled") == set()


def test_saving_an_adapter_names_the_unguarded_base_once(
    load: Callable[[str], Any], source: Path, tmp_path: Path
) -> None:
    model = load("nf4")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.state_dict()
    adapted = with_adapter(model)
    with pytest.warns(UserWarning, match=f"names {source} as its base, and that is not guarded"):
        adapted.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted.save_pretrained(tmp_path / "again")
