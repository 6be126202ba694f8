"""Any model family of transformers, tiny: its configuration shrunk by the names of its fields."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB_SIZE = 320
_LENGTH = 24
_IMAGE_SIZE = 32

# Kinds of models, and the lists of transformers' auto classes that name their families.
KINDS: Mapping[str, Sequence[str]] = {
    "causal": ("CAUSAL_LM",),
    "vision-language": ("IMAGE_TEXT_TO_TEXT",),
    "encoder-decoder": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "speech": ("SPEECH_SEQ_2_SEQ", "CTC", "AUDIO_CLASSIFICATION"),
    "other multimodal": ("MULTIMODAL_LM", "RETRIEVAL"),
    "masked": ("MASKED_LM",),
    "images": ("IMAGE_CLASSIFICATION", "ZERO_SHOT_IMAGE_CLASSIFICATION"),
}

# The first rule whose pattern is the whole field name gives the largest value that it may keep.
_RULES: Sequence[tuple[str, int]] = (
    (r"vocab_size|.*_vocab_size|vocab_size_.*", VOCAB_SIZE),
    (r"num_experts_per_tok|moe_topk?|top_k_experts|num_selected_experts|moe_k|num_experts_per_token", 2),
    (r".*num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_experts|n_experts", 4),
    (r"attn_layer_period", 2),
    (r"attn_layer_offset", 1),
    (r"n_groups|mamba_n_groups|mamba_ngroups|n_group|topk_group|n_shared_experts|moe_num_shared_experts", 1),
    (r".*(max_position_embeddings|n_positions|n_ctx|max_sequence_length|max_seq_len|max_source_positions)", 128),
    (r"max_target_positions|seq_length|max_length", 128),
    (r"num_key_value_heads|num_kv_heads|.*num_key_value_heads|multi_query_group_num", 2),
    (r".*(num_.*heads|n_heads?|_heads)", 4),
    (r"qk_head_dim", 32),
    (r"mamba_(d_head|head_dim)", 32),
    (r"head_dim|d_kv|kv_channels|.*_head_dim|attention_head_size", 16),
    (r".*(num_.*layers|n_layers?|depth|num_blocks|_layers|num_hidden_blocks)", 2),
    (r".*(ffn_dim|intermediate_size|d_ff|n_inner|ffn_hidden_size|mlp_dim|_ffn_size|inner_dim|dim_ff|dff)", 128),
    (r"rotary_dim", 8),
    (r"q_lora_rank|kv_lora_rank|.*_lora_rank|.*_rank", 32),
    (r"qk_rope_head_dim|qk_nope_head_dim|v_head_dim", 16),
    (r".*(hidden_size|d_model|n_embd|embed_dim|hidden_dim|projection_dim|embedding_size|embed_proj_dim|dim_model)", 64),
    (r".*hidden_size.*|dim|out_hidden_size|emb_dim|width", 64),
    (r"image_size|input_size", _IMAGE_SIZE),
    (r"patch_size", 8),
    (r"num_mel_bins|num_mel_channels", 16),
    (r".*(window_size|sliding_window|chunk_size|attention_chunk_size|block_size)", 16),
)
# Rotary embeddings in sections whose default fits no small head.
_SECTIONED = ("qwen2_vl_text", "qwen2_5_vl_text")
_TOKEN = re.compile(r".*_token_(id|index)|.*_token_ids?")


def shrink(config: Any) -> Any:
    """Make a configuration small, those inside it included."""
    before = dict(vars(config))
    for name, value in before.items():
        if isinstance(value, transformers.PreTrainedConfig):
            shrink(value)
        elif isinstance(value, int) and not isinstance(value, bool) and not name.startswith("_"):
            _set(config, name, _smaller(name, value))
    layers = getattr(config, "num_hidden_layers", None)
    for name, value in before.items():
        if isinstance(layers, int) and isinstance(value, list) and len(value) > layers and "_type" in name:
            _set(config, name, (list(dict.fromkeys(value)) + value)[:layers])
        elif (
            isinstance(layers, int) and isinstance(value, dict) and value and all(isinstance(key, int) for key in value)
        ):
            _set(config, name, {key: part for key, part in value.items() if key < layers})
        elif isinstance(value, dict) and "mrope_section" in value:
            value["mrope_section"] = [2, 3, 3]
    _keep_in_step(config, before)
    return config


def _smaller(name: str, value: int) -> int:
    if _TOKEN.fullmatch(name):
        return value if value < VOCAB_SIZE else VOCAB_SIZE - 1 - sum(map(ord, name)) % 20
    return min(value, next((limit for pattern, limit in _RULES if re.fullmatch(pattern, name)), value))


def _keep_in_step(config: Any, before: Mapping[str, Any]) -> None:
    """Fields that must agree with others."""
    heads = before.get("num_attention_heads")
    if heads is not None and heads == before.get("num_key_value_heads"):
        _set(config, "num_key_value_heads", config.num_attention_heads)
    if {"expand", "num_heads", "head_dim"} <= before.keys():
        _set(config, "head_dim", config.expand * config.hidden_size // config.num_heads)


def _set(config: Any, name: str, value: Any) -> None:
    with contextlib.suppress(AttributeError, ValueError, TypeError):
        setattr(config, name, value)


@dataclass(frozen=True)
class Family:
    """One class of models.

    Attributes:
        kind: A key of :data:`KINDS`.
        model_type: As in ``config.json``.
        class_name: Name of the class in transformers.
    """

    kind: str
    model_type: str
    class_name: str

    def build(self) -> Any:
        """A model with random weights."""
        torch.manual_seed(0)
        config = CONFIG_MAPPING[self.model_type]()
        if self.model_type.startswith("gemma4"):  # its layers differ by their number, which is fixed when it is made
            short = {"num_hidden_layers": 2, "num_kv_shared_layers": 0}
            config = type(config)(**(short if self.model_type.endswith("_text") else {"text_config": short}))
        config = shrink(config)
        return getattr(transformers, self.class_name)(config).eval()


def families(kinds: Sequence[str]) -> Iterator[Family]:
    """All families of some kinds, each class once."""
    seen = set()
    for kind in kinds:
        for mapping in KINDS[kind]:
            for model_type, classes in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
                for name in [classes] if isinstance(classes, str) else classes:
                    if (model_type, name) not in seen and hasattr(transformers, name) and model_type in CONFIG_MAPPING:
                        seen.add((model_type, name))
                        yield Family(kind, model_type, name)


@torch.no_grad()
def outputs(model: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    """The floating-point tensors that a forward pass gives."""
    result = model(**inputs)
    return [value for value in result.values() if isinstance(value, Tensor) and value.is_floating_point()]


def working_inputs(model: Any) -> dict[str, Any] | None:
    """Inputs on which a model runs; ``None`` where none of the guesses is right."""
    for inputs in _guesses(model):
        with contextlib.suppress(Exception):
            if outputs(model, inputs):
                return inputs
    return None


def _guesses(model: Any) -> Iterator[dict[str, Any]]:
    takes = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB_SIZE - 40, (2, _LENGTH), generator=generator)
    text = {name: ids for name in ("input_ids", "decoder_input_ids") if name in takes}
    channels = getattr(getattr(model.config, "vision_config", model.config), "num_channels", 3)
    side = getattr(getattr(model.config, "vision_config", model.config), "image_size", _IMAGE_SIZE)
    side = side if isinstance(side, int) else _IMAGE_SIZE
    pixels = torch.rand(2, channels if isinstance(channels, int) else 3, side, side, generator=generator)
    bins = getattr(model.config, "num_mel_bins", 16)
    sounds = {
        "input_features": [torch.rand(2, bins, 256), torch.rand(2, 64, bins)],
        "input_values": [torch.rand(2, 4000), torch.rand(2, 64, bins), torch.rand(2, 1, 4000)],
    }
    if "input_ids" in takes:
        yield text
    if "pixel_values" in takes:
        yield {**text, "pixel_values": pixels}
    for name, values in sounds.items():
        if name in takes:
            decoder = {key: value for key, value in text.items() if key != "input_ids"}
            for value in values:
                yield {**decoder, name: value}
                yield {**text, name: value}
