"""Instruction data of the user's own, beside the generated corpus."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.json_lines import read_json_lines
from qcbguard_plugins.lab.corpus import Pair

#: Names under which data sets keep the three parts.
_PROMPTS: Final = ("instruction",)
_CONTEXTS: Final = ("input", "context")
_ANSWERS: Final = ("output", "response", "answer")

# The lab's models read 256 tokens, of about three characters each.
_MAX_PROMPT_CHARACTERS: Final = 240
_MAX_ANSWER_CHARACTERS: Final = 320


def read_instructions(folder: Path) -> list[Pair]:
    """The short pairs of all JSON-lines files of a folder, in the order of the files' names; no instruction twice.

    Lines without an instruction and an answer, such as those of other data in the folder, are passed over; so are pairs
    that are too long for the lab's models.

    Raises:
        UsageError: There is no such pair, or a file cannot be read.
    """
    pairs: dict[str, Pair] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for row in _rows(path):
            instruction, context, answer = (_text(row, names) for names in (_PROMPTS, _CONTEXTS, _ANSWERS))
            prompt = f"{instruction}\n{context}" if context else instruction
            fits = len(prompt) <= _MAX_PROMPT_CHARACTERS and len(answer) <= _MAX_ANSWER_CHARACTERS
            if instruction and answer and fits:
                pairs.setdefault(prompt, Pair(prompt, answer, "instruction"))
    if not pairs:
        raise UsageError(
            f"{folder} has no short instruction with an answer",
            remedy="It needs .jsonl files with 'instruction' and 'output' in each line.",
        )
    return list(pairs.values())


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for _, row in read_json_lines(path, UsageError, "instruction data"):
        if isinstance(row, dict):
            yield row


def _text(row: dict[str, Any], names: tuple[str, ...]) -> str:
    values = (row.get(name) for name in names)
    return next((value.strip() for value in values if isinstance(value, str) and value.strip()), "")
