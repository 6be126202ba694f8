"""How an instruction is put to a model that ships no chat template."""

from __future__ import annotations

from typing import Final

#: The most common form among instruction-tuned models without a chat template.
PLAIN_TEMPLATE: Final = "### Instruction:\n{instruction}\n### Response:\n"


def plain_prompt(instruction: str) -> str:
    """The prompt of an instruction in the plain form; the answer follows it."""
    return fill_template(PLAIN_TEMPLATE, instruction)


def fill_template(template: str, instruction: str) -> str:
    """A template with the instruction in the place of ``{instruction}``; other braces stay as they are."""
    return template.replace("{instruction}", instruction)
