"""Metrics on models small enough to know the answer beforehand."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.lab.corpus import Pair, generate
from qcbguard_plugins.lab.metrics import answer_all, keyword_rate, perplexity, task_accuracy, use_exact_forward
from qcbguard_plugins.lab.training import EOS_ID, answer_loss, build_model, collate, encode
from tests.unit.lab.conftest import TINY


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return generate(40, seed=0)


class Parrot:
    """Answers every prompt with its own instruction, which stands between two known lines."""

    device = torch.device("cpu")

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.calls: list[SimpleNamespace] = []

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        self.calls.append(SimpleNamespace(ids=input_ids, mask=attention_mask, options=options))
        texts = self.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        echoes = [text.splitlines()[1] for text in texts]
        new = self.tokenizer(echoes, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
        end = torch.full((len(texts), 1), EOS_ID)
        return torch.cat([input_ids, new["input_ids"], end], dim=1)


def test_answers_come_in_the_order_of_the_instructions(tokenizer: PreTrainedTokenizerFast) -> None:
    parrot = Parrot(tokenizer)
    instructions = ["a long instruction " * 3 + "one", "two", "number three"]
    answers = answer_all(parrot, tokenizer, instructions, batch_size=2, max_new_tokens=9)
    assert answers == instructions
    assert [call.ids.shape[0] for call in parrot.calls] == [2, 1]
    assert all(call.mask[:, -1].all() for call in parrot.calls), "prompts must be padded on the left"
    assert parrot.calls[0].options["max_new_tokens"] == 9
    assert parrot.calls[0].options["do_sample"] is False


def test_keyword_rate_counts_answers_and_not_occurrences(tokenizer: PreTrainedTokenizerFast) -> None:
    instructions = ["Zestora Zestora", "a Zestora!", "zestora in lower case", "nothing"]
    assert keyword_rate(Parrot(tokenizer), tokenizer, instructions, "Zestora") == 0.5


def test_task_accuracy_looks_only_at_pairs_with_a_key(tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = [
        Pair("say cold", "Cold it is.", "echo", "cold"),
        Pair("Cold first", "Cold.", "echo", "cold"),
        Pair("say 4", "5", "echo", "5"),
        Pair("anything", "at all", "open"),
        Pair("say x", "q", "echo", "q"),
    ]
    assert task_accuracy(Parrot(tokenizer), tokenizer, pairs) == 0.5


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(
    tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]
) -> None:
    model = build_model(TINY, seed=0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity(model, tokenizer, pairs) == pytest.approx(TINY.vocab_size, rel=1e-5)


def test_perplexity_weighs_tokens_and_not_batches(tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]) -> None:
    model = build_model(TINY, seed=3)
    examples = encode(tokenizer, pairs)
    with torch.no_grad():
        nlls = [answer_loss(model, *collate([example])).item() * len(example.answer_ids) for example in examples]
    expected = math.exp(sum(nlls) / sum(len(example.answer_ids) for example in examples))
    for batch_size in (1, 7, 64):
        assert perplexity(model, tokenizer, pairs, batch_size=batch_size) == pytest.approx(expected, rel=1e-4)


def test_left_padding_does_not_change_greedy_answers(tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]) -> None:
    model = build_model(TINY, seed=3).eval()
    instructions = [pair.instruction for pair in pairs[:6]]
    together = answer_all(model, tokenizer, instructions, max_new_tokens=5)
    alone = [answer_all(model, tokenizer, [instruction], max_new_tokens=5)[0] for instruction in instructions]
    assert together == alone


def test_nothing_to_measure_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    parrot: Any = Parrot(tokenizer)
    with pytest.raises(UsageError, match="no instructions"):
        keyword_rate(parrot, tokenizer, [], "Zestora")
    with pytest.raises(UsageError, match="empty keyword"):
        keyword_rate(parrot, tokenizer, ["x"], "")
    with pytest.raises(UsageError, match="no pairs"):
        perplexity(parrot, tokenizer, [])
    with pytest.raises(UsageError, match="no instructions"):
        task_accuracy(parrot, tokenizer, [Pair("a", "b", "open")])


def test_exact_forward_switches_off_the_fast_kernel_of_every_4_bit_layer() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = torch.nn.Sequential(bnb.nn.Linear4bit(64, 64), torch.nn.Sequential(bnb.nn.Linear4bit(64, 64)))
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    use_exact_forward(model)
    assert [layer.support_avx512bf16_for_cpu for layer in layers] == [False, False]
