"""GPTQModel without transformers' ``from_pretrained``."""

from __future__ import annotations

import os
import time
from typing import Any

from qcbguard_plugins.backends.gptq.stock import grid_of
from qcbguard_plugins.checkpoint.manifest import GuardReport
from qcbguard_plugins.defenses import Defense
from qcbguard_plugins.errors import UnguardableError
from qcbguard_plugins.models.layers import block_layers, target_of
from qcbguard_plugins.pipeline.calibrated import tokens_for
from qcbguard_plugins.pipeline.model import guard_planned_model
from qcbguard_plugins.pipeline.plan import Plan
from qcbguard_plugins.pipeline.settings import Guard, as_guard

# With fewer, GPTQModel divides its own pool of workers into nothing and stops.
_MIN_WORKERS = 2


def guard_gptq_model(model: Any, guard: Guard | Defense | str = "feedback", *, tokenizer: Any = None) -> GuardReport:
    """Guard a model that ``GPTQModel.load`` returned, in place, before its ``quantize``.

    A guarded folder (``qcbguard guard MODEL --for gptq-w4g128 --out GUARDED``) that is loaded instead needs none of
    this, and works with every setting.

    Args:
        model: What ``GPTQModel.load(folder, QuantizeConfig(..., offload_to_disk=False))`` returned.
        guard: A method's name, a defense, or a :class:`~qcbguard_plugins.pipeline.settings.Guard`.
        tokenizer: The model's tokenizer, for calibration from text.

    Returns:
        The report; the codes that GPTQModel's grid gives the guarded weights have been compared with the plan.

    Raises:
        UnguardableError: GPTQModel would read the weights from the checkpoint again and lose the guard, which it does
            unless ``offload_to_disk=False``; or a weight cannot be guarded.
    """
    started = time.monotonic()
    settings = model.quantize_config
    if getattr(settings, "offload_to_disk", True):
        raise UnguardableError(
            "with offload_to_disk=True, its default, GPTQModel reads the weights from the checkpoint again and would "
            "quantize them unguarded",
            remedy="Set QuantizeConfig(offload_to_disk=False), or guard the folder with 'qcbguard guard' instead.",
        )
    inner = model.model
    on_meta = [f"{name}  without weights" for name, weight in inner.named_parameters() if weight.is_meta]
    if on_meta:
        raise UnguardableError(
            f"{len(on_meta)} parameters are not in memory, so they cannot be guarded in place",
            details=on_meta,
            remedy="Guard the folder with 'qcbguard guard' and load that.",
        )
    grouped_order = settings.desc_act and not getattr(settings, "static_groups", False)
    grid = grid_of(settings.bits, settings.group_size, settings.sym, grouped_order)
    requested = as_guard(guard).with_seed()
    layers = block_layers(inner).items()
    targets = tuple(target_of(inner, name, grid, transposed=transposed) for name, transposed in layers)
    plan = Plan(str(inner.config.name_or_path) or type(inner).__name__, (grid.name,), targets)
    tokens = tokens_for(requested, inner.config, tokenizer)
    return guard_planned_model(inner.eval(), plan, requested, tokens, started)


def let_gptqmodel_run_on_few_cores() -> None:
    """Set what GPTQModel needs to quantize on a machine of two cores or fewer. Call it before gptqmodel is imported."""
    if (os.cpu_count() or 1) <= _MIN_WORKERS:
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(_MIN_WORKERS))
