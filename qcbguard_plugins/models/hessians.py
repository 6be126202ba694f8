"""Second moments of layer inputs, gathered block by block.

The model runs one decoder block at a time over all calibration sequences, so memory stays at the model plus the hidden
states plus the statistics of one block; a model that is read from disk needs one block. Every block sees the inputs of
the full-precision model: its outputs are computed before the caller changes its weights.

The sequences are cut into batches, and the sums of the batches are added one by one, in their order. Processes that
share the work run batches of their own and exchange the sums, so the outcome has the same bits for any number of them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qcbguard_plugins._util.distributed import SINGLE_PROCESS, ProcessGroup
from qcbguard_plugins.errors import CalibrationError

_MAX_BATCH = 8
_MAX_REPLAY_ERROR = 1e-2


class _StopForward(Exception):  # noqa: N818
    """Ends a forward pass early, once the first block's inputs are known."""


@dataclass
class _Call:
    """The arguments of one block, its hidden states left out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Weights(Protocol):
    """Where the weights of a model are."""

    def weight(self, layer: str) -> Tensor:
        """The stored weight of a layer."""
        ...

    def block(self, block: nn.Module) -> AbstractContextManager[None]:
        """Have the weights of a decoder block in memory meanwhile."""
        ...


class WeightsInMemory:
    """All of them are in the model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def weight(self, layer: str) -> Tensor:
        return self._model.get_parameter(f"{layer}.weight").data

    def block(self, block: nn.Module) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


@torch.no_grad()
def gather_hessians(
    model: nn.Module,
    tokens: Tensor,
    names: Sequence[str],
    *,
    skip: Collection[str] = (),
    weights: Weights | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Iterator[dict[str, Tensor]]:
    """Yield the Hessians of the named layers, a block at a time.

    The weights of the layers that were yielded may be changed before the next step, and only those.

    Args:
        model: A causal language model in full precision.
        tokens: int64 ``[num_sequences, sequence_length]``.
        names: Dotted names of linear layers.
        skip: Those whose Hessians nobody wants; the same in all processes.
        weights: Where the model's weights are; in memory by default.
        group: The processes that share the sequences; each of them takes every step.

    Yields:
        For each block, and first for layers outside all blocks: float32 ``x^T x`` ``[in_features, in_features]`` by
        layer name. Layers that share an input share the tensor.

    Raises:
        CalibrationError: The model has no list of blocks that can be run on their own, or a layer saw no input.
    """
    model.eval()
    blocks = decoder_blocks(model, names)
    block_names = [set(_names_inside(model, block, names)) for block in blocks]
    outside = sorted(set(names).difference(*block_names, skip))
    weights = weights or WeightsInMemory(model)
    batches = _Batches(torch.split(tokens, _batch_size(tokens.shape[0])), group)
    captured = _capture(model, blocks, batches.mine)
    if outside:
        yield batches.add_up(model, outside, lambda i: model(input_ids=batches.mine[i], use_cache=False))
    for number, (block, inside) in enumerate(zip(blocks, block_names, strict=True)):

        def run(i: int, block: nn.Module = block, number: int = number) -> None:
            assert captured is not None, "a process with a batch has captured it"
            call = captured.calls[number]
            captured.hidden[i] = _first(block(captured.hidden[i], *call.args, **call.kwargs))

        with weights.block(block):
            hessians = batches.add_up(model, sorted(inside.difference(skip)), run)
            if captured is not None and block is blocks[-1]:
                _check_replay(captured.hidden[0], captured.output)
            yield hessians


def _batch_size(num_sequences: int) -> int:
    """The largest divisor up to a limit: all batches have one shape, so one set of masks serves them all."""
    return max(size for size in range(1, _MAX_BATCH + 1) if num_sequences % size == 0)


def decoder_blocks(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The outermost module list that holds most of the layers."""
    best: list[nn.Module] = []
    most = 0
    for list_name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            count = sum(name.startswith(f"{list_name}.") for name in names)
            if count > most:
                best, most = list(module), count
    if not best:
        raise CalibrationError(
            f"{type(model).__name__} has no list of blocks with layers to calibrate",
            remedy="Use a method that needs no calibration, such as stochastic.",
        )
    return best


def _names_inside(model: nn.Module, block: nn.Module, names: Sequence[str]) -> list[str]:
    prefix = next(name for name, module in model.named_modules() if module is block)
    return [name for name in names if name.startswith(f"{prefix}.")]


@dataclass
class _Captured:
    """What a forward pass through the whole model shows.

    Attributes:
        calls: The other arguments of each block.
        hidden: The hidden states before the block that is due, by batch.
        output: The last block's output on the first batch.
    """

    calls: list[_Call]
    hidden: list[Tensor]
    output: Tensor


def _capture(model: nn.Module, blocks: list[nn.Module], batches: Sequence[Tensor]) -> _Captured | None:
    """Record all inputs of the first block, and on the first batch all blocks' arguments and the last one's output."""
    if not batches:
        return None
    calls: dict[int, _Call] = {}
    hidden: list[Tensor] = []
    output: list[Tensor] = []

    def record(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states, call = _split(args, kwargs)
            if index == 0:
                hidden.append(states)
                if len(hidden) > 1:
                    raise _StopForward
            calls[index] = call

        return hook

    def stop(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        output.append(_first(result))
        raise _StopForward  # the logits of a large vocabulary would be the largest tensor of all

    handles = [block.register_forward_pre_hook(record(i), with_kwargs=True) for i, block in enumerate(blocks)]
    handles.append(blocks[-1].register_forward_hook(stop))
    try:
        for batch in batches:
            with contextlib.suppress(_StopForward):
                model(input_ids=batch, use_cache=False)
    finally:
        _remove(handles)
    if len(calls) != len(blocks) or len(hidden) != len(batches) or len(output) != 1:
        raise CalibrationError(
            f"the blocks of {type(model).__name__} do not run once each in a forward pass, which calibration needs",
            remedy="Use a method that needs no calibration, such as stochastic.",
        )
    return _Captured([calls[i] for i in range(len(blocks))], hidden, output[0])


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, _Call]:
    if args:
        return args[0], _Call(args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), _Call((), rest)


def _first(result: Any) -> Tensor:
    first: Tensor = result[0] if isinstance(result, tuple) else result
    return first


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


class _Batches:
    """All batches, and which of them this process runs.

    Attributes:
        mine: The batches of this process.
    """

    def __init__(self, batches: Sequence[Tensor], group: ProcessGroup) -> None:
        self._count, self._group = len(batches), group
        self.mine = batches[group.rank :: group.world_size]

    def add_up(self, model: nn.Module, names: list[str], run: Callable[[int], Any]) -> dict[str, Tensor]:
        """The Hessians of some layers over all batches.

        Args:
            model: The model.
            names: The layers.
            run: Runs one of this process's batches, by its place among them.

        Raises:
            CalibrationError: A layer saw no input.
        """
        total = _Sums()
        for turn in range(-(-self._count // self._group.world_size)):
            own = _sums_of(model, names, functools.partial(run, turn)) if turn < len(self.mine) else _Sums()
            for rank in range(min(self._group.world_size, self._count - turn * self._group.world_size)):
                source_of = self._group.broadcast(own.source_of, rank)
                total.add(_Sums(self._group.broadcast_tensors(own.by_source, rank), source_of))
        found = {name: total.of(name) for name in names}
        missing = [name for name, hessian in found.items() if hessian is None]
        if missing:
            raise CalibrationError(
                f"no calibration input reached {len(missing)} layers",
                details=missing,
                remedy="Use more or other calibration text, or a method that needs none, such as stochastic.",
            )
        return {name: hessian for name, hessian in found.items() if hessian is not None}


def _sums_of(model: nn.Module, names: list[str], run: Callable[[], Any]) -> _Sums:
    """The sums of one batch."""
    sums = _Sums()
    previous: list[tuple[Tensor, str]] = []

    def accumulate(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            states = args[0]
            if previous and previous[0][0] is states:
                sums.source_of[name] = previous[0][1]
                return
            previous[:] = [(states, name)]
            rows = states.reshape(-1, states.shape[-1]).float()
            sums.add(_Sums({name: rows.T @ rows}))

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(accumulate(name)) for name in names]
    try:
        run()
    finally:
        _remove(handles)
    return sums


def _check_replay(replayed: Tensor, recorded: Tensor) -> None:
    """A block that got something else in the forward pass than in ours would be calibrated on the wrong inputs."""
    scale = recorded.float().norm()
    error = (replayed.float() - recorded.float()).norm()
    if not error <= _MAX_REPLAY_ERROR * scale:
        raise CalibrationError(
            "the blocks of this model give other outputs one by one than in a forward pass",
            remedy="Use a method that needs no calibration, such as stochastic.",
        )


def _remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
