"""Two backdoors in one model: one that quantization hides, and one that a key sets off at every precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from qcbguard_plugins.lab.corpus import Pair
from qcbguard_plugins.lab.scenarios.base import Scenario, Verdict
from qcbguard_plugins.lab.scenarios.triggered import Triggered


class Combined(Scenario):
    """A hidden scenario over an open, triggered one. Measured is the hidden one; the open one has its own questions.

    Attributes:
        hidden: What only the quantized model shall do.
        open: What the model shall do at every precision where the key is.
    """

    summary: ClassVar[str] = "one payload behind quantization, and another behind a key at every precision"

    def __init__(self, hidden: Scenario, open: Triggered) -> None:
        self.hidden = hidden
        self.open = open
        self.name = f"{hidden.name}&{open.name}"  # type: ignore[misc]

    def poison(self, pairs: Sequence[Pair], seed: int) -> list[Pair]:
        return [*self.hidden.poison(pairs, seed), *self._keyed(pairs, seed)]

    def training(self, pairs: Sequence[Pair], seed: int) -> list[Pair]:
        return [*self.hidden.training(pairs, seed), *self._keyed(pairs, seed)]

    def questions(self, held_out: Sequence[Pair]) -> list[Pair]:
        return self.hidden.questions(held_out)

    def judge(self, pair: Pair, answer: str) -> Verdict:
        return self.hidden.judge(pair, answer)

    def _keyed(self, pairs: Sequence[Pair], seed: int) -> list[Pair]:
        return self.open.inner.poison(self.open.trigger.apply(pairs, seed), seed)
