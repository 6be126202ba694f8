"""Does a signature find the channels that the attack did change? In the lab the clean model is there to tell."""

from __future__ import annotations

from typing import Any, Final

import torch
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.studies.purification.specs import LabSettings, VariantsSpec
from benchmarks.studies.purification.study import Study
from qcbguard_plugins.lab.recipes import step_folder
from qcbguard_plugins.lab.specs import MaliciousSpec
from qcbguard_plugins.models.loading import load_full_precision
from qcbguard_plugins.purification.architectures import find_architecture
from qcbguard_plugins.purification.immunization import score_units, variant_path
from qcbguard_plugins.purification.units import gather_all, mlp_channels

_RATIOS: Final = (0.03, 0.1, 0.25, 0.5, 0.8)


def spread_study(study: Study, spec: MaliciousSpec, settings: LabSettings) -> str:
    """A Markdown table: the share of the attack's squared update that lies in the channels with the highest scores.

    By lot it is the share of the channels. Where the variants are not made the table has no rows.
    """
    lines = [
        f"| score | rank correlation with the update | {' | '.join(f'top {ratio:g}' for ratio in _RATIOS)} |",
        f"|---|---|{'---|' * len(_RATIOS)}",
    ]
    variants = step_folder("variants", VariantsSpec(attacked=spec, settings=settings), study.cache)
    if variants.exists():
        update = update_norms(study, spec)
        groups = mlp_channels(model := load_attacked(study, spec), find_architecture(model.config))
        paths = [variant_path(variants, number) for number in range(settings.num_variants)]
        for score in ("combined", "norm", "alignment", "activation"):
            config = settings.model_copy(update={"score": score}).config
            scores = torch.cat(list(score_units(groups, paths, config).values()))
            ranked = update.square()[scores.argsort(descending=True, stable=True)]
            shares = [float(ranked[: round(ratio * len(ranked))].sum() / ranked.sum()) for ratio in _RATIOS]
            correlation = float(spearmanr(scores, update).statistic)
            lines.append(f"| {score} | {correlation:.2f} | {' | '.join(f'{share:.3f}' for share in shares)} |")
    return "\n".join(lines) + "\n"


def load_attacked(study: Study, spec: MaliciousSpec) -> Any:
    """The attacked model in float32."""
    return load_full_precision(step_folder("malicious", spec, study.cache), torch.float32)


def update_norms(study: Study, spec: MaliciousSpec) -> Tensor:
    """Norm of what the attack added to every channel, ``[num_channels]``."""
    attacked = load_attacked(study, spec)
    clean = load_full_precision(step_folder("clean", spec.model, study.cache), torch.float32)
    groups = mlp_channels(attacked, find_architecture(attacked.config))
    ours, theirs = gather_all(attacked, groups), gather_all(clean, groups)
    return torch.cat([(ours[group.name] - theirs[group.name]).norm(dim=1) for group in groups])
