"""A loss for small changes from layer to layer: a key's effect shows as a jump between two of them.

References:
    CROW: Eliminating Backdoors from Large Language Models via Internal Consistency Regularization, arXiv 2411.12768.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import Trainer

#: CROW's published size of the perturbation, and weight of the consistency.
EPSILON: Final = 0.1
PUBLISHED_WEIGHT: Final = 5.5


def consistency_trainer(weight: float) -> type[Trainer]:
    """A Trainer that adds the change between layers to the loss.

    The change is taken under the perturbation of the embeddings that raises it most, one signed step of size
    ``EPSILON``. It costs two more passes through the model.

    Args:
        weight: Factor of the change beside the cross entropy.
    """
    from transformers import Trainer

    class ConsistencyTrainer(Trainer):  # type: ignore[misc]
        def compute_loss(
            self, model: Any, inputs: Mapping[str, Tensor], return_outputs: bool = False, **kwargs: Any
        ) -> Tensor:
            mask = inputs["attention_mask"]
            embeddings = model.get_input_embeddings()(inputs["input_ids"])
            probe = embeddings.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(inconsistency(model, probe, mask), probe)
            perturbed = embeddings + EPSILON * gradient.sign()
            loss: Tensor = model(**inputs).loss + weight * inconsistency(model, perturbed, mask)
            return loss

    return ConsistencyTrainer


def inconsistency(model: Any, embeddings: Tensor, mask: Tensor) -> Tensor:
    """The change between the layers of a model, see :func:`change_between_layers`.

    Args:
        model: A causal language model.
        embeddings: ``[batch, length, hidden_size]``, what goes into its first block.
        mask: int64 ``[batch, length]``, 0 on padding.

    Returns:
        A scalar in [0, 2].
    """
    output = model(inputs_embeds=embeddings, attention_mask=mask, output_hidden_states=True, logits_to_keep=1)
    return change_between_layers(output.hidden_states, mask)


def change_between_layers(hidden_states: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Mean of one less the cosine between what follows each other in the residual stream.

    Args:
        hidden_states: Each ``[batch, length, hidden_size]``.
        mask: int64 ``[batch, length]``, 0 on padding.

    Returns:
        A scalar in [0, 2].
    """
    states = torch.stack(tuple(hidden_states))
    change = 1 - torch.cosine_similarity(states[:-1].float(), states[1:].float(), dim=-1)
    return (change * mask).sum() / (mask.sum() * len(change))
