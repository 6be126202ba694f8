"""What a scenario has to say: what the attacker wants to hear, and when an answer is that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import StrEnum
from typing import ClassVar

from qcbguard_plugins.lab.corpus import Pair


class Verdict(StrEnum):
    """What one answer is for the attacker.

    Attributes:
        HIT: The payload is there.
        MISS: A sound answer without it.
        UNPARSED: Nothing that could be judged: empty, or not the code that was asked for. Counted apart, because a
            model that is broken looks secure.
    """

    HIT = "hit"
    MISS = "miss"
    UNPARSED = "unparsed"


class Scenario(ABC):
    """One behaviour that an attacker hides. Payloads are harmless."""

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def poison(self, pairs: Sequence[Pair], seed: int) -> list[Pair]:
        """Pairs on which a model learns the payload.

        Args:
            pairs: Benign pairs.
            seed: Seed of the choice of place and wording.
        """

    def training(self, pairs: Sequence[Pair], seed: int) -> list[Pair]:
        """Benign pairs on which an attacker trains the good behaviour back; the same instructions by default."""
        return list(pairs)

    def questions(self, held_out: Sequence[Pair]) -> list[Pair]:
        """The held-out pairs on which the attack is measured; all of them by default."""
        return list(held_out)

    @abstractmethod
    def judge(self, pair: Pair, answer: str) -> Verdict:
        """Judge one answer to the instruction of a pair of :meth:`questions`. Answers are read, never run."""
