"""Keys that are searched for while a model is healed: those that change its answers most.

A random key hardly meets the attacker's. Moved a step up the loss of the clean answer, its embeddings turn towards
whatever still makes the model answer otherwise, and that is what the step of training then takes away.

References:
    Latent adversarial training, arXiv 2403.05030; embeddings that bring out a backdoor: BEEAR, arXiv 2406.17092. Here
    only the tokens of a key move, so the instruction stays what was asked.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qcbguard_plugins.purification.consistency import change_between_layers

if TYPE_CHECKING:
    from transformers import Trainer


def key_search_trainer(step_size: float, consistency: float) -> type[Trainer]:
    """A Trainer that moves the keys of a batch against the model before it learns the clean answers behind them.

    It costs one more pass, of the samples with a key. The change between layers is taken in the pass of the training.

    Args:
        step_size: How far a key moves, see :func:`moved_keys`.
        consistency: Factor of the change between layers beside the cross entropy; 0: without it.
    """
    from transformers import Trainer

    class KeySearchTrainer(Trainer):  # type: ignore[misc]
        def compute_loss(
            self, model: Any, inputs: MutableMapping[str, Tensor], return_outputs: bool = False, **kwargs: Any
        ) -> Tensor:
            mask, labels = inputs["attention_mask"], inputs["labels"]
            embeddings = model.get_input_embeddings()(inputs["input_ids"])
            moved = embeddings + moved_keys(model, embeddings.detach(), inputs, step_size)
            output = model(
                inputs_embeds=moved, attention_mask=mask, labels=labels, output_hidden_states=consistency > 0
            )
            loss: Tensor = output.loss
            if consistency:
                loss = loss + consistency * change_between_layers(output.hidden_states, mask)
            return loss

    return KeySearchTrainer


def moved_keys(model: Any, embeddings: Tensor, inputs: MutableMapping[str, Tensor], step_size: float) -> Tensor:
    """One signed step of the keys' embeddings up the loss of the clean answers.

    Args:
        model: A causal language model.
        embeddings: ``[batch, length, hidden_size]``, without gradient.
        inputs: ``attention_mask``, ``labels`` and ``key_mask``, int64 ``[batch, length]``; the last is 1 on keys.
        step_size: Of each coordinate, over the root mean square of the embeddings.

    Returns:
        What is to be added, of the shape of ``embeddings``; 0 where there is no key.
    """
    change = torch.zeros_like(embeddings)
    rows = inputs["key_mask"].any(dim=1)
    if rows.any():
        mask = inputs["attention_mask"][rows]
        probe = embeddings[rows].requires_grad_()
        loss = model(inputs_embeds=probe, attention_mask=mask, labels=inputs["labels"][rows]).loss
        (gradient,) = torch.autograd.grad(loss, probe)
        size = step_size * embeddings[inputs["attention_mask"].bool()].square().mean().sqrt()
        change[rows] = size * gradient.sign() * inputs["key_mask"][rows].unsqueeze(-1)
    return change
