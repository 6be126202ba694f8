"""The predictor of types, against known outcomes of llama-quantize."""

from __future__ import annotations

import pytest

from qcbguard_plugins.backends.ggml.recipes import ModelShape, is_quantized, predict_types, resolve_recipe
from qcbguard_plugins.errors import UsageError

LLAMA = ModelShape("llama", num_layers=8, num_heads=8, num_kv_heads=8)


def shapes(num_layers: int = 8, columns: int = 256, tied: bool = False) -> list[tuple[str, tuple[int, ...]]]:
    found: list[tuple[str, tuple[int, ...]]] = [
        ("token_embd.weight", (64, columns)),
        ("output_norm.weight", (columns,)),
    ]
    if not tied:
        found.append(("output.weight", (64, columns)))
    for i in range(num_layers):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            found.append((f"blk.{i}.{part}.weight", (columns, columns)))
    return found


def test_q4_k_m_gives_some_layers_more_bits() -> None:
    types = predict_types(shapes(), "Q4_K_M", LLAMA)
    assert types["output.weight"] == "Q6_K"
    assert types["token_embd.weight"] == "Q4_K"
    more = [i for i in range(8) if types[f"blk.{i}.ffn_down.weight"] == "Q6_K"]
    assert more == [i for i in range(8) if types[f"blk.{i}.attn_v.weight"] == "Q6_K"] == [0, 3, 6, 7]
    assert types["blk.0.attn_q.weight"] == "Q4_K"
    assert "output_norm.weight" not in types


def test_a_tied_table_is_the_output() -> None:
    assert predict_types(shapes(tied=True), "Q4_K_M", LLAMA)["token_embd.weight"] == "Q6_K"


@pytest.mark.parametrize(
    ("recipe", "fallback"),
    [
        ("Q4_K_M", "Q5_0"),
        ("Q5_K_M", "Q5_1"),
        ("Q6_K", "Q8_0"),
        ("Q2_K", "Q4_0"),
        ("IQ4_XS", "IQ4_NL"),
        ("Q4_0", "Q4_0"),
    ],
)
def test_rows_that_256_does_not_divide(recipe: str, fallback: str) -> None:
    assert predict_types(shapes(columns=96), recipe, LLAMA)["blk.1.attn_q.weight"] == fallback
    assert predict_types(shapes(columns=100), recipe, LLAMA)["blk.1.attn_q.weight"] == "F16"


def test_names() -> None:
    assert resolve_recipe("q4_k") == "Q4_K_M"
    with pytest.raises(UsageError, match="gguf:Q7_K is no recipe"):
        resolve_recipe("Q7_K")
    assert not is_quantized("blk.0.attn_norm.weight", 2)
    assert not is_quantized("blk.0.attn_q.bias", 2)
    assert not is_quantized("blk.0.ffn_gate_inp.weight", 2)
    assert not is_quantized("blk.0.attn_q.weight", 1)
