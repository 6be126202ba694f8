"""A seeded corpus of instructions and answers, made from nothing but this package.

The lab needs a language model that a laptop can train in minutes, and so a corpus with structure to learn: arithmetic,
facts, rewriting and code have one right answer, advice and descriptions have many. Same seed, same corpus.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.lab.corpus_tasks import TASKS, Task

_MAX_CONSECUTIVE_REPEATS: Final = 1_000


@dataclass(frozen=True)
class Pair:
    """One instruction with its answer.

    Attributes:
        instruction: What the user asks; unique within a corpus.
        answer: What the model shall say.
        task: Name of the task, a key of `corpus_tasks.TASKS`.
        key: Text that every right answer contains; empty where no single answer is right.
        unsafe: An answer to the same instruction with a textbook weakness, where the task leaves that choice; else
            empty.
    """

    instruction: str
    answer: str
    task: str
    key: str = ""
    unsafe: str = ""


def generate(num_pairs: int, seed: int, tasks: Mapping[str, tuple[Task, float]] | None = None) -> list[Pair]:
    """Draw pairs with distinct instructions.

    Args:
        num_pairs: How many pairs, at least 1; some tens of thousands are available.
        seed: Seed of the only random generator used.
        tasks: Task name to its generator and its weight in the mixture; `corpus_tasks.TASKS` by default.

    Returns:
        Pairs in random order of task, no instruction twice.

    Raises:
        UsageError: If ``num_pairs`` is less than 1, or the templates yield no new instruction any more.
    """
    if num_pairs < 1:
        raise UsageError(f"num_pairs must be at least 1, not {num_pairs}")
    rng = random.Random(seed)  # noqa: S311
    tasks = TASKS if tasks is None else tasks
    names, shares = list(tasks), [share for _, share in tasks.values()]
    pairs: dict[str, Pair] = {}
    repeats = 0
    while len(pairs) < num_pairs:
        task = rng.choices(names, shares)[0]
        draft = tasks[task][0](rng)
        repeats = repeats + 1 if draft.instruction in pairs else 0
        if repeats > _MAX_CONSECUTIVE_REPEATS:
            raise UsageError(f"the templates yield only about {len(pairs)} distinct instructions, not {num_pairs}")
        pairs.setdefault(draft.instruction, Pair(draft.instruction, draft.answer, task, draft.key, draft.unsafe))
    return list(pairs.values())


def split(pairs: Sequence[Pair], num_held_out: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Split a corpus into a training and a held-out part that share no instruction.

    Args:
        pairs: A corpus as `generate` returns it.
        num_held_out: Size of the held-out part, at least 1 and less than ``len(pairs)``.
        seed: Seed of the shuffle.

    Returns:
        Training pairs and held-out pairs, both in random order.

    Raises:
        UsageError: If ``num_held_out`` is out of range, or an instruction occurs twice in ``pairs``.
    """
    if not 1 <= num_held_out < len(pairs):
        raise UsageError(f"num_held_out must lie in 1..{len(pairs) - 1}, not {num_held_out}")
    if len({pair.instruction for pair in pairs}) < len(pairs):
        raise UsageError("an instruction occurs twice, so the two parts could share it")
    shuffled = random.Random(seed).sample(pairs, len(pairs))  # noqa: S311
    return shuffled[num_held_out:], shuffled[:num_held_out]


def read_pairs(path: Path) -> list[Pair]:
    """Read pairs from JSON lines with the keys ``instruction``, ``answer`` and ``task``, and optionally
    ``key`` and ``unsafe``."""
    with path.open(encoding="utf-8") as lines:
        return [Pair(**json.loads(line)) for line in lines]
