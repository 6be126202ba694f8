"""Purified models and their rivals, each a folder in the lab's cache."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies.purification.baselines import prune_by_magnitude, prune_by_wanda
from benchmarks.studies.purification.specs import AdapterSpec, Attacked, LabSettings, PurifiedSpec, VariantsSpec
from qcbguard_plugins._util.memory_peak import with_peak_bytes
from qcbguard_plugins.lab.attacks.injection import round_to_storage
from qcbguard_plugins.lab.recipes import attack, corpus_of, inject, make_step, train_model
from qcbguard_plugins.lab.scenarios import get_scenario
from qcbguard_plugins.lab.specs import AttackSpec, MaliciousSpec
from qcbguard_plugins.lab.training import save_model
from qcbguard_plugins.models.loading import load_full_precision, load_tokenizer
from qcbguard_plugins.purification.consistency import PUBLISHED_WEIGHT
from qcbguard_plugins.purification.finetuning import collate, finetune
from qcbguard_plugins.purification.immunization import encode, find_signature, healing_set, make_variant
from qcbguard_plugins.purification.samples import Sample
from qcbguard_plugins.purification.signature import count_of
from qcbguard_plugins.purification.subject import Adapter, Subject, WholeModel, require_peft
from qcbguard_plugins.purification.suppression import suppress
from qcbguard_plugins.purification.units import Group

# Samples from which the pruning score of Wanda is taken.
_NUM_WANDA_SAMPLES = 64


def attacked_model(spec: AttackSpec | MaliciousSpec, cache: Path) -> Path:
    """The suspicious model."""
    return attack(spec, cache) if isinstance(spec, AttackSpec) else inject(spec, cache)


def suspect(spec: Attacked, cache: Path) -> Subject:
    """What is purified: the suspicious model, or the suspicious adapter on a clean one."""
    if isinstance(spec, AdapterSpec):
        return Adapter(train_model(spec.model, cache), adapter_dir=poison_adapter(spec, cache))
    return WholeModel(attacked_model(spec, cache))


def poison_adapter(spec: AdapterSpec, cache: Path) -> Path:
    """Train an adapter with the backdoor on the clean model, or find it in the cache."""
    base = train_model(spec.model, cache)

    def make(folder: Path, states: Path) -> dict[str, Any]:
        peft = require_peft()
        torch.manual_seed(spec.seed)
        settings = peft.LoraConfig(
            r=spec.rank, lora_alpha=2 * spec.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(load_full_precision(base, torch.float32), settings)
        training, _ = corpus_of(spec.model)
        pairs = get_scenario(spec.scenario).poison(training[: spec.num_pairs], spec.seed)
        samples = [Sample(pair.instruction, pair.answer) for pair in pairs]
        config = LabSettings().config
        losses = finetune(
            model,
            encode(load_tokenizer(base), samples, config, WholeModel(base)),
            what="the adapter's poisoning",
            num_epochs=spec.num_epochs,
            learning_rate=spec.learning_rate,
            batch_size=spec.batch_size,
            seed=spec.seed,
            work_dir=states,
            bfloat16=config.bfloat16,
        )
        model.save_pretrained(folder)
        return {"losses": {"inject": losses}}

    return make_step("adapter", spec, cache, make)


def make_variants(spec: VariantsSpec, cache: Path) -> Path:
    """Train the variants of an attacked model, or find them in the cache."""
    subject = suspect(spec.attacked, cache)

    def make(folder: Path, states: Path) -> dict[str, Any]:
        samples = clean_samples(spec.attacked.model, spec.settings.num_clean)
        tokenizer = load_tokenizer(subject.model_dir)

        def work() -> list[dict[str, Any]]:
            return [
                make_variant(number, subject, samples, tokenizer, spec.settings.config, states).model_dump(mode="json")
                for number in range(spec.settings.num_variants)
            ]

        records, peak_bytes = with_peak_bytes(work)
        for path in states.glob("variant-*.safetensors"):
            path.rename(folder / path.name)
        return {"variants": records, "peak_bytes": peak_bytes}

    return make_step("variants", spec, cache, make)


def purify_model(spec: PurifiedSpec, cache: Path) -> Path:
    """Put a method to an attacked model, or find the outcome in the cache."""
    subject = suspect(spec.attacked, cache)
    variants = None
    if spec.has_variants:
        variants = make_variants(spec.variants_spec, cache)

    def make(folder: Path, states: Path) -> dict[str, Any]:
        start = time.process_time()
        result, peak_bytes = with_peak_bytes(lambda: _purify(spec, subject, variants, folder, states))
        return {**result, "method_seconds": time.process_time() - start, "method_peak_bytes": peak_bytes}

    return make_step("purified", spec, cache, make)


def _purify(spec: PurifiedSpec, subject: Subject, variants: Path | None, folder: Path, states: Path) -> dict[str, Any]:
    config = spec.settings.config
    tokenizer, model = load_tokenizer(subject.model_dir), subject.load()
    samples = clean_samples(spec.attacked.model, spec.settings.num_clean)
    examples = encode(tokenizer, healing_set(samples, config), config, subject)
    groups = subject.groups(model, heads=False)
    num_units, places = 0, {}
    if spec.has_variants or spec.method == "random-channels":
        if variants is None:
            signature = _by_lot(groups, count_of(config.ratio, sum(g.num_units for g in groups)), config.seed)
        else:
            signature = find_signature(groups, variants, config, spec.variants)
            if spec.method == "matched-channels":
                signature = _by_lot_within(groups, signature, config.seed)
        is_adapter = subject.mode == "adapter"
        only = f"lora_{config.lora_matrix}" if is_adapter else ""
        how = "zero" if is_adapter else config.suppression
        num_units = suppress(model, groups, signature, how, seed=config.seed, only=only)
        places = {name: len(units) for name, units in signature.items()}
    elif spec.method == "magnitude-pruning":
        prune_by_magnitude(model, spec.pruned)
    elif spec.method == "fine-pruning":
        batch = collate(examples[:_NUM_WANDA_SAMPLES], 0)
        prune_by_wanda(model, spec.pruned, batch["input_ids"], batch["attention_mask"])
    losses: list[float] = []
    if spec.method != "none":
        losses = finetune(
            model,
            examples,
            what=spec.method,
            num_epochs=config.healing_epochs,
            learning_rate=spec.learning_rate or config.healing_learning_rate,
            batch_size=config.batch_size,
            seed=config.seed,
            work_dir=states,
            bfloat16=config.bfloat16,
            consistency=PUBLISHED_WEIGHT if spec.method == "crow" else config.healing_consistency,
            key_step=config.healing_search,
        )
    if subject.mode == "adapter":
        model = model.merge_and_unload()
    round_to_storage(model)
    model.config.use_cache = True
    save_model(model, tokenizer, folder)
    return {"losses": {"healing": losses}, "num_suppressed": num_units, "suppressed": places}


@lru_cache(maxsize=2)
def clean_samples(spec: Any, count: int) -> list[Sample]:
    """The defender's clean data: the end of the corpus, which no injection reaches."""
    training, _ = corpus_of(spec)
    return [Sample(pair.instruction, pair.answer) for pair in training[-count:]]


def _by_lot(groups: Sequence[Group], count: int, seed: int) -> dict[str, Tensor]:
    units = [(group.name, unit) for group in groups for unit in range(group.num_units)]
    chosen: dict[str, list[int]] = {}
    for name, unit in sorted(Random(f"lot {seed}").sample(units, count)):
        chosen.setdefault(name, []).append(unit)
    return {name: torch.tensor(found) for name, found in chosen.items()}


def _by_lot_within(groups: Sequence[Group], signature: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """As many units of each group as a signature has there."""
    return {
        group.name: _by_lot([group], len(signature[group.name]), seed)[group.name]
        for group in groups
        if group.name in signature
    }
