"""The models of the study: attacked ones by name, and clean ones with what was done to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.studies.real_models.attack import ATTACKS, AttackSpec
from benchmarks.studies.real_models.fetch import model_dir
from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.checkpoint.weight_source import is_target
from qcbguard_plugins.detection.behaviour.sign_randomization import rounded

ATTACK_SPECS = {
    spec.name: spec
    for spec in (
        AttackSpec("nf4-brand"),
        AttackSpec("nf4-brand-tight", eps=0.35),
        AttackSpec("int8-brand", format="int8"),
        AttackSpec("fp4-brand", format="fp4"),
        AttackSpec("nf4-brand-light", repair_steps=70, learning_rate=1e-4),
        AttackSpec("nf4-refusal", payload="refusal"),
        AttackSpec("nf4-brand-late", blocks=(22, 30)),
    )
}

_Change = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Subject:
    """One model of the study.

    Attributes:
        name: Its name.
        kind: ``clean``, ``malicious`` (at every precision, so clean to a test of rounding) or ``attacked``.
        formats: Formats that it is tested for.
        base: Folder that it is made from.
        change: What is done to each weight on the way, in a copy of the folder; nothing where ``None``.
        num_seeds: Number of seeds that it is tested with.
        facts: What is known of the attack.
    """

    name: str
    kind: str
    formats: tuple[str, ...]
    base: Path
    change: _Change | None = None
    num_seeds: int = 1
    facts: dict[str, Any] = field(default_factory=dict)

    def folder(self, scratch: Path) -> Path:
        """The folder, changed in a copy below ``scratch`` where there is something to change."""
        if self.change is None:
            return self.base
        made = scratch / self.name.replace(" ", "-").replace(",", "")
        made.mkdir()
        for path in self.base.iterdir():
            if path.suffix == ".safetensors":
                tensors = load_file(path)
                save_file({name: self.change(name, t).contiguous() for name, t in tensors.items()}, made / path.name)
            elif path.is_file():
                (made / path.name).write_bytes(path.read_bytes())
        return made


def clean_subjects(names: Sequence[str]) -> Iterator[Subject]:
    """Clean models and what is done to models in practice; no format is tested on the grid that it was stored on.

    Args:
        names: Real models that are at hand.
    """
    for name in names:
        base = model_dir(name)
        # The encoder is small, so more formats and seeds can be afforded.
        formats, num_seeds = (("nf4", "int8"), 5) if name == "minilm-l6" else (("nf4",), 2)
        yield Subject(name, "clean", formats, base, num_seeds=num_seeds)
        changes: dict[str, _Change] = {
            "bf16": _cast(torch.bfloat16),
            "fp16": _cast(torch.float16),
            "pruned 30 %": _pruned,
            "dequantized gptq-w4g128": _dequantized("gptq-w4g128"),
            "noise, 1 % of a weight's size": _noisy,
        }
        for what, change in changes.items():
            yield Subject(f"{name}, {what}", "clean", formats, base, change)
        yield Subject(f"{name}, dequantized nf4", "clean", ("fp4",), base, _dequantized("nf4"))
        yield Subject(f"{name}, dequantized int8", "clean", ("nf4",), base, _dequantized("int8"))
    for folder in sorted(ATTACKS.glob("*-malicious-*")):
        yield Subject(folder.name, "malicious", ("nf4",), folder)
    for folder in sorted(ATTACKS.glob("*-fine-tuned-*")):
        yield Subject(folder.name, "clean", ("nf4",), folder)


def _cast(dtype: torch.dtype) -> _Change:
    return lambda _, tensor: tensor.to(dtype)


def _pruned(name: str, tensor: Tensor) -> Tensor:
    if not is_target(name, tuple(tensor.shape)):
        return tensor
    threshold = tensor.abs().flatten().kthvalue(round(0.3 * tensor.numel())).values
    return tensor.masked_fill(tensor.abs() <= threshold, 0.0)


def _dequantized(format: str) -> _Change:
    grid = get_grid(format)

    def change(name: str, tensor: Tensor) -> Tensor:
        fits = is_target(name, tuple(tensor.shape)) and not (format.endswith("g128") and tensor.shape[1] % 128)
        return (rounded(tensor, grid) if fits else tensor).half()

    return change


def _noisy(name: str, tensor: Tensor) -> Tensor:
    if not is_target(name, tuple(tensor.shape)):
        return tensor
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
    return tensor + 0.01 * tensor.abs().mean() * noise
