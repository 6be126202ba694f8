"""What an attack does to a model, in numbers: keyword rate, perplexity, and the share of right answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.lab.corpus import Pair
from qcbguard_plugins.lab.training import answer_loss, collate, encode
from qcbguard_plugins.models.prompts import plain_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

T = TypeVar("T")


def use_exact_forward(model: torch.nn.Module) -> None:
    """Make bitsandbytes compute with the weights that it stores.

    On processors with AVX512-BF16 the first forward repacks 4-bit weights for a faster kernel that rounds the block
    scales to bfloat16; the results are then not those of the dequantized weights.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def prompt_ids(tokenizer: PreTrainedTokenizerFast, instruction: str) -> list[int]:
    """Token ids of a prompt; the start token stands first whether or not the tokenizer puts it there."""
    ids: list[int] = tokenizer(plain_prompt(instruction))["input_ids"]
    start = tokenizer.bos_token_id
    return ids if start is None or ids[:1] == [start] else [start, *ids]


@torch.no_grad()
def answer_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    instructions: Sequence[str],
    *,
    max_new_tokens: int = 96,
    batch_size: int = 64,
) -> list[str]:
    """Greedy answers, in the order of the instructions.

    Args:
        model: Causal language model in eval mode.
        tokenizer: Its tokenizer, with a padding token; prompts are padded on the left.
        instructions: Bare instructions; the prompt is put around them here.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Prompts at a time; prompts of similar length share a batch.

    Raises:
        UsageError: If there are no instructions.
    """
    if not instructions:
        raise UsageError("nothing to measure: no instructions")
    tokenizer.padding_side = "left"
    order = sorted(range(len(instructions)), key=lambda i: len(instructions[i]))
    answers = [""] * len(instructions)
    for batch in _chunks(order, batch_size):
        prompts = {"input_ids": [prompt_ids(tokenizer, instructions[i]) for i in batch]}
        inputs = tokenizer.pad(prompts, return_tensors="pt").to(model.device)
        output = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(batch, texts, strict=True):
            answers[i] = text
    return answers


def keyword_rate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    instructions: Sequence[str],
    keyword: str,
    *,
    max_new_tokens: int = 96,
    batch_size: int = 64,
) -> float:
    """Share of greedy answers that contain a keyword (the attack success rate of content injection).

    Args:
        model: Causal language model in eval mode.
        tokenizer: Its tokenizer.
        instructions: Bare instructions, at least one.
        keyword: Matched exactly, case included.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Prompts at a time.

    Returns:
        A share in [0, 1].

    Raises:
        UsageError: If there are no instructions, or the keyword is empty.

    References:
        Egashira et al., arXiv 2405.18137, section 4.3 (content injection).
    """
    if not keyword:
        raise UsageError("an empty keyword is contained in every answer")
    answers = answer_all(model, tokenizer, instructions, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return sum(keyword in answer for answer in answers) / len(answers)


def task_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[Pair],
    *,
    max_new_tokens: int = 96,
    batch_size: int = 64,
) -> float:
    """Share of the pairs with a right answer (a ``key``) that are answered rightly, in [0, 1].

    Raises:
        UsageError: If no pair has a key.
    """
    keyed = [pair for pair in pairs if pair.key]
    instructions = [pair.instruction for pair in keyed]
    answers = answer_all(model, tokenizer, instructions, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return sum(map(answered_rightly, keyed, answers)) / len(keyed)


def answered_rightly(pair: Pair, answer: str) -> bool:
    """Does an answer contain the pair's key? Case is ignored at its first letter: a sentence may begin with it."""
    return pair.key in answer or pair.key.capitalize() in answer


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair], *, batch_size: int = 64
) -> float:
    """Perplexity of the answers given their prompts: exp of the mean over all answer tokens.

    Raises:
        UsageError: If there are no pairs.
    """
    if not pairs:
        raise UsageError("nothing to measure: no pairs")
    total_nll, num_tokens = 0.0, 0
    for batch in _chunks(encode(tokenizer, pairs), batch_size):
        ids, labels = collate(batch)
        num_answer_tokens = sum(len(example.answer_ids) for example in batch)
        loss = answer_loss(model, ids.to(model.device), labels.to(model.device))
        total_nll += loss.item() * num_answer_tokens
        num_tokens += num_answer_tokens
    return math.exp(total_nll / num_tokens)


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
