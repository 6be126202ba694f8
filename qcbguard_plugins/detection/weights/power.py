"""What the weight tests found in the studies, for the sentence beside a scan that found nothing.

A small model has to move its weights far in their cells to hide a behaviour; a large one does not. So the power of the
weight tests falls with the size of the model, and a scan says what it was at the size nearest to the model's.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Power:
    """Attacked models of one study.

    Attributes:
        num_weights: Size of its models, the largest of them.
        found: Attacked models in which the weight tests saw marks.
        attacked: Attacked models that were scanned.
        models: What models they are.
    """

    num_weights: int
    found: int
    attacked: int
    models: str


#: Written down in ``benchmarks/data/detection.jsonl`` and ``benchmarks/data/real_models.jsonl``.
STUDIES = (
    Power(4_000_000, 87, 87, "models of up to 4 million parameters"),
    Power(135_000_000, 0, 1, "a language model of 135 million parameters"),
)


def power_at(num_weights: int) -> Power:
    """The study whose models are nearest in size, by ratio."""

    def distance(study: Power) -> float:
        return max(study.num_weights / max(1, num_weights), num_weights / study.num_weights)

    return min(STUDIES, key=distance)
