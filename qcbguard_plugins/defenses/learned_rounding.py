"""Train the roundings of a whole model against its full-precision self.

The model is student and teacher in one: its weights are replaced, where they are read, by those of the variables, and
for the teacher they are not. Nothing of it is changed, and it is left as it was found.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qcbguard_plugins._util.progress import stage
from qcbguard_plugins.defenses.base import ModelWeight
from qcbguard_plugins.defenses.soft_rounding import SoftRounding
from qcbguard_plugins.errors import CalibrationError

# The loss is smoothed over about this many steps before it is compared, and has to fall by this share of itself.
_SMOOTHING_STEPS = 5
_MIN_IMPROVEMENT = 1e-3


class TrainedMethod(Protocol):
    """A method whose roundings are trained; see :class:`~qcbguard_plugins.defenses.quantguard.QuantGuard`."""

    name: ClassVar[str]

    @property
    def harden(self) -> bool: ...
    @property
    def band(self) -> float | None: ...
    @property
    def steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def accumulation(self) -> int: ...
    @property
    def max_grad_norm(self) -> float: ...
    @property
    def patience(self) -> int: ...
    @property
    def teacher_dtype(self) -> str: ...
    @property
    def gradient_checkpointing(self) -> bool: ...
    @property
    def has_divergence(self) -> bool: ...
    def rate_for(self, rounding: SoftRounding) -> float:
        """The learning rate at the first step."""
        ...

    def divergence(self, teacher: Tensor, student: Tensor) -> Tensor:
        """The term of the loss that needs the model."""
        ...

    def penalties(self, roundings: Sequence[SoftRounding]) -> dict[str, Tensor]:
        """The terms that look at the weights alone."""
        ...


def learn_roundings(
    method: TrainedMethod, model: Any, targets: Iterable[ModelWeight], tokens: Tensor, seed: int
) -> dict[str, Tensor]:
    """Train, and say which neighbour each weight shall take; see :meth:`WholeModelDefense.learn`.

    Raises:
        CalibrationError: The loss is not finite; the step is named.
    """
    with torch.enable_grad(), _student(model, targets, method) as student:
        _train(method, model, student, tokens, seed)
        return {name: rounding.up() for name, rounding in student.roundings.items()}


@dataclass
class EarlyStop:
    """Says when the smoothed loss has stopped falling.

    Attributes:
        patience: Steps to wait for an improvement; 0 never stops.
    """

    patience: int
    _smoothed: float = math.nan
    _best: float = math.inf
    _waited: int = 0

    def __call__(self, loss: float) -> bool:
        """Take the loss of one step; true to stop."""
        share = 1 / _SMOOTHING_STEPS
        self._smoothed = loss if math.isnan(self._smoothed) else (1 - share) * self._smoothed + share * loss
        if self._smoothed < self._best - _MIN_IMPROVEMENT * abs(self._best) or math.isinf(self._best):
            self._best, self._waited = self._smoothed, 0
        else:
            self._waited += 1
        return 0 < self.patience <= self._waited


class _Substitute(nn.Module):
    """What a module reads as its weight: that of the variables, or its own for the teacher."""

    def __init__(self, rounding: SoftRounding, transposed: bool, switch: _Switch) -> None:
        super().__init__()
        # In a list, so that the variables do not become parameters of the model.
        self._rounding = [rounding]
        self._transposed = transposed
        self._switch = switch

    def forward(self, original: Tensor) -> Tensor:
        if self._switch.teaching:
            return original
        weight = self._rounding[0].weight()
        return (weight.T if self._transposed else weight).to(original.dtype)


@dataclass
class _Switch:
    teaching: bool = False


@dataclass
class _Student:
    roundings: dict[str, SoftRounding] = field(default_factory=dict)
    switch: _Switch = field(default_factory=_Switch)


@contextlib.contextmanager
def _student(model: Any, targets: Iterable[ModelWeight], method: TrainedMethod) -> Iterator[_Student]:
    """Put the variables in the place of the weights, and the weights back in the end."""
    student = _Student()
    wanted_grad = [parameter for parameter in model.parameters() if parameter.requires_grad]
    modules: list[nn.Module] = []
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [parameter.requires_grad_(True) for parameter in wanted_grad])
        stack.callback(lambda: [parametrize.remove_parametrizations(m, "weight", False) for m in modules])
        for parameter in wanted_grad:
            parameter.requires_grad_(False)
        model.eval()
        for target in targets:
            rounding = SoftRounding(target.lattice, band=method.band, harden=method.harden)
            student.roundings[target.name] = rounding
            for module in target.modules:
                substitute = _Substitute(rounding, target.transposed, student.switch)
                parametrize.register_parametrization(module, "weight", substitute, unsafe=True)
                modules.append(module)
        if method.gradient_checkpointing:
            stack.enter_context(_checkpointing(model))
        # After the targets, which are made from the weights as they are stored.
        stack.enter_context(_no_float16_on_a_processor(model))
        yield student


@contextlib.contextmanager
def _no_float16_on_a_processor(model: Any) -> Iterator[None]:
    """Compute in float32 what processors multiply several times slower in float16; the weights come back untouched."""
    halves = [
        (tensor, tensor.data)
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.dtype == torch.float16 and tensor.device.type == "cpu"
    ]
    try:
        for tensor, stored in halves:
            tensor.data = stored.float()
        yield
    finally:
        for tensor, stored in halves:
            tensor.data = stored


@contextlib.contextmanager
def _checkpointing(model: Any) -> Iterator[None]:
    """Run blocks again in the backward pass.

    transformers does so in training mode only. The blocks alone are told that they train, so that no dropout starts.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    blocks = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for block in blocks:
        block.training = True
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


def _train(method: TrainedMethod, model: Any, student: _Student, tokens: Tensor, seed: int) -> None:
    """Train the variables."""
    roundings = list(student.roundings.values())
    groups = [{"params": [rounding.alpha], "lr": method.rate_for(rounding)} for rounding in roundings]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / method.steps, total_iters=method.steps)
    variables = [rounding.alpha for rounding in roundings]
    batches = _batches(tokens, method.batch_size, seed)
    stop = EarlyStop(method.patience)
    with stage(method.steps, f"{method.name}: training") as progress:
        for step in range(1, method.steps + 1):
            optimizer.zero_grad()
            terms = _backward(method, model, student, roundings, batches)
            total = sum(terms.values())
            _require_finite(total, terms, step, method.steps)
            norm = float(torch.nn.utils.clip_grad_norm_(variables, method.max_grad_norm))
            _require_finite(norm, {**terms, "norm of the gradient": norm}, step, method.steps)
            optimizer.step()
            schedule.step()
            progress(1)
            if stop(total):
                break


def _backward(
    method: TrainedMethod, model: Any, student: _Student, roundings: Sequence[SoftRounding], batches: Iterator[Tensor]
) -> dict[str, float]:
    """Gradients of one step, and the terms of its loss."""
    terms: dict[str, float] = {}
    penalties = method.penalties(roundings)
    if penalties:
        torch.stack(list(penalties.values())).sum().backward()  # type: ignore[no-untyped-call]
        terms |= {name: value.item() for name, value in penalties.items()}
    if not method.has_divergence:
        return terms
    terms["kl"] = 0.0
    for _ in range(method.accumulation):
        ids = next(batches)
        wanted = _teach(method, model, student.switch, ids)
        divergence = method.divergence(wanted, model(input_ids=ids, use_cache=False).logits) / method.accumulation
        divergence.backward()  # type: ignore[no-untyped-call]
        terms["kl"] += divergence.item()
    return terms


@torch.no_grad()
def _teach(method: TrainedMethod, model: Any, switch: _Switch, ids: Tensor) -> Tensor:
    """The teacher's logits."""
    in_bfloat16 = method.teacher_dtype == "bfloat16"
    switch.teaching = True
    try:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=in_bfloat16):
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
    finally:
        switch.teaching = False
    return logits


def _batches(tokens: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Sequences in random order, all of them before any comes again."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    while True:
        order = torch.randperm(len(tokens), generator=generator).to(tokens.device)
        yield from torch.split(tokens[order], batch_size)


def _require_finite(value: float, terms: Mapping[str, float], step: int, num_steps: int) -> None:
    if math.isfinite(value):
        return
    raise CalibrationError(
        f"training went wrong at step {step} of {num_steps}: the loss is no finite number",
        details=[f"{name}  {term}" for name, term in terms.items()],
        remedy="Guard in float32 or bfloat16 instead of float16, or lower learning_rate.",
    )
