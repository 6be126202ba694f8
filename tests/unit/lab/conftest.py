"""A small model and its tokenizer, for the tests of the lab; each module has pairs of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from qcbguard_plugins.lab.corpus import Pair
from qcbguard_plugins.lab.training import ModelSize, build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TINY = ModelSize(vocab_size=320, hidden_size=64, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=1)


@pytest.fixture(scope="module")
def tokenizer(pairs: list[Pair]) -> PreTrainedTokenizerFast:
    return build_tokenizer(pairs, TINY.vocab_size)
