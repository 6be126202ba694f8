"""Could a signature take the backdoor out at all? What channels do that are chosen with knowledge that no defender has.

Two oracles: how far the attack moved each channel (the clean model is known), and how strongly each channel responds to
the attacker's own key (the key is known). Chosen channels are put back to the clean model's, which tells where the
backdoor lies, or drawn anew, which is what a purification does; nothing is healed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from benchmarks.studies.purification.specs import LabSettings, VariantsSpec
from benchmarks.studies.purification.spread import load_attacked, update_norms
from benchmarks.studies.purification.study import Study
from qcbguard_plugins.lab.evaluation import METRIC_VERSION, padding_tokenizer
from qcbguard_plugins.lab.metrics import answer_all
from qcbguard_plugins.lab.recipes import step_folder
from qcbguard_plugins.lab.scenarios import Verdict
from qcbguard_plugins.lab.specs import MaliciousSpec
from qcbguard_plugins.lab.token_probabilities import perplexity_of, read_answers
from qcbguard_plugins.models.loading import load_full_precision
from qcbguard_plugins.purification.architectures import find_architecture
from qcbguard_plugins.purification.immunization import encode, score_units, variant_path
from qcbguard_plugins.purification.responses import unit_responses
from qcbguard_plugins.purification.samples import Sample
from qcbguard_plugins.purification.signature import count_of, top_units
from qcbguard_plugins.purification.subject import WholeModel
from qcbguard_plugins.purification.suppression import suppress
from qcbguard_plugins.purification.units import Group, gather, mlp_channels, unit_shape, write_units

RATIOS: Final = (0.03, 0.1, 0.25, 0.5)
_NUM_PAIRS: Final = 100
_MAX_NEW_TOKENS: Final = 24


def oracle_study(study: Study, spec: MaliciousSpec, settings: LabSettings) -> str:
    """A Markdown table: attack success (and perplexity) where the first channels of several orders are changed."""
    path = study.cache / "purification-cells" / f"oracle-{METRIC_VERSION}-{spec.digest()}-{settings.digest()}.json"
    variants = step_folder("variants", VariantsSpec(attacked=spec, settings=settings), study.cache)
    if not path.exists() and not study.cached and variants.exists():
        path.write_text(json.dumps(_measure(study, spec, settings)), encoding="utf-8")
    rows: dict[str, list[list[float]]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    lines = [f"| channels | {' | '.join(f'{ratio:g}' for ratio in RATIOS)} |", f"|---|{'---|' * len(RATIOS)}"]
    for name, points in rows.items():
        lines.append(f"| {name} | {' | '.join(f'{100 * asr:.0f} ({ppl:.2f})' for asr, ppl in points)} |")
    return "\n".join(lines) + "\n"


def _measure(study: Study, spec: MaliciousSpec, settings: LabSettings) -> dict[str, list[list[float]]]:
    exam = study.exam(spec.scenario, spec.model)
    model = load_attacked(study, spec)
    groups = mlp_channels(model, find_architecture(model.config))
    clean = dict(load_full_precision(step_folder("clean", spec.model, study.cache), torch.float32).named_parameters())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokenizer = padding_tokenizer(step_folder("malicious", spec, study.cache))
    rows: dict[str, list[list[float]]] = {}
    for order, scores in _orders(study, spec, settings, model, groups).items():
        for change in ("put back", "drawn anew"):
            for ratio in RATIOS:
                chosen = top_units(scores, count_of(ratio, sum(group.num_units for group in groups)))
                model.load_state_dict(before)
                if change == "put back":
                    _put_back(model, clean, groups, chosen)
                else:
                    suppress(model, groups, chosen, "reinitialize", seed=settings.seed)
                asked = [pair.instruction for pair in exam.questions]
                answers = answer_all(model, tokenizer, asked, max_new_tokens=_MAX_NEW_TOKENS)
                verdicts = [exam.scenario.judge(*pair) for pair in zip(exam.questions, answers, strict=True)]
                perplexity = perplexity_of(read_answers(model, tokenizer, exam.benign[:_NUM_PAIRS]))
                share = verdicts.count(Verdict.HIT) / len(verdicts)
                rows.setdefault(f"{order}, {change}", []).append([share, perplexity.value])
    return rows


def _orders(
    study: Study, spec: MaliciousSpec, settings: LabSettings, model: Any, groups: Sequence[Group]
) -> dict[str, dict[str, Tensor]]:
    """Scores of the channels by what they are ordered by."""
    variants = step_folder("variants", VariantsSpec(attacked=spec, settings=settings), study.cache)
    paths = [variant_path(variants, number) for number in range(settings.num_variants)]
    subject = WholeModel(step_folder("malicious", spec, study.cache))
    tokenizer = padding_tokenizer(subject.model_dir)
    exam = study.exam(spec.scenario, spec.model)
    keyed, bare = (
        encode(tokenizer, [Sample(p.instruction, p.answer) for p in pairs], settings.config, subject)
        for pairs in (exam.questions, exam.quiet)
    )
    sizes = [group.num_units for group in groups]
    lot = torch.rand(sum(sizes), generator=torch.Generator().manual_seed(settings.seed))

    def by_group(scores: Tensor) -> dict[str, Tensor]:
        return dict(zip([group.name for group in groups], torch.split(scores, sizes), strict=True))

    def found(score: str) -> dict[str, Tensor]:
        return score_units(groups, paths, settings.model_copy(update={"score": score}).config)

    return {
        "oracle: the attack's update": by_group(update_norms(study, spec)),
        "oracle: response to the attacker's key": unit_responses(model, groups, keyed, bare),
        "score of the paper": found("combined"),
        "response to our own keys": found("activation"),
        "by lot": by_group(lot),
    }


@torch.no_grad()
def _put_back(
    model: nn.Module, clean: Mapping[str, Tensor], groups: Sequence[Group], chosen: Mapping[str, Tensor]
) -> None:
    parameters = dict(model.named_parameters())
    for group in groups:
        if group.name not in chosen:
            continue
        units = chosen[group.name]
        values = gather(clean, group)[units]
        start = 0
        for part in group.parts:
            width = unit_shape(parameters[part.parameter], part, group.num_units)
            size = int(torch.tensor(width).prod())
            write_units(parameters[part.parameter], part, group.num_units, units, values[:, start : start + size])
            start += size
