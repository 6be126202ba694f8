"""``activate()`` promises that every bitsandbytes load in its block is guarded: loaders that it cannot guard stop."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from accelerate import init_empty_weights
from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

import qcbguard_plugins
from qcbguard_plugins import guard_checkpoint
from qcbguard_plugins.errors import UnguardableError

LAYERS = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
CONSTRUCTORS = [kind.__init__ for kind in LAYERS]


def accelerate_config(mode: str) -> BnbQuantizationConfig:
    if mode == "int8":
        return BnbQuantizationConfig(load_in_8bit=True)
    return BnbQuantizationConfig(load_in_4bit=True, bnb_4bit_quant_type=mode, torch_dtype=torch.float32)


def quantized_layers(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LAYERS)]


@pytest.mark.parametrize("mode", ["nf4", "int8"])
@pytest.mark.parametrize("is_empty", [True, False])
def test_accelerate_is_stopped_in_the_block_and_not_outside(llama: Path, mode: str, is_empty: bool) -> None:
    if is_empty:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(llama))
    else:
        model = AutoModelForCausalLM.from_pretrained(llama)
    with (
        qcbguard_plugins.activate("stochastic"),
        pytest.raises(UnguardableError, match=r"accelerate\.utils\.bnb makes a Linear.* itself(?s:.*)qcbguard guard"),
    ):
        load_and_quantize_model(model, accelerate_config(mode), weights_location=llama)
    assert quantized_layers(model) == []
    # Where there is no GPU accelerate stops too, when the layers are there.
    with contextlib.suppress(RuntimeError, ValueError, TypeError):
        model = load_and_quantize_model(model, accelerate_config(mode), weights_location=llama)
    assert quantized_layers(model) or is_empty


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_diffusers_is_stopped_in_the_block(tmp_path: Path, mode: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, cross_attention_dim=64, num_layers=1, caption_channels=64,
        sample_size=8, in_channels=4, out_channels=8,
    )  # fmt: skip
    settings = {"load_in_8bit": True} if mode == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": mode}
    config = diffusers.BitsAndBytesConfig(**settings)

    def load() -> None:
        if torch.cuda.is_available():
            type(model).from_pretrained(tmp_path / "model", quantization_config=config)
        else:  # diffusers asks for a GPU before it begins; this is the step that it begins with
            quantizer = diffusers.quantizers.auto.DiffusersAutoQuantizer.from_config(config)
            quantizer._process_model_before_weight_loading(model, device_map=None)

    model.save_pretrained(tmp_path / "model")
    with (
        qcbguard_plugins.activate("stochastic"),
        pytest.raises(UnguardableError, match=r"diffusers\.quantizers\.bitsandbytes\.utils makes a Linear"),
    ):
        load()
    load()
    assert quantized_layers(model) or torch.cuda.is_available()


def test_a_layer_made_by_hand_is_stopped_in_nested_blocks_too() -> None:
    with qcbguard_plugins.activate("stochastic"), qcbguard_plugins.activate("stochastic"):
        for make in (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.LinearNF4, bitsandbytes.nn.Linear8bitLt):
            with pytest.raises(UnguardableError, match="makes a Linear"):
                make(64, 64)
    assert [kind.__init__ for kind in LAYERS] == CONSTRUCTORS
    assert bitsandbytes.nn.Linear4bit(64, 64).weight.shape == (64, 64)


def test_the_block_ends_with_an_error_and_leaves_nothing_behind() -> None:
    with pytest.raises(ZeroDivisionError), qcbguard_plugins.activate("stochastic"):
        raise ZeroDivisionError
    assert [kind.__init__ for kind in LAYERS] == CONSTRUCTORS


def test_guarded_loads_and_folders_work_in_nested_blocks(llama: Path, tmp_path: Path) -> None:
    with qcbguard_plugins.activate("stochastic"), qcbguard_plugins.activate("stochastic"):
        model = AutoModelForCausalLM.from_pretrained(
            llama, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        )
        guard_checkpoint(llama, tmp_path / "guarded", ["nf4"], "stochastic")
    assert quantized_layers(model) and model.config.qcbguard
