"""Second moments of layer inputs, gathered block by block.

The model runs one decoder block at a time over all calibration sequences, so memory stays at the model plus the hidden
states plus the statistics of one block; a model that is read from disk needs one block. Every block sees the inputs of
the full-precision model: its outputs are computed before the caller changes its weights.

A model whose blocks cannot be run one after the other is run whole, as often as the statistics of its layers take
turns in memory, those of the last layers first: what is changed then lies behind what is still to be measured. A layer
that text does not reach is never an error of its own: the caller hears of it and why.

The sequences are cut into batches, and the sums of the batches are added one by one, in their order. Processes that
share the work run batches of their own and exchange the sums, so the outcome has the same bits for any number of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qcbguard_plugins._util.distributed import SINGLE_PROCESS, ProcessGroup
from qcbguard_plugins.errors import CalibrationError, UncalibratableError
from qcbguard_plugins.models.second_moments import Batches
from qcbguard_plugins.models.text_pass import (
    Reach,
    StopForward,
    TextPass,
    find_reach,
    one_line,
    remove,
    stacks_of_blocks,
    text_passes,
)

_MAX_BATCH = 8
_MAX_REPLAY_ERROR = 1e-2
# Statistics that a model which is run whole holds at once.
_MAX_STATISTICS_BYTES = 1 << 30


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
    model: Any,
    tokens: Tensor,
    names: Sequence[str],
    *,
    skip: Collection[str] = (),
    weights: Weights | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
    unreached: dict[str, str] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Yield the Hessians of the named layers, a group at a time: the layers outside all blocks, then each block.

    The weights of the layers that were yielded may be changed before the next step, and only those.

    Args:
        model: A model in full precision.
        tokens: int64 ``[num_sequences, sequence_length]``.
        names: Dotted names of linear layers.
        skip: Those whose Hessians nobody wants; the same in all processes.
        weights: Where the model's weights are; in memory by default.
        group: The processes that share the sequences; each of them takes every step.
        unreached: Filled with the layers that have no Hessian, and why. Without it such a layer is an error.

    Yields:
        float32 ``x^T x`` ``[in_features, in_features]`` by layer name. Layers that share an input share the tensor.

    Raises:
        UncalibratableError: The model gives other outputs block by block than in one pass.
        CalibrationError: ``unreached`` is not given, and a layer saw no input.
    """
    model.eval()
    run = _Run(model, tokens, names, set(skip), weights or WeightsInMemory(model), group)
    found: set[str] = set()
    for hessians in run.groups():
        found.update(hessians)
        whys = {name: _why_unusable(hessian) for name, hessian in hessians.items()}
        run.unreached |= {name: why for name, why in whys.items() if why}
        yield {name: hessian for name, hessian in hessians.items() if not whys[name]}
    for name in names:
        if name not in found and name not in skip:
            run.unreached.setdefault(name, "no calibration text reaches it")
    if unreached is not None:
        unreached.update(run.unreached)
    elif run.unreached:
        raise CalibrationError(
            f"no calibration input reached {len(run.unreached)} layers",
            details=[f"{name}  {why}" for name, why in run.unreached.items()],
            remedy="Use more or other calibration text, or a method that needs none, such as stochastic.",
        )


def _why_unusable(hessian: Tensor) -> str:
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(diagonal).all()):  # any entry is at most as large as two of the diagonal
        return "its inputs overflow on the calibration text"
    return "" if bool((diagonal > 0).any()) else "its inputs are all zero on the calibration text"


@dataclass
class _Call:
    """The arguments of one block, its hidden states left out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


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


class _NotAStack(Exception):  # noqa: N818
    """The blocks of a list are not run one after the other, each on what the one before gave."""


class _Run:
    """One gathering: how the model is run, and what came of it."""

    def __init__(
        self, model: Any, tokens: Tensor, names: Sequence[str], skip: set[str], weights: Weights, group: ProcessGroup
    ) -> None:
        self._model, self._names, self._skip, self._weights, self._group = model, list(names), skip, weights, group
        self._first_sequence = tokens[:1]
        self._batches = Batches(torch.split(tokens, _batch_size(tokens.shape[0])), group)
        self._stacks = stacks_of_blocks(model, names)
        self.unreached: dict[str, str] = {}

    def groups(self) -> Iterator[dict[str, Tensor]]:
        """See :func:`gather_hessians`."""
        captured = None
        ways = text_passes(self._model)
        # One list of blocks and a model that takes token ids: what almost every language model is.
        plain = len(self._stacks) == 1 and bool(ways)
        reach = Reach(0, []) if plain else self._find_reach()
        stack = next(iter(self._stacks), "") if plain else self._main_stack(reach)
        if stack:
            captured, works = self._capture(ways[reach.way], self._stacks[stack])
            if works:
                yield from self._by_blocks(ways[reach.way], stack, captured, reach)
                return
        if plain:
            reach = self._find_reach()
        if reach.way < 0:
            why = f"{type(self._model).__name__} cannot be run on text"
            why += f" ({reach.problems[0]})" if reach.problems else ", it takes no token ids"
            self.unreached |= {name: why for name in self._names if name not in self._skip}
            return
        yield from self._whole(ways[reach.way], reach.order, reach.repeated)

    def _find_reach(self) -> Reach:
        own = find_reach(self._model, self._first_sequence, self._names) if self._group.rank == 0 else Reach()
        return self._group.broadcast(own)

    def _main_stack(self, reach: Reach) -> str:
        """The list of blocks with most of the layers that text reaches."""
        counts = {name: sum(layer.startswith(f"{name}.") for layer in reach.order) for name in self._stacks}
        best = max(counts, key=counts.__getitem__, default="")
        return best if best and counts[best] else ""

    def _capture(self, way: TextPass, blocks: list[nn.Module]) -> tuple[_Captured | None, bool]:
        """Record what the blocks are called with, and whether all processes could."""
        captured, works = None, True
        try:
            if self._batches.mine:
                captured = _capture(way, blocks, self._batches.mine)
        except Exception:  # a model may break in any way when it is stopped on its way; it is run whole then
            works = False
        return captured, all(self._group.gather([works]))

    def _by_blocks(
        self, way: TextPass, stack: str, captured: _Captured | None, reach: Reach
    ) -> Iterator[dict[str, Tensor]]:
        inside = [name for name in self._names if name.startswith(f"{stack}.")]
        outside = [name for name in self._names if name not in set(inside)]
        probed = bool(reach.order)
        # Without a probe nobody knows the order of these few layers, and the names are as good.
        ordered = [name for name in reach.order if name in set(outside)] if probed else sorted(outside)
        yield from self._whole(way, ordered, reach.repeated)
        blocks = self._stacks[stack]
        done: set[str] = set()
        for number, block in enumerate(blocks):
            layers = sorted({name for name in inside if name.startswith(f"{stack}.{number}.")} - self._skip)

            def run(i: int, block: nn.Module = block, number: int = number) -> None:
                assert captured is not None, "a process with a batch has captured it"
                call = captured.calls[number]
                captured.hidden[i] = _first(block(captured.hidden[i], *call.args, **call.kwargs))

            with self._weights.block(block):
                try:
                    sums = self._batches.add_up(self._model, layers, run)
                except Exception as error:  # a model may break in any way
                    self._give_up([name for name in inside if name not in self._skip | done], error)
                    return
                done.update(layers)
                if captured is not None and block is blocks[-1]:
                    _check_replay(captured.hidden[0], captured.output)
                yield {name: hessian for name, hessian in sums.items() if hessian is not None}

    def _whole(self, way: TextPass, order: Sequence[str], repeated: set[str]) -> Iterator[dict[str, Tensor]]:
        """Gather by passes through the whole model, the last layers first."""
        wanted = [name for name in reversed(order) if name not in self._skip]
        for chunk in self._chunks(wanted):
            try:
                sums = self._batches.add_up(
                    self._model, chunk, lambda i: way(self._batches.mine[i]), alone=repeated.intersection(chunk)
                )
            except Exception as error:  # a model may break in any way
                self._give_up(chunk, error)
                continue
            for block, layers in self._owners(chunk):
                with self._weights.block(block) if block is not None else contextlib.nullcontext():
                    yield {name: hessian for name in layers if (hessian := sums[name]) is not None}

    def _give_up(self, names: Sequence[str], error: Exception) -> None:
        """Note that a model broke; where several processes share the run it ends, for the others wait for this one."""
        why = f"{type(self._model).__name__} breaks on text ({one_line(error)})"
        if self._group.world_size > 1 or isinstance(error, CalibrationError):
            raise UncalibratableError(
                why, remedy="Use a method that needs no calibration, such as stochastic."
            ) from error
        self.unreached |= dict.fromkeys(names, why)

    def _chunks(self, names: Sequence[str]) -> Iterator[list[str]]:
        """Layers whose statistics are in memory together."""
        chunk: list[str] = []
        held = 0
        for name in names:
            size = 4 * self._in_features(name) ** 2
            if chunk and held + size > _MAX_STATISTICS_BYTES:
                yield chunk
                chunk, held = [], 0
            chunk.append(name)
            held += size
        if chunk:
            yield chunk

    def _in_features(self, name: str) -> int:
        module = self._model.get_submodule(name)
        features = getattr(module, "in_features", None)
        return int(features) if isinstance(features, int) else int(module.weight.shape[0])

    def _owners(self, names: Sequence[str]) -> Iterator[tuple[nn.Module | None, list[str]]]:
        """The layers by the block that they lie in."""
        by_block: dict[str, list[str]] = {}
        for name in names:
            stack = next((stack for stack in self._stacks if name.startswith(f"{stack}.")), None)
            block = "" if stack is None else f"{stack}.{name[len(stack) + 1 :].partition('.')[0]}"
            by_block.setdefault(block, []).append(name)
        for block, layers in by_block.items():
            yield (self._model.get_submodule(block) if block else None), layers


def _batch_size(num_sequences: int) -> int:
    """The largest divisor up to a limit: all batches have one shape, so one set of masks serves them all."""
    return max(size for size in range(1, _MAX_BATCH + 1) if num_sequences % size == 0)


def _capture(way: TextPass, blocks: list[nn.Module], batches: Sequence[Tensor]) -> _Captured:
    """Record all inputs of the first block, and on the first batch all blocks' arguments and the last one's output.

    Raises:
        _NotAStack: The blocks do not run once each, one on the output of the other, or their other arguments differ
            from batch to batch.
    """
    calls: dict[int, _Call] = {}
    hidden: list[Tensor] = []
    output: list[Tensor] = []
    number = {id(block): index for index, block in enumerate(blocks)}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = number[id(module)]
        states, call = _split(args, kwargs)
        if index == 0:
            hidden.append(states)
            if len(hidden) > 1:
                _require_same(call, calls[0])
                raise StopForward
        elif not output or not (states is output[-1] or torch.equal(states, output[-1])):
            raise _NotAStack
        if index != len(calls):
            raise _NotAStack
        calls[index] = call

    def after(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        output[:] = [_first(result)]
        if number[id(module)] == len(blocks) - 1:
            raise StopForward  # the logits of a large vocabulary would be the largest tensor of all

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(after) for block in blocks]
    try:
        for batch in batches:
            with contextlib.suppress(StopForward):
                way(batch)
    finally:
        remove(handles)
    if len(calls) != len(blocks) or len(number) != len(blocks) or len(hidden) != len(batches) or not output:
        raise _NotAStack
    return _Captured([calls[index] for index in range(len(blocks))], hidden, output[0])


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, _Call]:
    rest = dict(kwargs)
    states = args[0] if args else rest.pop("hidden_states", None)
    if not isinstance(states, Tensor):
        raise _NotAStack
    return states, _Call(args[1:], rest)


def _require_same(one: _Call, other: _Call) -> None:
    """Arguments that differ between batches would have to be kept for each."""
    first, second = dict(enumerate(one.args)) | one.kwargs, dict(enumerate(other.args)) | other.kwargs
    for name, value in first.items():
        if not _is_same(value, second.get(name)):
            raise _NotAStack


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and torch.equal(one, other))
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    return type(one) is type(other)


def _first(result: Any) -> Tensor:
    first = next(iter(result.values())) if isinstance(result, Mapping) else result
    first = first[0] if isinstance(first, (tuple, list)) else first
    if not isinstance(first, Tensor):
        raise _NotAStack
    return first


def _check_replay(replayed: Tensor, recorded: Tensor) -> None:
    """A block that got something else in the forward pass than in ours would be calibrated on the wrong inputs."""
    if not bool(torch.isfinite(recorded).all()):
        return  # what overflows is found layer by layer
    scale = recorded.float().norm()
    error = (replayed.float() - recorded.float()).norm()
    if not error <= _MAX_REPLAY_ERROR * scale:
        raise UncalibratableError(
            "the blocks of this model give other outputs one by one than in a forward pass",
            remedy="Use a method that needs no calibration, such as stochastic.",
        )
