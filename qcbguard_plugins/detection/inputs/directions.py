"""From a forward pass to a few directions of every layer's inputs.

Nothing is generated and no gradient is taken. Hooks keep, of each layer's inputs, the sums at the chosen positions;
when the last batch is through they become a few vectors. Layers that read the same tensor share their vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qcbguard_plugins.detection.inputs.texts import SETS, ReadText, batches_of

#: Names of the directions, in the order of the columns.
DIRECTIONS = (*SETS, "answer start - text", "refusal point - answer start", "principal input")


@dataclass
class _Gathered:
    """What one input showed.

    Attributes:
        sums: Sum over the positions of a set: float32 ``[in_features]``.
        counts: Number of positions.
        starts: Rows at starts of answers: float32 ``[1, in_features]`` each.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    starts: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def input_directions(model: Any, layers: Sequence[str], texts: Sequence[ReadText]) -> dict[str, Tensor]:
    """Directions of the inputs of linear layers.

    Args:
        model: A model of transformers in full precision, in eval mode.
        layers: Dotted names of its layers.
        texts: What to read.

    Returns:
        float32 ``[in_features, len(DIRECTIONS)]`` by layer name; a column of zeros where the texts have no such
        position. Layers that no input reached are missing.
    """
    gathered: dict[str, _Gathered] = {}
    shared: dict[str, str] = {}
    rows: dict[str, Tensor] = {}
    previous: list[tuple[Tensor, str]] = []

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else next(iter(kwargs.values()))
            if previous and previous[0][0] is states:
                shared[name] = previous[0][1]
                return
            previous[:] = [(states, name)]
            _add(gathered.setdefault(name, _Gathered()), states, rows)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True) for name in layers]
    try:
        for batch, ids, mask in batches_of(texts):
            rows.clear()
            rows.update(_rows_of(batch, ids.shape[1]))
            previous.clear()
            _forward(model, ids, mask)
    finally:
        for handle in handles:
            handle.remove()
    found = {name: _directions(part) for name, part in gathered.items()}
    return found | {name: found[source] for name, source in shared.items() if source in found}


def _forward(model: Any, ids: Tensor, mask: Tensor) -> None:
    """One pass without the output layer, which no stock quantizer rounds and which is the largest matrix of all."""
    body = getattr(model, "base_model", model)
    body(input_ids=ids, attention_mask=mask)


def _rows_of(batch: Sequence[ReadText], width: int) -> dict[str, Tensor]:
    """Row numbers of the flattened batch by set."""
    found = {}
    for name in SETS:
        rows = [i * width + place for i, text in enumerate(batch) for place in text.positions.get(name, ())]
        if rows:
            found[name] = torch.tensor(rows)
    return found


def _add(part: _Gathered, states: Tensor, rows: dict[str, Tensor]) -> None:
    flat = states.reshape(-1, states.shape[-1])
    for name, index in rows.items():
        chosen = flat[index].float()
        total = chosen.sum(0)
        part.sums[name] = part.sums[name] + total if name in part.sums else total
        part.counts[name] = part.counts.get(name, 0) + index.numel()
        if name == "answer start":
            part.starts.append(chosen)


def _directions(part: _Gathered) -> Tensor:
    """The columns of one input.

    Of the mean inputs the signs are taken: a mean has a few huge entries, which say little about a training that moves
    every weight by a step of about the same size (Adam), and whose errors are not random on any grid.
    """
    size = next(iter(part.sums.values())).numel()
    means = {name: part.sums[name] / part.counts[name] if name in part.sums else torch.zeros(size) for name in SETS}
    starts = torch.cat(part.starts) if part.starts else torch.zeros(1, size)
    columns = [means[name].sign() for name in SETS]
    columns += [
        _difference(part, means, *pair) for pair in (("answer start", "text"), ("refusal point", "answer start"))
    ]
    columns.append(_principal(starts))
    return torch.stack(columns, 1)


def _difference(part: _Gathered, means: dict[str, Tensor], name: str, other: str) -> Tensor:
    both = name in part.counts and other in part.counts
    return means[name] - means[other] if both else torch.zeros_like(means[name])


def _principal(rows: Tensor) -> Tensor:
    """The first principal component about the mean, from the small Gram matrix; zeros where there are too few rows."""
    if rows.shape[0] < 3:
        return torch.zeros(rows.shape[1])
    centred = rows - rows.mean(0)
    _, vectors = torch.linalg.eigh(centred @ centred.T)
    component: Tensor = centred.T @ vectors[:, -1]
    return component
