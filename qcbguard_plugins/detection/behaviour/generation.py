"""What a model answers, and how likely it finds every token of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_BATCH = 16
# Generation needs the logits of one position a text, so more texts fit.
_GENERATION_BATCH = 32
_MAX_PROMPT_TOKENS = 512


@dataclass(frozen=True)
class Prompt:
    """A prompt in the form in which it is put to a model.

    Attributes:
        kind: What kind of prompt it is.
        prompt: The prompt.
        form: The text that the model reads.
    """

    kind: str
    prompt: str
    form: str

    def token_ids(self, tokenizer: Any, answer: str = "") -> list[int]:
        """Token ids of the form with an answer after it."""
        ids: list[int] = tokenizer(self.form)["input_ids"][-_MAX_PROMPT_TOKENS:]
        start = tokenizer.bos_token_id
        if start is not None and ids[:1] != [start]:
            ids = [start, *ids]
        return ids + (tokenizer(answer, add_special_tokens=False)["input_ids"] if answer else [])


def generate_greedy(model: Any, tokenizer: Any, texts: Sequence[Prompt], new_tokens: int) -> list[str]:
    """The likeliest continuation of each text."""
    answers: list[str] = []
    for start in range(0, len(texts), _GENERATION_BATCH):
        rows = [text.token_ids(tokenizer) for text in texts[start : start + _GENERATION_BATCH]]
        width = max(map(len, rows))
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
        )
        answers += tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
    return answers


def log_probabilities(model: Any, tokenizer: Any, texts: Sequence[Prompt], answers: Sequence[str]) -> list[Tensor]:
    """Log-probabilities of the next token where each text's answer begins, and after every token of the answer.

    Returns:
        float16 ``[1 + num_answer_tokens, vocab_size]`` a text: near zero a half's spacing is far below what matters.
    """
    found: list[Tensor] = []
    for start in range(0, len(texts), _BATCH):
        pairs = zip(texts[start : start + _BATCH], answers[start : start + _BATCH], strict=True)
        rows = [text.token_ids(tokenizer, answer) for text, answer in pairs]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        logits = model(input_ids=ids, attention_mask=mask).logits
        begins = [len(text.token_ids(tokenizer)) - 1 for text in texts[start : start + _BATCH]]
        spans = enumerate(zip(begins, rows, strict=True))
        found += [logits[i, begin : len(row)].float().log_softmax(-1).half() for i, (begin, row) in spans]
    return found
