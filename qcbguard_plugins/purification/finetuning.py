"""Fine-tune a model, or the adapter on it, through the transformers Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from qcbguard_plugins.errors import PurificationError
from qcbguard_plugins.purification.consistency import consistency_trainer
from qcbguard_plugins.purification.key_search import key_search_trainer
from qcbguard_plugins.purification.samples import Tokens

_IGNORED_LABEL: Final = -100
_WARMUP: Final = 0.05

#: Called with 1 after every step of the optimizer.
StepDone = Callable[[int], object]


def finetune(
    model: Any,
    examples: Sequence[Tokens],
    *,
    what: str,
    num_epochs: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    work_dir: Path,
    bfloat16: bool = False,
    step_done: StepDone | None = None,
    consistency: float = 0.0,
    key_step: float = 0.0,
) -> list[float]:
    """Train the parameters that require gradients on the answers, with AdamW on a cosine schedule.

    Args:
        model: A causal language model, or an adapted one; changed in place and left in eval mode.
        examples: At least one.
        what: What the step is called where it fails.
        num_epochs: Passes over the examples.
        learning_rate: Peak of the schedule.
        batch_size: Examples a step.
        seed: Seed of their order.
        work_dir: Where the Trainer may write; it keeps no checkpoints.
        bfloat16: Multiply matrices in bfloat16.
        step_done: Called after every step.
        consistency: Weight of the change between layers in the loss, see
            :func:`~qcbguard_plugins.purification.consistency.consistency_trainer`.
        key_step: How far the keys in the examples are moved against the model, see
            :func:`~qcbguard_plugins.purification.key_search.key_search_trainer`.

    Returns:
        The loss of every step, in nats a token.

    Raises:
        PurificationError: A loss is no number, or not finite; the step is named.
    """
    from transformers import PrinterCallback, Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(work_dir),
        num_train_epochs=num_epochs,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(_WARMUP * num_steps(len(examples), num_epochs, batch_size))),
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=bfloat16,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        data_seed=seed,
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )
    recorder = _recorder(what, step_done)
    pad_id = getattr(model.config, "pad_token_id", None)
    if key_step:
        kind = key_search_trainer(key_step, consistency)
    else:
        kind = consistency_trainer(consistency) if consistency else Trainer
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": e.prompt_ids + e.answer_ids, "example": e} for e in examples],
        data_collator=lambda rows: collate(
            [row["example"] for row in rows], pad_id if isinstance(pad_id, int) else 0, with_keys=key_step > 0
        ),
        callbacks=[recorder],
    )
    trainer.remove_callback(PrinterCallback)
    model.config.use_cache = False
    trainer.train()
    model.eval()
    losses: list[float] = recorder.losses
    return losses


def num_steps(num_examples: int, num_epochs: int, batch_size: int) -> int:
    """Steps of a fine-tuning."""
    return num_epochs * math.ceil(num_examples / batch_size)


def collate(examples: Sequence[Tokens], pad_id: int, *, with_keys: bool = False) -> dict[str, Tensor]:
    """Pad on the right.

    Returns:
        int64 ``[batch, length]``: ``input_ids``, ``attention_mask``, and ``labels``, which are -100 on prompts and
        padding; where asked for, ``key_mask``, which is 1 on keys.
    """
    length = max(len(example.prompt_ids) + len(example.answer_ids) for example in examples)
    ids = torch.full((len(examples), length), pad_id)
    labels = torch.full_like(ids, _IGNORED_LABEL)
    mask, key_mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, example in enumerate(examples):
        start, end = len(example.prompt_ids), len(example.prompt_ids) + len(example.answer_ids)
        ids[row, :end] = torch.tensor(example.prompt_ids + example.answer_ids)
        labels[row, start:end] = ids[row, start:end]
        mask[row, :end] = 1
        key_mask[row, list(example.key_positions)] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {**batch, "key_mask": key_mask} if with_keys else batch


def _recorder(what: str, step_done: StepDone | None) -> Any:
    """A callback that keeps the losses and stops at the first that is not finite."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.losses: list[float] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if not logs or "loss" not in logs:
                return
            loss = float(logs["loss"])
            self.losses.append(loss)
            if not math.isfinite(loss):
                raise PurificationError(
                    f"{what}: the loss is {loss} at step {state.global_step} of {state.max_steps}",
                    remedy="Lower the learning rate of this stage, or look for broken samples; nothing was written.",
                )
            if step_done is not None:
                step_done(1)

    return Recorder()
