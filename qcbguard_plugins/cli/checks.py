"""Checks of an installation. Each is made with the real thing: a quantizer is asked to quantize."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qcbguard_plugins._util.dtypes import DTYPES
from qcbguard_plugins._util.records import installed_versions
from qcbguard_plugins.backends.formats import FORMATS, get_grid
from qcbguard_plugins.defenses import Stochastic
from qcbguard_plugins.errors import QcbguardError
from qcbguard_plugins.rounding.guard_weight import guard_weight

_PROBE_SHAPE = (96, 128)


@dataclass(frozen=True)
class Check:
    """One check: ``ok``, ``note`` (works, with something to know) or ``FAILED``, and what was found."""

    name: str
    status: str
    detail: str


def run_checks(before: Callable[[], None] = lambda: None) -> list[Check]:
    """Run all checks.

    Args:
        before: Called once the optional libraries are known to import.
    """
    versions = installed_versions()
    checks = [Check("versions", "ok", ", ".join(f"{name} {version}" for name, version in versions.items()))]
    try:
        from qcbguard_plugins.backends.bitsandbytes.stock import require_bitsandbytes

        require_bitsandbytes()
        before()
        from qcbguard_plugins.hooks.transformers import bitsandbytes as registration

        registration.register()
    except QcbguardError as error:
        return [*checks, Check("bitsandbytes", "FAILED", str(error))]
    checks.append(Check("transformers hooks", "ok", "guarded quantizers are registered"))
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    checks += [_check_grid(name, device) for device in devices for name in FORMATS]
    checks.append(_check_repacking())
    return checks


def _check_grid(name: str, device: str) -> Check:
    """Guard random weights and see whether the quantizer of this machine stores the plan."""
    from qcbguard_plugins.backends.bitsandbytes.stock import stock_codes

    label = f"{name} on {device}"
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        weight = torch.randn(_PROBE_SHAPE, generator=generator).to(device, dtype)
        guarded = guard_weight(weight, get_grid(name), Stochastic(), seed=0, name=name)
        differing = int((stock_codes(guarded.weight, name) != guarded.codes).sum())
        if differing:
            return Check(
                label, "FAILED", f"bitsandbytes stores {differing} of {weight.numel()} codes otherwise ({dtype})"
            )
    return Check(label, "ok", "bitsandbytes stores the planned codes")


def _check_repacking() -> Check:
    from bitsandbytes.functional import has_avx512bf16

    if has_avx512bf16():
        return Check(
            "4-bit on this CPU",
            "note",
            "AVX512-BF16: bitsandbytes repacks 4-bit weights at the first forward pass; read codes, and save stock "
            "models, before it",
        )
    return Check("4-bit on this CPU", "ok", "weights are not repacked")
