"""A dozen families of models, tiny: what stock loads the default loads, and text calibrates what it reaches."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BitsAndBytesConfig,
    CamembertConfig,
    CamembertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

from benchmarks.studies.tiny_families import VOCAB_SIZE, Family
from benchmarks.studies.zoo import quantized, same_state, train_tokenizer
from qcbguard_plugins import Calibration, Feedback, Guard, GuardedBitsAndBytesConfig, Stochastic, guard_checkpoint
from qcbguard_plugins.errors import CalibrationError
from qcbguard_plugins.pipeline.plan import make_plan

NF4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FEEDBACK = Guard(Feedback(), seed=7, calibration=Calibration(num_sequences=4, sequence_length=32))
BLIND = "no calibration text reaches it"


@dataclass(frozen=True)
class Expected:
    """What text reaches: parts of names of the layers that it does, and those of the others with the reason."""

    reached: tuple[str, ...]
    blind: tuple[str, ...] = ()
    why: str = BLIND


FAMILIES = {
    Family("causal", "mamba", "MambaForCausalLM"): Expected(("in_proj", "x_proj"), ("dt_proj",)),
    Family("causal", "openai-gpt", "OpenAIGPTLMHeadModel"): Expected(("attn", "mlp")),
    Family("causal", "gemma4_text", "Gemma4ForCausalLM"): Expected(("self_attn", "mlp", "per_layer_model_projection")),
    Family("causal", "jamba", "JambaForCausalLM"): Expected(("self_attn", "feed_forward"), ("dt_proj",)),
    Family("vision-language", "llava", "LlavaForConditionalGeneration"): Expected(
        ("language_model",), ("vision_tower", "multi_modal_projector")
    ),
    Family("vision-language", "git", "GitForCausalLM"): Expected(("git.encoder",), ("image_encoder",)),
    Family("vision-language", "gemma4", "Gemma4ForConditionalGeneration"): Expected(("language_model",)),
    Family("encoder-decoder", "t5", "T5ForConditionalGeneration"): Expected(("encoder", "decoder", "EncDecAttention")),
    Family("encoder-decoder", "bart", "BartForConditionalGeneration"): Expected(("encoder", "encoder_attn")),
    Family("speech", "whisper", "WhisperForConditionalGeneration"): Expected(
        (), ("encoder", "decoder"), "no token ids"
    ),
    Family("images", "clip", "CLIPModel"): Expected(("text_model",), ("vision_model", "visual_projection")),
    Family("images", "vit", "ViTForImageClassification"): Expected((), ("attention",), "no token ids"),
}


@pytest.fixture(scope="module")
def small_tokenizer() -> Any:
    return train_tokenizer()


def load(cls: Any, folder: Path, config: Any, **more: Any) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls.from_pretrained(folder, quantization_config=config, local_files_only=True, **more)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.class_name)
def test_the_default_loads_what_stock_loads(family: Family, small_tokenizer: Any, tmp_path: Path) -> None:
    expected, model, folder = FAMILIES[family], family.build(), tmp_path / "model"
    model.save_pretrained(folder)
    small_tokenizer.save_pretrained(folder)
    stock = load(type(model), folder, BitsAndBytesConfig(**NF4))
    guarded = load(type(model), folder, GuardedBitsAndBytesConfig(**NF4, guard=FEEDBACK))
    assert quantized(guarded) == quantized(stock)
    assert {target.layer for target in make_plan(folder, "nf4").targets} == quantized(stock)
    whys = {record.name: record.why_data_free for record in guarded.hf_quantizer.guard_report.tensors}
    assert {name.removesuffix(".weight") for name in whys} == quantized(stock)
    for part in expected.reached:
        assert "" in {why for name, why in whys.items() if part in name}, part
    for part in expected.blind:
        found = {why for name, why in whys.items() if part in name}
        assert found and all(expected.why in why for why in found), part
    if not expected.blind:
        assert set(whys.values()) == {""}
    guarded.save_pretrained(tmp_path / "saved")
    assert same_state(guarded, type(model).from_pretrained(tmp_path / "saved"))


def test_the_folder_and_the_load_choose_alike_where_text_reaches_a_part(small_tokenizer: Any, tmp_path: Path) -> None:
    model = Family("vision-language", "llava", "LlavaForConditionalGeneration").build()
    model.save_pretrained(tmp_path / "model")
    small_tokenizer.save_pretrained(tmp_path / "model")
    report = guard_checkpoint(tmp_path / "model", tmp_path / "guarded", ["nf4"], FEEDBACK)
    in_flight = load(type(model), tmp_path / "model", GuardedBitsAndBytesConfig(**NF4, guard=FEEDBACK))
    loaded = in_flight.hf_quantizer.guard_report
    assert {why: set(names) for why, names in report.data_free.items()} == {
        why: set(names) for why, names in loaded.data_free.items()
    }
    assert list(report.data_free) == [BLIND]
    assert same_state(load(type(model), tmp_path / "guarded", BitsAndBytesConfig(**NF4)), in_flight)


def bert(**changes: Any) -> BertConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertConfig(**{"vocab_size": VOCAB_SIZE, "max_position_embeddings": 128, **sizes, **changes})


def llama(**changes: Any) -> LlamaConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaConfig(**{"vocab_size": VOCAB_SIZE, "max_position_embeddings": 128, **sizes, **ids, **changes})


def camembert() -> CamembertConfig:
    """Two of its 34 positions lie before the first token."""
    shared = bert().to_dict() | {"max_position_embeddings": 34, "type_vocab_size": 1, "pad_token_id": 1}
    return CamembertConfig(**{key: value for key, value in shared.items() if key != "model_type"})


def overflowing() -> LlamaForCausalLM:
    """Its first feed-forward layer leaves what float16 holds."""
    model = LlamaForCausalLM(llama())
    with torch.no_grad():
        for name, factor in (("gate_proj", 1e3), ("up_proj", 1e3), ("down_proj", 1e4)):
            model.model.layers[0].mlp.get_submodule(name).weight.mul_(factor)
    return model


@dataclass(frozen=True)
class OddLoad:
    make: Callable[[], Any]
    cls: Any
    num_layers: int
    whys: tuple[str, ...] = ()
    with_tokenizer: bool = True
    options: tuple[tuple[str, Any], ...] = ()
    skipped: tuple[str, ...] = ()


ODD_LOADS = {
    "a new head on a base model": OddLoad(
        lambda: LlamaModel(llama()), AutoModelForSequenceClassification, 14, options=(("num_labels", 3),)
    ),
    "a new head on an encoder": OddLoad(
        lambda: BertModel(bert()), AutoModelForSequenceClassification, 13, options=(("num_labels", 3),)
    ),
    "a head of another size": OddLoad(
        lambda: BertForSequenceClassification(bert(num_labels=5)),
        AutoModelForSequenceClassification,
        14,
        ("", "another weight than calibration read"),
        options=(("num_labels", 3), ("ignore_mismatched_sizes", True)),
    ),
    "a tied head that the list does not name": OddLoad(
        lambda: LlamaForCausalLM(llama(tie_word_embeddings=True)), AutoModelForCausalLM, 12, skipped=("o_proj",)
    ),
    "a short context": OddLoad(lambda: LlamaForCausalLM(llama(max_position_embeddings=8)), AutoModelForCausalLM, 14),
    "positions from behind the padding": OddLoad(lambda: CamembertForMaskedLM(camembert()), AutoModelForMaskedLM, 13),
    "no tokenizer": OddLoad(lambda: LlamaForCausalLM(llama()), AutoModelForCausalLM, 14, with_tokenizer=False),
    "an encoder without a tokenizer": OddLoad(
        lambda: BertForMaskedLM(bert()), AutoModelForMaskedLM, 13, ("cannot write text itself",), with_tokenizer=False
    ),
    "overflow in float16": OddLoad(
        overflowing, AutoModelForCausalLM, 14, ("", "overflow"), options=(("dtype", torch.float16),)
    ),
    "overflow without a tokenizer": OddLoad(
        overflowing,
        AutoModelForCausalLM,
        14,
        ("breaks when it writes",),
        with_tokenizer=False,
        options=(("dtype", torch.float16),),
    ),
    "a tokenizer of another model": OddLoad(
        lambda: LlamaForCausalLM(llama(vocab_size=100)), AutoModelForCausalLM, 14, ("LlamaForCausalLM has 100 rows",)
    ),
}


@pytest.mark.parametrize("case", ODD_LOADS.values(), ids=ODD_LOADS.keys())
def test_the_default_finishes_every_load_that_stock_finishes(
    case: OddLoad, small_tokenizer: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    case.make().save_pretrained(tmp_path)
    if case.with_tokenizer:
        small_tokenizer.save_pretrained(tmp_path)
    skipped = {"llm_int8_skip_modules": list(case.skipped)} if case.skipped else {}
    stock = load(case.cls, tmp_path, BitsAndBytesConfig(**NF4, **skipped), **dict(case.options))
    guarded = load(
        case.cls, tmp_path, GuardedBitsAndBytesConfig(**NF4, **skipped, guard=FEEDBACK), **dict(case.options)
    )
    report = guarded.hf_quantizer.guard_report
    assert quantized(guarded) == quantized(stock)
    assert len(report.tensors) == len(quantized(stock)) == case.num_layers
    whys = {record.why_data_free for record in report.tensors}
    assert len(whys) == max(1, len(case.whys))
    for why in case.whys:
        assert any(why in found if why else not found for found in whys), why
    if not case.whys:
        assert whys == {""}


def test_a_tokenizer_in_the_folder_above_serves_a_subfolder(small_tokenizer: Any, tmp_path: Path) -> None:
    model = LlamaForCausalLM(llama())
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "inner")
    small_tokenizer.save_pretrained(tmp_path)
    guard = Guard(Feedback(), seed=7, calibration=Calibration("builtin", num_sequences=4, sequence_length=32))
    config = GuardedBitsAndBytesConfig(**NF4, guard=guard)
    assert same_state(
        load(AutoModelForCausalLM, tmp_path, config, subfolder="inner"), load(AutoModelForCausalLM, tmp_path, config)
    )
    (tmp_path / "config.json").unlink()
    with pytest.raises(CalibrationError, match="needs the model's tokenizer"):
        load(AutoModelForCausalLM, tmp_path / "inner", config)


def test_a_load_that_renames_its_weights_gets_its_own(small_tokenizer: Any, tmp_path: Path) -> None:
    """Calibration does not see ``key_mapping``: what it read is no weight of this load, and must not take its place."""
    model = LlamaForCausalLM(llama())
    model.save_pretrained(tmp_path / "plain")
    renamed = {name.replace("mlp.", "feed."): value for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "renamed", state_dict=renamed)
    for folder in ("plain", "renamed"):
        small_tokenizer.save_pretrained(tmp_path / folder)
    config = GuardedBitsAndBytesConfig(**NF4, guard=FEEDBACK)
    guarded = load(AutoModelForCausalLM, tmp_path / "renamed", config, key_mapping={r"feed\.": "mlp."})
    whys = {record.name: record.why_data_free for record in guarded.hf_quantizer.guard_report.tensors}
    assert {name for name, why in whys.items() if "another weight than calibration read" in why} == {
        name for name in whys if ".mlp." in name
    }
    data_free = GuardedBitsAndBytesConfig(**NF4, guard=Guard(Stochastic(), seed=7))
    expected = load(AutoModelForCausalLM, tmp_path / "plain", data_free).state_dict()
    found = guarded.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected if ".mlp." in key)
