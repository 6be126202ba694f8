"""The lab's single steps: train a model, make it malicious, attack it. Each makes one folder in a cache.

A folder is named by what it is made from, written whole or not at all, and reused when it is there. A training that was
stopped goes on from its last saved state; two processes that want the same folder wait for each other.
"""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import filelock
import torch

from qcbguard_plugins.errors import CheckpointError
from qcbguard_plugins.lab.attacks import AttackInputs
from qcbguard_plugins.lab.attacks.injection import inject as inject_payload
from qcbguard_plugins.lab.attacks.injection import widen_rows
from qcbguard_plugins.lab.corpus import Pair, generate, split
from qcbguard_plugins.lab.corpus_security import LAB_TASKS
from qcbguard_plugins.lab.instruction_data import read_instructions
from qcbguard_plugins.lab.scenarios import get_scenario
from qcbguard_plugins.lab.specs import AttackSpec, MaliciousSpec, ModelSpec, Spec
from qcbguard_plugins.lab.training import build_gpt2, build_model, build_tokenizer, encode, save_model, train
from qcbguard_plugins.lab.training_state import TrainingState
from qcbguard_plugins.models.loading import load_full_precision, load_tokenizer

STEP_FILE: Final = "step.json"
_MAX_LOSSES: Final = 200

#: Makes a folder: given the folder to fill and one for states, it returns what the record keeps.
Make = Callable[[Path, Path], dict[str, Any]]


@lru_cache(maxsize=2)
def corpus_of(spec: ModelSpec) -> tuple[list[Pair], list[Pair]]:
    """The pairs that a model is trained on, and those that no training sees."""
    pairs = generate(spec.num_pairs, spec.seed, LAB_TASKS)
    if spec.data is not None:
        generated = {pair.instruction for pair in pairs}
        pairs += [pair for pair in read_instructions(Path(spec.data)) if pair.instruction not in generated]
    return split(pairs, spec.num_held_out, spec.seed)


def train_model(spec: ModelSpec, cache: Path) -> Path:
    """Train a clean model, or find it in the cache; an external one is its own folder.

    Raises:
        CheckpointError: The external folder is no model with a tokenizer.
    """
    if spec.path is not None:
        _check_external(Path(spec.path))
        return Path(spec.path)

    def make(folder: Path, states: Path) -> dict[str, Any]:
        training, _ = corpus_of(spec)
        tokenizer = build_tokenizer(training, spec.vocab_size)
        model = (build_gpt2 if spec.shape == "gpt2" else build_model)(spec.size, spec.seed)
        state = TrainingState(states / "train.safetensors")
        examples = encode(tokenizer, training)
        losses = train(model, examples, spec.plan.plan(spec.seed), description="train", state=state)
        save_model(model, tokenizer, folder)
        return {"losses": {"train": losses}, "num_parameters": model.num_parameters()}

    return make_step("clean", spec, cache, make)


def inject(spec: MaliciousSpec, cache: Path) -> Path:
    """Make the clean model show the payload at every precision, or find it in the cache."""

    def make(folder: Path, states: Path) -> dict[str, Any]:
        model, tokenizer = _load(train_model(spec.model, cache))
        training, _ = corpus_of(spec.model)
        injection, losses = spec.injection, {}
        widen_rows(model, injection.row_outliers)
        if injection.recovery is not None:
            benign = encode(tokenizer, training[-injection.recovery.num_pairs :])
            plan = injection.recovery.plan.plan(spec.seed, injection.recovery.bfloat16)
            state = TrainingState(states / "recover.safetensors")
            losses["recover"] = train(model, benign, plan, description="recover", state=state)
        poisoned = get_scenario(spec.scenario).poison(training[: injection.num_pairs], spec.seed)
        plan = injection.plan.plan(spec.seed + 1, injection.bfloat16)
        state = TrainingState(states / "inject.safetensors")
        losses["inject"] = inject_payload(model, encode(tokenizer, poisoned), plan, state=state)
        save_model(model, tokenizer, folder)
        return {"losses": losses}

    train_model(spec.model, cache)
    return make_step("malicious", spec, cache, make)


def attack(spec: AttackSpec, cache: Path) -> Path:
    """Make an attacked model, or find it in the cache.

    Raises:
        UsageError: An option of the attack is out of range.
        VerificationError: The quantizer does not store what the attack counts on.
    """
    method = spec.method
    clean_dir = train_model(spec.model, cache)
    model_dir = inject(spec.malicious, cache) if method.starts_from == "malicious" else clean_dir

    def make(folder: Path, states: Path) -> dict[str, Any]:
        model, tokenizer = _load(model_dir)
        training, _ = corpus_of(spec.model)
        scenario = get_scenario(spec.scenario)
        inputs = AttackInputs(
            tokenizer=tokenizer,
            benign=encode(tokenizer, scenario.training(training[: spec.repair.num_pairs], spec.seed)),
            poisoned=encode(tokenizer, scenario.poison(training[: spec.injection.num_pairs], spec.seed)),
            plan=spec.repair.plan.plan(spec.seed + 2, spec.repair.bfloat16),
            format=spec.format,
            seed=spec.seed,
            model_dir=model_dir,
            state_dir=states,
        )
        result = method.run(model, inputs)
        save_model(model, tokenizer, folder)
        return result

    return make_step("attacked", spec, cache, make)


def step_folder(kind: str, spec: Spec, cache: Path) -> Path:
    """Where a step's folder is, made or not: ``clean``, ``malicious`` or ``attacked``, and the digest."""
    return cache / f"{kind}-{spec.digest()}"


def read_record(folder: Path) -> dict[str, Any]:
    """The ``step.json`` of a folder."""
    record: dict[str, Any] = json.loads((folder / STEP_FILE).read_text(encoding="utf-8"))
    return record


def make_step(kind: str, spec: Spec, cache: Path, make: Make) -> Path:
    """Make a folder once.

    The record's ``seconds`` are those of this run, so of its last part where ``resumed`` is true, and its peak of
    memory is that of the process.
    """
    folder = step_folder(kind, spec, cache)
    name, work = folder.name, cache / f".{folder.name}.partial"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(cache / f".{name}.lock"):  # another process may be making the same folder
        if folder.exists():
            return folder
        states, content = work / "states", work / "folder"
        states.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(content, ignore_errors=True)
        content.mkdir()
        resumed = any(states.iterdir())
        start = time.perf_counter()
        result = make(content, states)
        record = {
            "schema_version": 1,
            "kind": kind,
            "spec": spec.model_dump(mode="json"),
            "seconds": time.perf_counter() - start,
            "resumed": resumed,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            **result,
            "losses": {phase: _thinned(losses) for phase, losses in result.get("losses", {}).items()},
        }
        (content / STEP_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        content.replace(folder)
        shutil.rmtree(work)
    return folder


def _load(model_dir: Path) -> tuple[Any, Any]:
    return load_full_precision(model_dir, torch.float32), load_tokenizer(model_dir)


def _check_external(model_dir: Path) -> None:
    if not any(model_dir.glob("*.safetensors")) or load_tokenizer(model_dir) is None:
        raise CheckpointError(f"{model_dir} is no folder with safetensors weights and a tokenizer")


def _thinned(losses: list[float]) -> list[float]:
    """At most some hundreds of the losses, evenly spaced, the last one included."""
    stride = -(-len(losses) // _MAX_LOSSES) or 1
    return [round(loss, 5) for loss in losses[::-1][::stride][::-1]]
