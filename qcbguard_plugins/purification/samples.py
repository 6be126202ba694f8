"""Clean instructions with their answers, from the user's files, and how a model reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Final

from qcbguard_plugins._util.json_lines import read_json_lines
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.models.prompts import PLAIN_TEMPLATE, fill_template

#: Names under which instruction data keep their parts.
_INSTRUCTIONS: Final = ("instruction",)
_CONTEXTS: Final = ("input", "context")
_ANSWERS: Final = ("output", "response", "answer")


@dataclass(frozen=True)
class Sample:
    """One instruction with its answer.

    Attributes:
        instruction: What the model is asked.
        answer: What it shall say.
        bare: The instruction before a key was put into it; empty where there is none.
    """

    instruction: str
    answer: str
    bare: str = ""


@dataclass(frozen=True)
class Tokens:
    """One training sequence: the prompt, then the answer, on which the loss is taken.

    Attributes:
        prompt_ids: Tokens of the prompt.
        answer_ids: Tokens of the answer.
        key_positions: Where in the prompt the tokens of a key are.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    key_positions: tuple[int, ...] = ()


def read_samples(paths: Sequence[Path]) -> list[Sample]:
    """Read clean data.

    Args:
        paths: Files of JSON lines with ``instruction`` (``input`` or ``context`` if any) and ``output``, ``response``
            or ``answer``.

    Returns:
        The samples in the order of the files, no instruction twice.

    Raises:
        UsageError: A file cannot be read, or a line has no instruction with an answer.
    """
    samples: dict[str, Sample] = {}
    for path in paths:
        for number, row in read_json_lines(path, UsageError, "clean data"):
            sample = sample_of(row)
            if sample is None:
                raise UsageError(
                    f"{path.name}, line {number}: no instruction with its answer",
                    remedy="Each line needs 'instruction' and 'output' (or 'response', or 'answer').",
                )
            samples.setdefault(sample.instruction, sample)
    return list(samples.values())


def sample_of(row: Any) -> Sample | None:
    """The instruction, with its context, and the answer of one row of instruction data; ``None`` without them."""
    if not isinstance(row, dict):
        return None
    instruction, context, answer = (_text(row, names) for names in (_INSTRUCTIONS, _CONTEXTS, _ANSWERS))
    if not instruction or not answer:
        return None
    return Sample(f"{instruction}\n{context}" if context else instruction, answer)


def _text(row: dict[str, Any], names: Sequence[str]) -> str:
    values = (row.get(name) for name in names)
    return next((value.strip() for value in values if isinstance(value, str) and value.strip()), "")


def encode_samples(
    tokenizer: Any, samples: Sequence[Sample], *, max_length: int, prompt_template: str | None
) -> list[Tokens]:
    """Tokenize samples; the answer ends with the end-of-sequence token, or where the length does.

    Raises:
        UsageError: A prompt leaves no room for its answer.
    """
    encoded = []
    for sample in samples:
        prompt = _prompt_ids(tokenizer, sample.instruction, prompt_template)
        answer = tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            answer = [*answer, tokenizer.eos_token_id]
        answer = answer[: max(0, max_length - len(prompt))]
        if not answer:
            raise UsageError(
                f"no answer token fits into {max_length} tokens after: {sample.instruction[:60]!r}",
                remedy="Raise max_length, or leave out such long instructions.",
            )
        bare = _prompt_ids(tokenizer, sample.bare, prompt_template) if sample.bare else prompt
        encoded.append(Tokens(prompt, answer, _added(bare, prompt)))
    return encoded


def _added(before: list[int], after: list[int]) -> tuple[int, ...]:
    """Where the second sequence has what the first has not."""
    blocks = SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks()
    kept = {position for block in blocks for position in range(block.b, block.b + block.size)}
    return tuple(position for position in range(len(after)) if position not in kept)


def _prompt_ids(tokenizer: Any, instruction: str, template: str | None) -> list[int]:
    if template is None and getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": instruction}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
    ids = tokenizer(fill_template(template or PLAIN_TEMPLATE, instruction))["input_ids"]
    start = tokenizer.bos_token_id
    return ids if start is None or ids[:1] == [start] else [start, *ids]
