"""Predict which type ``llama-quantize`` gives each tensor.

A recipe such as Q4_K_M is a mix: most tensors take its base type, some roles in some layers another. The rules below
are those of llama.cpp of October 2026 without overrides. Where the user has the binary, its ``--dry-run`` is asked
instead (see :mod:`~qcbguard_plugins.backends.ggml.dry_run`).

References:
    llama.cpp ``src/llama-quant.cpp``: ``tensor_allows_quantization``, ``llama_tensor_get_type_impl``,
    ``tensor_type_fallback``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.grids.ggml_blocks import BLOCK_TYPES

# Base type of each recipe whose types can all be guarded.
RECIPES = {
    "Q4_0": "Q4_0", "Q4_1": "Q4_1", "Q5_0": "Q5_0", "Q5_1": "Q5_1", "Q8_0": "Q8_0",
    "Q2_K": "Q2_K", "Q2_K_S": "Q2_K", "Q3_K": "Q3_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K",
    "Q4_K": "Q4_K", "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q5_K": "Q5_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K",
    "Q6_K": "Q6_K", "IQ4_NL": "IQ4_NL", "IQ4_XS": "IQ4_XS",
}  # fmt: skip
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

# Parts of names that llama-quantize leaves alone. Names must also end in "weight".
_NEVER_QUANTIZED = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "time_mix_first.weight",
    "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight", "time_mix_v0.weight", "time_mix_v1.weight",
    "time_mix_v2.weight", "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight", "time_mix_g1.weight",
    "time_mix_g2.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight",
    "attn_rel_b.weight", ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd",
    ".patch_merger", "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
_NEVER_QUANTIZED_WHOLE = ("position_embd.weight", "token_types.weight")

_ROLES = (
    ("attn_qkv.weight", "attn_qkv"), ("attn_kv_b.weight", "attn_kv_b"), ("attn_v.weight", "attn_v"),
    ("attn_k.weight", "attn_k"), ("attn_q.weight", "attn_q"), ("attn_output.weight", "attn_output"),
    ("ffn_up", "ffn_up"), ("ffn_gate", "ffn_gate"), ("ffn_down", "ffn_down"),
)  # fmt: skip
_VALUES = ("attn_v", "attn_qkv", "attn_kv_b")


@dataclass(frozen=True)
class ModelShape:
    """What the rules look at besides names.

    Attributes:
        architecture: ``general.architecture`` of the GGUF file.
        num_layers: Number of blocks.
        num_heads: Attention heads.
        num_kv_heads: Key and value heads.
        num_experts: Experts a layer; 0 for a dense model.
    """

    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    num_experts: int = 0

    @property
    def heads_per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads if self.num_kv_heads else 0

    @property
    def is_70b(self) -> bool:
        """llama.cpp gives the values of 80-layer Llama-like models with grouped heads more bits."""
        return self.architecture in ("llama", "qwen2", "deci") and self.num_layers == 80 and self.heads_per_kv_head > 1


def resolve_recipe(name: str) -> str:
    """The recipe under its full name.

    Raises:
        UsageError: It is unknown, or holds types that cannot be guarded.
    """
    upper = name.upper()
    if upper not in RECIPES:
        raise UsageError(
            f"gguf:{name} is no recipe that can be guarded", remedy=f"Recipes: {', '.join(sorted(RECIPES))}."
        )
    return _ALIASES.get(upper, upper)


def is_quantized(name: str, num_dims: int) -> bool:
    """Whether ``llama-quantize`` quantizes a tensor of this name at all."""
    if num_dims < 2 or not name.endswith("weight") or name in _NEVER_QUANTIZED_WHOLE:
        return False
    return not any(part in name for part in _NEVER_QUANTIZED)


def predict_types(
    shapes: Iterable[tuple[str, tuple[int, ...]]], recipe: str, model: ModelShape, *, has_imatrix: bool = False
) -> dict[str, str]:
    """The type of every tensor that will be quantized.

    Args:
        shapes: GGUF names and shapes ``(..., rows, columns)`` of all tensors of the model.
        recipe: A full recipe name.
        model: Facts about the model.
        has_imatrix: Whether an importance matrix will be given.

    Returns:
        ggml type names by tensor name; ``F16`` for a tensor that no block fits.
    """
    entries = [(name, shape) for name, shape in shapes if is_quantized(name, _num_dims(shape))]
    mix = _Mix(recipe, model, has_imatrix, [name for name, _ in entries])
    # The layer counters of llama.cpp run in this order, non-layer tensors first.
    ordered = sorted(entries, key=lambda entry: (_layer(entry[0]), entry[0]))
    return {name: _fitting(mix.type_of(name, shape[-1]), shape[-1]) for name, shape in ordered}


def _num_dims(shape: tuple[int, ...]) -> int:
    """Dimensions as ggml counts them: leading ones do not count."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return len(shape)


def _layer(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _role(name: str) -> str:
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "token_embd"
    return next((role for part, role in _ROLES if part in name), "other")


def _fitting(type_name: str, num_columns: int) -> str:
    """The type, or what llama.cpp falls back to for rows that its blocks do not divide."""
    block_type = BLOCK_TYPES[type_name]
    if num_columns % block_type.block_size and block_type.fallback:
        block_type = BLOCK_TYPES[block_type.fallback]
    return "F16" if num_columns % block_type.block_size else block_type.name


class _Mix:
    """The rules of one recipe for one model; counts the roles as it goes, so tensors must come in llama.cpp's order."""

    def __init__(self, recipe: str, model: ModelShape, has_imatrix: bool, names: list[str]) -> None:
        self.recipe, self.model, self.has_imatrix = recipe, model, has_imatrix
        roles = [_role(name) for name in names]
        self.tied = "output" not in roles
        self.num_values = sum(role in _VALUES for role in roles)
        self.values_seen = 0
        self.downs_seen = 0

    def type_of(self, name: str, num_columns: int) -> str:
        base, role = RECIPES[self.recipe], _role(name)
        if role == "output" or (role == "token_embd" and self.tied):
            return self._output(base, num_columns)
        if role in _VALUES:
            chosen = self._values(base)
            self.values_seen += 1
            return chosen
        if role == "ffn_down":
            layer = _layer(name) if self.model.num_experts > 1 else self.downs_seen
            self.downs_seen += 1
            return self._down(base, layer)
        if role == "attn_k" and self.model.num_experts == 8:
            return "Q8_0"
        if role == "attn_output":
            return self._attention_output(base)
        return base

    def _output(self, base: str, num_columns: int) -> str:
        if self.model.architecture == "falcon" or num_columns % BLOCK_TYPES[base].block_size:
            return "Q8_0"
        return base if base == "Q8_0" else "Q6_K"

    def _more_bits(self, index: int, count: int) -> bool:
        return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2

    def _values(self, base: str) -> str:
        grouped = self.model.heads_per_kv_head >= 4
        chosen = {
            "Q2_K": "Q4_K" if grouped else "Q3_K",
            "Q2_K_S": "Q4_K" if grouped else base,
            "Q3_K_M": "Q5_K" if self.values_seen < 2 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "IQ4_NL": "Q5_K" if grouped else base,
            "IQ4_XS": "Q5_K" if grouped else base,
            "Q4_K_M": "Q6_K" if self._more_bits(self.values_seen, self.num_values) else base,
            "Q5_K_M": "Q6_K" if self._more_bits(self.values_seen, self.num_values) else base,
            "Q4_K_S": "Q5_K" if self.values_seen < 4 else base,
        }.get(self.recipe, base)
        if self.model.is_70b and chosen in ("Q3_K", "Q4_K"):
            chosen = "Q5_K"
        return "Q8_0" if self.model.num_experts == 8 else chosen

    def _down(self, base: str, layer: int) -> str:
        count = self.model.num_layers
        first_eighth, more_bits = layer < count // 8, self._more_bits(layer, count)
        falcon = self.model.architecture == "falcon"
        if falcon and self.recipe in ("Q3_K_M", "Q3_K_L", "Q4_K_M", "Q4_K_S"):
            first = layer < count // 16
            return {
                "Q3_K_M": "Q5_K" if first else "Q4_K" if more_bits else "Q3_K",
                "Q3_K_L": "Q4_K",
                "Q4_K_M": "Q6_K" if first else "Q5_K" if more_bits else "Q4_K",
                "Q4_K_S": base,
            }[self.recipe]
        return {
            "Q2_K": "Q3_K",
            "Q2_K_S": "Q4_K" if first_eighth else base,
            "Q3_K_M": "Q5_K" if layer < count // 16 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "Q4_K_M": "Q6_K" if more_bits else base,
            "Q5_K_M": "Q6_K" if more_bits else base,
            "Q4_K_S": "Q5_K" if first_eighth else base,
            "IQ4_NL": "Q5_K" if first_eighth and not self.has_imatrix else base,
            "IQ4_XS": "Q5_K" if first_eighth and not self.has_imatrix else base,
            "Q4_0": "Q4_1" if first_eighth and self.has_imatrix else base,
            "Q5_0": "Q5_1" if first_eighth and self.has_imatrix else base,
        }.get(self.recipe, base)

    def _attention_output(self, base: str) -> str:
        if self.model.architecture == "falcon":
            return "Q4_K" if self.recipe == "Q3_K_L" else base
        if self.model.num_experts == 8:
            mixed = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS")
            return "Q5_K" if self.recipe in mixed else base
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(self.recipe, base)
