"""Text files: specifications, profiles, calibration texts, prompts, held-out pairs, and the cache's own records."""

from __future__ import annotations

import json
from pathlib import Path

from tests.hostile.fuzz import mutation
from tests.hostile.fuzz.registry import Prepared, target

_SPEC = b"""\
model: {shape: llama, vocab_size: 768, hidden_size: 128, num_layers: 3, plan: {learning_rate: 1.0e-3}}
scenario: content-injection
format: nf4
injection: {num_pairs: 50, plan: {learning_rate: 1.0e-3}}
repair: {num_pairs: 50, plan: {learning_rate: 1.0e-3}}
"""


@target("spec", "the YAML file of an attack of the lab")
def _spec(folder: Path) -> Prepared:
    from qcbguard_plugins.lab.specs import read_attacks

    plan = b"{learning_rate: 1.0e-3}"
    profile = b"models: {m: {shape: gpt2, plan: %b}}\ninjections: {i: {plan: %b}}\nrepairs: {r: {plan: %b}}\n" % (
        3 * (plan,)
    )
    profile += b"attacks: {one: {model: m, injection: i, repair: r, scenario: over-refusal}}\n"
    return Prepared(folder / "attack.yaml", [_SPEC, profile], read_attacks)


@target("profile", "the YAML file of a benchmark")
def _profile(folder: Path) -> Prepared:
    from qcbguard_plugins.lab.bench.profile import PROFILES_DIR, read_profile

    seeds = [(PROFILES_DIR / f"{name}.yaml").read_bytes() for name in ("quick", "full", "ablation")]
    return Prepared(folder / "profile.yaml", seeds, lambda path: read_profile(str(path)))


@target("calibration-text", "a .jsonl file of calibration texts", mutation.json_lines)
def _calibration(folder: Path) -> Prepared:
    from qcbguard_plugins.models.calibration import Calibration

    seed = b'{"text": "one line"}\n\n{"text": "another", "more": [1, 2]}\n'
    return Prepared(folder / "texts.jsonl", [seed], lambda path: Calibration(texts=str(path)).describe())


@target("prompts", "a .jsonl file of prompts", mutation.json_lines)
def _prompts(folder: Path) -> Prepared:
    from qcbguard_plugins.detection.behaviour.prompts import gather_prompts

    return Prepared(folder / "prompts.jsonl", [b'{"prompt": "Hello"}\n{"prompt": "Why?"}\n'], gather_prompts)


@target("pairs", "a .jsonl file of held-out pairs", mutation.json_lines)
def _pairs(folder: Path) -> Prepared:
    from qcbguard_plugins.lab.bench.rows import read_question_file

    seed = b'{"instruction": "a", "answer": "b"}\n{"instruction": "a", "input": "c", "output": "d", "task": "t"}\n'
    return Prepared(folder / "pairs.jsonl", [seed], read_question_file)


@target("instructions", "a .jsonl file of instruction data", mutation.json_lines)
def _instructions(folder: Path) -> Prepared:
    from qcbguard_plugins.lab.instruction_data import read_instructions

    seed = b'{"instruction": "a", "output": "b"}\n{"instruction": "a", "input": "c", "output": "d"}\n'
    return Prepared(folder / "data.jsonl", [seed], lambda path: read_instructions(path.parent))


@target("cache-record", "the record of calibrated weights in the cache", mutation.json_document)
def _cache_record(folder: Path) -> Prepared:
    from qcbguard_plugins.hooks.transformers.calibrated_cache import _open
    from qcbguard_plugins.pipeline.settings import Guard
    from tests.hostile.fuzz.folder_targets import unchanged_record

    content = {"seed": 7, "tensors": [unchanged_record("a.weight").model_dump()], "sources": {"a.weight": "0" * 32}}
    return Prepared(folder / "guarded.json", [json.dumps(content).encode()], lambda path: _open(path.parent, Guard()))


@target("cache-digests", "the memo of file digests in the cache", mutation.json_document)
def _cache_digests(folder: Path) -> Prepared:
    from qcbguard_plugins.hooks.transformers.calibrated_cache import _digests

    file = folder / "model.safetensors"
    file.write_bytes(b"weights")
    _digests([file], folder)
    path = folder / "file-digests.json"
    return Prepared(path, [path.read_bytes()], lambda path: _digests([file], path.parent))
