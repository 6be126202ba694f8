"""Which neighbour each weight shall become.

A defense is a frozen dataclass whose fields are the method's parameters. It sees a lattice and returns codes; it never
sees a file, a model or a quantizer.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from qcbguard_plugins._util.random import seed_digest, uniform
from qcbguard_plugins._util.registry import Registry
from qcbguard_plugins.errors import CalibrationError, UsageError
from qcbguard_plugins.grids.base import Lattice


@dataclass
class ChoiceContext:
    """What a defense may use besides the lattice.

    Attributes:
        rng: Source of randomness, seeded per tensor name; its draws are consumed in the order of the weights.
        hessian: float32 ``[in_features, in_features]``, the sum of ``x x^T`` over calibration inputs of the layer;
            present only for a defense that needs calibration.
        looks_attacked: Whether the weight tests saw an attack in the model that the weight belongs to; true where
            nobody looked.
        round_up: Bool ``[out_features, in_features]``, what a whole-model method learned for this weight: true for the
            upper neighbour.
        chosen: Where a defense writes down the parameters that it chose by itself, for the report.
        key: Key of the draws that belong to a place in the weight, see :mod:`qcbguard_plugins._util.random`.
        offset: Place in the weight of the first one that the defense is handed.
    """

    rng: np.random.Generator
    hessian: Tensor | None = None
    looks_attacked: bool = True
    round_up: Tensor | None = None
    chosen: dict[str, float | str] = field(default_factory=dict)
    key: int | None = None
    offset: int = 0

    def draws(self, like: Tensor) -> Tensor:
        """float32 draws in [0, 1) in the shape and on the device of ``like``, one for each place in the weight.

        The same for a place wherever a weight is cut, and on every device.
        """
        if self.key is None:
            raise ValueError("this context has no key to draw with")
        return uniform(self.key, self.offset, like.numel(), like.device).view(like.shape)

    def uniform(self, like: Tensor) -> Tensor:
        """float32 draws in [0, 1) in the shape and on the device of ``like``; the same on every device."""
        return torch.from_numpy(self.rng.random(tuple(like.shape), dtype=np.float32)).to(like.device)

    def normal(self, like: Tensor) -> Tensor:
        """float32 standard normal draws in the shape and on the device of ``like``; the same on every device."""
        return torch.from_numpy(self.rng.standard_normal(tuple(like.shape), dtype=np.float32)).to(like.device)


@dataclass(frozen=True)
class Defense(ABC):
    """One method.

    ``needs_calibration`` is true for a method that looks at a layer's inputs. Such a method is handed the lattice of a
    whole weight; the others may be handed any run of blocks, in order. ``weighs_evidence`` is true for one that looks
    at :attr:`ChoiceContext.looks_attacked`, too. ``is_random`` is true for one whose choice depends on the seed, and
    ``is_stochastic_rounding`` for one that lets each weight go up with its position as probability, by the draw that
    belongs to its place: compiled code knows how.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    needs_calibration: ClassVar[bool] = False
    is_random: ClassVar[bool] = False
    is_stochastic_rounding: ClassVar[bool] = False

    @property
    def weighs_evidence(self) -> bool:
        """Whether the weight tests shall look at the model first."""
        return False

    @property
    def bytes_per_weight(self) -> float:
        """Memory that the method keeps for each weight of the model while it works, besides the model."""
        return 0.0

    def operations(self, shape: tuple[int, int], num_sequences: int, sequence_length: int) -> float:
        """Arithmetic operations of a method that needs calibration on one weight, besides a forward pass.

        Args:
            shape: ``(out_features, in_features)``.
            num_sequences: Sequences of calibration.
            sequence_length: Tokens in each.
        """
        return 0.0

    @abstractmethod
    def choose(self, lattice: Lattice, context: ChoiceContext) -> Tensor:
        """Choose a level for every weight.

        Args:
            lattice: Neighbours of the weights.
            context: Randomness and, where needed, calibration.

        Returns:
            uint8 ``[num_blocks, block_size]``, codes on the lattice's grid. What is returned for frozen weights is
            ignored.
        """

    def parameters(self) -> dict[str, Any]:
        """The method's parameters as plain JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class ModelWeight:
    """One weight of a model, for a method that looks at all of them together.

    Attributes:
        name: Name of the layer.
        modules: The modules that read it; more than one where it is tied.
        transposed: True where they hold ``[in_features, out_features]``.
        lattice: Its neighbours.
    """

    name: str
    modules: tuple[nn.Module, ...]
    transposed: bool
    lattice: Lattice


@dataclass(frozen=True)
class WholeModelDefense(Defense):
    """A method that chooses for all weights of a model together.

    :meth:`learn` is handed the model; :meth:`choose` is then handed each weight's part of what was learned.
    """

    needs_calibration: ClassVar[bool] = True

    @abstractmethod
    def learn(self, model: Any, targets: Iterable[ModelWeight], tokens: Tensor, seed: int) -> dict[str, Tensor]:
        """Learn from a model, and leave it as it was.

        Args:
            model: A causal language model of transformers in full precision.
            targets: The weights to choose for; each is made when it is asked for.
            tokens: int64 ``[num_sequences, sequence_length]`` on the model's device.
            seed: Seed of the run.

        Returns:
            By name of the target bool ``[out_features, in_features]``, true for the upper neighbour.
        """

    def choose(self, lattice: Lattice, context: ChoiceContext) -> Tensor:
        if context.round_up is None:
            raise CalibrationError(
                f"{self.name} learns from a whole model, and was handed a single weight",
                remedy="Guard a model or a folder.",
            )
        return round_up_where(lattice, lattice.from_matrix(context.round_up))


_REGISTRY: Registry[Defense] = Registry("method", "parameter")
register_defense, available_defenses, get_defense = _REGISTRY.register, _REGISTRY.available, _REGISTRY.build


def hessian_operations(columns: int, num_tokens: int) -> float:
    """Operations of gathering and factorizing a Hessian."""
    # A Cholesky factor, an inverse and another factor, in float64 at half the rate.
    return 2.0 * num_tokens * columns**2 + 4.0 * columns**3


def require_range(value: float, low: float, high: float, what: str) -> None:
    """Refuse a parameter outside ``[low, high]``, NaN included."""
    if not isinstance(value, (int, float)) or math.isnan(value) or not low <= value <= high:
        raise UsageError(f"{what} must lie between {low:g} and {high:g}, got {value!r}")


def require_whole(value: int, least: int, what: str) -> None:
    """Refuse a parameter that is no whole number, or too small a one."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{what} must be a whole number of at least {least}, got {value!r}")


def rng_for(seed: int, tensor_name: str) -> np.random.Generator:
    """NumPy's generator of one tensor, which starts from its :func:`~qcbguard_plugins._util.random.seed_digest`."""
    return np.random.Generator(np.random.SFC64(int.from_bytes(seed_digest(seed, tensor_name), "little")))


def round_up_where(lattice: Lattice, round_up: Tensor) -> Tensor:
    """Codes of the upper neighbour where ``round_up`` is true, of the lower one elsewhere."""
    return lattice.lower.add_(round_up)
