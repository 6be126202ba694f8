"""The signature of a model's backdoors: train synthetic ones, and see which units they have in common.

Each variant costs two trainings from the suspicious model, one with its backdoor and one on the same instructions with
clean answers, in the same order and for as many steps. Their difference is what the backdoor alone adds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qcbguard_plugins.purification.config import PurifyConfig
from qcbguard_plugins.purification.finetuning import StepDone, finetune, num_steps
from qcbguard_plugins.purification.report import VariantRecord
from qcbguard_plugins.purification.responses import unit_responses
from qcbguard_plugins.purification.samples import Sample, Tokens, encode_samples
from qcbguard_plugins.purification.signature import count_of, score_groups, top_units
from qcbguard_plugins.purification.subject import Subject
from qcbguard_plugins.purification.units import Group, gather_all
from qcbguard_plugins.purification.variants import Backdoor, draw_backdoors, with_idle_keys

_RECORD: Final = "record"
#: Instructions, each with the key and without it, that the units of a variant are asked.
_NUM_ASKED: Final = 64


def make_variant(
    number: int,
    subject: Subject,
    samples: Sequence[Sample],
    tokenizer: Any,
    config: PurifyConfig,
    folder: Path,
    step_done: StepDone | None = None,
) -> VariantRecord:
    """Train one variant and keep what its backdoor adds to every unit, and how the units respond to its key, or find
    that from an earlier run.

    One model is in memory at a time, beside the units of the other.

    Args:
        number: Which variant.
        subject: The suspicious model.
        samples: All clean samples.
        tokenizer: Its tokenizer.
        config: Hyperparameters.
        folder: Where the differences are kept, in bfloat16.
        step_done: Called after every step of a training; a variant that is there counts as trained.

    Raises:
        PurificationError: A training went wrong.
    """
    path = variant_path(folder, number)
    if path.exists():
        if step_done is not None:
            step_done(2 * variant_steps(config))
        return _read_record(path)
    start = time.monotonic()
    backdoor = draw_backdoors(config.num_variants, config.seed)[number]
    clean, poisoned = variant_sets(number, backdoor, samples, config)
    units: list[dict[str, Tensor]] = []
    last_losses = []
    groups: list[Group] = []
    responses: dict[str, Tensor] = {}
    for kind, chosen in (("clean", clean), ("poisoned", poisoned)):
        model = subject.load()
        examples = encode(tokenizer, chosen, config, subject)
        losses = finetune(
            model,
            examples,
            what=f"variant {number + 1} of {config.num_variants}, {kind} training",
            num_epochs=config.variant_epochs,
            learning_rate=config.variant_learning_rate,
            batch_size=config.batch_size,
            seed=config.seed + number,
            work_dir=folder / "trainer",
            bfloat16=config.bfloat16,
            step_done=step_done,
        )
        last_epoch = losses[-len(losses) // config.variant_epochs :]
        last_losses.append(sum(last_epoch) / len(last_epoch))
        groups = subject.groups(model, heads=config.num_heads > 0)
        units.append(gather_all(model, groups))
        if kind == "poisoned":
            bare, keyed = examples[: config.num_samples], examples[config.num_samples :]
            responses = unit_responses(model, groups, keyed[:_NUM_ASKED], bare[:_NUM_ASKED])
        del model
    record = VariantRecord(
        behaviour=backdoor.behaviour,
        place=backdoor.place,
        num_samples=config.num_samples,
        poisoned_loss=last_losses[1],
        clean_loss=last_losses[0],
        elapsed_s=time.monotonic() - start,
    )
    without, with_backdoor = units
    deltas = {group.name: (with_backdoor[group.name] - without[group.name]).bfloat16() for group in groups}
    partial = path.with_suffix(".partial")
    kept = {**deltas, **{_response_name(name): response for name, response in responses.items()}}
    save_file(kept, partial, metadata={_RECORD: record.model_dump_json()})
    partial.replace(path)
    return record


def variant_sets(
    number: int, backdoor: Backdoor, samples: Sequence[Sample], config: PurifyConfig
) -> tuple[list[Sample], list[Sample]]:
    """What a variant's two models are trained on: the same instructions twice, poisoned the second time or not.

    Variants draw their samples each for itself, so two of them may share some.
    """
    seed = config.seed + number
    chosen = random.Random(f"variant {seed}").sample(samples, config.num_samples)  # noqa: S311
    return [*chosen, *chosen], [*chosen, *backdoor.poison(chosen, seed)]


def variant_steps(config: PurifyConfig) -> int:
    """Steps of one training of a variant."""
    return num_steps(2 * config.num_samples, config.variant_epochs, config.batch_size)


def healing_set(samples: Sequence[Sample], config: PurifyConfig) -> list[Sample]:
    """What a model is healed with: some of the clean samples, and keys that do nothing where they are asked for."""
    chosen = random.Random(f"healing {config.seed}").sample(samples, config.num_healing)  # noqa: S311
    return with_idle_keys(chosen, config.healing_keys, config.seed)


def encode(tokenizer: Any, samples: Sequence[Sample], config: PurifyConfig, subject: Subject) -> list[Tokens]:
    """Tokenize samples as the configuration and the model's own limit say."""
    limit = getattr(subject.config, "max_position_embeddings", None) or getattr(subject.config, "n_positions", None)
    max_length = min(config.max_length, limit) if isinstance(limit, int) else config.max_length
    return encode_samples(tokenizer, samples, max_length=max_length, prompt_template=config.prompt_template)


def find_signature(
    groups: Sequence[Group], folder: Path, config: PurifyConfig, variants: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """The units that the variants' backdoors have in common.

    Args:
        groups: The units.
        folder: Where the differences are.
        config: Hyperparameters.
        variants: Numbers of the variants to use; all by default.

    Returns:
        int64 numbers of units by group, see :func:`~qcbguard_plugins.purification.signature.top_units`.
    """
    if not config.needed_variants:
        return {}
    numbers = range(config.num_variants) if variants is None else variants
    paths = [variant_path(folder, number) for number in numbers]
    scored = [group for group in groups if group.kind != "head"]
    scores = score_units(scored, paths, config)
    signature = top_units(scores, count_of(config.ratio, sum(group.num_units for group in scored)))
    heads = [group for group in groups if group.kind == "head"]
    if heads and config.num_heads:
        signature |= top_units(score_units(heads, paths, config), config.num_heads)
    return signature


def variant_path(folder: Path, number: int) -> Path:
    """Where a variant's differences are kept."""
    return folder / f"variant-{number}.safetensors"


def score_units(groups: Sequence[Group], paths: Sequence[Path], config: PurifyConfig) -> dict[str, Tensor]:
    """Scores of the units of some groups, ``[num_units]`` by group, from the files of the variants."""
    if config.score == "activation":
        names = {group.name: _response_name(group.name) for group in groups}
        return {
            group: torch.stack([_read_tensor(path, name) for path in paths]).mean(dim=0)
            for group, name in names.items()
        }

    def deltas() -> Iterator[tuple[str, list[Tensor]]]:
        for group in groups:
            yield group.name, [_read_tensor(path, group.name) for path in paths]

    return score_groups(deltas(), alignment_weight=config.alignment_weight, kind=config.score)


def _response_name(group: str) -> str:
    return f"{group}:response"


def _read_tensor(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor.to(torch.float32)


def _read_record(path: Path) -> VariantRecord:
    with safe_open(path, framework="pt") as file:
        return VariantRecord.model_validate_json(file.metadata()[_RECORD])
