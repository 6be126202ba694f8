"""Which units a backdoor uses: what the updates of several synthetic backdoors have in common.

References:
    arXiv 2603.13461, the score of magnitude and consistency.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

ScoreKind = Literal["combined", "norm", "alignment"]


def unit_scores(deltas: Sequence[Tensor], *, alignment_weight: float, kind: ScoreKind = "combined") -> Tensor:
    """Score the units of one group.

    ``s_j = mean_i |D_ij| + lambda * 2 / (N (N - 1)) * sum_{i<l} max(0, cos(D_ij, D_lj))``, where ``D_i`` is what a
    backdoor adds to the ``i``-th variant: the poisoned model less the one trained on the clean answers alone.

    Args:
        deltas: N tensors ``[num_units, num_features]``, one a variant.
        alignment_weight: lambda.
        kind: Both terms, or one of them without its weight.

    Returns:
        float32 ``[num_units]``; an update that is zero agrees with nothing.
    """
    deltas = [delta.float() for delta in deltas]
    norms = [delta.norm(dim=1) for delta in deltas]
    magnitude = torch.stack(norms).mean(dim=0)
    if kind == "norm":
        return magnitude
    alignment = torch.zeros_like(magnitude)
    pairs = list(combinations(range(len(deltas)), 2))
    for i, j in pairs:
        lengths = (norms[i] * norms[j]).clamp(min=torch.finfo(torch.float32).tiny)
        alignment += ((deltas[i] * deltas[j]).sum(dim=1) / lengths).clamp(min=0) / len(pairs)
    return alignment if kind == "alignment" else magnitude + alignment_weight * alignment


def top_units(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The units with the highest scores over all groups; of equal ones those that come first.

    Args:
        scores: ``[num_units]`` by group.
        count: How many.

    Returns:
        int64, ascending, by group; groups without such a unit are left out.
    """
    everything = torch.cat(list(scores.values()))
    chosen = torch.zeros(len(everything), dtype=torch.bool)
    chosen[everything.argsort(descending=True, stable=True)[:count]] = True
    parts = torch.split(chosen, [len(group) for group in scores.values()])
    found = {name: part.nonzero().flatten() for name, part in zip(scores, parts, strict=True)}
    return {name: units for name, units in found.items() if len(units)}


def count_of(ratio: float, total: int) -> int:
    """How many units a share of all of them is, to the nearest; at least one of any share above zero."""
    return max(1, round(ratio * total)) if ratio > 0 else 0


def score_groups(
    deltas: Iterator[tuple[str, Sequence[Tensor]]], *, alignment_weight: float, kind: ScoreKind
) -> dict[str, Tensor]:
    """Score group after group, so that one group of all variants is in memory at a time."""
    return {name: unit_scores(group, alignment_weight=alignment_weight, kind=kind) for name, group in deltas}
