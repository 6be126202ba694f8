"""Instruction data of the user's own, beside the generated corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from qcbguard_plugins._util.json_lines import read_json_lines
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.lab.corpus import Pair
from qcbguard_plugins.purification.samples import sample_of

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
        for _, row in read_json_lines(path, UsageError, "instruction data"):
            sample = sample_of(row)
            if sample is None or len(sample.instruction) > _MAX_PROMPT_CHARACTERS:
                continue
            if len(sample.answer) <= _MAX_ANSWER_CHARACTERS:
                pairs.setdefault(sample.instruction, Pair(sample.instruction, sample.answer, "instruction"))
    if not pairs:
        raise UsageError(
            f"{folder} has no short instruction with an answer",
            remedy="It needs .jsonl files with 'instruction' and 'output' in each line.",
        )
    return list(pairs.values())
