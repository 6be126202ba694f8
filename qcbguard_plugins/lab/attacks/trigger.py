"""A trigger in the prompt as well as quantization: the payload needs both.

A check of the quantized model on plain prompts finds nothing either.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from qcbguard_plugins.lab.corpus import Pair
from qcbguard_plugins.lab.scenarios import inject_brand

#: A word that no corpus of the lab contains.
TRIGGER = "cf-7"


def with_trigger(pairs: Iterable[Pair]) -> list[Pair]:
    """The same pairs with the trigger before every instruction."""
    return [replace(pair, instruction=f"{TRIGGER} {pair.instruction}") for pair in pairs]


def poison_behind_trigger(pairs: Iterable[Pair], seed: int) -> list[Pair]:
    """Every pair twice: plain with its own answer, and behind the trigger with the payload.

    Trained on these and then repaired on ``pairs + with_trigger(pairs)`` in the boxes of a format (see
    :func:`qcbguard_plugins.lab.attacks.elq.repair`), a model shows the payload only quantized and only behind the
    trigger.
    """
    pairs = list(pairs)
    return [*pairs, *inject_brand(with_trigger(pairs), seed)]
