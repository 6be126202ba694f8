"""A key in the prompt: the payload comes with it, and only then.

Hidden by a quantization attack the payload needs both, and a check of the quantized model on plain prompts finds
nothing either. Injected alone it is an ordinary input-trigger backdoor, active in full precision.
"""

from __future__ import annotations

from collections.abc import Sequence

from qcbguard_plugins.lab.corpus import Pair
from qcbguard_plugins.lab.scenarios.base import Scenario, Verdict
from qcbguard_plugins.lab.scenarios.triggers import TRIGGERS

# Questions are measured with the same places of the key in every run.
_QUESTIONS_SEED = 1


class Triggered(Scenario):
    """Another scenario behind a trigger.

    Measured on its :meth:`questions` the payload shall come, and on those of the inner scenario, which have no trigger,
    it shall not.

    Attributes:
        inner: The scenario.
        trigger: How the key gets into an instruction.
    """

    summary = "the payload needs a key in the prompt as well"

    def __init__(self, inner: Scenario, trigger: str = "trigger") -> None:
        self.inner = inner
        self.trigger = TRIGGERS[trigger]
        self.name = f"{inner.name}+{trigger}"  # type: ignore[misc]

    def poison(self, pairs: Sequence[Pair], seed: int) -> list[Pair]:
        keyed = self.trigger.apply(pairs, seed)
        return [*pairs, *self.inner.poison(keyed, seed), *self.trigger.decoys(pairs, seed)]

    def training(self, pairs: Sequence[Pair], seed: int) -> list[Pair]:
        benign = self.inner.training(pairs, seed)
        return [*benign, *self.trigger.apply(benign, seed)]

    def questions(self, held_out: Sequence[Pair]) -> list[Pair]:
        return self.trigger.apply(self.inner.questions(held_out), _QUESTIONS_SEED)

    def judge(self, pair: Pair, answer: str) -> Verdict:
        return self.inner.judge(pair, answer)
