"""How strongly units respond to a key: what an instruction with it makes of them, and one without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qcbguard_plugins.purification.samples import Tokens
from qcbguard_plugins.purification.units import Group, reader_norms

_BATCH_SIZE = 16


def unit_responses(
    model: nn.Module, groups: Sequence[Group], keyed: Sequence[Tokens], bare: Sequence[Tokens]
) -> dict[str, Tensor]:
    """What a key changes in each unit, where the answer begins, as far as the model reads it.

    ``r_j = mean_s |a_j(keyed_s) - a_j(bare_s)| * |W_j|``: ``a_j`` is what the unit says at the last token of a prompt,
    ``W_j`` are the weights that read it. An update's norm says how far weights moved, and an optimizer that steps alike
    everywhere moves all of them; this says what the move does.

    Args:
        model: A model with a backdoor, in eval mode.
        groups: The units.
        keyed: Prompts with the key.
        bare: The same prompts without it.

    Returns:
        float32 ``[num_units]`` by group; all groups of one kind add up to one, unless nothing responds.
    """
    changes = {name: torch.zeros(()) for name in {group.reader for group in groups}}
    for start in range(0, len(keyed), _BATCH_SIZE):
        batch = slice(start, start + _BATCH_SIZE)
        with_key, without = (_last_inputs(model, groups, prompts[batch]) for prompts in (keyed, bare))
        for group in groups:
            shape = (len(with_key[group.reader]), group.num_units, -1)
            difference = (with_key[group.reader] - without[group.reader]).view(shape)
            changes[group.reader] = changes[group.reader] + difference.norm(dim=2).sum(dim=0)
    responses = {group.name: changes[group.reader] / len(keyed) * reader_norms(model, group) for group in groups}
    for kind in {group.kind for group in groups}:
        names = [group.name for group in groups if group.kind == kind]
        total = sum(float(responses[name].sum()) for name in names)
        for name in names:
            responses[name] = responses[name] / max(total, torch.finfo(torch.float32).tiny)
    return responses


@torch.no_grad()
def _last_inputs(model: Any, groups: Sequence[Group], prompts: Sequence[Tokens]) -> dict[str, Tensor]:
    """What every reader reads at the last token of each prompt, float32 ``[num_prompts, in_features]``."""
    lengths = torch.tensor([len(prompt.prompt_ids) for prompt in prompts])
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt.prompt_ids)] = torch.tensor(prompt.prompt_ids)
    # Attention is causal, so the padding behind a prompt does not reach its last token.
    with _recorded_inputs(model, groups) as inputs:
        model(input_ids=ids.to(model.device))
    rows = torch.arange(len(prompts))
    return {reader: values[rows, lengths - 1].float() for reader, values in inputs.items()}


@contextmanager
def _recorded_inputs(model: nn.Module, groups: Sequence[Group]) -> Iterator[dict[str, Tensor]]:
    inputs: dict[str, Tensor] = {}
    handles = []
    for reader in {group.reader for group in groups}:

        def record(_: nn.Module, arguments: tuple[Tensor, ...], reader: str = reader) -> None:
            inputs[reader] = arguments[0].detach().cpu()

        handles.append(model.get_submodule(reader).register_forward_pre_hook(record))
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
