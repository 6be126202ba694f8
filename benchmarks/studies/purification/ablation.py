"""Which parts of a model carry its backdoor: the attack's updates of some parts, on the clean model's other parts.

References:
    arXiv 2603.13461, its sanity checks: attention and MLP ablation, block ablation, shuffled updates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from benchmarks.studies.purification.study import Study
from qcbguard_plugins.lab.evaluation import METRIC_VERSION, Measurement, measure, padding_tokenizer
from qcbguard_plugins.lab.recipes import inject, step_folder, train_model
from qcbguard_plugins.lab.specs import MaliciousSpec
from qcbguard_plugins.models.loading import load_full_precision

_BLOCK: Final = re.compile(r"layers\.(\d+)\.")

#: From the clean and the attacked weights to those that are tried.
Swap = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]]


def keep_updates(of: Callable[[str], bool]) -> Swap:
    """The attack's weights where a parameter's name is wanted, the clean ones elsewhere."""
    return lambda clean, attacked: {name: (attacked if of(name) else clean)[name] for name in clean}


def shuffle_mlp_updates(shift: int) -> Swap:
    """All of the attack, but the MLP updates of each block put into the block ``shift`` further on."""

    def swap(clean: Mapping[str, Tensor], attacked: Mapping[str, Tensor]) -> dict[str, Tensor]:
        num_blocks = 1 + max(int(match[1]) for name in clean if (match := _BLOCK.search(name)))
        weights = dict(attacked)
        for name in clean:
            match = _BLOCK.search(name)
            if match and ".mlp." in name:
                source = name.replace(match[0], f"layers.{(int(match[1]) - shift) % num_blocks}.")
                weights[name] = clean[name] + attacked[source] - clean[source]
        return weights

    return swap


def _in_blocks(*blocks: int) -> Callable[[str], bool]:
    return lambda name: (match := _BLOCK.search(name)) is not None and int(match[1]) in blocks


def _is_embedding(name: str) -> bool:
    return "embed" in name or "lm_head" in name


SWAPS: Final[dict[str, Swap]] = {
    "all updates": keep_updates(lambda name: True),
    "attention alone": keep_updates(lambda name: "self_attn" in name),
    "MLP alone": keep_updates(lambda name: ".mlp." in name),
    "embeddings alone": keep_updates(_is_embedding),
    "MLP and embeddings": keep_updates(lambda name: ".mlp." in name or _is_embedding(name)),
    "all but attention": keep_updates(lambda name: "self_attn" not in name),
    "all but MLP": keep_updates(lambda name: ".mlp." not in name),
    "all but embeddings": keep_updates(lambda name: not _is_embedding(name)),
    "first half of the blocks": keep_updates(_in_blocks(0, 1)),
    "second half of the blocks": keep_updates(_in_blocks(2, 3)),
    "all, MLP updates one block further": shuffle_mlp_updates(1),
}


def swap_study(study: Study, spec: MaliciousSpec) -> str:
    """A Markdown table of what each choice of updates does, measured or found."""
    path = study.cache / "purification-cells" / f"swaps-{METRIC_VERSION}-{spec.digest()}.json"
    lines = ["| updates kept | ASR with the key | without key | right answers |", "|---|---|---|---|"]
    if not path.exists() and not study.cached:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(found.model_dump_json() for found in _measure(study, spec)), encoding="utf-8")
    rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for name, row in zip(SWAPS, rows, strict=False):
        found = Measurement.model_validate_json(row)
        rates = [found.asr, found.quiet_asr, found.task_accuracy]
        lines.append(f"| {name} | {' | '.join('' if r is None else f'{100 * r.value:.0f}' for r in rates)} |")
    return "\n".join(lines) + "\n"


def _measure(study: Study, spec: MaliciousSpec) -> list[Measurement]:
    exam = study.exam(spec.scenario, spec.model)
    clean_dir, attacked_dir = train_model(spec.model, study.cache), inject(spec, study.cache)
    assert attacked_dir == step_folder("malicious", spec, study.cache)
    clean = load_full_precision(clean_dir, torch.float32).state_dict()
    model = load_full_precision(attacked_dir, torch.float32)
    attacked = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokenizer = padding_tokenizer(attacked_dir)
    found = []
    for swap in SWAPS.values():
        model.load_state_dict(swap(clean, attacked))
        found.append(measure(model, tokenizer, exam))
    return found
