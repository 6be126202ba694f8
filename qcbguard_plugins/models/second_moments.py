"""Sums of ``x^T x`` over the inputs of layers, for processes that share the batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from qcbguard_plugins._util.distributed import ProcessGroup
from qcbguard_plugins.models.text_pass import remove


@dataclass
class _Sums:
    """Second moments over one batch or several.

    Attributes:
        by_source: float32 ``[in_features, in_features]`` by the name of the first layer that has the input.
        source_of: That layer's name, for the other layers that share its input.
    """

    by_source: dict[str, Tensor] = field(default_factory=dict)
    source_of: dict[str, str] = field(default_factory=dict)

    def add(self, other: _Sums) -> None:
        for name, part in other.by_source.items():
            if name in self.by_source:
                self.by_source[name].add_(part)
            else:
                self.by_source[name] = part
        self.source_of |= other.source_of

    def of(self, name: str) -> Tensor | None:
        return self.by_source.get(self.source_of.get(name, name))


class Batches:
    """All batches, and which of them this process runs.

    Attributes:
        mine: The batches of this process.
    """

    def __init__(self, batches: Sequence[Tensor], group: ProcessGroup) -> None:
        self._count, self._group = len(batches), group
        self.mine = batches[group.rank :: group.world_size]

    def add_up(
        self, model: nn.Module, names: Sequence[str], run: Callable[[int], Any], *, alone: Collection[str] = ()
    ) -> dict[str, Tensor | None]:
        """The sums of some layers over all batches; ``None`` for a layer that saw no input.

        Args:
            model: The model.
            names: The layers.
            run: Runs one of this process's batches, by its place among them.
            alone: Layers that share no sum with others: those that run more than once in a pass.
        """
        total = _Sums()
        for turn in range(-(-self._count // self._group.world_size)):
            mine = turn < len(self.mine)
            own = _sums_of(model, names, functools.partial(run, turn), alone) if mine else _Sums()
            for rank in range(min(self._group.world_size, self._count - turn * self._group.world_size)):
                source_of = self._group.broadcast(own.source_of, rank)
                total.add(_Sums(self._group.broadcast_tensors(own.by_source, rank), source_of))
        return {name: total.of(name) for name in names}


def _sums_of(model: nn.Module, names: Sequence[str], run: Callable[[], Any], alone: Collection[str]) -> _Sums:
    """The sums of one batch."""
    sums = _Sums()
    previous: list[tuple[Tensor, str]] = []

    def accumulate(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs["input"]
            if name not in alone:
                if previous and previous[0][0] is states:
                    sums.source_of[name] = previous[0][1]
                    return
                previous[:] = [(states, name)]
            rows = states.reshape(-1, states.shape[-1]).float()
            sums.add(_Sums({name: rows.T @ rows}))

        return hook

    handles = [
        model.get_submodule(name).register_forward_pre_hook(accumulate(name), with_kwargs=True) for name in names
    ]
    try:
        run()
    finally:
        remove(handles)
    return sums
