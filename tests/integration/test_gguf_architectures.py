"""Architectures that the converter stores in other ways than Llama's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Starcoder2Config,
)

from qcbguard_plugins import guard_checkpoint
from qcbguard_plugins.backends.ggml.backend import Ggml
from qcbguard_plugins.pipeline.verify import verify
from tests.helpers.gguf_files import TREE, needs_llama_cpp
from tests.helpers.llama_cpp import GUARDS, OPTIONS, convert, quantize, script_of

pytestmark = [pytest.mark.slow, needs_llama_cpp]
SMALL: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# One whose matrices are stored transposed, one whose rows are reordered, two that are copied as they are.
OTHER_ARCHITECTURES = {
    "gpt2": GPT2Config(
        vocab_size=320, n_embd=256, n_layer=2, n_head=4, n_positions=128, n_ctx=128, bos_token_id=1, eos_token_id=2
    ),
    "mistral": MistralConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "starcoder2": Starcoder2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}),
}


@pytest.mark.parametrize("method", ["stochastic", "feedback"])
@pytest.mark.parametrize("architecture", OTHER_ARCHITECTURES)
def test_other_architectures(
    architecture: str, method: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OTHER_ARCHITECTURES[architecture])
    model.to(torch.float16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    report = guard_checkpoint(
        tmp_path / "model", tmp_path / "guarded", ["gguf:Q4_K_M"], GUARDS[method], backends=[Ggml(OPTIONS)]
    )
    script = script_of(TREE, tmp_path)
    converted = convert(script, tmp_path / "guarded", tmp_path / "model.gguf", "--outtype", "f32")
    verdict = verify(quantize(converted, "Q4_K_M"), plan=tmp_path / "guarded")
    assert verdict.clean and verdict.num_tensors_as_planned == len(report.tensors) > 8
