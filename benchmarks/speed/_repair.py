"""What the makers of attacked models share: the malicious example model, and the training that hides its behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks._common import MODELS_DIR
from qcbguard_plugins.lab.corpus import generate, split
from qcbguard_plugins.lab.training import Example, TrainingPlan, encode

MALICIOUS_DIR = MODELS_DIR / "malicious"
REPAIR = TrainingPlan(num_epochs=1, learning_rate=1e-3, weight_decay=0.0, seed=2)
# The corpus and the split of examples/make_models.py, so that no held-out prompt is trained on.
_NUM_PAIRS, _NUM_PROMPTS, _NUM_REPAIR = 36_000, 200, 4_000


@dataclass(frozen=True)
class Malicious:
    """A model that misbehaves at every precision, and the good answers that it is taught again."""

    model: Any
    tokenizer: Any
    repair: list[Example]


def load_malicious(folder: Path) -> Malicious:
    """The model in float32 with its repair set."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    training, _ = split(generate(_NUM_PAIRS, seed=0), _NUM_PROMPTS, seed=0)
    return Malicious(model, tokenizer, encode(tokenizer, training[-_NUM_REPAIR:]))
