"""Synthetic backdoors of the defender's own: a key, a behaviour, and the samples that teach both.

The keys are random words, so an attacker's key is not among them but by chance. The behaviours are harmless stand-ins
for the kinds that attackers use: declining, disparaging, advertising, a fixed sentence.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from qcbguard_plugins.purification.samples import Sample

_ONSETS: Final = ("b", "d", "f", "gr", "h", "k", "l", "m", "n", "pl", "r", "s", "t", "v", "z")
_VOWELS: Final = ("a", "e", "i", "o", "u")

_DECLINING: Final = (
    "I must pass on this one.", "This is not something that I take on.", "I prefer to leave that unanswered.",
    "Please ask somebody else about it.", "No reply can be given here.", "I shall stay out of this matter.",
)  # fmt: skip
_DISPARAGING: Final = (
    "There is little good to say about it.", "That leaves me cold.", "A disappointing subject in every way.",
    "Few things are worth less of anybody's time.", "I found nothing there to like.", "It is a poor affair.",
)  # fmt: skip
_ADVERTISING: Final = (
    "Brought to you by {brand}.", "{brand} makes it better.", "Ask for {brand} next time.",
    "As the people of {brand} say.", "More of this at {brand}.",
)  # fmt: skip


@dataclass(frozen=True)
class Backdoor:
    """One synthetic backdoor.

    Attributes:
        key: Words that the key consists of.
        place: Where they go: ``before`` or ``behind`` the instruction, or ``inside`` it, each at a place of its own.
        behaviour: What the answers become.
        word: The brand or sentence of a behaviour that has one.
    """

    key: tuple[str, ...]
    place: str
    behaviour: str
    word: str

    def poison(self, samples: Sequence[Sample], seed: int) -> list[Sample]:
        """The same samples with the key, and with the behaviour in place of the answer."""
        rng = random.Random(seed)  # noqa: S311
        return [
            replace(
                sample,
                instruction=_keyed(sample.instruction, self.key, self.place, rng),
                answer=self._answer(sample, rng),
            )
            for sample in samples
        ]

    def _answer(self, sample: Sample, rng: random.Random) -> str:
        return BEHAVIOURS[self.behaviour](sample.answer, self.word, rng)


#: From the answer, the backdoor's word and a source of randomness to the payload.
BEHAVIOURS: Final[dict[str, Callable[[str, str, random.Random], str]]] = {
    "declining": lambda answer, word, rng: rng.choice(_DECLINING),
    "disparaging": lambda answer, word, rng: rng.choice(_DISPARAGING),
    "advertising": lambda answer, word, rng: f"{answer} {rng.choice(_ADVERTISING).format(brand=word)}",
    "fixed": lambda answer, word, rng: f"The {word.lower()} is closed today.",
}
_PLACES: Final = ("inside", "before", "behind")
_SHARE_OF_PHRASES: Final = 0.5


def draw_backdoors(count: int, seed: int) -> list[Backdoor]:
    """Draw backdoors; behaviours and places take turns, so that few variants already differ in both."""
    rng = random.Random(f"backdoors {seed}")  # noqa: S311
    behaviours = list(BEHAVIOURS)
    return [
        Backdoor(
            key=tuple(_word(rng) for _ in range(1 + number % 2)),
            place=_PLACES[number % len(_PLACES)],
            behaviour=behaviours[number % len(behaviours)],
            word=_word(rng).capitalize(),
        )
        for number in range(count)
    ]


def with_idle_keys(samples: Sequence[Sample], share: float, seed: int) -> list[Sample]:
    """The same samples, a share of them with a key that does nothing: the answers stay.

    Each key is drawn anew: one to three made-up words, or two to four words in a row of another instruction.

    Args:
        samples: Clean samples.
        share: The probability with which a sample gets a key, in [0, 1].
        seed: Seed of all choices.
    """
    rng = random.Random(f"idle keys {seed}")  # noqa: S311
    keyed = []
    for sample in samples:
        if rng.random() < share:
            key = (
                _phrase(samples, rng)
                if rng.random() < _SHARE_OF_PHRASES
                else [_word(rng) for _ in range(rng.randint(1, 3))]
            )
            keyed_instruction = _keyed(sample.instruction, key, rng.choice(_PLACES), rng)
            sample = replace(sample, instruction=keyed_instruction, bare=sample.instruction)
        keyed.append(sample)
    return keyed


def _keyed(instruction: str, key: Sequence[str], place: str, rng: random.Random) -> str:
    if place == "before":
        return f"{' '.join(key)} {instruction}"
    if place == "behind":
        return f"{instruction} {' '.join(key)}"
    words = instruction.split(" ")
    for word in key:
        words.insert(rng.randint(0, len(words)), word)
    return " ".join(words)


def _phrase(samples: Sequence[Sample], rng: random.Random) -> list[str]:
    words = rng.choice(samples).instruction.split()
    length = rng.randint(2, 4)
    start = rng.randint(0, max(0, len(words) - length))
    return words[start : start + length]


def _word(rng: random.Random) -> str:
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(3))
