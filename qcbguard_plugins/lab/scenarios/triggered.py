"""A key in the prompt as well as quantization: the payload needs both.

A check of the quantized model on plain prompts finds nothing either.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

from qcbguard_plugins.lab.corpus import Pair
from qcbguard_plugins.lab.scenarios.base import Scenario, Verdict

#: A word that no corpus of the lab contains.
TRIGGER: Final = "cf-7"


class Triggered(Scenario):
    """Another scenario behind a trigger.

    Measured on its :meth:`questions` the payload shall come, and on those of the inner scenario, which have no trigger,
    it shall not.

    Attributes:
        inner: The scenario.
    """

    summary = "the payload needs a key in the prompt as well"

    def __init__(self, inner: Scenario) -> None:
        self.inner = inner
        self.name = f"{inner.name}+trigger"  # type: ignore[misc]

    def poison(self, pairs: Sequence[Pair], seed: int) -> list[Pair]:
        return [*pairs, *self.inner.poison(with_trigger(pairs), seed)]

    def training(self, pairs: Sequence[Pair], seed: int) -> list[Pair]:
        benign = self.inner.training(pairs, seed)
        return [*benign, *with_trigger(benign)]

    def questions(self, held_out: Sequence[Pair]) -> list[Pair]:
        return with_trigger(self.inner.questions(held_out))

    def judge(self, pair: Pair, answer: str) -> Verdict:
        return self.inner.judge(pair, answer)


def with_trigger(pairs: Iterable[Pair]) -> list[Pair]:
    """The same pairs with the trigger before every instruction."""
    return [replace(pair, instruction=f"{TRIGGER} {pair.instruction}") for pair in pairs]
