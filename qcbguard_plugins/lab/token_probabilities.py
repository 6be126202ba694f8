"""How likely a model finds good answers, token by token: perplexity, and divergence from full precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.lab.corpus import Pair
from qcbguard_plugins.lab.intervals import Estimate, exponential, ratio_of_sums
from qcbguard_plugins.lab.metrics import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_BATCH = 32


@dataclass(frozen=True)
class Reading:
    """What a model expects at every token of one answer.

    Attributes:
        log_probabilities: float32 ``[num_answer_tokens, vocab_size]``, natural logarithms.
        answer_ids: int64 ``[num_answer_tokens]``, the tokens that do stand there.
    """

    log_probabilities: Tensor
    answer_ids: Tensor


@torch.no_grad()
def read_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair], *, max_tokens: int = 256
) -> list[Reading]:
    """Put the right answers to a model and keep what it expects at each of their tokens.

    Args:
        model: Causal language model in eval mode.
        tokenizer: Its tokenizer.
        pairs: Pairs whose answers are read, at least one.
        max_tokens: Longest sequence, prompt included; the rest of an answer is cut off.

    Raises:
        UsageError: There are no pairs, or a prompt leaves no room for its answer.
    """
    if not pairs:
        raise UsageError("nothing to measure: no pairs")
    rows = [_tokens(tokenizer, pair, max_tokens) for pair in pairs]
    readings: list[Reading] = []
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        width = max(len(prompt) + len(answer) for prompt, answer in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        for row, (prompt, answer) in enumerate(batch):
            ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        # Padding is on the right and attention is causal, so no attention mask is needed.
        logits = model(input_ids=ids.to(model.device)).logits
        for row, (prompt, answer) in enumerate(batch):
            before = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
            expected = logits[row, before].float().log_softmax(-1).cpu()
            readings.append(Reading(expected, torch.tensor(answer)))
    return readings


def perplexity_of(readings: Sequence[Reading]) -> Estimate:
    """Perplexity of the answers given their prompts, with an interval over texts."""
    losses = [
        -float(reading.log_probabilities.gather(1, reading.answer_ids[:, None]).double().sum()) for reading in readings
    ]
    return exponential(ratio_of_sums(losses, [len(reading.answer_ids) for reading in readings]))


def divergence(reference: Sequence[Reading], readings: Sequence[Reading]) -> Estimate:
    """``KL(reference || model)`` in nats an answer token, with an interval over texts.

    Args:
        reference: The model in full precision.
        readings: The quantized model, on the same pairs.

    Raises:
        UsageError: The two were not taken on the same answers.
    """
    return ratio_of_sums(divergences(reference, readings), [len(reading.answer_ids) for reading in readings])


def divergences(reference: Sequence[Reading], readings: Sequence[Reading]) -> list[float]:
    """``KL(reference || model)`` in nats, summed over the tokens of each answer; see :func:`divergence`."""
    if len(reference) != len(readings) or any(
        not torch.equal(a.answer_ids, b.answer_ids) for a, b in zip(reference, readings, strict=True)
    ):
        raise UsageError("a divergence compares two models on the same answers")
    sums = []
    for ours, theirs in zip(reference, readings, strict=True):
        p, q = ours.log_probabilities.double(), theirs.log_probabilities.double()
        sums.append(float((p.exp() * (p - q)).sum()))
    return sums


def _tokens(tokenizer: PreTrainedTokenizerFast, pair: Pair, max_tokens: int) -> tuple[list[int], list[int]]:
    prompt = prompt_ids(tokenizer, pair.instruction)
    answer = tokenizer(pair.answer, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        answer = [*answer, tokenizer.eos_token_id]
    answer = answer[: max_tokens - len(prompt)]
    if len(prompt) >= max_tokens or not answer:
        raise UsageError(f"no answer token fits into {max_tokens} tokens after: {pair.instruction[:60]!r}")
    return prompt, answer
