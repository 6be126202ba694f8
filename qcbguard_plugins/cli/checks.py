"""Checks of an installation. Each is made with the real thing: a quantizer is asked to quantize."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import torch

from qcbguard_plugins._util.dtypes import DTYPES
from qcbguard_plugins.backends.base import Backend
from qcbguard_plugins.backends.formats import BACKENDS, versions
from qcbguard_plugins.defenses import Stochastic
from qcbguard_plugins.errors import MissingDependencyError, QcbguardError
from qcbguard_plugins.models.skeleton import require_hooks
from qcbguard_plugins.rounding.guard_weight import guard_weight

# Every GGUF type fits it.
_PROBE_SHAPE = (96, 256)
_SEED = 0

_HOOKS = ("bitsandbytes", "gptq", "torchao")

Status = Literal["ok", "note", "absent", "FAILED"]


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: What was checked.
        status: ``ok``, ``note`` (works, with something to know), ``absent`` (not installed) or ``FAILED``.
        detail: What was found.
    """

    name: str
    status: Status
    detail: str


def run_checks(before: Callable[[], None] = lambda: None) -> list[Check]:
    """Run all checks: of every backend that is installed, each of its formats.

    Args:
        before: Called before the optional libraries are used.
    """
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    checks = [Check("versions", "ok", found)]
    before()
    for backend in BACKENDS.values():
        checks += _check_backend(backend)
    if all(check.status == "absent" for check in checks[1:]):
        extras = " or ".join(f"'qcbguard-plugins[{backend.extra}]'" for backend in BACKENDS.values() if backend.extra)
        checks.append(Check("backends", "FAILED", f"no stock quantizer is installed; pip install one of {extras}"))
    return checks


def _check_backend(backend: Backend) -> Iterator[Check]:
    try:
        backend.require()
    except MissingDependencyError as error:
        yield Check(backend.name, "absent", f"{error.summary}; {error.remedy}" if error.remedy else error.summary)
        return
    yield from (_check_format(backend, name) for name in backend.formats)
    if backend.name in _HOOKS:
        yield _check_hook(backend.name)
    yield from (Check(subject, "note", text) for subject, text in backend.notes().items())


def _check_hook(name: str) -> Check:
    """See whether guarded loads of a backend can be registered in this transformers."""
    try:
        require_hooks()
        import_module(f"qcbguard_plugins.hooks.transformers.{name}").register()
    except QcbguardError as error:
        return Check(f"{name} in transformers", "FAILED", str(error))
    return Check(f"{name} in transformers", "ok", "guarded loads are registered")


def _check_format(backend: Backend, name: str) -> Check:
    """Guard random weights and see whether the quantizer of this machine stores the plan."""
    generator = torch.Generator().manual_seed(_SEED)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() and backend.on_cuda else [])]
    try:
        grid = backend.representative_grid(name)
        for device in devices:
            for dtype in DTYPES:
                weight = torch.randn(_PROBE_SHAPE, generator=generator).mul_(0.02).to(device, dtype)
                guarded = guard_weight(weight, grid.probe(), Stochastic(), seed=_SEED, name=name)
                if backend.stored_digest(guarded.weight, grid) != guarded.digest:
                    return Check(name, "FAILED", f"{backend.name} stores other codes than planned ({dtype}, {device})")
    except QcbguardError as error:
        return Check(name, "FAILED", str(error))
    return Check(name, "ok", f"{backend.name} stores the planned codes")
