"""Second moments of layer inputs, gathered block by block.

The model runs one decoder block at a time over all calibration sequences, so memory stays at the model plus the hidden
states plus the statistics of one block. Every block sees the inputs of the full-precision model: its outputs are
computed before the caller changes its weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

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


@torch.no_grad()
def gather_hessians(
    model: nn.Module, tokens: Tensor, names: Sequence[str], *, skip: Collection[str] = ()
) -> Iterator[dict[str, Tensor]]:
    """Yield the Hessians of the named layers, a block at a time.

    The weights of the layers that were yielded may be changed before the next step, and only those.

    Args:
        model: A causal language model in full precision.
        tokens: int64 ``[num_sequences, sequence_length]``.
        names: Dotted names of linear layers.
        skip: Those whose Hessians nobody wants.

    Yields:
        For each block, and first for layers outside all blocks: float32 ``x^T x`` ``[in_features, in_features]`` by
        layer name. Layers that share an input share the tensor.

    Raises:
        CalibrationError: The model has no list of blocks that can be run on their own, or a layer saw no input.
    """
    model.eval()
    blocks = _decoder_blocks(model, names)
    block_names = [set(_names_inside(model, block, names)) for block in blocks]
    outside = sorted(set(names).difference(*block_names, skip))
    batches = list(torch.split(tokens, _batch_size(tokens.shape[0])))
    calls, hidden, last_output = _capture(model, blocks, batches)
    if outside:

        def run_all() -> None:
            for batch in batches:
                model(input_ids=batch, use_cache=False)

        yield _run_with_hooks(model, outside, run_all)
    for block, inside, call in zip(blocks, block_names, calls, strict=True):

        def run(block: nn.Module = block, call: _Call = call) -> None:
            for i, states in enumerate(hidden):
                hidden[i] = _first(block(states, *call.args, **call.kwargs))

        hessians = _run_with_hooks(model, sorted(inside.difference(skip)), run)
        if block is blocks[-1]:
            _check_replay(hidden[0], last_output)
        yield hessians


def _batch_size(num_sequences: int) -> int:
    """The largest divisor up to a limit: all batches have one shape, so one set of masks serves them all."""
    return max(size for size in range(1, _MAX_BATCH + 1) if num_sequences % size == 0)


def _decoder_blocks(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
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


def _capture(
    model: nn.Module, blocks: list[nn.Module], batches: list[Tensor]
) -> tuple[list[_Call], list[Tensor], Tensor]:
    """Record all inputs of the first block, and on the first batch all blocks' arguments and the last one's output."""
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

    handles = [block.register_forward_pre_hook(record(i), with_kwargs=True) for i, block in enumerate(blocks)]
    handles.append(blocks[-1].register_forward_hook(lambda module, args, result: output.append(_first(result))))
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
    return [calls[i] for i in range(len(blocks))], hidden, output[0]


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, _Call]:
    if args:
        return args[0], _Call(args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), _Call((), rest)


def _first(result: Any) -> Tensor:
    first: Tensor = result[0] if isinstance(result, tuple) else result
    return first


def _run_with_hooks(model: nn.Module, names: list[str], run: Callable[[], Any]) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    source_of: dict[str, str] = {}
    previous: list[tuple[Tensor, str]] = []

    def accumulate(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            states = args[0]
            if previous and previous[0][0] is states:
                source_of[name] = previous[0][1]
                return
            previous[:] = [(states, name)]
            rows = states.reshape(-1, states.shape[-1]).float()
            if name in sums:
                sums[name].addmm_(rows.T, rows)
            else:
                sums[name] = rows.T @ rows

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(accumulate(name)) for name in names]
    try:
        run()
    finally:
        _remove(handles)
    missing = [name for name in names if name not in sums and name not in source_of]
    if missing:
        raise CalibrationError(
            f"no calibration input reached {len(missing)} layers",
            details=missing,
            remedy="Use more or other calibration text, or a method that needs none, such as stochastic.",
        )
    return {name: sums[source_of.get(name, name)] for name in names}


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
